//! Directories from the client: what arrives, and how little is asked for the second time.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use common::{Pair, connect, digest, open, paths, prefix};
use kiln_session::attach::Attachments;
use kiln_session::fsutil::METADATA_FILE;
use kiln_session::{
    Entry, Existing, LocalDir, ReceiveOptions, Received, SessionError, SessionErrorKind, TransferStats,
};

async fn share(path: &Path) -> Pair {
    let mut attachments = Attachments::default();
    attachments.dirs.insert("context".to_owned(), path.to_owned());
    connect(attachments).await
}

fn context() -> LocalDir {
    LocalDir {
        name: "context".to_owned(),
        ..LocalDir::default()
    }
}

fn options(existing: Existing) -> ReceiveOptions {
    ReceiveOptions {
        existing,
        digest: Some(prefix()),
        ..ReceiveOptions::default()
    }
}

async fn receive(pair: &Pair, target: &Path, existing: Existing) -> Received {
    pair.session
        .receive_dir(&context(), open(target), options(existing))
        .await
        .unwrap()
}

fn set_mtime(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    fs::File::open(path).unwrap().set_modified(time).unwrap();
}

/// A tree with every kind of thing that a context has.
fn sample() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    fs::create_dir_all(at("src/deep")).unwrap();
    fs::create_dir_all(at("empty")).unwrap();
    fs::write(at("Dockerfile"), "FROM scratch\n").unwrap();
    fs::write(at("src/main"), vec![7u8; 200_000]).unwrap();
    fs::write(at("src/deep/zero"), "").unwrap();
    fs::write(at("src.txt"), "sorts after src/").unwrap();
    fs::write(at("größe"), "not ascii").unwrap();
    fs::hard_link(at("src/main"), at("src/same")).unwrap();
    symlink("../Dockerfile", at("src/link")).unwrap();
    fs::set_permissions(at("src/main"), fs::Permissions::from_mode(0o4750)).unwrap();
    fs::set_permissions(at("empty"), fs::Permissions::from_mode(0o500)).unwrap();
    set_mtime(&at("src/main"), 1_000_000);
    set_mtime(&at("src"), 2_000_000);
    dir
}

#[tokio::test]
async fn everything_arrives_as_it_is() {
    let (source, target) = (sample(), tempfile::tempdir().unwrap());
    let pair = share(source.path()).await;
    let received = receive(&pair, target.path(), Existing::Empty).await;
    let expected = [
        "Dockerfile",
        "empty",
        "größe",
        "src",
        "src/deep",
        "src/deep/zero",
        "src/link",
        "src/main",
        "src/same",
        "src.txt",
    ];
    assert_eq!(paths(&received.listing), expected);
    let bytes = 200_000 + "FROM scratch\n".len() + "sorts after src/".len() + "not ascii".len();
    assert_eq!(
        received.stats,
        TransferStats {
            entries: 10,
            requested: 5,
            bytes: bytes as u64
        }
    );

    let at = |path: &str| target.path().join(path);
    assert_eq!(fs::read(at("src/main")).unwrap(), vec![7u8; 200_000]);
    assert_eq!(fs::read_link(at("src/link")).unwrap(), Path::new("../Dockerfile"));
    let main = fs::metadata(at("src/main")).unwrap();
    assert_eq!(
        (main.mode() & 0o7777, main.mtime(), main.nlink()),
        (0o4750, 1_000_000, 2)
    );
    assert_eq!(main.ino(), fs::metadata(at("src/same")).unwrap().ino());
    // Directories get their time after what is in them, and their mode although it forbids writing.
    assert_eq!(fs::metadata(at("src")).unwrap().mtime(), 2_000_000);
    assert_eq!(fs::metadata(at("empty")).unwrap().mode() & 0o777, 0o500);

    let entry = |path: &str| received.listing.iter().find(|entry| entry.path == path).unwrap();
    assert_eq!(entry("src/main").digest, digest(&vec![7u8; 200_000]));
    assert_eq!(entry("src/same").digest, entry("src/main").digest);
    assert_eq!(entry("src/deep/zero").digest, digest(b""));
    assert_eq!(entry("src").digest, None);
    assert!(received.listing.iter().all(|entry| (entry.uid, entry.gid) == (0, 0)));
}

