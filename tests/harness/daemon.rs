//! The daemon under test: own state directory, own socket, own mirror of base images; gone when dropped.

use crate::process::{self, Process};
use crate::{Buildx, Registry, lab};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    process: Option<Process>,
    mirror: Registry,
    config: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    program: PathBuf,
    user: Option<String>,
    dir: TempDir,
    started_in: Duration,
}

/// How a daemon is to be started; see [`Daemon::with`].
#[derive(Debug, Default)]
pub struct Options {
    program: Option<PathBuf>,
    user: Option<String>,
    config: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
}

impl Options {
    /// Adds lines to `buildkitd.toml`.
    pub fn config(mut self, toml: &str) -> Self {
        self.config.push_str(toml);
        self.config.push('\n');
        self
    }

    /// Starts another program than the one under test, for comparisons.
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// Starts the daemon as an ordinary user, whose state and socket it then is.
    pub fn user(mut self, name: &str) -> Self {
        self.user = Some(name.to_owned());
        self
    }

    /// Adds a flag.
    pub fn arg(mut self, flag: &str) -> Self {
        self.args.push(flag.to_owned());
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Lets the daemon talk plain HTTP to `registry`, as a company's own registry would be configured.
    pub fn plain_http(self, registry: &Registry) -> Self {
        let host = registry.host();
        self.config(&format!("[registry.\"{host}\"]\n  http = true\n"))
    }

    /// Starts the daemon and waits until it listens.
    pub fn start(self) -> Daemon {
        Daemon::launch(self)
    }
}

impl Daemon {
    /// A daemon with the lab's base images behind `docker.io` and `gcr.io`.
    pub fn start() -> Daemon {
        Daemon::with().start()
    }

    /// A daemon with more configuration, flags or environment.
    pub fn with() -> Options {
        let mut options = Options::default();
        // The suite as a whole can be run with another snapshotter.
        if let Ok(snapshotter) = std::env::var("KILN_E2E_SNAPSHOTTER") {
            options = options.arg(&format!("--oci-worker-snapshotter={snapshotter}"));
        }
        options
    }

    fn launch(options: Options) -> Daemon {
        let dir = tempfile::Builder::new()
            .prefix("kiln-")
            .tempdir()
            .expect("a directory for the daemon");
        let mirror = Registry::of_lab();
        let mut config = String::new();
        for name in ["docker.io", "gcr.io"] {
            let _ = writeln!(config, "[registry.\"{name}\"]\n  mirrors = [\"{}\"]", mirror.host());
        }
        let _ = writeln!(config, "[registry.\"{}\"]\n  http = true", mirror.host());
        config.push_str(&options.config);
        let mut daemon = Daemon {
            process: None,
            mirror,
            config,
            args: options.args,
            env: options.env,
            program: options.program.unwrap_or_else(lab::daemon),
            user: options.user,
            dir,
            started_in: Duration::ZERO,
        };
        daemon.restart();
        daemon
    }

    /// Starts the program on the state directory it has; it must not be running.
    ///
    /// # Panics
    /// If it does not listen within 20 seconds.
    pub fn restart(&mut self) {
        assert!(self.process.is_none(), "the daemon is running");
        let config = self.dir.path().join("buildkitd.toml");
        std::fs::write(&config, &self.config).expect("writing the configuration");
        let _ = std::fs::remove_file(self.socket());
        let env: Vec<(&str, &str)> = self
            .env
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        let started = Instant::now();
        let mut program = self.program.clone();
        if let Some(user) = &self.user {
            // An ordinary user may see neither the build directory nor a directory of root's.
            program = self.dir.path().join("kilnd");
            if !program.exists() {
                std::fs::copy(&self.program, &program).expect("a copy of the program");
            }
            let owner = Command::new("chown")
                .arg("-R")
                .arg(format!("{user}:"))
                .arg(self.dir.path())
                .status();
            assert!(
                owner.expect("chown runs").success(),
                "giving the daemon's directory to {user}"
            );
        }
        let args = self.command_line(&self.state(), &self.socket());
        let process = Process::start_as(self.user.as_deref(), &program, &args, &env, &self.log_path());
        let process = self.process.insert(process);
        let socket = self.dir.path().join("kilnd.sock");
        let up = process::eventually(Duration::from_secs(20), || {
            if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
                return Some(true);
            }
            (!process.running()).then_some(false)
        });
        self.started_in = started.elapsed();
        assert!(up == Some(true), "the daemon does not listen; it said:\n{}", self.log());
    }

