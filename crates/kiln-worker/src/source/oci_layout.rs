//! Images in OCI layouts at the client: `oci-layout://` and `oci-layout+blob://` (semantics.md §4, wire.md §4.7).
//!
//! The client serves the layout's blobs through its session; the digest in the reference is mandatory, because nobody
//! asks the layout's index.

use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt as _;
use kiln_llb::Vertex;
use kiln_llb::op::SourceOp;
use kiln_oci::{Descriptor, Digest, ImageRef, Platform};
use kiln_session::content::ClientContent;
use kiln_session::{SessionId, SessionManager};
use kiln_solver::OpContext;
use kiln_store::{BlobProvider, BlobStream, LayerRef, ProviderError, Providers, RealizeCtx, RecordType};
use tokio::sync::OnceCell;

use super::file_layer::{self, FileMeta};
use super::manifest::{self, FoundImage, ImagePlace};
use super::{Source, SourceInstance, SourceKey};
use crate::client::Pin;
use crate::error::{OpError, OpResult};
use crate::key::{blob_key, chain_key, image_key};
use crate::worker::{LlbWorker, store_tenant};

/// `oci-layout://` and `oci-layout+blob://`
#[derive(Debug)]
pub struct OciLayoutSource;

impl Source for OciLayoutSource {
    fn schemes(&self) -> &'static [&'static str] {
        &["oci-layout", "oci-layout+blob"]
    }

    fn open(
        &self,
        worker: &LlbWorker,
        vertex: &Arc<Vertex>,
        op: &SourceOp,
    ) -> Result<Box<dyn SourceInstance>, OpError> {
        let text = op.reference();
        let reference = ImageRef::parse(text)
            .map_err(|e| OpError::user(format!("failed to parse oci-layout reference \"{text}\": {e}")).because(e))?;
        let Some(digest) = reference.digest() else {
            return Err(OpError::user(format!(
                "oci-layout reference \"{text}\" must have a digest"
            )));
        };
        let store = match op.attr("oci.store") {
            None | Some("") => reference.familiar_name(),
            Some(id) => id.to_owned(),
        };
        let layout = Layout {
            worker: worker.clone(),
            identifier: op.identifier.clone(),
            session: op.attr("oci.session").filter(|s| !s.is_empty()).map(SessionId::new),
            store: format!("oci:{store}"),
        };
        let record_type = manifest::record_type(op.attr("image.recordtype"));
        if op.scheme() == "oci-layout+blob" {
            let meta = FileMeta::from_attrs(op, &digest.hex())?;
            return Ok(Box::new(LayoutBlob {
                layout,
                digest,
                meta,
                record_type,
            }));
        }
        Ok(Box::new(LayoutImage {
            layout,
            digest,
            platform: worker.shared.platform(vertex),
            record_type,
            limit: manifest::layer_limit(op.attr("oci.layerlimit"))?,
            found: OnceCell::new(),
        }))
    }
}

/// A layout at a client.
#[derive(Clone)]
struct Layout {
    worker: LlbWorker,
    identifier: String,
    /// The session that has it, if the operation names one.
    session: Option<SessionId>,
    /// Its name in the session.
    store: String,
}

impl Layout {
    /// The layout as seen by the clients of an operation.
    fn place(&self, cx: &OpContext<LlbWorker>) -> SessionBlobs {
        let mut group: Vec<SessionId> = self.session.iter().cloned().collect();
        for client in cx.clients() {
            if !group.contains(&client.session) {
                group.push(client.session.clone());
            }
        }
        SessionBlobs {
            sessions: self.worker.shared.sessions.clone(),
            group,
            store: self.store.clone(),
        }
    }

    fn pin(&self, cx: &OpContext<LlbWorker>, digest: Digest, platform: String) {
        for client in cx.clients() {
            let pin = Pin {
                identifier: self.identifier.clone(),
                digest: digest.to_string(),
                platform: platform.clone(),
            };
            client.pin(cx.vertex().digest, pin);
        }
    }
}

/// A content store of a client, reached through whichever of its sessions is alive.
#[derive(Clone, Debug)]
pub struct SessionBlobs {
    sessions: SessionManager,
    group: Vec<SessionId>,
    store: String,
}

impl SessionBlobs {
    /// The store `store` (`oci:<id>`, `local:<dir>`) of the first of these sessions that answers.
    pub fn new(sessions: SessionManager, group: Vec<SessionId>, store: String) -> Self {
        Self { sessions, group, store }
    }

    async fn content(&self) -> Result<ClientContent, OpError> {
        let store = self.store.clone();
        let found = self.sessions.any(&self.group, move |session| {
            let content = session.content(store.clone());
            async move { Ok(content) }
        });
        found.await.map_err(OpError::from)
    }

    async fn size(&self, digest: Digest) -> Result<u64, OpError> {
        let info = self.content().await?.info(&digest.to_string()).await?;
        info.map(|i| i.size)
            .ok_or_else(|| OpError::missing(format!("blob {digest}: not found in {}", self.store)))
    }

