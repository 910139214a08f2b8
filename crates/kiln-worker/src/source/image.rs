//! Images from registries: `docker-image://` and, for single blobs, `docker-image+blob://` (semantics.md §4).
//!
//! A reference is resolved once in a build, however often it is named ([`ImageMemo`]). Its two keys are the digest it
//! resolved to with the platform, and the chain of its layers; for both only manifest and config are read. Layers are
//! handed out lazy and fetched through [`RegistryBlobs`] when somebody needs their files.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use kiln_llb::Vertex;
use kiln_llb::op::SourceOp;
use kiln_oci::{Descriptor, Digest, ImageRef, Platform};
use kiln_session::SessionId;
use kiln_solver::{OpContext, Reporter, WorkerError as _};
use kiln_store::{BlobProvider, BlobStream, ContentStore, LayerRef, ProviderError, Providers, RealizeCtx, RecordType};
use tokio::sync::OnceCell;

use super::file_layer::{self, FileMeta};
use super::manifest::{self, FoundImage, ImagePlace};
use super::{Source, SourceInstance, SourceKey};
use crate::client::{Client, Pin};
use crate::error::{OpError, OpResult};
use crate::key::{blob_key, chain_key, image_key};
use crate::worker::{LlbWorker, store_tenant};

/// When a registry is asked although an answer is at hand (attribute `image.resolvemode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ResolveMode {
    /// Ask once a build, unless the reference has a digest that is at hand.
    #[default]
    Default,
    /// Always ask.
    Pull,
    /// Rather not; without named local images this is as the default.
    Local,
}

impl ResolveMode {
    /// The mode by its name in attributes.
    ///
    /// # Errors
    /// For an unknown name.
    pub fn parse(text: &str) -> Result<Self, OpError> {
        match text {
            "" | "default" => Ok(Self::Default),
            "pull" => Ok(Self::Pull),
            "local" => Ok(Self::Local),
            other => Err(OpError::user(format!("invalid resolve mode: {other}"))),
        }
    }
}

type Memo = HashMap<(String, String, ResolveMode), Arc<OnceCell<Arc<FoundImage>>>>;

/// What the references of one build stand for. A reference keeps its meaning until the build ends.
#[derive(Debug, Default)]
pub struct ImageMemo {
    found: Mutex<Memo>,
}

impl ImageMemo {
    fn cell(&self, key: (String, String, ResolveMode)) -> Arc<OnceCell<Arc<FoundImage>>> {
        self.found
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(key)
            .or_default()
            .clone()
    }
}

/// What `reference` stands for on a platform, as seen by one client: resolved once in its build, shared by all who ask.
/// Manifest and config are in the content store afterwards.
///
/// # Errors
/// If the reference cannot be resolved, or the image has nothing for the platform.
pub async fn resolve(
    content: &ContentStore,
    client: &Client,
    reference: &ImageRef,
    platform: &Platform,
    mode: ResolveMode,
) -> Result<Arc<FoundImage>, OpError> {
    let reference = reference.clone().or_latest();
    let cell = client.images().cell((reference.to_string(), platform.id(), mode));
    let found = cell
        .get_or_try_init(|| async {
            let place = RegistryPlace {
                registry: client.registry.clone(),
                reference: reference.clone(),
            };
            let at_hand = reference
                .digest()
                .filter(|d| mode != ResolveMode::Pull && content.has(d));
            let root = match at_hand {
                Some(digest) => digest,
                None => place.resolve().await?,
            };
            manifest::find(&place, content, root, platform).await.map(Arc::new)
        })
        .await;
    match found {
        Ok(image) => Ok(image.clone()),
        Err(error) => Err(error.context(format!("failed to resolve source metadata for {reference}"))),
    }
}

/// What a frontend learns about an image without pulling it.
#[derive(Clone, Debug)]
pub struct ImageMeta {
    /// The reference in normal form, with a digest only if it was given.
    pub reference: String,
    /// What it stands for: an index, or a manifest.
    pub digest: Digest,
    /// The image config.
    pub config: Bytes,
}

