//! Writing over a view: the options of file actions, and random actions against a real overlay mount.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_fs::Timestamp;
use kiln_store::layer::write::{Header, TarWriter};
use kiln_store::{
    CopySpec, FileWriter, Kind, ModeChange, OverlayXattr, Owner, OwnerSpec, Result, Stop, StoreError, Tree,
    TreeBuilder, UserSpec, View,
};
use tempfile::TempDir;

/// Which attribute this process may write: the suite also runs inside a user namespace.
fn overlay_xattr() -> OverlayXattr {
    OverlayXattr::detect(&kiln_fs::Dir::open_ambient(std::env::temp_dir()).unwrap())
}

struct Lab(TempDir, std::cell::Cell<u32>);

impl Lab {
    fn new() -> Self {
        Lab(tempfile::tempdir().unwrap(), std::cell::Cell::new(0))
    }

    fn dir(&self, what: &str) -> PathBuf {
        self.1.set(self.1.get() + 1);
        let dir = self.0.path().join(format!("{what}{}", self.1.get()));
        std::fs::create_dir(&dir).unwrap();
        dir
    }

    fn builder(&self) -> TreeBuilder {
        TreeBuilder::create(self.dir("tree"), overlay_xattr()).unwrap()
    }

    fn write(&self, base: &View, actions: impl FnOnce(&mut FileWriter) -> Result<()>) -> Result<Tree> {
        let mut w = FileWriter::new(base, self.builder())?;
        actions(&mut w)?;
        w.finish(&Stop::new())
    }

    /// A view of one layer: "d/" makes a directory, "l -> x" a link, "f=text" a file.
    fn view(&self, specs: &[&str]) -> View {
        self.over(&View::scratch(), specs)
    }

    fn over(&self, base: &View, specs: &[&str]) -> View {
        let tree = self.write(base, |w| specs.iter().try_for_each(|s| put(w, s))).unwrap();
        with(base, tree)
    }
}

fn with(base: &View, tree: Tree) -> View {
    let mut trees = base.trees().to_vec();
    trees.push(tree);
    View::new(trees).unwrap()
}

fn put(w: &mut FileWriter, spec: &str) -> Result<()> {
    let stop = Stop::new();
    let mtime = Some(Timestamp {
        secs: 1_500_000_000,
        nanos: 0,
    });
    let path = spec.split([' ', '=']).next().unwrap_or_default();
    if let Some((above, _)) = path.rsplit_once('/')
        && !path.starts_with('-')
    {
        w.mkdir(above.as_bytes(), 0o755, true, None, mtime, &stop)?;
    }
    if let Some((path, target)) = spec.split_once(" -> ") {
        w.symlink(target.as_bytes(), path.as_bytes(), None, mtime, &stop)
    } else if let Some(path) = spec.strip_prefix('-') {
        w.rm(path.as_bytes(), false, false, &stop)
    } else if let Some((path, text)) = spec.split_once('=') {
        w.mkfile(path.as_bytes(), 0o644, text.as_bytes(), None, mtime, &stop)
    } else {
        w.mkdir(spec.as_bytes(), 0o755, true, None, mtime, &stop)
    }
}

fn text(view: &View, path: &str) -> Option<String> {
    view.read(path.as_bytes(), 1 << 20)
        .unwrap()
        .map(|b| String::from_utf8(b).unwrap())
}

fn paths(view: &View) -> Vec<String> {
    let Some(root) = view.root() else { return Vec::new() };
    view.walk(&root)
        .map(|n| String::from_utf8_lossy(&view.entry(&n).path).into_owned())
        .collect()
}

fn changes(tree: &Tree) -> Vec<String> {
    let manifest = tree.manifest().unwrap();
    let changed = manifest.entries().iter().skip(1).filter(|e| !e.unchanged);
    changed
        .map(|e| {
            format!(
                "{}{}",
                if e.kind == Kind::Whiteout { "-" } else { "" },
                String::from_utf8_lossy(&e.path)
            )
        })
        .collect()
}

fn copy(src: &str, dest: &str) -> CopySpec {
    CopySpec {
        src: src.into(),
        dest: dest.into(),
        follow_symlink: true,
        dir_copy_contents: true,
        create_dest_path: true,
        allow_wildcard: true,
        allow_empty_wildcard: true,
        ..CopySpec::default()
    }
}

