//! Stages: what is needed runs, what is not does not, and only the last one is the image.

use harness::{Daemon, Fixture};

#[test]
fn stages_nobody_needs_never_run() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS unused\nRUN exit 1\nFROM busybox AS used\nRUN echo yes > /yes\nFROM scratch\nCOPY --from=used /yes /\n",
    );
    let (image, outcome) = daemon.buildx().build(&context).image_and_outcome();
    assert_eq!(image.files_in(""), ["yes"]);
    assert!(outcome.progress().find("exit 1").is_none());
    assert_eq!(image.layers.len(), 1);
}

#[test]
fn a_target_ends_the_build_early() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS deps\nRUN echo deps > /deps\nFROM deps AS test\nRUN echo tested > /tested\nFROM deps AS build\nRUN echo built > /built\nFROM scratch AS final\nCOPY --from=build /built /\n",
    );
    let buildx = daemon.buildx();
    let (image, outcome) = buildx.build(&context).target("test").image_and_outcome();
    assert!(image.has("tested") && image.has("deps") && !image.has("built"));
    assert!(outcome.progress().find("echo built").is_none());
    let (image, outcome) = buildx.build(&context).image_and_outcome();
    assert_eq!(image.files_in(""), ["built"]);
    assert!(
        outcome.progress().cached("echo deps"),
        "the shared stage is not built again"
    );
    assert!(outcome.progress().find("echo tested").is_none());
}

#[test]
fn stages_by_name_number_and_image() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS First\nRUN echo 1 > /one\nFROM busybox\nRUN echo 2 > /two\nFROM scratch\nCOPY --from=first /one /\nCOPY --from=1 /two /\nCOPY --from=alpine /etc/alpine-release /release\n",
    );
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.files_in(""), ["one", "release", "two"]);
}

#[test]
fn a_stage_inherits_configuration_from_its_parent() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS base\nENV A=1 B=2\nLABEL team=kiln\nEXPOSE 80/tcp 53/udp\nVOLUME /data\nSTOPSIGNAL SIGINT\nHEALTHCHECK --interval=5s --retries=2 CMD true\nENTRYPOINT [\"/bin/echo\"]\nCMD [\"hi\"]\nFROM base\nENV B=3\nENTRYPOINT [\"/bin/true\"]\n",
    );
    let image = daemon.buildx().build(&context).image();
    assert!(image.env().contains(&"A=1") && image.env().contains(&"B=3"));
    assert_eq!(image.runtime("Labels")["team"], "kiln");
    let ports: Vec<&String> = image.runtime("ExposedPorts").as_object().unwrap().keys().collect();
    assert_eq!(ports, ["53/udp", "80/tcp"]);
    assert!(image.runtime("Volumes")["/data"].is_object());
    assert_eq!(image.runtime("StopSignal"), "SIGINT");
    assert_eq!(image.runtime("Healthcheck")["Interval"], 5_000_000_000_u64);
    assert_eq!(
        image.runtime("Healthcheck")["Test"],
        serde_json::json!(["CMD-SHELL", "true"])
    );
    assert_eq!(*image.runtime("Entrypoint"), serde_json::json!(["/bin/true"]));
    assert!(
        image.runtime("Cmd").is_null(),
        "a new entrypoint drops an inherited command"
    );
}

#[test]
fn onbuild_runs_in_the_child() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS parent\nONBUILD COPY app.txt /app.txt\nONBUILD RUN tr a-z A-Z < /app.txt > /loud.txt\nFROM parent\nRUN test -e /app.txt\n=== app.txt\nquiet\n",
    );
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.file("loud.txt").text(), "QUIET\n");
    assert!(image.runtime("OnBuild").is_null());
}

#[test]
fn conditional_stages() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nARG MODE=prod\nFROM busybox AS base\nFROM base AS dev\nRUN echo dev > /mode\nFROM base AS prod\nRUN echo prod > /mode\nFROM ${MODE} AS final\n",
    );
    let buildx = daemon.buildx();
    let (image, outcome) = buildx.build(&context).image_and_outcome();
    assert_eq!(image.file("mode").text(), "prod\n");
    assert!(outcome.progress().find("echo dev").is_none());
    assert_eq!(
        buildx
            .build(&context)
            .build_arg("MODE", "dev")
            .image()
            .file("mode")
            .text(),
        "dev\n"
    );
}

#[test]
fn history_names_every_step() {
    let daemon = Daemon::start();
    let context =
        Fixture::new("=== Dockerfile\nFROM busybox\nENV A=1\nRUN echo x > /x\nCOPY f /f\nCMD [\"sh\"]\n=== f\n1\n");
    let image = daemon.buildx().build(&context).image();
    let history = image.config["history"].as_array().unwrap();
    let said: Vec<&str> = history.iter().filter_map(|step| step["created_by"].as_str()).collect();
    assert_eq!(
        &said[1..],
        [
            "ENV A=1",
            "RUN /bin/sh -c echo x > /x # buildkit",
            "COPY f /f # buildkit",
            "CMD [\"sh\"]"
        ]
    );
    assert!(
        history
            .iter()
            .skip(1)
            .all(|step| step["comment"] == "buildkit.dockerfile.v0")
    );
    assert_eq!(history[1]["empty_layer"], true);
}
