//! `Reporter`: what happens in one piece of work, told to every job that waits for it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use kiln_llb::VertexDigest;

use crate::progress::{JobProgress, LogProgress, LogStream, StatusProgress, Warning};
use crate::spool::{LogFile, LogSpool};

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
