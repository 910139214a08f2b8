//! Pushing an image: blobs of all manifests first, then manifests, the index last (semantics.md §7).

use std::sync::Arc;

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use kiln_oci::{Descriptor, ImageRef, media_type};
use kiln_registry::{BlobSource, Client, RegistryError};

use crate::error::ExportError;
use crate::image::{Document, DocumentKind, Image};
use crate::progress::{ExportProgress, Status};

/// Blobs in flight at once; the client limits connections by itself.
const PARALLEL: usize = 8;

/// Serves the documents of an image from memory and everything else from another source.
struct WithDocuments<'a> {
    image: &'a Image,
    layers: &'a dyn BlobSource,
}

#[async_trait::async_trait]
impl BlobSource for WithDocuments<'_> {
    async fn open(&self, blob: &Descriptor, offset: u64) -> std::io::Result<kiln_registry::ByteStream> {
        match self.image.document(blob.digest) {
            Some(document) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(document.bytes.len());
                let rest = document.bytes.slice(start..);
                Ok(Box::pin(futures::stream::once(async move { Ok(rest) })))
            }
            None => self.layers.open(blob, offset).await,
        }
    }
}

/// The reference to push to, from a name as the user gave it.
pub(crate) fn target(name: &str, by_digest: bool) -> Result<ImageRef, ExportError> {
    let parsed = ImageRef::parse(name).map_err(|source| ExportError::Name {
        name: name.to_owned(),
        source,
    })?;
    if by_digest {
        if parsed.tag().is_some() {
            return Err(ExportError::Invalid(format!(
                "can't push tagged ref {parsed} by digest"
            )));
        }
        return Ok(parsed.repository());
    }
    Ok(parsed.or_latest())
}

async fn push_one(
    client: &Client,
    target: &ImageRef,
    blob: &Descriptor,
    places: &(dyn Fn(&Descriptor) -> Vec<String> + Sync),
    source: &dyn BlobSource,
) -> Result<(), RegistryError> {
    let here = format!("{}/", target.domain());
    let known = places(blob);
    let from: Vec<String> = known
        .iter()
        .filter_map(|p| p.strip_prefix(&here))
        .map(str::to_owned)
        .collect();
    client.push_blob(target, blob, &from, source).await.map(|_| ())
}

/// Pushes `image` to `target`: under its tag, or by digest alone if it has none. `places` tells repositories
/// (`host/name`) that have a blob, so that it is mounted instead of uploaded.
pub(crate) async fn push(
    image: &Image,
    target: &ImageRef,
    client: &Client,
    layers: &dyn BlobSource,
    places: &(dyn Fn(&Descriptor) -> Vec<String> + Sync),
    progress: &Arc<dyn ExportProgress>,
) -> Result<(), ExportError> {
    let failed = |source| ExportError::Push {
        name: target.to_string(),
        source: Box::new(source),
    };
    let source = WithDocuments { image, layers };
    {
        let _status = Status::begin(progress, "pushing layers");
        let small = image.documents.iter().filter(|d| is_blob(d)).map(|d| &d.descriptor);
        let blobs: Vec<&Descriptor> = image
            .layers
            .iter()
            .filter(|l| !media_type::is_foreign_layer(&l.media_type))
            .chain(small)
            .collect();
        let pushes: Vec<_> = blobs
            .into_iter()
            .map(|blob| push_one(client, target, blob, places, &source).boxed())
            .collect();
        let mut running = futures::stream::iter(pushes).buffer_unordered(PARALLEL);
        while let Some(()) = running.try_next().await.map_err(failed)? {}
    }
    // Documents are kept with children before parents, so the root comes last.
    for document in image.documents.iter().filter(|d| !is_blob(d)) {
        let root = document.descriptor.digest == image.root.digest;
        let digest = document.descriptor.digest;
        let reference = if root && target.tag().is_some() && target.digest().is_none() {
            target.clone()
        } else {
            target.repository().with_digest(digest)
        };
        let name = target.to_string();
        let _status = Status::begin(progress, format!("pushing manifest for {name}@{digest}"));
        client
            .push_manifest(&reference, &document.descriptor.media_type, &document.bytes)
            .await
            .map_err(failed)?;
    }
    Ok(())
}

fn is_blob(document: &Document) -> bool {
    matches!(document.kind, DocumentKind::Config | DocumentKind::Attestation)
}
