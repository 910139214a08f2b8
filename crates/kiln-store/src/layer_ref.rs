//! What a result is: an immutable layer over a parent, by handle.
//!
//! A handle is a lease: while it, or anything above it, lives, nothing of the layer is collected. A layer may lack its
//! tree (it is lazy: only its blob is known), its blob (it was made here and never exported) or its diff id; realising
//! it supplies the tree, [`Store::blob_for`](crate::Store::blob_for) the blob.

use std::fmt;
use std::sync::Arc;

use kiln_oci::{ChainId, Descriptor, DiffId};
use parking_lot::{Mutex, RwLock};

use crate::ids::{LayerId, RecordType, Tenant, Time, TreeId};
use crate::provider::Providers;
use crate::store::Store;
use crate::tree::Tree;

/// What may become known about a layer after it was made.
#[derive(Debug, Default)]
pub(crate) struct LayerFacts {
    pub(crate) tree: Option<(TreeId, Tree)>,
    pub(crate) diff_id: Option<DiffId>,
    pub(crate) chain: Option<ChainId>,
    pub(crate) blobs: Vec<Descriptor>,
}

/// The one object in memory for a layer record that somebody holds.
pub(crate) struct LayerNode {
    pub(crate) store: Arc<Store>,
    pub(crate) id: LayerId,
    pub(crate) tenant: Tenant,
    pub(crate) parent: Option<Arc<LayerNode>>,
    pub(crate) origin: Option<Arc<LayerNode>>,
    pub(crate) record_type: RecordType,
    pub(crate) description: String,
    pub(crate) created_at: Time,
    pub(crate) facts: RwLock<LayerFacts>,
    /// What must live as long as the layer does besides its record: a frozen context.
    pub(crate) _keep: Mutex<Option<Arc<dyn std::any::Any + Send + Sync>>>,
}

impl LayerNode {
    /// The node that owns tree and blobs: itself, or what it repeats.
    pub(crate) fn owner(self: &Arc<Self>) -> Arc<Self> {
        let mut node = self.clone();
        while let Some(origin) = node.origin.clone() {
            node = origin;
        }
        node
    }

    /// This node and everything below, bottom first.
    pub(crate) fn chain(self: &Arc<Self>) -> Vec<Arc<Self>> {
        let mut nodes = vec![self.clone()];
        let mut next = self.parent.clone();
        while let Some(node) = next {
            next = node.parent.clone();
            nodes.push(node);
        }
        nodes.reverse();
        nodes
    }

    pub(crate) fn tree(self: &Arc<Self>) -> Option<Tree> {
        self.owner().facts.read().tree.as_ref().map(|(_, tree)| tree.clone())
    }
}

impl Drop for LayerNode {
    fn drop(&mut self) {
        self.store.note_release(&self.id);
        // A long chain must not be dropped by recursion.
        let mut left = vec![self.parent.take(), self.origin.take()];
        while let Some(node) = left.pop() {
            if let Some(mut node) = node.and_then(Arc::into_inner) {
                left.push(node.parent.take());
                left.push(node.origin.take());
            }
        }
    }
}

impl fmt::Debug for LayerNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerNode")
            .field("id", &self.id)
            .field("facts", &*self.facts.read())
            .finish_non_exhaustive()
    }
}

/// An immutable layer with everything below it. Cheap to clone; a lease for as long as it lives.
///
/// "Scratch", the empty file system, has no layer: it is `None` of `Option<LayerRef>`.
#[derive(Clone)]
pub struct LayerRef {
    pub(crate) node: Arc<LayerNode>,
    pub(crate) providers: Providers,
}

impl LayerRef {
    pub(crate) fn new(node: Arc<LayerNode>) -> Self {
        Self {
            node,
            providers: Providers::default(),
        }
    }

    /// Id of the record, as `du` shows it.
    pub fn id(&self) -> &LayerId {
        &self.node.id
    }

    /// Whose it is.
    pub fn tenant(&self) -> &Tenant {
        &self.node.tenant
    }

    /// The store it lives in.
    pub fn store(&self) -> &Arc<Store> {
        &self.node.store
    }

