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
    // With the launcher, which `Daemon::descendants` leaves out.
    let mut seen = harness::daemon::descendants(daemon.id());
    seen.push(daemon.id());
    assert!(seen.len() >= 3, "the daemon, its launcher and the step: {seen:?}");
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

/// `kiln build` alone: it finds no daemon, starts one for itself, and stops it when it is done.
#[test]
fn kiln_build_with_a_daemon_of_its_own() {
    if harness::lab::is_reference() {
        return;
    }
    let mirror = harness::Registry::of_lab();
    let dir = tempfile::Builder::new().prefix("kiln-home-").tempdir().unwrap();
    let home = dir.path();
    for name in ["kiln", "kilnd"] {
        std::fs::copy(harness::lab::program(name), home.join(name)).unwrap();
    }
    let config = format!(
        "[registry.\"docker.io\"]\n  mirrors = [\"{0}\"]\n[registry.\"{0}\"]\n  http = true\n",
        mirror.host()
    );
    std::fs::write(home.join("kilnd.toml"), config).unwrap();
    std::fs::create_dir(home.join("context")).unwrap();
    std::fs::write(
        home.join("context/Dockerfile"),
        "FROM busybox AS build\nRUN id -u > /uid && dd if=/dev/zero of=/stays bs=1M count=3 2>/dev/null\nFROM scratch\nCOPY --from=build /uid /\n",
    )
    .unwrap();
    let given = Command::new("chown")
        .arg("-R")
        .arg(format!("{}:", user()))
        .arg(home)
        .status()
        .unwrap();
    assert!(given.success());
    let build = || {
        let out = Command::new("timeout")
            .args([
                "120",
                "setpriv",
                &format!("--reuid={USER}"),
                &format!("--regid={USER}"),
                "--init-groups",
                "--",
            ])
            .arg(home.join("kiln"))
            .args([
                "--daemon-config",
                "kilnd.toml",
                "build",
                "--progress=plain",
                "--output",
                "type=oci,dest=image.tar",
                "context",
            ])
            .current_dir(home)
            .env_clear()
            .env("HOME", home)
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
            .output()
            .unwrap();
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        assert!(out.status.success(), "{said}");
        said
    };
    let first = build();
    let image = harness::Image::open(&home.join("image.tar"));
    assert_eq!(image.file("uid").text(), "0\n");
    assert!(first.contains("sha256:"), "the digest is printed: {first}");
    let second = build();
    assert!(second.contains("CACHED"), "the cache outlives the daemon: {second}");
    let left = harness::process::running_with(&home.display().to_string());
    assert!(left.is_empty(), "the daemon that kiln started still runs: {left:?}");
}
