//! `Solver`: what all jobs of a daemon share: worker, cache, permits, and the tables of work in flight.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_llb::{LinuxResources, OutputIndex, VertexDigest};
use kiln_oci::{Digest, Hasher};
use tokio::sync::Semaphore;

use crate::cache::{CacheStore, Hit, RecordVersion, Save, Tenant};
use crate::cache_key::{KeyId, LinkId};
use crate::context::OpContext;
use crate::error::SolveError;
use crate::flight::Flights;
use crate::job::{Job, JobSpec, Mapped};
use crate::op::Worker;
use crate::spool::{LogSpool, MemorySpool};

/// How a solver behaves.
#[derive(Clone)]
pub struct SolverOptions {
    /// How many operations may run processes, change files or transfer data at the same time; `None` is no limit.
    pub max_parallelism: Option<usize>,
    /// Where the output of steps is kept.
    pub spool: Arc<dyn LogSpool>,
}

impl Default for SolverOptions {
    fn default() -> Self {
        Self {
            max_parallelism: None,
            spool: Arc::new(MemorySpool),
        }
    }
}

impl fmt::Debug for SolverOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SolverOptions")
            .field("max_parallelism", &self.max_parallelism)
            .finish_non_exhaustive()
    }
}

/// Finds the value of edges, each computed once, cached, shared and cancellable. Cheap to clone.
pub struct Solver<W: Worker> {
    pub(crate) inner: Arc<SolverInner<W>>,
}

impl<W: Worker> Clone for Solver<W> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<W: Worker> fmt::Debug for Solver<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Solver")
    }
}

/// Work of a vertex that is shared by its digest: finding out what a source stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MapId {
    pub(crate) tenant: Tenant,
    pub(crate) vertex: VertexDigest,
}

/// A content digest that is being computed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ContentId {
    pub(crate) tenant: Tenant,
    pub(crate) of: RecordVersion,
    pub(crate) output: OutputIndex,
    pub(crate) selector: Option<Digest>,
}

/// What makes two runs the same run: the key, what the inputs used as a whole really are, the limits, and whether the
/// cache may be asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RunId {
    pub(crate) tenant: Tenant,
    pub(crate) key: KeyId,
    pub(crate) inputs: Digest,
    pub(crate) ignores_cache: bool,
}

impl RunId {
    /// Hashes the runs that the inputs used by identity come from, and the limits of the process.
    pub(crate) fn surroundings(inputs: impl Iterator<Item = RecordVersion>, limits: Option<&LinuxResources>) -> Digest {
        let mut h = Hasher::new();
        for input in inputs {
            h.update(input.record.0.as_bytes());
            h.update(input.version.to_be_bytes());
        }
        if let Some(limits) = limits {
            h.update(format!("{limits:?}"));
        }
        h.finish()
    }
}

/// What a run gave.
pub(crate) struct Ran<R> {
    pub(crate) outputs: Arc<[R]>,
    pub(crate) run: RecordVersion,
    /// The record was there after all.
    pub(crate) hit: bool,
    /// Made anew on purpose, or on top of something that was: consumers must not find older work by identity.
    pub(crate) fresh: bool,
}

impl<R> Clone for Ran<R> {
    fn clone(&self) -> Self {
        Self {
            outputs: Arc::clone(&self.outputs),
            run: self.run,
            hit: self.hit,
            fresh: self.fresh,
        }
    }
}

/// Why a run gave nothing.
pub(crate) enum RunFailure<E> {
    /// This input's value is gone. All who share the run made their inputs from the same records.
    InputLost(usize),
    Failed(SolveError<E>),
}

impl<E> Clone for RunFailure<E> {
    fn clone(&self) -> Self {
        match self {
            Self::InputLost(input) => Self::InputLost(*input),
            Self::Failed(error) => Self::Failed(error.clone()),
        }
    }
}

