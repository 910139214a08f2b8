//! What a job brings along for its operations: its client's session, and what its sources have found out.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_llb::VertexDigest;
use kiln_oci::Digest;
use kiln_session::SessionId;
use kiln_solver::Reporter;
use kiln_store::Providers;

/// The client of one build. Clones share what the build's sources have found out.
#[derive(Clone)]
pub struct Client {
    /// The session; an empty id if the client has none. Sources may name another one.
    pub session: SessionId,
    /// Registries, with the client's credentials.
    pub registry: kiln_registry::Client,
    found: Arc<Mutex<Found>>,
    images: Arc<crate::source::image::ImageMemo>,
}

#[derive(Default)]
struct Found {
    providers: Providers,
    reporters: HashMap<Digest, Reporter>,
    pins: BTreeMap<VertexDigest, Pin>,
}

/// What a source stood for in this build, for provenance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The identifier as in the operation.
    pub identifier: String,
    /// What it resolved to: a manifest digest, a commit, a checksum; empty for a client's directory.
    pub digest: String,
    /// Platform it was resolved for, in the form `linux/arm64`; empty if it has none.
    pub platform: String,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// A client by its session, with registries as seen by its credentials.
    pub fn new(session: SessionId, registry: kiln_registry::Client) -> Self {
        Self {
            session,
            registry,
            found: Arc::default(),
            images: Arc::default(),
        }
    }

    /// What this job's image references stand for.
    pub(crate) fn images(&self) -> &crate::source::image::ImageMemo {
        &self.images
    }

    fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A source of this job knows where these blobs can be had. What happens to them is reported to `reporter`: the vertex
    /// that named them.
    pub fn offer(&self, providers: &Providers, blobs: impl IntoIterator<Item = Digest>, reporter: &Reporter) {
        let mut found = self.found();
        found.providers = found.providers.merged(providers);
        found
            .reporters
            .extend(blobs.into_iter().map(|blob| (blob, reporter.clone())));
    }

    /// Everything the sources of this job can provide.
    pub fn providers(&self) -> Providers {
        self.found().providers.clone()
    }

    /// Who reports on a blob.
    pub fn reporter_of(&self, blob: &Digest) -> Option<Reporter> {
        self.found().reporters.get(blob).cloned()
    }

    /// Remembers what a source stood for.
    pub fn pin(&self, vertex: VertexDigest, pin: Pin) {
        self.found().pins.insert(vertex, pin);
    }

    /// What the sources of this job stood for, by vertex.
    pub fn pins(&self) -> BTreeMap<VertexDigest, Pin> {
        self.found().pins.clone()
    }
}

/// What all clients that wait for an operation can provide.
pub(crate) fn providers_of(clients: &[Arc<Client>]) -> Providers {
    clients
        .iter()
        .fold(Providers::default(), |all, client| all.merged(&client.providers()))
}
