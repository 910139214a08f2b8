//! `Job`: one build, as the solver sees it: its vertices, its client, its view of the progress.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_llb::{Edge, Graph, OutputIndex, Vertex, VertexDigest};
use kiln_oci::Digest;
use tokio_util::sync::CancellationToken;

use crate::cache::{RecordVersion, Tenant};
use crate::cache_key::{KeyId, RecordOutput};
use crate::error::{SolveError, WorkerError as _};
use crate::flight::Lazy;
use crate::op::{CacheMap, Op, Worker};
use crate::progress::{JobProgress, VertexProgress};
use crate::solver::{Solver, SolverInner};

/// Names a job: what clients call the build's ref.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(Arc<str>);

impl JobId {
    /// A job by name.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// Its name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a job is made of.
pub struct JobSpec<W: Worker> {
    /// Its name.
    pub id: JobId,
    /// Whose it is.
    pub tenant: Tenant,
    /// What it brings along for its operations.
    pub client: Arc<W::Client>,
}

impl<W: Worker> fmt::Debug for JobSpec<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobSpec")
            .field("id", &self.id)
            .field("tenant", &self.tenant)
            .finish_non_exhaustive()
    }
}

/// The value of an edge and where it comes from.
pub struct Solved<W: Worker> {
    /// The value.
    pub value: W::Ref,
    /// Its identity in the cache, for cache exporters; records there lead on to the inputs.
    pub record: RecordOutput,
    /// Which run of the record it is.
    pub run: RecordVersion,
}

impl<W: Worker> Clone for Solved<W> {
    fn clone(&self) -> Self {
        Self {
            value: self.value.clone(),
            record: self.record,
            run: self.run,
        }
    }
}

impl<W: Worker> fmt::Debug for Solved<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Solved")
            .field("record", &self.record)
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}

/// One build. Keeps the values and errors of its vertices until it ends, so that nothing runs twice in it. Ends when the
/// last handle is dropped: whatever nobody else waits for is given up.
pub struct Job<W: Worker> {
    inner: Arc<JobInner<W>>,
    _end: Option<Arc<End<W>>>,
}

impl<W: Worker> Clone for Job<W> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            _end: self._end.clone(),
        }
    }
}

impl<W: Worker> fmt::Debug for Job<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({})", self.inner.id)
    }
}

struct End<W: Worker>(Arc<JobInner<W>>);

impl<W: Worker> Drop for End<W> {
    fn drop(&mut self) {
        self.0.canceled.cancel();
        self.0.progress.finish();
        // Values are let go now, and not when the last task of the job has noticed.
        let nodes = std::mem::take(&mut *self.0.nodes.lock().unwrap_or_else(PoisonError::into_inner));
        drop(nodes);
    }
}

pub(crate) struct JobInner<W: Worker> {
    pub(crate) solver: Arc<SolverInner<W>>,
    id: JobId,
    pub(crate) tenant: Tenant,
    pub(crate) client: Arc<W::Client>,
    pub(crate) progress: Arc<JobProgress>,
    pub(crate) canceled: CancellationToken,
    nodes: Mutex<Nodes<W>>,
    /// Content digests found out in this job; those of stored records are remembered longer by the cache.
    pub(crate) contents: Mutex<Contents>,
}

/// Content digests by run, output and selector.
type Contents = HashMap<(RecordVersion, OutputIndex, Option<Digest>), Digest>;

/// Something about a vertex that is found out once.
type Once<W, T> = Arc<Lazy<Result<T, SolveError<<W as Worker>::Error>>>>;

struct Nodes<W: Worker> {
    list: Vec<Arc<Node<W>>>,
    index: HashMap<(VertexDigest, bool), NodeId>,
}

impl<W: Worker> Default for Nodes<W> {
    fn default() -> Self {
        Self {
            list: Vec::new(),
            index: HashMap::new(),
        }
    }
}

/// Position of a vertex in its job. Inputs are named by it rather than owned, so that a chain of any length is let go
/// without recursion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NodeId(usize);

