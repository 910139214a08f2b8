//! The build cache: what is run again and what is not, across changes, options and a restart of the daemon.

use harness::{Daemon, Fixture};

const PROJECT: &str = r#"
=== Dockerfile
FROM busybox AS deps
COPY deps.txt /
RUN cat /deps.txt > /installed
FROM deps AS build
COPY src /src
RUN cat /installed /src/* > /built
FROM busybox
COPY --from=build /built /app
RUN wc -l < /app > /lines
=== deps.txt
one
=== src/main.txt
main
=== src/other.txt
other
=== README.md
not used
"#;

#[test]
fn only_what_depends_on_a_change_runs_again() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(PROJECT);
    let (first, outcome) = buildx.build(&context).image_and_outcome();
    assert_eq!(outcome.progress().executed().len(), 6);

    let (second, outcome) = buildx.build(&context).image_and_outcome();
    assert_eq!(outcome.progress().executed(), Vec::<&str>::new());
    assert_eq!(second.digest, first.digest);
    assert_eq!(second.config, first.config);
    assert_eq!(second.layer_digests(), first.layer_digests());

    context.write("README.md", "changed, and no step reads it");
    let outcome = buildx.build(&context).ok();
    assert_eq!(outcome.progress().executed(), Vec::<&str>::new());

    context.write("src/main.txt", "changed\n");
    let (third, outcome) = buildx.build(&context).image_and_outcome();
    let progress = outcome.progress();
    assert!(progress.cached("cat /deps.txt"), "dependencies are not installed again");
    assert!(!progress.cached("cat /installed") && !progress.cached("COPY src"));
    assert_eq!(third.file("app").text(), "one\nchanged\nother\n");

    context.write("deps.txt", "one\ntwo\n");
    let outcome = buildx.build(&context).ok();
    assert!(!outcome.progress().cached("cat /deps.txt"));
}

#[test]
fn the_same_content_is_the_same_work() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS build\nCOPY in.txt /in.txt\nRUN grep -v comment /in.txt > /out.txt\nFROM busybox\nCOPY --from=build /out.txt /out.txt\nRUN cat /out.txt > /final.txt\n=== in.txt\nvalue\ncomment 1\n",
    );
    buildx.build(&context).ok();
    context.write("in.txt", "value\ncomment 2\n");
    let outcome = buildx.build(&context).ok();
    let progress = outcome.progress();
    assert!(!progress.cached("grep -v"), "its input changed");
    assert!(
        progress.cached("cat /out.txt"),
        "its input did not: the bytes that were copied are the same"
    );
    // A touched file is not a changed file.
    let status = std::process::Command::new("touch")
        .arg("-d")
        .arg("2001-01-01")
        .arg(context.path().join("in.txt"))
        .status()
        .unwrap();
    assert!(status.success());
    let outcome = buildx.build(&context).ok();
    assert_eq!(outcome.progress().executed(), Vec::<&str>::new());
}

// caps: meta.ignorecache
#[test]
fn no_cache_runs_everything_and_replaces_it() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS a\nRUN cat /proc/sys/kernel/random/uuid > /id\nFROM a\nRUN cat /id > /copy\n",
    );
    let first = buildx.build(&context).image();
    let again = buildx.build(&context).image();
    assert_eq!(again.file("id").text(), first.file("id").text());
    let fresh = buildx.build(&context).arg("--no-cache").image();
    assert_ne!(fresh.file("id").text(), first.file("id").text());
    assert_eq!(fresh.file("copy").text(), fresh.file("id").text());
    let after = buildx.build(&context).image();
    assert_eq!(
        after.file("id").text(),
        fresh.file("id").text(),
        "the newer result is the one that is kept"
    );
}

#[test]
fn no_cache_for_one_stage() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS a\nRUN echo a > /a\nFROM busybox AS b\nRUN echo b > /b\nFROM scratch\nCOPY --from=a /a /\nCOPY --from=b /b /\n",
    );
    buildx.build(&context).ok();
    let outcome = buildx.build(&context).args(&["--no-cache-filter", "b"]).ok();
    let progress = outcome.progress();
    assert!(progress.cached("echo a") && !progress.cached("echo b"));
}

#[test]
fn results_survive_a_restart() {
    let mut daemon = Daemon::start();
    let context = Fixture::new(PROJECT);
    let first = daemon.buildx().build(&context).image();
    daemon.stop();
    daemon.restart();
    let (second, outcome) = daemon.buildx().build(&context).image_and_outcome();
    assert_eq!(outcome.progress().executed(), Vec::<&str>::new());
    assert_eq!(second.digest, first.digest);
    daemon.kill();
    daemon.restart();
    let (third, outcome) = daemon.buildx().build(&context).image_and_outcome();
    assert_eq!(
        outcome.progress().executed(),
        Vec::<&str>::new(),
        "a kill loses nothing that was finished"
    );
    assert_eq!(third.digest, first.digest);
}

#[test]
fn a_failed_step_is_not_remembered() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let served = Fixture::new("=== x\n1\n");
    let server = harness::HttpServer::start(served.path());
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM busybox\nRUN wget -q -O /got {}/late.txt\n",
        server.address()
    ));
    buildx.build(&context).fails();
    served.write("late.txt", "here now\n");
    assert_eq!(buildx.build(&context).image().file("got").text(), "here now\n");
}
