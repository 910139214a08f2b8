//! Layers and trees in memory and in the index: entering, finding, updating and taking out records.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use kiln_oci::{ChainId, Descriptor, DiffId, Digest};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use crate::error::{IoContext as _, Result};
use crate::ids::{LayerId, RecordType, Tenant, Time, TreeId};
use crate::layer_ref::{LayerFacts, LayerNode, LayerRef};
use crate::ledger::Area;
use crate::store::Store;
use crate::tree::Tree;

/// A layer as the index and the record beside its tree keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) id: LayerId,
    pub(crate) tenant: Tenant,
    /// The layer below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<LayerId>,
    /// The layer this one repeats over another parent: its tree and blobs are that one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) origin: Option<LayerId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tree: Option<TreeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) diff_id: Option<DiffId>,
    /// Chain id up to and including this layer, where every diff id is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) chain: Option<ChainId>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) blobs: Vec<Descriptor>,
    pub(crate) record_type: RecordType,
    pub(crate) description: String,
    pub(crate) created_at: Time,
}

/// One layer record in memory.
#[derive(Debug)]
pub(crate) struct LayerEntry {
    pub(crate) record: LayerRecord,
    pub(crate) node: Weak<LayerNode>,
    pub(crate) usage: LayerUsage,
    /// Records that name this one as parent or origin.
    pub(crate) children: usize,
    /// Garbage collection is removing it.
    pub(crate) dying: bool,
    /// It, or something below, is a directory that its owner goes on changing later: it ends with its last handle and
    /// is in no index.
    pub(crate) ephemeral: bool,
}

/// Last use and number of uses of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerUsage {
    pub(crate) last_used: Time,
    pub(crate) count: u64,
}

/// A tree's record, beside the tree. It describes it fully: with it the index is rebuilt.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TreeRecord {
    pub(crate) id: TreeId,
    pub(crate) epoch: u64,
    /// Disk space in bytes: files, directories, manifest.
    pub(crate) disk: u64,
    /// The layer it was made for.
    pub(crate) layer: LayerRecord,
    /// Layers below that have no tree record of their own and could not be found again without this.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) below: Vec<LayerRecord>,
}

#[derive(Debug)]
pub(crate) struct TreeEntry {
    pub(crate) record: TreeRecord,
    /// Layer records that name it.
    pub(crate) layers: usize,
}

/// Layers and trees in memory. The lock around it is never held over I/O.
#[derive(Debug, Default)]
pub(crate) struct LayerTable {
    pub(crate) layers: HashMap<LayerId, LayerEntry>,
    pub(crate) trees: HashMap<TreeId, TreeEntry>,
    pub(crate) chains: HashMap<(Tenant, ChainId), TreeId>,
    pub(crate) lazies: HashMap<(Tenant, ChainId, Digest), LayerId>,
    /// Layers that repeat another one over a parent, by both.
    pub(crate) repeated: HashMap<(Option<LayerId>, LayerId), LayerId>,
    /// How many layer records name a blob.
    pub(crate) blob_users: HashMap<Digest, usize>,
    /// Layers whose usage is newer in memory than in the index.
    pub(crate) used: std::collections::HashSet<LayerId>,
}

impl LayerTable {
    /// Enters a record. The tree it names must have been entered before.
    pub(crate) fn insert(&mut self, record: LayerRecord, usage: LayerUsage) {
        for below in [&record.parent, &record.origin].into_iter().flatten() {
            if let Some(entry) = self.layers.get_mut(below) {
                entry.children += 1;
            }
        }
        if let Some(tree) = record.tree.as_ref() {
            if let Some(entry) = self.trees.get_mut(tree) {
                entry.layers += 1;
            }
            if let Some(chain) = record.chain {
                self.chains
                    .entry((record.tenant.clone(), chain))
                    .or_insert_with(|| tree.clone());
            }
        }
        self.count_blobs(&record.blobs, true);
        if let Some(origin) = &record.origin {
            self.repeated
                .insert((record.parent.clone(), origin.clone()), record.id.clone());
        }
        if let (Some(chain), None) = (record.chain, &record.origin) {
            for blob in &record.blobs {
                self.lazies
                    .entry((record.tenant.clone(), chain, blob.digest))
                    .or_insert_with(|| record.id.clone());
            }
        }
        let entry = LayerEntry {
            node: Weak::new(),
            usage,
            children: 0,
            dying: false,
            ephemeral: false,
            record,
        };
        self.layers.insert(entry.record.id.clone(), entry);
    }

