//! The rest of what clients ask: subrequests, history, pull again, layouts as contexts, insecure steps, warnings, two at one place.

use harness::{Daemon, Fixture, Registry};

// caps: frontend.caps gateway.warnings
#[test]
fn checks_and_outlines() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(
        "=== Dockerfile\n# the version to build\nARG VERSION=1\nFROM busybox as build\nRUN true\n# the program\nFROM build AS final\nARG VERSION\nLABEL version=$VERSION\nMAINTAINER nobody\n",
    );
    let check = buildx.build(&context).args(&["--call=check"]).run();
    let said = format!("{}{}", check.stdout, check.stderr);
    for rule in ["FromAsCasing", "MaintainerDeprecated"] {
        assert!(said.contains(rule), "no {rule} in {said}");
    }
    let targets = buildx.build(&context).args(&["--call=targets"]).ok();
    assert!(
        targets.stdout.contains("build") && targets.stdout.contains("final"),
        "{}",
        targets.stdout
    );
    let outline = buildx.build(&context).args(&["--call=outline"]).ok();
    assert!(outline.stdout.contains("VERSION"), "{}", outline.stdout);
    let built = buildx.build(&context).ok();
    assert!(built.stderr.contains("2 warnings found"), "{}", built.stderr);
}

// caps: history.filter
#[test]
fn history_lists_what_was_built() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let good = Fixture::new("=== Dockerfile\nFROM busybox\nRUN echo remembered\n");
    let bad = Fixture::new("=== Dockerfile\nFROM busybox\nRUN exit 5\n");
    let outcome = buildx.build(&good).ok();
    buildx.build(&bad).fails();
    let list = buildx.run(&["history", "ls", "--format", "json"]).ok().stdout;
    let records: Vec<serde_json::Value> = list.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records.len(), 2, "{list}");
    assert!(
        records.iter().any(|record| record["status"] == "Completed")
            && records.iter().any(|record| record["status"] == "Error"),
        "{list}"
    );
    let reference = outcome.metadata["buildx.build.ref"]
        .as_str()
        .unwrap()
        .rsplit('/')
        .next()
        .unwrap()
        .to_owned();
    let logs = buildx.run(&["history", "logs", "--progress=plain", &reference]).ok();
    assert!(format!("{}{}", logs.stdout, logs.stderr).contains("remembered"));
    let inspected = buildx.run(&["history", "inspect", &reference]).ok().stdout;
    assert!(
        inspected.contains("pkg:docker/busybox@latest") && inspected.contains("slsa.dev/provenance"),
        "{inspected}"
    );
    let _removed = buildx.run(&["history", "rm", &reference]).ok();
    assert_eq!(
        buildx
            .run(&["history", "ls", "--format", "json"])
            .ok()
            .stdout
            .lines()
            .count(),
        1
    );
}

// caps: source.image.resolvemode
#[test]
fn pull_asks_the_registry_again() {
    let registry = Registry::empty();
    let daemon = Daemon::with().plain_http(&registry).start();
    let buildx = daemon.buildx();
    let reference = format!("{}/team/moving:1", registry.host());
    let base = Fixture::new("=== Dockerfile\nFROM busybox\nCOPY v /v\n=== v\none\n");
    let push = || {
        let _outcome = buildx.build(&base).args(&["-t", &reference, "--push"]).ok();
    };
    push();
    let context = Fixture::new(&format!("=== Dockerfile\nFROM {reference}\nRUN cat /v > /seen\n"));
    assert_eq!(buildx.build(&context).image().file("seen").text(), "one\n");
    base.write("v", "two\n");
    push();
    assert_eq!(
        buildx.build(&context).arg("--pull").image().file("seen").text(),
        "two\n"
    );
}

// caps: source.ocilayout
#[test]
fn a_layout_on_the_clients_disk_as_a_context() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let base = Fixture::new("=== Dockerfile\nFROM busybox\nRUN echo from-layout > /l\n");
    let build = buildx.build(&base).args(&["-t", "example.org/l:1"]);
    let dir = build.result_path("layout");
    let kept = build
        .arg(format!("--output=type=oci,tar=false,dest={}", dir.display()))
        .ok();
    let context = Fixture::new("=== Dockerfile\nFROM base\nRUN cat /l > /seen\n");
    let other = Daemon::start();
    let image = other
        .buildx()
        .build(&context)
        .args(&["--build-context", &format!("base=oci-layout://{}:1", dir.display())])
        .image();
    assert_eq!(image.file("seen").text(), "from-layout\n");
    drop(kept);
}

// caps: exec.meta.security
#[test]
fn an_insecure_step_needs_both_sides_to_agree() {
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN --security=insecure mkdir /m && mount -t tmpfs none /m && grep Seccomp: /proc/self/status > /seen\n",
    );
    let strict = Daemon::start();
    strict
        .buildx()
        .build(&context)
        .args(&["--allow", "security.insecure"])
        .fails()
        .says(&["security.insecure"]);
    let open = Daemon::with()
        .arg("--allow-insecure-entitlement=security.insecure")
        .start();
    open.buildx().build(&context).fails().says(&["security.insecure"]);
    let image = open
        .buildx()
        .build(&context)
        .args(&["--allow", "security.insecure"])
        .image();
    assert!(image.file("seen").text().ends_with("0\n"));
}

