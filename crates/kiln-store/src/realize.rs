//! From a layer to files: missing blobs are fetched, layers are unpacked from the bottom up.
//!
//! Downloads run in parallel; a layer is unpacked when those below it are. Equal work is done once (see `in_flight`).

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use futures::future::FutureExt as _;
use futures::stream::{FuturesUnordered, StreamExt as _};
use kiln_oci::Digest;

use crate::active::ActiveSnapshot;
use crate::content::BlobHandle;
use crate::error::{Result, StoreError};
use crate::ids::{LayerId, Tenant};
use crate::in_flight::{Key, Value, Watchers, blocking, shared};
use crate::layer::{ApplyOptions, apply};
use crate::layer_ref::{LayerNode, LayerRef};
use crate::layer_table::LayerRecord;
use crate::provider::Providers;
use crate::store::Store;
use crate::tree::Tree;
use crate::view::View;

/// Progress of realising, told to everybody who waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RealizeEvent {
    /// Bytes of a blob that are here, of how many.
    Fetching {
        /// The blob.
        blob: Digest,
        /// Bytes here.
        current: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The blob is here and verified.
    Fetched {
        /// The blob.
        blob: Digest,
    },
    /// The blob is being unpacked.
    Extracting {
        /// The blob.
        blob: Digest,
    },
    /// The blob is unpacked.
    Extracted {
        /// The blob.
        blob: Digest,
    },
}

/// Somebody who wants to see progress. Must not block.
pub trait RealizeObserver: Send + Sync {
    /// Something happened.
    fn event(&self, event: RealizeEvent);
}

/// What a caller brings to realise a layer: providers of its build, and a pair of eyes.
#[derive(Clone, Default)]
pub struct RealizeCtx {
    /// Providers beyond those that travel with the handle.
    pub providers: Providers,
    /// Who is told about progress.
    pub observer: Option<Arc<dyn RealizeObserver>>,
}

impl fmt::Debug for RealizeCtx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RealizeCtx")
            .field("providers", &self.providers)
            .finish_non_exhaustive()
    }
}
impl Store {
    /// The files of a layer and everything below it, fetched and unpacked where that has not been done. `None` is the
    /// empty file system. Cancel by dropping the future. The view is a lease.
    ///
    /// # Errors
    /// [`StoreError::BlobUnavailable`] if a blob is missing and nobody can provide it, what a provider answered, a digest
    /// that does not fit.
    pub async fn realize(self: &Arc<Self>, layer: Option<&LayerRef>, ctx: &RealizeCtx) -> Result<View> {
        let Some(layer) = layer else { return Ok(View::scratch()) };
        let providers = layer.providers().merged(&ctx.providers);
        self.realize_nodes(&layer.node, &providers, ctx).await?;
        match self.view_of(&layer.node).await {
            // Its tree has been forgotten by now; a layer with a blob is unpacked once more.
            Err(error) if error.is_lost_tree() && layer.is_obtainable(&providers) => {
                self.realize_nodes(&layer.node, &providers, ctx).await?;
                self.view_of(&layer.node).await
            }
            outcome => outcome,
        }
    }

    /// The merged view of a layer that has all its trees. Reads manifests.
    pub(crate) async fn view_of(self: &Arc<Self>, node: &Arc<LayerNode>) -> Result<View> {
        let (store, node) = (self.clone(), node.clone());
        blocking("reading manifests", move |_| {
            let mut trees: Vec<Tree> = Vec::new();
            for node in node.chain() {
                let missing = || StoreError::NotFound {
                    what: "tree of layer",
                    id: node.id.to_string(),
                };
                let tree = node.tree().ok_or_else(missing)?;
                if let Err(error) = tree.manifest() {
                    if error.is_lost_tree() {
                        store.lose_tree(&node)?;
                    }
                    return Err(error);
                }
                // The same tree twice: only its upper place counts, and overlayfs refuses to have it twice.
                trees.retain(|t| t.dir() != tree.dir());
                trees.push(tree);
            }
            View::keeping(trees, Some(Arc::new(LayerRef::new(node))))
        })
        .await
    }

