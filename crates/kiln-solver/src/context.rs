//! `OpContext`: what an operation may use while it is keyed or carried out.

use std::sync::{Arc, Mutex, PoisonError};

use kiln_llb::{Graph, Vertex};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::cache::Tenant;
use crate::error::SolveError;
use crate::flight::{TeardownGuard, WeakTeardown};
use crate::job::{Job, JobInner};
use crate::op::Worker;
use crate::reporter::{AttachId, Reporter};

/// What an operation may use while it is keyed or carried out. Cheap to clone.
pub struct OpContext<W: Worker> {
    inner: Arc<Inner<W>>,
}

struct Inner<W: Worker> {
    vertex: Arc<Vertex>,
    tenant: Tenant,
    reporter: Reporter,
    jobs: Mutex<Vec<(AttachId, Arc<JobInner<W>>)>>,
    permits: Option<Arc<Semaphore>>,
    teardown: Option<WeakTeardown>,
    canceled: CancellationToken,
}

impl<W: Worker> Clone for OpContext<W> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<W: Worker> std::fmt::Debug for OpContext<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpContext({:?})", self.inner.vertex.digest)
    }
}

/// The right to use the machine, as long as it is held.
#[derive(Debug)]
pub struct Permit {
    _held: Option<OwnedSemaphorePermit>,
}

impl<W: Worker> OpContext<W> {
    pub(crate) fn new(
        vertex: Arc<Vertex>,
        tenant: Tenant,
        reporter: Reporter,
        permits: Option<Arc<Semaphore>>,
        teardown: Option<WeakTeardown>,
        canceled: CancellationToken,
    ) -> Self {
        let jobs = Mutex::new(Vec::new());
        Self {
            inner: Arc::new(Inner {
                vertex,
                tenant,
                reporter,
                jobs,
                permits,
                teardown,
                canceled,
            }),
        }
    }

    /// The vertex that is worked on. Several jobs may know the same work under other digests; this is the starter's.
    pub fn vertex(&self) -> &Arc<Vertex> {
        &self.inner.vertex
    }

    /// Whose work it is.
    pub fn tenant(&self) -> &Tenant {
        &self.inner.tenant
    }

    /// Where the work reports to.
    pub fn progress(&self) -> &Reporter {
        &self.inner.reporter
    }

    /// The clients of all jobs that wait for this work at the moment; ask again after a while, they come and go. The
    /// starter's, while it waits, comes first.
    pub fn clients(&self) -> Vec<Arc<W::Client>> {
        self.jobs().iter().map(|j| Arc::clone(&j.client)).collect()
    }

    fn jobs(&self) -> Vec<Arc<JobInner<W>>> {
        let jobs = self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.iter().map(|(_, job)| Arc::clone(job)).collect()
    }

    /// Whether this vertex was asked to ignore the cache. An exec then starts with empty cache mounts.
    pub fn ignores_cache(&self) -> bool {
        self.inner.vertex.metadata.ignore_cache
    }

    /// Waits for the right to run a process, change files or transfer data, of which the daemon gives out as many as
    /// `max-parallelism` says. Taken last, after all other waits; never held while waiting for another edge.
    pub async fn permit(&self) -> Permit {
        let held = match &self.inner.permits {
            // The semaphore is never closed.
            Some(permits) => Arc::clone(permits).acquire_owned().await.ok(),
            None => None,
        };
        Permit { _held: held }
    }

    /// Becomes canceled when nobody waits any more. The future is dropped at the same time, so only work on other threads
    /// needs this.
    pub fn canceled(&self) -> &CancellationToken {
        &self.inner.canceled
    }

    /// A guard for what may outlive the future: as long as it is held, the same work does not start again. `None` where
    /// the work is not shared.
    pub fn teardown(&self) -> Option<TeardownGuard> {
        self.inner.teardown.as_ref().and_then(WeakTeardown::upgrade)
    }

    /// Solves a further graph on behalf of the first job that waits for this work. The caller must hold no permit.
    pub async fn solve(&self, graph: &Graph) -> Result<Option<W::Ref>, SolveError<W::Error>> {
        use crate::error::WorkerError as _;
        let Some(job) = self.jobs().into_iter().next() else {
            return Err(SolveError::new(self.inner.vertex.digest, W::Error::canceled()));
        };
        let Some(root) = graph.root() else { return Ok(None) };
        Ok(Some(Job::borrowed(job).result(graph, root).await?.value))
    }

    pub(crate) fn attach(
        &self,
        job: &Arc<JobInner<W>>,
        vertex: kiln_llb::VertexDigest,
        starter: bool,
    ) -> Attachment<W> {
        let id = self.inner.reporter.attach(&job.progress, vertex, starter);
        self.inner
            .jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((id, Arc::clone(job)));
        Attachment { cx: self.clone(), id }
    }
}

/// A job's place at a context: its client can be asked, and it sees the progress. Dropping it leaves.
pub(crate) struct Attachment<W: Worker> {
    cx: OpContext<W>,
    id: AttachId,
}

impl<W: Worker> Drop for Attachment<W> {
    fn drop(&mut self) {
        self.cx
            .inner
            .jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(id, _)| *id != self.id);
        self.cx.inner.reporter.detach(self.id);
    }
}
