//! What exporters need of the store: packed layers, files, and blobs as streams.

use std::collections::HashMap;
use std::io::Read as _;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use kiln_oci::{Descriptor, DiffId, Digest, LayerNote, Timestamp, media_type};
use kiln_registry::{BlobSource, ByteStream};
use kiln_store::{
    Algorithm, BlobHandle, Compression, LayerRef, Providers, RealizeCtx, Store, StoreError, Tenant, View,
};

use crate::error::ExportError;
use crate::image::ImageLayer;
use crate::options::{CompressionKind, LayerPacking};
use crate::rewrite;

/// Bytes that one turn of a blocking thread reads.
const READ: usize = 1 << 20;

/// How the store names a packing.
pub(crate) fn compression(packing: LayerPacking) -> Result<Compression, ExportError> {
    let algorithm = match packing.kind {
        CompressionKind::Uncompressed => Algorithm::Uncompressed,
        CompressionKind::Gzip => Algorithm::Gzip,
        CompressionKind::Zstd => Algorithm::Zstd,
        CompressionKind::Estargz => {
            return Err(ExportError::Invalid(
                "compression \"estargz\" is not supported by this daemon".to_owned(),
            ));
        }
    };
    Ok(Compression {
        algorithm,
        level: packing.level,
    })
}

/// A layer of a result and its packed form.
#[derive(Clone, Debug)]
pub(crate) struct PackedLayer {
    pub(crate) image: ImageLayer,
    layer: LayerRef,
    /// Keeps a blob that was made here.
    _lease: Option<BlobHandle>,
}

/// Clamps the times of files in layers that are not the base image's.
pub(crate) struct Rewrite {
    pub(crate) epoch: Timestamp,
    /// Diff ids of the base image, bottom first.
    pub(crate) base: Vec<DiffId>,
}

/// The packed layers of a result, bottom first. Layers that no blob is known of are packed, several at a time.
pub(crate) async fn pack(
    top: Option<&LayerRef>,
    packing: LayerPacking,
    rewrite: Option<Rewrite>,
    cx: &RealizeCtx,
) -> Result<Vec<PackedLayer>, ExportError> {
    let Some(top) = top else { return Ok(Vec::new()) };
    let compression = compression(packing)?;
    let layers = top.layers();
    let packed = layers.iter().map(|layer| async move {
        let blob = layer.store().blob_for(layer, compression, packing.force, cx).await?;
        let (seconds, nanos) = layer.created_at().parts();
        let missing = || StoreError::Invalid(format!("diff id of layer {} is not known", layer.id()));
        let image = ImageLayer {
            blob,
            diff_id: layer.diff_id().ok_or_else(missing)?,
            note: LayerNote {
                description: layer.description().to_owned(),
                created: Some(Timestamp::new(seconds, nanos)),
            },
        };
        Ok::<_, ExportError>(PackedLayer {
            image,
            layer: layer.clone(),
            _lease: None,
        })
    });
    let mut packed = futures::future::try_join_all(packed).await?;
    if let Some(Rewrite { epoch, base }) = rewrite {
        let common = packed
            .iter()
            .zip(&base)
            .take_while(|(l, b)| l.image.diff_id == **b)
            .count();
        for layer in packed.iter_mut().skip(common) {
            let local = fetch(layer, cx).await?;
            let content = layer.layer.store().content(layer.layer.tenant());
            let compression = match media_type::layer_compression(&layer.image.blob.media_type) {
                Some(media_type::LayerCompression::Uncompressed) => Algorithm::Uncompressed,
                Some(media_type::LayerCompression::Zstd) => Algorithm::Zstd,
                _ => Algorithm::Gzip,
            };
            let compression = Compression {
                algorithm: compression,
                level: packing.level,
            };
            let clamped =
                crate::blocking(move |stop| rewrite::clamp(&content, &local, compression, epoch.seconds(), stop));
            if let Some((lease, diff_id)) = clamped.await? {
                let d = lease.descriptor();
                layer.image.blob = Descriptor::new(d.media_type, d.digest, d.size);
                layer.image.diff_id = diff_id;
                layer._lease = Some(lease);
            }
        }
    }
    Ok(packed)
}

/// Makes sure that a layer's blob is in the content store.
async fn fetch(layer: &PackedLayer, cx: &RealizeCtx) -> Result<BlobHandle, ExportError> {
    let providers = layer.layer.providers().merged(&cx.providers);
    let cx = RealizeCtx {
        providers,
        observer: cx.observer.clone(),
    };
    Ok(layer
        .layer
        .store()
        .fetch_blob(layer.layer.tenant(), &layer.image.blob, &cx)
        .await?)
}

