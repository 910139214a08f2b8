//! Clients that go away: the step is killed, nothing stays running or mounted, and the daemon goes on.

use harness::process::eventually;
use harness::{Daemon, Fixture};
use std::time::Duration;

/// A step that says something and then sleeps; the mark makes its process findable.
fn sleeping(mark: &str) -> Fixture {
    Fixture::new(&format!(
        "=== Dockerfile\nFROM busybox\nRUN --mount=type=cache,target=/c echo asl\"\"eep; sh -c 'sleep 600; : {mark}' & wait\n"
    ))
}

fn leaves_nothing(signal: &str, mark: &str) {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let _warm = buildx
        .build(&Fixture::new("=== Dockerfile\nFROM busybox\nRUN true\n"))
        .ok();
    let quiet = eventually(Duration::from_secs(20), || {
        daemon.descendants().is_empty().then_some(())
    });
    assert!(
        quiet.is_some(),
        "processes after a finished build: {:?}",
        daemon.descendants()
    );
    let mounts = daemon.mounts();
    let context = sleeping(mark);
    let mut running = buildx.build(&context).start();
    running.wait_for("asleep");
    let mark = format!(": {mark}");
    assert!(!harness::process::running_with(&mark).is_empty(), "the step runs");
    running.signal(signal);
    let _ = running.finish();
    let gone = eventually(Duration::from_secs(20), || {
        (daemon.descendants().is_empty() && harness::process::running_with(&mark).is_empty()).then_some(())
    });
    assert!(
        gone.is_some(),
        "after {signal} these processes remain: {:?}",
        daemon.descendants()
    );
    let unmounted = eventually(Duration::from_secs(20), || {
        (daemon.mounts().len() <= mounts.len()).then_some(())
    });
    assert!(unmounted.is_some(), "mounts remain: {:?}", daemon.mounts());
    // The cache mount is free again and the daemon serves the next client.
    let next = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN --mount=type=cache,target=/c,sharing=locked echo next > /next\n",
    );
    assert_eq!(daemon.buildx().build(&next).image().file("next").text(), "next\n");
}

#[test]
fn control_c() {
    leaves_nothing("INT", "kiln-mark-interrupted");
}

#[test]
fn a_killed_client() {
    leaves_nothing("KILL", "kiln-mark-killed");
}

#[test]
fn a_failing_stage_ends_the_others() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS slow\nRUN sleep 600; : kiln-mark-sibling\nFROM busybox AS bad\nRUN sleep 1; exit 3\nFROM scratch\nCOPY --from=slow / /\nCOPY --from=bad / /\n",
    );
    daemon.buildx().build(&context).fails().says(&["exit code: 3"]);
    let gone = eventually(Duration::from_secs(20), || {
        harness::process::running_with("kiln-mark-sibling")
            .is_empty()
            .then_some(())
    });
    assert!(gone.is_some(), "the other stage still runs");
}

#[test]
fn a_daemon_that_is_asked_to_stop_takes_its_steps_along() {
    let mut daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = sleeping("kiln-mark-shutdown");
    let mut running = buildx.build(&context).start();
    running.wait_for("asleep");
    daemon.stop();
    let _ = running.finish().fails();
    let mark = || harness::process::running_with(": kiln-mark-shutdown");
    let gone = eventually(Duration::from_secs(20), || mark().is_empty().then_some(()));
    // The reference leaves its containers to the runtime.
    if harness::lab::is_reference() {
        mark().into_iter().for_each(|id| harness::process::signal(id, "KILL"));
    } else {
        assert!(gone.is_some(), "the step outlived the daemon: {:?}", mark());
    }
}

#[test]
fn a_client_that_leaves_during_the_transfer() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new("=== Dockerfile\nFROM scratch\nCOPY . /\n");
    for number in 0..200 {
        context.write(format!("f{number}"), vec![number as u8; 300_000]);
    }
    for delay in [20, 60, 120, 200, 300] {
        let running = buildx.build(&context).start();
        std::thread::park_timeout(Duration::from_millis(delay));
        running.signal("KILL");
        let _ = running.finish();
    }
    assert_eq!(buildx.build(&context).image().files_in("").len(), 201);
}
