//! The real `docker buildx`, in a sealed home of its own, connected to one daemon through the remote driver.

use crate::{Fixture, Image, Progress, lab};
use base64::Engine as _;
use serde_json::{Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// No build of the suite takes longer than this, in seconds; one that does has hung.
const LIMIT: &str = "240";

/// A client with its own configuration, whose current builder is the daemon.
#[derive(Debug)]
pub struct Buildx {
    program: PathBuf,
    home: TempDir,
}

impl Buildx {
    /// A client whose builder `kiln` is the daemon at `address`.
    pub fn new(which: lab::Client, address: &str) -> Buildx {
        Buildx::with_options(which, address, &[])
    }

    /// As [`Buildx::new`], with options of `buildx create`.
    pub fn with_options(which: lab::Client, address: &str, options: &[&str]) -> Buildx {
        let home = tempfile::Builder::new()
            .prefix("kiln-home-")
            .tempdir()
            .expect("a home for the client");
        let buildx = Buildx {
            program: lab::client(which),
            home,
        };
        let create = [
            &["create", "--name", "kiln", "--driver", "remote", "--use"],
            options,
            &[address],
        ]
        .concat();
        buildx.run(&create).ok();
        buildx
    }

    /// Lets the client know a user and a password for a registry.
    pub fn login(&self, host: &str, user: &str, password: &str) -> &Buildx {
        let file = self.home.path().join("config.json");
        let mut config: Value = std::fs::read(&file)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_else(|| json!({}));
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        config["auths"][host] = json!({"auth": auth});
        std::fs::write(&file, config.to_string()).expect("writing the client's configuration");
        self
    }

    /// A command of the client, ready to be given arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", LIMIT]).arg(&self.program);
        command.env_clear();
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command
            .env("HOME", self.home.path())
            .env("DOCKER_CONFIG", self.home.path());
        command
            .env("BUILDX_CONFIG", self.home.path().join("buildx"))
            .env("NO_COLOR", "1");
        command
    }

    /// Runs a command of the client to its end.
    #[must_use = "an outcome that nobody looks at proves nothing; call ok() or fails()"]
    pub fn run(&self, args: &[&str]) -> Outcome {
        let mut command = self.command();
        command.args(args);
        Running::start(command, None).finish()
    }

    /// A build of `context`; nothing runs before one of the finishing methods.
    pub fn build(&self, context: &Fixture) -> Build<'_> {
        self.build_of(&context.path().display().to_string())
    }

    /// A build of a context in the client's own words: a directory, `-`, or an address.
    pub fn build_of(&self, context: &str) -> Build<'_> {
        let out = tempfile::Builder::new()
            .prefix("kiln-out-")
            .tempdir()
            .expect("a directory for results");
        Build {
            buildx: self,
            args: Vec::new(),
            context: context.to_owned(),
            env: Vec::new(),
            stdin: None,
            out,
        }
    }
}

/// A build that is being described.
#[derive(Debug)]
#[must_use = "a build does nothing before it is run"]
pub struct Build<'a> {
    buildx: &'a Buildx,
    args: Vec<String>,
    context: String,
    env: Vec<(String, String)>,
    stdin: Option<Vec<u8>>,
    out: TempDir,
}

impl Build<'_> {
    /// Adds one argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// Builds only up to a stage.
    pub fn target(self, stage: &str) -> Self {
        self.args(&["--target", stage])
    }

    /// Sets a build argument.
    pub fn build_arg(self, key: &str, value: &str) -> Self {
        self.arg("--build-arg").arg(format!("{key}={value}"))
    }

    /// Sets an environment variable of the client.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Gives the client something to read.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Starts the build and returns while it runs.
    pub fn start(self) -> Running {
        let metadata = self.out.path().join("metadata.json");
        let mut command = self.buildx.command();
        command
            .args(["build", "--progress=plain", "--metadata-file"])
            .arg(&metadata)
            .args(&self.args)
            .arg(&self.context);
        for (key, value) in &self.env {
            command.env(key, value);
        }
        let mut running = Running::start(command, self.stdin);
        running.results = Some(self.out);
        running
    }

    /// Runs the build to its end, whatever it is.
    #[must_use = "an outcome that nobody looks at proves nothing; call ok() or fails()"]
    pub fn run(self) -> Outcome {
        self.start().finish()
    }

    /// Runs the build, which must succeed.
    pub fn ok(self) -> Outcome {
        self.run().ok()
    }

    /// Runs the build, which must fail.
    pub fn fails(self) -> Outcome {
        self.run().fails()
    }

    /// Runs the build with an export to an OCI archive and reads that.
    pub fn image(self) -> Image {
        self.image_and_outcome().0
    }

    /// As [`Build::image`], with what the client said.
    pub fn image_and_outcome(self) -> (Image, Outcome) {
        let file = self.out.path().join("image.tar");
        let outcome = self
            .arg("--output")
            .arg(format!("type=oci,dest={}", file.display()))
            .ok();
        (Image::open(&file), outcome)
    }

    /// Runs the build with an export to a directory, which lives as long as the outcome.
    pub fn local(self) -> (PathBuf, Outcome) {
        let dir = self.out.path().join("tree");
        let outcome = self
            .arg("--output")
            .arg(format!("type=local,dest={}", dir.display()))
            .ok();
        (dir, outcome)
    }

    /// Where a file with this name would be written beside the results; for outputs named by a test itself.
    pub fn result_path(&self, name: &str) -> PathBuf {
        self.out.path().join(name)
    }
}

