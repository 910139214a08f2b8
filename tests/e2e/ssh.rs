//! RUN --mount=type=ssh: the client's agent, reachable in the step and nowhere else.

use harness::process::Process;
use harness::{Daemon, Fixture};
use std::process::Command;
use std::time::Duration;

/// An agent with one key.
struct Agent {
    dir: tempfile::TempDir,
    _process: Process,
}

impl Agent {
    fn start() -> Agent {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let process = Process::start(
            "/usr/bin/ssh-agent".as_ref(),
            &["-D".into(), "-a".into(), socket.display().to_string()],
            &[],
            &dir.path().join("agent.log"),
        );
        harness::process::eventually(Duration::from_secs(10), || socket.exists().then_some(()))
            .expect("the agent listens");
        let key = dir.path().join("key");
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "kiln-key", "-f"])
            .arg(&key)
            .status();
        assert!(made.unwrap().success());
        let added = Command::new("ssh-add")
            .arg("-q")
            .arg(&key)
            .env("SSH_AUTH_SOCK", &socket)
            .status();
        assert!(added.unwrap().success());
        Agent { dir, _process: process }
    }

    fn socket(&self) -> String {
        self.dir.path().join("agent.sock").display().to_string()
    }

    /// The public key as the agent names it: its blob in base64.
    fn public(&self) -> String {
        let line = std::fs::read_to_string(self.dir.path().join("key.pub")).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    }
}

// The base images have no ssh-add; the agent protocol's question "which keys" is five bytes, its answer holds the key's blob.
const DOCKERFILE: &str = r#"
=== Dockerfile
FROM debian:bookworm-slim
RUN --mount=type=ssh test -S "$SSH_AUTH_SOCK" && echo "$SSH_AUTH_SOCK" > /where && stat -c '%a %u' "$SSH_AUTH_SOCK" > /mode \
 && perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un($ENV{SSH_AUTH_SOCK})) or die "connect: $!"; syswrite(S, pack("NC", 1, 11)); while (length($b) < 4 || length($b) < 4 + unpack("N", $b)) { sysread(S, $b, 4096, length($b)) or last } print unpack("H*", $b)' > /keys
RUN --mount=type=ssh,id=absent test ! -e /run/buildkit
RUN test -z "$SSH_AUTH_SOCK"
"#;

// caps: exec.mount.ssh
#[test]
fn the_agent_of_the_client_answers_in_the_step() {
    use base64::Engine as _;
    let agent = Agent::start();
    let daemon = Daemon::start();
    let context = Fixture::new(DOCKERFILE);
    let image = daemon
        .buildx()
        .build(&context)
        .args(&["--ssh", &format!("default={}", agent.socket())])
        .image();
    let answered = image.file("keys").text();
    let blob = base64::engine::general_purpose::STANDARD
        .decode(agent.public())
        .unwrap();
    assert!(
        answered.contains(&hex::encode(blob)),
        "the answer {answered} names the key"
    );
    assert!(image.file("where").text().starts_with("/run/buildkit/ssh_agent"));
    assert_eq!(image.file("mode").text(), "600 0\n");
    assert!(!image.has("run/buildkit"));
}

#[test]
fn a_required_agent_that_is_missing_fails() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN --mount=type=ssh,required=true true\n");
    daemon.buildx().build(&context).fails().says(&["Dockerfile:2", "ssh"]);
}
