//! The progress hub: what happened to each vertex of a job, in order, for everybody who watches it, now or later.
//!
//! A [`JobProgress`] is the view of one job: an ordered list of events that any number of readers follow from its start.
//! A [`Reporter`] is the view of one piece of work: it may serve several jobs at once, each of which sees the work under
//! its own vertex, and a job that joins late is told what it has missed. Lifecycle events are small and never wait; the
//! bytes of logs are written to a [spool](crate::spool) by the one who produces them, and events only point at them.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use kiln_llb::{ProgressGroup, SourceInfo, SourceRange, VertexDigest};
use tokio::sync::watch;

use crate::reporter::Reporter;
use crate::spool::{LogFile, LogSpool};

/// Something that happened in a job.
#[derive(Clone, Debug)]
pub enum ProgressEvent {
    /// A vertex became known, started or completed. Always its full state.
    Vertex(VertexProgress),
    /// A part of a vertex's work moved on.
    Status(StatusProgress),
    /// A vertex's process wrote something.
    Log(LogProgress),
    /// Something the user should know.
    Warning(Warning),
}

/// The state of a vertex. Later states replace earlier ones.
#[derive(Clone, Debug, PartialEq)]
pub struct VertexProgress {
    /// Which vertex.
    pub digest: VertexDigest,
    /// The name shown.
    pub name: String,
    /// Vertices it works on.
    pub inputs: Vec<VertexDigest>,
    /// When it started, if it did. A vertex may start several times.
    pub started: Option<SystemTime>,
    /// When it completed, if it did since it started.
    pub completed: Option<SystemTime>,
    /// Nothing was run: the result came from the cache.
    pub cached: bool,
    /// Why it failed; ends with `context canceled` if it was given up.
    pub error: Option<String>,
    /// Vertices shown as one.
    pub group: Option<ProgressGroup>,
}

impl VertexProgress {
    /// A vertex nothing has happened to yet.
    pub fn new(digest: VertexDigest, name: impl Into<String>, inputs: Vec<VertexDigest>) -> Self {
        Self {
            digest,
            name: name.into(),
            inputs,
            started: None,
            completed: None,
            cached: false,
            error: None,
            group: None,
        }
    }
}

/// The state of a part of a vertex's work.
#[derive(Clone, Debug, PartialEq)]
pub struct StatusProgress {
    /// Which vertex.
    pub vertex: VertexDigest,
    /// The text that is shown; unique within the vertex.
    pub id: Arc<str>,
    /// Units done, bytes in most cases.
    pub current: i64,
    /// Units in all; 0 is unknown.
    pub total: i64,
    /// When this was so.
    pub timestamp: SystemTime,
    /// When it started.
    pub started: SystemTime,
    /// When it completed, if it did.
    pub completed: Option<SystemTime>,
}

/// Which of a process's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of output, kept in a spool.
#[derive(Clone)]
pub struct LogProgress {
    /// Which vertex.
    pub vertex: VertexDigest,
    /// Which output.
    pub stream: LogStream,
    /// When it was written.
    pub timestamp: SystemTime,
    pub(crate) file: Arc<dyn LogFile>,
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

impl LogProgress {
    /// Number of bytes.
    pub fn size(&self) -> usize {
        self.len
    }

    /// The bytes.
    pub fn read(&self) -> io::Result<Bytes> {
        self.file.read(self.offset, self.len)
    }
}

impl std::fmt::Debug for LogProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Log({:?}, {:?}, {} bytes)", self.vertex, self.stream, self.len)
    }
}

/// A warning about a vertex.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Warning {
    /// Which vertex it is about; set by the reporter.
    pub vertex: Option<VertexDigest>,
    /// 1 and up, the smaller the graver.
    pub level: i64,
    /// One line; not empty.
    pub short: String,
    /// More lines.
    pub detail: Vec<String>,
    /// Where to read on.
    pub url: String,
    /// The text it is about.
    pub info: Option<SourceInfo>,
    /// Where in that text.
    pub ranges: Vec<SourceRange>,
}

