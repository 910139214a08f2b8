//! A worker that computes with strings: what the solver is tested with.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "a test; each binary uses a part of it"
)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use kiln_llb::op::{Op as LlbOp, PassthroughOp};
use kiln_llb::wire::{encode_op, encode_terminal};
use kiln_llb::{Definition, Edge, Graph, OpMetadata, Vertex, vertex_digest};
use kiln_oci::Digest;
use kiln_solver::{
    CacheMap, CacheStore, Dep, ErrorKind, ExecFailure, Job, JobId, JobSpec, MemoryCache, Op, OpContext, OpDigest,
    Solver, SolverOptions, Tenant, Worker, WorkerError,
};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

/// What a vertex does. Travels as the id of a passthrough operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TestOp {
    pub name: String,
    /// Another variant is another operation.
    pub variant: u32,
    /// For each input, whether it is used by content.
    pub by_content: Vec<bool>,
    /// Every run gives another value.
    pub varies: bool,
    /// The content is the same whatever the variant, the inputs and the run.
    pub coarse: bool,
    /// Has no lasting identity.
    pub transient: bool,
    /// A further operation digest, as images have.
    pub second_key: Option<String>,
    /// Makes otherwise equal vertices have different digests.
    pub salt: u32,
}

pub fn op(name: &str) -> TestOp {
    TestOp {
        name: name.into(),
        ..TestOp::default()
    }
}

/// Builds graphs bottom up.
#[derive(Default)]
pub struct GraphBuilder {
    ops: Vec<bytes::Bytes>,
    metadata: BTreeMap<kiln_llb::VertexDigest, OpMetadata>,
}

impl GraphBuilder {
    pub fn add(&mut self, op: &TestOp, inputs: &[Edge]) -> Edge {
        self.add_with(op, inputs, false)
    }

    pub fn add_with(&mut self, op: &TestOp, inputs: &[Edge], ignore_cache: bool) -> Edge {
        self.add_full(
            op,
            inputs,
            1,
            OpMetadata {
                ignore_cache,
                ..OpMetadata::default()
            },
        )
    }

    pub fn add_full(&mut self, op: &TestOp, inputs: &[Edge], outputs: usize, mut metadata: OpMetadata) -> Edge {
        let id = serde_json::to_string(op).unwrap();
        let llb = LlbOp::Passthrough(PassthroughOp {
            id,
            outputs: vec![-1; outputs],
        });
        let bytes = encode_op(&llb, inputs, None, &[]);
        let vertex = vertex_digest(&bytes);
        metadata.description.insert("llb.customname".into(), op.name.clone());
        self.ops.push(bytes);
        self.metadata.insert(vertex, metadata);
        Edge { vertex, output: 0 }
    }

    pub fn graph(&self, root: Edge) -> Graph {
        let mut ops = self.ops.clone();
        ops.push(encode_terminal(&root));
        let definition = Definition {
            ops,
            metadata: self.metadata.clone(),
            ..Definition::default()
        };
        Graph::load(&definition).unwrap()
    }
}

/// A result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub text: String,
    pub content: String,
    /// The run that made it.
    pub run: u64,
}

#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct TestError {
    pub kind: ErrorKind,
    pub personal: bool,
    pub message: String,
}

impl WorkerError for TestError {
    fn kind(&self) -> ErrorKind {
        self.kind
    }
    fn is_personal(&self) -> bool {
        self.personal
    }
    fn canceled() -> Self {
        Self {
            kind: ErrorKind::Canceled,
            personal: false,
            message: "context canceled".into(),
        }
    }
    fn internal(message: String) -> Self {
        Self {
            kind: ErrorKind::Internal,
            personal: false,
            message,
        }
    }
}

/// How a name behaves beyond computing.
#[derive(Clone, Default)]
pub struct Behavior {
    /// Each run takes one permit before it ends.
    pub gate: Option<Arc<Semaphore>>,
    pub error: Option<(ErrorKind, &'static str)>,
    /// Fails unless a client of this name waits.
    pub needs_client: Option<&'static str>,
    /// This many runs find the input at this position lost.
    pub loses: Option<(usize, Arc<AtomicU64>)>,
    pub panics: bool,
    /// Kept by the teardown of a given-up run until a permit comes.
    pub slow_teardown: Option<Arc<Semaphore>>,
    pub log: Option<&'static str>,
}

#[derive(Default)]
pub struct Shared {
    pub behaviors: Mutex<HashMap<String, Behavior>>,
    /// Names in the order their runs began, and those that ended.
    pub begun: Mutex<Vec<String>>,
    pub ended: Mutex<Vec<String>>,
    pub keyed: Mutex<Vec<String>>,
    /// Work that runs right now, to see that nothing runs twice at the same time.
    running: Mutex<HashSet<String>>,
    pub doubled: Mutex<Vec<String>>,
    pub runs: AtomicU64,
    pub changed: tokio::sync::Notify,
}

impl Shared {
    pub fn behave(&self, name: &str, behavior: Behavior) {
        self.behaviors.lock().unwrap().insert(name.into(), behavior);
    }

