//! Bytes and file trees that outlive a build: content by digest, snapshots, cache records, leases, garbage collection.
//!
//! Tour:
//! - [`error`]: how work fails. [`ids`]: what things are called and whose they are.
//!
//! Absent on purpose: builds, vertices, sessions, registries. A blob that is not here arrives through a provider the
//! caller brings.

pub mod error;
pub mod ids;
mod meta;
mod record_file;

pub use error::{Result, StoreError};
pub use ids::{DirId, LayerId, RecordId, RecordType, Tenant, Time, TreeId};
pub use kiln_fs::{Stop, StopGuard};
