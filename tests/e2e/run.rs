//! RUN: forms, shells, users, environment, what a step sees of the machine, and what it may not do.

use harness::{Daemon, Fixture};

fn image(dockerfile: &str) -> harness::Image {
    let daemon = Daemon::start();
    let context = Fixture::new(&format!("=== Dockerfile\n{dockerfile}"));
    daemon.buildx().build(&context).image()
}

#[test]
fn shell_and_exec_form() {
    let image = image(
        r#"FROM busybox
ENV WHO=kiln
RUN echo "$WHO" > /shell
RUN ["/bin/sh", "-c", "printf '%s' \"$WHO\" > /exec"]
RUN ["touch", "/a $WHO"]
SHELL ["/bin/sh", "-e", "-c"]
RUN false || true; echo $0 $- > /options
"#,
    );
    assert_eq!(image.file("shell").text(), "kiln\n");
    assert_eq!(image.file("exec").text(), "kiln");
    assert!(image.has("a $WHO"), "the exec form expands nothing");
    assert!(image.file("options").text().contains('e'));
    assert_eq!(*image.runtime("Shell"), serde_json::json!(["/bin/sh", "-e", "-c"]));
}

#[test]
fn the_user_decides_owner_and_groups() {
    let image = image(
        r#"FROM busybox
RUN adduser -u 1234 -D builder && addgroup -g 4321 extra && addgroup builder extra
USER builder
RUN id -u > /tmp/uid; id -G > /tmp/groups; touch /tmp/mine; echo $HOME > /tmp/home
USER 77:88
RUN id -u > /tmp/uid2; id -g >> /tmp/uid2
USER builder:www-data
RUN id -g > /tmp/gid3
"#,
    );
    assert_eq!(image.file("tmp/uid").text(), "1234\n");
    assert_eq!(
        image.file("tmp/groups").text().split_whitespace().collect::<Vec<_>>(),
        ["1234", "4321"]
    );
    assert_eq!((image.file("tmp/mine").uid, image.file("tmp/mine").gid), (1234, 1234));
    assert_eq!(image.file("tmp/home").text(), "/home/builder\n");
    assert_eq!(image.file("tmp/uid2").text(), "77\n88\n");
    assert_eq!(image.file("tmp/gid3").text(), "33\n");
    assert_eq!(*image.runtime("User"), serde_json::json!("builder:www-data"));
}

#[test]
fn workdir_is_made_and_entered() {
    let image = image(
        r#"FROM busybox
WORKDIR /a/b
RUN pwd > here
WORKDIR c
RUN pwd > here
ENV DIR=/from-env
WORKDIR $DIR/x
RUN pwd > here
"#,
    );
    assert_eq!(image.file("a/b/here").text(), "/a/b\n");
    assert_eq!(image.file("a/b/c/here").text(), "/a/b/c\n");
    assert_eq!(image.file("from-env/x/here").text(), "/from-env/x\n");
    assert_eq!(*image.runtime("WorkingDir"), serde_json::json!("/from-env/x"));
}

#[test]
fn files_that_the_daemon_mounts_do_not_stay() {
    let image = image(
        r#"FROM busybox
RUN cat /etc/hosts /etc/resolv.conf > /seen; hostname > /name; echo x > /run/kept; mkdir /tmp/d
"#,
    );
    assert!(image.file("seen").text().contains("localhost"));
    assert!(!image.file("name").text().trim().is_empty());
    assert_eq!(image.file("run/kept").text(), "x\n", "/run belongs to the image");
    let top = image.layers.last().unwrap();
    let mut paths = top.paths();
    paths.sort_unstable();
    // Parents of what was written may be in the layer; the stubs of mounts must not.
    for stub in ["etc/hosts", "etc/resolv.conf", "etc/hostname", "proc", "sys", "dev"] {
        assert!(!paths.contains(&stub), "{stub} stays in the layer: {paths:?}");
    }
}

#[test]
fn deletions_become_whiteouts() {
    let image = image(
        r#"FROM busybox
RUN mkdir -p /data/sub && echo 1 > /data/one && echo 2 > /data/sub/two && echo 3 > /three
RUN rm -r /data/sub /three && echo 4 > /data/four
RUN rm -rf /data && mkdir /data && echo 5 > /data/five
"#,
    );
    assert_eq!(image.files_in("data"), ["data/five"]);
    assert!(!image.has("three"));
    let second = image.layers[2].paths();
    assert!(second.contains(&".wh.three"), "{second:?}");
    assert!(second.contains(&"data/.wh.sub"), "{second:?}");
}

