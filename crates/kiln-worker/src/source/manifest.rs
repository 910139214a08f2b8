//! Images as sources read them, wherever their bytes are: an index is resolved to the manifest of a platform, manifest and
//! config are kept in the content store, and layers become a chain that is fetched when somebody needs it.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_oci::{Descriptor, DiffId, Digest, ImageConfig, Index, Manifest, Platform, media_type};
use kiln_store::{BlobProvider, ContentStore, LayerRef, LazyLayer, Providers, RecordType, Store, StoreError, Tenant};

use crate::error::OpError;
use crate::layers::blocking;

/// Largest manifest or index, in bytes.
const MAX_MANIFEST: u64 = 8 << 20;
/// Largest config, in bytes.
const MAX_CONFIG: u64 = 16 << 20;
/// Indexes within indexes.
const MAX_DEPTH: usize = 4;

/// A place that images come from.
#[async_trait]
pub(crate) trait ImagePlace: Send + Sync {
    /// The bytes of a manifest or index, checked against the digest, and its media type if it is known.
    async fn manifest(&self, digest: Digest) -> Result<(Option<String>, Vec<u8>), OpError>;

    /// The bytes of a config, checked against the digest.
    async fn config(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, OpError>;

    /// What provides its layers.
    fn provider(&self) -> Arc<dyn BlobProvider>;
}

/// An image for one platform, without its layers' bytes.
#[derive(Clone, Debug)]
pub struct FoundImage {
    /// What the reference stands for: an index, or a manifest.
    pub root: Digest,
    /// The manifest for the platform.
    pub manifest_digest: Digest,
    /// That manifest.
    pub manifest: Manifest,
    /// The config as it is.
    pub config: Vec<u8>,
    /// The layers' diff ids; as many as the manifest has layers.
    pub diff_ids: Vec<DiffId>,
}

/// Reads a document from the content store, or from `fetch`, which then goes into the store.
async fn cached(
    content: &ContentStore,
    digest: Digest,
    limit: u64,
    fetch: impl Future<Output = Result<(Option<String>, Vec<u8>), OpError>>,
) -> Result<(Option<String>, Vec<u8>), OpError> {
    if let Some(info) = content.info(&digest) {
        let store = content.clone();
        match blocking(move |_| store.read(&digest, limit)).await {
            Ok(bytes) => return Ok((info.media_type, bytes)),
            Err(error) => tracing::debug!(%digest, %error, "a kept document is fetched again"),
        }
    }
    let (kind, bytes) = fetch.await?;
    let (store, copy, name) = (content.clone(), bytes.clone(), kind.clone().unwrap_or_default());
    // Not being able to keep it is no reason to fail.
    if let Err(error) = blocking(move |_| store.put(&name, &copy)).await {
        tracing::warn!(%digest, %error, "a manifest or config is not kept");
    }
    Ok((kind, bytes))
}

/// What a document is, by its announced type or by its members.
fn kind_of(announced: Option<&str>, bytes: &[u8]) -> Option<&'static str> {
    let known = |kind: &str| {
        if media_type::is_index(kind) {
            Some(media_type::OCI_INDEX)
        } else if media_type::is_manifest(kind) {
            Some(media_type::OCI_MANIFEST)
        } else {
            None
        }
    };
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head {
        #[serde(default)]
        media_type: String,
        manifests: Option<serde::de::IgnoredAny>,
        config: Option<serde::de::IgnoredAny>,
    }
    announced.and_then(known).or_else(|| {
        let head: Head = serde_json::from_slice(bytes).ok()?;
        known(&head.media_type).or(match (head.manifests, head.config) {
            (Some(_), _) => Some(media_type::OCI_INDEX),
            (None, Some(_)) => Some(media_type::OCI_MANIFEST),
            (None, None) => None,
        })
    })
}

/// Reads the image at `root` for a platform. Manifest and config are in the content store afterwards.
pub(crate) async fn find(
    place: &dyn ImagePlace,
    content: &ContentStore,
    root: Digest,
    platform: &Platform,
) -> Result<FoundImage, OpError> {
    let mut digest = root;
    let mut announced: Option<String> = None;
    for _ in 0..MAX_DEPTH {
        let (kind, bytes) = cached(content, digest, MAX_MANIFEST, place.manifest(digest)).await?;
        match kind_of(kind.as_deref().or(announced.as_deref()), &bytes) {
            Some(media_type::OCI_INDEX) => {
                let index: Index = parse(&bytes, "index", digest)?;
                let Some(chosen) = index.select(platform) else {
                    return Err(OpError::missing(format!(
                        "no match for platform in manifest {digest}: not found"
                    )));
                };
                announced = Some(chosen.media_type.clone());
                digest = chosen.digest;
            }
            Some(_) => {
                let manifest: Manifest = parse(&bytes, "manifest", digest)?;
                return with_config(place, content, root, digest, manifest).await;
            }
            None => {
                return Err(OpError::user(format!(
                    "{digest} is no image manifest that this daemon understands"
                )));
            }
        }
    }
    Err(OpError::user(format!(
        "{root} is an index that nests more than {MAX_DEPTH} levels deep"
    )))
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str, digest: Digest) -> Result<T, OpError> {
    serde_json::from_slice(bytes).map_err(|e| OpError::user(format!("failed to parse {what} {digest}: {e}")).because(e))
}

