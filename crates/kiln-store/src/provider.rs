//! Where missing blobs come from: a registry or a session, wired in by the caller.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use kiln_oci::{Descriptor, Digest};

/// What a provider answers when it fails; shown as it is.
pub type ProviderError = Box<dyn std::error::Error + Send + Sync>;
/// The bytes of a blob from the offset asked for to the end.
pub type BlobStream = BoxStream<'static, Result<Bytes, ProviderError>>;

/// Fetches blobs from somewhere else. The store verifies what comes; a provider only has to try.
#[async_trait::async_trait]
pub trait BlobProvider: Send + Sync {
    /// The blob's bytes from `offset` on. The stream may end with an error; the store asks again from where it got to.
    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<BlobStream, ProviderError>;

    /// The repository (`host/name`) it comes from, remembered for cross-repository mounts; `None` if it is no registry.
    fn repository(&self) -> Option<String> {
        None
    }
}

/// Providers by blob digest. Cheap to clone; a build collects those of its sources and cache imports.
#[derive(Clone, Default)]
pub struct Providers(Option<Arc<HashMap<Digest, Arc<dyn BlobProvider>>>>);

impl Providers {
    /// One provider for one or several blobs.
    pub fn of(blobs: impl IntoIterator<Item = Digest>, provider: Arc<dyn BlobProvider>) -> Self {
        let map: HashMap<_, _> = blobs.into_iter().map(|d| (d, provider.clone())).collect();
        if map.is_empty() {
            Self(None)
        } else {
            Self(Some(Arc::new(map)))
        }
    }

    /// The provider of a blob.
    pub fn get(&self, digest: &Digest) -> Option<Arc<dyn BlobProvider>> {
        self.0.as_ref()?.get(digest).cloned()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Both; where both know a blob, `other` wins.
    #[must_use]
    pub fn merged(&self, other: &Self) -> Self {
        match (&self.0, &other.0) {
            (_, None) => self.clone(),
            (None, _) => other.clone(),
            (Some(a), Some(b)) if Arc::ptr_eq(a, b) => self.clone(),
            (Some(a), Some(b)) => {
                let mut map = HashMap::clone(a);
                map.extend(b.iter().map(|(d, p)| (*d, p.clone())));
                Self(Some(Arc::new(map)))
            }
        }
    }
}

impl fmt::Debug for Providers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Providers")
            .field(&self.0.as_ref().map_or(0, |m| m.len()))
            .finish()
    }
}