    /// The layer below; `None` if this is the lowest.
    pub fn parent(&self) -> Option<Self> {
        Some(Self {
            node: self.node.parent.clone()?,
            providers: self.providers.clone(),
        })
    }

    /// This layer and everything below, bottom first.
    pub fn layers(&self) -> Vec<Self> {
        let nodes = self.node.chain();
        nodes
            .into_iter()
            .map(|node| Self {
                node,
                providers: self.providers.clone(),
            })
            .collect()
    }

    /// Digest of the layer's uncompressed tar, if it is known yet.
    pub fn diff_id(&self) -> Option<DiffId> {
        self.node.owner().facts.read().diff_id
    }

    /// Chain id of the layer and everything below, if all diff ids are known.
    pub fn chain_id(&self) -> Option<ChainId> {
        self.node.facts.read().chain
    }

    /// Blobs that hold this layer, here or elsewhere.
    pub fn blobs(&self) -> Vec<Descriptor> {
        self.node.owner().facts.read().blobs.clone()
    }

    /// Whether its files are on this disk. Does not look at the layers below.
    pub fn has_tree(&self) -> bool {
        self.node.tree().is_some()
    }

    /// The layer's own files, without those of the layers below, if they are on this disk.
    pub fn tree(&self) -> Option<Tree> {
        self.node.tree()
    }

    /// When it was made.
    pub fn created_at(&self) -> Time {
        self.node.created_at
    }

    /// Which step made it, for people.
    pub fn description(&self) -> &str {
        &self.node.description
    }

    /// What it is for.
    pub fn record_type(&self) -> RecordType {
        self.node.record_type
    }

    /// Providers that travel with this handle.
    pub fn providers(&self) -> &Providers {
        &self.providers
    }

    /// The same layer through a handle that can also ask these providers for missing blobs.
    pub fn with_providers(&self, providers: &Providers) -> Self {
        Self {
            node: self.node.clone(),
            providers: self.providers.merged(providers),
        }
    }

    /// Whether every blob that realising would need is here or has a provider in this handle or in `more`: a cached
    /// result for which this is false counts as missing.
    pub fn is_obtainable(&self, more: &Providers) -> bool {
        self.node.chain().iter().all(|node| {
            let owner = node.owner();
            let facts = owner.facts.read();
            let content = owner.store.content(&owner.tenant);
            facts.tree.is_some()
                || facts.blobs.iter().any(|b| {
                    content.has(&b.digest) || more.get(&b.digest).is_some() || self.providers.get(&b.digest).is_some()
                })
                || facts
                    .chain
                    .is_some_and(|chain| owner.store.has_tree_of_chain(&owner.tenant, chain))
        })
    }
}

impl PartialEq for LayerRef {
    fn eq(&self, other: &Self) -> bool {
        self.node.id == other.node.id
    }
}

impl Eq for LayerRef {}

impl std::hash::Hash for LayerRef {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.node.id.hash(state);
    }
}

impl fmt::Debug for LayerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerRef({}", self.node.id)?;
        if let Some(diff_id) = self.diff_id() {
            write!(f, ", {diff_id:?}")?;
        }
        f.write_str(")")
    }
}

/// A layer of which only the blob is known.
#[derive(Clone, Debug)]
pub struct LazyLayer {
    /// The blob, as the manifest or the cache record names it.
    pub blob: Descriptor,
    /// Digest of its uncompressed tar, as the image config promises.
    pub diff_id: DiffId,
    /// For people: `pulled from …`.
    pub description: String,
    /// Usually [`RecordType::Regular`]; [`RecordType::Frontend`] for frontend images.
    pub record_type: RecordType,
    /// When the layer was made, if that is known.
    pub created_at: Option<Time>,
}

/// How a sealed layer is recorded.
#[derive(Clone, Debug, Default)]
pub struct LayerMeta {
    /// For people: which step made it.
    pub description: String,
    /// What it is for.
    pub record_type: RecordType,
    /// Digest of its uncompressed tar, if known.
    pub diff_id: Option<DiffId>,
}