/// A vertex of a job and what is known about it.
pub(crate) struct Node<W: Worker> {
    pub(crate) vertex: Arc<Vertex>,
    pub(crate) inputs: Vec<(NodeId, OutputIndex)>,
    pub(crate) map: Once<W, Mapped<W>>,
    pub(crate) key: Once<W, Option<KeyId>>,
    pub(crate) value: Once<W, Outcome<W>>,
}

/// An operation and what its keys are made of.
pub(crate) struct Mapped<W: Worker> {
    pub(crate) op: Arc<dyn Op<W>>,
    pub(crate) map: Arc<CacheMap>,
}

impl<W: Worker> Clone for Mapped<W> {
    fn clone(&self) -> Self {
        Self {
            op: Arc::clone(&self.op),
            map: Arc::clone(&self.map),
        }
    }
}

/// The value of a vertex.
pub(crate) struct Outcome<W: Worker> {
    pub(crate) outputs: Arc<[W::Ref]>,
    pub(crate) run: RecordVersion,
    /// Consumers may look for older work that was made with this record.
    pub(crate) trusted: bool,
    /// The record's id means nothing after this build.
    pub(crate) volatile: bool,
}

impl<W: Worker> Clone for Outcome<W> {
    fn clone(&self) -> Self {
        Self {
            outputs: Arc::clone(&self.outputs),
            run: self.run,
            trusted: self.trusted,
            volatile: self.volatile,
        }
    }
}

impl<W: Worker> Job<W> {
    pub(crate) fn new(solver: &Solver<W>, spec: JobSpec<W>) -> Self {
        let inner = Arc::new(JobInner {
            solver: Arc::clone(&solver.inner),
            id: spec.id,
            tenant: spec.tenant,
            client: spec.client,
            progress: JobProgress::new(Arc::clone(&solver.inner.spool)),
            canceled: CancellationToken::new(),
            nodes: Mutex::default(),
            contents: Mutex::default(),
        });
        Self {
            _end: Some(Arc::new(End(Arc::clone(&inner)))),
            inner,
        }
    }

    /// A handle that does not keep the job from ending.
    pub(crate) fn borrowed(inner: Arc<JobInner<W>>) -> Self {
        Self { inner, _end: None }
    }

    /// Its name.
    pub fn id(&self) -> &JobId {
        &self.inner.id
    }

    /// Whose it is.
    pub fn tenant(&self) -> &Tenant {
        &self.inner.tenant
    }

    /// What it brought along.
    pub fn client(&self) -> &Arc<W::Client> {
        &self.inner.client
    }

    /// What happens in it, and the place to report what else happens, such as exports.
    pub fn progress(&self) -> &Arc<JobProgress> {
        &self.inner.progress
    }

    /// Ends everything that runs for it and every call that waits. Values it has are kept until its handles are gone.
    pub fn cancel(&self) {
        self.inner.canceled.cancel();
    }

    /// Becomes canceled with the job.
    pub fn canceled(&self) -> &CancellationToken {
        &self.inner.canceled
    }

    /// The value of an edge of `graph`. Dropping the future gives up what was started for it and nobody else waits for.
    pub async fn result(&self, graph: &Graph, edge: Edge) -> Result<Solved<W>, SolveError<W::Error>> {
        let node = self.inner.load(graph, edge.vertex)?;
        let outcome = self.or_canceled(edge, self.inner.value(node)).await?;
        let Some(value) = outcome.outputs.get(edge.output as usize) else {
            let message = format!("vertex {} has no output {}", edge.vertex, edge.output);
            return Err(SolveError::new(edge.vertex, W::Error::internal(message)));
        };
        let record = RecordOutput {
            record: outcome.run.record,
            output: edge.output,
        };
        Ok(Solved {
            value: value.clone(),
            record,
            run: outcome.run,
        })
    }

    /// The identity of an edge, if it can be told without making anything.
    pub async fn key(&self, graph: &Graph, edge: Edge) -> Result<Option<RecordOutput>, SolveError<W::Error>> {
        let node = self.inner.load(graph, edge.vertex)?;
        let key = self.or_canceled(edge, self.inner.key(node)).await?;
        Ok(key.map(|record| RecordOutput {
            record,
            output: edge.output,
        }))
    }

