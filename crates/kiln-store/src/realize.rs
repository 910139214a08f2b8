//! From a layer to bytes: fetching missing blobs, unpacking them, merging and comparing layers.
//!
//! Equal work is done once: a fetch, an unpacking or a packing that is under way is joined by whoever needs it too, and
//! ends when the last of them goes away. Downloads run in parallel; a layer is unpacked when those below it are.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Weak};

use futures::future::{BoxFuture, FutureExt as _, Shared, WeakShared};
use futures::stream::{FuturesUnordered, StreamExt as _};
use kiln_fs::Stop;
use kiln_oci::{ChainId, Descriptor, DiffId, Digest};
use parking_lot::Mutex;

use crate::active::ActiveSnapshot;
use crate::compress::Compression;
use crate::content::{BlobHandle, ContentWriter};
use crate::error::{Result, StoreError};
use crate::ids::{LayerId, Tenant, Time};
use crate::layer::{ApplyOptions, apply};
use crate::layer_ref::{LayerMeta, LayerNode, LayerRecord, LayerRef, LazyLayer};
use crate::provider::{BlobProvider, Providers};
use crate::store::Store;
use crate::tree::Tree;
use crate::view::View;

/// How often a broken download is resumed before it fails.
const ATTEMPTS: usize = 6;

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

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Fetch(Tenant, Digest),
    Apply(LayerId),
    Pack(LayerId, Compression),
}

#[derive(Clone, Debug)]
enum Value {
    Blob(BlobHandle),
    Tree(Tree),
    Packed(Box<Descriptor>),
}

type Outcome = std::result::Result<Value, Arc<StoreError>>;
type Work = BoxFuture<'static, Outcome>;

/// Observers of one piece of work.
#[derive(Clone, Default)]
struct Watchers(Arc<Mutex<Vec<Weak<dyn RealizeObserver>>>>);

impl Watchers {
    fn add(&self, observer: Option<&Arc<dyn RealizeObserver>>) {
        if let Some(observer) = observer {
            self.0.lock().push(Arc::downgrade(observer));
        }
    }

    fn tell(&self, event: &RealizeEvent) {
        let watchers: Vec<_> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        for watcher in watchers {
            watcher.event(event.clone());
        }
    }
}

/// Work under way, by what it yields. The table holds it weakly: without waiters it ends.
#[derive(Default)]
pub(crate) struct InFlight(Mutex<HashMap<Key, (WeakShared<Work>, Watchers)>>);

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InFlight").field(&self.0.lock().len()).finish()
    }
}

impl InFlight {
    /// Joins work under way or starts it; tells whether it was started.
    fn join(
        &self,
        key: &Key,
        observer: Option<&Arc<dyn RealizeObserver>>,
        start: impl FnOnce(Watchers) -> Work,
    ) -> (Shared<Work>, bool) {
        let mut table = self.0.lock();
        if let Some((work, watchers)) = table.get(key)
            && let Some(work) = work.upgrade()
        {
            watchers.add(observer);
            return (work, false);
        }
        table.retain(|_, (work, _)| work.upgrade().is_some());
        let watchers = Watchers::default();
        watchers.add(observer);
        let work = start(watchers.clone()).shared();
        if let Some(weak) = work.downgrade() {
            table.insert(key.clone(), (weak, watchers));
        }
        (work, true)
    }

    fn done(&self, key: &Key) {
        self.0.lock().remove(key);
    }
}

fn shared(error: Arc<StoreError>) -> StoreError {
    Arc::try_unwrap(error).unwrap_or_else(StoreError::Shared)
}

/// Runs blocking work that stops when the future is dropped.
pub(crate) async fn blocking<T: Send + 'static>(
    task: &'static str,
    work: impl FnOnce(&Stop) -> Result<T> + Send + 'static,
) -> Result<T> {
    let stop = Stop::new();
    let guard = stop.guard();
    let outcome = tokio::task::spawn_blocking(move || work(&stop)).await;
    guard.disarm();
    outcome.map_err(|_| StoreError::Panicked { task })?
}

