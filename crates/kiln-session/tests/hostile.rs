//! Clients that break the rules of a transfer: each is refused, and nothing outside the target changes.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::pin::Pin;

use bytes::Bytes;
use common::{Pair, connect_routes, open, paths, prefix};
use futures::{Stream, StreamExt as _};
use kiln_fs::mode::{GO_CHAR_DEVICE, GO_DEVICE, GO_DIR, GO_SOCKET, GO_SYMLINK};
use kiln_proto::filesync::file_sync_server::{FileSync, FileSyncServer};
use kiln_proto::fsutil::{Packet, Stat, packet::PacketType};
use kiln_session::{Entry, Existing, LocalDir, ReceiveOptions, Received, SessionError};
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

/// Sends what it was told; after the first request or end of script, keeps the stream open until the daemon leaves.
#[derive(Clone)]
struct Script(Vec<Packet>);

type Packets = Pin<Box<dyn Stream<Item = Result<Packet, Status>> + Send>>;

#[tonic::async_trait]
impl FileSync for Script {
    type DiffCopyStream = Packets;
    type TarStreamStream = Packets;

    async fn diff_copy(&self, request: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        let script = futures::stream::iter(self.0.clone().into_iter().map(Ok));
        let mut inbound = request.into_inner();
        // What the daemon says is read, and answered with an end once it is done.
        let rest = futures::stream::once(async move { while let Ok(Some(_)) = inbound.message().await {} })
            .filter_map(|()| async { None });
        Ok(Response::new(Box::pin(script.chain(rest))))
    }

    async fn tar_stream(&self, _: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        Err(Status::unimplemented(""))
    }
}

async fn client(script: Vec<Packet>) -> Pair {
    let routes = Routes::new(FileSyncServer::new(Script(script)));
    connect_routes(routes, &["/moby.filesync.v1.FileSync/DiffCopy"]).await
}

fn stat(path: &str, mode: u32, linkname: &str) -> Packet {
    let stat = Stat {
        path: path.to_owned(),
        mode,
        linkname: linkname.to_owned(),
        ..Stat::default()
    };
    Packet {
        stat: Some(stat),
        ..Packet::default()
    }
}

fn dir(path: &str) -> Packet {
    stat(path, GO_DIR | 0o755, "")
}

fn file(path: &str) -> Packet {
    stat(path, 0o644, "")
}

fn end() -> Packet {
    Packet::default()
}

fn data(id: u32, data: &'static str) -> Packet {
    Packet {
        r#type: PacketType::PacketData as i32,
        id,
        data: Bytes::from(data),
        stat: None,
    }
}

fn fin() -> Packet {
    Packet {
        r#type: PacketType::PacketFin as i32,
        ..Packet::default()
    }
}

/// Plays the script into a directory beside which a file must stay untouched.
async fn play(
    script: Vec<Packet>,
    existing: Existing,
    prepare: impl FnOnce(&std::path::Path),
) -> Result<Received, SessionError> {
    let outer = tempfile::tempdir().unwrap();
    fs::write(outer.path().join("victim"), "unharmed").unwrap();
    let target = outer.path().join("target");
    fs::create_dir(&target).unwrap();
    prepare(&target);
    let pair = client(script).await;
    let context = LocalDir {
        name: "context".to_owned(),
        ..LocalDir::default()
    };
    let options = ReceiveOptions {
        existing,
        digest: Some(prefix()),
        ..ReceiveOptions::default()
    };
    let received = pair.session.receive_dir(&context, open(&target), options).await;
    assert_eq!(fs::read(outer.path().join("victim")).unwrap(), b"unharmed");
    let mut names: Vec<_> = fs::read_dir(outer.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["target", "victim"]);
    received
}

async fn refused(script: Vec<Packet>) -> String {
    let error = play(script, Existing::Empty, |_| {}).await.unwrap_err();
    assert!(matches!(error, SessionError::Protocol { .. }), "{error:?}");
    error.to_string()
}