fn copied(lab: &Lab, base: &View, src: &View, spec: &CopySpec) -> Result<View> {
    Ok(with(base, lab.write(base, |w| w.copy(spec, src, &Stop::new()))?))
}

#[test]
fn destinations() {
    let lab = Lab::new();
    let src = lab.view(&[
        "a=A",
        "b=B",
        "dir/sub",
        "dir/x=X",
        "dir/sub/y=Y",
        "ln -> a",
        "lndir -> dir",
    ]);
    let base = lab.view(&["app", "app/old=o", "to -> app", "file=f"]);
    for (from, dest, want) in [
        ("/a", "/new/deep/", "new/deep/a"),
        ("/a", "/new/deep", "new/deep"),
        ("/a", "/app", "app/a"),
        ("/a", "/to", "app/a"),
        ("/a", "/to/n", "app/n"),
        ("/a", "/", "a"),
        ("/a", "/file", "file"),
        ("/ln", "/app/", "app/ln"),
        ("/dir", "/app", "app/sub/y"),
        ("/dir/", "/fresh", "fresh/x"),
        ("/lndir", "/fresh", "fresh/sub/y"),
        ("/di?/x", "/app/", "app/x"),
        ("/[ab]", "/app", "app/b"),
        ("/*", "/out/", "out/sub/y"),
    ] {
        let view = copied(&lab, &base, &src, &copy(from, dest)).unwrap();
        let node = view
            .lookup(want.as_bytes())
            .unwrap_or_else(|| panic!("{from} {dest}: {:?}", paths(&view)));
        assert_ne!(view.entry(&node).kind, Kind::Whiteout);
        assert!(view.lookup(b"app/old").is_some());
    }
    let view = copied(&lab, &base, &src, &copy("/ln", "/app/")).unwrap();
    assert_eq!(text(&view, "app/ln").unwrap(), "A");
    let spec = CopySpec {
        follow_symlink: false,
        ..copy("/ln", "/app/")
    };
    let view = copied(&lab, &base, &src, &spec).unwrap();
    assert_eq!(view.entry(&view.lookup(b"app/ln").unwrap()).kind, Kind::Symlink);
    let spec = CopySpec {
        dir_copy_contents: false,
        ..copy("/dir", "/app")
    };
    assert_eq!(
        text(&copied(&lab, &base, &src, &spec).unwrap(), "app/dir/sub/y").unwrap(),
        "Y"
    );
    let spec = CopySpec {
        dir_copy_contents: false,
        ..copy("/dir", "/fresh")
    };
    assert_eq!(
        text(&copied(&lab, &base, &src, &spec).unwrap(), "fresh/sub/y").unwrap(),
        "Y"
    );
}

#[test]
fn what_does_not_fit() {
    let lab = Lab::new();
    let src = lab.view(&["a=A", "dir/x=X", "dir/y/z=Z"]);
    let base = lab.view(&["a/b", "dir=file", "ok/x/in=1"]);
    let fails = |spec: &CopySpec| match copied(&lab, &base, &src, spec) {
        Err(StoreError::Invalid(text)) => text,
        other => panic!("{spec:?}: {other:?}"),
    };
    assert!(fails(&copy("/missing", "/x")).contains("no such file"));
    assert_eq!(
        fails(&CopySpec {
            allow_empty_wildcard: false,
            ..copy("/mis*", "/x")
        }),
        "/mis* not found"
    );
    assert!(
        fails(&CopySpec {
            create_dest_path: false,
            ..copy("/a", "/no/where")
        })
        .contains("no such file")
    );
    assert!(fails(&copy("/dir/x", "/dir/sub/")).contains("not a directory"));
    assert!(fails(&copy("/dir", "/ok")).contains("cannot replace directory"));
    assert!(copied(&lab, &base, &src, &copy("/mis*", "/x")).is_ok());
    let view = copied(
        &lab,
        &base,
        &src,
        &CopySpec {
            always_replace: true,
            ..copy("/dir", "/ok")
        },
    )
    .unwrap();
    assert_eq!(text(&view, "ok/x").unwrap(), "X");
    assert!(view.lookup(b"ok/x/in").is_none());
}

