//! The first minute with Kiln: create a builder, look at it, build two stages, read the image.

use harness::{Daemon, Fixture, lab::Client};

const TWO_STAGES: &str = r#"
=== Dockerfile
FROM busybox AS build
WORKDIR /src
COPY message.txt .
RUN tr a-z A-Z < message.txt > loud.txt && echo junk > /junk

FROM busybox
COPY --from=build /src/loud.txt /loud.txt
ENV COLOUR=green
CMD ["cat", "/loud.txt"]
=== message.txt
hello kiln
"#;

fn builds_with(client: Client) {
    let daemon = Daemon::start();
    let buildx = daemon.client(client);
    let bootstrapped = buildx.run(&["inspect", "--bootstrap"]).ok();
    assert!(bootstrapped.stdout.contains("running"), "{}", bootstrapped.stdout);
    assert!(bootstrapped.stdout.contains("linux/"), "{}", bootstrapped.stdout);
    let list = buildx.run(&["ls"]).ok();
    assert!(
        list.stdout.contains("kiln") && list.stdout.contains("remote"),
        "{}",
        list.stdout
    );

    let context = Fixture::new(TWO_STAGES);
    let (image, outcome) = buildx.build(&context).image_and_outcome();
    assert_eq!(image.file("loud.txt").text(), "HELLO KILN\n");
    assert!(
        !image.has("junk") && !image.has("src"),
        "nothing of the build stage is in the image"
    );
    assert_eq!(image.layers.len(), 2, "the base's layer and one COPY");
    assert_eq!(image.layers[1].paths(), ["loud.txt"]);
    assert_eq!(*image.runtime("Cmd"), serde_json::json!(["cat", "/loud.txt"]));
    assert!(image.env().contains(&"COLOUR=green"));
    assert_eq!(image.config["os"], "linux");
    assert_eq!(image.run(&["/bin/cat", "/loud.txt"]), "HELLO KILN\n");
    let progress = outcome.progress();
    assert!(progress.step("RUN tr").done && !progress.cached("RUN tr"));

    let (again, outcome) = buildx.build(&context).image_and_outcome();
    assert_eq!(
        outcome.progress().executed(),
        Vec::<&str>::new(),
        "everything comes from the cache"
    );
    assert_eq!(
        again.digest, image.digest,
        "the second build is the first, byte for byte"
    );
}

// caps: source.image source.local exec.meta.base exec.mount.bind file.base constraints platform meta.description
#[test]
fn the_client_of_debian_stable() {
    builds_with(Client::Stable);
}

// caps: solve.base return proto.refarray gateway.solve.metadata
#[test]
fn the_newest_client() {
    builds_with(Client::Newest);
}

#[test]
fn two_builds_after_each_other_leave_nothing_running() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN echo one > /one\n");
    let _first = daemon.buildx().build(&context).ok();
    let _second = daemon.buildx().build(&context).arg("--no-cache").ok();
    let quiet = harness::process::eventually(std::time::Duration::from_secs(10), || {
        daemon.descendants().is_empty().then_some(())
    });
    assert!(quiet.is_some(), "processes remain: {:?}", daemon.descendants());
}
