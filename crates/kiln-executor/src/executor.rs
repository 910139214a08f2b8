//! The executor trait: start one process as a spec says, get a handle; the handle's drop kills it.

use std::any::Any;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::ExecError;
use crate::spec::{JoinSpec, ProcessSpec, TerminalSize};
use crate::stubs::Stub;

/// A boxed future, so that the traits here can be used as `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Runs processes. Namespaces are the first back end; a microVM or gVisor may follow without callers noticing.
pub trait Executor: Send + Sync + 'static {
    /// Starts a process; returns once it has been executed, or with what kept it from that.
    ///
    /// `held` is dropped only when the process tree is dead and reaped, on a thread where blocking is allowed: put the handles
    /// of snapshots, cache mounts and sockets there (an `Arc` clone where the caller needs them back), so that a cancelled
    /// step never writes into a directory that is already someone else's.
    ///
    /// Dropping the returned future before it is ready kills what was started.
    fn start(&self, spec: ProcessSpec, io: ProcessIo, held: Held) -> BoxFuture<'_, Result<Process, ExecError>>;

    /// Starts a process and waits for its end. Dropping the future kills the process tree; the reaper collects it.
    ///
    /// A non-zero exit is not an error here: the caller knows which codes are valid.
    fn run(&self, spec: ProcessSpec, io: ProcessIo, held: Held) -> BoxFuture<'_, Result<ExitReport, ExecError>> {
        Box::pin(async move { self.start(spec, io, held).await?.wait().await })
    }
}

/// What must live as long as the process: see [`Executor::start`].
#[derive(Default)]
pub struct Held(#[allow(dead_code, reason = "held for its drop")] Option<Box<dyn Any + Send>>);

impl Held {
    /// Nothing to hold.
    pub fn nothing() -> Self {
        Held(None)
    }

    /// Holds `value` until the process is reaped.
    pub fn new(value: impl Any + Send) -> Self {
        Held(Some(Box::new(value)))
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Held")
    }
}

/// The standard streams of a process.
#[derive(Debug, Default)]
pub struct ProcessIo {
    /// What the process reads.
    pub stdin: Input,
    /// Where its output goes. With a terminal everything arrives here and `stderr` is unused.
    pub stdout: Output,
    /// Where its errors go.
    pub stderr: Output,
}

impl ProcessIo {
    /// Empty input, both outputs into bounded channels: a slow reader slows the process, memory stays flat.
    pub fn channels(stdout: mpsc::Sender<Bytes>, stderr: mpsc::Sender<Bytes>) -> Self {
        ProcessIo {
            stdin: Input::Null,
            stdout: Output::Channel(stdout),
            stderr: Output::Channel(stderr),
        }
    }
}

/// Source of standard input.
#[derive(Debug, Default)]
pub enum Input {
    /// `/dev/null`.
    #[default]
    Null,
    /// A descriptor the process gets as it is.
    Fd(OwnedFd),
    /// Chunks; the end of the channel is the end of input.
    Channel(mpsc::Receiver<Bytes>),
}

/// Destination of an output stream.
#[derive(Debug, Default)]
pub enum Output {
    /// `/dev/null`.
    #[default]
    Null,
    /// A descriptor the process gets as it is.
    Fd(OwnedFd),
    /// Chunks of at most 64 KiB. When the receiver is gone the output is read and thrown away.
    Channel(mpsc::Sender<Bytes>),
}

/// A running process. Drop kills its whole tree (pid namespace) with SIGKILL and leaves the rest to the reaper.
pub struct Process {
    control: Box<dyn ProcessControl>,
}

/// What a back end provides for a running process; dropping it must kill the process.
pub trait ProcessControl: Send + Sync {
    /// Completes when the process is dead, reaped, and its output delivered. Called once.
    fn wait(&mut self) -> BoxFuture<'_, Result<ExitReport, ExecError>>;
    /// Sends a signal to the process (not to its tree).
    fn signal(&self, signal: Signal) -> Result<(), ExecError>;
    /// Changes the size of its terminal.
    fn resize(&self, size: TerminalSize) -> Result<(), ExecError>;
    /// Runs a further process in the same surroundings; it ends with this one at the latest.
    fn join(&self, spec: JoinSpec, io: ProcessIo) -> BoxFuture<'_, Result<Process, ExecError>>;
    /// Time from the call of `start` to `execve(2)`.
    fn launch_time(&self) -> Duration;
}

impl Process {
    /// For back ends.
    pub fn new(control: Box<dyn ProcessControl>) -> Self {
        Process { control }
    }

    /// Waits for the end of the process and of its output.
    pub async fn wait(mut self) -> Result<ExitReport, ExecError> {
        self.control.wait().await
    }

    /// As [`Process::wait`], without giving the handle up; a second call fails.
    pub async fn wait_mut(&mut self) -> Result<ExitReport, ExecError> {
        self.control.wait().await
    }

    /// Sends a signal to the process. An ended process is [`ExecError::Ended`].
    pub fn signal(&self, signal: Signal) -> Result<(), ExecError> {
        self.control.signal(signal)
    }

    /// Changes the size of the terminal; without one [`ExecError::NoTerminal`].
    pub fn resize(&self, size: TerminalSize) -> Result<(), ExecError> {
        self.control.resize(size)
    }

    /// Runs a further process in the same namespaces, root and cgroup.
    pub async fn join(&self, spec: JoinSpec, io: ProcessIo) -> Result<Process, ExecError> {
        self.control.join(spec, io).await
    }

    /// Time from the call of `start` to `execve(2)`.
    pub fn launch_time(&self) -> Duration {
        self.control.launch_time()
    }
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Process")
    }
}