#[test]
fn metadata() {
    let lab = Lab::new();
    let src = lab.view(&["d/f=1", "d/g=2", "d/l -> f"]);
    let base = lab.view(&["there"]);
    let owner = Some(Owner { uid: 7, gid: 8 });
    let time = Timestamp { secs: 42, nanos: 0 };
    let spec = CopySpec {
        owner,
        mode: ModeChange::parse("go-r,u+x").unwrap(),
        timestamp: Some(time),
        ..copy("/d", "/new/top")
    };
    let view = copied(&lab, &base, &src, &spec).unwrap();
    let entry = |p: &str| view.entry(&view.lookup(p.as_bytes()).unwrap()).clone();
    for (path, mode) in [
        ("new", 0o755),
        ("new/top", 0o755),
        ("new/top/f", 0o700),
        ("new/top/l", 0o777),
    ] {
        let e = entry(path);
        assert_eq!((e.mode, e.uid, e.gid, e.mtime), (mode, 7, 8, time), "{path}");
    }
    let on_disk = std::fs::metadata(view.trees()[1].fs_path().join("new/top/f")).unwrap();
    assert_eq!(
        (on_disk.mode() & 0o7777, on_disk.uid(), on_disk.gid(), on_disk.mtime()),
        (0o700, 7, 8, 42)
    );
    let view = copied(&lab, &base, &src, &copy("/d", "/there")).unwrap();
    let e = view.entry(&view.lookup(b"there/f").unwrap()).clone();
    assert_eq!((e.mode, e.uid, e.mtime.secs), (0o644, 0, 1_500_000_000));
    assert_eq!(
        changes(&view.trees()[1]),
        ["there/f", "there/g", "there/l"],
        "the parent is as below"
    );
}

#[test]
fn filters_make_only_what_is_needed() {
    let lab = Lab::new();
    let src = lab.view(&["s/a/x.go=1", "s/a/x.md=1", "s/b/y.md=1", "s/c", "s/z.go=1"]);
    let base = View::scratch();
    let list = |spec: &CopySpec| paths(&copied(&lab, &base, &src, spec).unwrap());
    let go = CopySpec {
        include: vec!["**/*.go".into()],
        ..copy("/s", "/o")
    };
    assert_eq!(list(&go), ["o", "o/a", "o/a/x.go", "o/z.go"]);
    let no_md = CopySpec {
        exclude: vec!["**/*.md".into()],
        ..copy("/s", "/o")
    };
    assert_eq!(list(&no_md), ["o", "o/a", "o/a/x.go", "o/b", "o/c", "o/z.go"]);
    let both = CopySpec {
        include: vec!["a".into()],
        exclude: vec!["a/x.md".into()],
        ..copy("/s", "/o")
    };
    assert_eq!(list(&both), ["o", "o/a", "o/a/x.go"]);
    let back = CopySpec {
        exclude: vec!["a".into(), "!a/x.go".into()],
        ..copy("/s", "/o")
    };
    assert_eq!(
        list(&back),
        ["o", "o/a", "o/a/x.go", "o/b", "o/b/y.md", "o/c", "o/z.go"]
    );
    let required = CopySpec {
        required: vec!["b".into()],
        ..go.clone()
    };
    assert!(
        copied(&lab, &base, &src, &required)
            .unwrap_err()
            .to_string()
            .contains("not found")
    );
    let required = CopySpec {
        required: vec!["a".into()],
        ..go
    };
    assert!(copied(&lab, &base, &src, &required).is_ok());
}

#[test]
fn hard_links_stay_together_and_links_cannot_leave() {
    let lab = Lab::new();
    let mut w = TarWriter::new(Vec::new());
    w.header(&Header {
        name: b"d/one",
        typeflag: b'0',
        size: 3,
        mode: 0o644,
        ..Header::default()
    })
    .unwrap();
    w.data(b"abc").unwrap();
    w.header(&Header {
        name: b"d/two",
        typeflag: b'1',
        linkname: b"d/one",
        ..Header::default()
    })
    .unwrap();
    w.header(&Header {
        name: b"esc",
        typeflag: b'2',
        linkname: b"/etc",
        ..Header::default()
    })
    .unwrap();
    w.header(&Header {
        name: b"pipe",
        typeflag: b'6',
        mode: 0o622,
        ..Header::default()
    })
    .unwrap();
    let tar = w.finish().unwrap();
    let layer = kiln_store::layer::apply(&tar[..], lab.builder(), &Default::default(), &Stop::new()).unwrap();
    let src = View::new(vec![layer.tree]).unwrap();
    let view = copied(&lab, &View::scratch(), &src, &copy("/", "/")).unwrap();
    let fs = view.trees()[0].fs_path();
    assert_eq!(
        std::fs::metadata(fs.join("d/one")).unwrap().ino(),
        std::fs::metadata(fs.join("d/two")).unwrap().ino()
    );
    let e = view.entry(&view.lookup(b"d/one").unwrap()).clone();
    assert!(e.link_group != 0);
    // A destination link to /etc is the image's own /etc.
    let view = copied(&lab, &src, &src, &copy("/d/one", "/esc/x")).unwrap();
    assert_eq!(text(&view, "etc/x").unwrap(), "abc");
    assert!(!Path::new("/etc/x").exists());
}