    /// The flags that start a daemon with this one's configuration on another state directory or socket.
    pub fn command_line(&self, state: &Path, socket: &Path) -> Vec<String> {
        let mut args = vec![
            "--config".to_owned(),
            self.dir.path().join("buildkitd.toml").display().to_string(),
            "--root".to_owned(),
            state.display().to_string(),
            "--addr".to_owned(),
            format!("unix://{}", socket.display()),
            "--oci-worker=true".to_owned(),
            "--containerd-worker=false".to_owned(),
        ];
        args.extend(self.args.iter().cloned());
        args
    }

    /// A client for this daemon: the newest one the lab has.
    pub fn buildx(&self) -> Buildx {
        Buildx::new(lab::Client::Newest, &self.address())
    }

    /// A client of the given version for this daemon.
    pub fn client(&self, which: lab::Client) -> Buildx {
        Buildx::new(which, &self.address())
    }

    /// The program that runs.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The address as clients write it.
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("kilnd.sock")
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The registry that stands behind `docker.io`.
    pub fn mirror(&self) -> &Registry {
        &self.mirror
    }

    /// From starting the process to its socket answering.
    pub fn started_in(&self) -> Duration {
        self.started_in
    }

    /// The process id.
    ///
    /// # Panics
    /// If the daemon does not run.
    pub fn id(&self) -> u32 {
        self.process.as_ref().expect("the daemon runs").id()
    }

    /// Whether the process is there.
    pub fn running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::running)
    }

    /// What the daemon has logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("daemon.log")
    }

    /// Asks the daemon to stop and waits for it.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.stop(Duration::from_secs(15));
        }
    }

    /// Kills the daemon with no warning.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Resident memory in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("the daemon's status");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("a resident size");
        line.split_whitespace()
            .nth(1)
            .and_then(|number| number.parse().ok())
            .expect("a number of KiB")
    }

    /// All processes beneath the daemon, itself not counted. Nor is its one launcher, which starts the steps and lives as
    /// long as the daemon; the steps beneath it count, and so does a second launcher.
    pub fn descendants(&self) -> Vec<u32> {
        let mut found = descendants(self.id());
        if let Some(launcher) = found.iter().position(|id| is_launcher_of(*id, self.id())) {
            found.remove(launcher);
        }
        found
    }

    /// Mount points beneath the daemon's directory, in the daemon's own mount namespace.
    pub fn mounts(&self) -> Vec<String> {
        let table =
            std::fs::read_to_string(format!("/proc/{}/mountinfo", self.id())).expect("the daemon's mount table");
        let dir = self.dir.path().display().to_string();
        table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| point.starts_with(&dir))
            .map(str::to_owned)
            .collect()
    }

    /// Whether any file of the state directory contains `needle`; returns the paths that do.
    pub fn state_files_with(&self, needle: &[u8]) -> Vec<PathBuf> {
        files_with(&self.state(), needle)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- the daemon's last lines ---");
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
        self.stop();
        // Whatever a killed daemon left mounted would keep the directory from going.
        for point in process::mounts_beneath(self.dir.path()).iter().rev() {
            let _ = Command::new("umount").arg("-l").arg(point).status();
        }
    }
}

/// Whether `id` is a launcher that the daemon itself has started. A step that has not yet executed its program has the
/// same command line, but the launcher is its parent.
fn is_launcher_of(id: u32, daemon: u32) -> bool {
    let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).next() == Some(b"kiln-launcher") && parent_of(id) == Some(daemon)
}

/// The parent of a running process.
fn parent_of(id: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name in parentheses may contain anything; the parent is the second field after the last one.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// All processes beneath `id`.
pub fn descendants(id: u32) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if let Some(parent) = parent_of(child) {
            parents.push((child, parent));
        }
    }
    let mut found = vec![id];
    let mut next = 0;
    while let Some(&current) = found.get(next) {
        found.extend(
            parents
                .iter()
                .filter(|(_, parent)| *parent == current)
                .map(|(child, _)| *child),
        );
        next += 1;
    }
    found.split_off(1)
}

/// The regular files beneath `dir` that contain `needle`.
pub fn files_with(dir: &Path, needle: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                let bytes = std::fs::read(entry.path()).unwrap_or_default();
                if contains(&bytes, needle) {
                    found.push(entry.path());
                }
            }
        }
    }
    found
}

/// Whether `bytes` contain `needle`.
pub fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty() && bytes.windows(needle.len()).any(|window| window == needle)
}
