//! What is kept and what goes: usage records, pruning, policies.
//!
//! Victims are chosen from a snapshot of the tables and removed one by one under compare-and-delete: a record that got a
//! handle or a child in between stays. No lock is held while files are moved.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kiln_fs::Stop;
use kiln_oci::Digest;

use crate::error::Result;
use crate::ids::{DirId, LayerId, RecordType, Tenant, Time};
use crate::layer_table::LayerRecord;
use crate::ledger::Area;
use crate::meta::{Batch, Table};
use crate::store::Store;

/// A blob that no layer, lease or history record names is kept this long: somebody may be about to use it.
const BLOB_GRACE: Duration = Duration::from_secs(300);
/// A draft that nobody resumed for this long is removed.
const INGEST_GRACE: Duration = Duration::from_secs(24 * 3600);

/// One line of disk usage (wire.md, UsageRecord).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRecord {
    /// Id of the record.
    pub id: String,
    /// Whose it is.
    pub tenant: Tenant,
    /// Whether it is a directory that is changed in place.
    pub mutable: bool,
    /// Held by a job or by a record above it: it cannot be removed now.
    pub in_use: bool,
    /// Bytes that removing it would free; 0 for a mutable record in use.
    pub size: u64,
    /// Direct parents.
    pub parents: Vec<String>,
    /// When it was made.
    pub created_at: Time,
    /// When it was last let go of.
    pub last_used: Option<Time>,
    /// How often it was used.
    pub usage_count: u64,
    /// Which step made it.
    pub description: String,
    /// What it is for.
    pub record_type: RecordType,
    /// Also referenced by an image store. Kiln has none of its own.
    pub shared: bool,
}

/// One rule of collection; a client's prune request is one too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GcPolicy {
    /// Also internal and frontend records.
    pub all: bool,
    /// Only what was not used for this long.
    pub keep_duration: Duration,
    /// Never go below this many bytes.
    pub reserved_space: u64,
    /// Go down to this many bytes; 0 for no such limit.
    pub max_used_space: u64,
    /// Leave this many bytes free on the disk; 0 for no such limit.
    pub min_free_space: u64,
    /// Only these types; empty for every type.
    pub types: Vec<RecordType>,
}

/// Marker of a running collection; one at a time.
#[derive(Debug, Default)]
pub(crate) struct Collecting;

enum Kind {
    Layer(LayerId),
    CacheMount(DirId),
    Context(DirId),
}

struct Line {
    record: UsageRecord,
    kind: Kind,
    /// A handle exists (as opposed to a child record).
    held: bool,
    children: usize,
    ephemeral: bool,
}

impl Store {
    /// Disk usage of a tenant, one line per record. Does not block.
    pub fn usage(&self, tenant: &Tenant) -> Vec<UsageRecord> {
        self.lines(Some(tenant))
            .into_iter()
            .filter(|l| !l.ephemeral)
            .map(|l| l.record)
            .collect()
    }

    fn lines(&self, tenant: Option<&Tenant>) -> Vec<Line> {
        let mut lines = Vec::new();
        let blob_sizes: HashMap<Digest, u64> = {
            let blobs = self.blobs.blobs.read();
            blobs
                .iter()
                .filter(|(_, e)| !e.dying)
                .map(|(d, e)| (*d, e.record.disk))
                .collect()
        };
        {
            let table = self.layers.lock();
            let mut counted = std::collections::HashSet::new();
            // In order of creation, so that what several records share is counted with the same one every time.
            let mut entries: Vec<_> = table.layers.values().filter(|e| !e.dying).collect();
            entries.sort_by(|a, b| (a.record.created_at, &a.record.id).cmp(&(b.record.created_at, &b.record.id)));
            for entry in entries {
                let record = &entry.record;
                let mut size = 0;
                if let Some(tree) = record.tree.as_ref().and_then(|id| table.trees.get(id))
                    && counted.insert(tree.record.id.to_string())
                {
                    size += tree.record.disk;
                }
                for blob in &record.blobs {
                    if let Some(bytes) = blob_sizes.get(&blob.digest)
                        && counted.insert(blob.digest.to_string())
                    {
                        size += bytes;
                    }
                }
                if tenant.is_some_and(|t| *t != record.tenant) {
                    continue;
                }
                let held = entry.node.strong_count() > 0;
                lines.push(Line {
                    record: UsageRecord {
                        id: record.id.to_string(),
                        tenant: record.tenant.clone(),
                        mutable: false,
                        in_use: held || entry.children > 0,
                        size,
                        parents: [&record.parent, &record.origin]
                            .into_iter()
                            .flatten()
                            .map(LayerId::to_string)
                            .collect(),
                        created_at: record.created_at,
                        last_used: Some(entry.usage.last_used),
                        usage_count: entry.usage.count,
                        description: record.description.clone(),
                        record_type: record.record_type,
                        shared: false,
                    },
                    kind: Kind::Layer(record.id.clone()),
                    held,
                    children: entry.children,
                    ephemeral: entry.ephemeral,
                });
            }
        }
        for (record, size, in_use) in self.list_cache_mounts() {
            if tenant.is_none_or(|t| *t == record.tenant) {
                let kind = Kind::CacheMount(record.id.clone());
                let times = (record.created_at, record.last_used, record.count);
                let what = (
                    record.id.to_string(),
                    record.tenant,
                    record.description,
                    RecordType::CacheMount,
                );
                lines.push(mutable(what, times, size, in_use, kind));
            }
        }
        for (record, size, in_use) in self.list_contexts() {
            if tenant.is_none_or(|t| *t == record.tenant) {
                let kind = Kind::Context(record.id.clone());
                let times = (record.created_at, record.last_used, record.count);
                let what = (
                    record.id.to_string(),
                    record.tenant,
                    record.description,
                    RecordType::Local,
                );
                lines.push(mutable(what, times, size, in_use, kind));
            }
        }
        lines
    }

