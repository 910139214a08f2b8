//! A process of the namespaces back end between `start` and its end: the task goes in, reports come back, streams are moved.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::error::{ExecError, Step};
use crate::executor::{BoxFuture, ExitReport, Held, Input, Output, Process, ProcessControl, ProcessIo, Signal};
use crate::parent::{Core, Ended, Inner, Job, Launched, What, null};
use crate::protocol::{Failure, Host, Report, Task, frame, monotonic_ns, recv_with_fds, take_frame};
use crate::spec::{JoinSpec, ProcessSpec, TerminalSize};
use crate::stubs::Stub;

const CHUNK: usize = 64 * 1024;

/// Kills on drop.
struct KillGuard {
    core: Arc<Core>,
    id: u64,
}

impl Drop for KillGuard {
    fn drop(&mut self) {
        self.core.kill(self.id);
    }
}

/// A process that has been asked for.
pub(crate) struct Starting {
    inner: Arc<Inner>,
    guard: KillGuard,
    ended: oneshot::Receiver<Result<Ended, ExecError>>,
    reply: oneshot::Receiver<Result<Launched, ExecError>>,
    streams: Streams,
}

/// The daemon's ends of a process's streams.
#[derive(Default)]
struct Streams {
    stdin: Option<(mpsc::Receiver<Bytes>, Option<OwnedFd>)>,
    stdout: Option<(mpsc::Sender<Bytes>, Option<OwnedFd>)>,
    stderr: Option<(mpsc::Sender<Bytes>, OwnedFd)>,
}

/// A process that runs.
pub(crate) struct Running {
    inner: Arc<Inner>,
    guard: KillGuard,
    ended: Option<oneshot::Receiver<Result<Ended, ExecError>>>,
    pumps: Vec<JoinHandle<()>>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    started: SystemTime,
    launch_time: Duration,
    stubs: Vec<Stub>,
    uid: u32,
    gid: u32,
}

fn stream_failed(e: impl Into<io::Error>) -> ExecError {
    ExecError::Launcher {
        attempt: "make the standard streams".to_owned(),
        source: e.into(),
    }
}

impl Starting {
    /// Makes the streams and hands the process to the launching thread.
    pub(crate) fn new(inner: &Arc<Inner>, what: What, io: ProcessIo, tty: bool, held: Held) -> Result<Self, ExecError> {
        let mut streams = Streams::default();
        let make = || pipe_with(PipeFlags::CLOEXEC).map_err(stream_failed);
        let stdin = match io.stdin {
            Input::Null => null()?,
            Input::Fd(fd) => fd,
            Input::Channel(channel) if tty => {
                streams.stdin = Some((channel, None));
                null()?
            }
            Input::Channel(channel) => {
                let (read, write) = make()?;
                streams.stdin = Some((channel, Some(write)));
                read
            }
        };
        let stdout = match io.stdout {
            Output::Null => null()?,
            Output::Fd(fd) => fd,
            Output::Channel(channel) if tty => {
                streams.stdout = Some((channel, None));
                null()?
            }
            Output::Channel(channel) => {
                let (read, write) = make()?;
                streams.stdout = Some((channel, Some(read)));
                write
            }
        };
        let stderr = match io.stderr {
            Output::Fd(fd) => fd,
            Output::Channel(channel) if !tty => {
                let (read, write) = make()?;
                streams.stderr = Some((channel, read));
                write
            }
            _ => null()?,
        };
        let (id, ended) = inner.core.register(held);
        let guard = KillGuard {
            core: Arc::clone(&inner.core),
            id,
        };
        let (sender, reply) = oneshot::channel();
        inner.submit(Job {
            id,
            what,
            stdin,
            stdout,
            stderr,
            reply: sender,
        })?;
        Ok(Starting {
            inner: Arc::clone(inner),
            guard,
            ended,
            reply,
            streams,
        })
    }

    /// Gives the child its specification and waits until it executes.
    pub(crate) async fn run(self, spec: ProcessSpec, begun: u64) -> Result<Running, ExecError> {
        self.hand_over(|host| Task::Run(Box::new(spec), host), begun).await
    }

    /// As [`run`](Self::run), for a further process of surroundings that exist.
    pub(crate) async fn join(self, spec: JoinSpec, begun: u64) -> Result<Running, ExecError> {
        self.hand_over(|host| Task::Join(Box::new(spec), host), begun).await
    }

