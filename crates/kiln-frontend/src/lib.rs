//! What the user wrote becomes LLB.
//!
//! Tour: [`bridge`] is what a frontend asks of the daemon, and what it gives back; [`frontend`] is the way from attributes to a
//! result; [`options`] reads the attributes, `context` finds the files they speak of; [`dockerfile`] reads Dockerfiles and turns
//! stages into operations; [`image`] is the config that comes out; `subrequest` answers questions about a Dockerfile without
//! building it; [`error`] says what is wrong, and where.
//!
//! Absent on purpose: any I/O of its own, the wire (requests and errors are translated by the daemon), and frontends in
//! containers, which the daemon runs.

pub mod bridge;
mod context;
pub mod dockerfile;
pub mod error;
pub mod frontend;
mod git_ref;
mod gotext;
pub mod image;
pub mod options;
mod subrequest;

pub use bridge::{
    Bridge, BridgeError, BridgeErrorKind, BridgeInfo, Frontend, FrontendResult, ResultRefs, SolveRequest,
};
pub use error::{DockerfileError, FrontendError};
pub use frontend::DockerfileFrontend;
