//! Runs one process in fresh namespaces over a given root.
//!
//! The executor knows neither build graphs nor snapshots: a [`ProcessSpec`] names directories, mounts and a command, an
//! [`Executor`] carries it out, and what comes back is an [`ExitReport`] or an [`ExecError`] that says which step failed.
//!
//! Tour: [`spec`](ProcessSpec) is the data, `executor` the trait and the handle of a running process, `stubs` the mount targets
//! that have to disappear again, `error` the failures.
//!
//! Deliberately absent: image and layer knowledge, log formatting, retries, and any mount in the daemon's own namespace.

mod error;
mod executor;
mod protocol;
mod spec;
mod stubs;

pub use error::{ExecError, Step, errno_text};
pub use executor::{
    BoxFuture, Executor, ExitReport, Held, Input, Output, Process, ProcessControl, ProcessIo, Signal, Usage,
};
pub use spec::{
    BridgeAddress, FileMount, JoinSpec, MountFlags, MountKind, MountSpec, NetMode, Overlay, OverlayWritable,
    ProcessSpec, Resources, RootMount, SecurityMode, TerminalSize, Ulimit,
};
pub use stubs::{ParentTimes, Stub};
