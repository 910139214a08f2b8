//! Content digests against known values that other BuildKit daemons compute for the same files.

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;

use kiln_oci::Digest;
use kiln_store::checksum::{Origin, Selector, checksum, content_digest, normalise};
use kiln_store::{Entry, Kind, OverlayXattr, Stop, StoreError, TreeBuilder, View};

fn file(path: &str, mode: u32, data: &str) -> (Entry, String) {
    let mut e = Entry::new(path.as_bytes().to_vec(), Kind::Regular);
    (e.mode, e.size) = (mode, data.len() as u64);
    (e, data.to_owned())
}

fn view(dir: &Path, entries: Vec<(Entry, String)>) -> View {
    let b = TreeBuilder::create(dir, OverlayXattr::User).unwrap();
    let mut all = vec![Entry::dir(*b"")];
    for (entry, data) in entries {
        let path = Path::new(std::str::from_utf8(&entry.path).unwrap());
        match entry.kind {
            Kind::Directory => b.fs().create_dir(path, 0o755).unwrap(),
            Kind::Regular => b
                .fs()
                .create_file(path, 0o644)
                .unwrap()
                .write_all(data.as_bytes())
                .unwrap(),
            _ => {}
        }
        all.push(entry);
    }
    View::new(vec![b.finish(all).unwrap()]).unwrap()
}

fn dir(path: &str) -> (Entry, String) {
    (Entry::dir(path.as_bytes().to_vec()), String::new())
}

fn link(path: &str, target: &str) -> (Entry, String) {
    let mut e = Entry::new(path.as_bytes().to_vec(), Kind::Symlink);
    (e.mode, e.target) = (0o777, target.as_bytes().into());
    (e, String::new())
}

fn sha(text: &str) -> Digest {
    format!("sha256:{text}").parse().unwrap()
}

fn plain(path: &str) -> Selector {
    Selector::path(path, true)
}

/// The source of the known values: two files that are one, a directory with a file, a link.
fn known(dir_path: &Path) -> View {
    let mut app = file("app.txt", 0o644, "hello\n");
    let mut hard = file("hard", 0o644, "hello\n");
    (app.0.link_group, hard.0.link_group) = (1, 1);
    view(
        dir_path,
        vec![
            app,
            dir("bin"),
            file("bin/run", 0o755, "x"),
            hard,
            link("link", "app.txt"),
        ],
    )
}

#[test]
fn entries() {
    let tmp = tempfile::tempdir().unwrap();
    let mut odd = file("odd", 0o640, "X");
    odd.0.gid = 5;
    odd.0.xattrs = [("security.selinux", "no"), ("trusted.b", "T"), ("user.foo", "bar")]
        .map(|(n, v)| (n.as_bytes().into(), v.as_bytes().into()))
        .to_vec();
    let mut setuid = file("setuid", 0o4755, "x");
    (setuid.0.uid, setuid.0.gid) = (1000, 1001);
    let mut dev = Entry::new(*b"dev", Kind::CharDevice);
    (dev.mode, dev.rdev) = (0o666, rustix::fs::makedev(1, 3));
    let v = view(
        tmp.path(),
        vec![
            file("f", 0o644, "hello\n"),
            link("l", "app.txt"),
            odd,
            setuid,
            (dev, String::new()),
        ],
    );
    let sum = |path: &str| checksum(&v, &Selector::path(path, false), Origin::Snapshot, &Stop::new()).unwrap();
    assert_eq!(
        sum("/f"),
        sha("09eefdc91e8894bc767daae7daa5a4e8cbf396610f10ae20604d9086c76d4a93")
    );
    assert_eq!(
        sum("l"),
        sha("e0a5b38fd487554c3a68dcbe082a3638baee645ddcf745e65f676a183fc6000c")
    );
    assert_eq!(
        sum("odd"),
        sha("a07fe9bf1b35421cdf20efc07c5f7c68d59bb19947650714b92c3bc60cd0ae22")
    );
    assert_eq!(
        sum("setuid"),
        sha("da90286c699602d1a6c0da6422dc81f31523213f99752f3ed40bb5b852aa8d47")
    );
    assert_eq!(
        sum("dev"),
        sha("0194263160120bafc733c52ddbb2636e86b9d9a1cfb01e77e9a367548d2461d8")
    );
}

#[test]
fn local_source() {
    let tmp = tempfile::tempdir().unwrap();
    let v = known(tmp.path());
    let sum = |s: &Selector| checksum(&v, s, Origin::Local, &Stop::new()).unwrap();
    let wild = |path: &str| Selector {
        path: path.into(),
        wildcard: true,
        follow_links: true,
        ..Selector::default()
    };
    let without = |path: &str, x: &str| Selector {
        exclude: vec![x.into()],
        ..Selector::path(path, false)
    };
    let run = "dbc0ebe29d01cef335b3c4e65b110eb68dbda27017a057097997db792010575f";
    assert_eq!(sum(&plain("/bin/run")), sha(run));
    assert_eq!(
        sum(&plain("/bin")),
        sha("69a7fbb45bf3548e4ab0799e09ef7b2a3838a33b6f830377c014248a80ad96d8")
    );
    assert_eq!(
        sum(&plain("/")),
        sha("c5a0499531de858ba81e79b931e2916547a25b61c75ef173b3028970716f6c1a")
    );
    assert_eq!(
        sum(&wild("/*.t?t")),
        sha("56d81cd6389575fee2ebd8f49294c84faf985892a780a3bd6dfa00fed7c4f5c5")
    );
    assert_eq!(
        sum(&wild("/b*")),
        sha("a4bc3f2fa4822d28fc92a2ff0cc09184545a976bc30df151562bc41a453e6caf")
    );
    assert_eq!(
        sum(&without("/", "**/*.txt")),
        sha("3f78dcf61e16621082d8de0e3bc26ccb061bd0e79a6ded59af9e86c1ca231a76")
    );
    assert_eq!(sum(&without("/bin", "*")), Digest::of(""));
    assert_eq!(sum(&wild("/nothing*")), Digest::of(""));
    assert_eq!(sum(&plain("/link")), sum(&plain("/app.txt")));
    assert_ne!(sum(&Selector::path("/link", false)), sum(&plain("/app.txt")));
}