#[tokio::test]
async fn an_honest_script_passes() {
    let script = vec![dir("a"), file("a/b"), end(), data(1, "hello"), data(1, ""), fin()];
    // The script does not wait for the request, so the file's bytes may come before it: that is a broken client too.
    // What must never happen is anything but these two outcomes.
    match play(script, Existing::Empty, |_| {}).await {
        Ok(received) => assert_eq!(paths(&received.listing), ["a", "a/b"]),
        Err(error) => assert!(matches!(error, SessionError::Protocol { .. }), "{error:?}"),
    }
}

#[tokio::test]
async fn paths_that_leave_or_are_not_clean() {
    for path in [
        "../victim",
        "/etc/passwd",
        "a/../../victim",
        "",
        ".",
        "a//b",
        "a/",
        "nul\0byte",
    ] {
        let text = refused(vec![dir("a"), file(path), end()]).await;
        assert!(text.contains(&format!("{path:?}")), "{text}");
    }
}

#[tokio::test]
async fn wrong_order_and_duplicates() {
    assert!(
        refused(vec![file("b"), file("a"), end()])
            .await
            .contains("out of order")
    );
    assert!(
        refused(vec![file("a"), file("a"), end()])
            .await
            .contains("out of order")
    );
    assert!(
        refused(vec![dir("a"), file("a.txt"), file("a/b"), end()])
            .await
            .contains("out of order")
    );
}

#[tokio::test]
async fn entries_without_their_directory() {
    assert!(
        refused(vec![file("a/b"), end()])
            .await
            .contains("its directory was not listed")
    );
    assert!(
        refused(vec![file("a"), file("a/b"), end()])
            .await
            .contains("its directory was not listed")
    );
    // A symlink is no directory, wherever it points.
    let through_link = vec![stat("l", GO_SYMLINK | 0o777, ".."), file("l/victim"), end()];
    assert!(refused(through_link).await.contains("its directory was not listed"));
}

#[tokio::test]
async fn links_to_what_was_not_listed() {
    for target in ["victim", "../victim", "/etc/passwd", "z"] {
        let text = refused(vec![file("a"), stat("b", 0o644, target), end()]).await;
        assert!(text.contains("hard link to"), "{text}");
    }
    // Nor to a directory, nor to a symlink.
    refused(vec![dir("a"), stat("b", 0o644, "a"), end()]).await;
    refused(vec![
        stat("a", GO_SYMLINK | 0o777, "../victim"),
        stat("b", 0o644, "a"),
        end(),
    ])
    .await;
    refused(vec![stat("a", GO_SYMLINK | 0o777, ""), end()]).await;
}

#[tokio::test]
async fn kinds_of_files_that_no_tree_has() {
    refused(vec![stat("s", GO_SOCKET | 0o755, ""), end()]).await;
    refused(vec![stat("i", 1 << 19, ""), end()]).await;
    // Overlayfs would take it for a removed file.
    refused(vec![stat("w", GO_DEVICE | GO_CHAR_DEVICE | 0o600, ""), end()]).await;
}

#[tokio::test]
async fn conversations_that_are_cut_short() {
    assert!(refused(vec![data(0, "unasked"), end()]).await.contains("not asked for"));
    assert!(refused(vec![file("a"), end(), fin()]).await.contains("finished before"));
    assert!(refused(vec![end(), file("late")]).await.contains("after the end"));
    let error = Packet {
        r#type: PacketType::PacketErr as i32,
        data: Bytes::from("disk on fire"),
        ..Packet::default()
    };
    assert!(
        refused(vec![file("a"), error])
            .await
            .contains("error from sender: disk on fire")
    );
}

#[tokio::test]
async fn a_symlink_planted_where_a_directory_was() {
    // The listing says directory, the disk has a link out of the target: nothing is followed.
    let known = |path: &str, mode| Entry {
        path: path.to_owned(),
        mode,
        ..Entry::default()
    };
    let existing = Existing::Listing(vec![known("a", GO_DIR | 0o755), known("a/victim", 0o644)]);
    let script = vec![dir("a"), end()];
    let error = play(script, existing, |target| symlink("..", target.join("a")).unwrap())
        .await
        .unwrap_err();
    assert!(matches!(error, SessionError::Io { .. }), "{error:?}");
}