impl Store {
    /// A layer of which only the blob is known, over `parent`. An equal one (same blob over the same chain) is found
    /// again; one whose chain was unpacked before, from whatever blob, has its tree at once. Does not fetch anything.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the diff ids below are not all known.
    pub fn lazy_layer(
        self: &Arc<Self>,
        tenant: &Tenant,
        parent: Option<&LayerRef>,
        lazy: &LazyLayer,
        provider: Option<Arc<dyn BlobProvider>>,
    ) -> Result<LayerRef> {
        let chain = match parent {
            None => ChainId(lazy.diff_id.digest()),
            Some(parent) => {
                let below = parent.chain_id().ok_or_else(|| {
                    StoreError::Invalid(format!(
                        "layer {} lies over one whose diff id is not known",
                        lazy.blob.digest
                    ))
                })?;
                below.extend(lazy.diff_id)
            }
        };
        let providers = provider
            .map(|p| Providers::of([lazy.blob.digest], p))
            .unwrap_or_default();
        let providers = parent.map_or_else(|| providers.clone(), |p| p.providers().merged(&providers));
        let known = {
            let table = self.layers.lock();
            table.lazies.get(&(tenant.clone(), chain, lazy.blob.digest)).cloned()
        };
        if let Some(layer) = known.and_then(|id| self.layer(tenant, &id)) {
            return Ok(layer.with_providers(&providers));
        }
        let record = LayerRecord {
            id: LayerId::random(),
            tenant: tenant.clone(),
            parent: parent.map(|p| p.id().clone()),
            origin: None,
            tree: None,
            diff_id: Some(lazy.diff_id),
            chain: Some(chain),
            blobs: vec![lazy.blob.clone()],
            record_type: lazy.record_type,
            description: lazy.description.clone(),
            created_at: lazy.created_at.unwrap_or_else(Time::now),
        };
        let layer = self.enter_layer(record, false)?.with_providers(&providers);
        Ok(layer)
    }

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
        self.view_of(&layer.node).await
    }

    /// The merged view of a layer that has all its trees. Reads manifests.
    async fn view_of(self: &Arc<Self>, node: &Arc<LayerNode>) -> Result<View> {
        let node = node.clone();
        blocking("reading manifests", move |_| {
            let mut trees: Vec<Tree> = Vec::new();
            for node in node.chain() {
                let missing = || StoreError::NotFound {
                    what: "tree of layer",
                    id: node.id.to_string(),
                };
                let tree = node.tree().ok_or_else(missing)?;
                // The same tree twice: only its upper place counts, and overlayfs refuses to have it twice.
                trees.retain(|t| t.dir() != tree.dir());
                trees.push(tree);
            }
            View::keeping(trees, Some(Arc::new(LayerRef::new(node))))
        })
        .await
    }

    async fn realize_nodes(
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
        let found = {
            let table = self.layers.lock();
            table.chains.get(&(node.tenant.clone(), chain)).cloned()
        };
        let Some(id) = found else { return Ok(false) };
        {
            let mut facts = node.facts.write();
            if facts.tree.is_none() {
                facts.tree = Some((id.clone(), Tree::open(self.dir.tree(&id))));
            }
        }
        self.update_layer(node)?;
        // Collection may have taken the tree between the two: then the record names one that is gone.
        let there = self.layers.lock().trees.contains_key(&id);
        if !there {
            node.facts.write().tree = None;
            self.update_layer(node)?;
        }
        Ok(there)
    }

    async fn fetch_layer(
        self: &Arc<Self>,
        node: &Arc<LayerNode>,
        providers: &Providers,
        ctx: &RealizeCtx,
    ) -> Result<BlobHandle> {
        let blobs = node.facts.read().blobs.clone();
        let content = self.content(&node.tenant);
        if let Some(handle) = blobs.iter().find_map(|b| content.lease(&b.digest)) {
            return Ok(handle);
        }
        let Some(blob) = blobs
            .iter()
            .find(|b| providers.get(&b.digest).is_some())
            .or(blobs.first())
        else {
            return Err(StoreError::NotFound {
                what: "tree of layer",
                id: node.id.to_string(),
            });
        };
        self.fetch_for(&node.tenant, blob, providers, ctx, node.id.as_str())
            .await
    }

    /// Fetches a blob unless it is here. Cancel by dropping the future; what arrived is kept for resuming.
    ///
    /// # Errors
    /// [`StoreError::BlobUnavailable`] without a provider, what the provider answered, a digest that does not fit.
    pub async fn fetch_blob(
        self: &Arc<Self>,
        tenant: &Tenant,
        blob: &Descriptor,
        ctx: &RealizeCtx,
    ) -> Result<BlobHandle> {
        self.fetch_for(tenant, blob, &ctx.providers, ctx, "-").await
    }

    async fn fetch_for(
        self: &Arc<Self>,
        tenant: &Tenant,
        blob: &Descriptor,
        providers: &Providers,
        ctx: &RealizeCtx,
        layer: &str,
    ) -> Result<BlobHandle> {
        loop {
            if let Some(handle) = self.content(tenant).lease(&blob.digest) {
                return Ok(handle);
            }
            let key = Key::Fetch(tenant.clone(), blob.digest);
            let provider = providers.get(&blob.digest);
            let unavailable = || StoreError::BlobUnavailable {
                blob: blob.digest,
                layer: layer.to_owned(),
            };
            let (work, started) = self.in_flight.join(&key, ctx.observer.as_ref(), |watchers| {
                let (store, tenant, blob, key) = (self.clone(), tenant.clone(), blob.clone(), key.clone());
                let missing = unavailable();
                async move {
                    let outcome = match provider {
                        Some(provider) => store.download(&tenant, &blob, &*provider, &watchers).await,
                        None => Err(missing),
                    };
                    store.in_flight.done(&key);
                    outcome.map(Value::Blob).map_err(Arc::new)
                }
                .boxed()
            });
            match work.await {
                Ok(Value::Blob(handle)) => return Ok(handle),
                Ok(_) => return Err(unavailable()),
                // Somebody else's provider failed: this build has its own.
                Err(_) if !started && providers.get(&blob.digest).is_some() => {}
                Err(error) => return Err(shared(error)),
            }
        }
    }

    async fn download(
        self: &Arc<Self>,
        tenant: &Tenant,
        blob: &Descriptor,
        provider: &dyn BlobProvider,
        watchers: &Watchers,
    ) -> Result<BlobHandle> {
        let failed = |source| StoreError::Provider {
            blob: blob.digest,
            source,
        };
        let mut attempt = 0;
        loop {
            attempt += 1;
            let mut writer = self.draft_of(tenant, blob).await?;
            writer.set_media_type(&blob.media_type);
            if let Some(repository) = provider.repository() {
                writer.add_source(&repository);
            }
            let resumed = writer.offset();
            let progressed;
            let outcome = if resumed >= blob.size {
                progressed = true;
                Ok(writer)
            } else {
                match provider.open(blob, resumed).await {
                    Ok(stream) => {
                        let (writer, error) = pump(blob, writer, stream, watchers).await?;
                        progressed = writer.offset() > resumed;
                        match error {
                            None => Ok(writer),
                            Some(error) => Err(error),
                        }
                    }
                    Err(error) => {
                        // Retrying a refusal is the provider's business; it knows its protocol.
                        return Err(failed(error));
                    }
                }
            };
            let error = match outcome {
                Ok(writer) if writer.offset() >= blob.size => {
                    let expected = blob.clone();
                    let done = blocking("completing a blob", move |_| writer.commit(Some(&expected))).await;
                    match done {
                        Ok(handle) => {
                            watchers.tell(&RealizeEvent::Fetched { blob: blob.digest });
                            return Ok(handle);
                        }
                        // What an earlier process left may be wrong; from the start once more.
                        Err(StoreError::DigestMismatch { .. } | StoreError::SizeMismatch { .. })
                            if resumed > 0 && attempt < ATTEMPTS =>
                        {
                            continue;
                        }
                        Err(error) => return Err(error),
                    }
                }
                Ok(writer) => StoreError::SizeMismatch {
                    what: format!("blob {}", blob.digest),
                    expected: blob.size,
                    actual: writer.offset(),
                },
                Err(error) => failed(error),
            };
            if attempt >= ATTEMPTS || !progressed {
                return Err(error);
            }
            tracing::debug!(%error, blob = %blob.digest, attempt, "a download broke off and is resumed");
        }
    }

    async fn draft_of(self: &Arc<Self>, tenant: &Tenant, blob: &Descriptor) -> Result<ContentWriter> {
        let content = self.content(tenant);
        let reference = format!("blob {}", blob.digest);
        blocking("opening a draft", move |_| match content.writer(Some(&reference)) {
            // A canceled download may still be letting go of its draft.
            Err(StoreError::Busy { .. }) => content.writer(None),
            other => other,
        })
        .await
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

    /// The layers of several inputs on top of each other: what later ones have covers earlier ones, and what they delete
    /// is deleted. Nothing is fetched or copied.
    ///
    /// # Errors
    /// If a record cannot be entered.
    pub fn merge(
        self: &Arc<Self>,
        tenant: &Tenant,
        inputs: &[Option<LayerRef>],
        description: &str,
    ) -> Result<Option<LayerRef>> {
        let mut merged: Option<LayerRef> = None;
        for input in inputs.iter().flatten() {
            merged = Some(match merged {
                None => input.clone(),
                Some(below) => self.repeat(tenant, Some(below), &input.layers(), input.providers(), description)?,
            });
        }
        Ok(merged)
    }

    /// What `upper` has over `lower`, as layers over nothing. Where `upper` is built on `lower` that is a matter of
    /// records; otherwise both are realised and compared.
    ///
    /// # Errors
    /// As [`realize`](Self::realize).
    pub async fn diff(
        self: &Arc<Self>,
        tenant: &Tenant,
        lower: Option<&LayerRef>,
        upper: Option<&LayerRef>,
        description: &str,
        ctx: &RealizeCtx,
    ) -> Result<Option<LayerRef>> {
        let below = lower.map(LayerRef::layers).unwrap_or_default();
        let above = upper.map(LayerRef::layers).unwrap_or_default();
        let equal = |a: &LayerRef, b: &LayerRef| {
            a == b || a.node.owner().id == b.node.owner().id || (a.chain_id().is_some() && a.chain_id() == b.chain_id())
        };
        let built_on = below.len() <= above.len() && below.iter().zip(&above).all(|(a, b)| equal(a, b));
        if built_on {
            let Some(upper) = upper else { return Ok(None) };
            let rest = above.get(below.len()..).unwrap_or_default();
            if below.is_empty() {
                return Ok(Some(upper.clone()));
            }
            if rest.is_empty() {
                return Ok(None);
            }
            return self
                .repeat(tenant, None, rest, upper.providers(), description)
                .map(Some);
        }
        let lower_view = self.realize(lower, ctx).await?;
        let upper_view = self.realize(upper, ctx).await?;
        let (store, tenant, description) = (self.clone(), tenant.clone(), description.to_owned());
        let layer = blocking("comparing layers", move |stop| {
            let active = store.new_active(&tenant, None, &View::scratch())?;
            crate::union::stack::diff_views(&lower_view, &upper_view, active.builder()?, stop)?;
            active.commit(LayerMeta {
                description,
                ..LayerMeta::default()
            })
        })
        .await?;
        Ok(Some(layer))
    }

    /// The same layers over another parent.
    fn repeat(
        self: &Arc<Self>,
        tenant: &Tenant,
        parent: Option<LayerRef>,
        layers: &[LayerRef],
        providers: &Providers,
        description: &str,
    ) -> Result<LayerRef> {
        let providers = parent
            .as_ref()
            .map_or_else(Providers::default, |p| p.providers().clone())
            .merged(providers);
        let mut top = parent;
        for layer in layers {
            let owner = layer.node.owner();
            let known = {
                let table = self.layers.lock();
                let key = (top.as_ref().map(|t| t.id().clone()), owner.id.clone());
                table.repeated.get(&key).cloned()
            };
            if let Some(found) = known.and_then(|id| self.layer(tenant, &id)) {
                top = Some(found);
                continue;
            }
            let diff_id = layer.diff_id();
            let chain = match (diff_id, &top) {
                (Some(diff), None) => ChainId::of(&[diff]),
                (Some(diff), Some(below)) => below.chain_id().map(|c| c.extend(diff)),
                (None, _) => None,
            };
            let record = LayerRecord {
                id: LayerId::random(),
                tenant: tenant.clone(),
                parent: top.as_ref().map(|t| t.id().clone()),
                origin: Some(owner.id.clone()),
                tree: None,
                diff_id,
                chain,
                blobs: Vec::new(),
                record_type: layer.record_type(),
                description: if description.is_empty() {
                    layer.description()
                } else {
                    description
                }
                .to_owned(),
                created_at: Time::now(),
            };
            top = Some(self.enter_layer(record, false)?);
        }
        let nothing = || StoreError::Invalid("no layers to put over another parent".into());
        Ok(top.ok_or_else(nothing)?.with_providers(&providers))
    }

    /// A blob of the layer (this one alone). Any blob that is known will do unless `force` is set, even one that is not
    /// here (fetch it with [`fetch_blob`](Self::fetch_blob)); otherwise it is made, once, and kept by diff id and
    /// compression. The diff id is known afterwards.
    ///
    /// # Errors
    /// As [`realize`](Self::realize), and what packing meets.
    pub async fn blob_for(
        self: &Arc<Self>,
        layer: &LayerRef,
        compression: Compression,
        force: bool,
        ctx: &RealizeCtx,
    ) -> Result<Descriptor> {
        let owner = layer.node.owner();
        let fits = |blob: &Descriptor| {
            let known = kiln_oci::media_type::layer_compression(&blob.media_type);
            known.is_some_and(|c| c.name() == compression.algorithm.as_str())
        };
        let providers = layer.providers().merged(&ctx.providers);
        let content = self.content(&owner.tenant);
        {
            let facts = owner.facts.read();
            let usable = |b: &&Descriptor| content.has(&b.digest) || providers.get(&b.digest).is_some();
            let any = facts
                .blobs
                .iter()
                .filter(usable)
                .find(|b| fits(b) && (!force || compression.level.is_none()));
            let any = any.or_else(|| if force { None } else { facts.blobs.iter().find(usable) });
            if let Some(blob) = any {
                return Ok(blob.clone());
            }
        }
        let key = Key::Pack(owner.id.clone(), compression);
        loop {
            let (work, started) = self.in_flight.join(&key, ctx.observer.as_ref(), |_| {
                let (store, owner, key) = (self.clone(), owner.clone(), key.clone());
                let ctx = RealizeCtx {
                    providers: providers.clone(),
                    observer: ctx.observer.clone(),
                };
                async move {
                    let outcome = store.pack_now(&owner, compression, &ctx).await;
                    store.in_flight.done(&key);
                    outcome.map(|d| Value::Packed(Box::new(d))).map_err(Arc::new)
                }
                .boxed()
            });
            match work.await {
                Ok(Value::Packed(blob)) => {
                    self.learn_chain(&layer.node)?;
                    return Ok(*blob);
                }
                Ok(_) => {
                    return Err(StoreError::NotFound {
                        what: "blob of layer",
                        id: owner.id.to_string(),
                    });
                }
                Err(error) if !started && !error.is_no_space() => drop(error),
                Err(error) => return Err(shared(error)),
            }
        }
    }

    async fn pack_now(
        self: &Arc<Self>,
        owner: &Arc<LayerNode>,
        compression: Compression,
        ctx: &RealizeCtx,
    ) -> Result<Descriptor> {
        let blobs = owner.facts.read().blobs.clone();
        let content = self.content(&owner.tenant);
        let source = blobs.iter().find(|b| content.has(&b.digest));
        let source = source.or_else(|| blobs.iter().find(|b| ctx.providers.get(&b.digest).is_some()));
        let packed = if let Some(blob) = source {
            // Another packing of the same archive: it is repacked, not unpacked to files.
            let handle = self
                .fetch_for(&owner.tenant, blob, &ctx.providers, ctx, owner.id.as_str())
                .await?;
            let (content, expected) = (content.clone(), owner.facts.read().diff_id);
            blocking("repacking a layer", move |stop| {
                let reader = content.open(&handle.digest())?;
                repack(&content, reader, compression, expected, stop)
            })
            .await?
        } else {
            let providers = ctx.providers.clone();
            self.realize_nodes(owner, &providers, ctx).await?;
            let lower = match &owner.parent {
                Some(parent) => self.view_of(parent).await?,
                None => View::scratch(),
            };
            let missing = || StoreError::NotFound {
                what: "tree of layer",
                id: owner.id.to_string(),
            };
            let tree = owner.tree().ok_or_else(missing)?;
            let content = content.clone();
            blocking("packing a layer", move |stop| {
                let mut writer = content.writer(None)?;
                let options = crate::layer::DiffOptions::default();
                let packed = crate::layer::pack(&lower, &tree, compression, options, &mut writer, stop)?;
                complete(writer, compression, packed.diff_id)
            })
            .await?
        };
        let (diff_id, blob) = packed;
        let descriptor = blob.descriptor();
        {
            let mut facts = owner.facts.write();
            facts.diff_id = Some(diff_id);
            facts.blobs.push(descriptor.clone());
        }
        self.count_blobs(std::slice::from_ref(&descriptor), true);
        self.learn_chain(owner)?;
        let node = owner.clone();
        let store = self.clone();
        blocking("recording a blob", move |_| store.update_layer(&node)).await?;
        drop(blob);
        Ok(descriptor)
    }

    /// Fills in chain ids that have become computable, from the bottom up.
    fn learn_chain(self: &Arc<Self>, node: &Arc<LayerNode>) -> Result<()> {
        let mut below: Option<ChainId> = None;
        for (n, node) in node.chain().into_iter().enumerate() {
            let diff_id = node.owner().facts.read().diff_id;
            let chain = match (n, below, diff_id) {
                (0, _, Some(diff)) => ChainId::of(&[diff]),
                (_, Some(below), Some(diff)) => Some(below.extend(diff)),
                _ => return Ok(()),
            };
            let news = {
                let mut facts = node.facts.write();
                let news = facts.chain != chain || facts.diff_id != diff_id;
                facts.chain = chain;
                facts.diff_id = diff_id;
                news
            };
            if news {
                self.update_layer(&node)?;
            }
            below = chain;
        }
        Ok(())
    }
}

