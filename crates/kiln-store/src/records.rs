//! Cache records: which outputs a key stands for, and what the key was made of.
//!
//! A key digest points to a record id; equal keys meet in one id. The record keeps the key's parts whole, so that "why
//! was this not cached" is a comparison of two records. A record is lost as a whole when one of its outputs is lost. It
//! lies in the index and, for recovery, beside the tree of one of its outputs.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_oci::Digest;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::Result;
use crate::ids::{LayerId, RecordId, Tenant, Time, TreeId};
use crate::layer_ref::LayerRef;
use crate::layer_table::{LayerRecord, LayerUsage};
use crate::meta::{Batch, Table};
use crate::record_file;
use crate::store::Store;

/// What a record says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheRecord {
    /// The id that all equal keys meet in.
    pub id: RecordId,
    /// Raised when a re-run replaces the outputs. Content aliases belong to one version.
    pub version: u64,
    /// Digests of the keys that lead here.
    pub keys: Vec<Digest>,
    /// What the key was made of, as the solver hands it over.
    #[serde(default)]
    pub parts: Value,
    /// One entry per output of the vertex; `None` is the empty file system.
    pub outputs: Vec<Option<LayerId>>,
    /// When the outputs were made.
    pub created_at: Time,
}

/// A record as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StoredRecord {
    pub(crate) tenant: Tenant,
    #[serde(flatten)]
    pub(crate) record: CacheRecord,
    /// The tree it lies beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) home: Option<TreeId>,
    /// Layers among the outputs, and below them, that no tree record describes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) layers: Vec<LayerRecord>,
}

/// A record found, with leases on its outputs from the moment of the lookup.
#[derive(Clone, Debug)]
pub struct CacheHit {
    /// The record.
    pub record: CacheRecord,
    /// Its outputs, in order.
    pub outputs: Vec<Option<LayerRef>>,
    /// When it was last used before, and how often.
    pub last_used: Time,
    /// Number of uses before this one.
    pub use_count: u64,
}

/// What to save.
#[derive(Clone, Debug)]
pub struct NewRecord {
    /// All keys that shall lead to it; at least one.
    pub keys: Vec<Digest>,
    /// What the key was made of.
    pub parts: Value,
    /// One entry per output.
    pub outputs: Vec<Option<LayerRef>>,
    /// Content digests of the outputs that are known already: they belong to this version. Selector and digest.
    pub aliases: Vec<(String, Digest)>,
    /// Written in the same commit: see [`Records::set_notes`].
    pub notes: Vec<(Vec<u8>, Vec<u8>)>,
    /// When the outputs were made; now, unless they come from an import.
    pub created_at: Time,
}

/// Uses that are newer in memory than in the index.
#[derive(Debug, Default)]
pub(crate) struct RecordUse(Mutex<HashMap<RecordId, LayerUsage>>);

/// The cache records of one tenant. Calls read and write the index and belong on a blocking thread.
#[derive(Clone, Debug)]
pub struct Records {
    store: Arc<Store>,
    tenant: Tenant,
}

fn key_of(tenant: &Tenant, rest: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(tenant.as_str().len() + 1 + rest.len());
    key.extend_from_slice(tenant.as_str().as_bytes());
    key.push(0);
    key.extend_from_slice(rest);
    key
}

fn alias_key(tenant: &Tenant, id: &RecordId, version: u64, selector: &str) -> Vec<u8> {
    let mut rest = id.as_str().as_bytes().to_vec();
    rest.extend_from_slice(&version.to_be_bytes());
    rest.extend_from_slice(selector.as_bytes());
    key_of(tenant, &rest)
}

fn output_key(layer: &LayerId, record: &RecordId) -> Vec<u8> {
    format!("{layer}{record}").into_bytes()
}

fn use_key(id: &RecordId) -> Vec<u8> {
    format!("r/{id}").into_bytes()
}

impl Store {
    /// The cache records of a tenant.
    pub fn records(self: &Arc<Self>, tenant: &Tenant) -> Records {
        Records {
            store: self.clone(),
            tenant: tenant.clone(),
        }
    }
}