    /// The value of an edge turned out to be gone after the solver gave it out (nobody can provide its blobs any more):
    /// forgets it and makes it again.
    pub async fn result_again(
        &self,
        graph: &Graph,
        edge: Edge,
        lost: RecordVersion,
    ) -> Result<Solved<W>, SolveError<W::Error>> {
        let node = self.inner.load(graph, edge.vertex)?;
        self.inner.lose(node, lost).await;
        self.result(graph, edge).await
    }

    async fn or_canceled<T>(
        &self,
        edge: Edge,
        work: impl Future<Output = Result<T, SolveError<W::Error>>>,
    ) -> Result<T, SolveError<W::Error>> {
        tokio::select! {
            biased;
            () = self.inner.canceled.cancelled() => Err(SolveError::new(edge.vertex, W::Error::canceled())),
            outcome = work => outcome,
        }
    }
}

impl<W: Worker> JobInner<W> {
    pub(crate) fn node(&self, id: NodeId) -> Option<Arc<Node<W>>> {
        self.nodes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .list
            .get(id.0)
            .cloned()
    }

    /// Makes the vertices that `root` reaches known, inputs first, and announces those that are new.
    fn load(&self, graph: &Graph, root: VertexDigest) -> Result<NodeId, SolveError<W::Error>> {
        let mut new = Vec::new();
        let id = {
            let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
            nodes.load(graph, root, &mut new)?
        };
        for vertex in new {
            let mut inputs: Vec<VertexDigest> = Vec::new();
            for input in &vertex.inputs {
                if !inputs.contains(&input.vertex) {
                    inputs.push(input.vertex);
                }
            }
            let mut state = VertexProgress::new(vertex.digest, vertex.name(), inputs);
            state.group.clone_from(&vertex.metadata.progress_group);
            self.progress.announce(state);
        }
        Ok(id)
    }
}

impl<W: Worker> Nodes<W> {
    fn known(&self, vertex: &Vertex) -> Option<NodeId> {
        // Who may look in the cache may also use what is made anew on purpose, but not the reverse.
        self.index
            .get(&(vertex.digest, true))
            .or_else(|| {
                self.index
                    .get(&(vertex.digest, false))
                    .filter(|_| !vertex.metadata.ignore_cache)
            })
            .copied()
    }

    fn load(
        &mut self,
        graph: &Graph,
        root: VertexDigest,
        new: &mut Vec<Arc<Vertex>>,
    ) -> Result<NodeId, SolveError<W::Error>> {
        let vertex_of = |digest: VertexDigest| {
            graph.vertex(&digest).ok_or_else(|| {
                SolveError::new(
                    root,
                    W::Error::internal(format!("vertex {digest} is not part of the graph")),
                )
            })
        };
        let mut stack = vec![(vertex_of(root)?, false)];
        while let Some((vertex, inputs_done)) = stack.pop() {
            if self.known(vertex).is_some() {
                continue;
            }
            if !inputs_done {
                stack.push((vertex, true));
                for input in vertex.inputs.iter().rev() {
                    stack.push((vertex_of(input.vertex)?, false));
                }
                continue;
            }
            let mut inputs = Vec::with_capacity(vertex.inputs.len());
            for input in &vertex.inputs {
                if let Some(id) = self.known(vertex_of(input.vertex)?) {
                    inputs.push((id, input.output));
                }
            }
            let id = NodeId(self.list.len());
            self.list.push(Arc::new(Node {
                vertex: Arc::clone(vertex),
                inputs,
                map: Lazy::new(),
                key: Lazy::new(),
                value: Lazy::new(),
            }));
            self.index.insert((vertex.digest, vertex.metadata.ignore_cache), id);
            new.push(Arc::clone(vertex));
        }
        self.known(vertex_of(root)?)
            .ok_or_else(|| SolveError::new(root, W::Error::internal(format!("vertex {root} was not loaded"))))
    }
}
