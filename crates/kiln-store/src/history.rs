//! Build history: opaque records by tenant and ref, with the blobs they keep.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kiln_oci::Digest;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::error::{IoContext as _, Result, StoreError};
use crate::ids::{Tenant, Time};
use crate::ledger::{Area, disk_usage};
use crate::record_file;
use crate::store::Store;

/// One build's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryRecord {
    /// The build's ref.
    pub reference: String,
    /// When the build ended; decides what is old.
    pub created_at: Time,
    /// Pinned records survive collection.
    pub pinned: bool,
    /// Blobs (logs, errors, provenance) that live as long as the record.
    pub blobs: Vec<Digest>,
    /// The daemon's record, as bytes.
    #[serde(with = "as_text")]
    pub payload: Vec<u8>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stored {
    tenant: Tenant,
    #[serde(flatten)]
    record: HistoryRecord,
}

#[derive(Debug)]
struct Held {
    record: HistoryRecord,
    disk: u64,
    /// Blobs counted as leased. Not handles: those hold the store, which holds this.
    leased: Vec<Digest>,
}

/// All history records.
#[derive(Debug, Default)]
pub(crate) struct Table(Mutex<BTreeMap<(Tenant, String), Arc<Held>>>);

/// The build history of one tenant. Writing blocks; reading does not.
#[derive(Clone, Debug)]
pub struct History {
    store: Arc<Store>,
    tenant: Tenant,
}

impl Store {
    /// The build history of a tenant.
    pub fn history(self: &Arc<Self>, tenant: &Tenant) -> History {
        History {
            store: self.clone(),
            tenant: tenant.clone(),
        }
    }

    fn history_path(&self, tenant: &Tenant, reference: &str) -> PathBuf {
        // A ref comes from a client: it is never a file name.
        self.dir
            .part("history")
            .join(Digest::of(format!("{tenant}\0{reference}")).hex())
    }

    /// Reads what an earlier process left.
    pub(crate) fn open_history(self: &Arc<Self>) -> Result<()> {
        let root = self.dir.part("history");
        for entry in fs::read_dir(&root).during("list", &root)? {
            let path = entry.during("list", &root)?.path();
            match record_file::read::<Stored>(&path) {
                Ok(stored) => {
                    let disk = disk_usage(&path)?;
                    self.ledger.add(Area::History, disk);
                    let held = self.hold(&stored.tenant, stored.record, disk);
                    self.histories
                        .0
                        .lock()
                        .insert((stored.tenant, held.record.reference.clone()), Arc::new(held));
                }
                Err(error) => {
                    tracing::info!(%error, "an incomplete history record is removed");
                    fs::remove_file(&path).during("remove", &path)?;
                }
            }
        }
        Ok(())
    }

    fn hold(self: &Arc<Self>, tenant: &Tenant, record: HistoryRecord, disk: u64) -> Held {
        let leased = record
            .blobs
            .iter()
            .copied()
            .filter(|d| self.lease_by_name(tenant, d))
            .collect();
        Held { record, disk, leased }
    }

    fn let_go(&self, held: &Held) {
        for digest in &held.leased {
            self.release_by_name(digest);
        }
    }
}

impl History {
    /// Stores or replaces a record.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn put(&self, record: HistoryRecord) -> Result<()> {
        let path = self.store.history_path(&self.tenant, &record.reference);
        let _writing = self.store.epochs.enter();
        let stored = Stored {
            tenant: self.tenant.clone(),
            record,
        };
        record_file::write(&path, &stored)?;
        let disk = disk_usage(&path)?;
        self.store.ledger.add(Area::History, disk);
        let held = Arc::new(self.store.hold(&self.tenant, stored.record, disk));
        let key = (self.tenant.clone(), held.record.reference.clone());
        let old = self.store.histories.0.lock().insert(key, held);
        if let Some(old) = old {
            self.store.ledger.sub(Area::History, old.disk);
            self.store.let_go(&old);
        }
        self.store.keeper.wake();
        Ok(())
    }

    /// A record by ref.
    pub fn get(&self, reference: &str) -> Option<HistoryRecord> {
        let table = self.store.histories.0.lock();
        table
            .get(&(self.tenant.clone(), reference.to_owned()))
            .map(|h| h.record.clone())
    }

    /// All records, newest first.
    pub fn list(&self) -> Vec<HistoryRecord> {
        let table = self.store.histories.0.lock();
        let own = table.iter().filter(|((tenant, _), _)| *tenant == self.tenant);
        let mut records: Vec<_> = own.map(|(_, h)| h.record.clone()).collect();
        drop(table);
        records.sort_by(|a, b| {
            b.created_at
                .cmp(&a.created_at)
                .then_with(|| a.reference.cmp(&b.reference))
        });
        records
    }

    /// Pins or unpins a record.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or it cannot be written.
    pub fn pin(&self, reference: &str, pinned: bool) -> Result<()> {
        let missing = || StoreError::NotFound {
            what: "build",
            id: reference.to_owned(),
        };
        let record = self.get(reference).ok_or_else(missing)?;
        self.put(HistoryRecord { pinned, ..record })
    }

    /// Removes a record; its blobs may be collected. Returns whether it was there.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn delete(&self, reference: &str) -> Result<bool> {
        let old = self
            .store
            .histories
            .0
            .lock()
            .remove(&(self.tenant.clone(), reference.to_owned()));
        let Some(old) = old else { return Ok(false) };
        self.store.let_go(&old);
        let path = self.store.history_path(&self.tenant, reference);
        self.store.trash.discard(&self.store, &path, Area::History, old.disk)?;
        Ok(true)
    }

    /// Removes records that are older than `max_age` and beyond the newest `max_entries`; pinned ones stay. Returns the
    /// refs removed.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub fn collect(&self, max_age: Duration, max_entries: usize) -> Result<Vec<String>> {
        let now = Time::now();
        let mut removed = Vec::new();
        for record in self.list().into_iter().skip(max_entries) {
            if !record.pinned && record.created_at.age(now) > max_age && self.delete(&record.reference)? {
                removed.push(record.reference);
            }
        }
        Ok(removed)
    }
}

/// Bytes as text of one character per byte (latin-1): JSON has no bytes, and protobuf is mostly ASCII.
mod as_text {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&bytes.iter().map(|b| char::from(*b)).collect::<String>())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let bytes: Result<Vec<u8>, _> = text.chars().map(u8::try_from).collect();
        bytes.map_err(|_| serde::de::Error::custom("not latin-1"))
    }
}
