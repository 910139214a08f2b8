//! What the user wrote becomes LLB.
//!
//! Tour: [`bridge`] is what a frontend asks of the daemon, and what it gives back; [`dockerfile`] reads Dockerfiles;
//! [`error`] says what is wrong with them, and where.
//!
//! Absent on purpose: any I/O of its own, the wire (requests and errors are translated by the daemon), and frontends in
//! containers, which the daemon runs.

pub mod bridge;
pub mod dockerfile;
pub mod error;
mod gotext;

pub use bridge::{
    Bridge, BridgeError, BridgeErrorKind, BridgeInfo, Frontend, FrontendResult, ResultRefs, SolveRequest,
};
pub use error::{DockerfileError, FrontendError};
