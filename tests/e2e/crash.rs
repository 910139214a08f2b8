//! Kills without warning: at any moment of a build the daemon may die, and nothing that was finished is lost, nothing stays behind.

use harness::process::{eventually, running_with};
use harness::{Daemon, Fixture};
use std::time::Duration;

/// How often; a longer run for a suspicious machine is `KILN_E2E_KILLS=500`.
fn kills() -> usize {
    std::env::var("KILN_E2E_KILLS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(50)
}

/// A build of six steps that write, copy and sleep a little, so that a kill finds it in ever other places.
fn context(round: usize) -> Fixture {
    Fixture::new(&format!(
        r#"=== Dockerfile
FROM busybox AS build
COPY f /f
RUN mkdir /d && for i in $(seq 1 40); do echo {round} $i > /d/$i; done
RUN --mount=type=cache,target=/c : kiln-mark-crash; echo {round} >> /c/log; usleep 50000; tail -n 1 /c/log > /last
RUN rm -r /d/1 /d/2 && cp -r /d /e
FROM busybox
COPY --from=build /e /e
RUN : kiln-mark-crash; usleep 50000; ls /e | wc -l > /count; echo {round} > /round
=== f
{round}
"#
    ))
}

#[test]
fn fifty_kills_lose_nothing_that_was_finished() {
    let mut daemon = Daemon::start();
    let _warm = daemon
        .buildx()
        .build(&Fixture::new("=== Dockerfile\nFROM busybox\nRUN true\n"))
        .ok();
    // A fixed sequence, so that a failure can be repeated: xorshift from a constant.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..kills() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let context = context(round);
        let buildx = daemon.buildx();
        let running = buildx.build(&context).start();
        std::thread::park_timeout(Duration::from_millis(state % 900));
        daemon.kill();
        let before = running.finish().progress();
        if harness::lab::is_reference() {
            // The reference leaves its containers running; they would fill the machine.
            running_with("kiln-mark-crash")
                .into_iter()
                .for_each(|id| harness::process::signal(id, "KILL"));
        } else {
            let gone = eventually(Duration::from_secs(10), || {
                running_with("kiln-mark-crash").is_empty().then_some(())
            });
            assert!(gone.is_some(), "round {round}: a step outlived the daemon");
        }
        daemon.restart();
        let (image, outcome) = daemon.buildx().build(&context).image_and_outcome();
        assert_eq!(image.file("round").text(), format!("{round}\n"), "round {round}");
        assert_eq!(image.file("count").text(), "38\n", "round {round}");
        let after = outcome.progress();
        for step in before
            .steps
            .iter()
            .filter(|step| step.done && step.name.contains("] RUN") && step.error.is_none())
        {
            assert!(
                after.cached(&step.name),
                "round {round}: {} was finished before the kill and ran again",
                step.name
            );
        }
    }
    let quiet = eventually(Duration::from_secs(20), || {
        daemon.descendants().is_empty().then_some(())
    });
    assert!(quiet.is_some(), "processes remain: {:?}", daemon.descendants());
    daemon.stop();
    if !harness::lab::is_reference() {
        let mounts = harness::process::mounts_beneath(&daemon.state());
        assert!(mounts.is_empty(), "mounts remain: {mounts:?}");
    }
    daemon.restart();
    let _emptied = daemon.buildx().run(&["prune", "--force", "--all"]).ok();
}

#[test]
fn a_lost_index_is_rebuilt_with_its_hits() {
    // How the state directory is laid out is Kiln's own.
    if harness::lab::is_reference() {
        return;
    }
    let mut daemon = Daemon::start();
    let context = context(0);
    let first = daemon.buildx().build(&context).image();
    daemon.stop();
    std::fs::remove_dir_all(daemon.state().join("index")).unwrap();
    daemon.restart();
    let (second, outcome) = daemon.buildx().build(&context).image_and_outcome();
    assert_eq!(outcome.progress().executed(), Vec::<&str>::new());
    assert_eq!(second.digest, first.digest);
    assert!(
        daemon.log().contains("rebuilt"),
        "the log says what happened:\n{}",
        daemon.log()
    );
}
