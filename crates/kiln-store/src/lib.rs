//! Bytes and file trees that outlive a build: content by digest, snapshots, cache records, leases, garbage collection.
//!
//! Tour:
//! - [`error`] and [`stop`]: how work fails and how it is asked to end.
//!
//! Absent on purpose: builds, vertices, sessions, registries. A blob that is not here arrives through a provider the
//! caller brings.

pub mod error;
pub mod stop;

pub use error::{Result, StoreError};
pub use stop::{Stop, StopGuard};