/// Everything that happened in one job.
pub struct JobProgress {
    view: Mutex<View>,
    changed: watch::Sender<u64>,
    spool: Arc<dyn LogSpool>,
}

#[derive(Default)]
struct View {
    /// In order. A status is replaced in place as long as nobody has read it; older states leave a gap.
    events: Vec<Option<Arc<ProgressEvent>>>,
    vertices: HashMap<VertexDigest, VertexProgress>,
    statuses: HashMap<(VertexDigest, Arc<str>), usize>,
    /// How far the fastest reader is.
    read: usize,
    closed: bool,
}

impl View {
    fn push(&mut self, event: ProgressEvent) {
        self.events.push(Some(Arc::new(event)));
    }

    fn push_vertex(&mut self, state: VertexProgress) {
        self.vertices.insert(state.digest, state.clone());
        self.push(ProgressEvent::Vertex(state));
    }

    /// Inputs that were never heard of complete as cached when somebody starts to work on them.
    fn inputs_cached(&mut self, of: VertexDigest, at: SystemTime) {
        let mut stack = vec![of];
        let mut found = Vec::new();
        let mut seen = HashSet::from([of]);
        while let Some(next) = stack.pop() {
            let inputs = self.vertices.get(&next).map(|v| v.inputs.clone()).unwrap_or_default();
            for input in inputs {
                if let Some(v) = self.vertices.get(&input)
                    && v.started.is_none()
                    && seen.insert(input)
                {
                    found.push(input);
                    stack.push(input);
                }
            }
        }
        for digest in found.into_iter().rev() {
            if let Some(v) = self.vertices.get(&digest) {
                let state = VertexProgress {
                    started: Some(at),
                    completed: Some(at),
                    cached: true,
                    error: None,
                    ..v.clone()
                };
                self.push_vertex(state);
            }
        }
    }
}

impl std::fmt::Debug for JobProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JobProgress")
    }
}

impl JobProgress {
    /// A view without events; logs of its own vertices go to `spool`.
    pub fn new(spool: Arc<dyn LogSpool>) -> Arc<Self> {
        Arc::new(Self {
            view: Mutex::default(),
            changed: watch::Sender::new(0),
            spool,
        })
    }

