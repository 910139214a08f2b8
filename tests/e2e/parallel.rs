//! Work at the same time: stages that do not need each other, clients that want the same, steps that are wanted once.

use harness::{Daemon, Fixture};
use std::time::Duration;

#[test]
fn independent_stages_overlap() {
    let daemon = Daemon::start();
    // Each stage waits for a sign of the other: together they finish at once, one after the other never.
    let wait = |mine: &str, theirs: &str| {
        format!(
            "RUN --mount=type=cache,target=/meet touch /meet/{mine}; i=0; while ! test -e /meet/{theirs}; do i=$((i+1)); test $i -lt 300 || exit 1; usleep 100000; done; touch /{mine}"
        )
    };
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM busybox AS a\n{}\nFROM busybox AS b\n{}\nFROM scratch\nCOPY --from=a /a /\nCOPY --from=b /b /\n",
        wait("a", "b"),
        wait("b", "a")
    ));
    assert_eq!(daemon.buildx().build(&context).image().files_in(""), ["a", "b"]);
}

#[test]
fn two_slow_stages_overlap_in_time() {
    let daemon = Daemon::start();
    let step = "RUN cut -d' ' -f1 /proc/uptime > /t; sleep 2; cut -d' ' -f1 /proc/uptime >> /t";
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM busybox AS a\n{step}\nFROM busybox AS b\nENV OTHER=1\n{step}\nFROM scratch\nCOPY --from=a /t /a\nCOPY --from=b /t /b\n"
    ));
    let image = daemon.buildx().build(&context).image();
    let times = |path: &str| {
        let text = image.file(path).text().to_owned();
        let times: Vec<f64> = text.lines().map(|line| line.parse().unwrap()).collect();
        (times[0], times[1])
    };
    let (a, b) = (times("a"), times("b"));
    assert!(a.0 < b.1 && b.0 < a.1, "the steps ran from {a:?} and {b:?}");
}

#[test]
fn two_clients_share_one_run() {
    let daemon = Daemon::start();
    let served = Fixture::new("=== x\nx\n");
    let server = harness::HttpServer::start(served.path());
    // Each run of the step leaves a request at the server.
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM busybox\nRUN echo go; sleep 2; wget -q -O /x {}/x; cat /proc/sys/kernel/random/uuid > /id\n",
        server.address()
    ));
    let (first, second) = (daemon.buildx(), daemon.buildx());
    let images: Vec<_> = std::thread::scope(|scope| {
        let builds: Vec<_> = [&first, &second]
            .map(|buildx| scope.spawn(|| buildx.build(&context).image()))
            .into_iter()
            .collect();
        builds.into_iter().map(|build| build.join().unwrap()).collect()
    });
    assert_eq!(server.requests().len(), 1, "the step ran once: {:?}", server.requests());
    assert_eq!(images[0].file("id").text(), images[1].file("id").text());
}

#[test]
fn one_client_leaves_and_the_other_gets_its_image() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN echo under\"\"way; sleep 3; echo done > /done\n");
    let (first, second) = (daemon.buildx(), daemon.buildx());
    let mut impatient = first.build(&context).start();
    impatient.wait_for("underway");
    std::thread::scope(|scope| {
        let patient = scope.spawn(|| second.build(&context).image());
        // Long enough for the second client to have joined the running step.
        std::thread::park_timeout(Duration::from_millis(1200));
        impatient.signal("KILL");
        assert_eq!(patient.join().unwrap().file("done").text(), "done\n");
    });
}

#[test]
fn eight_clients_at_once() {
    let daemon = Daemon::start();
    std::thread::scope(|scope| {
        let builds: Vec<_> = (0..8)
            .map(|number| {
                let daemon = &daemon;
                scope.spawn(move || {
                    let context = Fixture::new(&format!(
                        "=== Dockerfile\nFROM busybox\nCOPY f /f\nRUN cat /f > /{number}\n=== f\n{number}\n"
                    ));
                    let image = daemon.buildx().build(&context).image();
                    assert_eq!(image.file(&number.to_string()).text(), format!("{number}\n"));
                })
            })
            .collect();
        builds.into_iter().for_each(|build| build.join().unwrap());
    });
}
