//! The one account of disk space under the state directory.
//!
//! Kiln's own writes are reserved before they happen and settled to what they really took; what a step writes is counted
//! when its tree is sealed. `du` is this account, and [`Store::audit`](crate::Store::audit) compares it with the disk.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::{Result, StoreError};
use crate::layout::StateDir;

/// What space is used for; one per directory of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are those of the directories")]
pub enum Area {
    Blobs,
    Trees,
    Active,
    CacheMounts,
    Contexts,
    Ingest,
    Index,
    History,
    Trash,
    Ballast,
}

impl Area {
    /// All areas.
    pub const ALL: [Self; 10] = [
        Self::Blobs,
        Self::Trees,
        Self::Active,
        Self::CacheMounts,
        Self::Contexts,
        Self::Ingest,
        Self::Index,
        Self::History,
        Self::Trash,
        Self::Ballast,
    ];

    /// Name of its directory under the state directory.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Blobs => "blobs",
            Self::Trees => "trees",
            Self::Active => "active",
            Self::CacheMounts => "cache-mounts",
            Self::Contexts => "contexts",
            Self::Ingest => "ingest",
            Self::Index => "index",
            Self::History => "history",
            Self::Trash => "trash",
            Self::Ballast => "ballast",
        }
    }
}

/// Reads of the ledger at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LedgerReport {
    /// Bytes by area.
    pub areas: Vec<(Area, u64)>,
    /// Sum of the areas.
    pub used: u64,
    /// Promised to writers that are not done.
    pub reserved: u64,
    /// Configured limit in bytes; 0 for none.
    pub limit: u64,
    /// Available on the file system.
    pub disk_available: u64,
    /// Size of the file system.
    pub disk_size: u64,
}

#[derive(Debug, Default)]
struct Accounts {
    used: [u64; Area::ALL.len()],
    reserved: u64,
}

/// The account.
#[derive(Debug)]
pub struct Ledger {
    dir: Arc<StateDir>,
    limit: u64,
    accounts: Mutex<Accounts>,
}

impl Ledger {
    pub(crate) fn new(dir: Arc<StateDir>, limit: u64) -> Arc<Self> {
        Arc::new(Self {
            dir,
            limit,
            accounts: Mutex::default(),
        })
    }

    /// Promises `bytes` to a writer. The promise ends with the returned value.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] if the limit or the file system leaves no room for it.
    pub fn reserve(self: &Arc<Self>, area: Area, bytes: u64) -> Result<Reservation> {
        let mut reservation = Reservation {
            ledger: self.clone(),
            area,
            bytes: 0,
        };
        reservation.grow(bytes)?;
        Ok(reservation)
    }

    /// What is used now.
    pub fn report(&self) -> LedgerReport {
        let (disk_available, disk_size) = self.dir.space().unwrap_or((0, 0));
        let accounts = self.accounts.lock();
        let areas: Vec<_> = Area::ALL.into_iter().zip(accounts.used).collect();
        LedgerReport {
            used: areas.iter().map(|(_, n)| n).sum(),
            areas,
            reserved: accounts.reserved,
            limit: self.limit,
            disk_available,
            disk_size,
        }
    }

    pub(crate) fn used(&self, area: Area) -> u64 {
        self.accounts.lock().used.get(area as usize).copied().unwrap_or(0)
    }

    pub(crate) fn add(&self, area: Area, bytes: u64) {
        if let Some(n) = self.accounts.lock().used.get_mut(area as usize) {
            *n += bytes;
        }
    }

    pub(crate) fn sub(&self, area: Area, bytes: u64) {
        if let Some(n) = self.accounts.lock().used.get_mut(area as usize) {
            debug_assert!(*n >= bytes, "{area:?}: {n} - {bytes}");
            *n = n.saturating_sub(bytes);
        }
    }

    pub(crate) fn set(&self, area: Area, bytes: u64) {
        if let Some(n) = self.accounts.lock().used.get_mut(area as usize) {
            *n = bytes;
        }
    }

    pub(crate) fn transfer(&self, from: Area, to: Area, bytes: u64) {
        self.sub(from, bytes);
        self.add(to, bytes);
    }
}

/// Space promised to one writer; given back on drop.
#[derive(Debug)]
pub struct Reservation {
    ledger: Arc<Ledger>,
    area: Area,
    bytes: u64,
}

impl Reservation {
    /// Bytes promised.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Asks for more.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`]; what was promised before stays promised.
    pub fn grow(&mut self, more: u64) -> Result<()> {
        if more == 0 {
            return Ok(());
        }
        let (available, _) = self.ledger.dir.space()?;
        let mut accounts = self.ledger.accounts.lock();
        let wanted = accounts.reserved + more;
        if wanted > available {
            let reason = format!(
                "the file system has {available} bytes left and {} are promised",
                accounts.reserved
            );
            return Err(StoreError::NoSpace { wanted: more, reason });
        }
        let used: u64 = accounts.used.iter().sum();
        if self.ledger.limit > 0 && used + wanted > self.ledger.limit {
            let reason = format!("{used} bytes are used and the limit is {}", self.ledger.limit);
            return Err(StoreError::NoSpace { wanted: more, reason });
        }
        accounts.reserved = wanted;
        drop(accounts);
        self.bytes += more;
        Ok(())
    }

    /// The write is done and took `actual` bytes: from now on they are used, not promised.
    pub fn settle(self, actual: u64) {
        self.ledger.add(self.area, actual);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut accounts = self.ledger.accounts.lock();
        accounts.reserved = accounts.reserved.saturating_sub(self.bytes);
    }
}

/// Disk space of a directory tree or file in bytes: blocks of every inode once, the directories' own included.
pub(crate) fn disk_usage(path: &std::path::Path) -> Result<u64> {
    use crate::error::IoContext as _;
    use std::os::unix::fs::MetadataExt as _;
    let mut seen = std::collections::HashSet::new();
    let mut total = 0;
    let mut left = vec![path.to_owned()];
    while let Some(path) = left.pop() {
        let meta = match std::fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).during("stat", &path),
        };
        if meta.is_dir() || meta.nlink() < 2 || seen.insert((meta.dev(), meta.ino())) {
            total += meta.blocks() * 512;
        }
        if meta.is_dir() {
            let entries = match std::fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).during("list", &path),
            };
            for entry in entries {
                left.push(entry.during("list", &path)?.path());
            }
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_count_until_settled_or_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let state = Arc::new(StateDir::open(dir.path(), false).unwrap().0);
        let ledger = Ledger::new(state, 1000);
        let first = ledger.reserve(Area::Blobs, 600).unwrap();
        assert!(matches!(
            ledger.reserve(Area::Trees, 500),
            Err(StoreError::NoSpace { wanted: 500, .. })
        ));
        let mut second = ledger.reserve(Area::Trees, 300).unwrap();
        assert!(second.grow(200).is_err());
        second.grow(100).unwrap();
        first.settle(100);
        drop(second);
        assert_eq!((ledger.report().used, ledger.report().reserved), (100, 0));
        ledger.reserve(Area::Trees, 900).unwrap();
        assert!(ledger.reserve(Area::Trees, 901).is_err());
    }
}
