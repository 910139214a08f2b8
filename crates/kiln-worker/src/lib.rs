//! How each operation is keyed and carried out on this machine.
//!
//! Tour: [`worker`] is what all operations share and which does what; [`key`] is the byte-exact part, what makes two
//! operations the same; `op` has the operations; [`read`] looks into results for frontends; [`client`] is what a build
//! brings along; [`error`] says why an operation failed.
//!
//! Absent on purpose: when and whether an operation runs (the solver decides), the layout of bytes on disk (the store's),
//! namespaces (the executor's), and anything about Dockerfiles.

mod cache_mounts;
pub mod client;
pub mod error;
pub mod key;
mod mounts;
pub mod op;
pub mod read;
mod snapshot;
mod surroundings;
pub mod worker;

pub use client::Client;
pub use error::OpError;
pub use read::FileInfo;
pub use surroundings::DnsSettings;
pub use worker::{LlbWorker, NetworkOptions, Ref, WorkerOptions};
