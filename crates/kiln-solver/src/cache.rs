//! `CacheStore`: what the solver remembers between builds, and one in memory.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use kiln_llb::OutputIndex;
use kiln_oci::Digest;
use serde::{Deserialize, Serialize};

use crate::cache_key::{KeyId, KeyParts, LinkId, OpDigest};

/// Whose cache it is. Nothing is ever shared between two tenants; a tenant is no part of any key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tenant(Arc<str>);

impl Tenant {
    /// A tenant by name.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// Its name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Tenant {
    fn default() -> Self {
        Self(Arc::from("default"))
    }
}

/// A store that could not answer. The solver reports it and goes on as if nothing had been found.
#[derive(Debug, thiserror::Error)]
#[error("failed to {action} cache record: {source}")]
pub struct CacheError {
    /// `read`, `write`, `remove`.
    pub action: &'static str,
    /// Why.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// One run of a record: every run of the same work raises the version, and never reuses one, not even after its result
/// was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RecordVersion {
    /// The record.
    pub record: KeyId,
    /// Which run of it.
    pub version: u64,
}

/// A record whose results are there.
#[derive(Clone, Debug)]
pub struct Hit<R> {
    /// What was found.
    pub run: RecordVersion,
    /// All results, by output. They hold their leases from now on.
    pub outputs: Arc<[R]>,
}

/// A digest of what an output holds at some paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContentAlias {
    /// The run whose output was looked at.
    pub of: RecordVersion,
    /// The output.
    pub output: OutputIndex,
    /// The paths.
    pub selector: Option<Digest>,
    /// The digest.
    pub content: Digest,
}

/// A key that leads to a record, as long as the runs it was made from are the latest ones of their records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyAlias {
    /// The key that may be asked for.
    pub key: KeyId,
    /// Inputs whose content was looked at.
    pub while_current: Vec<RecordVersion>,
}

/// Everything one commit writes.
#[derive(Clone, Debug)]
pub struct Save<R> {
    /// The record. Its id is the canonical key of `parts`.
    pub record: KeyId,
    /// What the key was made of.
    pub parts: Arc<KeyParts>,
    /// The name of the step, for people.
    pub description: String,
    /// The results of a run, by output; `None` only writes what has been learned about a record that exists.
    pub outputs: Option<Arc<[R]>>,
    /// Further keys that lead to the record.
    pub aliases: Vec<KeyAlias>,
    /// Content digests that were computed on the way.
    pub contents: Vec<ContentAlias>,
    /// Links to remember, see [`KeyParts::links`].
    pub links: Vec<LinkId>,
}

/// The memory of the solver. Implementations answer from an index and do not touch results, except that a record whose
/// results cannot be loaded any more is no hit.
#[async_trait]
pub trait CacheStore<R>: Send + Sync + 'static {
    /// The record that `key` is or, through a valid alias, leads to, with its results. A record that lost one of its
    /// results is removed and no hit.
    async fn find(&self, tenant: &Tenant, key: KeyId) -> Result<Option<Hit<R>>, CacheError>;

    /// The record that `key`, through a valid alias, leads to, whether its results exist or not. `None` if no valid alias
    /// of that name exists.
    async fn resolve(&self, tenant: &Tenant, key: KeyId) -> Result<Option<KeyId>, CacheError>;

    /// A remembered content digest of the latest run of `record`, with that run.
    async fn content(
        &self,
        tenant: &Tenant,
        record: KeyId,
        output: OutputIndex,
        selector: Option<Digest>,
    ) -> Result<Option<(RecordVersion, Digest)>, CacheError>;

    /// Whether a link was ever saved. May say yes although the records are gone, never no although they are there.
    async fn linked(&self, tenant: &Tenant, link: LinkId) -> Result<bool, CacheError>;

    /// Writes everything in one commit. With results, the record's version is raised, its old results are replaced and
    /// every alias that names an older run of it becomes void. Returns the run that is current now.
    async fn save(&self, tenant: &Tenant, save: Save<R>) -> Result<RecordVersion, CacheError>;

    /// Removes the results of a run, if it is still the latest: they turned out to be gone.
    async fn forget(&self, tenant: &Tenant, run: RecordVersion) -> Result<(), CacheError>;

    /// What the latest saved record of an operation was made of, to explain a miss.
    async fn nearest(&self, tenant: &Tenant, op: OpDigest) -> Result<Option<Arc<KeyParts>>, CacheError>;
}

/// A cache that lives as long as the process: for tests, and for daemons that shall remember nothing.
#[derive(Debug)]
pub struct MemoryCache<R> {
    tenants: Mutex<HashMap<Tenant, Tables<R>>>,
}

#[derive(Debug)]
struct Tables<R> {
    records: HashMap<KeyId, Record<R>>,
    aliases: HashMap<KeyId, (KeyId, Vec<RecordVersion>)>,
    contents: HashMap<(KeyId, OutputIndex, Option<Digest>), (u64, Digest)>,
    links: HashSet<LinkId>,
    nearest: HashMap<OpDigest, Arc<KeyParts>>,
}