#[tokio::test]
async fn a_second_transfer_asks_only_for_what_changed() {
    let (source, target) = (sample(), tempfile::tempdir().unwrap());
    let pair = share(source.path()).await;
    let first = receive(&pair, target.path(), Existing::Empty).await;

    let same = receive(&pair, target.path(), Existing::Listing(first.listing.clone())).await;
    assert_eq!(
        same.stats,
        TransferStats {
            entries: 10,
            requested: 0,
            bytes: 0
        }
    );
    assert_eq!(same.listing, first.listing);

    fs::write(source.path().join("src.txt"), "changed").unwrap();
    fs::write(source.path().join("src/deep/new"), "new").unwrap();
    fs::remove_dir_all(source.path().join("empty")).unwrap();
    fs::remove_file(source.path().join("Dockerfile")).unwrap();
    // A file becomes a directory and a symlink a file.
    fs::create_dir(source.path().join("Dockerfile")).unwrap();
    fs::write(source.path().join("Dockerfile/inside"), "x").unwrap();
    fs::remove_file(source.path().join("src/link")).unwrap();
    fs::write(source.path().join("src/link"), "no link").unwrap();
    let second = receive(&pair, target.path(), Existing::Listing(same.listing)).await;
    assert_eq!(
        second.stats.requested, 4,
        "src.txt, src/deep/new, Dockerfile/inside, src/link"
    );
    assert_eq!(second.stats.bytes, 7 + 3 + 1 + 7);
    let fresh_target = tempfile::tempdir().unwrap();
    let fresh = receive(&pair, fresh_target.path(), Existing::Empty).await;
    assert_eq!(second.listing, fresh.listing);
    assert_eq!(disk(target.path()), disk(fresh_target.path()));
}

#[tokio::test]
async fn the_first_name_of_a_hard_link_is_rewritten_with_all_its_names() {
    let (source, target) = (sample(), tempfile::tempdir().unwrap());
    let pair = share(source.path()).await;
    let first = receive(&pair, target.path(), Existing::Empty).await;
    fs::write(source.path().join("src/main"), "shorter").unwrap();
    let second = receive(&pair, target.path(), Existing::Listing(first.listing)).await;
    assert_eq!(second.stats.requested, 1);
    assert_eq!(fs::read(target.path().join("src/same")).unwrap(), b"shorter");
    assert_eq!(fs::metadata(target.path().join("src/same")).unwrap().nlink(), 2);
    // The link goes, the file stays; then the first name goes and the second becomes a file of its own.
    fs::remove_file(source.path().join("src/main")).unwrap();
    let third = receive(&pair, target.path(), Existing::Listing(second.listing)).await;
    assert_eq!(third.stats.requested, 1);
    assert_eq!(fs::read(target.path().join("src/same")).unwrap(), b"shorter");
    assert!(!target.path().join("src/main").exists());
}

#[tokio::test]
async fn a_lost_listing_is_made_again_from_disk() {
    let (source, target) = (sample(), tempfile::tempdir().unwrap());
    let pair = share(source.path()).await;
    let first = receive(&pair, target.path(), Existing::Empty).await;
    // The owner on disk is root's only when the test is; a listing from disk says what is there.
    let mut found = kiln_session::fsutil::scan(&open(target.path()), &kiln_fs::Stop::new()).unwrap();
    for entry in &mut found {
        (entry.uid, entry.gid) = (0, 0);
    }
    assert!(found.iter().all(|entry| entry.digest.is_none()));
    let again = receive(&pair, target.path(), Existing::Listing(found)).await;
    assert_eq!(again.stats.requested, 0);
    assert_eq!(again.listing, first.listing, "digests are computed from disk");
}

#[tokio::test]
async fn without_comparison_everything_is_asked_for() {
    let (source, target) = (sample(), tempfile::tempdir().unwrap());
    let pair = share(source.path()).await;
    let first = receive(&pair, target.path(), Existing::Empty).await;
    let all = ReceiveOptions {
        differ: false,
        ..options(Existing::Listing(first.listing.clone()))
    };
    let second = pair
        .session
        .receive_dir(&context(), open(target.path()), all)
        .await
        .unwrap();
    assert_eq!(second.stats.requested, 5);
    assert_eq!(second.listing, first.listing);
}

#[tokio::test]
async fn patterns_reach_the_client() {
    let (source, target) = (sample(), tempfile::tempdir().unwrap());
    let pair = share(source.path()).await;
    let dir = LocalDir {
        include: Some(vec!["gr*e".to_owned(), "**/größe".to_owned()]),
        ..context()
    };
    let received = pair
        .session
        .receive_dir(&dir, open(target.path()), options(Existing::Empty))
        .await
        .unwrap();
    assert_eq!(paths(&received.listing), ["größe"]);
    let dir = LocalDir {
        exclude: Some(vec!["src".to_owned(), "!src/deep".to_owned(), "g*".to_owned()]),
        ..context()
    };
    let existing = Existing::Listing(received.listing);
    let received = pair
        .session
        .receive_dir(&dir, open(target.path()), options(existing))
        .await
        .unwrap();
    assert_eq!(
        paths(&received.listing),
        ["Dockerfile", "empty", "src", "src/deep", "src/deep/zero", "src.txt"]
    );
    let dir = LocalDir {
        follow_paths: Some(vec!["src/link".to_owned()]),
        ..context()
    };
    let existing = Existing::Listing(received.listing);
    let received = pair
        .session
        .receive_dir(&dir, open(target.path()), options(existing))
        .await
        .unwrap();
    assert_eq!(paths(&received.listing), ["Dockerfile", "src", "src/link"]);
}

