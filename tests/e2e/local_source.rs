//! The local context: ignore files, other Dockerfiles, named contexts, what is sent and what is not.

use harness::{Daemon, Fixture};

// caps: source.local.excludepatterns
#[test]
fn dockerignore() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
FROM scratch
COPY . /
=== .dockerignore
# a comment
node_modules
**/*.log
!keep.log
docs/*
!docs/README.md
.git
Dockerfile
=== node_modules/big/file.js
x
=== a.log
x
=== sub/b.log
x
=== keep.log
x
=== docs/guide.md
x
=== docs/README.md
x
=== .git/HEAD
x
=== src/main.c
x
"#,
    );
    let image = daemon.buildx().build(&context).image();
    assert_eq!(
        image.files_in(""),
        [".dockerignore", "docs/README.md", "keep.log", "src/main.c"]
    );
}

#[test]
fn an_ignore_file_of_its_own_and_another_dockerfile() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== build/prod.Dockerfile\nFROM scratch\nCOPY . /\n=== build/prod.Dockerfile.dockerignore\n*\n!only\n=== .dockerignore\nonly\n=== only\n1\n=== rest\n2\n",
    );
    let file = context.path().join("build/prod.Dockerfile");
    let image = daemon
        .buildx()
        .build(&context)
        .args(&["-f", &file.display().to_string()])
        .image();
    assert_eq!(image.files_in(""), ["only"]);
    let image = daemon
        .buildx()
        .build(&context)
        .args(&["-f", "-"])
        .stdin("FROM scratch\nCOPY rest /r\n")
        .image();
    assert_eq!(image.files_in(""), ["r"]);
}

#[test]
fn a_context_from_an_archive_on_standard_input() {
    let daemon = Daemon::start();
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content) in [("Dockerfile", "FROM scratch\nCOPY f /f\n"), ("f", "from tar\n")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    let image = daemon
        .buildx()
        .build_of("-")
        .stdin(archive.into_inner().unwrap())
        .image();
    assert_eq!(image.file("f").text(), "from tar\n");
}

// caps: source.local.sessionid source.local.unique
#[test]
fn named_contexts() {
    let daemon = Daemon::start();
    let other = Fixture::new("=== extra.txt\nextra\n");
    let context = Fixture::new(
        "=== Dockerfile\nFROM base AS start\nFROM scratch\nCOPY --from=extra extra.txt /\nCOPY --from=start /etc/alpine-release /\n",
    );
    let image = daemon
        .buildx()
        .build(&context)
        .args(&["--build-context", &format!("extra={}", other.path().display())])
        .args(&["--build-context", "base=docker-image://alpine:3.19"])
        .image();
    assert_eq!(image.files_in(""), ["alpine-release", "extra.txt"]);
}

// caps: source.local.sharedkeyhint source.local.differ
#[test]
fn a_second_transfer_sends_only_what_changed() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new("=== Dockerfile\nFROM scratch\nCOPY data /data\n");
    for number in 0..40 {
        context.write(format!("data/{number}"), vec![b'a' + (number % 26) as u8; 50_000]);
    }
    let sent = |outcome: &harness::Outcome| -> f64 {
        let progress = outcome.progress();
        let line = progress
            .step("load build context")
            .log
            .iter()
            .find(|line| line.contains("transferring context"))
            .cloned()
            .unwrap();
        // A transfer of nothing may be reported without an amount.
        let amount = line
            .split_whitespace()
            .find(|word| word.ends_with('B') && word.starts_with(|c: char| c.is_ascii_digit()))
            .unwrap_or("0B")
            .to_owned();
        let number: f64 = amount
            .trim_end_matches(|c: char| c.is_ascii_alphabetic())
            .parse()
            .unwrap();
        number
            * if amount.ends_with("MB") {
                1e6
            } else if amount.ends_with("kB") {
                1e3
            } else {
                1.0
            }
    };
    assert!(sent(&buildx.build(&context).ok()) > 1.9e6);
    assert!(sent(&buildx.build(&context).ok()) < 1e4, "nothing changed");
    context.write("data/7", vec![b'!'; 50_000]);
    let changed = sent(&buildx.build(&context).ok());
    assert!((5e4..1e5).contains(&changed), "one file changed, {changed} bytes went");
}

#[test]
fn odd_names_and_kinds() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM scratch\nCOPY . /all/\n=== empty\n");
    let names = [
        "ünïcödé.txt",
        "with space",
        "line\nbreak",
        "-dash",
        "a.b",
        "a/b",
        "日本語/文.txt",
        "quote\"'",
        "%41",
        "star*",
    ];
    for name in names {
        context.write(name, name);
    }
    std::fs::create_dir(context.path().join("empty-dir")).unwrap();
    std::fs::hard_link(context.path().join("-dash"), context.path().join("hard")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(context.path().join("socket")).unwrap();
    // A socket in the context is no reason to fail or to hang; nothing else is promised about it.
    let image = daemon.buildx().build(&context).image();
    drop(socket);
    for name in names {
        assert_eq!(image.file(&format!("all/{name}")).text(), name);
    }
    assert_eq!(image.file("all/hard").text(), "-dash");
    assert!(image.has("all/empty-dir") && image.file("all/empty").size == 0);
}

// caps: source.local.includepatterns
#[test]
fn many_small_files_and_one_large_one() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM scratch\nCOPY . /\n");
    for number in 0..3000 {
        context.write(format!("d{}/f{number}", number % 50), number.to_string());
    }
    let large: Vec<u8> = (0..30_000_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    context.write("large", &large);
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.files_in("").len(), 3002);
    assert_eq!(image.file("d49/f2999").text(), "2999");
    assert!(image.file("large").bytes == large);
}
