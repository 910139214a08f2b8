//! A daemon of kiln's own: started when needed, shared by commands that run at the same time, stopped by the last one.
//! Its state lies in the user's data directory, so caches survive.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_proto::control::InfoRequest;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::connect::Daemon;
use crate::error::{CliError, Result};

/// How long a daemon may take to come up (it may have a state directory to check) and to go.
const PATIENCE: Duration = Duration::from_secs(30);

/// The use of the user's own daemon. [`LocalDaemon::release`] stops it, if nobody else uses it.
#[derive(Debug)]
pub(crate) struct LocalDaemon {
    dir: PathBuf,
    /// Shared lock of everyone who uses the daemon.
    users: File,
    /// The daemon, if this process started it.
    child: Option<Child>,
}

impl LocalDaemon {
    /// Finds the user's daemon running or starts it.
    pub(crate) async fn acquire(config: Option<&Path>) -> Result<(Self, Daemon)> {
        let dir = data_dir()?;
        let failed = |error| CliError::io(format!("use {}", dir.display()), error);
        std::fs::create_dir_all(dir.join("state")).map_err(failed)?;
        let change = lock(&dir.join("change.lock"), FlockOperation::LockExclusive)
            .await
            .map_err(failed)?;
        let socket = dir.join("kilnd.sock");
        let address = format!("unix://{}", socket.display());
        let mut child = None;
        let daemon = match Daemon::connect(&address).await {
            Ok(daemon) => daemon,
            Err(_) => {
                let started = child.insert(start(&dir, &address, config)?);
                wait_until_up(&dir, &address, started).await?
            }
        };
        let users = lock(&dir.join("users.lock"), FlockOperation::LockShared)
            .await
            .map_err(failed)?;
        drop(change);
        Ok((LocalDaemon { dir, users, child }, daemon))
    }

    /// Gives the daemon up; the last one to do so stops it.
    pub(crate) async fn release(mut self) -> Result<()> {
        let dir = self.dir.clone();
        let failed = |error| CliError::io(format!("use {}", dir.display()), error);
        let _change = lock(&dir.join("change.lock"), FlockOperation::LockExclusive)
            .await
            .map_err(failed)?;
        if flock(&self.users, FlockOperation::NonBlockingLockExclusive).is_err() {
            // Somebody else still builds. It stops the daemon when it is done.
            return Ok(());
        }
        let Some(pid) = running_pid(&dir) else { return Ok(()) };
        let _gone = kill_process(pid, Signal::TERM);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let ended = match &mut self.child {
                Some(child) if child.id() == pid.as_raw_nonzero().get().unsigned_abs() => {
                    !matches!(child.try_wait(), Ok(None))
                }
                _ => test_kill_process(pid).is_err(),
            };
            if ended {
                let _gone = std::fs::remove_file(dir.join("kilnd.pid"));
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(CliError::Daemon {
            message: "it does not stop".to_owned(),
            log: tail(&dir),
        })
    }
}

/// Where kiln keeps its daemon's things: `$XDG_DATA_HOME/kiln`, or `~/.local/share/kiln`.
fn data_dir() -> Result<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("KILN_DATA")
        .or_else(|| absolute("XDG_DATA_HOME").map(|data| data.join("kiln")))
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share/kiln")))
        .ok_or_else(|| CliError::usage("HOME is not set; say with XDG_DATA_HOME where kiln may keep its data"))
}

/// Takes a lock on a file, waiting on a thread of its own.
async fn lock(path: &Path, operation: FlockOperation) -> io::Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    let waiting = tokio::task::spawn_blocking(move || flock(&file, operation).map(|()| file));
    Ok(waiting.await.map_err(io::Error::other)??)
}

/// The daemon's program: `$KILND`, else beside this program.
fn program() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("KILND") {
        return Ok(named.into());
    }
    let own = std::env::current_exe().map_err(|error| CliError::io("find kilnd", error))?;
    let beside = own.with_file_name("kilnd");
    if beside.exists() {
        return Ok(beside);
    }
    Err(CliError::Daemon {
        message: format!("{} does not exist", beside.display()),
        log: String::new(),
    })
}

fn start(dir: &Path, address: &str, config: Option<&Path>) -> Result<Child> {
    let program = program()?;
    let failed = |error| CliError::io(format!("start {}", program.display()), error);
    let log = File::create(dir.join("kilnd.log")).map_err(failed)?;
    let mut command = Command::new(&program);
    command.arg("--addr").arg(address).arg("--root").arg(dir.join("state"));
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    if !rustix::process::geteuid().is_root() {
        command.arg("--rootless");
    }
    // A group of its own: Ctrl-C is for kiln, which cancels the build and stops the daemon in order.
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log)
        .process_group(0);
    let child = command.spawn().map_err(failed)?;
    std::fs::write(dir.join("kilnd.pid"), child.id().to_string()).map_err(failed)?;
    Ok(child)
}

async fn wait_until_up(dir: &Path, address: &str, child: &mut Child) -> Result<Daemon> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Ok(daemon) = Daemon::connect(address).await
            && daemon.control().info(InfoRequest {}).await.is_ok_and(|_| true)
        {
            return Ok(daemon);
        }
        let message = match child.try_wait() {
            Ok(Some(status)) => format!("{status}"),
            _ if Instant::now() > deadline => {
                let _gone = child.kill();
                format!("no answer within {} s", PATIENCE.as_secs())
            }
            _ => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(50));
                continue;
            }
        };
        return Err(CliError::Daemon {
            message,
            log: tail(dir),
        });
    }
}

/// The process that the pid file names, if it is a kilnd.
fn running_pid(dir: &Path) -> Option<Pid> {
    let text = std::fs::read_to_string(dir.join("kilnd.pid")).ok()?;
    let pid = Pid::from_raw(text.trim().parse().ok()?)?;
    let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).ok()?;
    (name.trim() == "kilnd").then_some(pid)
}

/// The end of the daemon's log.
fn tail(dir: &Path) -> String {
    let log = std::fs::read_to_string(dir.join("kilnd.log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    let from = lines.len().saturating_sub(10);
    lines.get(from..).unwrap_or_default().join("\n")
}