    /// Lets a layer use a tree. `false` if either is gone.
    pub(crate) fn set_tree(&mut self, layer: &LayerId, tree: &TreeId) -> bool {
        let (Some(layer), Some(entry)) = (self.layers.get_mut(layer), self.trees.get_mut(tree)) else {
            return false;
        };
        if layer.record.tree.is_none() {
            layer.record.tree = Some(tree.clone());
            entry.layers += 1;
        }
        true
    }

    fn count_blobs(&mut self, blobs: &[Descriptor], more: bool) {
        for blob in blobs {
            let users = self.blob_users.entry(blob.digest).or_default();
            *users = if more { *users + 1 } else { users.saturating_sub(1) };
            if *users == 0 {
                self.blob_users.remove(&blob.digest);
            }
        }
    }

    /// Whether something that a record stands on is ephemeral.
    pub(crate) fn is_ephemeral(&self, record: &LayerRecord) -> bool {
        let mut below = [&record.parent, &record.origin].into_iter().flatten();
        below.any(|id| self.layers.get(id).is_some_and(|e| e.ephemeral))
    }

    /// Takes a record out again; the caller has made sure that nothing needs it. Returns it, and its tree's record if
    /// no other layer names that tree.
    pub(crate) fn remove(&mut self, id: &LayerId) -> Option<(LayerRecord, Option<TreeRecord>)> {
        let record = self.layers.remove(id)?.record;
        self.used.remove(id);
        self.count_blobs(&record.blobs, false);
        for below in [&record.parent, &record.origin].into_iter().flatten() {
            if let Some(entry) = self.layers.get_mut(below) {
                entry.children = entry.children.saturating_sub(1);
            }
        }
        if let Some(origin) = &record.origin {
            let key = (record.parent.clone(), origin.clone());
            if self.repeated.get(&key) == Some(id) {
                self.repeated.remove(&key);
            }
        }
        if let Some(chain) = record.chain {
            for blob in &record.blobs {
                let key = (record.tenant.clone(), chain, blob.digest);
                if self.lazies.get(&key) == Some(id) {
                    self.lazies.remove(&key);
                }
            }
        }
        let mut gone = None;
        if let Some(tree) = &record.tree
            && let Some(entry) = self.trees.get_mut(tree)
        {
            entry.layers = entry.layers.saturating_sub(1);
            if entry.layers == 0 {
                gone = self.trees.remove(tree).map(|e| e.record);
                let learned = gone.as_ref().and_then(|g| g.layer.chain);
                for chain in [record.chain, learned].into_iter().flatten() {
                    let key = (record.tenant.clone(), chain);
                    if self.chains.get(&key) == Some(tree) {
                        self.chains.remove(&key);
                    }
                }
            }
        }
        Some((record, gone))
    }
}

impl Store {
    /// A handle on a layer by id, if it is still here. The handle is a lease from this moment on. Does not block.
    pub fn layer(self: &Arc<Self>, tenant: &Tenant, id: &LayerId) -> Option<LayerRef> {
        let mut held = Vec::new();
        let node = {
            let mut table = self.layers.lock();
            let own = table.layers.get(id).is_some_and(|e| e.record.tenant == *tenant);
            if own {
                self.load(&mut table, id, &mut held)
            } else {
                None
            }
        };
        // `held` is dropped without the lock: a node's drop takes it.
        drop(held);
        node.map(LayerRef::new)
    }

    /// Builds the nodes of a layer and everything it needs; all of them go to `held` until the lock is free again.
    pub(crate) fn load(
        self: &Arc<Self>,
        table: &mut LayerTable,
        id: &LayerId,
        held: &mut Vec<Arc<LayerNode>>,
    ) -> Option<Arc<LayerNode>> {
        self.load_fresh(table, id, held, &[])
    }

