//! COPY and ADD: owners, modes, patterns, links, archives, addresses.

use harness::{Daemon, Fixture, Kind};
use std::io::Write as _;

#[test]
fn owners_and_modes() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
FROM busybox
RUN adduser -u 1500 -D app
COPY a /plain
COPY --chown=app a /by-name
COPY --chown=app:www-data --chmod=0640 a /both
COPY --chown=10:20 tree /tree
COPY --chmod=u=rwX,go=rX tree /symbolic
USER app
COPY a /as-user
WORKDIR /home/app/deep
=== a 600
a
=== tree/x 755
x
=== tree/sub/y
y
"#,
    );
    let image = daemon.buildx().build(&context).image();
    let owner = |path: &str| (image.file(path).uid, image.file(path).gid);
    assert_eq!((owner("plain"), image.file("plain").mode), ((0, 0), 0o600));
    assert_eq!(owner("by-name"), (1500, 1500));
    assert_eq!((owner("both"), image.file("both").mode), ((1500, 33), 0o640));
    assert_eq!(owner("tree"), (10, 20));
    assert_eq!((owner("tree/sub/y"), image.file("tree/x").mode), ((10, 20), 0o755));
    assert_eq!(
        (image.file("symbolic/sub/y").mode, image.file("symbolic/x").mode),
        (0o644, 0o755)
    );
    assert_eq!(owner("as-user"), (0, 0), "COPY does not follow USER");
}

#[test]
fn destinations_and_patterns() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
FROM scratch
WORKDIR /w
COPY a.txt b
COPY a.txt dir/
COPY *.txt many/
COPY dir1 dir2 merged/
COPY deep /whole/
COPY ["with space", "/with space/"]
COPY ?.md [xy].log /patterns/
=== a.txt
a
=== b.txt
b
=== dir1/one
1
=== dir2/two
2
=== deep/er/file
f
=== q.md
q
=== x.log
x
=== z.log
z
"#,
    );
    context.write("with space", "s");
    let image = daemon.buildx().build(&context).image();
    assert_eq!(
        image.files_in(""),
        [
            "patterns/q.md",
            "patterns/x.log",
            "w/b",
            "w/dir/a.txt",
            "w/many/a.txt",
            "w/many/b.txt",
            "w/merged/one",
            "w/merged/two",
            "whole/er/file",
            "with space/with space"
        ]
    );
}

// caps: source.local.followpaths
#[test]
fn links_in_the_context() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM scratch\nCOPY . /all/\nCOPY link /followed\nCOPY dirlink/ /dir/\n=== real/file\nx\n",
    );
    context
        .symlink("real/file", "link")
        .symlink("real", "dirlink")
        .symlink("nowhere", "dangling");
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.tree["all/link"].kind, Kind::Symlink("real/file".into()));
    assert_eq!(image.tree["all/dangling"].kind, Kind::Symlink("nowhere".into()));
    assert_eq!(image.file("followed").text(), "x\n");
    assert_eq!(image.file("dir/file").text(), "x\n");
}

#[test]
fn through_links_in_the_image() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN mkdir /real && ln -s real /inside && ln -s /etc/../../../real /climbs && ln -s /../../../../tmp /up\nCOPY f /inside/one\nCOPY f /climbs/two\nCOPY f /up/three\n=== f\nf\n",
    );
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.file("real/one").text(), "f\n");
    assert_eq!(image.file("real/two").text(), "f\n");
    assert_eq!(
        image.file("tmp/three").text(),
        "f\n",
        "a link that climbs ends at the image's root"
    );
    assert!(!std::path::Path::new("/tmp/three").exists(), "and never on the host");
}

// caps: file.copy.includeexcludepatterns
#[test]
fn link_parents_and_exclude() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
FROM busybox AS build
RUN mkdir -p /out/a/b && echo 1 > /out/a/b/c
FROM scratch
COPY --link keep.txt /linked/
COPY --from=build --link --chown=7:8 /out /out
COPY --parents src/./lib/x.c src/lib/sub/y.c /p/
COPY --exclude=*.log --exclude=sub src /filtered/
=== keep.txt
k
=== src/lib/x.c
x
=== src/lib/sub/y.c
y
=== src/top.log
log
=== src/top.c
c
"#,
    );
    let dockerfile = context.read("Dockerfile");
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.file("linked/keep.txt").text(), "k\n");
    assert_eq!((image.file("out/a/b/c").uid, image.file("out/a/b/c").gid), (7, 8));
    assert_eq!(image.files_in("p"), ["p/lib/x.c", "p/src/lib/sub/y.c"], "{dockerfile}");
    assert!(
        image.has("filtered/top.c") && !image.has("filtered/top.log"),
        "{:?}",
        image.files_in("filtered")
    );
}

