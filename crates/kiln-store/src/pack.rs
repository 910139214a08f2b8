//! Blobs of layers: packed once by compression, repacked from another packing without files where there is one.

use std::sync::Arc;

use futures::future::FutureExt as _;
use kiln_fs::Stop;
use kiln_oci::{ChainId, Descriptor, DiffId};

use crate::compress::Compression;
use crate::content::BlobHandle;
use crate::draft::ContentWriter;
use crate::error::{Result, StoreError};
use crate::in_flight::{Key, Value, blocking, shared};
use crate::layer_ref::{LayerNode, LayerRef};
use crate::realize::RealizeCtx;
use crate::store::Store;
use crate::view::View;

impl Store {
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
