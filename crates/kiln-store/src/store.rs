//! One state directory, opened: the object that everything else of this crate hangs on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_fs::Stop;
use parking_lot::Mutex;

use crate::content::{BlobTable, ContentStore};
use crate::epoch::Epochs;
use crate::error::Result;
use crate::gc;
use crate::ids::Tenant;
use crate::in_flight::InFlight;
use crate::keeper::Keeper;
use crate::layer_table::LayerTable;
use crate::layout::{self, StateDir};
use crate::ledger::{Area, Ledger, LedgerReport, Reservation, disk_usage};
use crate::meta::{Batch, Index};
use crate::open::OpenReport;
use crate::records::RecordUse;
use crate::snapshot::{Native, OverlayFs, Snapshotter};
use crate::trash::Trash;
use crate::tree::OverlayXattr;
use crate::{cache_mount, context, history, open};

/// How snapshots are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotterChoice {
    /// Overlay where a mount works, else native.
    #[default]
    Auto,
    /// Overlayfs; opening fails where it does not work.
    Overlay,
    /// Full copies.
    Native,
}

/// Where and how to open a store.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The state directory; created if missing.
    pub root: PathBuf,
    /// How snapshots are made.
    pub snapshotter: SnapshotterChoice,
    /// Hard limit for everything under the root, in bytes; 0 for none but the disk. Garbage collection has limits of
    /// its own; this one refuses writes.
    pub limit: u64,
    /// A directory that does not survive a reboot (`/run/…`): a cookie there tells this boot's state directory from one
    /// that was rolled back. `None` relies on boot id and file system id.
    pub cookie_dir: Option<PathBuf>,
    /// How often written data is made durable in the background. Zero: after every write, for tests.
    pub seal_every: std::time::Duration,
}

impl StoreConfig {
    /// Defaults for a state directory.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            snapshotter: SnapshotterChoice::Auto,
            limit: 0,
            cookie_dir: None,
            seal_every: std::time::Duration::from_secs(10),
        }
    }
}

/// Bytes, trees, layers and records of one state directory. Shared by `Arc`; handles keep it open, the lock on the
/// directory goes with the last of them.
#[derive(Debug)]
pub struct Store {
    pub(crate) dir: Arc<StateDir>,
    pub(crate) config: StoreConfig,
    pub(crate) overlay: OverlayXattr,
    pub(crate) native: bool,
    pub(crate) index: Index,
    pub(crate) epochs: Epochs,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) blobs: BlobTable,
    pub(crate) layers: Mutex<LayerTable>,
    /// One writer of cache records at a time: a save reads what is there, decides, and commits.
    pub(crate) saving: Mutex<()>,
    pub(crate) record_use: RecordUse,
    pub(crate) in_flight: InFlight,
    pub(crate) cache_mounts: cache_mount::Table,
    pub(crate) contexts: context::Table,
    pub(crate) histories: history::Table,
    pub(crate) trash: Trash,
    pub(crate) keeper: Keeper,
    pub(crate) collecting: Mutex<gc::Collecting>,
}

impl Store {
    /// Opens or creates a state directory. Blocks; everything that went wrong since the last time is mended first and
    /// stands in the report.
    ///
    /// # Errors
    /// [`StoreError::Locked`](crate::StoreError::Locked) if another daemon has it, [`StoreError::Format`](crate::StoreError::Format) if it was made by another version or under
    /// another user id map, or the file system refused.
    pub fn open(config: StoreConfig) -> Result<(Arc<Self>, OpenReport)> {
        open::open(config)
    }

    /// The state directory.
    pub fn root(&self) -> &Path {
        self.dir.root()
    }

    /// How opaque directories are marked here: by `trusted.` or, without privilege, by `user.` attributes.
    pub fn overlay_xattr(&self) -> OverlayXattr {
        self.overlay
    }

