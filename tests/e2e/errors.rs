//! What goes wrong, and what the user is told: each failure names its place in the Dockerfile or what was asked for.

use harness::{Daemon, Fixture, Outcome};

fn failure(text: &str) -> Outcome {
    let daemon = Daemon::start();
    let context = Fixture::new(text);
    daemon.buildx().build(&context).fails()
}

#[test]
fn an_unknown_instruction_with_its_line() {
    failure("=== Dockerfile\nFROM busybox\nRUN true\nCOPPY a b\n").says(&[
        "Dockerfile:3",
        ">>> COPPY a b",
        "unknown instruction: COPPY",
        "did you mean COPY?",
    ]);
}

#[test]
fn a_syntax_error_with_its_line() {
    failure("=== Dockerfile\nFROM busybox\nENV\n").says(&[
        "Dockerfile:2",
        ">>> ENV",
        "ENV requires at least one argument",
    ]);
}

#[test]
fn an_unknown_stage() {
    failure("=== Dockerfile\nFROM busybox\nCOPY --from=nowhere:404 /a /b\n").says(&["nowhere:404"]);
}

#[test]
fn an_unknown_target() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM busybox AS build\n");
    daemon
        .buildx()
        .build(&context)
        .target("bild")
        .fails()
        .says(&["target stage \"bild\" could not be found", "did you mean build?"]);
}

#[test]
fn a_missing_source_of_copy() {
    failure("=== Dockerfile\nFROM busybox\nCOPY absent.txt /\n").says(&[
        "Dockerfile:2",
        ">>> COPY absent.txt /",
        "\"/absent.txt\": not found",
    ]);
}

#[test]
fn a_missing_required_secret() {
    failure("=== Dockerfile\nFROM busybox\nRUN --mount=type=secret,id=token,required=true cat /run/secrets/token\n")
        .says(&["Dockerfile:2", "secret token: not found"]);
}

#[test]
fn a_failing_run_with_exit_code_and_excerpt() {
    let outcome = failure("=== Dockerfile\nFROM busybox\n\nRUN echo before && \\\n    exit 42\n");
    let outcome = outcome.says(&[
        "Dockerfile:3",
        ">>> RUN echo before &&",
        "did not complete successfully: exit code: 42",
        "/bin/sh -c echo before &&     exit 42",
    ]);
    assert_eq!(
        outcome.progress().step("RUN echo").log.first().map(String::as_str),
        Some("before"),
        "its output is shown"
    );
}

#[test]
fn a_program_that_is_not_there() {
    failure("=== Dockerfile\nFROM busybox\nRUN [\"/absent\"]\n").says(&[
        "Dockerfile:2",
        "/absent",
        "no such file or directory",
    ]);
}

#[test]
fn an_image_that_is_not_there() {
    failure("=== Dockerfile\nFROM no-such-image:1\n").says(&[
        "Dockerfile:1",
        "docker.io/library/no-such-image:1",
        "not found",
    ]);
}

#[test]
fn an_unreachable_registry() {
    // Port 1 of the loopback interface refuses.
    failure("=== Dockerfile\nFROM 127.0.0.1:1/a/b:1\n").says(&[
        "Dockerfile:1",
        "127.0.0.1:1/a/b:1",
        "connection refused",
    ]);
}

#[test]
fn a_missing_dockerfile() {
    failure("=== other.txt\n").says(&["open Dockerfile: no such file or directory"]);
}

#[test]
fn an_empty_dockerfile() {
    failure("=== Dockerfile\n# nothing\n").says(&["file with no instructions"]);
}

#[test]
fn a_step_killed_by_a_signal() {
    failure("=== Dockerfile\nFROM busybox\nRUN sh -c 'kill -9 $$'; exit $?\n").says(&["exit code: 137"]);
}

#[test]
fn an_unknown_user() {
    failure("=== Dockerfile\nFROM busybox\nUSER nobody-of-that-name\nRUN true\n").says(&["nobody-of-that-name"]);
}

#[test]
fn a_copy_cannot_leave_the_context() {
    let daemon = Daemon::start();
    let outside = Fixture::new("=== outside.txt\nkeep out\n");
    let context = Fixture::new("=== Dockerfile\nFROM scratch\nCOPY way/outside.txt /\n");
    context.symlink(&outside.path().display().to_string(), "way");
    daemon.buildx().build(&context).fails().says(&["not found"]);
    let above = Fixture::new("=== Dockerfile\nFROM scratch\nCOPY ../../../../../../etc/passwd /\n");
    daemon.buildx().build(&above).fails().says(&["not found"]);
}