    /// A small blob, checked.
    async fn read(&self, digest: Digest, limit: u64) -> Result<Vec<u8>, OpError> {
        let size = self.size(digest).await?;
        if size > limit {
            return Err(OpError::user(format!(
                "blob {digest} has {size} bytes, more than {limit}"
            )));
        }
        let mut stream = Box::pin(self.content().await?.read(&digest.to_string(), 0, size).await?);
        let mut out = Vec::new();
        while let Some(bytes) = stream.next().await {
            out.extend_from_slice(&bytes?);
            if out.len() as u64 >= size {
                break;
            }
        }
        out.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        let actual = Digest::of(&out);
        if actual != digest {
            return Err(OpError::unavailable(format!(
                "blob {digest} of {}: digest is {actual}",
                self.store
            )));
        }
        Ok(out)
    }
}

#[async_trait]
impl ImagePlace for SessionBlobs {
    async fn manifest(&self, digest: Digest) -> Result<(Option<String>, Vec<u8>), OpError> {
        Ok((None, self.read(digest, 8 << 20).await?))
    }

    async fn config(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, OpError> {
        self.read(descriptor.digest, limit).await
    }

    fn provider(&self) -> Arc<dyn BlobProvider> {
        Arc::new(self.clone())
    }
}

#[async_trait]
impl BlobProvider for SessionBlobs {
    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<BlobStream, ProviderError> {
        let content = self.content().await?;
        let stream = content
            .read(&blob.digest.to_string(), offset, blob.size.saturating_sub(offset))
            .await?;
        Ok(Box::pin(
            stream.map(|bytes| bytes.map_err(|e| -> ProviderError { e.into() })),
        ))
    }
}

struct LayoutImage {
    layout: Layout,
    digest: Digest,
    platform: Platform,
    record_type: RecordType,
    limit: Option<u32>,
    found: OnceCell<Arc<FoundImage>>,
}

impl LayoutImage {
    async fn found(&self, cx: &OpContext<LlbWorker>) -> Result<Arc<FoundImage>, OpError> {
        let find = async {
            let content = self.layout.worker.store().content(&store_tenant(cx.tenant())?);
            let place = self.layout.place(cx);
            manifest::find(&place, &content, self.digest, &self.platform)
                .await
                .map(Arc::new)
        };
        self.found.get_or_try_init(|| find).await.cloned()
    }

    fn offer(&self, cx: &OpContext<LlbWorker>, found: &FoundImage) {
        let provider = self.layout.place(cx).provider();
        for client in cx.clients() {
            let blobs = found.layers(self.limit).map(|(d, _)| d.digest);
            client.offer(&found.providers(self.limit, &provider), blobs, cx.progress());
        }
        self.layout.pin(cx, self.digest, self.platform.id());
    }
}

#[async_trait]
impl SourceInstance for LayoutImage {
    async fn key(&self, cx: &OpContext<LlbWorker>) -> Result<SourceKey, OpError> {
        let found = self.found(cx).await?;
        self.offer(cx, &found);
        let first = image_key(&found.root, &self.platform, self.limit);
        let diff_ids: Vec<_> = found.layers(self.limit).map(|(_, diff)| diff).collect();
        Ok(SourceKey {
            keys: std::iter::once(first).chain(chain_key(&diff_ids)).collect(),
            transient: false,
        })
    }

    async fn fetch(&self, cx: &OpContext<LlbWorker>) -> OpResult<Option<LayerRef>> {
        let found = self.found(cx).await?;
        self.offer(cx, &found);
        let tenant = store_tenant(cx.tenant())?;
        let description = format!("from {}", self.layout.identifier);
        let provider = self.layout.place(cx).provider();
        let store = self.layout.worker.store();
        Ok(found
            .chain(store, &tenant, self.limit, self.record_type, description, provider)
            .await?)
    }
}

struct LayoutBlob {
    layout: Layout,
    digest: Digest,
    meta: FileMeta,
    record_type: RecordType,
}

#[async_trait]
impl SourceInstance for LayoutBlob {
    async fn key(&self, cx: &OpContext<LlbWorker>) -> Result<SourceKey, OpError> {
        self.layout.pin(cx, self.digest, String::new());
        Ok(SourceKey {
            keys: vec![blob_key(&self.digest, &self.meta.file())],
            transient: false,
        })
    }

    async fn fetch(&self, cx: &OpContext<LlbWorker>) -> OpResult<Option<LayerRef>> {
        let tenant = store_tenant(cx.tenant())?;
        let store = self.layout.worker.store();
        let place = self.layout.place(cx);
        let _permit = cx.permit().await;
        let size = if store.content(&tenant).has(&self.digest) {
            0
        } else {
            place.size(self.digest).await?
        };
        let blob = Descriptor::new("", self.digest, size);
        let realize = RealizeCtx {
            providers: Providers::of([self.digest], place.provider()),
            ..crate::layers::realize_ctx(cx)
        };
        let handle = store
            .fetch_blob(&tenant, &blob, &realize)
            .await
            .map_err(OpError::from)?;
        let description = format!("from {}", self.layout.identifier);
        Ok(Some(
            file_layer::make(store, &tenant, handle, &self.meta, self.record_type, description).await?,
        ))
    }
}
