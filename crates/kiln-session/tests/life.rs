//! The life of sessions: waiting for them, losing them, and what many calls do to them.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

mod common;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{connect_routes, open, plain_info};
use futures::{Stream, StreamExt as _};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kiln_proto::control::control_server::{Control, ControlServer};
use kiln_proto::control::*;
use kiln_proto::upload;
use kiln_proto::upload::upload_server::{Upload, UploadServer};
use kiln_session::attach::{Attachments, ClientSession, Secret};
use kiln_session::tunnel::{Tunnel, outgoing};
use kiln_session::{
    Existing, LocalDir, ReceiveOptions, SessionError, SessionErrorKind, SessionId, SessionInfo, SessionManager,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// A client whose uploads never end.
struct Endless;

type Chunks = Pin<Box<dyn Stream<Item = Result<upload::BytesMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Upload for Endless {
    type PullStream = Chunks;
    async fn pull(&self, request: Request<Streaming<upload::BytesMessage>>) -> Result<Response<Chunks>, Status> {
        let data = Bytes::from(vec![1u8; 32 << 10]);
        let chunk = move || Ok(upload::BytesMessage { data: data.clone() });
        Ok(
            match request.metadata().get("urlpath").and_then(|path| path.to_str().ok()) {
                Some("/small") => Response::new(Box::pin(futures::stream::iter([chunk()]))),
                _ => Response::new(Box::pin(futures::stream::repeat_with(chunk))),
            },
        )
    }
}

async fn endless() -> common::Pair {
    connect_routes(
        Routes::new(UploadServer::new(Endless)),
        &["/moby.upload.v1.Upload/Pull"],
    )
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_cancelled_streams() {
    let pair = endless().await;
    for _ in 0..20_000 {
        let mut body = std::pin::pin!(pair.session.upload("h", "/endless").await.unwrap());
        body.next().await.unwrap().unwrap();
    }
    assert!(!pair.session.is_over());
    let all: Vec<_> = pair.session.upload("h", "/small").await.unwrap().collect().await;
    assert_eq!(all.len(), 1);
}

#[tokio::test]
async fn streams_that_nobody_reads_do_not_starve_others() {
    let pair = endless().await;
    let mut stalled = Vec::new();
    for _ in 0..64 {
        let mut body = Box::pin(pair.session.upload("h", "/endless").await.unwrap());
        body.next().await.unwrap().unwrap();
        stalled.push(body);
    }
    // Each of them has filled its window by the time this one is answered; it must be answered all the same.
    for _ in 0..50 {
        let all = async {
            pair.session
                .upload("h", "/small")
                .await
                .unwrap()
                .collect::<Vec<_>>()
                .await
        };
        let all = tokio::time::timeout(Duration::from_secs(20), all)
            .await
            .expect("no starvation");
        assert!(all[0].is_ok());
    }
}

#[tokio::test]
async fn a_build_waits_for_its_session() {
    let manager = SessionManager::new();
    let id = SessionId::new("late");
    assert!(manager.try_get(&id).is_none());
    let waiting = tokio::spawn({
        let (manager, id) = (manager.clone(), id.clone());
        async move { manager.get(&id).await }
    });
    tokio::task::yield_now().await;
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let client = ClientSession::new("late", Attachments::default());
    tokio::spawn(async move { client.serve(theirs).await });
    let running = manager.clone();
    tokio::spawn(async move { running.run(plain_info("late"), ours).await });
    assert_eq!(waiting.await.unwrap().unwrap().id(), &id);
}

#[tokio::test(start_paused = true)]
async fn groups() {
    let mut attachments = Attachments::default();
    attachments
        .secrets
        .insert("a".to_owned(), Secret::Value(Bytes::from("1")));
    let client = ClientSession::new("here", attachments);
    let info = SessionInfo::from_headers(&client.headers()).unwrap();
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    tokio::spawn(async move { client.serve(theirs).await });
    let manager = SessionManager::new();
    let running = manager.clone();
    tokio::spawn(async move { running.run(info, ours).await });
    manager.get(&SessionId::new("here")).await.unwrap();

    let ids = |ids: &[&str]| ids.iter().map(|id| SessionId::new(*id)).collect::<Vec<_>>();
    let secret = |session: kiln_session::Session| async move { session.secret("a").await };
    let started = tokio::time::Instant::now();
    let found = manager.any(&ids(&["gone", "here"]), secret).await.unwrap();
    assert_eq!(found.unwrap(), "1");
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "the one that is open is asked first"
    );
    let none = manager.any(&ids(&["gone", "also-gone"]), secret).await.unwrap_err();
    assert!(started.elapsed() >= Duration::from_secs(10), "five seconds each");
    assert_eq!(none.to_string(), "no active sessions");
    assert_eq!(
        manager.any(&[], secret).await.unwrap_err().to_string(),
        "no active sessions"
    );
}

#[tokio::test(start_paused = true)]
async fn a_frozen_client_is_given_up() {
    // The other end of the pipe takes bytes and never answers.
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let manager = SessionManager::new();
    let running = manager.clone();
    let id = SessionId::new("frozen");
    tokio::spawn(async move { running.run(plain_info("frozen"), ours).await });
    let session = manager.get(&id).await.unwrap();
    let started = tokio::time::Instant::now();
    let call = session.credentials("reg.example");
    let error = tokio::time::timeout(Duration::from_secs(50), call)
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(error.kind(), SessionErrorKind::Gone);
    assert!(
        error.to_string().contains("session healthcheck failed fatally"),
        "{error}"
    );
    // Two checks, five seconds apart, the first waited for 15 s and the second for half as long again.
    let waited = started.elapsed();
    assert!(
        (Duration::from_secs(30)..Duration::from_secs(49)).contains(&waited),
        "{waited:?}"
    );
    assert!(session.is_over());
    assert!(manager.try_get(&id).is_none());
    drop(theirs);
}

#[tokio::test]
async fn calls_end_with_the_client() {
    let pair = endless().await;
    let mut body = Box::pin(pair.session.upload("h", "/endless").await.unwrap());
    body.next().await.unwrap().unwrap();
    pair.client.abort();
    let mut last = None;
    while let Some(next) = body.next().await {
        last = Some(next);
    }
    let error = last.unwrap().unwrap_err();
    assert_eq!(error.kind(), SessionErrorKind::Gone, "{error}");
    pair.session.closed().await;
    let error = pair.session.secret("x").await;
    assert!(matches!(error, Ok(None)), "it never had secrets");
    let error = pair.session.credentials("x").await.unwrap_err();
    assert!(matches!(error, SessionError::Gone { .. }), "{error:?}");
    assert!(pair.manager.try_get(&SessionId::new("the-client")).is_none());
}

#[tokio::test]
async fn a_second_session_with_the_same_id_takes_its_place() {
    let manager = SessionManager::new();
    let open_session = |name: &str| {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let client = ClientSession::new(
            "same",
            Attachments {
                shared_key: name.to_owned(),
                ..Attachments::default()
            },
        );
        let info = SessionInfo::from_headers(&client.headers()).unwrap();
        let running = manager.clone();
        tokio::spawn(async move { running.run(info, ours).await });
        tokio::spawn(async move { drop(client.serve(theirs).await) })
    };
    let id = SessionId::new("same");
    let _first_client = open_session("first");
    let first = manager.get(&id).await.unwrap();
    let _second_client = open_session("second");
    let second = loop {
        let found = manager.get(&id).await.unwrap();
        if found.shared_key() == "second" {
            break found;
        }
        tokio::task::yield_now().await;
    };
    // The first goes on for those who hold it, and its end does not take the second away.
    assert!(!first.is_over());
    first.close("done");
    first.closed().await;
    tokio::task::yield_now().await;
    assert_eq!(manager.get(&id).await.unwrap().shared_key(), "second");
    manager.shutdown();
    second.closed().await;
    assert!(
        manager.get(&SessionId::new("other")).await.is_err(),
        "nobody waits for ever after a shutdown"
    );
}

/// The daemon's front door with nothing behind it but sessions.
struct Door(SessionManager);

type Messages = Pin<Box<dyn Stream<Item = Result<BytesMessage, Status>> + Send>>;
type No<T> = futures::stream::Empty<Result<T, Status>>;

#[tonic::async_trait]
impl Control for Door {
    type PruneStream = No<UsageRecord>;
    type StatusStream = No<StatusResponse>;
    type SessionStream = Messages;
    type ListenBuildHistoryStream = No<BuildHistoryEvent>;

    async fn session(&self, request: Request<Streaming<BytesMessage>>) -> Result<Response<Messages>, Status> {
        let (metadata, _, inbound) = request.into_parts();
        let info = SessionInfo::from_headers(&metadata.into_headers())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let inbound = inbound.map(|message| message.map(|message| message.data).map_err(io::Error::other));
        let outbound = self.0.accept(info, inbound);
        Ok(Response::new(Box::pin(outbound.map(|data| Ok(BytesMessage { data })))))
    }
    async fn disk_usage(&self, _: Request<DiskUsageRequest>) -> Result<Response<DiskUsageResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn prune(&self, _: Request<PruneRequest>) -> Result<Response<Self::PruneStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn solve(&self, _: Request<SolveRequest>) -> Result<Response<SolveResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<Self::StatusStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn list_workers(&self, _: Request<ListWorkersRequest>) -> Result<Response<ListWorkersResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn listen_build_history(
        &self,
        _: Request<BuildHistoryRequest>,
    ) -> Result<Response<Self::ListenBuildHistoryStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn update_build_history(
        &self,
        _: Request<UpdateBuildHistoryRequest>,
    ) -> Result<Response<UpdateBuildHistoryResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_a_real_grpc_server() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kilnd.sock");
    let manager = SessionManager::new();
    let listener = UnixListenerStream::new(tokio::net::UnixListener::bind(&socket).unwrap());
    let door = ControlServer::new(Door(manager.clone())).max_decoding_message_size(16 << 20);
    let server = tokio::spawn(Server::builder().add_service(door).serve_with_incoming(listener));

    let source = tempfile::tempdir().unwrap();
    for n in 0..200 {
        std::fs::write(source.path().join(format!("file{n:03}")), vec![n as u8; n * 500]).unwrap();
    }
    let mut attachments = Attachments::default();
    attachments.dirs.insert("context".to_owned(), source.path().to_owned());
    let client = Arc::new(ClientSession::new("grpc-client", attachments));
    let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).unwrap();
    let mut control = control_client::ControlClient::new(endpoint.connect().await.unwrap());
    let (writer, outbound) = outgoing();
    let mut request = Request::new(outbound.map(|data| BytesMessage { data }));
    *request.metadata_mut() = tonic::metadata::MetadataMap::from_headers(client.headers());
    let inbound = control.session(request).await.unwrap().into_inner();
    let inbound = inbound.map(|message| message.map(|message| message.data).map_err(io::Error::other));
    let serving = Arc::clone(&client);
    let serving = tokio::spawn(async move { serving.serve(Tunnel::join(inbound, writer)).await });

    let session = manager.get(client.id()).await.unwrap();
    assert!(session.supports("/MOBY.filesync.v1.filesync/diffcopy"));
    let target = tempfile::tempdir().unwrap();
    let context = LocalDir {
        name: "context".to_owned(),
        ..LocalDir::default()
    };
    let options = || ReceiveOptions {
        existing: Existing::Empty,
        ..ReceiveOptions::default()
    };
    let received = session
        .receive_dir(&context, open(target.path()), options())
        .await
        .unwrap();
    assert_eq!((received.stats.entries, received.stats.requested), (200, 200));
    assert_eq!(
        std::fs::read(target.path().join("file199")).unwrap(),
        vec![199u8; 199 * 500]
    );

    // The client leaves in the middle of a transfer.
    let target = tempfile::tempdir().unwrap();
    let keep: Arc<()> = Arc::new(());
    let options = ReceiveOptions {
        keep: Some(keep.clone()),
        ..options()
    };
    serving.abort();
    let error = session
        .receive_dir(&context, open(target.path()), options)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), SessionErrorKind::Gone, "{error}");
    session.closed().await;
    // The last write is over when nobody holds the keeper any more.
    tokio::time::timeout(Duration::from_secs(10), async {
        while Arc::strong_count(&keep) > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the transfer lets go of its directory");
    server.abort();
}

#[tokio::test]
async fn a_client_that_sends_broken_details_harms_nobody() {
    // The gRPC library panics on status details that are not base64; the call must end with an error instead.
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let answer = |_: http::Request<hyper::body::Incoming>| async {
        let answer = http::Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", "13")
            .header("grpc-message", "plain")
            .header("grpc-status-details-bin", "&&&");
        answer.body(tonic::body::Body::empty())
    };
    let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    tokio::spawn(http2.serve_connection(TokioIo::new(theirs), hyper::service::service_fn(answer)));
    let manager = SessionManager::new();
    let running = manager.clone();
    tokio::spawn(async move { running.run(plain_info("broken"), ours).await });
    let session = manager.get(&SessionId::new("broken")).await.unwrap();
    let error = session.credentials("reg.example").await.unwrap_err();
    assert_eq!(error.remote_status().unwrap().message, "plain");
}