    async fn hand_over(self, task: impl FnOnce(Host) -> Task, begun: u64) -> Result<Running, ExecError> {
        let Starting {
            inner,
            guard,
            mut ended,
            reply,
            streams,
        } = self;
        let launched = reply.await.map_err(|_| ExecError::Launcher {
            attempt: "launch a process".to_owned(),
            source: io::Error::other("the launching thread has ended"),
        })??;
        let talk = |source| ExecError::Launcher {
            attempt: "talk to a new process".to_owned(),
            source,
        };
        let control = nonblocking(launched.control).map_err(talk)?;
        let message = frame(&task(launched.host)).map_err(talk)?;
        // A child that is dead already says why in its exit; a report may still be there to be read.
        let sent = send_all(&control, &message).await;
        if let Err(e) = sent {
            tracing::debug!("task for a new process: {e}");
        }
        let Answer {
            ready,
            failure,
            terminal,
        } = read_reports(&control).await.map_err(talk)?;
        if let Some(Failure { step, errno, detail }) = failure {
            // Whoever gets the error may count on everything being released.
            let _ = (&mut ended).await;
            return Err(ExecError::Setup { step, errno, detail });
        }
        let Some(Ready { at_ns, stubs, uid, gid }) = ready else {
            let detail = match (&mut ended).await {
                Ok(Err(e)) => return Err(e),
                Ok(Ok(end)) if end.oom => "out of memory: the limit leaves no room to start".to_owned(),
                Ok(Ok(Ended {
                    status: Err(signal), ..
                })) => format!("ended by signal {signal} while setting up"),
                _ => "ended while setting up".to_owned(),
            };
            return Err(ExecError::Setup {
                step: Step::Spec,
                errno: 0,
                detail,
            });
        };
        let since = Duration::from_nanos(monotonic_ns().saturating_sub(at_ns));
        let terminal = terminal
            .map(nonblocking)
            .transpose()
            .map_err(stream_failed)?
            .map(Arc::new);
        let pumps = streams.pump(terminal.as_ref())?;
        Ok(Running {
            inner,
            guard,
            ended: Some(ended),
            pumps,
            terminal,
            started: SystemTime::now().checked_sub(since).unwrap_or_else(SystemTime::now),
            launch_time: Duration::from_nanos(at_ns.saturating_sub(begun)),
            stubs,
            uid,
            gid,
        })
    }
}

impl Streams {
    fn pump(self, terminal: Option<&Arc<AsyncFd<OwnedFd>>>) -> Result<Vec<JoinHandle<()>>, ExecError> {
        let mut outputs = Vec::new();
        if let Some((channel, fd)) = self.stdin {
            match (fd, terminal) {
                (Some(fd), _) => {
                    let pipe = pipe::Sender::from_owned_fd(fd).map_err(stream_failed)?;
                    tokio::spawn(pump_in(channel, pipe));
                }
                (None, Some(terminal)) => {
                    tokio::spawn(pump_terminal_in(channel, Arc::clone(terminal)));
                }
                (None, None) => {}
            }
        }
        if let Some((channel, fd)) = self.stdout {
            match (fd, terminal) {
                (Some(fd), _) => {
                    let pipe = pipe::Receiver::from_owned_fd(fd).map_err(stream_failed)?;
                    outputs.push(tokio::spawn(pump_out(pipe, channel)));
                }
                (None, Some(terminal)) => outputs.push(tokio::spawn(pump_terminal_out(Arc::clone(terminal), channel))),
                (None, None) => {}
            }
        }
        if let Some((channel, fd)) = self.stderr {
            let pipe = pipe::Receiver::from_owned_fd(fd).map_err(stream_failed)?;
            outputs.push(tokio::spawn(pump_out(pipe, channel)));
        }
        Ok(outputs)
    }
}

/// Moves output; what nobody wants is read and dropped, so that the process does not hang.
async fn pump_out(mut pipe: pipe::Receiver, channel: mpsc::Sender<Bytes>) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK / 4);
        let mut limited = (&mut pipe).take(CHUNK as u64);
        match limited.read_buf(&mut buffer).await {
            Ok(0) => return,
            Ok(_) => {
                let _ = channel.send(buffer.split().freeze()).await;
            }
            Err(e) => {
                tracing::debug!("output of a process: {e}");
                return;
            }
        }
    }
}

async fn pump_in(mut channel: mpsc::Receiver<Bytes>, mut pipe: pipe::Sender) {
    while let Some(bytes) = channel.recv().await {
        // The process may close its input whenever it likes.
        if pipe.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn pump_terminal_out(terminal: Arc<AsyncFd<OwnedFd>>, channel: mpsc::Sender<Bytes>) {
    let mut buffer = vec![0; CHUNK / 4];
    loop {
        let read = terminal
            .async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut buffer[..])?))
            .await;
        match read {
            // A terminal nobody has open gives EIO instead of an end.
            Ok(0) | Err(_) => return,
            Ok(n) => {
                let _ = channel
                    .send(Bytes::copy_from_slice(buffer.get(..n).unwrap_or_default()))
                    .await;
            }
        }
    }
}

