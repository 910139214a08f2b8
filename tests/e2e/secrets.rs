//! Secrets: a step can read them, nothing else ever contains them.

use harness::{Daemon, Fixture};

const SECRET: &str = "s3cr3t-that-must-not-stay-4711";

fn context() -> Fixture {
    Fixture::new(
        r#"=== Dockerfile
FROM busybox
RUN --mount=type=secret,id=token wc -c < /run/secrets/token > /length; stat -c '%a %u' /run/secrets/token > /mode
RUN --mount=type=secret,id=token,target=/deep/er/t,uid=5,gid=6,mode=0440 stat -c '%a %u %g' /deep/er/t > /custom
RUN --mount=type=secret,id=token,env=TOKEN test -n "$TOKEN" && echo ${#TOKEN} > /env-length
RUN --mount=type=secret,id=absent test ! -e /run/secrets/absent
RUN test ! -e /run/secrets/token && test ! -e /deep
"#,
    )
}

// caps: exec.mount.secret exec.secretenv
#[test]
fn a_secret_is_read_and_stays_nowhere() {
    let daemon = Daemon::start();
    let secret = Fixture::new("");
    secret.write("token", SECRET);
    let buildx = daemon.buildx();
    let (image, outcome) = buildx
        .build(&context())
        .args(&[
            "--secret",
            &format!("id=token,src={}", secret.path().join("token").display()),
        ])
        .image_and_outcome();
    assert_eq!(image.file("length").text().trim(), SECRET.len().to_string());
    assert_eq!(image.file("mode").text(), "400 0\n");
    assert_eq!(image.file("custom").text(), "440 5 6\n");
    assert_eq!(image.file("env-length").text().trim(), SECRET.len().to_string());
    assert!(
        !image.has("run/secrets") && !image.has("deep"),
        "mount points stay in the image"
    );
    assert!(!image.mentions(SECRET.as_bytes()));
    assert!(!outcome.stderr.contains(SECRET) && !outcome.metadata.to_string().contains(SECRET));
    assert!(!daemon.log().contains(SECRET));
    assert_eq!(
        daemon.state_files_with(SECRET.as_bytes()),
        Vec::<std::path::PathBuf>::new()
    );
}

#[test]
fn a_secret_from_the_environment_and_a_changed_one() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN --mount=type=secret,id=token cat /run/secrets/token | wc -c > /n\n",
    );
    let build = |value: &str| {
        buildx
            .build(&context)
            .args(&["--secret", "id=token,env=TOKEN"])
            .env("TOKEN", value)
            .image()
    };
    assert_eq!(build("12345").file("n").text(), "5\n");
    assert_eq!(
        build("1234567").file("n").text(),
        "5\n",
        "another value of a secret is not another step"
    );
}

#[test]
fn a_secret_is_nowhere_on_disk_during_the_step_and_after_a_kill() {
    let mut daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN --mount=type=secret,id=token test -s /run/secrets/token && echo in-the-\"\"step && sleep 600; : kiln-mark-secret\n",
    );
    // The reference writes a secret that becomes an environment variable into its runtime's configuration file. Kiln does not.
    if !harness::lab::is_reference() {
        let dockerfile = context
            .read("Dockerfile")
            .replace("id=token ", "id=token --mount=type=secret,id=token,env=TOKEN ");
        context.write("Dockerfile", dockerfile);
    }
    let mut running = buildx
        .build(&context)
        .args(&["--secret", "id=token,env=TOKEN"])
        .env("TOKEN", SECRET)
        .start();
    running.wait_for("in-the-step");
    assert_eq!(
        daemon.state_files_with(SECRET.as_bytes()),
        Vec::<std::path::PathBuf>::new(),
        "during the step"
    );
    daemon.kill();
    assert_eq!(
        daemon.state_files_with(SECRET.as_bytes()),
        Vec::<std::path::PathBuf>::new(),
        "after a kill"
    );
    // How long a client waits for a daemon that is gone is its own affair.
    running.signal("KILL");
    let _ = running.finish();
    // Sweep what a killed daemon's runtime may have left behind.
    let left = harness::process::running_with("kiln-mark-secret");
    for id in left {
        harness::process::signal(id, "KILL");
    }
}
