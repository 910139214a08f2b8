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
    file: Arc<dyn LogFile>,
    offset: u64,
    len: usize,
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

    fn started(&self, digest: VertexDigest, at: SystemTime) {
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

    fn completed(&self, digest: VertexDigest, at: SystemTime, error: Option<String>) {
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

    fn status(&self, status: StatusProgress) {
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

    fn log(&self, log: LogProgress) {
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

/// Reports on one piece of work to every job that waits for it. Cheap to clone.
#[derive(Clone)]
pub struct Reporter {
    inner: Arc<ReporterInner>,
}

struct ReporterInner {
    spool: Arc<dyn LogSpool>,
    state: Mutex<Topic>,
}

#[derive(Default)]
struct Topic {
    jobs: Vec<Attached>,
    next_job: u64,
    started: Option<SystemTime>,
    completed: Option<SystemTime>,
    /// Under no vertex yet: copies get the one of the job they are sent to.
    statuses: Vec<StatusProgress>,
    logs: Vec<LogProgress>,
    warnings: Vec<Warning>,
    file: Option<Arc<dyn LogFile>>,
}

struct Attached {
    id: u64,
    progress: Arc<JobProgress>,
    vertex: VertexDigest,
    starter: bool,
}

/// Stands for the vertex until a job's own is known.
const NOWHERE: VertexDigest = VertexDigest(kiln_oci::Digest::from_bytes([0; 32]));

/// One job's place at a [`Reporter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttachId(u64);

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reporter")
    }
}

impl Reporter {
    /// A reporter that nobody listens to yet.
    pub fn new(spool: Arc<dyn LogSpool>) -> Self {
        Self {
            inner: Arc::new(ReporterInner {
                spool,
                state: Mutex::default(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Topic> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `progress` see the work under `vertex`, beginning with what it has missed.
    pub(crate) fn attach(&self, progress: &Arc<JobProgress>, vertex: VertexDigest, starter: bool) -> AttachId {
        let mut topic = self.lock();
        if let Some(at) = topic.started {
            progress.started(vertex, at);
            for status in &topic.statuses {
                progress.status(StatusProgress {
                    vertex,
                    ..status.clone()
                });
            }
            for log in &topic.logs {
                progress.log(LogProgress { vertex, ..log.clone() });
            }
            for warning in &topic.warnings {
                progress.warn(Warning {
                    vertex: Some(vertex),
                    ..warning.clone()
                });
            }
            if let Some(at) = topic.completed {
                progress.completed(vertex, at, None);
            }
        }
        topic.next_job += 1;
        let id = topic.next_job;
        topic.jobs.push(Attached {
            id,
            progress: Arc::clone(progress),
            vertex,
            starter,
        });
        AttachId(id)
    }

    /// The job waits no longer. What runs is canceled as far as the job is concerned.
    pub(crate) fn detach(&self, id: AttachId) {
        let mut topic = self.lock();
        let Some(at) = topic.jobs.iter().position(|j| j.id == id.0) else {
            return;
        };
        let job = topic.jobs.swap_remove(at);
        if topic.started.is_some() && topic.completed.is_none() {
            let now = SystemTime::now();
            for status in topic.statuses.iter().filter(|s| s.completed.is_none()) {
                job.progress.status(StatusProgress {
                    vertex: job.vertex,
                    completed: Some(now),
                    timestamp: now,
                    ..status.clone()
                });
            }
            job.progress.completed(job.vertex, now, Some("context canceled".into()));
        }
    }

    /// The work begins, possibly once more.
    pub fn start(&self) {
        let now = SystemTime::now();
        let mut topic = self.lock();
        topic.started = Some(now);
        topic.completed = None;
        for job in &topic.jobs {
            job.progress.started(job.vertex, now);
        }
    }

    /// The work is over, with all its parts; `error` says why it failed.
    pub fn complete(&self, error: Option<String>) {
        self.finish(error, false);
    }

    /// Like [`complete`](Self::complete), but an error that concerns the starting job alone is shown to no other.
    pub(crate) fn finish(&self, error: Option<String>, only_starter: bool) {
        let now = SystemTime::now();
        let mut topic = self.lock();
        if topic.started.is_none() || topic.completed.is_some() {
            return;
        }
        let topic = &mut *topic;
        for status in topic.statuses.iter_mut().filter(|s| s.completed.is_none()) {
            status.completed = Some(now);
            status.timestamp = now;
            for job in &topic.jobs {
                job.progress.status(StatusProgress {
                    vertex: job.vertex,
                    ..status.clone()
                });
            }
        }
        topic.completed = Some(now);
        for job in topic.jobs.iter().filter(|j| j.starter || !only_starter) {
            job.progress.completed(job.vertex, now, error.clone());
        }
    }

    /// Reports that the work goes on after it was completed, until the guard is dropped: a lazy layer is downloaded.
    pub fn reopen(&self) -> Reopened {
        self.start();
        Reopened(self.clone())
    }

    /// A part of the work, shown as `id`. Completed when the handle is dropped.
    pub fn status(&self, id: impl Into<Arc<str>>) -> StatusHandle {
        let now = SystemTime::now();
        let status = StatusProgress {
            vertex: NOWHERE,
            id: id.into(),
            current: 0,
            total: 0,
            timestamp: now,
            started: now,
            completed: None,
        };
        self.set_status(status.clone());
        StatusHandle {
            reporter: self.clone(),
            status,
        }
    }

    fn set_status(&self, status: StatusProgress) {
        let mut topic = self.lock();
        match topic.statuses.iter_mut().find(|s| s.id == status.id) {
            Some(slot) => *slot = status.clone(),
            None => topic.statuses.push(status.clone()),
        }
        for job in &topic.jobs {
            job.progress.status(StatusProgress {
                vertex: job.vertex,
                ..status.clone()
            });
        }
    }

    /// Writes output of the step's process. Returns when it is in the spool, so a fast process is held back by the disk.
    pub fn log(&self, stream: LogStream, data: &[u8]) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let file = self.log_file()?;
        let offset = file.append(data)?;
        let log = LogProgress {
            vertex: NOWHERE,
            stream,
            timestamp: SystemTime::now(),
            file,
            offset,
            len: data.len(),
        };
        let mut topic = self.lock();
        for job in &topic.jobs {
            job.progress.log(LogProgress {
                vertex: job.vertex,
                ..log.clone()
            });
        }
        // What belongs together in the spool stays together for those who join late.
        if let Some(last) = topic.logs.last_mut()
            && last.stream == stream
            && last.offset + last.len as u64 == offset
            && last.len < 64 << 10
        {
            last.len += log.len;
        } else {
            topic.logs.push(log);
        }
        Ok(())
    }

    fn log_file(&self) -> io::Result<Arc<dyn LogFile>> {
        if let Some(file) = &self.lock().file {
            return Ok(Arc::clone(file));
        }
        let file = self.inner.spool.create()?;
        Ok(Arc::clone(self.lock().file.get_or_insert(file)))
    }

    /// Tells the user something.
    pub fn warn(&self, warning: Warning) {
        let mut topic = self.lock();
        for job in &topic.jobs {
            job.progress.warn(Warning {
                vertex: Some(job.vertex),
                ..warning.clone()
            });
        }
        topic.warnings.push(warning);
    }
}

/// Work that goes on after completion, see [`Reporter::reopen`].
#[derive(Debug)]
pub struct Reopened(Reporter);

impl Drop for Reopened {
    fn drop(&mut self) {
        self.0.complete(None);
    }
}

/// A part of a vertex's work that moves on.
#[derive(Debug)]
pub struct StatusHandle {
    reporter: Reporter,
    status: StatusProgress,
}

impl StatusHandle {
    /// Units done and, if known, in all (0 is unknown). Callers see to it that this is not called too often: bytes of a
    /// transfer every 100 ms.
    pub fn set(&mut self, current: i64, total: i64) {
        self.status.current = current;
        self.status.total = total;
        self.status.timestamp = SystemTime::now();
        self.reporter.set_status(self.status.clone());
    }
}

impl Drop for StatusHandle {
    fn drop(&mut self) {
        let now = SystemTime::now();
        self.status.timestamp = now;
        self.status.completed = Some(now);
        self.reporter.set_status(self.status.clone());
    }
}
