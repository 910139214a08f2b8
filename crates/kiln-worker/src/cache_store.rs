//! `StoreCache`: the solver's memory, kept in the store.
//!
//! Results are records of the store, under the digest of the solver's key. What the solver learns besides (aliases that
//! hold while their inputs are current, content digests, links) are notes: they are lost when the index is rebuilt, and
//! found out again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use kiln_llb::OutputIndex;
use kiln_oci::Digest;
use kiln_solver::{CacheError, CacheStore, Hit, KeyId, KeyParts, LinkId, OpDigest, RecordVersion, Save, Tenant};
use kiln_store::{NewRecord, Records, Store, StoreError, Time};
use serde::{Deserialize, Serialize};

use crate::worker::{Ref, store_tenant};

/// What a record's `parts` hold.
#[derive(Serialize, Deserialize)]
struct Parts {
    /// The canonical key: the record's id towards the solver.
    id: KeyId,
    /// The run that made the results.
    run: u64,
    /// The step's name.
    description: String,
    /// What the key was made of.
    key: KeyParts,
}

/// The solver's memory in a store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct StoreCache {
    store: Arc<Store>,
    last_run: Arc<AtomicU64>,
}

impl StoreCache {
    /// The memory that lives in `store`.
    pub fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            last_run: Arc::default(),
        }
    }

    /// A number for a run that was never given out before: the time, made unique.
    fn next_run(&self) -> u64 {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |d| d.as_nanos() as u64);
        let mut last = self.last_run.load(Ordering::Relaxed);
        loop {
            let next = now.max(last + 1);
            match self
                .last_run
                .compare_exchange_weak(last, next, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return next,
                Err(other) => last = other,
            }
        }
    }

    /// Runs `work` over the tenant's records where blocking is allowed.
    async fn with<T: Send + 'static>(
        &self,
        action: &'static str,
        tenant: &Tenant,
        work: impl FnOnce(&Table) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, CacheError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| CacheError { action, source };
        let tenant = store_tenant(tenant).map_err(|e| failed(e.into()))?;
        let table = Table(self.store.records(&tenant));
        tokio::task::spawn_blocking(move || work(&table))
            .await
            .map_err(|e| failed(e.into()))?
            .map_err(|e| failed(e.into()))
    }
}

/// Names of notes: a letter and what it is about.
fn note(kind: u8, about: &[&[u8]]) -> Vec<u8> {
    let mut key = vec![kind];
    for part in about {
        key.extend_from_slice(part);
    }
    key
}

fn current_note(record: KeyId) -> Vec<u8> {
    note(b'v', &[record.0.as_bytes()])
}

fn alias_note(key: KeyId) -> Vec<u8> {
    note(b'a', &[key.0.as_bytes()])
}

fn content_note(record: KeyId, output: OutputIndex, selector: Option<Digest>) -> Vec<u8> {
    let selector = selector.map(|s| *s.as_bytes()).unwrap_or_default();
    note(b'c', &[record.0.as_bytes(), &output.to_be_bytes(), &selector])
}

fn link_note(link: LinkId) -> Vec<u8> {
    note(b'l', &[link.0.as_bytes()])
}

fn nearest_note(op: OpDigest) -> Vec<u8> {
    note(b'n', &[op.0.as_bytes()])
}

/// Takes a digest off the front of a note.
fn digest_at(bytes: &mut &[u8]) -> Option<Digest> {
    let (head, rest) = bytes.split_first_chunk::<32>()?;
    *bytes = rest;
    Some(Digest::from_bytes(*head))
}

/// Takes a number off the front of a note.
fn number_at(bytes: &mut &[u8]) -> Option<u64> {
    let (head, rest) = bytes.split_first_chunk::<8>()?;
    *bytes = rest;
    Some(u64::from_be_bytes(*head))
}

/// The records of one tenant.
struct Table(Records);

impl Table {
    /// The latest run of a record, also if its results are gone; 0 if it was never run.
    fn current(&self, record: KeyId) -> Result<u64, StoreError> {
        if let Some(run) = self
            .0
            .note(&current_note(record))?
            .and_then(|bytes| number_at(&mut bytes.as_slice()))
        {
            return Ok(run);
        }
        // The notes were lost with the index; the record tells.
        let Some(id) = self.0.id_of(&record.0)? else {
            return Ok(0);
        };
        let parts = self
            .0
            .peek(&id)?
            .and_then(|r| serde_json::from_value::<Parts>(r.parts).ok());
        Ok(parts.map_or(0, |p| p.run))
    }

    fn follow(&self, key: KeyId) -> Result<Option<KeyId>, StoreError> {
        let Some(bytes) = self.0.note(&alias_note(key))? else {
            return Ok(None);
        };
        let mut bytes = bytes.as_slice();
        let Some(record) = digest_at(&mut bytes) else {
            return Ok(None);
        };
        while let (Some(input), Some(run)) = (digest_at(&mut bytes), number_at(&mut bytes)) {
            if self.current(KeyId(input))? != run {
                return Ok(None);
            }
        }
        Ok(Some(KeyId(record)))
    }

