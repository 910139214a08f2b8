//! Runs one process in fresh namespaces over a given root.
//!
//! The executor knows neither build graphs nor snapshots: a [`ProcessSpec`] names directories, mounts and a command, an
//! [`Executor`] carries it out, and what comes back is an [`ExitReport`] or an [`ExecError`] that says which step failed.
//!
//! Tour, from the outside in: `spec` is the data, `executor` the trait and the handle of a running process. `parent` is the
//! daemon's side of the namespaces back end (one thread launches, one reaps), `running` the talk with a single child, `protocol`
//! what they say to each other. `init` is the other process: `launcher` forks, `child` sets up and executes, `rootfs`, `mounts`
//! and `walk` make what it sees, `identity`, `capabilities` and `seccomp` what it is and may do. `cgroup` and `device` limit and
//! count. `stubs` clears mount targets away. `userns` makes an ordinary user's daemon root of its own user namespace. `sys` holds all unsafe code.
//!
//! Deliberately absent: image and layer knowledge, log formatting, retries, and any mount in the daemon's own namespace.

mod cgroup;
mod device;
mod error;
mod executor;
mod init;
mod parent;
mod protocol;
mod running;
mod spec;
mod stubs;
mod sys;
mod userns;

pub use cgroup::CgroupPolicy;
pub use error::{ExecError, Step, errno_text};
pub use executor::{
    BoxFuture, Executor, ExitReport, Held, Input, Output, Process, ProcessControl, ProcessIo, Signal, Usage,
};
pub use init::maybe_init;
pub use parent::{NamespaceConfig, NamespaceExecutor, in_user_namespace};
pub use spec::{
    BridgeAddress, FileMount, JoinSpec, MountFlags, MountKind, MountSpec, NetMode, Overlay, OverlayWritable,
    ProcessSpec, Resources, RootMount, SecurityMode, TerminalSize, Ulimit,
};
pub use stubs::{ParentTimes, Stub, clean_stubs};
pub use userns::{IdMapping, UserNamespaceError, enter_user_namespace};