#[derive(Debug)]
struct Record<R> {
    version: u64,
    outputs: Option<Arc<[R]>>,
}

impl<R> Default for Tables<R> {
    fn default() -> Self {
        Self {
            records: HashMap::new(),
            aliases: HashMap::new(),
            contents: HashMap::new(),
            links: HashSet::new(),
            nearest: HashMap::new(),
        }
    }
}

impl<R> Default for MemoryCache<R> {
    fn default() -> Self {
        Self {
            tenants: Mutex::new(HashMap::new()),
        }
    }
}

impl<R> Tables<R> {
    fn current(&self, record: KeyId) -> u64 {
        self.records.get(&record).map_or(0, |r| r.version)
    }

    fn follow(&self, key: KeyId) -> Option<KeyId> {
        let (record, conditions) = self.aliases.get(&key)?;
        conditions
            .iter()
            .all(|c| self.current(c.record) == c.version)
            .then_some(*record)
    }
}

impl<R> MemoryCache<R> {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    fn with<T>(&self, tenant: &Tenant, f: impl FnOnce(&mut Tables<R>) -> T) -> T {
        f(self
            .tenants
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(tenant.clone())
            .or_default())
    }

    /// Like [`prune`](Self::prune), by results.
    pub fn prune_by(&self, tenant: &Tenant, mut victim: impl FnMut(&[R]) -> bool) {
        self.with(tenant, |t| {
            for record in t.records.values_mut() {
                record.outputs.take_if(|outputs| victim(outputs));
            }
        });
    }

    /// Removes the results of every record for which `victim` says so, as pruning does; keys stay.
    pub fn prune(&self, tenant: &Tenant, mut victim: impl FnMut(KeyId) -> bool) {
        self.with(tenant, |t| {
            for (id, record) in &mut t.records {
                if victim(*id) {
                    record.outputs = None;
                }
            }
        });
    }
}

#[async_trait]
impl<R: Clone + Send + Sync + 'static> CacheStore<R> for MemoryCache<R> {
    async fn find(&self, tenant: &Tenant, key: KeyId) -> Result<Option<Hit<R>>, CacheError> {
        Ok(self.with(tenant, |t| {
            let id = if t.records.contains_key(&key) {
                key
            } else {
                t.follow(key)?
            };
            let record = t.records.get(&id)?;
            let outputs = record.outputs.clone()?;
            Some(Hit {
                run: RecordVersion {
                    record: id,
                    version: record.version,
                },
                outputs,
            })
        }))
    }

    async fn resolve(&self, tenant: &Tenant, key: KeyId) -> Result<Option<KeyId>, CacheError> {
        Ok(self.with(tenant, |t| t.follow(key)))
    }

    async fn content(
        &self,
        tenant: &Tenant,
        record: KeyId,
        output: OutputIndex,
        selector: Option<Digest>,
    ) -> Result<Option<(RecordVersion, Digest)>, CacheError> {
        Ok(self.with(tenant, |t| {
            let (version, content) = *t.contents.get(&(record, output, selector))?;
            (t.current(record) == version).then_some((RecordVersion { record, version }, content))
        }))
    }

    async fn linked(&self, tenant: &Tenant, link: LinkId) -> Result<bool, CacheError> {
        Ok(self.with(tenant, |t| t.links.contains(&link)))
    }

    async fn save(&self, tenant: &Tenant, save: Save<R>) -> Result<RecordVersion, CacheError> {
        Ok(self.with(tenant, |t| {
            let record = t.records.entry(save.record).or_insert(Record {
                version: 0,
                outputs: None,
            });
            if let Some(outputs) = save.outputs {
                record.version += 1;
                record.outputs = Some(outputs);
            }
            let run = RecordVersion {
                record: save.record,
                version: record.version,
            };
            for op in &save.parts.ops {
                t.nearest.insert(*op, Arc::clone(&save.parts));
            }
            for alias in save.aliases {
                t.aliases.insert(alias.key, (save.record, alias.while_current));
            }
            for c in save.contents {
                if t.current(c.of.record) == c.of.version {
                    t.contents
                        .insert((c.of.record, c.output, c.selector), (c.of.version, c.content));
                }
            }
            t.links.extend(save.links);
            run
        }))
    }

    async fn forget(&self, tenant: &Tenant, run: RecordVersion) -> Result<(), CacheError> {
        self.with(tenant, |t| {
            if let Some(record) = t.records.get_mut(&run.record)
                && record.version == run.version
            {
                record.outputs = None;
            }
        });
        Ok(())
    }

    async fn nearest(&self, tenant: &Tenant, op: OpDigest) -> Result<Option<Arc<KeyParts>>, CacheError> {
        Ok(self.with(tenant, |t| t.nearest.get(&op).cloned()))
    }
}
