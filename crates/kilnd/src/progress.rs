//! From the solver's progress events to the messages clients watch, through the spool of the build.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use kiln_llb::VertexDigest;
use kiln_llb::wire::{range_to_proto, source_info_to_proto};
use kiln_proto::control::{StatusResponse, Vertex, VertexLog, VertexStatus, VertexWarning};
use kiln_proto::{Timestamp, llb as pb};
use kiln_solver::progress::{JobProgress, LogStream, ProgressEvent, StatusProgress, VertexProgress, Warning};

use crate::spool::SpoolWriter;

/// A message is closed when its logs reach this size, so that it stays far below what a client accepts.
const LOG_BYTES: usize = 1 << 20;

/// What a build record says about its steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCounts {
    /// Distinct vertices.
    pub total: i32,
    /// Of these, found in the cache.
    pub cached: i32,
    /// Of these, completed.
    pub completed: i32,
    /// Warnings.
    pub warnings: i32,
}

/// Counts as they are at the moment; shared between the recorder and who asks.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    vertices: HashMap<VertexDigest, (bool, bool)>,
    warned: HashSet<(Option<VertexDigest>, String)>,
}

impl Counter {
    /// The counts so far.
    pub fn steps(&self) -> StepCounts {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |f: &dyn Fn(&(bool, bool)) -> bool| {
            i32::try_from(counts.vertices.values().filter(|v| f(v)).count()).unwrap_or(i32::MAX)
        };
        StepCounts {
            total: count(&|_| true),
            cached: count(&|(cached, _)| *cached),
            completed: count(&|(_, completed)| *completed),
            warnings: i32::try_from(counts.warned.len()).unwrap_or(i32::MAX),
        }
    }

    fn see(&self, event: &ProgressEvent) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            ProgressEvent::Vertex(v) => {
                counts.vertices.insert(v.digest, (v.cached, v.completed.is_some()));
            }
            ProgressEvent::Warning(w) => {
                counts.warned.insert((w.vertex, w.short.clone()));
            }
            ProgressEvent::Status(_) | ProgressEvent::Log(_) => {}
        }
    }
}

/// Writes everything that happens in a job to its spool until the job is over. The spool ends when this returns.
pub async fn record(progress: Arc<JobProgress>, mut spool: SpoolWriter, counter: Counter) -> io::Result<()> {
    let mut reader = progress.subscribe();
    while let Some(events) = reader.next().await {
        let mut message = StatusResponse::default();
        let mut log_bytes = 0;
        for event in &events {
            counter.see(event);
            match event.as_ref() {
                ProgressEvent::Vertex(v) => message.vertexes.push(vertex(v)),
                ProgressEvent::Status(s) => message.statuses.push(status(s)),
                ProgressEvent::Warning(w) => message.warnings.push(warning(w)),
                ProgressEvent::Log(log) => {
                    let msg = log.read()?;
                    log_bytes += msg.len();
                    message.logs.push(VertexLog {
                        vertex: log.vertex.to_string(),
                        timestamp: Some(timestamp(log.timestamp)),
                        stream: match log.stream {
                            LogStream::Stdout => 1,
                            LogStream::Stderr => 2,
                        },
                        msg,
                    });
                    if log_bytes >= LOG_BYTES {
                        spool.append(&std::mem::take(&mut message))?;
                        log_bytes = 0;
                    }
                }
            }
        }
        if message != StatusResponse::default() {
            spool.append(&message)?;
        }
    }
    Ok(())
}

fn vertex(v: &VertexProgress) -> Vertex {
    Vertex {
        digest: v.digest.to_string(),
        inputs: v.inputs.iter().map(ToString::to_string).collect(),
        name: v.name.clone(),
        cached: v.cached,
        started: v.started.map(timestamp),
        completed: v.completed.map(timestamp),
        error: v.error.clone().unwrap_or_default(),
        progress_group: v.group.as_ref().map(|g| pb::ProgressGroup {
            id: g.id.clone(),
            name: g.name.clone(),
            weak: g.weak,
        }),
    }
}

fn status(s: &StatusProgress) -> VertexStatus {
    VertexStatus {
        id: s.id.to_string(),
        vertex: s.vertex.to_string(),
        name: String::new(),
        current: s.current,
        total: s.total,
        timestamp: Some(timestamp(s.timestamp)),
        started: Some(timestamp(s.started)),
        completed: s.completed.map(timestamp),
    }
}

fn warning(w: &Warning) -> VertexWarning {
    VertexWarning {
        vertex: w.vertex.map(|v| v.to_string()).unwrap_or_default(),
        level: w.level,
        short: Bytes::from(w.short.clone()),
        detail: w.detail.iter().map(|d| Bytes::from(d.clone())).collect(),
        url: w.url.clone(),
        info: w.info.as_ref().map(source_info_to_proto),
        ranges: w.ranges.iter().map(range_to_proto).collect(),
    }
}

/// A time as protobuf has it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}