#[test]
fn removing() {
    let lab = Lab::new();
    let base = lab.view(&["a/x=1", "a/y.log=1", "a/z.log=1", "b/deep/f=1", "l -> a", "c=1"]);
    let stop = Stop::new();
    let tree = lab
        .write(&base, |w| {
            w.rm(b"/a/*.log", false, true, &stop)?;
            w.rm(b"/l/x", false, false, &stop)?;
            w.rm(b"/b", false, false, &stop)?;
            w.rm(b"/nothing", true, false, &stop)?;
            w.rm(b"/l", false, false, &stop)
        })
        .unwrap();
    assert_eq!(changes(&tree), ["-a/x", "-a/y.log", "-a/z.log", "-b", "-l"]);
    assert_eq!(paths(&with(&base, tree)), ["a", "c"]);
    assert!(lab.write(&base, |w| w.rm(b"/nothing", false, false, &stop)).is_err());
    assert!(lab.write(&base, |w| w.rm(b"/", false, false, &stop)).is_err());
    let tree = lab
        .write(&base, |w| {
            ["-b", "b/deep", "b/new=1", "-c", "c=1", "d=1", "-d"]
                .iter()
                .try_for_each(|s| put(w, s))
        })
        .unwrap();
    assert_eq!(
        changes(&tree),
        ["-b/deep/f", "b/new"],
        "made anew as before is no change"
    );
}

#[test]
fn owners_by_name() {
    let lab = Lab::new();
    let view = lab.view(&[
        "etc",
        "etc/passwd=root:x:0:0::/:\napp:x:1000:1001::/:\n",
        "etc/group=root:x:0:\nstaff:x:50:\n",
    ]);
    let name = |n: &str| Some(UserSpec::Name(n.into(), Some(view.clone())));
    let id = |n| Some(UserSpec::Id(n));
    for (user, group, want) in [
        (name("app"), None, (1000, 1001)),
        (name("app"), name("staff"), (1000, 50)),
        (id(5), None, (5, 5)),
        (id(5), id(6), (5, 6)),
        (name("nobody"), None, (0, 0)),
        (name("app"), name("nogroup"), (1000, 0)),
        (Some(UserSpec::Name("app".into(), None)), None, (0, 0)),
        (None, id(9), (0, 9)),
    ] {
        let owner = OwnerSpec { user, group }.resolve().unwrap();
        assert_eq!((owner.uid, owner.gid), want);
    }
}