    /// As `load`, where `fresh` names ephemeral layers that get their one node now.
    fn load_fresh(
        self: &Arc<Self>,
        table: &mut LayerTable,
        id: &LayerId,
        held: &mut Vec<Arc<LayerNode>>,
        fresh: &[LayerId],
    ) -> Option<Arc<LayerNode>> {
        let mut ready: HashMap<LayerId, Arc<LayerNode>> = HashMap::new();
        let mut wanted = vec![id.clone()];
        while let Some(id) = wanted.last().cloned() {
            if ready.contains_key(&id) {
                wanted.pop();
                continue;
            }
            let entry = table.layers.get(&id).filter(|e| !e.dying)?;
            if let Some(node) = entry.node.upgrade() {
                held.push(node.clone());
                ready.insert(id, node);
                wanted.pop();
                continue;
            }
            if entry.ephemeral && !fresh.contains(&id) {
                return None;
            }
            let below: Vec<_> = [&entry.record.parent, &entry.record.origin]
                .into_iter()
                .flatten()
                .cloned()
                .collect();
            let missing: Vec<_> = below.into_iter().filter(|b| !ready.contains_key(b)).collect();
            if !missing.is_empty() {
                // A cycle cannot come from this code, but a damaged index must not hang the daemon.
                if wanted.len() > table.layers.len() + 1 {
                    return None;
                }
                wanted.extend(missing);
                continue;
            }
            let node = self.node_of(&entry.record, &ready);
            if let Some(entry) = table.layers.get_mut(&id) {
                entry.node = Arc::downgrade(&node);
            }
            held.push(node.clone());
            ready.insert(id, node);
            wanted.pop();
        }
        ready.remove(id)
    }

    fn node_of(self: &Arc<Self>, record: &LayerRecord, ready: &HashMap<LayerId, Arc<LayerNode>>) -> Arc<LayerNode> {
        let find = |id: &Option<LayerId>| id.as_ref().and_then(|id| ready.get(id).cloned());
        Arc::new(LayerNode {
            store: self.clone(),
            id: record.id.clone(),
            tenant: record.tenant.clone(),
            parent: find(&record.parent),
            origin: find(&record.origin),
            record_type: record.record_type,
            description: record.description.clone(),
            created_at: record.created_at,
            facts: RwLock::new(LayerFacts {
                tree: record
                    .tree
                    .as_ref()
                    .map(|id| (id.clone(), Tree::open(self.dir.tree(id)))),
                diff_id: record.diff_id,
                chain: record.chain,
                blobs: record.blobs.clone(),
            }),
            _keep: Mutex::new(None),
        })
    }

    /// The last handle of a layer went away.
    pub(crate) fn note_release(&self, id: &LayerId) {
        let gone = {
            let mut table = self.layers.lock();
            let table = &mut *table;
            let Some(entry) = table.layers.get_mut(id) else { return };
            if entry.ephemeral {
                table.remove(id).and_then(|(_, tree)| tree)
            } else {
                entry.usage.last_used = Time::now();
                entry.usage.count += 1;
                table.used.insert(id.clone());
                None
            }
        };
        if let Some(tree) = gone
            && let Err(error) = self
                .trash
                .discard(self, &self.dir.tree(&tree.id), Area::Trees, tree.disk)
        {
            tracing::warn!(%error, "a tree that nobody needs any more stays until the next start");
        }
    }

    pub(crate) fn has_tree_of_chain(&self, tenant: &Tenant, chain: ChainId) -> bool {
        self.layers.lock().chains.contains_key(&(tenant.clone(), chain))
    }

    /// Enters a new record in the tables and the index and returns its handle.
    pub(crate) fn enter_layer(self: &Arc<Self>, record: LayerRecord, ephemeral: bool) -> Result<LayerRef> {
        let mut batch = crate::meta::Batch::new();
        let mut held = Vec::new();
        let (node, ephemeral) = {
            let mut table = self.layers.lock();
            let ephemeral = ephemeral || table.is_ephemeral(&record);
            table.insert(
                record.clone(),
                LayerUsage {
                    last_used: Time::now(),
                    count: 0,
                },
            );
            if let Some(entry) = table.layers.get_mut(&record.id) {
                entry.ephemeral = ephemeral;
            }
            (
                self.load_fresh(&mut table, &record.id, &mut held, std::slice::from_ref(&record.id)),
                ephemeral,
            )
        };
        drop(held);
        if !ephemeral {
            batch.put(crate::meta::Table::Layers, record.id.as_str(), &record)?;
            self.commit_or_warn(&batch, "layer");
        }
        node.map(LayerRef::new).ok_or_else(|| crate::StoreError::NotFound {
            what: "layer",
            id: record.id.to_string(),
        })
    }

