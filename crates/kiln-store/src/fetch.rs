//! Fetching blobs from providers: joined, resumed, verified.

use std::sync::Arc;

use futures::future::FutureExt as _;
use futures::stream::StreamExt as _;
use kiln_oci::Descriptor;

use crate::content::BlobHandle;
use crate::draft::ContentWriter;
use crate::error::{Result, StoreError};
use crate::ids::Tenant;
use crate::in_flight::{Key, Value, Watchers, blocking, shared};
use crate::layer_ref::LayerNode;
use crate::provider::{BlobProvider, Providers};
use crate::realize::{RealizeCtx, RealizeEvent};
use crate::store::Store;

/// How often a broken download is resumed before it fails.
const ATTEMPTS: usize = 6;

impl Store {
    pub(crate) async fn fetch_layer(
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

    pub(crate) async fn fetch_for(
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
