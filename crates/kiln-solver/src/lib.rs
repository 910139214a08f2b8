//! The value of an edge: computed once, cached, shared between builds, cancellable.
//!
//! Tour: [`op`] has the traits a worker implements; [`solver`] is what all jobs share and [`job`] is one build; `edge`
//! is the way from a vertex to its value, the heart of the room, and `run` its last step. `flight` makes work happen once and die with its last
//! waiter. [`cache_key`] says when two pieces of work are the same (read its essay first), [`cache`] what is remembered
//! between builds. [`progress`] tells everybody what happens, [`reporter`] is
//! where work says so, [`spool`] keeps what steps write, [`context`] is what an
//! operation may use, [`error`] what can go wrong.
//!
//! Absent on purpose: disks, sessions, processes and the meaning of any operation. Results, errors and clients are types
//! of the worker, so that the solver is tested with strings and without root.

pub mod cache;
pub mod cache_key;
pub mod context;
mod edge;
pub mod error;
mod flight;
pub mod job;
pub mod op;
pub mod progress;
pub mod reporter;
mod run;
pub mod solver;
pub mod spool;

pub use cache::{CacheError, CacheStore, ContentAlias, Hit, KeyAlias, MemoryCache, RecordVersion, Save, Tenant};
pub use cache_key::{KeyId, KeyInput, KeyParts, LinkId, MissReason, OpDigest, RecordOutput};
pub use context::{OpContext, Permit};
pub use error::{ErrorKind, SolveError, WorkerError};
pub use flight::TeardownGuard;
pub use job::{Job, JobId, JobSpec, Solved};
pub use op::{CacheMap, Dep, ExecFailure, Op, Worker};
pub use progress::{
    JobProgress, LogProgress, LogStream, ProgressEvent, ProgressReader, StatusProgress, VertexProgress, Warning,
};
pub use reporter::{Reopened, Reporter, StatusHandle};
pub use solver::{Solver, SolverOptions};
pub use spool::{DirSpool, LogFile, LogSpool, MemorySpool};