/// Moves a stream into a draft. The second value says why it broke off, if it did.
async fn pump(
    blob: &Descriptor,
    writer: ContentWriter,
    mut stream: crate::provider::BlobStream,
    watchers: &Watchers,
) -> Result<(ContentWriter, Option<crate::provider::ProviderError>)> {
    let (chunks, mut incoming) = tokio::sync::mpsc::channel::<bytes::Bytes>(16);
    let mut current = writer.offset();
    let (size, digest) = (blob.size, blob.digest);
    let mut writer = writer;
    let writing = tokio::task::spawn_blocking(move || {
        while let Some(chunk) = incoming.blocking_recv() {
            writer.write_bytes(&chunk)?;
        }
        Ok::<_, StoreError>(writer)
    });
    let mut broken = None;
    while let Some(chunk) = stream.next().await {
        match chunk {
            Ok(chunk) => {
                current += chunk.len() as u64;
                if current > size {
                    drop(chunks);
                    let mut writer = writing
                        .await
                        .map_err(|_| StoreError::Panicked { task: "writing a blob" })??;
                    writer.restart()?;
                    let what = format!("blob {digest}");
                    return Err(StoreError::SizeMismatch {
                        what,
                        expected: size,
                        actual: current,
                    });
                }
                if chunks.send(chunk).await.is_err() {
                    break;
                }
                watchers.tell(&RealizeEvent::Fetching {
                    blob: digest,
                    current,
                    total: size,
                });
            }
            Err(error) => {
                broken = Some(error);
                break;
            }
        }
    }
    drop(chunks);
    let writer = writing
        .await
        .map_err(|_| StoreError::Panicked { task: "writing a blob" })??;
    Ok((writer, broken))
}