/// A signal by its Linux number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signal(pub(crate) i32);

impl Signal {
    /// SIGKILL.
    pub const KILL: Signal = Signal(9);
    /// SIGTERM.
    pub const TERM: Signal = Signal(15);
    /// SIGINT.
    pub const INT: Signal = Signal(2);

    /// Reads `SIGTERM`, `term`, or a number from 1 to 64.
    pub fn parse(text: &str) -> Option<Signal> {
        if let Ok(number) = text.parse::<i32>() {
            return (1..=64).contains(&number).then_some(Signal(number));
        }
        let upper = text.to_ascii_uppercase();
        let name = if upper.starts_with("SIG") {
            upper
        } else {
            format!("SIG{upper}")
        };
        name.parse::<nix::sys::signal::Signal>().ok().map(|s| Signal(s as i32))
    }

    /// The number.
    pub fn number(self) -> i32 {
        self.0
    }
}

/// How a process ended.
#[derive(Debug, Clone)]
pub struct ExitReport {
    /// Exit status; 128 + signal number when a signal ended it.
    pub exit_code: u32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The kernel killed a process of the tree because memory ran out.
    pub oom_killed: bool,
    /// What it used, as far as the host's cgroups tell.
    pub usage: Usage,
    /// When `execve` was about to happen.
    pub started: SystemTime,
    /// When the end was seen.
    pub finished: SystemTime,
    /// Mount targets that did not exist before; see [`clean_stubs`](crate::clean_stubs).
    pub stubs: Vec<Stub>,
    /// Owner of the process inside the root.
    pub uid: u32,
    /// Group of the process inside the root.
    pub gid: u32,
}

/// Resources a process tree used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Highest memory use in bytes.
    pub peak_memory: Option<u64>,
    /// User CPU time.
    pub cpu_user: Duration,
    /// System CPU time.
    pub cpu_system: Duration,
    /// CPU time of the whole tree as the cgroup counted it; `None` without a CPU controller.
    pub cpu_total: Option<Duration>,
    /// Bytes read from block devices.
    pub io_read: Option<u64>,
    /// Bytes written to block devices.
    pub io_written: Option<u64>,
    /// Highest number of tasks.
    pub peak_pids: Option<u64>,
}
