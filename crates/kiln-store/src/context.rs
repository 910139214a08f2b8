//! Directories received from clients, kept between builds so that a transfer sends only what changed.
//!
//! One directory per tenant and shared key is the current one. A transfer takes it alone; when it is frozen it becomes a
//! layer without being copied, and while anybody holds that layer, the next transfer works on its own copy, which then
//! is the current one. A second transfer at the same time starts from nothing.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_fs::Stop;
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use crate::error::{IoContext as _, Result, StoreError};
use crate::ids::{DirId, LayerId, RecordType, Tenant, Time, TreeId};
use crate::layer_ref::{LayerFacts, LayerNode, LayerRef};
use crate::ledger::{Area, disk_usage};
use crate::manifest::{Entry, Manifest};
use crate::record_file;
use crate::store::Store;
use crate::tree::Tree;

/// The record beside a context's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContextRecord {
    pub(crate) id: DirId,
    pub(crate) tenant: Tenant,
    pub(crate) shared_key: String,
    pub(crate) description: String,
    pub(crate) created_at: Time,
    pub(crate) last_used: Time,
    pub(crate) count: u64,
    /// Written since it was last recorded at rest: after a power cut it is not believed.
    pub(crate) dirty: bool,
    /// Epoch in which it was recorded.
    pub(crate) epoch: u64,
}

#[derive(Debug)]
struct Held {
    record: ContextRecord,
    /// A transfer writes into it.
    writing: bool,
    /// Layers over it that somebody holds.
    frozen: usize,
    /// It is not the one that the next transfer of its key starts with.
    replaced: bool,
    dying: bool,
    disk: u64,
    stale: bool,
}

/// All contexts.
#[derive(Debug, Default)]
pub(crate) struct Table(Mutex<HashMap<DirId, Held>>);

/// A context directory that one transfer writes into. Dropping it keeps what was received for the next transfer.
///
/// Writers create new files beside and rename them, so that what a copy or a link shares is never changed in place.
#[derive(Debug)]
pub struct ContextDir {
    store: Arc<Store>,
    id: DirId,
    dir: PathBuf,
    new: bool,
}

#[derive(Debug)]
struct Frozen {
    store: Arc<Store>,
    id: DirId,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.store
            .release_context(&self.id, |held| held.frozen = held.frozen.saturating_sub(1));
    }
}

impl ContextDir {
    /// Where the received files are.
    pub fn fs_path(&self) -> PathBuf {
        self.dir.join("fs")
    }

