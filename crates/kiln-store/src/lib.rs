//! Bytes and file trees that outlive a build: content by digest, snapshots, cache records, leases, garbage collection.
//!
//! Tour:
//! - [`error`]: how work fails. [`ids`]: what things are called and whose they are.
//! - Trees: [`manifest`] (what is in one), [`tree`] (one on disk), [`view`] (what a stack of them shows), [`layer`]
//!   (archive to tree and back), [`compress`].
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

// Trees of files: what a layer is on disk and what is done with it.
pub mod compress;
mod files;
pub mod layer;
pub mod manifest;
pub mod tree;
pub mod view;

pub use compress::{Algorithm, Compression};
pub use manifest::{Entry, Kind, Manifest, Usage};
pub use tree::{OverlayXattr, Tree, TreeBuilder};
pub use view::{Node, View};
