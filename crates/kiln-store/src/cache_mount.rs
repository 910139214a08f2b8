//! Cache mounts: directories that persist between runs of a step, by tenant and id.
//!
//! One id may have several directories: users that must not share (private ones, or shared ones beside a private one)
//! get another one each. Everything is taken at once; nobody waits while holding part of what it asked for.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_fs::{Dir, Links, Stop};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::error::{IoContext as _, Result, StoreError};
use crate::ids::{DirId, LayerId, Tenant, Time};
use crate::ledger::{Area, disk_usage};
use crate::record_file;
use crate::store::Store;
use crate::view::View;

/// How users of one cache mount get along (`--mount=type=cache,sharing=`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Sharing {
    /// Any number of users at once.
    #[default]
    Shared,
    /// One user at a time; another one gets another directory.
    Private,
    /// One user at a time; another one waits.
    Locked,
}

/// One cache mount to take.
#[derive(Clone, Debug)]
pub struct CacheMountRequest {
    /// The mount's id.
    pub id: String,
    /// How to get along with others.
    pub sharing: Sharing,
    /// What a new directory starts with: the layer (part of the identity) and its realised view.
    pub base: Option<(LayerId, View)>,
    /// For people: `cached mount … from exec …`.
    pub description: String,
    /// What is there is not wanted: directories that nobody uses are removed and a new one is made. Those in use are left
    /// to their users.
    pub fresh: bool,
}

/// The record beside a cache mount's files, `cache-mounts/<id>/record`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountRecord {
    pub(crate) id: DirId,
    pub(crate) tenant: Tenant,
    pub(crate) name: String,
    pub(crate) base: Option<LayerId>,
    pub(crate) description: String,
    pub(crate) created_at: Time,
    pub(crate) last_used: Time,
    pub(crate) count: u64,
    /// Written since it was last recorded at rest: after a power cut it is not believed.
    pub(crate) dirty: bool,
    /// Epoch in which it was recorded.
    pub(crate) epoch: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Use {
    #[default]
    Free,
    Alone,
    Together(usize),
    /// Being removed.
    Dying,
}

#[derive(Debug)]
struct Instance {
    record: MountRecord,
    used: Use,
    /// Its directory exists, with what it starts with. Until then only the request that makes it may have it.
    made: bool,
    /// Disk space as last measured.
    disk: u64,
    stale: bool,
    /// Held from reading the record in the table to writing it beside the files, so that what is written last is newest.
    pen: Arc<Mutex<()>>,
}

/// All cache mounts.
#[derive(Debug, Default)]
pub(crate) struct Table {
    instances: Mutex<HashMap<DirId, Instance>>,
    freed: Notify,
}

/// A cache mount in use. Dropping it gives it back.
#[derive(Debug)]
pub struct CacheMount {
    store: Arc<Store>,
    id: DirId,
    path: PathBuf,
    new: bool,
}

impl CacheMount {
    /// The directory to mount. It and what is in it are changed by the user.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was made for this request (and mode and owner are still to be set).
    pub fn is_new(&self) -> bool {
        self.new
    }
}

impl Drop for CacheMount {
    fn drop(&mut self) {
        self.store.cache_mounts.give_back(&self.id);
        self.store.keeper.wake();
    }
}

/// What [`Table::take`] found: what was taken (`None` if one is to be waited for), and what is to be removed.
type Found = (Option<Vec<Taken>>, Vec<(DirId, u64)>);

enum Taken {
    Existing(DirId),
    New(DirId),
}

impl Table {
    fn made(&self, id: &DirId) {
        if let Some(instance) = self.instances.lock().get_mut(id) {
            instance.made = true;
        }
        self.freed.notify_waiters();
    }

    fn pen(&self, id: &DirId) -> Option<Arc<Mutex<()>>> {
        self.instances.lock().get(id).map(|instance| instance.pen.clone())
    }

    fn give_back(&self, id: &DirId) {
        if let Some(instance) = self.instances.lock().get_mut(id) {
            instance.used = match instance.used {
                Use::Together(n) if n > 1 => Use::Together(n - 1),
                Use::Dying => Use::Dying,
                _ => Use::Free,
            };
            instance.stale = true;
        }
        self.freed.notify_waiters();
    }