#[test]
fn archives_are_unpacked() {
    let lab = Lab::new();
    let mut w = TarWriter::new(Vec::new());
    w.header(&Header {
        name: b"./d/",
        typeflag: b'5',
        mode: 0o750,
        uid: 3,
        gid: 4,
        mtime: 9,
        ..Header::default()
    })
    .unwrap();
    w.header(&Header {
        name: b"./d/f",
        typeflag: b'0',
        size: 2,
        mode: 0o600,
        uid: 3,
        gid: 4,
        mtime: 8,
        ..Header::default()
    })
    .unwrap();
    w.data(b"hi").unwrap();
    w.header(&Header {
        name: b"d/h",
        typeflag: b'1',
        linkname: b"d/f",
        ..Header::default()
    })
    .unwrap();
    w.header(&Header {
        name: b"out",
        typeflag: b'2',
        linkname: b"../../..",
        ..Header::default()
    })
    .unwrap();
    w.header(&Header {
        name: b"out/planted",
        typeflag: b'0',
        ..Header::default()
    })
    .unwrap();
    let tar = w.finish().unwrap();
    let dir = lab.dir("src");
    std::fs::write(dir.join("plain.tar"), &tar).unwrap();
    for (tool, name) in [
        ("gzip", "a.tar.gz"),
        ("bzip2", "a.tar.bz2"),
        ("xz", "a.tar.xz"),
        ("zstd", "a.tar.zst"),
    ] {
        let out = Command::new(tool).arg("-c").arg(dir.join("plain.tar")).output();
        if let Ok(out) = out {
            std::fs::write(dir.join(name), out.stdout).unwrap();
        }
    }
    std::fs::write(
        dir.join("text.gz"),
        Command::new("gzip")
            .arg("-c")
            .arg("/etc/hostname")
            .output()
            .unwrap()
            .stdout,
    )
    .unwrap();
    let src = local(&lab, &dir);
    for name in ["plain.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"] {
        let spec = CopySpec {
            attempt_unpack: true,
            ..copy(name, "/to/here")
        };
        let view = copied(&lab, &View::scratch(), &src, &spec).unwrap();
        assert_eq!(
            paths(&view),
            [
                "planted",
                "to",
                "to/here",
                "to/here/d",
                "to/here/d/f",
                "to/here/d/h",
                "to/here/out"
            ],
            "{name}"
        );
        let e = view.entry(&view.lookup(b"to/here/d").unwrap()).clone();
        assert_eq!((e.mode, e.uid, e.gid, e.mtime.secs), (0o750, 3, 4, 9));
        assert_eq!(text(&view, "to/here/d/h").unwrap(), "hi");
    }
    let spec = CopySpec {
        attempt_unpack: true,
        ..copy("text.gz", "/to/")
    };
    assert_eq!(
        paths(&copied(&lab, &View::scratch(), &src, &spec).unwrap()),
        ["to", "to/text.gz"]
    );
    let spec = CopySpec {
        attempt_unpack: true,
        owner: Some(Owner { uid: 1, gid: 2 }),
        ..copy("plain.tar", "/to/")
    };
    let view = copied(&lab, &View::scratch(), &src, &spec).unwrap();
    assert_eq!(view.entry(&view.lookup(b"to/d/f").unwrap()).uid, 1);
}

/// A view of a host directory with plain files in it.
fn local(lab: &Lab, dir: &Path) -> View {
    let tree = lab
        .write(&View::scratch(), |w| {
            for entry in std::fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                let data = std::fs::read(entry.path()).unwrap();
                w.mkfile(
                    entry.file_name().as_encoded_bytes(),
                    0o644,
                    &data,
                    None,
                    None,
                    &Stop::new(),
                )?;
            }
            Ok(())
        })
        .unwrap();
    View::new(vec![tree]).unwrap()
}

// ---- against a real overlay ----

struct Overlay(PathBuf);

