//! Bytes and file trees that outlive a build: content by digest, snapshots, cache records, leases, garbage collection.
//!
//! Tour:
//! - [`store`]: [`Store`], one state directory, opened (`open` mends it first; `layout` names its parts).
//! - [`ids`], [`error`]: what things are called, whose they are, how work fails.
//! - [`content`]: blobs by digest, [`draft`]: blobs in the making. [`provider`]: where missing ones come from, `fetch`:
//!   how they get here.
//! - [`layer_ref`]: [`LayerRef`], what a result is (`layer_table`: all of them). [`realize`]: from a layer to files.
//!   `pack`: from a layer to a blob. `compose`: layers from layers. [`active`]: how a new layer comes to be. `in_flight`:
//!   equal work is done once.
//! - [`records`]: cache records. [`history`]: build history.
//! - [`cache_mount`], [`context`]: directories that persist and change.
//! - [`ledger`]: the disk account. [`gc`]: what is kept and what goes.
//! - `meta` (the index), `epoch` (what survives a power cut), `trash`, `keeper` (the background thread).
//! - Trees: [`manifest`] (what is in one), [`tree`] (one on disk), [`view`] (what a stack of them shows), [`layer`]
//!   (archive to tree and back), [`compress`], [`union`] (FileOp: a new tree over a view, without a mount),
//!   [`snapshot`] (a view as the root of a process, and what it wrote), [`checksum`] (content digests).
//!
//! Absent on purpose: builds, vertices, sessions, registries. A blob that is not here arrives through a provider the
//! caller brings.

pub mod active;
pub mod cache_mount;
mod compose;
pub mod content;
pub mod context;
mod copy_dir;
pub mod draft;
mod epoch;
pub mod error;
mod fetch;
pub mod gc;
pub mod history;
pub mod ids;
mod in_flight;
mod keeper;
pub mod layer_ref;
mod layer_table;
mod layout;
pub mod ledger;
mod meta;
mod open;
mod pack;
pub mod provider;
pub mod realize;
mod record_file;
pub mod records;
pub mod store;
mod trash;

pub use active::ActiveSnapshot;
pub use cache_mount::{CacheMount, CacheMountRequest, Sharing};
pub use content::{BlobHandle, BlobInfo, BlobReader, ContentStore};
pub use context::ContextDir;
pub use draft::ContentWriter;
pub use error::{Result, StoreError};
pub use gc::{GcPolicy, UsageRecord};
pub use history::{History, HistoryRecord};
pub use ids::{DirId, LayerId, RecordId, RecordType, Tenant, Time, TreeId};
pub use kiln_fs::{Stop, StopGuard};
pub use layer_ref::{LayerMeta, LayerRef, LazyLayer};
pub use ledger::{Area, LedgerReport, Reservation};
pub use open::OpenReport;
pub use provider::{BlobProvider, BlobStream, ProviderError, Providers};
pub use realize::{RealizeCtx, RealizeEvent, RealizeObserver};
pub use records::{CacheHit, CacheRecord, NewRecord, Records};
pub use store::{SnapshotterChoice, Store, StoreConfig};

// Trees of files: what a layer is on disk and what is done with it.
pub mod checksum;
pub mod compress;
mod files;
pub mod layer;
pub mod manifest;
pub mod snapshot;
pub mod tree;
pub mod union;
pub mod view;

pub use compress::{Algorithm, Compression};
pub use manifest::{Entry, Kind, Manifest, Usage};
pub use snapshot::{ActiveRoot, Mount, Native, OverlayFs, Snapshotter};
pub use tree::{OverlayXattr, Tree, TreeBuilder};
pub use union::{CopySpec, FileWriter, ModeChange, Owner, OwnerSpec, UserSpec};
pub use view::{Node, View};