fn complete(mut writer: ContentWriter, compression: Compression, diff_id: DiffId) -> Result<(DiffId, BlobHandle)> {
    let kind = match compression.algorithm {
        crate::compress::Algorithm::Uncompressed => kiln_oci::media_type::OCI_LAYER,
        crate::compress::Algorithm::Gzip => kiln_oci::media_type::OCI_LAYER_GZIP,
        crate::compress::Algorithm::Zstd => kiln_oci::media_type::OCI_LAYER_ZSTD,
    };
    writer.set_media_type(kind);
    writer.set_diff_id(diff_id);
    Ok((diff_id, writer.commit(None)?))
}

/// Packs the archive in `reader` anew.
fn repack(
    content: &crate::content::ContentStore,
    reader: crate::content::BlobReader,
    compression: Compression,
    expected: Option<DiffId>,
    stop: &Stop,
) -> Result<(DiffId, BlobHandle)> {
    use std::io::{Read as _, Write as _};
    let blob = reader.digest();
    let mut writer = content.writer(None)?;
    let failed = |source| StoreError::Io {
        action: "repack",
        path: blob.to_string().into(),
        source,
    };
    let (_, mut plain) = crate::compress::unpack(reader).map_err(failed)?;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let packer = crate::compress::Compressor::new(compression, threads, &mut writer).map_err(failed)?;
    let mut out = kiln_oci::DigestWriter::new(packer);
    let mut buf = vec![0; 1 << 20];
    loop {
        stop.check()?;
        let n = plain.read(&mut buf).map_err(failed)?;
        if n == 0 {
            break;
        }
        out.write_all(buf.get(..n).unwrap_or_default()).map_err(failed)?;
    }
    let (packer, digest, _) = out.finish();
    packer.finish().map_err(failed)?;
    let actual = DiffId(digest);
    if let Some(expected) = expected
        && expected != actual
    {
        return Err(StoreError::DiffIdMismatch { blob, expected, actual });
    }
    complete(writer, compression, actual)
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
