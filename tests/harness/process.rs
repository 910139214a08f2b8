//! Programs that a test starts: their output goes to a file, and none outlives the test, however the test ends.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

/// A running program. Dropping it asks it to stop, insists after some seconds, and waits for its end.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

type Job = (Command, Sender<std::io::Result<Child>>);

/// One thread starts all programs, because "die with your parent" means the parent *thread*, and test threads come and go.
fn spawner() -> &'static Sender<Job> {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (sender, receiver) = channel::<Job>();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, answer) in receiver {
                    // Whoever asked may have panicked meanwhile; the child then dies with the answer.
                    let _ = answer.send(command.spawn());
                }
            })
            .expect("a thread");
        sender
    })
}

impl Process {
    /// Starts `program`, standard output and standard error appended to the file `log`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(program: &Path, args: &[String], env: &[(&str, &str)], log: &Path) -> Process {
        Process::start_as(None, program, args, env, log)
    }

    /// As [`Process::start`], as another user, by name.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_as(user: Option<&str>, program: &Path, args: &[String], env: &[(&str, &str)], log: &Path) -> Process {
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("the log file");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if let Some(user) = user {
            command.args([
                format!("--reuid={user}"),
                format!("--regid={user}"),
                "--init-groups".to_owned(),
            ]);
        }
        command.arg("--").arg(program).args(args);
        for (key, value) in env {
            command.env(key, value);
        }
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle"))
            .stderr(output);
        let (answer, child) = channel();
        spawner()
            .send((command, answer))
            .expect("the spawner lives as long as the program");
        let child = child.recv().expect("the spawner answers").unwrap_or_else(|error| {
            panic!("{} cannot be started: {error}", program.display());
        });
        Process {
            child,
            log: log.to_owned(),
            ended: None,
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the program has written so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether the program still runs.
    pub fn running(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("waiting for a child");
        }
        self.ended.is_none()
    }

    /// Waits at most `limit` for the end.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        while self.running() && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(5));
        }
        self.ended
    }

    /// Sends a signal by name, for example `TERM`.
    pub fn signal(&self, name: &str) {
        if self.ended.is_none() {
            signal(self.child.id(), name);
        }
    }

    /// Ends the program at once, as a power cut would, and waits for it.
    pub fn kill(&mut self) {
        if self.running() {
            let _ = self.child.kill();
            self.ended = self.child.wait().ok();
        }
    }

    /// Asks the program to stop, waits, and insists if it does not.
    pub fn stop(&mut self, patience: Duration) -> ExitStatus {
        self.signal("TERM");
        if self.wait(patience).is_none() {
            self.kill();
        }
        self.ended.unwrap_or_else(|| ExitStatus::from_raw(9))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop(Duration::from_secs(10));
    }
}

/// Sends a signal by name to a process.
pub fn signal(id: u32, name: &str) {
    let _ = Command::new("kill")
        .args(["-s", name, &id.to_string()])
        .stderr(Stdio::null())
        .status();
}

/// Looks every few milliseconds whether `probe` has an answer, at most for `limit`.
///
/// Waiting for a program that has no way to call back is the only use.
pub fn eventually<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = probe() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Ids of the running processes whose command line contains `part`.
pub fn running_with(part: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if id != std::process::id() && line.contains(part) {
            found.push(id);
        }
    }
    found
}

/// Mount points beneath `dir`, innermost last, as this process sees them.
pub fn mounts_beneath(dir: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(dir) && point != dir)
        .collect()
}
