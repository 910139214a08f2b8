//! One suite over both snapshotters: what a process does to a root is what the sealed tree shows.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_fs::Timestamp;
use kiln_store::{
    FileWriter, Kind, Mount, Native, OverlayFs, OverlayXattr, Snapshotter, Stop, Tree, TreeBuilder, View,
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

    fn dir(&self) -> PathBuf {
        self.1.set(self.1.get() + 1);
        let dir = self.0.path().join(self.1.get().to_string());
        std::fs::create_dir(&dir).unwrap();
        dir
    }

    fn builder(&self) -> TreeBuilder {
        TreeBuilder::create(self.dir(), overlay_xattr()).unwrap()
    }

    fn base(&self) -> View {
        let stop = Stop::new();
        let time = Some(Timestamp {
            secs: 1_400_000_000,
            nanos: 5,
        });
        let mut w = FileWriter::new(&View::scratch(), self.builder()).unwrap();
        for dir in ["etc", "usr/bin", "usr/lib/deep", "var/log", "opt/a/b"] {
            w.mkdir(dir.as_bytes(), 0o755, true, None, time, &stop).unwrap();
        }
        for file in [
            "etc/passwd",
            "usr/bin/tool",
            "usr/lib/deep/x",
            "usr/lib/deep/y",
            "var/log/old",
            "opt/a/b/c",
            "keep",
        ] {
            w.mkfile(file.as_bytes(), 0o644, file.as_bytes(), None, time, &stop)
                .unwrap();
        }
        w.symlink(b"usr/bin", b"bin", None, time, &stop).unwrap();
        let lower = View::new(vec![w.finish(&stop).unwrap()]).unwrap();
        let mut w = FileWriter::new(&lower, self.builder()).unwrap();
        w.rm(b"/var/log/old", false, false, &stop).unwrap();
        w.mkfile(b"/var/log/new", 0o600, b"new", None, time, &stop).unwrap();
        w.mkfile(b"/etc/passwd", 0o644, b"changed", None, time, &stop).unwrap();
        stacked(&lower, w.finish(&stop).unwrap())
    }
}

fn stacked(base: &View, tree: Tree) -> View {
    let mut trees = base.trees().to_vec();
    trees.push(tree);
    View::new(trees).unwrap()
}

struct Mounted(PathBuf, bool);