impl Records {
    /// The record that a key leads to. One with a lost output is dropped and not found.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn lookup(&self, key: &Digest) -> Result<Option<CacheHit>> {
        let Some(id) = self
            .store
            .index
            .get::<RecordId>(Table::Keys, &key_of(&self.tenant, key.as_bytes()))?
        else {
            return Ok(None);
        };
        let hit = self.get(&id)?;
        if hit.is_none() {
            let mut batch = Batch::new();
            batch.remove(Table::Keys, key_of(&self.tenant, key.as_bytes()));
            self.store.index.commit(&batch)?;
        }
        Ok(hit)
    }

    /// A record by id, with leases on its outputs.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn get(&self, id: &RecordId) -> Result<Option<CacheHit>> {
        let Some(stored) = self.store.stored_record(&self.tenant, id)? else {
            return Ok(None);
        };
        let mut outputs = Vec::with_capacity(stored.record.outputs.len());
        for output in &stored.record.outputs {
            match output {
                None => outputs.push(None),
                Some(layer) => match self.store.layer(&self.tenant, layer) {
                    Some(layer) => outputs.push(Some(layer)),
                    None => {
                        tracing::debug!(record = %id, %layer, "an output is lost, and the record with it");
                        self.drop_record(id)?;
                        return Ok(None);
                    }
                },
            }
        }
        let used = self.store.use_of(id)?;
        let now = LayerUsage {
            last_used: Time::now(),
            count: used.count + 1,
        };
        self.store.record_use.0.lock().insert(id.clone(), now);
        self.store.keeper.wake();
        Ok(Some(CacheHit {
            record: stored.record,
            outputs,
            last_used: used.last_used,
            use_count: used.count,
        }))
    }

    /// What a record says, without leases and without counting as a use. For explanations.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn peek(&self, id: &RecordId) -> Result<Option<CacheRecord>> {
        Ok(self.store.stored_record(&self.tenant, id)?.map(|s| s.record))
    }

    /// The id that a key leads to, without looking whether its outputs are still there.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn id_of(&self, key: &Digest) -> Result<Option<RecordId>> {
        self.store.index.get(Table::Keys, &key_of(&self.tenant, key.as_bytes()))
    }

    /// Calls `each` for every record of the tenant until told to stop. For explanations and cache export.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn for_each(&self, mut each: impl FnMut(CacheRecord) -> ControlFlow<()>) -> Result<()> {
        let prefix = key_of(&self.tenant, b"");
        self.store
            .index
            .scan(Table::Records, &prefix, |_, stored: StoredRecord| each(stored.record))
    }

    /// Saves outputs under their keys, in one commit with their aliases. If a key leads to a record already, that record
    /// is replaced and its version raised; if several do, they become one.
    ///
    /// When this returns, the record survives the end of the process.
    ///
    /// # Errors
    /// If it could not be written; the outputs themselves are not touched.
    pub fn save(&self, new: NewRecord) -> Result<CacheRecord> {
        let _one = self.store.saving.lock();
        let mut met: Vec<StoredRecord> = Vec::new();
        for key in &new.keys {
            if let Some(id) = self.id_of(key)?
                && !met.iter().any(|m| m.record.id == id)
                && let Some(stored) = self.store.stored_record(&self.tenant, &id)?
            {
                met.push(stored);
            }
        }
        met.sort_by_key(|m| (m.record.created_at, m.record.id.clone()));
        let mut batch = Batch::new();
        let mut keys = new.keys;
        let (mut id, mut version) = (RecordId::random(), 1);
        for (n, old) in met.iter().enumerate() {
            if n == 0 {
                (id, version) = (old.record.id.clone(), old.record.version + 1);
            }
            keys.extend(old.record.keys.iter().copied());
            self.unlink(&mut batch, old)?;
        }
        keys.sort_unstable();
        keys.dedup();
        let outputs: Vec<_> = new.outputs.iter().map(|o| o.as_ref().map(|l| l.id().clone())).collect();
        let record = CacheRecord {
            id,
            version,
            keys,
            parts: new.parts,
            outputs,
            created_at: new.created_at,
        };
        let stored = self.store.describe(&self.tenant, record, &new.outputs);
        for (selector, digest) in &new.aliases {
            let key = alias_key(&self.tenant, &stored.record.id, version, selector);
            batch.put(Table::Aliases, key, digest)?;
        }
        self.add_notes(&mut batch, &new.notes)?;
        self.link(&mut batch, &stored)?;
        // Beside the tree first: if the process ends between the two, the next start finds it there.
        if let Some(path) = self.store.save_path(&stored)
            && let Err(error) = record_file::write(&path, &stored)
        {
            tracing::warn!(%error, "a cache record is only in the index");
        }
        self.store.index.commit(&batch)?;
        for old in &met {
            if old.home != stored.home || old.record.id != stored.record.id {
                self.store.remove_save(old);
            }
        }
        self.store.keeper.wake();
        Ok(stored.record)
    }

    /// Lets one more key lead to a record. If it leads to another one, the older of both stays and takes over.
    ///
    /// # Errors
    /// If it could not be written. A record that is gone is no error: nothing is linked.
    pub fn add_key(&self, id: &RecordId, key: &Digest) -> Result<()> {
        let _one = self.store.saving.lock();
        let Some(mut stored) = self.store.stored_record(&self.tenant, id)? else {
            return Ok(());
        };
        if stored.record.keys.contains(key) {
            return Ok(());
        }
        stored.record.keys.push(*key);
        let mut batch = Batch::new();
        self.link(&mut batch, &stored)?;
        if let Some(path) = self.store.save_path(&stored)
            && let Err(error) = record_file::write(&path, &stored)
        {
            tracing::warn!(%error, "a cache record is only in the index");
        }
        self.store.index.commit(&batch)
    }

    /// The content digest of an output of one version of a record, by selector (the solver's text for output, path and
    /// options).
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn alias(&self, id: &RecordId, version: u64, selector: &str) -> Result<Option<Digest>> {
        self.store
            .index
            .get(Table::Aliases, &alias_key(&self.tenant, id, version, selector))
    }

    /// Remembers a content digest for a version of a record. It is dropped with that version.
    ///
    /// # Errors
    /// If it could not be written.
    pub fn set_alias(&self, id: &RecordId, version: u64, selector: &str, digest: &Digest) -> Result<()> {
        let mut batch = Batch::new();
        batch.put(Table::Aliases, alias_key(&self.tenant, id, version, selector), digest)?;
        self.store.index.commit(&batch)?;
        self.store.keeper.wake();
        Ok(())
    }

    /// What was noted under a key.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn note(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let text: Option<String> = self.store.index.get(Table::Notes, &key_of(&self.tenant, key))?;
        Ok(text.and_then(|text| hex::decode(text).ok()))
    }

    /// Notes small facts in one commit: plain keys and values of the tenant. They are lost when the index is rebuilt, so
    /// only what can be computed again belongs here.
    ///
    /// # Errors
    /// If it could not be written.
    pub fn set_notes(&self, notes: &[(Vec<u8>, Vec<u8>)]) -> Result<()> {
        let mut batch = Batch::new();
        self.add_notes(&mut batch, notes)?;
        self.store.index.commit(&batch)?;
        self.store.keeper.wake();
        Ok(())
    }

    fn add_notes(&self, batch: &mut Batch, notes: &[(Vec<u8>, Vec<u8>)]) -> Result<()> {
        for (key, value) in notes {
            batch.put(Table::Notes, key_of(&self.tenant, key), &hex::encode(value))?;
        }
        Ok(())
    }

    /// Forgets a record with its keys and aliases. Its outputs stay until collected.
    ///
    /// # Errors
    /// If it could not be written.
    pub fn drop_record(&self, id: &RecordId) -> Result<()> {
        let _one = self.store.saving.lock();
        let Some(stored) = self.store.stored_record(&self.tenant, id)? else {
            return Ok(());
        };
        let mut batch = Batch::new();
        self.unlink(&mut batch, &stored)?;
        self.store.index.commit(&batch)?;
        self.store.remove_save(&stored);
        Ok(())
    }

    fn link(&self, batch: &mut Batch, stored: &StoredRecord) -> Result<()> {
        self.store.link_record(batch, stored)
    }

    fn unlink(&self, batch: &mut Batch, stored: &StoredRecord) -> Result<()> {
        self.store.unlink_record(batch, stored)
    }
}