    /// Removes what a policy and a filter select, leaves first, and calls `removed` for each record with its size.
    /// Blocks; belongs on a blocking thread.
    ///
    /// With any of the space limits set, records go one at a time, least valuable first, until the total is below the
    /// target; without them everything selected goes.
    ///
    /// # Errors
    /// If something cannot be moved to the trash, or [`StoreError::Canceled`](crate::StoreError::Canceled).
    pub fn prune(
        self: &Arc<Self>,
        tenant: &Tenant,
        policy: &GcPolicy,
        filter: &(dyn Fn(&UsageRecord) -> bool + Sync),
        stop: &Stop,
        removed: &mut dyn FnMut(&UsageRecord),
    ) -> Result<u64> {
        let _one = self.collecting.lock();
        let limited = policy.reserved_space > 0 || policy.max_used_space > 0 || policy.min_free_space > 0;
        let now = Time::now();
        let mut freed = 0;
        let mut refused = std::collections::HashSet::new();
        loop {
            stop.check()?;
            let lines = self.lines(Some(tenant));
            let total: u64 = lines.iter().map(|l| l.record.size).sum();
            if limited && total <= self.target(policy, total) {
                break;
            }
            let mut victims: Vec<_> = lines
                .into_iter()
                .filter(|l| {
                    let r = &l.record;
                    !r.in_use
                        && !l.held
                        && l.children == 0
                        && !l.ephemeral
                        && !refused.contains(&r.id)
                        && (policy.types.is_empty() || policy.types.contains(&r.record_type))
                        && (policy.all || !matches!(r.record_type, RecordType::Internal | RecordType::Frontend))
                        && (policy.keep_duration.is_zero()
                            || r.last_used.unwrap_or(r.created_at).age(now) >= policy.keep_duration)
                        && filter(r)
                })
                .collect();
            if victims.is_empty() {
                break;
            }
            rank(&mut victims);
            if limited {
                // One pass removes leaves until the target is reached; parents that became leaves are ranked anew.
                let mut over = total.saturating_sub(self.target(policy, total));
                victims.retain(|v| {
                    let needed = over > 0;
                    over = over.saturating_sub(v.record.size);
                    needed
                });
            }
            for victim in victims {
                stop.check()?;
                if self.remove_line(&victim)? {
                    freed += victim.record.size;
                    removed(&victim.record);
                } else {
                    refused.insert(victim.record.id);
                }
            }
        }
        // While somebody builds, a blob without a lease may be one that is about to be named.
        let building = self.layers.lock().layers.values().any(|e| e.node.strong_count() > 0);
        let everything = policy.keep_duration.is_zero() && !limited && !building;
        self.sweep(if everything { Duration::ZERO } else { BLOB_GRACE })?;
        self.keeper.wake();
        Ok(freed)
    }

    /// The size that a policy allows, at a given size.
    fn target(&self, policy: &GcPolicy, total: u64) -> u64 {
        let mut target = if policy.max_used_space > 0 {
            policy.max_used_space
        } else {
            u64::MAX
        };
        if policy.min_free_space > 0 {
            let available = self.dir.space().map_or(u64::MAX, |(available, _)| available);
            // What is in the trash will be free in a moment.
            let available = available.saturating_add(self.ledger.used(Area::Trash));
            if available < policy.min_free_space {
                target = target.min(total.saturating_sub(policy.min_free_space - available));
            }
        }
        if policy.max_used_space == 0 && policy.min_free_space == 0 {
            target = policy.reserved_space;
        }
        target.max(policy.reserved_space)
    }

    /// Frees at least `wanted` bytes now if it can: a writer has no room. Everything unused may go.
    pub(crate) fn relieve(self: &Arc<Self>, wanted: u64) -> Result<u64> {
        let mut freed = self.trash_now()?;
        if freed >= wanted {
            return Ok(freed);
        }
        let mut refused = std::collections::HashSet::new();
        loop {
            let _one = self.collecting.lock();
            let mut victims: Vec<_> = self
                .lines(None)
                .into_iter()
                .filter(|l| !l.record.in_use && !l.ephemeral && !refused.contains(&l.record.id))
                .collect();
            if victims.is_empty() || freed >= wanted {
                break;
            }
            rank(&mut victims);
            for victim in victims {
                if freed >= wanted {
                    break;
                }
                if self.remove_line(&victim)? {
                    freed += victim.record.size;
                } else {
                    refused.insert(victim.record.id);
                }
            }
        }
        self.sweep(BLOB_GRACE)?;
        self.trash_now()?;
        Ok(freed)
    }