    /// A directory beside the files, made by whoever wants to remember something about them.
    pub fn state_path(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The directory of files and state.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether there is nothing in it yet.
    pub fn is_new(&self) -> bool {
        self.new
    }

    /// The transfer is complete: the files, listed by `entries`, are a layer now. Nothing is copied; as long as the
    /// layer lives the directory does not change.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the entries are no tree.
    pub fn freeze(self, entries: Vec<Entry>) -> Result<LayerRef> {
        let manifest = Manifest::new(entries)?;
        let tree = Tree::with_manifest(&self.dir, self.fs_path(), manifest);
        let (store, id) = (self.store.clone(), self.id.clone());
        let record = {
            let mut table = store.contexts.0.lock();
            let missing = || StoreError::NotFound {
                what: "context",
                id: id.to_string(),
            };
            let held = table.get_mut(&id).ok_or_else(missing)?;
            held.frozen += 1;
            held.record.clone()
        };
        let frozen = Arc::new(Frozen {
            store: store.clone(),
            id,
        });
        drop(self);
        let node = LayerNode {
            store: store.clone(),
            id: LayerId::random(),
            tenant: record.tenant.clone(),
            parent: None,
            origin: None,
            record_type: RecordType::Local,
            description: record.description,
            created_at: Time::now(),
            facts: RwLock::new(LayerFacts {
                tree: Some((TreeId::random(), tree)),
                ..LayerFacts::default()
            }),
            _keep: Mutex::new(Some(frozen)),
        };
        Ok(store.enter_ephemeral(node))
    }
}

impl Drop for ContextDir {
    fn drop(&mut self) {
        self.store.release_context(&self.id, |held| {
            held.writing = false;
            held.stale = true;
        });
        self.store.keeper.wake();
    }
}

impl Store {
    /// Takes the context directory of a shared key for one transfer. Blocks while a copy is made.
    ///
    /// # Errors
    /// If a directory cannot be made or copied.
    pub fn context(
        self: &Arc<Self>,
        tenant: &Tenant,
        shared_key: &str,
        description: &str,
        stop: &Stop,
    ) -> Result<ContextDir> {
        let now = Time::now();
        let root = self.dir.part("contexts");
        let (dir, copy_from) = {
            let mut table = self.contexts.0.lock();
            let current = table.values_mut().find(|held| {
                let r = &held.record;
                r.tenant == *tenant && r.shared_key == shared_key && !held.replaced && !held.dying
            });
            match current {
                Some(held) if !held.writing && held.frozen == 0 => {
                    held.writing = true;
                    held.record.last_used = now;
                    held.record.count += 1;
                    let id = held.record.id.clone();
                    let dir = root.join(id.as_str());
                    (
                        ContextDir {
                            store: self.clone(),
                            id,
                            dir,
                            new: false,
                        },
                        None,
                    )
                }
                current => {
                    let id = DirId::random();
                    let mut source = None;
                    if let Some(held) = current {
                        if held.writing {
                            // Somebody is changing it: nothing of it can be used, and it stays the current one.
                        } else {
                            held.replaced = true;
                            held.frozen += 1;
                            source = Some(Frozen {
                                store: self.clone(),
                                id: held.record.id.clone(),
                            });
                        }
                    }
                    let beside = source.is_none()
                        && table
                            .values()
                            .any(|h| h.record.tenant == *tenant && h.record.shared_key == shared_key && h.writing);
                    let record = ContextRecord {
                        id: id.clone(),
                        tenant: tenant.clone(),
                        shared_key: shared_key.to_owned(),
                        description: description.to_owned(),
                        created_at: now,
                        last_used: now,
                        count: 1,
                        dirty: true,
                        epoch: 0,
                    };
                    let held = Held {
                        record,
                        writing: true,
                        frozen: 0,
                        replaced: beside,
                        dying: false,
                        disk: 0,
                        stale: true,
                    };
                    table.insert(id.clone(), held);
                    let dir = root.join(id.as_str());
                    (
                        ContextDir {
                            store: self.clone(),
                            id,
                            dir,
                            new: source.is_none(),
                        },
                        source,
                    )
                }
            }
        };
        if dir.dir.exists() {
            self.write_context_record(&dir)?;
            return Ok(dir);
        }
        let made = (|| {
            fs::create_dir(&dir.dir).during("create", &dir.dir)?;
            let files = dir.fs_path();
            fs::create_dir(&files).during("create", &files)?;
            if let Some(source) = &copy_from {
                let from = root.join(source.id.as_str());
                crate::copy_dir::copy_dir(&from.join("fs"), &files, stop)?;
                let state = from.join("state");
                if state.is_dir() {
                    let target = dir.state_path();
                    fs::create_dir(&target).during("create", &target)?;
                    crate::copy_dir::copy_dir(&state, &target, stop)?;
                }
            }
            self.write_context_record(&dir)
        })();
        if made.is_err() {
            // Half a copy must not be taken for what the client sent.
            if let Some(held) = self.contexts.0.lock().get_mut(&dir.id) {
                held.replaced = true;
            }
        }
        made.map(|()| dir)
    }

    fn write_context_record(&self, dir: &ContextDir) -> Result<()> {
        let writing = self.epochs.enter();
        let record = self.contexts.0.lock().get_mut(&dir.id).map(|held| {
            held.record.dirty = true;
            held.record.epoch = writing.epoch();
            held.record.clone()
        });
        if let Some(record) = record {
            record_file::write(&dir.dir.join("record"), &record)?;
        }
        Ok(())
    }

    /// Lets go of a context; a replaced one that nobody uses any more is removed.
    fn release_context(&self, id: &DirId, change: impl FnOnce(&mut Held)) {
        let gone = {
            let mut table = self.contexts.0.lock();
            let Some(held) = table.get_mut(id) else { return };
            change(held);
            let gone = held.replaced && !held.writing && held.frozen == 0 && !held.dying;
            held.dying |= gone;
            gone.then_some(held.disk)
        };
        if let Some(disk) = gone {
            let path = self.dir.part("contexts").join(id.as_str());
            if let Err(error) = self.trash.discard(self, &path, Area::Contexts, disk) {
                tracing::warn!(%error, "an old context stays until the next start");
            }
            self.contexts.0.lock().remove(id);
        }
    }

