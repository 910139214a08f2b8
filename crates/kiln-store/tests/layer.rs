//! Layers as archives: what is applied comes out again, and hostile archives stay inside.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use kiln_oci::{DiffId, Digest};
use kiln_store::compress::Algorithm;
use kiln_store::layer::write::{Header, TarWriter};
use kiln_store::layer::{Applied, ApplyOptions, DiffOptions, apply, pack, write_tar};
use kiln_store::{Kind, OverlayXattr, Result, Stop, StoreError, Tree, TreeBuilder, View};
use tempfile::TempDir;

fn builder() -> (TempDir, TreeBuilder) {
    let tmp = tempfile::tempdir().unwrap();
    let b = TreeBuilder::create(tmp.path(), OverlayXattr::User).unwrap();
    (tmp, b)
}

fn applied(bytes: &[u8]) -> (TempDir, Result<Applied>) {
    let (tmp, b) = builder();
    let result = apply(bytes, b, &ApplyOptions::default(), &Stop::new());
    (tmp, result)
}

type Spec<'a> = (&'a str, u8, &'a str);

/// An archive of (name, type, data or link target).
fn archive(members: &[Spec<'_>]) -> Vec<u8> {
    let mut w = TarWriter::new(Vec::new());
    for (name, typeflag, data) in members {
        let is_file = *typeflag == b'0';
        let h = Header {
            name: name.as_bytes(),
            typeflag: *typeflag,
            mode: match typeflag {
                b'5' => 0o755,
                b'2' => 0o777,
                _ => 0o644,
            },
            mtime: 1_000_000_000,
            size: if is_file { data.len() as u64 } else { 0 },
            linkname: if is_file { b"" } else { data.as_bytes() },
            ..Header::default()
        };
        w.header(&h).unwrap();
        if is_file {
            w.data(data.as_bytes()).unwrap();
        }
    }
    w.finish().unwrap()
}

fn listing(tree: &Tree) -> Vec<String> {
    let manifest = tree.manifest().unwrap();
    let line = |e: &kiln_store::Entry| {
        let kind = match e.kind {
            Kind::Directory if e.opaque => "o",
            Kind::Directory => "d",
            Kind::Whiteout => "w",
            Kind::Symlink => "l",
            Kind::Regular if e.link_group > 0 => "h",
            Kind::Regular => "f",
            _ => "n",
        };
        format!("{kind} {}", String::from_utf8_lossy(&e.path))
    };
    manifest.entries().iter().skip(1).map(line).collect()
}

fn tar_of(tree: &Tree, lower: &View) -> Vec<u8> {
    let mut out = Vec::new();
    write_tar(lower, tree, DiffOptions::default(), &mut out, &Stop::new()).unwrap();
    out
}

#[test]
fn canonical_archive_comes_back_byte_for_byte() {
    let big = "x".repeat(700_000);
    let long = "n".repeat(180);
    let deep = format!("d/{long}");
    let bytes = archive(&[
        ("bin/", b'5', ""),
        ("bin/big", b'0', &big),
        ("bin/.wh.gone", b'0', ""),
        ("bin/run", b'0', "#!"),
        ("bin/same", b'1', "bin/run"),
        ("d/", b'5', ""),
        (&deep, b'0', "long"),
        ("empty", b'0', ""),
        ("l", b'2', "/bin/run"),
        ("p", b'6', ""),
        ("ü", b'0', "name"),
    ]);
    // Whiteouts have mode and time zero, which the literal above cannot say.
    let bytes = {
        let mut fixed = bytes;
        let at = fixed.windows(12).position(|w| w == b"bin/.wh.gone").unwrap();
        let mut w = TarWriter::new(Vec::new());
        w.plain_header(&Header {
            name: b"bin/.wh.gone",
            typeflag: b'0',
            ..Header::default()
        })
        .unwrap();
        let block = w.finish().unwrap();
        fixed[at..at + 512].copy_from_slice(&block[..512]);
        fixed
    };
    for kind in [Algorithm::Uncompressed, Algorithm::Gzip, Algorithm::Zstd] {
        let mut c = kiln_store::compress::Compressor::new(kind.into(), 2, Vec::new()).unwrap();
        c.write_all(&bytes).unwrap();
        let packed = c.finish().unwrap();
        let (_tmp, result) = applied(&packed);
        let done = result.unwrap();
        assert_eq!(done.diff_id, DiffId(Digest::of(&bytes)));
        assert_eq!(done.size, bytes.len() as u64);
        assert!(tar_of(&done.tree, &View::scratch()) == bytes, "{kind}");
        let mut out = Vec::new();
        let p = pack(
            &View::scratch(),
            &done.tree,
            kind.into(),
            DiffOptions::default(),
            &mut out,
            &Stop::new(),
        )
        .unwrap();
        assert_eq!(
            (p.diff_id, p.digest, p.size),
            (done.diff_id, Digest::of(&out), out.len() as u64)
        );
        assert!(out == packed);
        let fs = done.tree.fs_path();
        let md = std::fs::metadata(fs.join("bin/run")).unwrap();
        assert_eq!((md.nlink(), md.mode() & 0o7777, md.mtime()), (2, 0o644, 1_000_000_000));
        assert_eq!(std::fs::metadata(fs.join("bin")).unwrap().mtime(), 1_000_000_000);
        assert_eq!(std::fs::metadata(fs.join("bin/big")).unwrap().len(), 700_000);
    }
}

#[test]
fn nothing_gets_out() {
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().to_str().unwrap();
    let bytes = archive(&[
        ("../up", b'0', "1"),
        ("/abs/file", b'0', "2"),
        ("a/../../b", b'0', "3"),
        ("host", b'2', out),
        ("host/planted", b'0', "4"),
        ("dots", b'2', "../../../../../../../.."),
        ("dots/tmp2/planted", b'0', "5"),
        ("self", b'2', "."),
        ("self/self/x", b'0', "6"),
    ]);
    let (tmp, result) = applied(&bytes);
    let done = result.unwrap();
    assert!(std::fs::read_dir(outside.path()).unwrap().next().is_none());
    assert!(!tmp.path().join("up").exists());
    let planted = format!("{}/planted", out.trim_start_matches('/'));
    let list = listing(&done.tree);
    for want in [
        "f up",
        "f abs/file",
        "f b",
        &format!("f {planted}"),
        "f tmp2/planted",
        "f x",
    ] {
        assert!(list.contains(&want.to_owned()), "{want} in {list:?}");
    }
    let text = std::fs::read_to_string(done.tree.fs_path().join(planted)).unwrap();
    assert_eq!(text, "4");
}

#[test]
fn hostile_archives_are_refused_by_name() {
    for (members, word) in [
        (vec![("l", b'1', "/etc/passwd")], "no file of this layer"),
        (vec![("l", b'1', "l")], "itself"),
        (vec![("f", b'0', "x"), ("f/below", b'0', "y")], "not a directory"),
        (vec![("d/", b'5', ""), ("l", b'1', "d")], "no file of this layer"),
        (vec![("loop", b'2', "loop"), ("loop/x", b'0', "y")], "too many links"),
        (vec![(".wh.", b'0', "")], "whiteout of nothing"),
        (vec![(".wh...", b'0', "")], "whiteout of nothing"),
        (vec![("q", b'9', "")], "unknown member type"),
    ] {
        let (_tmp, result) = applied(&archive(&members));
        match result {
            Err(StoreError::Invalid(text)) => assert!(text.contains(word), "{text}"),
            other => panic!("{members:?}: {other:?}"),
        }
    }
    let long = format!("{}f", "d/".repeat(2100));
    assert!(matches!(
        applied(&archive(&[(&long, b'0', "")])).1,
        Err(StoreError::Invalid(_))
    ));
    assert!(matches!(applied(b"this is no archive").1, Err(StoreError::Invalid(_))));
    let good = archive(&[("f", b'0', &"x".repeat(5000))]);
    assert!(matches!(applied(&good[..2000]).1, Err(StoreError::Invalid(_))));
}

#[test]
fn later_members_replace_earlier_ones() {
    let bytes = archive(&[
        ("d/", b'5', ""),
        ("d/f", b'0', "old"),
        ("d/f", b'0', "new"),
        ("t", b'0', "file"),
        ("t/", b'5', ""),
        ("t/in", b'0', "1"),
        ("u/", b'5', ""),
        ("u/in", b'0', "1"),
        ("u", b'2', "d"),
        ("u/g", b'0', "through"),
        ("d/", b'5', ""),
    ]);
    let (_tmp, result) = applied(&bytes);
    let tree = result.unwrap().tree;
    assert_eq!(listing(&tree), ["d d", "f d/f", "f d/g", "d t", "f t/in", "l u"]);
    assert_eq!(std::fs::read_to_string(tree.fs_path().join("d/f")).unwrap(), "new");
}

#[test]
fn whiteouts_and_opaque_directories() {
    let base = archive(&[
        ("a/", b'5', ""),
        ("a/1", b'0', "1"),
        ("a/2", b'0', "2"),
        ("a/s/", b'5', ""),
        ("a/s/x", b'0', ""),
        ("a/s/y", b'0', ""),
        ("b/", b'5', ""),
        ("b/1", b'0', ""),
        ("c", b'0', ""),
    ]);
    let (_t1, lower) = applied(&base);
    let lower = View::new(vec![lower.unwrap().tree]).unwrap();
    let top = archive(&[
        ("a/", b'5', ""),
        ("a/.wh..wh..opq", b'0', ""),
        ("a/2", b'0', "two"),
        ("a/s/", b'5', ""),
        ("a/s/x", b'0', ""),
        (".wh.b", b'0', ""),
        ("b/", b'5', ""),
        ("b/2", b'0', ""),
        (".wh.c", b'0', ""),
        (".wh..wh.plnk", b'0', ""),
    ]);
    let (_t2, upper) = applied(&top);
    let upper = upper.unwrap().tree;
    assert_eq!(
        listing(&upper),
        ["o a", "f a/2", "d a/s", "f a/s/x", "o b", "f b/2", "w c"]
    );
    let c = std::fs::symlink_metadata(upper.fs_path().join("c")).unwrap();
    assert_eq!((c.mode() & 0o170000, c.rdev()), (0o020000, 0));
    let out = tar_of(&upper, &lower);
    let (_t3, again) = applied(&out);
    assert_eq!(
        listing(&again.unwrap().tree),
        [
            "d a", "w a/1", "f a/2", "d a/s", "f a/s/x", "w a/s/y", "d b", "w b/1", "f b/2", "w c"
        ]
    );
}

#[test]
fn implied_parents_look_as_below() {
    let mut w = TarWriter::new(Vec::new());
    w.header(&Header {
        name: b"secret/",
        typeflag: b'5',
        mode: 0o2700,
        uid: 7,
        gid: 8,
        mtime: 5,
        ..Header::default()
    })
    .unwrap();
    let (_t1, lower) = applied(&w.finish().unwrap());
    let lower = View::new(vec![lower.unwrap().tree]).unwrap();
    let (_t2, b) = builder();
    let options = ApplyOptions {
        lower: Some(&lower),
        ..ApplyOptions::default()
    };
    let tree = apply(&archive(&[("secret/new/f", b'0', "")])[..], b, &options, &Stop::new())
        .unwrap()
        .tree;
    let md = std::fs::metadata(tree.fs_path().join("secret")).unwrap();
    assert_eq!((md.mode() & 0o7777, md.uid(), md.gid(), md.mtime()), (0o2700, 7, 8, 5));
    assert_eq!(
        std::fs::metadata(tree.fs_path().join("secret/new")).unwrap().mode() & 0o7777,
        0o755
    );
}

#[test]
fn sparse_files_of_gnu_tar() {
    let tmp = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(tmp.path().join("holes")).unwrap();
    use std::os::unix::fs::FileExt;
    for i in 0..40u64 {
        file.write_all_at(format!("piece {i}").as_bytes(), i * 65_536).unwrap();
    }
    file.set_len(5 << 20).unwrap();
    let want = std::fs::read(tmp.path().join("holes")).unwrap();
    for format in [
        "--format=gnu",
        "--format=pax --sparse-version=0.0",
        "--format=pax --sparse-version=0.1",
        "--format=pax --sparse-version=1.0",
    ] {
        let out = Command::new("tar")
            .args(["-C", tmp.path().to_str().unwrap(), "-S"])
            .args(format.split(' '))
            .args(["-cf", "-", "holes"])
            .output()
            .unwrap();
        assert!(out.status.success());
        assert!(out.stdout.len() < 1 << 20, "the archive is sparse");
        let (_t, result) = applied(&out.stdout);
        let tree = result.unwrap().tree;
        assert_eq!(listing(&tree), ["f holes"]);
        assert!(std::fs::read(tree.fs_path().join("holes")).unwrap() == want, "{format}");
    }
}

#[test]
fn other_readers_agree() {
    let long = format!("{}/{}", "p".repeat(90), "q".repeat(160));
    let bytes = archive(&[
        ("a/", b'5', ""),
        ("a/é", b'0', "1"),
        (&long, b'0', "2"),
        ("s", b'2', &long),
        ("z", b'1', "a/é"),
    ]);
    let (_t, result) = applied(&bytes);
    let ours = listing(&result.unwrap().tree);
    let mut child = Command::new("tar")
        .args(["-t", "--quoting-style=literal"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let mut listed = String::new();
    child.stdout.take().unwrap().read_to_string(&mut listed).unwrap();
    assert!(child.wait().unwrap().success());
    for line in listed.lines() {
        assert!(
            ours.iter().any(|o| o[2..] == *line.trim_end_matches('/')),
            "{line} in {ours:?}"
        );
    }
    assert_eq!(listed.lines().count(), 5);
}

#[test]
fn stopping_ends_it() {
    let stop = Stop::new();
    stop.stop();
    let (_t, b) = builder();
    let result = apply(&archive(&[("f", b'0', "x")])[..], b, &ApplyOptions::default(), &stop);
    assert!(matches!(result, Err(StoreError::Canceled)), "{result:?}");
}

/// What a manifest says, in a form that can be compared with what is on disk.
fn facts(entries: &[kiln_store::Entry]) -> Vec<String> {
    let mut groups: std::collections::HashMap<u32, usize> = std::collections::HashMap::new();
    let mut sorted: Vec<&kiln_store::Entry> = entries.iter().collect();
    sorted.sort_by(|a, b| kiln_store::manifest::compare(&a.path, &b.path));
    let mut out = Vec::new();
    for (index, e) in sorted.into_iter().enumerate() {
        // Links are told by the first name of their group; a group of one is none.
        let first = if e.link_group == 0 {
            index
        } else {
            *groups.entry(e.link_group).or_insert(index)
        };
        let whiteout = e.kind == Kind::Whiteout;
        let time = if whiteout { 0 } else { e.mtime.secs };
        out.push(format!(
            "{:?} {:?} {:o} {}:{} {} at {time} -> {:?} = {first} {}",
            String::from_utf8_lossy(&e.path),
            e.kind,
            e.mode,
            e.uid,
            e.gid,
            e.size,
            String::from_utf8_lossy(&e.target),
            e.opaque
        ));
    }
    out
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 120, failure_persistence: None, ..Default::default() })]

    /// Whatever an archive holds, in whatever order: it is applied or refused, nothing appears outside, and an applied
    /// tree's manifest says exactly what is on disk.
    #[test]
    fn any_archive(members in proptest::collection::vec(
        ("(\\.\\./|/|\\./)?[abc](/[abc]|/\\.\\.|/\\.){0,3}/?", 0u8..8, "(/|\\.\\./)?[abc](/[abc]){0,2}"), 1..14)) {
        let mut w = TarWriter::new(Vec::new());
        for (name, kind, target) in &members {
            let trimmed = name.trim_end_matches('/');
            let (dir, last) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
            let (name, typeflag, link, size) = match kind {
                0 | 1 => (trimmed.to_owned(), b'0', "", target.len()),
                2 => (format!("{trimmed}/"), b'5', "", 0),
                3 => (trimmed.to_owned(), b'2', target.as_str(), 0),
                4 => (trimmed.to_owned(), b'1', target.as_str(), 0),
                5 => (format!("{dir}/.wh.{last}"), b'0', "", 0),
                6 => (format!("{trimmed}/.wh..wh..opq"), b'0', "", 0),
                _ => (trimmed.to_owned(), b'6', "", 0),
            };
            let h = Header {
                name: name.as_bytes(),
                typeflag,
                mode: 0o640 + u32::from(*kind),
                uid: 3,
                gid: 4,
                mtime: 77,
                size: size as u64,
                linkname: link.as_bytes(),
                ..Header::default()
            };
            w.header(&h).unwrap();
            if size > 0 {
                w.data(target.as_bytes()).unwrap();
            }
        }
        let bytes = w.finish().unwrap();
        let outer = tempfile::tempdir().unwrap();
        let dir = outer.path().join("tree");
        std::fs::create_dir(&dir).unwrap();
        let b = TreeBuilder::create(&dir, OverlayXattr::Trusted).unwrap();
        let result = apply(&bytes[..], b, &ApplyOptions::default(), &Stop::new());
        let names: Vec<_> = std::fs::read_dir(outer.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        proptest::prop_assert_eq!(names, ["tree"]);
        match result {
            Err(StoreError::Invalid(_)) => {}
            Err(other) => return Err(proptest::test_runner::TestCaseError::fail(other.to_string())),
            Ok(done) => {
                let again = TreeBuilder::create(&dir, OverlayXattr::Trusted).unwrap();
                let disk = kiln_store::snapshot::scan::upper(&again, &Stop::new()).unwrap();
                proptest::prop_assert_eq!(facts(done.tree.manifest().unwrap().entries()), facts(&disk));
                // What goes out comes in again as the same tree.
                let out = tar_of(&done.tree, &View::scratch());
                let (_t, back) = applied(&out);
                let listed = |t: &Tree| listing(t).iter().map(|l| l.replacen("o ", "d ", 1)).collect::<Vec<_>>();
                proptest::prop_assert_eq!(listed(&back.unwrap().tree), listed(&done.tree));
            }
        }
    }
}