    fn lookup(&self, key: KeyId) -> Result<Option<Hit<Ref>>, StoreError> {
        let Some(hit) = self.0.lookup(&key.0)? else {
            return Ok(None);
        };
        let Ok(parts) = serde_json::from_value::<Parts>(hit.record.parts) else {
            return Ok(None);
        };
        let run = RecordVersion {
            record: parts.id,
            version: parts.run,
        };
        Ok(Some(Hit {
            run,
            outputs: hit.outputs.into(),
        }))
    }

    /// Those of `notes` that say something new.
    fn news(&self, notes: Vec<(Vec<u8>, Vec<u8>)>) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let mut news = Vec::new();
        for (key, value) in notes {
            if self.0.note(&key)?.as_ref() != Some(&value) {
                news.push((key, value));
            }
        }
        Ok(news)
    }
}

/// What a save has to note besides the record.
fn notes_of(save: &Save<Ref>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut notes = Vec::new();
    for alias in save.aliases.iter().filter(|a| !a.while_current.is_empty()) {
        let mut value = save.record.0.as_bytes().to_vec();
        for run in &alias.while_current {
            value.extend_from_slice(run.record.0.as_bytes());
            value.extend_from_slice(&run.version.to_be_bytes());
        }
        notes.push((alias_note(alias.key), value));
    }
    for c in &save.contents {
        let mut value = c.of.version.to_be_bytes().to_vec();
        value.extend_from_slice(c.content.as_bytes());
        notes.push((content_note(c.of.record, c.output, c.selector), value));
    }
    notes.extend(save.links.iter().map(|link| (link_note(*link), Vec::new())));
    notes
}

#[async_trait]
impl CacheStore<Ref> for StoreCache {
    async fn find(&self, tenant: &Tenant, key: KeyId) -> Result<Option<Hit<Ref>>, CacheError> {
        self.with("read", tenant, move |t| match t.lookup(key)? {
            Some(hit) => Ok(Some(hit)),
            None => t.follow(key)?.map_or(Ok(None), |record| t.lookup(record)),
        })
        .await
    }

    async fn resolve(&self, tenant: &Tenant, key: KeyId) -> Result<Option<KeyId>, CacheError> {
        self.with("read", tenant, move |t| t.follow(key)).await
    }

    async fn content(
        &self,
        tenant: &Tenant,
        record: KeyId,
        output: OutputIndex,
        selector: Option<Digest>,
    ) -> Result<Option<(RecordVersion, Digest)>, CacheError> {
        self.with("read", tenant, move |t| {
            let Some(bytes) = t.0.note(&content_note(record, output, selector))? else {
                return Ok(None);
            };
            let mut bytes = bytes.as_slice();
            let (Some(version), Some(content)) = (number_at(&mut bytes), digest_at(&mut bytes)) else {
                return Ok(None);
            };
            Ok((t.current(record)? == version).then_some((RecordVersion { record, version }, content)))
        })
        .await
    }

    async fn linked(&self, tenant: &Tenant, link: LinkId) -> Result<bool, CacheError> {
        self.with("read", tenant, move |t| Ok(t.0.note(&link_note(link))?.is_some()))
            .await
    }

    async fn save(&self, tenant: &Tenant, save: Save<Ref>) -> Result<RecordVersion, CacheError> {
        let run = self.next_run();
        self.with("write", tenant, move |t| {
            let mut notes = notes_of(&save);
            let record = save.record;
            let Some(outputs) = save.outputs else {
                let news = t.news(notes)?;
                if !news.is_empty() {
                    t.0.set_notes(&news)?;
                }
                return Ok(RecordVersion {
                    record,
                    version: t.current(record)?,
                });
            };
            let key = Arc::unwrap_or_clone(save.parts);
            notes.push((current_note(record), run.to_be_bytes().to_vec()));
            if let Ok(text) = serde_json::to_vec(&key) {
                notes.extend(key.ops.iter().map(|op| (nearest_note(*op), text.clone())));
            }
            let unconditional = save
                .aliases
                .iter()
                .filter(|a| a.while_current.is_empty())
                .map(|a| a.key.0);
            let keys = std::iter::once(record.0).chain(unconditional).collect();
            let parts = serde_json::to_value(Parts {
                id: record,
                run,
                description: save.description,
                key,
            })
            .map_err(|e| StoreError::Invalid(format!("encode cache record: {e}")))?;
            let outputs = outputs.to_vec();
            t.0.save(NewRecord {
                keys,
                parts,
                outputs,
                aliases: Vec::new(),
                notes,
                created_at: Time::now(),
            })?;
            Ok(RecordVersion { record, version: run })
        })
        .await
    }

    async fn forget(&self, tenant: &Tenant, run: RecordVersion) -> Result<(), CacheError> {
        self.with("remove", tenant, move |t| {
            if t.current(run.record)? == run.version
                && let Some(id) = t.0.id_of(&run.record.0)?
            {
                t.0.drop_record(&id)?;
            }
            Ok(())
        })
        .await
    }

    async fn nearest(&self, tenant: &Tenant, op: OpDigest) -> Result<Option<Arc<KeyParts>>, CacheError> {
        self.with("read", tenant, move |t| {
            let text = t.0.note(&nearest_note(op))?;
            Ok(text.and_then(|text| serde_json::from_slice(&text).ok()).map(Arc::new))
        })
        .await
    }
}