    pub fn begun(&self, name: &str) -> usize {
        self.begun.lock().unwrap().iter().filter(|n| *n == name).count()
    }

    pub fn take_begun(&self) -> Vec<String> {
        let mut names = std::mem::take(&mut *self.begun.lock().unwrap());
        names.sort();
        names
    }

    /// Waits until `name` has begun `count` runs.
    pub async fn until_begun(&self, name: &str, count: usize) {
        loop {
            let changed = self.changed.notified();
            if self.begun(name) >= count {
                return;
            }
            changed.await;
        }
    }
}

#[derive(Clone, Default)]
pub struct TestWorker(pub Arc<Shared>);

pub struct TestVertex {
    op: TestOp,
    inputs: usize,
    outputs: u32,
    shared: Arc<Shared>,
}

impl Worker for TestWorker {
    type Ref = Value;
    type Error = TestError;
    type Client = String;

    fn op(&self, vertex: &Arc<Vertex>) -> Result<Arc<dyn Op<Self>>, TestError> {
        let LlbOp::Passthrough(p) = &vertex.op else {
            return Err(TestError::internal("not a test".into()));
        };
        let op: TestOp = serde_json::from_str(&p.id).map_err(|e| TestError::internal(e.to_string()))?;
        let (inputs, outputs) = (vertex.inputs.len(), vertex.outputs());
        Ok(Arc::new(TestVertex {
            op,
            inputs,
            outputs,
            shared: Arc::clone(&self.0),
        }))
    }
}

impl TestVertex {
    fn behavior(&self) -> Behavior {
        self.shared
            .behaviors
            .lock()
            .unwrap()
            .get(&self.op.name)
            .cloned()
            .unwrap_or_default()
    }

    fn by_content(&self, input: usize) -> bool {
        self.op.by_content.get(input).copied().unwrap_or(false)
    }
}

pub fn content_digest(value: &Value) -> Digest {
    Digest::of(&value.content)
}

/// What an operation makes of its inputs.
pub fn compute(op: &TestOp, inputs: &[Value], run: u64) -> Value {
    let parts: Vec<&str> = inputs
        .iter()
        .enumerate()
        .map(|(i, v)| {
            if op.by_content.get(i).copied().unwrap_or(false) {
                v.content.as_str()
            } else {
                v.text.as_str()
            }
        })
        .collect();
    let varying = if op.varies { format!("#{run}") } else { String::new() };
    let text = format!("{}.{}{varying}({})", op.name, op.variant, parts.join(" "));
    let content = if op.coarse {
        format!("<{}>", op.name)
    } else {
        format!("<{text}>")
    };
    Value { text, content, run }
}

struct RunningGuard {
    shared: Arc<Shared>,
    what: String,
}

impl Drop for RunningGuard {
    fn drop(&mut self) {
        self.shared.running.lock().unwrap().remove(&self.what);
    }
}

#[async_trait]
impl Op<TestWorker> for TestVertex {
    async fn cache_map(&self, _cx: &OpContext<TestWorker>) -> Result<CacheMap, TestError> {
        self.shared.keyed.lock().unwrap().push(self.op.name.clone());
        let identity = format!("{}.{} {:?}", self.op.name, self.op.variant, self.op.by_content);
        let mut keys = vec![OpDigest(Digest::of(&identity))];
        if let Some(second) = &self.op.second_key {
            keys.push(OpDigest(Digest::of(second)));
        }
        let deps = (0..self.inputs)
            .map(|i| Dep {
                selector: None,
                content: self.by_content(i),
            })
            .collect();
        tokio::task::yield_now().await;
        Ok(CacheMap {
            keys,
            subject: identity,
            deps,
            transient: self.op.transient,
        })
    }

    async fn content_digest(
        &self,
        input: usize,
        value: &Value,
        _cx: &OpContext<TestWorker>,
    ) -> Result<Digest, ExecFailure<TestError>> {
        assert!(self.by_content(input));
        tokio::task::yield_now().await;
        Ok(content_digest(value))
    }

