//! Removal in two steps: a rename takes a thing away at once, the unlinking follows in the background, once the rename
//! is durable. After a power cut a record therefore never points to something half removed.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};

use kiln_fs::{Dir, Stop};
use parking_lot::Mutex;

use crate::epoch::Writing;
use crate::error::{IoContext as _, Result};
use crate::ids::DirId;
use crate::ledger::Area;
use crate::store::Store;

#[derive(Debug)]
struct Item {
    name: String,
    /// Epoch in which it was moved here.
    epoch: u64,
    bytes: u64,
}

/// What lies under `trash/`.
#[derive(Debug, Default)]
pub(crate) struct Trash {
    items: Mutex<VecDeque<Item>>,
    /// One at a time empties it, so that who needs space waits for what is being unlinked already.
    emptying: Mutex<()>,
}

impl Trash {
    /// Takes `path` away; `bytes` move from `area` to the trash in the ledger. That it is gone already is no error.
    pub(crate) fn discard(&self, store: &Store, path: &Path, area: Area, bytes: u64) -> Result<()> {
        let name = DirId::random().to_string();
        let target = store.dir.part("trash").join(&name);
        // No record names what lies under `active/`: its removal need not wait for anything.
        let writing = (area != Area::Active).then(|| store.epochs.enter());
        let epoch = writing.as_ref().map_or(0, Writing::epoch);
        match fs::rename(path, &target) {
            Ok(()) => {
                store.ledger.transfer(area, Area::Trash, bytes);
                self.items.lock().push_back(Item { name, epoch, bytes });
                drop(writing);
                store.keeper.wake();
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                store.ledger.sub(area, bytes);
                Ok(())
            }
            Err(error) => Err(error).during("move to the trash", path),
        }
    }

    /// Takes over what an earlier process left.
    pub(crate) fn adopt(&self, store: &Store) -> Result<()> {
        let dir = store.dir.part("trash");
        let writing = store.epochs.enter();
        for entry in fs::read_dir(&dir).during("list", &dir)? {
            let entry = entry.during("list", &dir)?;
            let bytes = crate::ledger::disk_usage(&entry.path())?;
            store.ledger.add(Area::Trash, bytes);
            let name = entry.file_name().to_string_lossy().into_owned();
            self.items.lock().push_back(Item {
                name,
                epoch: writing.epoch(),
                bytes,
            });
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items.lock().is_empty()
    }

    /// Bytes that wait for a seal.
    pub(crate) fn waiting(&self, sealed: u64) -> u64 {
        self.items
            .lock()
            .iter()
            .filter(|i| i.epoch > sealed)
            .map(|i| i.bytes)
            .sum()
    }

    /// Unlinks what was moved here in sealed epochs. Returns the bytes freed.
    pub(crate) fn empty(&self, store: &Store, stop: &Stop) -> Result<u64> {
        let _one = self.emptying.lock();
        let root: PathBuf = store.dir.part("trash");
        let dir = Dir::open_ambient(&root)?;
        let mut freed = 0;
        loop {
            stop.check()?;
            let sealed = store.epochs.sealed();
            let next = {
                let mut items = self.items.lock();
                let ready = items.iter().position(|item| item.epoch <= sealed);
                ready.and_then(|n| items.remove(n))
            };
            let Some(item) = next else { return Ok(freed) };
            if let Err(error) = kiln_fs::remove::remove_tree(&dir, &item.name, stop) {
                let stopped = matches!(error, kiln_fs::Error::Stopped(_));
                self.items.lock().push_back(item);
                if !stopped {
                    // What cannot be removed now stays counted and is tried again by the next start.
                    tracing::warn!(%error, "could not remove something from the trash");
                }
                return Err(error.into());
            }
            store.ledger.sub(Area::Trash, item.bytes);
            freed += item.bytes;
        }
    }
}