    /// Reads what an earlier process left.
    pub(crate) fn open_contexts(&self, trusted: u64) -> Result<()> {
        let root = self.dir.part("contexts");
        let mut found: Vec<(ContextRecord, u64)> = Vec::new();
        for entry in fs::read_dir(&root).during("list", &root)? {
            let path = entry.during("list", &root)?.path();
            let record = record_file::read::<ContextRecord>(&path.join("record"));
            match record {
                Ok(record)
                    if path.ends_with(record.id.as_str())
                        && (trusted == u64::MAX || (!record.dirty && record.epoch <= trusted)) =>
                {
                    found.push((record, disk_usage(&path)?));
                }
                _ => self.trash.discard(self, &path, Area::Contexts, 0)?,
            }
        }
        found.sort_by_key(|(record, _)| std::cmp::Reverse(record.last_used));
        for (record, disk) in found {
            let mut table = self.contexts.0.lock();
            let twin = table
                .values()
                .any(|h| h.record.tenant == record.tenant && h.record.shared_key == record.shared_key);
            if twin {
                drop(table);
                self.trash
                    .discard(self, &root.join(record.id.as_str()), Area::Contexts, 0)?;
                continue;
            }
            self.ledger.add(Area::Contexts, disk);
            let held = Held {
                writing: false,
                frozen: 0,
                replaced: false,
                dying: false,
                disk,
                stale: false,
                record,
            };
            table.insert(held.record.id.clone(), held);
        }
        Ok(())
    }

    /// Measures cache mounts and contexts that were written since the last time.
    pub(crate) fn measure_directories(&self, stop: &Stop) {
        self.measure_cache_mounts(stop);
        let stale: Vec<DirId> = {
            let table = self.contexts.0.lock();
            let idle = table.iter().filter(|(_, h)| h.stale && !h.writing && !h.dying);
            idle.map(|(id, _)| id.clone()).collect()
        };
        for id in stale {
            if stop.is_stopped() {
                return;
            }
            if let Some(held) = self.contexts.0.lock().get_mut(&id) {
                held.stale = false;
            }
            let dir = self.dir.part("contexts").join(id.as_str());
            let measured = disk_usage(&dir).unwrap_or(0);
            let writing = self.epochs.enter();
            let mut table = self.contexts.0.lock();
            let Some(held) = table.get_mut(&id).filter(|h| !h.dying) else {
                continue;
            };
            self.ledger.add(Area::Contexts, measured);
            self.ledger.sub(Area::Contexts, held.disk);
            held.disk = measured;
            if held.writing {
                continue;
            }
            held.record.dirty = false;
            held.record.epoch = writing.epoch();
            // Under the lock: a transfer that takes it now must write its own record after this one.
            if let Err(error) = record_file::write(&dir.join("record"), &held.record) {
                tracing::debug!(%error, "a context could not be recorded at rest");
            }
        }
    }

    /// What usage lists and pruning chooses from: record, size, whether it is in use.
    pub(crate) fn list_contexts(&self) -> Vec<(ContextRecord, u64, bool)> {
        let table = self.contexts.0.lock();
        let alive = table.values().filter(|h| !h.dying);
        alive
            .map(|h| (h.record.clone(), h.disk, h.writing || h.frozen > 0))
            .collect()
    }

    /// Removes a context unless it is in use. Returns whether it did.
    pub(crate) fn remove_context(&self, id: &DirId) -> Result<bool> {
        let disk = {
            let mut table = self.contexts.0.lock();
            match table.get_mut(id) {
                Some(held) if !held.writing && held.frozen == 0 && !held.dying => {
                    held.dying = true;
                    held.disk
                }
                _ => return Ok(false),
            }
        };
        self.trash
            .discard(self, &self.dir.part("contexts").join(id.as_str()), Area::Contexts, disk)?;
        self.contexts.0.lock().remove(id);
        Ok(true)
    }
}