/// Makes sure that all blobs are in the content store; the handles keep them there.
pub(crate) async fn fetch_all(layers: &[PackedLayer], cx: &RealizeCtx) -> Result<Vec<BlobHandle>, ExportError> {
    futures::future::try_join_all(layers.iter().map(|l| fetch(l, cx))).await
}

/// The files of a result.
pub(crate) async fn view(layer: Option<&LayerRef>, cx: &RealizeCtx) -> Result<View, ExportError> {
    match layer {
        None => Ok(View::scratch()),
        Some(layer) => Ok(layer.store().realize(Some(layer), cx).await?),
    }
}

/// Layers' blobs as streams: from the content store, fetched into it first where that is needed.
pub(crate) struct LayerBlobs {
    blobs: HashMap<Digest, (Arc<Store>, Tenant, Descriptor, Providers)>,
    cx: RealizeCtx,
}

impl LayerBlobs {
    pub(crate) fn new(layers: &[PackedLayer], cx: &RealizeCtx) -> Self {
        let blobs = layers.iter().map(|l| {
            let providers = l.layer.providers().merged(&cx.providers);
            let blob = l.image.blob.clone();
            (
                blob.digest,
                (l.layer.store().clone(), l.layer.tenant().clone(), blob, providers),
            )
        });
        Self {
            blobs: blobs.collect(),
            cx: cx.clone(),
        }
    }

    /// Repositories (`host/name`) that are known to have a blob.
    pub(crate) fn places(&self, digest: Digest) -> Vec<String> {
        let Some((store, tenant, _, providers)) = self.blobs.get(&digest) else {
            return Vec::new();
        };
        let mut places: Vec<String> = store
            .content(tenant)
            .info(&digest)
            .map(|i| i.sources.into_iter().collect())
            .unwrap_or_default();
        if let Some(place) = providers.get(&digest).and_then(|p| p.repository())
            && !places.contains(&place)
        {
            places.push(place);
        }
        places
    }

    /// Notes that a repository has these blobs now. Blocking.
    pub(crate) fn remember(&self, repository: &str) {
        for (digest, (store, tenant, ..)) in &self.blobs {
            let content = store.content(tenant);
            if content.has(digest)
                && let Err(error) = content.add_source(digest, repository)
            {
                tracing::warn!(%digest, %error, "the place of a pushed blob is not remembered");
            }
        }
    }
}

#[async_trait]
impl BlobSource for LayerBlobs {
    async fn open(&self, blob: &Descriptor, offset: u64) -> std::io::Result<ByteStream> {
        let (store, tenant, own, providers) = self.blobs.get(&blob.digest).ok_or(std::io::ErrorKind::NotFound)?;
        let cx = RealizeCtx {
            providers: providers.clone(),
            observer: self.cx.observer.clone(),
        };
        let lease = store
            .fetch_blob(tenant, own, &cx)
            .await
            .map_err(std::io::Error::other)?;
        let content = store.content(tenant);
        let digest = blob.digest;
        let reader = spawn(move || content.open(&digest).map_err(std::io::Error::other)).await?;
        let size = reader.size();
        let state = (Arc::new(reader), offset, lease);
        Ok(Box::pin(futures::stream::try_unfold(
            state,
            move |(reader, at, lease)| async move {
                if at >= size {
                    return Ok(None);
                }
                let file = reader.clone();
                let bytes = spawn(move || {
                    let mut buf = vec![0; READ.min(usize::try_from(size - at).unwrap_or(READ))];
                    let n = file.read_at(&mut buf, at)?;
                    buf.truncate(n);
                    Ok(Bytes::from(buf))
                })
                .await?;
                if bytes.is_empty() {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                let next = at + bytes.len() as u64;
                Ok(Some((bytes, (reader, next, lease))))
            },
        )))
    }
}

async fn spawn<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
}

/// Opens blobs of the content store for blocking readers.
pub(crate) fn opener(
    layers: &[PackedLayer],
) -> impl FnMut(&Descriptor) -> std::io::Result<Box<dyn std::io::Read>> + Send + use<> {
    let blobs: HashMap<Digest, (Arc<Store>, Tenant)> = layers
        .iter()
        .map(|l| (l.image.blob.digest, (l.layer.store().clone(), l.layer.tenant().clone())))
        .collect();
    move |blob| {
        let (store, tenant) = blobs.get(&blob.digest).ok_or(std::io::ErrorKind::NotFound)?;
        let reader = store
            .content(tenant)
            .open(&blob.digest)
            .map_err(std::io::Error::other)?;
        Ok(Box::new(reader.take(blob.size)))
    }
}