    async fn exec(&self, inputs: &[Value], cx: &OpContext<TestWorker>) -> Result<Vec<Value>, ExecFailure<TestError>> {
        let behavior = self.behavior();
        let _permit = cx.permit().await;
        if let Some((input, times)) = &behavior.loses
            && times
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                .is_ok()
        {
            return Err(ExecFailure::InputLost(*input));
        }
        let texts: Vec<String> = inputs
            .iter()
            .enumerate()
            .map(|(i, v)| {
                if self.by_content(i) {
                    v.content.clone()
                } else {
                    format!("{} of run {}", v.text, v.run)
                }
            })
            .collect();
        // Who ignores the cache does not join who may use it.
        let what = format!("{}.{} {texts:?} {}", self.op.name, self.op.variant, cx.ignores_cache());
        if !self.shared.running.lock().unwrap().insert(what.clone()) {
            self.shared.doubled.lock().unwrap().push(what.clone());
        }
        let running = RunningGuard {
            shared: Arc::clone(&self.shared),
            what,
        };
        struct Teardown(Option<(Arc<Semaphore>, kiln_solver::TeardownGuard, RunningGuard)>);
        impl Drop for Teardown {
            fn drop(&mut self) {
                if let Some((gate, guard, running)) = self.0.take() {
                    tokio::spawn(async move {
                        gate.acquire().await.unwrap().forget();
                        drop(running);
                        drop(guard);
                    });
                }
            }
        }
        let mut running = Some(running);
        let mut teardown = Teardown(
            behavior
                .slow_teardown
                .map(|g| (g, cx.teardown().unwrap(), running.take().unwrap())),
        );
        self.shared.begun.lock().unwrap().push(self.op.name.clone());
        self.shared.changed.notify_waiters();
        let run = self.shared.runs.fetch_add(1, Ordering::SeqCst);
        if let Some(text) = behavior.log {
            cx.progress()
                .log(kiln_solver::LogStream::Stdout, text.as_bytes())
                .unwrap();
        }
        match &behavior.gate {
            Some(gate) => gate.acquire().await.unwrap().forget(),
            None => tokio::task::yield_now().await,
        }
        assert!(!behavior.panics, "on purpose");
        if let Some((kind, message)) = behavior.error {
            return Err(TestError {
                kind,
                personal: false,
                message: message.into(),
            }
            .into());
        }
        if let Some(name) = behavior.needs_client
            && !cx.clients().iter().any(|c| c.as_str() == name)
        {
            let message = format!("no session of {name}");
            return Err(TestError {
                kind: ErrorKind::Unavailable,
                personal: true,
                message,
            }
            .into());
        }
        let value = compute(&self.op, inputs, run);
        self.shared.ended.lock().unwrap().push(self.op.name.clone());
        teardown.0 = None;
        drop(running);
        Ok((0..self.outputs)
            .map(|n| {
                if n == 0 {
                    value.clone()
                } else {
                    Value {
                        text: format!("{}@{n}", value.text),
                        ..value.clone()
                    }
                }
            })
            .collect())
    }
}

pub struct Lab {
    pub worker: Arc<Shared>,
    pub cache: Arc<MemoryCache<Value>>,
    pub solver: Solver<TestWorker>,
    jobs: AtomicU64,
}

impl Lab {
    pub fn new() -> Self {
        Self::with(SolverOptions::default())
    }

    pub fn with(options: SolverOptions) -> Self {
        let worker = TestWorker::default();
        let cache = Arc::new(MemoryCache::new());
        let store: Arc<dyn CacheStore<Value>> = Arc::clone(&cache) as _;
        Self {
            worker: Arc::clone(&worker.0),
            cache,
            solver: Solver::new(worker, store, options),
            jobs: AtomicU64::new(0),
        }
    }

    pub fn job(&self) -> Job<TestWorker> {
        self.job_of("client", Tenant::default())
    }

    pub fn job_of(&self, client: &str, tenant: Tenant) -> Job<TestWorker> {
        let n = self.jobs.fetch_add(1, Ordering::Relaxed);
        self.solver.job(JobSpec {
            id: JobId::new(format!("job-{n}")),
            tenant,
            client: Arc::new(client.to_owned()),
        })
    }

    /// One build of one edge.
    pub async fn build(&self, graph: &Graph) -> Result<String, String> {
        let job = self.job();
        let result = job.result(graph, graph.root().unwrap()).await;
        result.map(|r| r.value.text).map_err(|e| e.to_string())
    }

    pub async fn until_idle(&self) {
        while self.solver.in_flight() > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(
            *self.worker.doubled.lock().unwrap(),
            Vec::<String>::new(),
            "ran twice at the same time"
        );
    }
}
