//! ARG and ENV: scopes, defaults, expansion, predefined and platform arguments.

use harness::{Daemon, Fixture};

#[test]
fn scopes_and_defaults() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
ARG GLOBAL=global
ARG BASE=busybox
FROM $BASE AS first
RUN echo "[$GLOBAL]" > /not-declared
ARG GLOBAL
ARG LOCAL=local
RUN echo "$GLOBAL $LOCAL" > /declared
FROM $BASE
ARG GLOBAL=other
COPY --from=first /declared /not-declared /
RUN echo "[$LOCAL] $GLOBAL" > /second
ENV GLOBAL=env
RUN echo "$GLOBAL" > /env-wins
"#,
    );
    let buildx = daemon.buildx();
    let image = buildx.build(&context).image();
    assert_eq!(image.file("not-declared").text(), "[]\n");
    assert_eq!(image.file("declared").text(), "global local\n");
    assert_eq!(image.file("second").text(), "[] other\n");
    assert_eq!(image.file("env-wins").text(), "env\n");
    let image = buildx
        .build(&context)
        .build_arg("GLOBAL", "cli")
        .build_arg("LOCAL", "mine")
        .image();
    assert_eq!(image.file("declared").text(), "cli mine\n");
    assert_eq!(image.file("second").text(), "[] cli\n");
    assert_eq!(image.file("env-wins").text(), "env\n");
    assert!(
        !image.env().iter().any(|pair| pair.contains("mine")),
        "arguments do not stay in the image"
    );
}

#[test]
fn expansion() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
FROM busybox
ARG EMPTY=
ARG NAME=kiln-core.tar.gz
ENV A=${UNSET:-default} B=${NAME:+set} C=${EMPTY:-was-empty} D=\$literal E="a b" F='$NAME'
ENV G=${NAME#*-} H=${NAME%.gz} I=${NAME%%.*} J=${NAME/core/house} K=$A-$B
RUN printf '%s|' "$A" "$B" "$C" "$D" "$E" "$F" "$G" "$H" "$I" "$J" "$K" > /all
"#,
    );
    let image = daemon.buildx().build(&context).image();
    assert_eq!(
        image.file("all").text(),
        "default|set|was-empty|$literal|a b|$NAME|core.tar.gz|kiln-core.tar|kiln-core|kiln-house.tar.gz|default-set|"
    );
}

// caps: exec.meta.proxyenv
#[test]
fn predefined_and_platform_arguments() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
FROM --platform=$BUILDPLATFORM busybox
RUN echo "$HTTP_PROXY" > /proxy; echo "[$TARGETARCH]" > /undeclared
ARG TARGETOS TARGETARCH TARGETPLATFORM BUILDPLATFORM TARGETSTAGE
RUN echo "$TARGETOS/$TARGETARCH $TARGETPLATFORM $BUILDPLATFORM" > /platform
"#,
    );
    let image = daemon
        .buildx()
        .build(&context)
        .build_arg("HTTP_PROXY", "http://proxy.test:3128")
        .image();
    assert_eq!(image.file("proxy").text(), "http://proxy.test:3128\n");
    assert_eq!(image.file("undeclared").text(), "[]\n");
    let platform = format!("linux/{}", image.config["architecture"].as_str().unwrap());
    assert_eq!(
        image.file("platform").text(),
        format!("{platform} {platform} {platform}\n")
    );
    assert!(
        !image.config.to_string().contains("proxy.test"),
        "the proxy is not in the image's history"
    );
}

// caps: exporter.image.annotations
#[test]
fn labels_and_annotations_from_the_command_line() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nARG V=1\nLABEL version=$V \"two words\"=x\n");
    let image = daemon
        .buildx()
        .build(&context)
        .args(&["--label", "from=cli", "--annotation", "org.example.note=hi"])
        .build_arg("V", "2")
        .image();
    assert_eq!(
        *image.runtime("Labels"),
        serde_json::json!({"from": "cli", "two words": "x", "version": "2"})
    );
    assert_eq!(image.manifest["annotations"]["org.example.note"], "hi");
}

#[test]
fn an_argument_nobody_declares_is_ignored() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN true\n");
    let image = daemon.buildx().build(&context).build_arg("TYPO", "1").image();
    assert!(!image.config.to_string().contains("TYPO"));
}

#[test]
fn the_escape_directive_and_comments() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\n# escape=`\n# a comment\nFROM busybox\nRUN echo one `\n  # inside\n  two > /x\nENV P=C:\\dir\n",
    );
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.file("x").text(), "one two\n");
    assert!(image.env().contains(&"P=C:\\dir"));
}

#[test]
fn an_official_syntax_line_pulls_no_image() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\n# syntax=docker/dockerfile:1\nFROM busybox\nRUN echo x > /x\n");
    if harness::lab::is_reference() {
        // The reference runs the image, which the lab does not have.
        daemon.buildx().build(&context).fails();
        return;
    }
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.file("x").text(), "x\n");
    assert_eq!(daemon.mirror().requests("GET", "docker/dockerfile"), 0);
}