/// A client that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    said: TempDir,
    results: Option<TempDir>,
    line: String,
    ended: bool,
}

impl Running {
    fn start(mut command: Command, stdin: Option<Vec<u8>>) -> Running {
        let said = tempfile::tempdir().expect("a directory for the client's output");
        let file = |name: &str| File::create(said.path().join(name)).expect("a file for the client's output");
        command.stdout(file("stdout")).stderr(file("stderr"));
        match stdin {
            None => command.stdin(Stdio::null()),
            Some(bytes) => {
                std::fs::write(said.path().join("stdin"), bytes).expect("writing what the client reads");
                command.stdin(File::open(said.path().join("stdin")).expect("what the client reads"))
            }
        };
        let line = format!("{command:?}");
        let child = command.spawn().unwrap_or_else(|error| panic!("{line}: {error}"));
        Running {
            child,
            said,
            results: None,
            line,
            ended: false,
        }
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.said.path().join(name)).unwrap_or_default()).into_owned()
    }

    /// What the client has reported so far.
    pub fn progress(&self) -> Progress {
        Progress::parse(&self.read("stderr"))
    }

    /// Waits until the client has reported a text.
    ///
    /// # Panics
    /// If it ends or a minute passes before that.
    pub fn wait_for(&mut self, text: &str) {
        let seen = crate::process::eventually(std::time::Duration::from_secs(60), || {
            if self.read("stderr").contains(text) {
                return Some(true);
            }
            self.child
                .try_wait()
                .expect("waiting for a child")
                .is_some()
                .then_some(false)
        });
        let said = self.read("stderr");
        assert!(
            seen == Some(true) || said.contains(text),
            "the client never reported {text:?}; it said:\n{said}"
        );
    }

    /// Sends the client a signal by name; `INT` is what a user's control-C does.
    pub fn signal(&self, name: &str) {
        // The child is `timeout`, which passes on what it gets, except KILL.
        if name == "KILL" {
            for id in crate::daemon::descendants(self.child.id()) {
                crate::process::signal(id, "KILL");
            }
        }
        crate::process::signal(self.child.id(), name);
    }

    /// Waits for the client's end.
    #[must_use = "an outcome that nobody looks at proves nothing; call ok() or fails()"]
    pub fn finish(mut self) -> Outcome {
        let status = self.child.wait().expect("waiting for the client");
        self.ended = true;
        let metadata = self
            .results
            .as_ref()
            .and_then(|dir| std::fs::read(dir.path().join("metadata.json")).ok())
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or(Value::Null);
        Outcome {
            code: status.code(),
            stdout: self.read("stdout"),
            stderr: self.read("stderr"),
            metadata,
            line: std::mem::take(&mut self.line),
            results: self.results.take(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.signal("KILL");
            let _ = self.child.wait();
        }
    }
}

/// What a client said and how it ended.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code, none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error: the progress.
    pub stderr: String,
    /// What `--metadata-file` holds.
    pub metadata: Value,
    line: String,
    results: Option<TempDir>,
}

impl Outcome {
    /// Asserts success.
    ///
    /// # Panics
    /// If the client failed.
    #[track_caller]
    pub fn ok(self) -> Outcome {
        assert!(
            self.code == Some(0),
            "{}\nended with {:?}:\n{}{}",
            self.line,
            self.code,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Asserts failure, and that it was no timeout.
    ///
    /// # Panics
    /// If the client succeeded or hung.
    #[track_caller]
    pub fn fails(self) -> Outcome {
        assert!(
            !matches!(self.code, Some(0 | 124 | 137) | None),
            "{}\nshould fail, but ended with {:?}:\n{}{}",
            self.line,
            self.code,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Asserts that the client reported each of `texts`.
    ///
    /// # Panics
    /// If one is missing.
    #[track_caller]
    pub fn says(self, texts: &[&str]) -> Outcome {
        for text in texts {
            assert!(
                self.stderr.contains(text) || self.stdout.contains(text),
                "the client did not say {text:?}, but:\n{}{}",
                self.stdout,
                self.stderr
            );
        }
        self
    }

    /// The progress, step by step.
    pub fn progress(&self) -> Progress {
        Progress::parse(&self.stderr)
    }

    /// Where the results of the build lie while the outcome lives.
    pub fn results(&self) -> &Path {
        self.results.as_ref().expect("only builds have results").path()
    }
}