    /// Takes all or none; `None` means that a locked one is in use, or a shared one is being made.
    fn take(&self, tenant: &Tenant, requests: &[CacheMountRequest]) -> Found {
        let mut instances = self.instances.lock();
        let mut unwanted = Vec::new();
        for request in requests.iter().filter(|r| r.fresh) {
            let base = request.base.as_ref().map(|(id, _)| id);
            for (id, instance) in instances.iter_mut() {
                let r = &instance.record;
                if r.tenant == *tenant && r.name == request.id && r.base.as_ref() == base && instance.used == Use::Free
                {
                    instance.used = Use::Dying;
                    unwanted.push((id.clone(), instance.disk));
                }
            }
        }
        let mut before: Vec<(DirId, Use)> = Vec::new();
        let mut taken = Vec::new();
        for request in requests {
            let base = request.base.as_ref().map(|(id, _)| id);
            let mut own: Vec<_> = instances
                .values_mut()
                .filter(|i| {
                    let r = &i.record;
                    r.tenant == *tenant && r.name == request.id && r.base.as_ref() == base && i.used != Use::Dying
                })
                .collect();
            own.sort_by(|a, b| (a.record.created_at, &a.record.id).cmp(&(b.record.created_at, &b.record.id)));
            let shared = own.iter().position(|i| matches!(i.used, Use::Together(_)));
            let free = own.iter().position(|i| i.used == Use::Free);
            let found = match request.sharing {
                Sharing::Shared => shared.or(free),
                Sharing::Private | Sharing::Locked => free,
            };
            let own_new = |id: &DirId| taken.iter().any(|t| matches!(t, Taken::New(new) if new == id));
            let unmade = |i: &&mut Instance| !i.made && !own_new(&i.record.id);
            let wait = match found.and_then(|n| own.get(n)) {
                Some(instance) => unmade(instance),
                None => request.sharing == Sharing::Locked && !own.is_empty(),
            };
            if wait {
                for (id, used) in before.into_iter().rev() {
                    if let Some(instance) = instances.get_mut(&id) {
                        instance.used = used;
                    }
                }
                instances.retain(|id, _| !taken.iter().any(|t| matches!(t, Taken::New(new) if new == id)));
                return (None, unwanted);
            }
            if let Some(instance) = found.and_then(|n| own.get_mut(n)) {
                before.push((instance.record.id.clone(), instance.used));
                instance.used = match (request.sharing, instance.used) {
                    (Sharing::Shared, Use::Together(n)) => Use::Together(n + 1),
                    (Sharing::Shared, _) => Use::Together(1),
                    _ => Use::Alone,
                };
                taken.push(Taken::Existing(instance.record.id.clone()));
                continue;
            }
            let id = DirId::random();
            let now = Time::now();
            let record = MountRecord {
                id: id.clone(),
                tenant: tenant.clone(),
                name: request.id.clone(),
                base: base.cloned(),
                description: request.description.clone(),
                created_at: now,
                last_used: now,
                count: 0,
                dirty: true,
                epoch: 0,
            };
            let used = if request.sharing == Sharing::Shared {
                Use::Together(1)
            } else {
                Use::Alone
            };
            instances.insert(
                id.clone(),
                Instance {
                    record,
                    used,
                    made: false,
                    disk: 0,
                    stale: true,
                    pen: Arc::default(),
                },
            );
            taken.push(Taken::New(id));
        }
        (Some(taken), unwanted)
    }
}

impl Store {
    /// Takes all the cache mounts a step asks for, waiting for locked ones that are in use and for shared ones that are being made. Nothing is held while
    /// waiting. Cancel by dropping the future.
    ///
    /// # Errors
    /// If a new directory cannot be made.
    pub async fn cache_mounts(
        self: &Arc<Self>,
        tenant: &Tenant,
        requests: Vec<CacheMountRequest>,
    ) -> Result<Vec<CacheMount>> {
        loop {
            let freed = self.cache_mounts.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let (taken, unwanted) = self.cache_mounts.take(tenant, &requests);
            for (id, disk) in unwanted {
                self.trash.discard(
                    self,
                    &self.dir.part("cache-mounts").join(id.as_str()),
                    Area::CacheMounts,
                    disk,
                )?;
                self.cache_mounts.instances.lock().remove(&id);
            }
            if let Some(taken) = taken {
                let store = self.clone();
                let work = tokio::task::spawn_blocking(move || store.make_mounts(taken, &requests));
                return work.await.map_err(|_| StoreError::Panicked {
                    task: "making cache mounts",
                })?;
            }
            freed.await;
        }
    }

    fn make_mounts(self: &Arc<Self>, taken: Vec<Taken>, requests: &[CacheMountRequest]) -> Result<Vec<CacheMount>> {
        let root = self.dir.part("cache-mounts");
        // First every one becomes a handle: an error below gives all of them back.
        let mounts: Vec<_> = taken
            .into_iter()
            .map(|taken| {
                let (id, new) = match taken {
                    Taken::Existing(id) => (id, false),
                    Taken::New(id) => (id, true),
                };
                CacheMount {
                    path: root.join(id.as_str()).join("fs"),
                    store: self.clone(),
                    id,
                    new,
                }
            })
            .collect();
        for (mount, request) in mounts.iter().zip(requests) {
            let made = self.prepare_mount(mount, request);
            if let Err(error) = made {
                for mount in mounts.iter().filter(|m| m.new) {
                    self.cache_mounts.instances.lock().remove(&mount.id);
                    let _ = self
                        .trash
                        .discard(self, &root.join(mount.id.as_str()), Area::CacheMounts, 0);
                }
                return Err(error);
            }
        }
        Ok(mounts)
    }