impl Overlay {
    fn mount(lab: &Lab, view: &View, writable: bool) -> Self {
        let at = lab.dir("mnt");
        let mut lowers: Vec<String> = view
            .trees()
            .iter()
            .rev()
            .map(|t| t.fs_path().display().to_string())
            .collect();
        if lowers.len() < 2 {
            lowers.push(lab.dir("empty").display().to_string());
        }
        let mut options = format!(
            "lowerdir={},index=off,metacopy=off,redirect_dir=nofollow,xino=off",
            lowers.join(":")
        );
        if writable {
            options += &format!(
                ",upperdir={},workdir={}",
                lab.dir("up").display(),
                lab.dir("work").display()
            );
        }
        if overlay_xattr() == OverlayXattr::User {
            options += ",userxattr";
        }
        let done = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(&at)
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "this test needs the right to mount: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        Overlay(at)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Everything below a directory: type, mode, owner, content or target.
fn survey(root: &Path) -> BTreeMap<String, String> {
    fn walk(root: &Path, dir: &Path, out: &mut BTreeMap<String, String>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let md = std::fs::symlink_metadata(&path).unwrap();
            let what = if md.is_symlink() {
                format!("-> {}", std::fs::read_link(&path).unwrap().display())
            } else if md.is_dir() {
                "dir".into()
            } else {
                std::fs::read_to_string(&path).unwrap()
            };
            let mode = if md.is_symlink() {
                0o777
            } else {
                md.permissions().mode() & 0o7777
            };
            let name = path.strip_prefix(root).unwrap().display().to_string();
            out.insert(name, format!("{mode:o} {}:{} {what}", md.uid(), md.gid()));
            if md.is_dir() {
                walk(root, &path, out);
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(root, root, &mut out);
    out
}

fn survey_view(view: &View) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let Some(root) = view.root() else { return out };
    for node in view.walk(&root) {
        let e = view.entry(&node);
        let what = match e.kind {
            Kind::Symlink => format!("-> {}", String::from_utf8_lossy(&e.target)),
            Kind::Directory => "dir".into(),
            _ => std::io::read_to_string(view.open(&node).unwrap()).unwrap(),
        };
        out.insert(
            String::from_utf8_lossy(&e.path).into_owned(),
            format!("{:o} {}:{} {what}", e.mode, e.uid, e.gid),
        );
    }
    out
}

#[derive(Clone, Debug)]
enum Act {
    Mkdir(String, bool),
    Mkfile(String, String),
    Symlink(String, String),
    Rm(String),
    Copy(String, String),
}

/// The actions by hand, on a mounted directory. Paths hold no links here, so plain joins do.
fn by_hand(root: &Path, src: &Path, act: &Act) -> std::io::Result<()> {
    use std::fs;
    match act {
        Act::Mkdir(p, parents) => {
            let p = root.join(p);
            if *parents {
                fs::create_dir_all(p)
            } else if fs::symlink_metadata(&p).is_ok() {
                Ok(())
            } else {
                fs::create_dir(p)
            }
        }
        Act::Mkfile(p, text) => {
            let md = fs::symlink_metadata(root.join(p));
            if md.is_ok_and(|m| !m.is_file()) {
                return Err(std::io::ErrorKind::InvalidInput.into());
            }
            fs::write(root.join(p), text)
        }
        Act::Symlink(target, p) => symlink(target, root.join(p)),
        Act::Rm(p) => match fs::symlink_metadata(root.join(p)) {
            Ok(md) if md.is_dir() => fs::remove_dir_all(root.join(p)),
            Ok(_) => fs::remove_file(root.join(p)),
            Err(_) => Ok(()),
        },
        Act::Copy(from, to) => {
            let from = src.join(from);
            let is_dir = fs::symlink_metadata(&from)?.is_dir();
            let mut to = root.join(to);
            fs::create_dir_all(to.parent().unwrap())?;
            if !is_dir && to.is_dir() {
                to = to.join(from.file_name().unwrap());
            }
            copy_by_hand(&from, &to, false)
        }
    }
}

fn copy_by_hand(from: &Path, to: &Path, overwrite: bool) -> std::io::Result<()> {
    use std::fs;
    let md = fs::symlink_metadata(from)?;
    let there = fs::symlink_metadata(to).ok();
    if md.is_dir() {
        let created = match &there {
            Some(t) if !t.is_dir() => return Err(std::io::ErrorKind::AlreadyExists.into()),
            Some(_) => false,
            None => {
                fs::create_dir(to)?;
                true
            }
        };
        let mut names: Vec<_> = fs::read_dir(from)?.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        for name in names {
            copy_by_hand(&from.join(&name), &to.join(&name), true)?;
        }
        if created || overwrite {
            fs::set_permissions(to, md.permissions())?;
        }
        return Ok(());
    }
    if let Some(t) = there {
        if t.is_dir() {
            return Err(std::io::ErrorKind::AlreadyExists.into());
        }
        fs::remove_file(to)?;
    }
    if md.is_symlink() {
        symlink(fs::read_link(from)?, to)
    } else {
        fs::copy(from, to).map(|_| ())
    }
}

fn by_writer(w: &mut FileWriter, src: &View, act: &Act) -> Result<()> {
    let stop = Stop::new();
    match act {
        Act::Mkdir(p, parents) => w.mkdir(p.as_bytes(), 0o755, *parents, None, None, &stop),
        Act::Mkfile(p, text) => w.mkfile(p.as_bytes(), 0o644, text.as_bytes(), None, None, &stop),
        Act::Symlink(target, p) => w.symlink(target.as_bytes(), p.as_bytes(), None, None, &stop),
        Act::Rm(p) => w.rm(p.as_bytes(), true, false, &stop),
        Act::Copy(from, to) => {
            let spec = CopySpec {
                follow_symlink: false,
                allow_wildcard: false,
                ..copy(from, to)
            };
            w.copy(&spec, src, &stop)
        }
    }
}

fn acts() -> impl proptest::strategy::Strategy<Value = Vec<Act>> {
    use proptest::prelude::*;
    let path = "[abc](/[abc]){0,2}";
    let act = prop_oneof![
        2 => (path, any::<bool>()).prop_map(|(p, b)| Act::Mkdir(p, b)),
        3 => (path, "[xyz]{0,3}").prop_map(|(p, t)| Act::Mkfile(p, t)),
        1 => (path, "[lm]").prop_map(|(p, l)| Act::Symlink("nowhere".into(), format!("{p}{l}"))),
        3 => path.prop_map(Act::Rm),
        3 => ("[abc](/[abc])?", path).prop_map(|(f, t)| Act::Copy(f, t)),
    ];
    proptest::collection::vec(act, 1..8)
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 24, failure_persistence: None, ..Default::default() })]

