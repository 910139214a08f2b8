//! The traits a worker implements: how an operation is keyed and carried out.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_llb::Vertex;
use kiln_oci::Digest;

use crate::cache_key::OpDigest;
pub use crate::context::OpContext;
use crate::error::WorkerError;

/// Carries out operations. The solver knows results, errors and clients only by these types.
pub trait Worker: Send + Sync + Sized + 'static {
    /// A result: immutable, cheap to clone, keeps what it stands for alive as long as it exists.
    type Ref: Clone + Send + Sync + 'static;
    /// What can go wrong.
    type Error: WorkerError;
    /// What a job brings along for its operations: sessions, entitlements, policy.
    type Client: Send + Sync + 'static;

    /// The operation behind a vertex. Checks what can be checked without I/O.
    fn op(&self, vertex: &Arc<Vertex>) -> Result<Arc<dyn Op<Self>>, Self::Error>;
}

/// One operation: how it is keyed, and how it is carried out.
///
/// The value that answered [`cache_map`](Self::cache_map) also serves the other calls, of this job and of any other that
/// waited for the same answer, so it may keep what it found out.
///
/// All three methods are cancelled by dropping the future. Work on other threads that outlives the future must hold a
/// [`OpContext::teardown`] guard, so that the same work does not start again before it is over.
#[async_trait]
pub trait Op<W: Worker>: Send + Sync {
    /// What the operation's keys are made of. For operations with inputs this must not perform I/O; sources find out here
    /// what they stand for at the moment (image digest, commit). Only sources show as running meanwhile.
    async fn cache_map(&self, cx: &OpContext<W>) -> Result<CacheMap, W::Error>;

    /// Digest of what input `input` holds at the paths that [`Dep::selector`] names, for inputs with [`Dep::content`].
    /// Must be a function of the input's bytes alone.
    async fn content_digest(
        &self,
        input: usize,
        value: &W::Ref,
        cx: &OpContext<W>,
    ) -> Result<Digest, ExecFailure<W::Error>>;

    /// Carries the operation out and returns one result for each of the vertex's outputs. `inputs` are the values of the
    /// vertex's inputs in their order.
    ///
    /// Waits for exclusive things (locked cache mounts, all at once and in sorted order) come first, then
    /// [`OpContext::permit`], then the work.
    async fn exec(&self, inputs: &[W::Ref], cx: &OpContext<W>) -> Result<Vec<W::Ref>, ExecFailure<W::Error>>;
}

/// What an operation's keys are made of.
#[derive(Clone, Debug, Default)]
pub struct CacheMap {
    /// Digests of the operation without its inputs; every one of them identifies it. The last is canonical. An image has
    /// two, by manifest and by layer chain; everything else has one.
    pub keys: Vec<OpDigest>,
    /// The text the canonical digest was taken over; kept with the record to explain misses. May be empty.
    pub subject: String,
    /// One entry for each input of the vertex.
    pub deps: Vec<Dep>,
    /// The operation stands for something without lasting identity, such as a client's directory: `keys` tell it apart
    /// within a session only and are never stored.
    pub transient: bool,
}

/// How an operation depends on one of its inputs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dep {
    /// Which part of the input is used, as a digest over paths; part of keys by identity.
    pub selector: Option<Digest>,
    /// Whether only what the input holds at these paths can matter, so that equal content is equal work.
    pub content: bool,
}

/// Why [`Op::exec`] or [`Op::content_digest`] gave no result.
#[derive(Debug)]
pub enum ExecFailure<E> {
    /// The value of the input at this position exists no longer (its blobs vanished and nobody can provide them). The
    /// solver forgets its record, makes it again and asks again.
    InputLost(usize),
    /// The operation failed.
    Failed(E),
}

impl<E> From<E> for ExecFailure<E> {
    fn from(error: E) -> Self {
        Self::Failed(error)
    }
}