impl LlbWorker {
    /// Looks an image up for a client: in its registry, or, with a session and a store id, in an OCI layout that the
    /// session offers. Without a platform it is for this machine.
    ///
    /// # Errors
    /// If the reference cannot be resolved.
    pub async fn resolve_image(
        &self,
        client: &Client,
        reference: &str,
        platform: Option<&Platform>,
        mode: &str,
        layout: Option<(&str, &str)>,
        progress: &Reporter,
    ) -> Result<ImageMeta, OpError> {
        let parsed = ImageRef::parse(reference)
            .map_err(|e| OpError::user(format!("failed to parse image reference \"{reference}\": {e}")).because(e))?;
        let parsed = parsed.or_latest();
        let platform = platform.map_or_else(|| self.shared.native(), Platform::normalized);
        let content = self.store().content(&store_tenant(&kiln_solver::Tenant::default())?);
        let _status = progress.status(format!("resolve {reference}"));
        let found = match layout {
            None => resolve(&content, client, &parsed, &platform, ResolveMode::parse(mode)?).await?,
            Some((session, store)) => {
                let Some(digest) = parsed.digest() else {
                    return Err(OpError::user(format!(
                        "oci-layout reference \"{reference}\" must have a digest"
                    )));
                };
                let mut group = vec![client.session.clone()];
                if !session.is_empty() {
                    group.insert(0, SessionId::new(session));
                }
                let sessions = self.shared.sessions.clone();
                let place = super::oci_layout::SessionBlobs::new(sessions, group, format!("oci:{store}"));
                Arc::new(manifest::find(&place, &content, digest, &platform).await?)
            }
        };
        Ok(ImageMeta {
            reference: parsed.to_string(),
            digest: found.root,
            config: found.config.clone().into(),
        })
    }
}

/// A repository of a registry as a place of images.
struct RegistryPlace {
    registry: kiln_registry::Client,
    reference: ImageRef,
}

impl RegistryPlace {
    async fn resolve(&self) -> Result<Digest, OpError> {
        Ok(self
            .registry
            .resolve(&self.reference)
            .await
            .map_err(OpError::from)?
            .descriptor
            .digest)
    }
}

#[async_trait]
impl ImagePlace for RegistryPlace {
    async fn manifest(&self, digest: Digest) -> Result<(Option<String>, Vec<u8>), OpError> {
        let found = self
            .registry
            .fetch_manifest(&self.reference, digest)
            .await
            .map_err(OpError::from)?;
        Ok((Some(found.descriptor.media_type), found.bytes.unwrap_or_default()))
    }

    async fn config(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, OpError> {
        self.registry
            .fetch_small_blob(&self.reference, descriptor.digest, limit)
            .await
            .map_err(OpError::from)
    }

    fn provider(&self) -> Arc<dyn BlobProvider> {
        Arc::new(RegistryBlobs {
            registry: self.registry.clone(),
            repository: self.reference.repository(),
        })
    }
}

/// Blobs of one repository, for the store.
#[derive(Debug)]
pub struct RegistryBlobs {
    registry: kiln_registry::Client,
    repository: ImageRef,
}

impl RegistryBlobs {
    /// Blobs of `repository`, fetched with the client's credentials.
    pub fn new(registry: kiln_registry::Client, repository: ImageRef) -> Self {
        Self { registry, repository }
    }
}

#[async_trait]
impl BlobProvider for RegistryBlobs {
    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<BlobStream, ProviderError> {
        let size = (blob.size > 0).then_some(blob.size);
        let reader = self
            .registry
            .fetch_blob_from(&self.repository, blob.digest, size, offset)?;
        Ok(Box::pin(futures::stream::try_unfold(reader, |mut reader| async move {
            match reader.chunk().await {
                Ok(Some(bytes)) => Ok::<Option<(Bytes, _)>, ProviderError>(Some((bytes, reader))),
                Ok(None) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })))
    }

    fn repository(&self) -> Option<String> {
        Some(self.repository.name())
    }
}

/// `docker-image://`
#[derive(Debug)]
pub struct ImageSource;

impl Source for ImageSource {
    fn schemes(&self) -> &'static [&'static str] {
        &["docker-image"]
    }