// caps: file.copy.alwaysreplaceexistingdestpaths file.copy.requiredpaths
#[test]
fn an_archive_replaces_what_is_in_its_way() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN mkdir -p /d/x && ln -s /etc /d/y\nADD a.tar /d/\n");
    let mut archive = tar::Builder::new(Vec::new());
    for name in ["x", "y"] {
        let mut header = tar::Header::new_gnu();
        header.set_size(2);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, &b"f\n"[..]).unwrap();
    }
    context.write("a.tar", archive.into_inner().unwrap());
    let image = daemon.buildx().build(&context).image();
    assert_eq!((image.file("d/x").text(), image.file("d/y").text()), ("f\n", "f\n"));
}

// caps: solve.inlinereturn gateway.solve.evaluate
#[test]
fn the_plain_output_of_a_build_without_colour_has_every_step_once() {
    let daemon = Daemon::start();
    let context =
        Fixture::new("=== Dockerfile\nFROM busybox AS a\nRUN echo 1\nRUN echo 2\nFROM a\nCOPY f /\n=== f\nf\n");
    let outcome = daemon.buildx().build(&context).ok();
    let progress = outcome.progress();
    let mut names = progress.names();
    names.sort_unstable();
    let before = names.len();
    names.dedup();
    assert_eq!(names.len(), before, "{}", outcome.stderr);
    assert!(
        progress
            .steps
            .iter()
            .all(|step| step.done || step.name.starts_with("building with")),
        "{}",
        outcome.stderr
    );
}

#[test]
fn two_daemons_on_one_state_directory() {
    let daemon = Daemon::start();
    let other = tempfile::tempdir().unwrap();
    let log = other.path().join("log");
    let args = daemon.command_line(&daemon.state(), &other.path().join("s.sock"));
    let mut second = harness::process::Process::start(daemon.program(), &args, &[], &log);
    // The reference waits for the lock for some seconds before it gives up.
    let status = second
        .wait(std::time::Duration::from_secs(30))
        .expect("the second daemon gives up");
    assert!(!status.success());
    assert!(
        second.log().contains("lock") || second.log().contains("in use"),
        "{}",
        second.log()
    );
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN true\n");
    let _outcome = daemon.buildx().build(&context).ok();
}

#[test]
fn a_context_that_vanishes() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN echo st\"\"ep; sleep 2\nCOPY . /\n=== f\nf\n");
    let mut running = buildx.build(&context).start();
    running.wait_for("step");
    std::fs::remove_dir_all(context.path()).unwrap();
    // Whether the files were read before is a matter of luck; what counts is an end, and a daemon that goes on.
    let outcome = running.finish();
    assert!(
        outcome.code.is_some_and(|code| code != 124 && code != 137),
        "{}",
        outcome.stderr
    );
    let next = Fixture::new("=== Dockerfile\nFROM busybox\nRUN echo next > /next\n");
    assert_eq!(daemon.buildx().build(&next).image().file("next").text(), "next\n");
}

#[test]
fn the_plain_progress_is_the_references() {
    // Only where somebody names a reference daemon: the same builds on both, what differs by nature taken out.
    let Some(peer) = std::env::var_os("PEER").filter(|peer| !peer.is_empty()) else {
        return;
    };
    let ours = Daemon::start();
    let theirs = Daemon::with().program(peer).start();
    for text in [
        "=== Dockerfile\nFROM busybox\nRUN echo hello\n",
        "=== Dockerfile\nFROM busybox AS a\nRUN echo a > /a\nFROM scratch\nCOPY --from=a /a /\n",
        "=== Dockerfile\nFROM scratch\nCOPY . /\n=== f\nf\n",
        "=== Dockerfile\nFROM alpine:3.19\nWORKDIR /x\nENV A=1\nCOPY f .\nRUN cat f\n=== f\nf\n",
        "=== Dockerfile\nFROM busybox\nRUN echo out; echo err >&2; exit 3\n",
        "=== Dockerfile\nFROM busybox\nCOPY absent /\n",
        "=== Dockerfile\nFROM busybox\nRUN --mount=type=cache,target=/c echo x > /c/x\n",
        "=== Dockerfile\nFROM busybox\nCOPY <<E /e\ntext\nE\nRUN <<E\necho one\necho two\nE\n",
        "=== Dockerfile\nFROM busybox\nRUNN true\n",
        "=== Dockerfile\nFROM no-such-image\n",
    ] {
        let context = Fixture::new(text);
        let mut said = Vec::new();
        for daemon in [&ours, &theirs] {
            let outcome = daemon.buildx().build(&context).run();
            let mut steps: Vec<(String, bool, Option<String>, Vec<String>)> = Vec::new();
            for step in outcome.progress().steps {
                let mut log: Vec<String> = step.log.iter().map(|line| harness::redact(line)).collect();
                // How often a transfer reports is a matter of speed.
                log.retain(|line| {
                    !line.contains("transferring")
                        && !line.starts_with("resolve ")
                        && !line.starts_with("<digest>")
                        && !line.starts_with("extracting")
                        && !line.starts_with("sha256")
                });
                steps.push((
                    harness::redact(&step.name),
                    step.cached,
                    step.error.map(|error| harness::redact(&error)),
                    log,
                ));
            }
            steps.sort();
            said.push((outcome.code, steps));
        }
        assert_eq!(said[0], said[1], "for\n{text}");
    }
}