#[test]
fn kinds_modes_times_and_links_survive() {
    let image = image(
        r#"FROM busybox
RUN mkdir /k && cd /k && echo a > file && chmod 4751 file && ln file hard && ln -s ../gone sym && mkfifo pipe && mknod null c 1 3 \
 && touch -d '2001-02-03 04:05:06' old && chown 12:34 old && mkdir -m 1777 sticky
"#,
    );
    use harness::Kind;
    assert_eq!(image.file("k/file").mode, 0o4751);
    let linked = [&image.tree["k/file"].kind, &image.tree["k/hard"].kind];
    assert!(
        linked.iter().any(|kind| matches!(kind, Kind::Hardlink(_))),
        "{linked:?}"
    );
    assert_eq!(image.tree["k/sym"].kind, Kind::Symlink("../gone".into()));
    assert_eq!(image.tree["k/pipe"].kind, Kind::Other(b'6'));
    assert_eq!(image.tree["k/null"].kind, Kind::Other(b'3'));
    assert_eq!(image.file("k/old").mtime, 981_173_106);
    assert_eq!((image.file("k/old").uid, image.file("k/old").gid), (12, 34));
    assert_eq!(image.file("k/sticky").mode, 0o1777);
}

// caps: exec.meta.network
#[test]
fn networks() {
    let image = image(
        r#"FROM busybox
RUN --network=none ls /sys/class/net > /none
RUN --network=default ls /sys/class/net > /default
"#,
    );
    assert_eq!(image.file("none").text().split_whitespace().collect::<Vec<_>>(), ["lo"]);
    assert!(image.file("default").text().contains("lo"));
}

#[test]
fn host_network_needs_an_entitlement() {
    let dockerfile = "=== Dockerfile\nFROM busybox\nRUN --network=host ls /sys/class/net\n";
    let context = Fixture::new(dockerfile);
    let strict = Daemon::start();
    strict.buildx().build(&context).fails().says(&["network.host"]);
    let open = Daemon::with().arg("--allow-insecure-entitlement=network.host").start();
    open.buildx().build(&context).arg("--allow=network.host").ok();
}

#[test]
fn standard_input_is_empty_and_output_is_complete() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN wc -c; for i in $(seq 1 3000); do echo line $i; done; echo to stderr >&2; printf 'no newline'\n",
    );
    let outcome = daemon
        .buildx()
        .build(&context)
        .env("BUILDKIT_STEP_LOG_MAX_SIZE", "-1")
        .ok();
    let progress = outcome.progress();
    let log = &progress.step("RUN wc").log;
    assert_eq!(log.first().map(String::as_str), Some("0"));
    let lines: Vec<&str> = log.iter().filter_map(|line| line.strip_prefix("line ")).collect();
    assert_eq!(lines.len(), 3000, "no line is lost");
    assert!(
        lines
            .iter()
            .enumerate()
            .all(|(index, number)| number.parse() == Ok(index + 1)),
        "lines come in their order"
    );
    assert!(
        log.iter().any(|line| line == "to stderr") && log.iter().any(|line| line == "no newline"),
        "{log:?}"
    );
}

// caps: exec.meta.ulimit
#[test]
fn limits_and_shared_memory() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN ulimit -n > /files; df -k /dev/shm | tail -n 1 > /shm; stat -c %a /dev/shm /dev/null /tmp > /modes\n",
    );
    let image = daemon
        .buildx()
        .build(&context)
        .args(&["--ulimit", "nofile=321:321", "--shm-size", "8m"])
        .image();
    assert_eq!(image.file("files").text(), "321\n");
    assert_eq!(image.file("shm").text().split_whitespace().nth(1), Some("8192"));
    assert_eq!(image.file("modes").text(), "1777\n666\n1777\n");
}

#[test]
fn extra_hosts_are_seen_and_not_kept() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN grep kiln.test /etc/hosts > /seen\n");
    let image = daemon
        .buildx()
        .build(&context)
        .args(&["--add-host", "kiln.test:10.1.2.3"])
        .image();
    assert_eq!(
        image.file("seen").text().split_whitespace().collect::<Vec<_>>(),
        ["10.1.2.3", "kiln.test"]
    );
    assert!(!image.mentions(b"10.1.2.3\tlocalhost"));
}