    /// Three rounds of random actions, each a new layer: the stack shows what a real overlay shows after the same
    /// actions, by the view and by mounting the written trees; and archive and back changes nothing.
    #[test]
    fn as_on_a_real_overlay(layers in proptest::collection::vec(acts(), 3)) {
        let lab = Lab::new();
        let src = lab.view(&["a/a=1", "a/b/c=2", "b=3", "c/a/x=4", "c/l -> a"]);
        let src_mount = Overlay::mount(&lab, &src, false);
        let mut view = View::scratch();
        let mut from_archives: Vec<Tree> = Vec::new();
        let mut stages = vec![view.clone()];
        for actions in layers {
            let real = Overlay::mount(&lab, &view, true);
            let mut w = FileWriter::new(&view, lab.builder()).unwrap();
            let mut failed = false;
            for act in &actions {
                let hand = by_hand(&real.0, &src_mount.0, act);
                let ours = by_writer(&mut w, &src, act);
                proptest::prop_assert_eq!(hand.is_ok(), ours.is_ok(), "{:?}: {:?} / {:?}", act, hand, ours);
                // Copies may fail halfway, everything else fails without a trace.
                failed = hand.is_err() && matches!(act, Act::Copy(..));
                if failed {
                    break;
                }
            }
            if failed {
                // A failed action ends the op, and its tree is thrown away.
                continue;
            }
            let tree = w.finish(&Stop::new()).unwrap();
            proptest::prop_assert!(tree.manifest().unwrap().entries().iter().all(|e| !e.opaque));
            // The manifest says what is on disk.
            let fact = |e: &kiln_store::Entry| (e.path.clone(), e.kind, e.mode, e.uid, e.gid, e.size, e.target.clone());
            let again = TreeBuilder::create(tree.dir(), overlay_xattr()).unwrap();
            let mut disk = kiln_store::snapshot::scan::upper(&again, &Stop::new()).unwrap();
            disk.sort_by(|a, b| kiln_store::manifest::compare(&a.path, &b.path));
            let said: Vec<_> = tree.manifest().unwrap().entries().iter().map(fact).collect();
            proptest::prop_assert_eq!(said, disk.iter().map(fact).collect::<Vec<_>>());
            let next = with(&view, tree.clone());
            let want = survey(&real.0);
            proptest::prop_assert_eq!(&survey_view(&next), &want);
            let mounted = Overlay::mount(&lab, &next, false);
            proptest::prop_assert_eq!(&survey(&mounted.0), &want);
            let mut tar = Vec::new();
            kiln_store::layer::write_tar(&view, &tree, Default::default(), &mut tar, &Stop::new()).unwrap();
            let again = kiln_store::layer::apply(&tar[..], lab.builder(), &Default::default(), &Stop::new()).unwrap();
            from_archives.push(again.tree);
            proptest::prop_assert_eq!(&survey_view(&View::new(from_archives.clone()).unwrap()), &want);
            view = next;
            stages.push(view.clone());
        }
        // The difference of any two of them, laid on the one, shows the other.
        for a in &stages {
            for b in &stages {
                let tree = kiln_store::union::stack::diff_views(a, b, lab.builder(), &Stop::new()).unwrap();
                proptest::prop_assert_eq!(survey_view(&with(a, tree)), survey_view(b));
            }
        }
    }
}