    /// Writes what became known about a layer: the index, and the record beside its tree if that tree was made for it.
    pub(crate) fn update_layer(self: &Arc<Self>, node: &Arc<LayerNode>) -> Result<()> {
        let (record, beside, ephemeral) = {
            let facts = node.facts.read();
            let mut table = self.layers.lock();
            let table = &mut *table;
            let Some(entry) = table.layers.get_mut(&node.id) else {
                return Ok(());
            };
            let record = &mut entry.record;
            let (had, named) = (record.tree.clone(), record.blobs.clone());
            record.tree = facts.tree.as_ref().map(|(id, _)| id.clone());
            record.diff_id = facts.diff_id;
            record.chain = facts.chain;
            record.blobs = facts.blobs.clone();
            let record = record.clone();
            table.count_blobs(&record.blobs, true);
            table.count_blobs(&named, false);
            if let Some(tree) = &record.tree {
                if had.is_none()
                    && let Some(entry) = table.trees.get_mut(tree)
                {
                    entry.layers += 1;
                }
                if let Some(chain) = record.chain {
                    table
                        .chains
                        .entry((record.tenant.clone(), chain))
                        .or_insert_with(|| tree.clone());
                }
            }
            let beside = record
                .tree
                .as_ref()
                .and_then(|tree| table.trees.get_mut(tree))
                .and_then(|entry| {
                    (entry.record.layer.id == record.id).then(|| {
                        entry.record.layer = record.clone();
                        entry.record.clone()
                    })
                });
            let ephemeral = table.layers.get(&node.id).is_some_and(|e| e.ephemeral);
            (record, beside, ephemeral)
        };
        if ephemeral {
            return Ok(());
        }
        if let Some(beside) = beside {
            let path = self.dir.tree(&beside.id).join("record");
            crate::record_file::write(&path, &beside)?;
        }
        let mut batch = crate::meta::Batch::new();
        batch.put(crate::meta::Table::Layers, record.id.as_str(), &record)?;
        self.commit_or_warn(&batch, "layer");
        Ok(())
    }
}

impl Store {
    /// A layer's tree turned out to be damaged. Layers that use it and have a blob become lazy again; the others are lost,
    /// and the cache records that name them with them. The files stay where they are until the next start: somebody may
    /// still read them through a view that he has.
    pub(crate) fn lose_tree(self: &Arc<Self>, node: &Arc<LayerNode>) -> Result<()> {
        let Some((id, _)) = node.owner().facts.read().tree.clone() else {
            return Ok(());
        };
        tracing::warn!(tree = %id, "a tree is damaged and not used any more");
        let mut batch = crate::meta::Batch::new();
        let mut held = Vec::new();
        let mut lost = Vec::new();
        {
            let mut table = self.layers.lock();
            table.trees.remove(&id);
            table.chains.retain(|_, tree| *tree != id);
            for entry in table
                .layers
                .values_mut()
                .filter(|e| e.record.tree.as_ref() == Some(&id))
            {
                entry.record.tree = None;
                if entry.record.blobs.is_empty() {
                    entry.dying = true;
                    lost.push(entry.record.id.clone());
                    batch.remove(crate::meta::Table::Layers, entry.record.id.as_str());
                } else if !entry.ephemeral {
                    batch.put(crate::meta::Table::Layers, entry.record.id.as_str(), &entry.record)?;
                }
                held.extend(entry.node.upgrade());
            }
        }
        for node in held {
            node.facts.write().tree = None;
        }
        batch.remove(crate::meta::Table::Trees, id.as_str());
        self.commit_or_warn(&batch, "loss of a tree");
        for layer in lost {
            self.drop_records_of(&layer)?;
        }
        let record = self.dir.tree(&id).join("record");
        match std::fs::remove_file(&record) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).during("remove", &record),
            _ => Ok(()),
        }
    }

    /// Enters a node that exists in memory only; the record goes with its last handle.
    pub(crate) fn enter_ephemeral(self: &Arc<Self>, node: LayerNode) -> LayerRef {
        let record = LayerRecord {
            id: node.id.clone(),
            tenant: node.tenant.clone(),
            parent: None,
            origin: None,
            tree: None,
            diff_id: None,
            chain: None,
            blobs: Vec::new(),
            record_type: node.record_type,
            description: node.description.clone(),
            created_at: node.created_at,
        };
        let node = Arc::new(node);
        let mut table = self.layers.lock();
        table.insert(
            record,
            LayerUsage {
                last_used: Time::now(),
                count: 0,
            },
        );
        if let Some(entry) = table.layers.get_mut(&node.id) {
            entry.ephemeral = true;
            entry.node = Arc::downgrade(&node);
        }
        drop(table);
        LayerRef::new(node)
    }
}