#[tokio::test]
async fn metadata_only_materialises_what_is_selected() {
    let (source, target) = (sample(), tempfile::tempdir().unwrap());
    let pair = share(source.path()).await;
    let selected = ReceiveOptions {
        metadata_only: Some(vec!["src/deep".to_owned()]),
        ..options(Existing::Empty)
    };
    let received = pair
        .session
        .receive_dir(&context(), open(target.path()), selected)
        .await
        .unwrap();
    assert_eq!(paths(&received.listing), ["src", "src/deep", "src/deep/zero"]);
    assert_eq!((received.stats.entries, received.stats.requested), (10, 1));
    let mut names: Vec<_> = fs::read_dir(target.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, [METADATA_FILE, "src"]);
    // The file tells of everything.
    let frames = fs::read(target.path().join(METADATA_FILE)).unwrap();
    let mut rest = frames.as_slice();
    let mut listed = Vec::new();
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let (frame, tail) = tail.split_at(u32::from_le_bytes(*length) as usize);
        let stat: kiln_proto::fsutil::Stat = prost::Message::decode(frame).unwrap();
        listed.push(stat.path);
        rest = tail;
    }
    assert_eq!(listed.len(), 10);
    assert_eq!(listed[3], "src");

    // The second time, with the listing of the first lost: the file is not taken for a leftover.
    let existing = Existing::Disk { delete: true };
    let selected = ReceiveOptions {
        metadata_only: Some(vec!["src.txt".to_owned()]),
        ..options(existing)
    };
    let received = pair
        .session
        .receive_dir(&context(), open(target.path()), selected)
        .await
        .unwrap();
    assert_eq!(paths(&received.listing), ["src.txt"]);
    assert_eq!(fs::read(target.path().join(METADATA_FILE)).unwrap(), frames);
    assert!(!target.path().join("src").exists());
}

#[tokio::test]
async fn extended_attributes_and_progress() {
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("file"), vec![1u8; 100_000]).unwrap();
    open(source.path())
        .set_xattr("file", b"user.color", b"blue")
        .expect("the test directory takes user attributes");
    let target = tempfile::tempdir().unwrap();
    let pair = share(source.path()).await;
    let seen = Arc::new(AtomicU64::new(0));
    let told = Arc::clone(&seen);
    let watched = ReceiveOptions {
        progress: Some(Arc::new(move |bytes| told.store(bytes, Ordering::Relaxed))),
        ..options(Existing::Empty)
    };
    let received = pair
        .session
        .receive_dir(&context(), open(target.path()), watched)
        .await
        .unwrap();
    assert_eq!(seen.load(Ordering::Relaxed), 100_000);
    assert_eq!(received.listing[0].xattrs["user.color"], "blue");
    let found = open(target.path()).xattrs("file", |_| true).unwrap();
    assert!(
        found
            .iter()
            .any(|(name, value)| &**name == b"user.color" && &**value == b"blue")
    );
}

#[tokio::test]
async fn what_the_client_does_not_share() {
    let (source, target) = (sample(), tempfile::tempdir().unwrap());
    let pair = share(source.path()).await;
    let other = LocalDir {
        name: "other".to_owned(),
        ..LocalDir::default()
    };
    let error = pair
        .session
        .receive_dir(&other, open(target.path()), options(Existing::Empty))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), SessionErrorKind::NotFound);
    assert_eq!(
        error.remote_status().unwrap().message,
        "no access allowed to dir \"other\""
    );

    let none = connect(Attachments::default()).await;
    let error = none
        .session
        .receive_dir(&context(), open(target.path()), options(Existing::Empty))
        .await
        .unwrap_err();
    assert!(matches!(&error, SessionError::Unsupported(text) if text == "no local sources enabled"));
}

#[tokio::test]
async fn many_files_in_one_go() {
    let source = tempfile::tempdir().unwrap();
    for dir in 0..40 {
        let dir = source.path().join(format!("dir{dir}"));
        fs::create_dir(&dir).unwrap();
        for file in 0..100 {
            fs::write(dir.join(format!("file{file}")), format!("{}/{file}", dir.display())).unwrap();
        }
    }
    let target = tempfile::tempdir().unwrap();
    let pair = share(source.path()).await;
    let first = receive(&pair, target.path(), Existing::Empty).await;
    assert_eq!((first.stats.entries, first.stats.requested), (4040, 4000));
    assert_eq!(disk(source.path()), disk(target.path()));
    fs::write(source.path().join("dir7/file7"), "other").unwrap();
    let second = receive(&pair, target.path(), Existing::Listing(first.listing)).await;
    assert_eq!(
        second.stats,
        TransferStats {
            entries: 4040,
            requested: 1,
            bytes: 5
        }
    );
}

/// What lies in a directory: paths with their entries (without owners) and contents.
fn disk(path: &Path) -> Vec<(Entry, Vec<u8>)> {
    let entries = kiln_session::fsutil::scan(&open(path), &kiln_fs::Stop::new()).unwrap();
    let with_content = |mut entry: Entry| {
        (entry.uid, entry.gid) = (0, 0);
        let content = if entry.is_file() {
            fs::read(path.join(&entry.path)).unwrap()
        } else {
            Vec::new()
        };
        (entry, content)
    };
    entries.into_iter().map(with_content).collect()
}
