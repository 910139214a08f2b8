//! Progress of a build on standard error: line by line ([`plain`]) or as a display that moves ([`live`]), both fed by one
//! picture of the build ([`State`]).

mod live;
mod plain;

use std::collections::HashMap;
use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant};

use kiln_proto::Timestamp;
use kiln_proto::control::{StatusResponse, Vertex, VertexStatus};

use crate::cli::ProgressMode;

/// Shows progress in one of its forms.
pub(crate) enum Display {
    Quiet,
    Plain(plain::Plain<io::Stderr>),
    Live(Box<live::Live>),
}

impl Display {
    pub(crate) fn new(mode: ProgressMode) -> Self {
        let terminal = io::stderr().is_terminal();
        match mode {
            ProgressMode::Quiet => Display::Quiet,
            ProgressMode::Tty => Display::Live(Box::default()),
            ProgressMode::Auto if terminal => Display::Live(Box::default()),
            ProgressMode::Plain | ProgressMode::Auto => Display::Plain(plain::Plain::new(io::stderr())),
        }
    }

    /// Takes news from the daemon.
    pub(crate) fn update(&mut self, state: &mut State, news: StatusResponse) -> io::Result<()> {
        let changes = state.take(news);
        match self {
            Display::Quiet => Ok(()),
            Display::Plain(plain) => plain.show(state, &changes),
            Display::Live(live) => live.show(state, &changes),
        }
    }

    /// Called a few times a second, for what moves by itself.
    pub(crate) fn tick(&mut self, state: &State) -> io::Result<()> {
        match self {
            Display::Live(live) => live.redraw(state),
            Display::Quiet | Display::Plain(_) => Ok(()),
        }
    }

    /// The build is over.
    pub(crate) fn finish(&mut self, state: &State) -> io::Result<()> {
        match self {
            Display::Live(live) => live.finish(state),
            Display::Plain(plain) => plain.finish(state),
            Display::Quiet => Ok(()),
        }
    }
}

/// One step as the user sees it.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// Its number on the screen, given when it is first shown.
    pub(crate) number: usize,
    pub(crate) name: String,
    pub(crate) started: Option<Timestamp>,
    /// When this side first saw it running, for a clock that moves between messages.
    pub(crate) seen: Option<Instant>,
    pub(crate) completed: Option<Timestamp>,
    pub(crate) cached: bool,
    pub(crate) error: String,
    pub(crate) statuses: Vec<VertexStatus>,
    /// Log text after the last line end, and the last whole lines.
    pub(crate) partial: String,
    pub(crate) tail: Vec<String>,
}

impl Step {
    /// How long it ran, or has been running.
    pub(crate) fn elapsed(&self) -> Duration {
        match (&self.started, &self.completed) {
            (Some(started), Some(completed)) => between(started, completed),
            _ => self.seen.map(|seen| seen.elapsed()).unwrap_or_default(),
        }
    }

    /// Takes a line of output; what overwrites itself with carriage returns counts as it ends.
    fn said(&mut self, line: &str) -> String {
        let line = line.trim_end_matches(['\n', '\r']);
        let line = line.rsplit('\r').next().unwrap_or(line).to_owned();
        self.tail.push(line.clone());
        if self.tail.len() > TAIL {
            self.tail.remove(0);
        }
        line
    }

    pub(crate) fn is_running(&self) -> bool {
        self.started.is_some() && self.completed.is_none()
    }
}

/// What the build looks like so far.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) steps: Vec<Step>,
    by_digest: HashMap<String, usize>,
    shown: usize,
    pub(crate) warnings: Vec<String>,
}

/// What a message changed: indexes into [`State::steps`].
#[derive(Debug)]
pub(crate) enum Change {
    Started(usize),
    Status(usize, VertexStatus),
    /// A whole line of a step's output, and when in the step's life it came.
    Log(usize, Duration, String),
    Completed(usize),
}

impl Change {
    fn step(&self) -> usize {
        match self {
            Change::Started(index) | Change::Status(index, _) | Change::Log(index, ..) | Change::Completed(index) => {
                *index
            }
        }
    }
}

/// Lines of a running step that the moving display shows.
const TAIL: usize = 6;

impl State {
    fn take(&mut self, news: StatusResponse) -> Vec<Change> {
        let mut changes = Vec::new();
        // A step's end is told after what it said, although both may come in one message.
        let mut ended = Vec::new();
        for vertex in news.vertexes {
            self.take_vertex(vertex, &mut changes, &mut ended);
        }
        for status in news.statuses {
            let Some(&index) = self.by_digest.get(&status.vertex) else {
                continue;
            };
            let Some(step) = self.steps.get_mut(index) else {
                continue;
            };
            match step.statuses.iter_mut().find(|known| known.id == status.id) {
                Some(known) => known.clone_from(&status),
                None => step.statuses.push(status.clone()),
            }
            changes.push(Change::Status(index, status));
        }
        for log in news.logs {
            let Some(&index) = self.by_digest.get(&log.vertex) else {
                continue;
            };
            let Some(step) = self.steps.get_mut(index) else {
                continue;
            };
            let at = match (&step.started, &log.timestamp) {
                (Some(started), Some(at)) => between(started, at),
                _ => Duration::ZERO,
            };
            step.partial.push_str(&String::from_utf8_lossy(&log.msg));
            while let Some(end) = step.partial.find('\n') {
                let line: String = step.partial.drain(..=end).collect();
                changes.push(Change::Log(index, at, step.said(&line)));
            }
        }
        for index in ended {
            let Some(step) = self.steps.get_mut(index) else {
                continue;
            };
            if !step.partial.is_empty() {
                let line = std::mem::take(&mut step.partial);
                let line = step.said(&line);
                changes.push(Change::Log(index, step.elapsed(), line));
            }
            changes.push(Change::Completed(index));
        }
        for warning in news.warnings {
            self.warnings.push(String::from_utf8_lossy(&warning.short).into_owned());
        }
        // What belongs to one step is told together.
        changes.sort_by_key(Change::step);
        changes
    }