#[test]
fn add_unpacks_local_archives_only() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM scratch\nADD a.tar.gz /unpacked/\nADD a.tar.gz plain.txt /two/\nCOPY a.tar.gz /copied.tar.gz\nADD --unpack=false a.tar.gz /kept.tar.gz\n=== plain.txt\np\n",
    );
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    header.set_mode(0o640);
    header.set_uid(3);
    header.set_gid(4);
    header.set_mtime(1_000_000_000);
    archive.append_data(&mut header, "inner/file", &b"abc"[..]).unwrap();
    context.write("a.tar.gz", archive.into_inner().unwrap().finish().unwrap());
    let image = daemon.buildx().build(&context).image();
    let file = image.file("unpacked/inner/file");
    assert_eq!(
        (file.text(), file.mode, file.uid, file.gid, file.mtime),
        ("abc", 0o640, 3, 4, 1_000_000_000)
    );
    assert!(image.has("two/inner/file") && image.has("two/plain.txt"));
    assert_eq!(image.tree["copied.tar.gz"].kind, Kind::File);
    assert_eq!(image.tree["kept.tar.gz"].kind, Kind::File);
}

#[test]
fn an_archive_cannot_leave_the_root() {
    let daemon = Daemon::start();
    let name = format!("kiln-escaped-{}", std::process::id());
    let context = Fixture::new("=== Dockerfile\nFROM busybox\nADD evil.tar /d/\nRUN ls -R /d; true\n");
    // Written byte by byte, because no honest library writes such names.
    let mut bytes = Vec::new();
    for (path, link) in [
        ("way", Some("/tmp")),
        (&*format!("way/{name}"), None),
        (&*format!("../../../../tmp/{name}-2"), None),
    ] {
        let mut header = tar::Header::new_ustar();
        let block = header.as_mut_bytes();
        block[..path.len()].copy_from_slice(path.as_bytes());
        header.set_mode(0o777);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(if link.is_some() { 0 } else { 4 });
        header.set_entry_type(if link.is_some() {
            tar::EntryType::Symlink
        } else {
            tar::EntryType::Regular
        });
        if let Some(link) = link {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        bytes.write_all(header.as_bytes()).unwrap();
        if link.is_none() {
            let mut content = [0_u8; 512];
            content[..4].copy_from_slice(b"evil");
            bytes.write_all(&content).unwrap();
        }
    }
    bytes.extend_from_slice(&[0; 1024]);
    context.write("evil.tar", bytes);
    // Whether the build fails or clamps the names is the daemon's choice; the host is not.
    let _ = daemon.buildx().build(&context).run();
    for escaped in [name.clone(), format!("{name}-2")] {
        assert!(
            !std::path::Path::new("/tmp").join(&escaped).exists(),
            "{escaped} was written on the host"
        );
    }
}

// caps: source.http source.http.checksum source.http.perm
#[test]
fn add_from_an_address_with_checksum() {
    let daemon = Daemon::start();
    let served = Fixture::new("=== file.txt\nfrom http\n");
    let server = harness::HttpServer::start(served.path());
    let digest = "sha256:5b0ddea7fcf5b5ed1fa4ad32ba6b14e20ac8c71dd3d2c80e9d8cb6ea2c6ee0a1";
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM scratch\nADD {}/file.txt /got/\n",
        server.address()
    ));
    let buildx = daemon.buildx();
    let image = buildx.build(&context).image();
    let file = image.file("got/file.txt");
    assert_eq!((file.text(), file.mode), ("from http\n", 0o600));
    context.write(
        "Dockerfile",
        format!(
            "FROM scratch\nADD --checksum={digest} {}/file.txt /got/\n",
            server.address()
        ),
    );
    buildx.build(&context).fails().says(&["digest mismatch"]);
    context.write(
        "Dockerfile",
        format!("FROM scratch\nADD {}/absent.txt /got/\n", server.address()),
    );
    buildx.build(&context).fails().says(&["404"]);
}