    /// Seals and unlinks at once instead of in the background.
    fn trash_now(&self) -> Result<u64> {
        if self.trash.is_empty() {
            return Ok(0);
        }
        self.epochs.seal()?;
        self.trash.empty(self, &Stop::new())
    }

    fn remove_line(self: &Arc<Self>, line: &Line) -> Result<bool> {
        match &line.kind {
            Kind::CacheMount(id) => self.remove_cache_mount(id),
            Kind::Context(id) => self.remove_context(id),
            Kind::Layer(id) => self.remove_layer(id),
        }
    }

    /// Removes a layer record that has neither handle nor child, with what only it needs.
    pub(crate) fn remove_layer(self: &Arc<Self>, id: &LayerId) -> Result<bool> {
        {
            let mut table = self.layers.lock();
            let Some(entry) = table.layers.get_mut(id) else {
                return Ok(false);
            };
            if entry.node.strong_count() > 0 || entry.children > 0 || entry.dying {
                return Ok(false);
            }
            // From here on nobody finds it any more.
            entry.dying = true;
        }
        if let Err(error) = self.drop_records_of(id) {
            tracing::warn!(%error, "cache records of a removed layer stay until they are looked up");
        }
        let removed = self.layers.lock().remove(id);
        let Some((record, tree)) = removed else {
            return Ok(false);
        };
        let mut batch = Batch::new();
        batch.remove(Table::Layers, id.as_str());
        batch.remove(Table::Usage, id.as_str());
        if let Some(tree) = &tree {
            batch.remove(Table::Trees, tree.id.as_str());
        }
        self.commit_or_warn(&batch, "removal of a layer");
        if let Some(tree) = tree {
            self.trash
                .discard(self, &self.dir.tree(&tree.id), Area::Trees, tree.disk)?;
        }
        self.release_blobs(&record)?;
        Ok(true)
    }

    fn release_blobs(&self, record: &LayerRecord) -> Result<()> {
        for blob in &record.blobs {
            self.remove_blob_if_free(&blob.digest, Duration::ZERO)?;
        }
        Ok(())
    }

    fn remove_blob_if_free(&self, digest: &Digest, grace: Duration) -> Result<u64> {
        // A layer that starts to name the blob after this is as good as one that named it after the removal: lazy.
        if self.layers.lock().blob_users.contains_key(digest) {
            return Ok(0);
        }
        {
            let mut blobs = self.blobs.blobs.write();
            let Some(entry) = blobs.get_mut(digest) else {
                return Ok(0);
            };
            if entry.leases > 0 || entry.dying || entry.last_used.age(Time::now()) < grace {
                return Ok(0);
            }
            entry.dying = true;
        }
        self.forget_blob(digest)
    }

    /// Removes blobs and drafts that nothing names.
    fn sweep(&self, grace: Duration) -> Result<u64> {
        let loose: Vec<Digest> = {
            let blobs = self.blobs.blobs.read();
            blobs
                .iter()
                .filter(|(_, e)| e.leases == 0 && !e.dying)
                .map(|(d, _)| *d)
                .collect()
        };
        let mut freed = 0;
        for digest in loose {
            freed += self.remove_blob_if_free(&digest, grace)?;
        }
        self.sweep_ingest(INGEST_GRACE)?;
        Ok(freed)
    }
}

type What = (String, Tenant, String, RecordType);

fn mutable(what: What, times: (Time, Time, u64), size: u64, in_use: bool, kind: Kind) -> Line {
    let (id, tenant, description, record_type) = what;
    let (created_at, last_used, usage_count) = times;
    Line {
        record: UsageRecord {
            id,
            tenant,
            mutable: true,
            in_use,
            size: if in_use { 0 } else { size },
            parents: Vec::new(),
            created_at,
            last_used: Some(last_used),
            usage_count,
            description,
            record_type,
            shared: false,
        },
        kind,
        held: in_use,
        children: 0,
        ephemeral: false,
    }
}

/// Least valuable first: the sum of the ranks by last use and by number of uses (semantics.md §8).
fn rank(victims: &mut Vec<Line>) {
    let mut score = vec![0usize; victims.len()];
    let mut order: Vec<usize> = (0..victims.len()).collect();
    let line = |i: usize| victims.get(i).map(|l| &l.record);
    order.sort_by_key(|i| line(*i).map(|r| r.last_used.unwrap_or(r.created_at)));
    for (place, i) in order.iter().enumerate() {
        if let Some(s) = score.get_mut(*i) {
            *s += place;
        }
    }
    order.sort_by_key(|i| line(*i).map(|r| r.usage_count));
    for (place, i) in order.iter().enumerate() {
        if let Some(s) = score.get_mut(*i) {
            *s += place;
        }
    }
    let mut scored: Vec<_> = score.into_iter().zip(victims.drain(..)).collect();
    scored.sort_by_key(|(score, _)| *score);
    victims.extend(scored.into_iter().map(|(_, line)| line));
}
