//! Mounts of a spec, stubs, hostile images.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use kiln_executor::{
    ExecError, FileMount, MountFlags, MountKind, MountSpec, Overlay, OverlayWritable, ProcessSpec, RootMount, Step,
    clean_stubs,
};

use crate::lab::{Root, image, output, run};

pub(crate) const CASES: &[crate::Case] = &[
    ("bind_selector_and_readonly", bind_selector_and_readonly),
    ("overlay_mounts", overlay_mounts),
    ("tmpfs_and_secret_files", tmpfs_and_secret_files),
    ("sockets_can_be_mounted", sockets_can_be_mounted),
    ("stubs_go_and_times_return", stubs_go_and_times_return),
    ("stubs_with_content_stay", stubs_with_content_stay),
    ("images_cannot_reach_the_host", images_cannot_reach_the_host),
    ("many_layers", many_layers),
    ("empty_root_and_plain_root", empty_root_and_plain_root),
    ("readonly_root", readonly_root),
];

fn bind(source: &std::path::Path, selector: &str, dest: &str) -> MountSpec {
    MountSpec::new(
        dest,
        MountKind::Bind {
            source: source.to_owned(),
            selector: selector.to_owned(),
        },
    )
}

fn bind_selector_and_readonly() {
    let root = Root::new();
    let shared = root.path("shared");
    fs::create_dir_all(shared.join("a/b")).unwrap();
    fs::write(shared.join("a/b/file"), "content").unwrap();
    symlink("/a/b", shared.join("link")).unwrap();
    let mut spec = root.sh("cat /mnt/file /one; echo w > /rw/new; touch /mnt/x 2>&1 | grep -c Read-only");
    spec.mounts = vec![
        bind(&shared, "link", "/mnt").readonly(),
        bind(&shared, "a/b/file", "/one"),
        bind(&shared, "", "/rw"),
    ];
    assert_eq!(output(spec), "contentcontent1\n");
    assert_eq!(fs::read_to_string(shared.join("new")).unwrap(), "w\n");
    let mut spec = root.sh("true");
    spec.mounts = vec![bind(&shared, "nope", "/mnt")];
    let error = run(spec).unwrap_err();
    assert!(
        matches!(
            &error,
            ExecError::Setup {
                step: Step::Source,
                errno: 2,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        "cannot open mount source nope: no such file or directory"
    );
}

fn overlay_mounts() {
    let root = Root::new();
    for (dir, name) in [("l1", "one"), ("l2", "two")] {
        fs::create_dir_all(root.path(dir).join("sub")).unwrap();
        fs::write(root.path(dir).join("sub").join(name), name).unwrap();
    }
    for dir in ["u", "w"] {
        fs::create_dir(root.path(dir)).unwrap();
    }
    let lowers = vec![root.path("l1"), root.path("l2")];
    let reading = Overlay {
        lowers: lowers.clone(),
        writable: None,
    };
    let writing = Overlay {
        lowers,
        writable: Some(OverlayWritable {
            upper: root.path("u"),
            work: root.path("w"),
        }),
    };
    let mut spec =
        root.sh("cat /ro/one /ro/two; echo 3 > /rw/sub/three; rm /rw/sub/one; touch /ro/x 2>/dev/null || echo ro");
    spec.mounts = vec![
        MountSpec::new(
            "/ro",
            MountKind::Overlay {
                overlay: reading,
                selector: "sub".into(),
            },
        )
        .readonly(),
        MountSpec::new(
            "/rw",
            MountKind::Overlay {
                overlay: writing,
                selector: String::new(),
            },
        ),
    ];
    assert_eq!(output(spec), "onetworo\n");
    assert!(root.path("u/sub/three").exists());
    assert_eq!(fs::symlink_metadata(root.path("u/sub/one")).unwrap().rdev(), 0);
}

fn tmpfs_and_secret_files() {
    let root = Root::new();
    let secret = FileMount {
        content: b"s\xffcret".to_vec(),
        mode: 0o440,
        uid: 1000,
        gid: 44,
    };
    let mut spec = root.sh(
        "od -An -c /run/secrets/key | tr -s ' '; stat -c '%a %u %g' /run/secrets/key; grep ' /run/secrets/key ' /proc/mounts \
         | cut -d' ' -f3; (echo x > /run/secrets/key) 2>/dev/null || echo ro; df -k /t | tail -1 | tr -s ' ' | cut -d' ' -f2; \
         stat -c %a /t; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2",
    );
    let flags = MountFlags {
        nosuid: true,
        nodev: true,
        noexec: true,
    };
    spec.mounts = vec![
        MountSpec {
            dest: "/run/secrets/key".into(),
            kind: MountKind::File(secret),
            readonly: true,
            flags,
        },
        MountSpec::new(
            "/t",
            MountKind::Tmpfs {
                size: Some(1 << 20),
                mode: Some(0o1777),
            },
        ),
        MountSpec::new(
            "/dev/shm",
            MountKind::Tmpfs {
                size: Some(2 << 20),
                mode: Some(0o1777),
            },
        ),
    ];
    assert_eq!(
        output(spec),
        " s 377 c r e t\n440 1000 44\ntmpfs\nro\n1024\n1777\n2048\n"
    );
    let found = std::process::Command::new("grep")
        .args(["-rla", "cret"])
        .arg(root.upper())
        .output()
        .unwrap();
    assert!(found.stdout.is_empty(), "{found:?}");
    assert!(
        !format!(
            "{:?}",
            FileMount {
                content: b"hidden".to_vec(),
                mode: 0,
                uid: 0,
                gid: 0
            }
        )
        .contains("hidden")
    );
}

fn sockets_can_be_mounted() {
    let root = Root::new();
    let _listener = std::os::unix::net::UnixListener::bind(root.path("agent.sock")).unwrap();
    let mut spec = root.sh("test -S /run/agent.sock && echo socket");
    spec.mounts = vec![bind(&root.path("agent.sock"), "", "/run/agent.sock")];
    assert_eq!(output(spec), "socket\n");
}

fn tree(dir: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut stack = vec![dir.to_owned()];
    while let Some(next) = stack.pop() {
        for entry in fs::read_dir(&next).unwrap().flatten() {
            found.push(entry.path().strip_prefix(dir).unwrap().to_string_lossy().into_owned());
            if entry.file_type().unwrap().is_dir() {
                stack.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

fn stubs_go_and_times_return() {
    let root = Root::new();
    let old = (
        std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789),
        (),
    );
    fs::create_dir_all(root.path("lower/opt")).unwrap();
    fs::File::open(root.path("lower/opt"))
        .unwrap()
        .set_modified(old.0)
        .unwrap();
    let cache = root.path("cache");
    fs::create_dir(&cache).unwrap();
    let mut spec = root.sh("echo x > /opt/deep/cache/file");
    spec.hosts = Some("127.0.0.1 localhost\n".into());
    spec.resolv_conf = Some(String::new());
    spec.mounts = vec![bind(&cache, "", "/opt/deep/cache"), bind(&cache, "", "/opt/flat")];
    let report = run(spec.clone()).unwrap().report;
    assert!(root.upper().join("opt/deep/cache").exists());
    clean_stubs(&root.upper(), &report.stubs, false).unwrap();
    assert_eq!(tree(&root.upper()), ["dev", "etc", "opt", "opt/deep", "proc", "sys"]);
    clean_stubs(&root.upper(), &report.stubs, true).unwrap();
    assert_eq!(tree(&root.upper()), ["dev", "etc", "opt", "proc", "sys"]);
    assert_eq!(
        fs::metadata(root.upper().join("opt")).unwrap().modified().unwrap(),
        old.0
    );
    let etc = |p: &std::path::Path| fs::metadata(p.join("etc")).unwrap().modified().unwrap();
    assert_eq!(etc(&root.upper()), etc(image()));
    assert!(cache.join("file").exists());
}

fn stubs_with_content_stay() {
    let root = Root::new();
    let cache = root.path("cache");
    fs::create_dir(&cache).unwrap();
    fs::create_dir(root.path("lower/srv")).unwrap();
    // The process changes the directory around the stub: its time is its own then.
    let mut spec = root.sh("echo x > /srv/own");
    spec.mounts = vec![bind(&cache, "", "/srv/stub"), bind(&cache, "", "/made/by/us")];
    let report = run(spec).unwrap().report;
    fs::write(root.upper().join("made/by/us/content"), "x").unwrap();
    let before = fs::metadata(root.upper().join("srv")).unwrap().modified().unwrap();
    clean_stubs(&root.upper(), &report.stubs, true).unwrap();
    assert_eq!(
        fs::metadata(root.upper().join("srv")).unwrap().modified().unwrap(),
        before
    );
    assert!(!root.upper().join("srv/stub").exists());
    assert!(root.upper().join("made/by/us/content").exists());
}

fn images_cannot_reach_the_host() {
    let root = Root::new();
    let outside = root.path("outside");
    fs::create_dir_all(outside.join("etc")).unwrap();
    fs::write(outside.join("etc/passwd"), "evil:x:0:0::/:/bin/sh\n").unwrap();
    let up = format!("../../../../../../../../..{}", outside.display());
    symlink(outside.display().to_string(), root.path("lower/absolute")).unwrap();
    symlink(&up, root.path("lower/relative")).unwrap();
    fs::create_dir(root.path("lower/etc")).unwrap();
    symlink(outside.join("etc/passwd"), root.path("lower/etc/passwd")).unwrap();
    symlink(outside.join("etc/hosts"), root.path("lower/etc/hosts")).unwrap();
    symlink("/proc/1/root", root.path("lower/magic")).unwrap();
    symlink(&outside, root.path("lower/dev")).unwrap();
    let cache = root.path("cache");
    fs::create_dir(&cache).unwrap();
    let mut spec = root.sh("echo x > /absolute/one/file; echo x > /relative/two/file; echo done");
    spec.hosts = Some("127.0.0.1 localhost\n".into());
    spec.cwd = "/relative/cwd".into();
    spec.mounts = vec![bind(&cache, "", "/absolute/one"), bind(&cache, "", "/relative/two")];
    let before = tree(&outside);
    let text = output(spec.clone());
    assert_eq!(text, "done\n");
    assert_eq!(tree(&outside), before, "the host's directory was touched");
    spec.user = "evil".into();
    assert!(run(spec).unwrap_err().to_string().contains("unable to find user evil"));
    // The kernel's own links (into another process's view) are not followed at all.
    let mut spec = root.sh("true");
    spec.mounts = vec![bind(&cache, "", "/magic/x")];
    assert!(matches!(
        run(spec).unwrap_err(),
        ExecError::Setup { step: Step::Target, .. }
    ));
    // A source cannot be left by its selector either.
    symlink(outside.display().to_string(), cache.join("out")).unwrap();
    let mut spec = root.sh("true");
    spec.mounts = vec![bind(&cache, "out/etc", "/m")];
    assert!(matches!(
        run(spec).unwrap_err(),
        ExecError::Setup { step: Step::Source, .. }
    ));
}

fn many_layers() {
    let root = Root::new();
    let mut lowers = Vec::new();
    for n in 0..300 {
        let dir = root.path(&format!("a-layer-directory-with-a-rather-long-name-{n}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(format!("f{n}")), "").unwrap();
        lowers.push(dir);
    }
    lowers.push(image().to_owned());
    let writable = Some(OverlayWritable {
        upper: root.upper(),
        work: root.path("work"),
    });
    let args = vec!["sh".into(), "-c".into(), "ls / | grep -c '^f'".into()];
    let spec = ProcessSpec::new(RootMount::Overlay(Overlay { lowers, writable }), args);
    assert_eq!(output(spec), "300\n");
}

fn empty_root_and_plain_root() {
    let root = Root::new();
    let overlay = Overlay {
        lowers: Vec::new(),
        writable: Some(OverlayWritable {
            upper: root.upper(),
            work: root.path("work"),
        }),
    };
    let mut spec = ProcessSpec::new(
        RootMount::Overlay(overlay),
        vec!["/tool/busybox".into(), "ls".into(), "/".into()],
    );
    spec.mounts = vec![bind(&image().join("bin"), "", "/tool").readonly()];
    assert_eq!(output(spec), "dev\nproc\nsys\ntool\n");
    assert_eq!(tree(&root.upper()), ["dev", "proc", "sys", "tool"]);
    let plain = Root::new();
    fs::create_dir(plain.path("plain")).unwrap();
    let mut spec = ProcessSpec::new(
        RootMount::Bind {
            path: plain.path("plain"),
        },
        vec!["/tool/busybox".into(), "touch".into(), "/written".into()],
    );
    spec.mounts = vec![bind(&image().join("bin"), "", "/tool").readonly()];
    output(spec);
    assert!(plain.path("plain/written").exists());
}

fn readonly_root() {
    let root = Root::new();
    let mut spec =
        root.sh("touch /x 2>/dev/null || echo ro; touch /tmp/y 2>/dev/null || echo ro; echo z > /t/z && echo rw; pwd");
    spec.root_readonly = true;
    spec.cwd = "/new".into();
    spec.mounts = vec![MountSpec::new(
        "/t",
        MountKind::Tmpfs {
            size: None,
            mode: Some(0o755),
        },
    )];
    assert_eq!(output(spec), "ro\nro\nrw\n/new\n");
    let mode = fs::metadata(root.upper().join("new")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
}
