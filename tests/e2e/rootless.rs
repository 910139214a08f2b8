//! Kiln as an ordinary user: the same builds, and nothing of it has a right on the host.

use harness::{Daemon, Fixture};
use std::process::Command;
use std::sync::Once;

const USER: &str = "kiln-e2e";

/// Makes the user, with subordinate ids as Debian gives them to ordinary users.
fn user() -> &'static str {
    static MADE: Once = Once::new();
    MADE.call_once(|| {
        if !Command::new("id").arg(USER).output().unwrap().status.success() {
            let made = Command::new("useradd")
                .args(["--create-home", "--user-group", "--shell", "/bin/sh", USER])
                .output()
                .unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        }
        for file in ["/etc/subuid", "/etc/subgid"] {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            assert!(text.contains(USER), "{USER} has no line in {file}");
        }
    });
    USER
}

/// The reference needs programs of its own for this (rootlesskit), which the lab does not have.
fn daemon() -> Option<Daemon> {
    (!harness::lab::is_reference()).then(|| Daemon::with().user(user()).start())
}

fn status(id: u32, member: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    text.lines().find_map(|line| {
        line.strip_prefix(member)?
            .strip_prefix(':')
            .map(|rest| rest.trim().to_owned())
    })
}

#[test]
fn an_ordinary_user_builds() {
    let Some(daemon) = daemon() else { return };
    let context = Fixture::new(
        r#"=== Dockerfile
FROM busybox AS build
RUN adduser -u 1500 -D app && mkdir /out && echo hi > /out/f && chown app /out/f && chmod 4755 /out/f
RUN --mount=type=cache,target=/c --mount=type=tmpfs,target=/t touch /c/x /t/y && rm /bin/wget
FROM busybox
COPY --from=build /out /out
COPY --chown=1600:1700 g /g
RUN id -u > /id && rm /bin/vi
USER 1234
RUN id -u > /tmp/user
=== g
g
"#,
    );
    let buildx = daemon.buildx();
    let image = buildx.build(&context).image();
    assert_eq!((image.file("out/f").uid, image.file("out/f").mode), (1500, 0o4755));
    assert_eq!((image.file("g").uid, image.file("g").gid), (1600, 1700));
    assert_eq!(image.file("id").text(), "0\n");
    assert_eq!(image.file("tmp/user").text(), "1234\n");
    assert!(!image.has("bin/vi"));
    let again = buildx.build(&context).ok();
    assert_eq!(again.progress().executed(), Vec::<&str>::new());
}

#[test]
fn the_image_is_the_one_that_root_builds() {
    let Some(rootless) = daemon() else { return };
    let root = Daemon::start();
    let context = Fixture::copy_of("examples/go-scratch");
    let digest = |daemon: &Daemon| {
        let buildx = daemon.buildx();
        let build = buildx
            .build(&context)
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .arg("--provenance=false");
        let file = build.result_path("i.tar");
        let kept = build
            .arg(format!(
                "--output=type=oci,rewrite-timestamp=true,dest={}",
                file.display()
            ))
            .ok();
        let digest = harness::Image::open(&file).digest;
        drop(kept);
        digest
    };
    assert_eq!(digest(&rootless), digest(&root));
}

#[test]
fn nothing_of_it_is_privileged_on_the_host() {
    let Some(daemon) = daemon() else { return };
    let buildx = daemon.buildx();
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN echo in\"\"side; sleep 600\n");
    let mut running = buildx.build(&context).start();
    running.wait_for("inside");
    let host = std::fs::read_link("/proc/self/ns/user").unwrap();
    let mut seen = daemon.descendants();
    seen.push(daemon.id());
    assert!(seen.len() >= 3, "the daemon, an init and the step: {seen:?}");
    for id in seen {
        let (Some(uids), Some(capabilities)) = (status(id, "Uid"), status(id, "CapEff")) else {
            continue;
        };
        let name = status(id, "Name").unwrap_or_default();
        assert!(
            !uids.split_whitespace().any(|uid| uid == "0"),
            "{name} ({id}) is root on the host"
        );
        let namespace = std::fs::read_link(format!("/proc/{id}/ns/user")).ok();
        let confined = namespace.is_some_and(|namespace| namespace != host);
        assert!(
            confined || u64::from_str_radix(&capabilities, 16) == Ok(0),
            "{name} ({id}) has capabilities {capabilities} on the host"
        );
    }
    running.signal("KILL");
    let _ = running.finish();
}