impl Store {
    pub(crate) fn stored_record(&self, tenant: &Tenant, id: &RecordId) -> Result<Option<StoredRecord>> {
        self.index.get(Table::Records, &key_of(tenant, id.as_str().as_bytes()))
    }

    pub(crate) fn link_record(&self, batch: &mut Batch, stored: &StoredRecord) -> Result<()> {
        let (tenant, record) = (&stored.tenant, &stored.record);
        batch.put(Table::Records, key_of(tenant, record.id.as_str().as_bytes()), stored)?;
        for key in &record.keys {
            batch.put(Table::Keys, key_of(tenant, key.as_bytes()), &record.id)?;
        }
        for layer in record.outputs.iter().flatten() {
            batch.put(Table::Outputs, output_key(layer, &record.id), &(tenant, &record.id))?;
        }
        Ok(())
    }

    pub(crate) fn unlink_record(&self, batch: &mut Batch, stored: &StoredRecord) -> Result<()> {
        let (tenant, record) = (&stored.tenant, &stored.record);
        batch.remove(Table::Records, key_of(tenant, record.id.as_str().as_bytes()));
        for key in &record.keys {
            batch.remove(Table::Keys, key_of(tenant, key.as_bytes()));
        }
        for layer in record.outputs.iter().flatten() {
            batch.remove(Table::Outputs, output_key(layer, &record.id));
        }
        batch.remove(Table::Usage, use_key(&record.id));
        self.index.scan(
            Table::Aliases,
            &key_of(tenant, record.id.as_str().as_bytes()),
            |key, _: Digest| {
                batch.remove(Table::Aliases, key);
                ControlFlow::Continue(())
            },
        )
    }