    fn open(
        &self,
        worker: &LlbWorker,
        vertex: &Arc<Vertex>,
        op: &SourceOp,
    ) -> Result<Box<dyn SourceInstance>, OpError> {
        let reference = parse_reference(op)?;
        let checksum = match op.attr("image.checksum") {
            None | Some("") => None,
            Some(text) => Some(
                text.parse()
                    .map_err(|e| OpError::user(format!("invalid image checksum {text}: {e}")))?,
            ),
        };
        Ok(Box::new(Image {
            worker: worker.clone(),
            platform: worker.shared.platform(vertex),
            identifier: op.identifier.clone(),
            written: op.reference().to_owned(),
            reference,
            mode: ResolveMode::parse(op.attr("image.resolvemode").unwrap_or_default())?,
            record_type: manifest::record_type(op.attr("image.recordtype")),
            limit: manifest::layer_limit(op.attr("image.layerlimit"))?,
            checksum,
            found: OnceCell::new(),
        }))
    }
}

fn parse_reference(op: &SourceOp) -> Result<ImageRef, OpError> {
    let text = op.reference();
    let parsed = ImageRef::parse(text);
    parsed.map_err(|e| OpError::user(format!("failed to parse image reference \"{text}\": {e}")).because(e))
}

struct Image {
    worker: LlbWorker,
    platform: Platform,
    identifier: String,
    /// The reference as in the operation.
    written: String,
    reference: ImageRef,
    mode: ResolveMode,
    record_type: RecordType,
    limit: Option<u32>,
    checksum: Option<Digest>,
    found: OnceCell<Arc<FoundImage>>,
}

/// The client that an operation acts for.
fn first_client(cx: &OpContext<LlbWorker>) -> Result<Arc<Client>, OpError> {
    cx.clients().into_iter().next().ok_or_else(OpError::canceled)
}

impl Image {
    async fn found(&self, cx: &OpContext<LlbWorker>) -> Result<Arc<FoundImage>, OpError> {
        let find = async {
            let client = first_client(cx)?;
            let content = self.worker.store().content(&store_tenant(cx.tenant())?);
            let _status = cx.progress().status(format!("resolve {}", self.written));
            let found = resolve(&content, &client, &self.reference, &self.platform, self.mode).await?;
            if let Some(wanted) = self.checksum.filter(|c| *c != found.root) {
                return Err(OpError::user(format!(
                    "image {} has digest {}, expected {wanted}",
                    self.reference, found.root
                )));
            }
            Ok(found)
        };
        self.found.get_or_try_init(|| find).await.cloned()
    }

    /// Tells the clients where the layers are, each with its own credentials.
    fn offer(&self, cx: &OpContext<LlbWorker>, found: &FoundImage) {
        for client in cx.clients() {
            let provider = self.provider(&client);
            let blobs = found.layers(self.limit).map(|(d, _)| d.digest);
            client.offer(&found.providers(self.limit, &provider), blobs, cx.progress());
            let pin = Pin {
                identifier: self.identifier.clone(),
                digest: found.root.to_string(),
                platform: self.platform.id(),
            };
            client.pin(cx.vertex().digest, pin);
        }
    }

