//! RUN --mount: bind, cache, tmpfs; what they show, what they keep, what stays out of the image.

use harness::{Daemon, Fixture};

// caps: exec.mount.selector exec.mount.bind.readwrite-nooutput
#[test]
fn bind_mounts_show_and_forget() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
FROM busybox AS tools
RUN mkdir /kit && echo tool > /kit/tool
FROM busybox
RUN --mount=target=/context cat /context/dir/file > /from-context; ! touch /context/refused
RUN --mount=type=bind,from=tools,source=/kit,target=/kit cat /kit/tool > /from-stage
RUN --mount=type=bind,from=alpine,source=/etc/alpine-release,target=/release cat /release > /from-image
RUN --mount=type=bind,target=/w,rw touch /w/new && ls /w > /listing
RUN test ! -e /w/new && test ! -e /kit/tool
=== dir/file
context
"#,
    );
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.file("from-context").text(), "context\n");
    assert_eq!(image.file("from-stage").text(), "tool\n");
    assert!(image.file("from-image").text().starts_with("3."));
    assert!(image.file("listing").text().contains("new"));
    for path in ["context", "kit", "release", "w"] {
        assert!(!image.has(path), "the mount point {path} stays in the image");
    }
    assert!(!context.path().join("new").exists());
}

// caps: exec.mount.cache
#[test]
fn cache_mounts_outlive_steps_and_builds() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
FROM busybox
ARG ROUND
RUN --mount=type=cache,target=/c echo $ROUND >> /c/rounds; cat /c/rounds > /seen
RUN --mount=type=cache,target=/c,id=other ls /c | wc -l > /other
RUN --mount=type=cache,target=/c,readonly ! touch /c/x
RUN --mount=type=cache,target=/o,uid=12,gid=34,mode=0711 stat -c '%u %g %a' /o > /owner
"#,
    );
    let buildx = daemon.buildx();
    assert_eq!(
        buildx
            .build(&context)
            .build_arg("ROUND", "1")
            .image()
            .file("seen")
            .text(),
        "1\n"
    );
    let image = buildx.build(&context).build_arg("ROUND", "2").image();
    assert_eq!(image.file("seen").text(), "1\n2\n");
    assert_eq!(image.file("other").text(), "0\n");
    assert_eq!(image.file("owner").text(), "12 34 711\n");
    assert!(!image.has("c") && !image.has("o"), "cache mounts are not in the image");
    assert!(
        image
            .layers
            .iter()
            .skip(1)
            .all(|layer| !layer.paths().iter().any(|path| path.contains("rounds")))
    );
}

// caps: exec.mount.cache.content
#[test]
fn a_cache_mount_starts_from_a_stage() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS seed\nRUN mkdir /s && echo seeded > /s/f\nFROM busybox\nRUN --mount=type=cache,target=/c,from=seed,source=/s,id=seeded cat /c/f > /seen\n",
    );
    assert_eq!(daemon.buildx().build(&context).image().file("seen").text(), "seeded\n");
}

// caps: exec.mount.cache.sharing
#[test]
fn locked_cache_mounts_exclude_each_other() {
    let daemon = Daemon::start();
    // Both steps would see the other's mark if they ran at the same time.
    let step = "RUN --mount=type=cache,target=/c,sharing=locked test ! -e /c/busy && touch /c/busy && sleep 1 && rm /c/busy && touch";
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM busybox AS a\n{step} /a\nFROM busybox AS b\n{step} /b\nFROM scratch\nCOPY --from=a /a /\nCOPY --from=b /b /\n"
    ));
    assert_eq!(daemon.buildx().build(&context).image().files_in(""), ["a", "b"]);
}

#[test]
fn private_cache_mounts_are_not_shared_at_the_same_time() {
    let daemon = Daemon::start();
    // A second, shared mount is where the two steps wait for each other, so that both hold the private one at the same time.
    let step = |mine: &str, other: &str| {
        format!(
            "RUN --mount=type=cache,target=/c,sharing=private --mount=type=cache,target=/meet touch /c/{mine} /meet/{mine}; i=0; \
             while ! test -e /meet/{other}; do i=$((i+1)); test $i -lt 300 || exit 1; usleep 100000; done; ls /c > /{mine}"
        )
    };
    let (a, b) = (step("a", "b"), step("b", "a"));
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM busybox AS a\n{a}\nFROM busybox AS b\n{b}\nFROM scratch\nCOPY --from=a /a /\nCOPY --from=b /b /\n"
    ));
    let image = daemon.buildx().build(&context).image();
    assert_eq!((image.file("a").text(), image.file("b").text()), ("a\n", "b\n"));
}

// caps: exec.mount.tmpfs exec.mount.tmpfs.size
#[test]
fn tmpfs_mounts_are_empty_and_bounded() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN mkdir /t && touch /t/hidden\nRUN --mount=type=tmpfs,target=/t,size=1m ls /t | wc -l > /count; ! dd if=/dev/zero of=/t/big bs=1M count=3 2>/dev/null\nRUN ls /t > /after\n",
    );
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.file("count").text(), "0\n");
    assert_eq!(image.file("after").text(), "hidden\n");
}

#[test]
fn a_failing_step_keeps_the_cache_mount_usable() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN --mount=type=cache,target=/c,sharing=locked echo kept > /c/f; exit 1\n",
    );
    buildx.build(&context).fails();
    context.write(
        "Dockerfile",
        "FROM busybox\nRUN --mount=type=cache,target=/c,sharing=locked cat /c/f > /seen\n",
    );
    assert_eq!(buildx.build(&context).image().file("seen").text(), "kept\n");
}