    /// Forgets every record that has this layer among its outputs.
    pub(crate) fn drop_records_of(&self, layer: &LayerId) -> Result<()> {
        let _one = self.saving.lock();
        let mut lost = Vec::new();
        self.index.scan(
            Table::Outputs,
            layer.as_str().as_bytes(),
            |_, owner: (Tenant, RecordId)| {
                lost.push(owner);
                ControlFlow::Continue(())
            },
        )?;
        for (tenant, id) in lost {
            let Some(stored) = self.stored_record(&tenant, &id)? else {
                continue;
            };
            let mut batch = Batch::new();
            self.unlink_record(&mut batch, &stored)?;
            self.index.commit(&batch)?;
            self.remove_save(&stored);
        }
        Ok(())
    }

    /// Where a record lies beside its home tree.
    pub(crate) fn save_path(&self, stored: &StoredRecord) -> Option<PathBuf> {
        Some(
            self.dir
                .tree(stored.home.as_ref()?)
                .join(format!("save.{}", stored.record.id)),
        )
    }

    fn remove_save(&self, stored: &StoredRecord) {
        if let Some(path) = self.save_path(stored)
            && let Err(error) = std::fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %path.display(), "an old cache record stays beside its tree");
        }
    }

    /// Chooses the home of a record and adds what a rebuild would miss.
    fn describe(&self, tenant: &Tenant, record: CacheRecord, outputs: &[Option<LayerRef>]) -> StoredRecord {
        let mut home = None;
        let mut layers: Vec<LayerRecord> = Vec::new();
        let table = self.layers.lock();
        for output in outputs.iter().flatten() {
            for node in output.node.chain() {
                for id in [Some(&node.id), node.origin.as_ref().map(|o| &o.id)]
                    .into_iter()
                    .flatten()
                {
                    let Some(entry) = table.layers.get(id) else { continue };
                    let own_tree = entry.record.tree.as_ref().and_then(|tree| table.trees.get(tree));
                    let described = own_tree.is_some_and(|t| t.record.layer.id == *id);
                    if described && *id == output.node.id && home.is_none() {
                        home = entry.record.tree.clone();
                    }
                    if !described && !layers.iter().any(|l| l.id == *id) {
                        layers.push(entry.record.clone());
                    }
                }
            }
        }
        if home.is_none() {
            // No output has a tree of its own: beside the nearest one below will do, and without any there is nothing
            // worth finding again.
            home = outputs.iter().flatten().find_map(|output| {
                let chain = output.node.chain();
                chain
                    .iter()
                    .rev()
                    .find_map(|node| table.layers.get(&node.id)?.record.tree.clone())
            });
        }
        StoredRecord {
            tenant: tenant.clone(),
            record,
            home,
            layers,
        }
    }

    fn use_of(&self, id: &RecordId) -> Result<LayerUsage> {
        if let Some(used) = self.record_use.0.lock().get(id) {
            return Ok(*used);
        }
        Ok(self.index.get(Table::Usage, &use_key(id))?.unwrap_or_default())
    }

    /// Writes uses that are only in memory to the index.
    pub(crate) fn flush_usage(&self) {
        let mut batch = Batch::new();
        let outcome = (|| {
            for (id, used) in self.record_use.0.lock().drain() {
                batch.put(Table::Usage, use_key(&id), &used)?;
            }
            let mut table = self.layers.lock();
            let table = &mut *table;
            for id in table.used.drain() {
                if let Some(entry) = table.layers.get(&id) {
                    batch.put(Table::Usage, id.as_str(), &entry.usage)?;
                }
            }
            Ok(())
        })();
        if let Err(error) = outcome.and_then(|()| self.index.commit(&batch)) {
            tracing::warn!(%error, "uses could not be recorded");
        }
    }
}