type Error<W> = <W as Worker>::Error;
type Map<W> = Result<Mapped<W>, SolveError<Error<W>>>;
type Content<W> = Result<Digest, RunFailure<Error<W>>>;
type RunOf<W> = Result<Ran<<W as Worker>::Ref>, RunFailure<Error<W>>>;

/// A table of work under ids of kind `K`.
type Table<W, K, T> = Arc<Flights<K, OpContext<W>, T>>;

pub(crate) struct SolverInner<W: Worker> {
    pub(crate) worker: W,
    pub(crate) cache: Arc<dyn CacheStore<W::Ref>>,
    pub(crate) permits: Option<Arc<Semaphore>>,
    pub(crate) spool: Arc<dyn LogSpool>,
    pub(crate) maps: Table<W, MapId, Map<W>>,
    pub(crate) contents: Table<W, ContentId, Content<W>>,
    pub(crate) runs: Table<W, RunId, RunOf<W>>,
    unsaved: AtomicU64,
}

impl<W: Worker> Solver<W> {
    /// A solver that works with `worker` and remembers in `cache`.
    pub fn new(worker: W, cache: Arc<dyn CacheStore<W::Ref>>, options: SolverOptions) -> Self {
        Self {
            inner: Arc::new(SolverInner {
                worker,
                cache,
                permits: options.max_parallelism.map(|n| Arc::new(Semaphore::new(n.max(1)))),
                spool: options.spool,
                maps: Flights::new(),
                contents: Flights::new(),
                runs: Flights::new(),
                unsaved: AtomicU64::new(0),
            }),
        }
    }

    /// A new job. It ends when its last handle is dropped, or with [`Job::cancel`].
    pub fn job(&self, spec: JobSpec<W>) -> Job<W> {
        Job::new(self, spec)
    }

    /// The worker.
    pub fn worker(&self) -> &W {
        &self.inner.worker
    }

    /// What is remembered between builds.
    pub fn cache(&self) -> &Arc<dyn CacheStore<W::Ref>> {
        &self.inner.cache
    }

    /// Number of pieces of work in flight, given-up ones that are not over yet included.
    pub fn in_flight(&self) -> usize {
        self.inner.maps.len() + self.inner.contents.len() + self.inner.runs.len()
    }
}

impl<W: Worker> SolverInner<W> {
    /// The identity of a result that is not stored: a version that no store ever gives out.
    pub(crate) fn unsaved(&self, record: KeyId) -> RecordVersion {
        RecordVersion {
            record,
            version: u64::MAX - self.unsaved.fetch_add(1, Ordering::Relaxed),
        }
    }

    pub(crate) async fn find(&self, tenant: &Tenant, key: KeyId) -> Option<Hit<W::Ref>> {
        or_nothing(self.cache.find(tenant, key).await)
    }

    pub(crate) async fn resolve_key(&self, tenant: &Tenant, key: KeyId) -> Option<KeyId> {
        or_nothing(self.cache.resolve(tenant, key).await)
    }

    pub(crate) async fn content(
        &self,
        tenant: &Tenant,
        record: KeyId,
        output: OutputIndex,
        selector: Option<Digest>,
    ) -> Option<(RecordVersion, Digest)> {
        or_nothing(self.cache.content(tenant, record, output, selector).await)
    }

    pub(crate) async fn linked(&self, tenant: &Tenant, link: LinkId) -> bool {
        or_nothing(self.cache.linked(tenant, link).await)
    }

    pub(crate) async fn forget(&self, tenant: &Tenant, run: RecordVersion) {
        or_nothing(self.cache.forget(tenant, run).await);
    }

    pub(crate) async fn learn(&self, tenant: &Tenant, save: Save<W::Ref>) {
        if let Err(error) = self.cache.save(tenant, save).await {
            tracing::warn!(%error, "what was learned about a record is lost");
        }
    }
}

/// A cache that cannot answer has nothing.
fn or_nothing<T: Default>(answer: Result<T, crate::cache::CacheError>) -> T {
    answer.unwrap_or_else(|error| {
        tracing::warn!(%error, "the cache could not be asked");
        T::default()
    })
}