    fn provider(&self, client: &Client) -> Arc<dyn BlobProvider> {
        Arc::new(RegistryBlobs::new(client.registry.clone(), self.reference.repository()))
    }
}

#[async_trait]
impl SourceInstance for Image {
    async fn key(&self, cx: &OpContext<LlbWorker>) -> Result<SourceKey, OpError> {
        let found = self.found(cx).await?;
        self.offer(cx, &found);
        let first = image_key(&found.root, &self.platform, self.limit);
        let diff_ids: Vec<_> = found.layers(self.limit).map(|(_, diff)| diff).collect();
        let chain = chain_key(&diff_ids);
        Ok(SourceKey {
            keys: std::iter::once(first).chain(chain).collect(),
            transient: false,
        })
    }

    async fn fetch(&self, cx: &OpContext<LlbWorker>) -> OpResult<Option<LayerRef>> {
        let found = self.found(cx).await?;
        self.offer(cx, &found);
        let provider = self.provider(&*first_client(cx)?);
        let tenant = store_tenant(cx.tenant())?;
        let description = format!("pulled from {}", self.reference.clone().or_latest());
        let store = self.worker.store();
        Ok(found
            .chain(store, &tenant, self.limit, self.record_type, description, provider)
            .await?)
    }
}

/// `docker-image+blob://`
#[derive(Debug)]
pub struct ImageBlobSource;

impl Source for ImageBlobSource {
    fn schemes(&self) -> &'static [&'static str] {
        &["docker-image+blob"]
    }

    fn open(
        &self,
        worker: &LlbWorker,
        _vertex: &Arc<Vertex>,
        op: &SourceOp,
    ) -> Result<Box<dyn SourceInstance>, OpError> {
        let reference = parse_reference(op)?;
        let Some(digest) = reference.digest() else {
            return Err(OpError::user(format!("{}: a blob needs a digest", op.identifier)));
        };
        let meta = FileMeta::from_attrs(op, &digest.hex())?;
        let record_type = manifest::record_type(op.attr("image.recordtype"));
        Ok(Box::new(ImageBlob {
            worker: worker.clone(),
            identifier: op.identifier.clone(),
            reference,
            digest,
            meta,
            record_type,
        }))
    }
}

struct ImageBlob {
    worker: LlbWorker,
    identifier: String,
    reference: ImageRef,
    digest: Digest,
    meta: FileMeta,
    record_type: RecordType,
}

#[async_trait]
impl SourceInstance for ImageBlob {
    async fn key(&self, cx: &OpContext<LlbWorker>) -> Result<SourceKey, OpError> {
        for client in cx.clients() {
            let pin = Pin {
                identifier: self.identifier.clone(),
                digest: self.digest.to_string(),
                platform: String::new(),
            };
            client.pin(cx.vertex().digest, pin);
        }
        Ok(SourceKey {
            keys: vec![blob_key(&self.digest, &self.meta.file())],
            transient: false,
        })
    }

    async fn fetch(&self, cx: &OpContext<LlbWorker>) -> OpResult<Option<LayerRef>> {
        let client = first_client(cx)?;
        let tenant = store_tenant(cx.tenant())?;
        let store = self.worker.store();
        let _permit = cx.permit().await;
        let repository = self.reference.repository();
        let blob = if store.content(&tenant).has(&self.digest) {
            Descriptor::new("", self.digest, 0)
        } else {
            let size = client
                .registry
                .blob_size(&repository, self.digest)
                .await
                .map_err(OpError::from)?;
            let missing = || OpError::missing(format!("{}@{}: not found", repository.name(), self.digest));
            Descriptor::new("", self.digest, size.ok_or_else(missing)?)
        };
        let provider: Arc<dyn BlobProvider> = Arc::new(RegistryBlobs::new(client.registry.clone(), repository));
        let realize = RealizeCtx {
            providers: Providers::of([self.digest], provider),
            ..crate::layers::realize_ctx(cx)
        };
        let handle = store
            .fetch_blob(&tenant, &blob, &realize)
            .await
            .map_err(OpError::from)?;
        let description = format!("pulled from {}", self.reference);
        Ok(Some(
            file_layer::make(store, &tenant, handle, &self.meta, self.record_type, description).await?,
        ))
    }
}