    pub(crate) async fn realize_nodes(
        self: &Arc<Self>,
        top: &Arc<LayerNode>,
        providers: &Providers,
        ctx: &RealizeCtx,
    ) -> Result<()> {
        // Owners without a tree, with everything below them, bottom first.
        let mut wanted: Vec<Arc<LayerNode>> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for node in top.chain() {
            let owner = node.owner();
            if owner.tree().is_some() {
                continue;
            }
            for below in owner.chain() {
                let below = below.owner();
                if below.tree().is_none() && seen.insert(below.id.clone()) {
                    wanted.push(below);
                }
            }
        }
        // Those whose chain was unpacked for another layer need no blob.
        let mut missing = Vec::new();
        for node in wanted {
            if !self.adopt_equal_tree(&node)? {
                missing.push(node);
            }
        }
        let mut fetches = FuturesUnordered::new();
        for node in &missing {
            let node = node.clone();
            fetches.push(async move {
                let blob = self.fetch_layer(&node, providers, ctx).await;
                (node.id.clone(), blob)
            });
        }
        let mut here: HashMap<LayerId, BlobHandle> = HashMap::new();
        for node in &missing {
            while !here.contains_key(&node.id) {
                let Some((id, blob)) = fetches.next().await else { break };
                here.insert(id, blob?);
            }
            let Some(blob) = here.remove(&node.id) else { continue };
            let unpack = self.unpack(node, blob, ctx);
            tokio::pin!(unpack);
            // Downloads go on while a layer is unpacked.
            loop {
                tokio::select! {
                    done = &mut unpack => {
                        done?;
                        break;
                    }
                    Some((id, blob)) = fetches.next(), if !fetches.is_empty() => {
                        here.insert(id, blob?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives a layer the tree of an equal chain, if there is one.
    fn adopt_equal_tree(self: &Arc<Self>, node: &Arc<LayerNode>) -> Result<bool> {
        let Some(chain) = node.facts.read().chain else {
            return Ok(false);
        };
        let adopted = {
            let mut table = self.layers.lock();
            let key = (node.tenant.clone(), chain);
            let tree = table.chains.get(&key).cloned();
            // Counted as a user of the tree under the same lock: collection cannot take it in between.
            tree.filter(|tree| table.set_tree(&node.id, tree))
        };
        let Some(id) = adopted else { return Ok(false) };
        {
            let mut facts = node.facts.write();
            if facts.tree.is_none() {
                facts.tree = Some((id.clone(), Tree::open(self.dir.tree(&id))));
            }
        }
        self.update_layer(node)?;
        Ok(true)
    }

    /// Unpacks a layer's blob over the layers below, which have their trees.
    async fn unpack(self: &Arc<Self>, node: &Arc<LayerNode>, blob: BlobHandle, ctx: &RealizeCtx) -> Result<Tree> {
        loop {
            if let Some(tree) = node.tree() {
                return Ok(tree);
            }
            let key = Key::Apply(node.id.clone());
            let (work, started) = self.in_flight.join(&key, ctx.observer.as_ref(), |watchers| {
                let (store, node, blob, key) = (self.clone(), node.clone(), blob.clone(), key.clone());
                async move {
                    let outcome = store.unpack_now(&node, blob, &watchers).await;
                    store.in_flight.done(&key);
                    outcome.map(Value::Tree).map_err(Arc::new)
                }
                .boxed()
            });
            match work.await {
                Ok(Value::Tree(tree)) => return Ok(tree),
                Ok(_) => {
                    return Err(StoreError::NotFound {
                        what: "tree of layer",
                        id: node.id.to_string(),
                    });
                }
                Err(error) if !started && error.is_canceled() => {}
                Err(error) => return Err(shared(error)),
            }
        }
    }

    async fn unpack_now(
        self: &Arc<Self>,
        node: &Arc<LayerNode>,
        blob: BlobHandle,
        watchers: &Watchers,
    ) -> Result<Tree> {
        let lower = match &node.parent {
            Some(parent) => self.view_of(parent).await?,
            None => View::scratch(),
        };
        let digest = blob.digest();
        watchers.tell(&RealizeEvent::Extracting { blob: digest });
        let (store, node) = (self.clone(), node.clone());
        let tree = blocking("unpacking a layer", move |stop| {
            let parent = node.parent.clone().map(LayerRef::new);
            let mut active = store.new_active(&node.tenant, parent.as_ref(), &lower)?;
            let content = store.content(&node.tenant);
            let reader = content.open(&digest)?;
            let options = ApplyOptions {
                lower: Some(&lower),
                threads: 0,
                progress: None,
            };
            let applied = apply(reader, active.builder()?, &options, stop)?;
            let expected = node.facts.read().diff_id;
            if let Some(expected) = expected
                && expected != applied.diff_id
            {
                return Err(StoreError::DiffIdMismatch {
                    blob: digest,
                    expected,
                    actual: applied.diff_id,
                });
            }
            content.set_diff_id(&digest, applied.diff_id)?;
            let record = store.record_of(&node);
            let placed = active.place(record)?;
            let id = placed.tree.clone().unwrap_or_else(crate::ids::TreeId::random);
            let tree = Tree::open(store.dir.tree(&id));
            node.facts.write().tree = Some((id, tree.clone()));
            store.update_layer(&node)?;
            drop(blob);
            Ok(tree)
        })
        .await?;
        watchers.tell(&RealizeEvent::Extracted { blob: digest });
        Ok(tree)
    }

    fn record_of(&self, node: &Arc<LayerNode>) -> LayerRecord {
        let facts = node.facts.read();
        LayerRecord {
            id: node.id.clone(),
            tenant: node.tenant.clone(),
            parent: node.parent.as_ref().map(|p| p.id.clone()),
            origin: node.origin.as_ref().map(|o| o.id.clone()),
            tree: facts.tree.as_ref().map(|(id, _)| id.clone()),
            diff_id: facts.diff_id,
            chain: facts.chain,
            blobs: facts.blobs.clone(),
            record_type: node.record_type,
            description: node.description.clone(),
            created_at: node.created_at,
        }
    }
}

/// An active snapshot on top of a layer, realised first.
impl Store {
    /// Realises `parent` and starts a layer over it.
    ///
    /// # Errors
    /// As [`realize`](Self::realize).
    pub async fn active_over(
        self: &Arc<Self>,
        tenant: &Tenant,
        parent: Option<&LayerRef>,
        ctx: &RealizeCtx,
    ) -> Result<ActiveSnapshot> {
        let base = self.realize(parent, ctx).await?;
        let (store, tenant, parent) = (self.clone(), tenant.clone(), parent.cloned());
        blocking("making a snapshot", move |_| {
            store.new_active(&tenant, parent.as_ref(), &base)
        })
        .await
    }
}