    fn take_vertex(&mut self, vertex: Vertex, changes: &mut Vec<Change>, ended: &mut Vec<usize>) {
        let index = *self.by_digest.entry(vertex.digest).or_insert_with(|| {
            self.steps.push(Step::default());
            self.steps.len() - 1
        });
        let Some(step) = self.steps.get_mut(index) else { return };
        step.name = vertex.name;
        let new_start = vertex.started.is_some() && step.started.is_none();
        // A step may complete, and start again (pushing does).
        if vertex.completed.is_some() && step.completed.is_none() {
            ended.push(index);
        }
        step.started = vertex.started.or(step.started.take());
        step.completed = vertex.completed;
        step.cached = vertex.cached;
        step.error = vertex.error;
        if new_start {
            if step.number == 0 {
                self.shown += 1;
                step.number = self.shown;
            }
            step.seen = Some(Instant::now());
            changes.push(Change::Started(index));
        }
    }

    /// Steps that were shown, and how many of them were done without work.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let shown = self.steps.iter().filter(|step| step.number > 0);
        (shown.clone().count(), shown.filter(|step| step.cached).count())
    }
}

fn between(from: &Timestamp, to: &Timestamp) -> Duration {
    let nanos = |at: &Timestamp| i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
    Duration::from_nanos(u64::try_from(nanos(to) - nanos(from)).unwrap_or(0))
}

/// Bytes as people read them.
pub(crate) fn bytes(count: i64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" {
                format!("{count}B")
            } else {
                format!("{value:.2}{unit}")
            };
        }
        value /= 1000.0;
    }
    format!("{value:.2}TB")
}

/// `1.2MB / 3.4MB`, `1.2MB` or nothing.
fn amount(status: &VertexStatus) -> String {
    match (status.current, status.total) {
        (0, 0) => String::new(),
        (current, 0) => format!(" {}", bytes(current)),
        (current, total) => format!(" {} / {}", bytes(current), bytes(total)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_proto::control::VertexLog;

    fn at(millis: i64) -> Option<Timestamp> {
        Some(Timestamp {
            seconds: millis / 1000,
            nanos: (millis % 1000) as i32 * 1_000_000,
        })
    }

    fn vertex(digest: &str, name: &str, started: Option<i64>, completed: Option<i64>) -> Vertex {
        Vertex {
            digest: digest.to_owned(),
            name: name.to_owned(),
            started: started.and_then(at),
            completed: completed.and_then(at),
            ..Vertex::default()
        }
    }

    fn log(digest: &str, millis: i64, text: &'static str) -> VertexLog {
        VertexLog {
            vertex: digest.to_owned(),
            timestamp: at(millis),
            stream: 1,
            msg: text.into(),
        }
    }

    #[test]
    fn plain_lines() {
        let mut out = Vec::new();
        let mut plain = plain::Plain::new(&mut out);
        let mut state = State::default();
        let mut failed = vertex("b", "[2/2] RUN false", Some(2000), Some(2500));
        failed.error = "exit code: 1".to_owned();
        let messages = [
            StatusResponse {
                vertexes: vec![
                    vertex("a", "[1/2] FROM base", None, None),
                    vertex("b", "[2/2] RUN false", None, None),
                ],
                ..StatusResponse::default()
            },
            StatusResponse {
                vertexes: vec![vertex("a", "[1/2] FROM base", Some(1000), None)],
                logs: vec![
                    log("a", 1100, "one\ntw"),
                    log("a", 1200, "o\n"),
                    log("unknown", 0, "lost\n"),
                ],
                ..StatusResponse::default()
            },
            StatusResponse {
                vertexes: vec![vertex("a", "[1/2] FROM base", Some(1000), Some(2000)), failed],
                logs: vec![log("b", 2250, "progress\rno newline")],
                ..StatusResponse::default()
            },
        ];
        for message in messages {
            let changes = state.take(message);
            plain.show(&state, &changes).unwrap();
        }
        plain.finish(&state).unwrap();
        let expected = "#1 [1/2] FROM base\n#1 0.100 one\n#1 0.200 two\n#1 DONE 1.0s\n\n#2 [2/2] RUN false\n#2 0.500 no newline\n#2 ERROR: exit code: 1\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        assert_eq!(state.counts(), (2, 0));
    }

    #[test]
    fn sizes() {
        assert_eq!(
            (bytes(12), bytes(1500), bytes(2_000_000)),
            ("12B".to_owned(), "1.50kB".to_owned(), "2.00MB".to_owned())
        );
    }
}