async fn with_config(
    place: &dyn ImagePlace,
    content: &ContentStore,
    root: Digest,
    manifest_digest: Digest,
    manifest: Manifest,
) -> Result<FoundImage, OpError> {
    let descriptor = manifest.config.clone();
    let fetch = async {
        let bytes = place.config(&descriptor, MAX_CONFIG).await?;
        Ok((Some(descriptor.media_type.clone()), bytes))
    };
    let (_, config) = cached(content, descriptor.digest, MAX_CONFIG, fetch).await?;
    let layers = manifest.layers().len();
    let bad = |text: String| OpError::user(format!("failed to read image {manifest_digest}: {text}"));
    let diff_ids = if media_type::is_config(&descriptor.media_type) || layers > 0 {
        let parsed = ImageConfig::parse(&config).map_err(|e| bad(e.to_string()))?;
        parsed.diff_ids().map_err(|e| bad(e.to_string()))?
    } else {
        Vec::new()
    };
    if diff_ids.len() != layers {
        return Err(bad(format!(
            "its config names {} layers, its manifest {layers}",
            diff_ids.len()
        )));
    }
    Ok(FoundImage {
        root,
        manifest_digest,
        manifest,
        config,
        diff_ids,
    })
}

impl FoundImage {
    /// The layers' descriptors and diff ids, bottom first, cut to `limit`.
    pub(crate) fn layers(&self, limit: Option<u32>) -> impl Iterator<Item = (&Descriptor, DiffId)> {
        let limit = limit.and_then(|l| usize::try_from(l).ok()).unwrap_or(usize::MAX);
        self.manifest
            .layers()
            .iter()
            .zip(self.diff_ids.iter().copied())
            .take(limit)
    }

    /// Providers of the layers.
    pub(crate) fn providers(&self, limit: Option<u32>, provider: &Arc<dyn BlobProvider>) -> Providers {
        Providers::of(self.layers(limit).map(|(d, _)| d.digest), provider.clone())
    }

    /// The layers as a chain of which nothing but the blobs is known. `None` for an image without layers.
    pub(crate) async fn chain(
        &self,
        store: &Arc<Store>,
        tenant: &Tenant,
        limit: Option<u32>,
        record_type: RecordType,
        description: String,
        provider: Arc<dyn BlobProvider>,
    ) -> Result<Option<LayerRef>, OpError> {
        let layers: Vec<LazyLayer> = self
            .layers(limit)
            .map(|(blob, diff_id)| LazyLayer {
                blob: blob.clone(),
                diff_id,
                description: description.clone(),
                record_type,
                created_at: None,
            })
            .collect();
        let (store, tenant) = (store.clone(), tenant.clone());
        blocking(move |_| {
            let mut top: Option<LayerRef> = None;
            for layer in &layers {
                top = Some(store.lazy_layer(&tenant, top.as_ref(), layer, Some(provider.clone()))?);
            }
            Ok::<_, StoreError>(top)
        })
        .await
    }
}

/// An attribute that is a number of layers.
pub(crate) fn layer_limit(value: Option<&str>) -> Result<Option<u32>, OpError> {
    match value {
        None | Some("") => Ok(None),
        Some(text) => match text.parse::<u32>() {
            Ok(0) => Ok(None),
            Ok(n) => Ok(Some(n)),
            Err(_) => Err(OpError::user(format!("invalid layer limit {text}"))),
        },
    }
}

/// The record type that a source's attribute asks for.
pub(crate) fn record_type(value: Option<&str>) -> RecordType {
    match value {
        Some("internal") => RecordType::Internal,
        Some("frontend") => RecordType::Frontend,
        _ => RecordType::Regular,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_told_apart_by_type_and_by_members() {
        for (announced, bytes, want) in [
            (Some(media_type::DOCKER_LIST), "{}", Some(media_type::OCI_INDEX)),
            (Some("text/plain"), r#"{"manifests":[]}"#, Some(media_type::OCI_INDEX)),
            (None, r#"{"config":{},"layers":[]}"#, Some(media_type::OCI_MANIFEST)),
            (
                None,
                r#"{"mediaType":"application/vnd.docker.distribution.manifest.v2+json"}"#,
                Some(media_type::OCI_MANIFEST),
            ),
            (None, "{}", None),
            (None, "nonsense", None),
        ] {
            assert_eq!(kind_of(announced, bytes.as_bytes()), want, "{announced:?} {bytes}");
        }
    }

    #[test]
    fn limits_and_record_types() {
        assert_eq!(layer_limit(Some("3")).unwrap(), Some(3));
        assert_eq!(layer_limit(Some("0")).unwrap(), None);
        assert!(layer_limit(Some("x")).is_err());
        assert_eq!(record_type(Some("frontend")), RecordType::Frontend);
        assert_eq!(record_type(None), RecordType::Regular);
    }
}