    /// How views become roots of processes here.
    pub fn snapshotter(&self) -> &'static dyn Snapshotter {
        if self.native { &Native } else { &OverlayFs }
    }

    /// The content of a tenant.
    pub fn content(self: &Arc<Self>, tenant: &Tenant) -> ContentStore {
        ContentStore::new(self.clone(), tenant.clone())
    }

    /// The disk account.
    pub fn ledger(&self) -> LedgerReport {
        self.ledger
            .set(Area::Index, disk_usage(&self.dir.part("index")).unwrap_or(0));
        self.ledger.report()
    }

    /// Promises space to a writer; garbage is collected first if there is no room otherwise.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`](crate::StoreError::NoSpace) if there is none even then.
    pub fn reserve(self: &Arc<Self>, area: Area, bytes: u64) -> Result<Reservation> {
        let mut reservation = self.ledger.reserve(area, 0)?;
        self.grow(&mut reservation, bytes)?;
        Ok(reservation)
    }

    /// Enlarges a promise in the same way.
    pub(crate) fn grow(self: &Arc<Self>, reservation: &mut Reservation, more: u64) -> Result<()> {
        loop {
            let refused = match reservation.grow(more) {
                Err(error) if error.is_no_space() => error,
                other => return other,
            };
            let freed = self.relieve(more)?;
            tracing::warn!(
                wanted = more,
                freed,
                "the disk limit left no choice: a build waited for garbage collection"
            );
            if freed == 0 {
                return Err(refused);
            }
        }
    }

    /// What a step wrote is known only when its tree is sealed. If that went over the limit, room is made now.
    pub(crate) fn settle_limit(self: &Arc<Self>) -> Result<()> {
        let report = self.ledger.report();
        if report.limit > 0 && report.used > report.limit {
            let freed = self.relieve(report.used - report.limit)?;
            tracing::warn!(
                over = report.used - report.limit,
                freed,
                "the disk limit was passed by a step"
            );
        }
        Ok(())
    }

    /// Makes everything written so far durable. Builds do not wait for this; tests and shutdown do.
    ///
    /// # Errors
    /// If the file system or the index could not be synced.
    pub fn sync(&self) -> Result<()> {
        self.flush_usage();
        self.epochs.seal()?;
        if self.index.is_dirty() {
            self.index.sync()?;
        }
        Ok(())
    }

    /// Ends background work and makes everything durable. Handles stay usable; what they still write is made durable by
    /// the next start's rules only.
    ///
    /// # Errors
    /// As [`sync`](Self::sync).
    pub fn close(&self) -> Result<()> {
        self.keeper.end();
        self.measure_directories(&Stop::new());
        self.sync()?;
        self.trash.empty(self, &Stop::new())?;
        Ok(())
    }

    /// Every directory of the state: what the ledger says and what the disk says, in bytes. For tests and for doubts;
    /// it walks everything.
    ///
    /// # Errors
    /// If something cannot be walked.
    pub fn audit(&self) -> Result<Vec<(Area, u64, u64)>> {
        let report = self.ledger();
        let mut lines = Vec::new();
        for (area, ledger) in report.areas {
            let path = self.dir.part(area.name());
            let mut disk = disk_usage(&path)?;
            if path.is_dir() {
                // The directories of the layout itself belong to nobody.
                disk = disk.saturating_sub(own_blocks(&path));
                if area == Area::Blobs {
                    disk = disk.saturating_sub(own_blocks(&path.join("sha256")));
                }
            }
            lines.push((area, if area == Area::Index { disk } else { ledger }, disk));
        }
        Ok(lines)
    }

    /// Commits to the index. A failure costs later cache hits, never the result at hand, so it is only said.
    pub(crate) fn commit_or_warn(&self, batch: &Batch, what: &'static str) {
        if let Err(error) = self.index.commit(batch) {
            tracing::warn!(%error, "result not cached: the {what} could not be recorded");
        }
        self.keeper.wake();
    }
}

fn own_blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).map_or(0, |m| m.blocks() * 512)
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.index.is_dirty()
            && let Err(error) = self.index.sync()
        {
            tracing::warn!(%error, "the index could not be synced at the end");
        }
    }
}

/// Size of the file that is given up when a full disk keeps the index from opening.
pub const BALLAST_BYTES: u64 = layout::BALLAST;