#[test]
fn content_digests() {
    let tmp = tempfile::tempdir().unwrap();
    let v = known(tmp.path());
    let digest = |paths: &[&str]| {
        let selectors = normalise(paths.iter().map(|p| plain(p)).collect());
        content_digest(&v, &selectors, Origin::Local, &Stop::new()).unwrap()
    };
    assert_eq!(
        digest(&["/app.txt"]),
        sha("286f4db492f491f7b3f357be9b60a4964ab5322915dda76c7810107aa9e116c3")
    );
    let both = sha("f745eb2523fc3c3e394d84cf4a485d3f0328ae2397bc57647343902d00ea3c7b");
    assert_eq!(digest(&["/app.txt", "/bin"]), both);
    assert_eq!(digest(&["/bin", "/bin/run", "/app.txt", "/bin/"]), both);
    assert_eq!(
        digest(&["/"]),
        sha("d48046c7c059392d7e5a28d90e092d7c797574f93c25c5d1381ac5c9cbc68f1b")
    );
}

#[test]
fn known_list_forms() {
    let tmp = tempfile::tempdir().unwrap();
    let v = known(tmp.path());
    let sum = |s: &Selector| checksum(&v, s, Origin::Local, &Stop::new());
    let h = |p: &str| sum(&Selector::path(p, false)).unwrap().to_string();
    let header = "sha256:1a2805521573cb10d73bcd51d16bfa84c8f461d68599740e35484b90b2ab1bab";
    // A wildcard that hits the very name: the digest as it is.
    let same = Selector {
        path: "/app.tx[t]".into(),
        wildcard: true,
        ..Selector::default()
    };
    assert_eq!(sum(&same).unwrap(), Digest::of(format!("\0app.txt{}", h("/app.txt"))));
    // Directories come along as headers once something in them is selected.
    let only_run = Selector {
        include: vec!["bin/run".into()],
        ..plain("/")
    };
    assert_eq!(
        sum(&only_run).unwrap(),
        Digest::of(format!("\0bin{header}\0bin\0run{}", h("/bin/run")))
    );
    // A selected path that is left with itself alone.
    let itself = Selector {
        exclude: vec!["run".into()],
        ..plain("/bin")
    };
    assert_eq!(sum(&itself).unwrap().to_string(), header);
    // Links at the top are followed, if asked for.
    let l = Selector {
        path: "/l*".into(),
        wildcard: true,
        follow_links: true,
        ..Selector::default()
    };
    assert_eq!(sum(&l).unwrap(), Digest::of(format!("\0link{}", h("/app.txt"))));
    let l = Selector {
        follow_links: false,
        ..l
    };
    assert_eq!(sum(&l).unwrap(), Digest::of(format!("\0link{}", h("/link"))));
    let required = |r: &str| Selector {
        include: vec!["bin".into()],
        required: vec![r.into()],
        ..plain("/")
    };
    assert!(sum(&required("/bin")).is_ok());
    assert!(matches!(sum(&required("/etc")), Err(StoreError::Invalid(t)) if t == "\"/etc\": not found"));
}

#[test]
fn what_is_missing() {
    let tmp = tempfile::tempdir().unwrap();
    let v = known(tmp.path());
    let err = |v: &View, p: &str| {
        checksum(v, &plain(p), Origin::Snapshot, &Stop::new())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(err(&v, "/no/such"), "\"/no/such\": not found");
    assert_eq!(err(&View::scratch(), "x"), "\"/x\": not found");
    let root = checksum(&View::scratch(), &plain("/"), Origin::Snapshot, &Stop::new()).unwrap();
    assert_eq!(root, Digest::of(""));
}

#[test]
fn snapshots_count_their_root_and_remember() {
    let tmp = tempfile::tempdir().unwrap();
    let v = known(tmp.path());
    let sum = |v: &View| checksum(v, &plain("/"), Origin::Snapshot, &Stop::new()).unwrap();
    let first = sum(&v);
    assert_ne!(
        first,
        sha("c5a0499531de858ba81e79b931e2916547a25b61c75ef173b3028970716f6c1a")
    );
    // The files are gone, their digests are not.
    std::fs::remove_file(tmp.path().join("fs/bin/run")).unwrap();
    let again = View::new(vec![kiln_store::Tree::open(tmp.path())]).unwrap();
    assert_eq!(sum(&again), first);
    std::fs::remove_file(tmp.path().join("digests")).unwrap();
    let blank = View::new(vec![kiln_store::Tree::open(tmp.path())]).unwrap();
    assert!(checksum(&blank, &plain("/"), Origin::Snapshot, &Stop::new()).is_err());
}