    fn lock(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update<T>(&self, f: impl FnOnce(&mut View) -> T) -> Option<T> {
        let out = {
            let mut view = self.lock();
            if view.closed {
                return None;
            }
            f(&mut view)
        };
        self.changed.send_modify(|n| *n += 1);
        Some(out)
    }

    /// Makes a vertex known. One that is known already keeps its state.
    pub fn announce(&self, vertex: VertexProgress) {
        self.update(|view| {
            if !view.vertices.contains_key(&vertex.digest) {
                view.push_vertex(vertex);
            }
        });
    }

    /// A vertex of this job alone, such as an export: announces it and starts it.
    pub fn vertex(self: &Arc<Self>, vertex: VertexProgress) -> Reporter {
        let digest = vertex.digest;
        self.announce(vertex);
        let reporter = Reporter::new(Arc::clone(&self.spool));
        reporter.attach(self, digest, true);
        reporter.start();
        reporter
    }

    /// The state of a vertex.
    pub fn state(&self, vertex: &VertexDigest) -> Option<VertexProgress> {
        self.lock().vertices.get(vertex).cloned()
    }

    /// All vertices that were announced, in no particular order.
    pub fn vertices(&self) -> Vec<VertexProgress> {
        self.lock().vertices.values().cloned().collect()
    }

    /// A vertex's result came from the cache: it starts and completes at once.
    pub fn cached(&self, digest: VertexDigest) {
        let now = SystemTime::now();
        self.update(|view| {
            let Some(v) = view.vertices.get(&digest) else { return };
            let state = VertexProgress {
                started: Some(now),
                completed: Some(now),
                cached: true,
                error: None,
                ..v.clone()
            };
            view.inputs_cached(digest, now);
            view.push_vertex(state);
        });
    }

    pub(crate) fn started(&self, digest: VertexDigest, at: SystemTime) {
        self.update(|view| {
            let Some(v) = view.vertices.get(&digest) else { return };
            let state = VertexProgress {
                started: Some(at),
                completed: None,
                cached: false,
                error: None,
                ..v.clone()
            };
            view.inputs_cached(digest, at);
            view.push_vertex(state);
        });
    }

    pub(crate) fn completed(&self, digest: VertexDigest, at: SystemTime, error: Option<String>) {
        self.update(|view| {
            let Some(v) = view.vertices.get(&digest) else { return };
            if v.started.is_none() || v.completed.is_some() {
                return;
            }
            let state = VertexProgress {
                completed: Some(at),
                error,
                ..v.clone()
            };
            view.push_vertex(state);
        });
    }

    pub(crate) fn status(&self, status: StatusProgress) {
        self.update(|view| {
            if !view.vertices.contains_key(&status.vertex) {
                return;
            }
            let key = (status.vertex, Arc::clone(&status.id));
            let event = Some(Arc::new(ProgressEvent::Status(status)));
            let read = view.read;
            let end = view.events.len();
            if let Some(at) = view.statuses.get_mut(&key) {
                if let Some(slot) = view.events.get_mut(*at) {
                    if *at >= read {
                        *slot = event;
                        return;
                    }
                    *slot = None;
                }
                *at = end;
            } else {
                view.statuses.insert(key, end);
            }
            view.events.push(event);
        });
    }

    pub(crate) fn log(&self, log: LogProgress) {
        self.update(|view| view.push(ProgressEvent::Log(log)));
    }

    /// A warning; without a vertex that was announced nobody would see it.
    pub fn warn(&self, warning: Warning) {
        self.update(|view| view.push(ProgressEvent::Warning(warning)));
    }

    /// The job is over: what is still running was given up. Readers reach the end.
    pub fn finish(&self) {
        let now = SystemTime::now();
        self.update(|view| {
            let open: Vec<VertexProgress> = view
                .vertices
                .values()
                .filter(|v| v.started.is_some() && v.completed.is_none())
                .cloned()
                .collect();
            for v in open {
                view.push_vertex(VertexProgress {
                    completed: Some(now),
                    error: Some("context canceled".into()),
                    ..v
                });
            }
            view.closed = true;
        });
    }

    /// Follows the job from its first event.
    pub fn subscribe(self: &Arc<Self>) -> ProgressReader {
        ProgressReader {
            progress: Arc::clone(self),
            changed: self.changed.subscribe(),
            position: 0,
        }
    }
}

/// Reads the events of a job, first those that have happened, then those that happen.
#[derive(Debug)]
pub struct ProgressReader {
    progress: Arc<JobProgress>,
    changed: watch::Receiver<u64>,
    position: usize,
}

impl ProgressReader {
    /// The next events, at least one; `None` when the job is over and everything was read. Can be dropped at any time
    /// without losing events.
    pub async fn next(&mut self) -> Option<Vec<Arc<ProgressEvent>>> {
        loop {
            self.changed.mark_unchanged();
            if let Some(events) = self.ready() {
                return if events.is_empty() { None } else { Some(events) };
            }
            if self.changed.changed().await.is_err() {
                return None;
            }
        }
    }

    /// What can be read now; empty at the end, `None` if there is nothing new yet.
    fn ready(&mut self) -> Option<Vec<Arc<ProgressEvent>>> {
        /// So that a message made of one batch stays small.
        const BATCH: usize = 512;
        let mut view = self.progress.lock();
        let mut out = Vec::new();
        while out.len() < BATCH
            && let Some(slot) = view.events.get(self.position)
        {
            self.position += 1;
            out.extend(slot.clone());
        }
        view.read = view.read.max(self.position);
        if out.is_empty() && !view.closed {
            None
        } else {
            Some(out)
        }
    }
}