    fn prepare_mount(self: &Arc<Self>, mount: &CacheMount, request: &CacheMountRequest) -> Result<()> {
        let dir = self.dir.part("cache-mounts").join(mount.id.as_str());
        let writing = self.epochs.enter();
        let Some(pen) = self.cache_mounts.pen(&mount.id) else {
            return Ok(());
        };
        if mount.new {
            fs::create_dir(&dir).during("create", &dir)?;
            fs::create_dir(&mount.path).during("create", &mount.path)?;
            if let Some((_, view)) = &request.base {
                let files = Dir::open_ambient(&mount.path)?.with_links(Links::Refuse);
                crate::snapshot::native::materialise(view, &Arc::new(files), &Stop::new())?;
            }
        }
        let _alone = pen.lock();
        let record = {
            let mut instances = self.cache_mounts.instances.lock();
            let Some(instance) = instances.get_mut(&mount.id) else {
                return Ok(());
            };
            instance.record.last_used = Time::now();
            instance.record.count += 1;
            instance.record.dirty = true;
            instance.record.epoch = writing.epoch();
            instance.record.clone()
        };
        record_file::write(&dir.join("record"), &record)?;
        if mount.new {
            self.cache_mounts.made(&mount.id);
        }
        Ok(())
    }

    /// Reads what an earlier process left.
    pub(crate) fn open_cache_mounts(&self, trusted: u64) -> Result<()> {
        let root = self.dir.part("cache-mounts");
        for entry in fs::read_dir(&root).during("list", &root)? {
            let path = entry.during("list", &root)?.path();
            match record_file::read::<MountRecord>(&path.join("record")) {
                Ok(record) if trusted < u64::MAX && (record.dirty || record.epoch > trusted) => {
                    tracing::info!(
                        name = record.name,
                        "a cache mount that was in use at a power cut is removed"
                    );
                    self.trash.discard(self, &path, Area::CacheMounts, 0)?;
                }
                Ok(record) if path.ends_with(record.id.as_str()) => {
                    let disk = disk_usage(&path)?;
                    self.ledger.add(Area::CacheMounts, disk);
                    let instance = Instance {
                        used: Use::Free,
                        made: true,
                        disk,
                        stale: false,
                        pen: Arc::default(),
                        record,
                    };
                    self.cache_mounts
                        .instances
                        .lock()
                        .insert(instance.record.id.clone(), instance);
                }
                Ok(_) => self.trash.discard(self, &path, Area::CacheMounts, 0)?,
                Err(error) => {
                    tracing::info!(%error, "a cache mount without a whole record is removed");
                    self.trash.discard(self, &path, Area::CacheMounts, 0)?;
                }
            }
        }
        Ok(())
    }

    /// Measures cache mounts that were used since the last time.
    pub(crate) fn measure_cache_mounts(&self, stop: &kiln_fs::Stop) {
        let stale: Vec<DirId> = {
            let instances = self.cache_mounts.instances.lock();
            let free = instances.iter().filter(|(_, i)| i.stale && i.used == Use::Free);
            free.map(|(id, _)| id.clone()).collect()
        };
        for id in stale {
            if stop.is_stopped() {
                return;
            }
            if let Some(instance) = self.cache_mounts.instances.lock().get_mut(&id) {
                instance.stale = false;
            }
            let dir = self.dir.part("cache-mounts").join(id.as_str());
            let measured = disk_usage(&dir).unwrap_or(0);
            let writing = self.epochs.enter();
            let Some(pen) = self.cache_mounts.pen(&id) else {
                continue;
            };
            // A user who takes it from here on writes its own record after this one.
            let _alone = pen.lock();
            let record = {
                let mut instances = self.cache_mounts.instances.lock();
                let Some(instance) = instances.get_mut(&id).filter(|i| i.used != Use::Dying) else {
                    continue;
                };
                self.ledger.add(Area::CacheMounts, measured);
                self.ledger.sub(Area::CacheMounts, instance.disk);
                instance.disk = measured;
                if instance.used != Use::Free {
                    continue;
                }
                instance.record.dirty = false;
                instance.record.epoch = writing.epoch();
                instance.record.clone()
            };
            if let Err(error) = record_file::write(&dir.join("record"), &record) {
                tracing::debug!(%error, "a cache mount could not be recorded at rest");
            }
        }
    }

    /// What usage lists and pruning chooses from: record, size, whether it is in use.
    pub(crate) fn list_cache_mounts(&self) -> Vec<(MountRecord, u64, bool)> {
        let instances = self.cache_mounts.instances.lock();
        let alive = instances.values().filter(|i| i.used != Use::Dying);
        alive.map(|i| (i.record.clone(), i.disk, i.used != Use::Free)).collect()
    }

    /// Removes a cache mount unless it is in use. Returns whether it did.
    pub(crate) fn remove_cache_mount(&self, id: &DirId) -> Result<bool> {
        let disk = {
            let mut instances = self.cache_mounts.instances.lock();
            match instances.get_mut(id) {
                Some(instance) if instance.used == Use::Free => {
                    instance.used = Use::Dying;
                    instance.disk
                }
                _ => return Ok(false),
            }
        };
        self.trash.discard(
            self,
            &self.dir.part("cache-mounts").join(id.as_str()),
            Area::CacheMounts,
            disk,
        )?;
        self.cache_mounts.instances.lock().remove(id);
        Ok(true)
    }
}