impl Mounted {
    fn new(lab: &Lab, mount: &Mount) -> Self {
        match mount {
            Mount::Bind { path, .. } => Mounted(path.clone(), false),
            Mount::Overlay { lowers, writable } => {
                let at = lab.dir();
                let list: Vec<String> = lowers.iter().map(|p| p.display().to_string()).collect();
                let mut options = format!(
                    "lowerdir={},index=off,metacopy=off,redirect_dir=nofollow,xino=off",
                    list.join(":")
                );
                if let Some((upper, work)) = writable {
                    options += &format!(",upperdir={},workdir={}", upper.display(), work.display());
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
                Mounted(at, true)
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.1 {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }
}

type Survey = BTreeMap<String, String>;

fn survey(root: &Path) -> Survey {
    fn walk(root: &Path, dir: &Path, out: &mut Survey) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let md = std::fs::symlink_metadata(&path).unwrap();
            let what = if md.is_symlink() {
                format!("-> {}", std::fs::read_link(&path).unwrap().display())
            } else if md.is_file() {
                format!(
                    "{:?} at {}.{}",
                    std::fs::read(&path).unwrap(),
                    md.mtime(),
                    md.mtime_nsec()
                )
            } else {
                format!("type {:o}", md.mode() >> 12)
            };
            let name = path.strip_prefix(root).unwrap().display().to_string();
            out.insert(
                name,
                format!("{:o} {}:{} {what}", md.mode() & 0o7777, md.uid(), md.gid()),
            );
            if md.is_dir() {
                walk(root, &path, out);
            }
        }
    }
    let mut out = Survey::new();
    walk(root, root, &mut out);
    out
}

fn survey_view(view: &View) -> Survey {
    let mut out = Survey::new();
    for node in view.walk(&view.root().unwrap()) {
        let e = view.entry(&node);
        let what = match e.kind {
            Kind::Symlink => format!("-> {}", String::from_utf8_lossy(&e.target)),
            Kind::Regular => {
                let mut data = Vec::new();
                std::io::Read::read_to_end(&mut view.open(&node).unwrap(), &mut data).unwrap();
                format!("{data:?} at {}.{}", e.mtime.secs, e.mtime.nanos)
            }
            _ => format!("type {:o}", e.st_mode() >> 12),
        };
        out.insert(
            String::from_utf8_lossy(&e.path).into_owned(),
            format!("{:o} {}:{} {what}", e.mode, e.uid, e.gid),
        );
    }
    out
}

fn changes(tree: &Tree) -> Vec<String> {
    let manifest = tree.manifest().unwrap();
    let line = |e: &kiln_store::Entry| {
        let mark = if e.kind == Kind::Whiteout { "-" } else { "" };
        format!("{mark}{}", String::from_utf8_lossy(&e.path))
    };
    manifest
        .entries()
        .iter()
        .skip(1)
        .filter(|e| !e.unchanged)
        .map(line)
        .collect()
}

/// Runs `step` over a root of `base` with each snapshotter; gives the changes, which must be the same for both.
fn run(base: impl Fn(&Lab) -> View, step: impl Fn(&Path)) -> Vec<String> {
    let mut seen: Vec<Vec<String>> = Vec::new();
    for snapshotter in [&OverlayFs as &dyn Snapshotter, &Native] {
        let lab = Lab::new();
        let base = base(&lab);
        let stop = Stop::new();
        let active = snapshotter.prepare(&base, lab.builder(), &stop).unwrap();
        let mounted = Mounted::new(&lab, active.mount());
        assert_eq!(survey(&mounted.0), survey_view(&base), "{}: before", snapshotter.name());
        step(&mounted.0);
        let want = survey(&mounted.0);
        drop(mounted);
        let tree = active.seal(&stop).unwrap();
        assert!(tree.manifest().unwrap().entries().iter().all(|e| !e.opaque));
        let after = stacked(&base, tree.clone());
        assert_eq!(survey_view(&after), want, "{}: view", snapshotter.name());
        for reader in [&OverlayFs as &dyn Snapshotter, &Native] {
            let mount = reader.read_only(&after, &lab.dir(), &stop).unwrap();
            let mounted = Mounted::new(&lab, &mount);
            assert_eq!(
                survey(&mounted.0),
                want,
                "{} read by {}",
                snapshotter.name(),
                reader.name()
            );
        }
        let left = Command::new("getfattr")
            .args(["-R", "-h", "-m", "overlay", "-d"])
            .arg(tree.fs_path())
            .output();
        if let Ok(left) = left {
            assert_eq!(
                String::from_utf8_lossy(&left.stdout),
                "",
                "attributes of overlayfs are gone"
            );
        }
        seen.push(changes(&tree));
    }
    assert_eq!(seen[0], seen[1], "both snapshotters see the same changes");
    seen.remove(0)
}

#[test]
fn nothing_done_is_nothing() {
    assert_eq!(run(Lab::base, |_| ()), Vec::<String>::new());
}

#[test]
fn the_usual_changes() {
    let got = run(Lab::base, |root| {
        std::fs::write(root.join("etc/hosts"), "h").unwrap();
        std::fs::write(root.join("keep"), "other").unwrap();
        std::fs::remove_file(root.join("etc/passwd")).unwrap();
        std::fs::remove_dir_all(root.join("opt/a")).unwrap();
        std::fs::set_permissions(root.join("usr/bin/tool"), PermissionsExt::from_mode(0o4711)).unwrap();
        symlink("x", root.join("usr/link")).unwrap();
        std::fs::rename(root.join("usr/lib/deep/x"), root.join("var/x")).unwrap();
        std::fs::create_dir_all(root.join("new/tree")).unwrap();
        std::fs::write(root.join("new/tree/f"), "f").unwrap();
        Command::new("mkfifo").arg(root.join("new/pipe")).status().unwrap();
    });
    let want = [
        "etc/hosts",
        "-etc/passwd",
        "keep",
        "new",
        "new/pipe",
        "new/tree",
        "new/tree/f",
        "-opt/a",
        "usr/bin/tool",
        "-usr/lib/deep/x",
        "usr/link",
        "var/x",
    ];
    assert_eq!(got, want);
}

#[test]
fn replaced_directories_are_spelled_out() {
    let got = run(Lab::base, |root| {
        std::fs::remove_dir_all(root.join("usr")).unwrap();
        std::fs::create_dir_all(root.join("usr/lib/deep")).unwrap();
        std::fs::write(root.join("usr/lib/deep/y"), "new y").unwrap();
        std::fs::remove_dir_all(root.join("opt")).unwrap();
        std::fs::write(root.join("opt"), "a file").unwrap();
        std::fs::remove_file(root.join("keep")).unwrap();
        std::fs::create_dir(root.join("keep")).unwrap();
    });
    assert_eq!(got, ["keep", "opt", "-usr/bin", "-usr/lib/deep/x", "usr/lib/deep/y"]);
}

#[test]
fn touched_but_equal_is_no_change() {
    let got = run(Lab::base, |root| {
        let file = root.join("keep");
        let md = std::fs::metadata(&file).unwrap();
        std::fs::OpenOptions::new().append(true).open(&file).unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::set_permissions(&file, md.permissions()).unwrap();
        std::fs::write(root.join("etc/tmp"), "").unwrap();
        std::fs::remove_file(root.join("etc/tmp")).unwrap();
    });
    assert_eq!(got, Vec::<String>::new());
}

#[test]
fn same_size_and_time_but_other_content_is_a_change() {
    let got = run(Lab::base, |root| {
        let file = root.join("keep");
        let before = std::fs::metadata(&file).unwrap().modified().unwrap();
        let f = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
        std::io::Write::write_all(&mut &f, b"peek").unwrap();
        f.set_modified(before).unwrap();
    });
    assert_eq!(got, ["keep"]);
}

#[test]
fn links_and_attributes() {
    let got = run(Lab::base, |root| {
        std::fs::write(root.join("one"), "1").unwrap();
        std::fs::hard_link(root.join("one"), root.join("two")).unwrap();
        std::fs::hard_link(root.join("one"), root.join("etc/three")).unwrap();
        rustix::fs::setxattr(root.join("one"), "user.k", b"v", rustix::fs::XattrFlags::empty()).unwrap();
    });
    assert_eq!(got, ["etc/three", "one", "two"]);
    let lab = Lab::new();
    let base = lab.base();
    for snapshotter in [&OverlayFs as &dyn Snapshotter, &Native] {
        let active = snapshotter.prepare(&base, lab.builder(), &Stop::new()).unwrap();
        let mounted = Mounted::new(&lab, active.mount());
        std::fs::write(mounted.0.join("one"), "1").unwrap();
        std::fs::hard_link(mounted.0.join("one"), mounted.0.join("two")).unwrap();
        drop(mounted);
        let tree = active.seal(&Stop::new()).unwrap();
        let manifest = tree.manifest().unwrap();
        let groups: Vec<u32> = manifest
            .entries()
            .iter()
            .map(|e| e.link_group)
            .filter(|g| *g != 0)
            .collect();
        assert_eq!(groups.len(), 2);
        assert_eq!(groups[0], groups[1]);
    }
}

#[test]
fn from_nothing() {
    for snapshotter in [&OverlayFs as &dyn Snapshotter, &Native] {
        let lab = Lab::new();
        let active = snapshotter
            .prepare(&View::scratch(), lab.builder(), &Stop::new())
            .unwrap();
        let root = match active.mount() {
            Mount::Bind { path, .. } => path.clone(),
            Mount::Overlay { lowers, writable } => {
                assert!(lowers.is_empty());
                writable.clone().unwrap().0
            }
        };
        std::fs::write(root.join("f"), "x").unwrap();
        let tree = active.seal(&Stop::new()).unwrap();
        assert_eq!(changes(&tree), ["f"]);
        let mount = snapshotter
            .read_only(&View::scratch(), &lab.dir(), &Stop::new())
            .unwrap();
        assert!(matches!(mount, Mount::Bind { readonly: true, .. }));
    }
}

#[test]
fn files_copied_up_and_not_changed_are_dropped() {
    let lab = Lab::new();
    let base = lab.base();
    let active = OverlayFs.prepare(&base, lab.builder(), &Stop::new()).unwrap();
    let mounted = Mounted::new(&lab, active.mount());
    std::fs::OpenOptions::new()
        .append(true)
        .open(mounted.0.join("usr/lib/deep/x"))
        .unwrap();
    std::fs::write(mounted.0.join("usr/lib/deep/z"), "new").unwrap();
    drop(mounted);
    assert!(active.dir().join("fs/usr/lib/deep/x").exists(), "the kernel copied it");
    let tree = active.seal(&Stop::new()).unwrap();
    assert!(!tree.fs_path().join("usr/lib/deep/x").exists());
    assert!(tree.manifest().unwrap().find(b"usr/lib/deep/x").is_none());
    assert!(tree.manifest().unwrap().find(b"usr/lib/deep/z").is_some());
}

#[test]
fn marks_that_a_process_sets_itself_mean_nothing() {
    let got = run(Lab::base, |root| {
        let name = if overlay_xattr() == OverlayXattr::User {
            "trusted.overlay.opaque"
        } else {
            "user.overlay.opaque"
        };
        // May be refused, and then there is nothing to see through.
        let _ = rustix::fs::setxattr(root.join("usr/lib"), name, b"y", rustix::fs::XattrFlags::empty());
    });
    assert_eq!(got, Vec::<String>::new());
}