async fn pump_terminal_in(mut channel: mpsc::Receiver<Bytes>, terminal: Arc<AsyncFd<OwnedFd>>) {
    while let Some(mut bytes) = channel.recv().await {
        while !bytes.is_empty() {
            match terminal
                .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, &bytes)?))
                .await
            {
                Ok(n) => drop(bytes.split_to(n)),
                Err(_) => return,
            }
        }
    }
}

fn nonblocking(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    crate::sys::watch(fd)
}

async fn send_all(control: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    use rustix::net::{SendFlags, send};
    while !bytes.is_empty() {
        let n = control
            .async_io(Interest::WRITABLE, |fd| Ok(send(fd, bytes, SendFlags::NOSIGNAL)?))
            .await?;
        bytes = bytes.get(n..).unwrap_or_default();
    }
    Ok(())
}

struct Ready {
    at_ns: u64,
    stubs: Vec<Stub>,
    uid: u32,
    gid: u32,
}

#[derive(Default)]
struct Answer {
    ready: Option<Ready>,
    failure: Option<Failure>,
    terminal: Option<OwnedFd>,
}

/// Reads until the child executes (which closes its end) or dies.
async fn read_reports(control: &AsyncFd<OwnedFd>) -> io::Result<Answer> {
    let mut answer = Answer::default();
    let mut pending = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let received = control
            .async_io(Interest::READABLE, |fd| recv_with_fds(fd, &mut buffer))
            .await;
        let (n, fds) = match received {
            // It died with our task unread.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => (0, Vec::new()),
            other => other?,
        };
        if let Some(fd) = fds.into_iter().next() {
            answer.terminal = Some(fd);
        }
        if n == 0 {
            return Ok(answer);
        }
        pending.extend_from_slice(buffer.get(..n).unwrap_or_default());
        while let Some(report) = take_frame(&mut pending)? {
            match report {
                Report::Terminal => {}
                Report::Ready { at_ns, stubs, uid, gid } => answer.ready = Some(Ready { at_ns, stubs, uid, gid }),
                Report::Failed(failure) => answer.failure = Some(failure),
            }
        }
    }
}

impl ProcessControl for Running {
    fn wait(&mut self) -> BoxFuture<'_, Result<ExitReport, ExecError>> {
        Box::pin(async move {
            let ended = self.ended.as_mut().ok_or(ExecError::Ended)?;
            let end = ended.await.map_err(|_| ExecError::Ended);
            self.ended = None;
            let end = end??;
            let finished = SystemTime::now();
            for pump in self.pumps.drain(..) {
                if let Err(e) = pump.await {
                    tracing::warn!("output of a process: {e}");
                }
            }
            let (exit_code, signal) = match end.status {
                Ok(code) => (u32::from(code), None),
                Err(signal) => (128 + signal.unsigned_abs(), Some(signal)),
            };
            Ok(ExitReport {
                exit_code,
                signal,
                oom_killed: end.oom,
                usage: end.usage,
                started: self.started,
                finished,
                stubs: std::mem::take(&mut self.stubs),
                uid: self.uid,
                gid: self.gid,
            })
        })
    }

    fn signal(&self, signal: Signal) -> Result<(), ExecError> {
        self.guard.core.signal(self.guard.id, signal)
    }

    fn resize(&self, size: TerminalSize) -> Result<(), ExecError> {
        let terminal = self.terminal.as_ref().ok_or(ExecError::NoTerminal)?;
        let size = rustix::termios::Winsize {
            ws_row: size.rows,
            ws_col: size.cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(terminal.get_ref(), size).map_err(|_| ExecError::Ended)
    }

    fn join(&self, spec: JoinSpec, io: ProcessIo) -> BoxFuture<'_, Result<Process, ExecError>> {
        let begun = monotonic_ns();
        Box::pin(async move {
            if spec.args.is_empty() {
                return Err(ExecError::Invalid("no program".to_owned()));
            }
            let what = What::Join { running: self.guard.id };
            let starting = Starting::new(&self.inner, what, io, spec.tty.is_some(), Held::nothing())?;
            let running = starting.join(spec, begun).await?;
            Ok(Process::new(Box::new(running)))
        })
    }

    fn launch_time(&self) -> Duration {
        self.launch_time
    }
}
