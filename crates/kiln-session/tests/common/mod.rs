//! Both halves of a session in one process.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests
#![allow(dead_code)] // each test binary uses its part

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use kiln_fs::Dir;
use kiln_session::attach::{Attachments, ClientSession};
use kiln_session::fsutil::DigestPrefix;
use kiln_session::session::{HealthPolicy, KEY_METHOD};
use kiln_session::{Entry, Session, SessionId, SessionInfo, SessionManager};
use tokio::task::JoinHandle;
use tonic::service::Routes;

/// A daemon with one connected client.
pub(crate) struct Pair {
    pub(crate) manager: SessionManager,
    pub(crate) session: Session,
    pub(crate) client: JoinHandle<()>,
}

/// Connects a client that offers `attachments`, over memory.
pub(crate) async fn connect(attachments: Attachments) -> Pair {
    let client = ClientSession::new("the-client", attachments);
    let info = SessionInfo::from_headers(&client.headers()).unwrap();
    let (ours, theirs) = tokio::io::duplex(256 << 10);
    let client = tokio::spawn(async move { drop(client.serve(theirs).await) });
    finish(info, ours, client).await
}

/// Connects a client that serves exactly `routes`.
pub(crate) async fn connect_routes(routes: Routes, methods: &[&str]) -> Pair {
    let (ours, theirs) = tokio::io::duplex(256 << 10);
    let client = tokio::spawn(async move {
        let mut http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http2
            .max_local_error_reset_streams(None)
            .max_pending_accept_reset_streams(30_000);
        drop(
            http2
                .serve_connection(TokioIo::new(theirs), TowerToHyperService::new(routes))
                .await,
        );
    });
    finish(info(methods), ours, client).await
}

pub(crate) fn info(methods: &[&str]) -> SessionInfo {
    let mut headers = http::HeaderMap::new();
    headers.insert(kiln_session::session::KEY_ID, "the-client".parse().unwrap());
    for method in methods {
        headers.append(KEY_METHOD, method.parse().unwrap());
    }
    SessionInfo::from_headers(&headers).unwrap()
}

pub(crate) fn plain_info(id: &str) -> SessionInfo {
    SessionInfo {
        id: SessionId::new(id),
        name: String::new(),
        shared_key: String::new(),
        methods: HashSet::new(),
        health: HealthPolicy::default(),
    }
}

async fn finish(info: SessionInfo, pipe: tokio::io::DuplexStream, client: JoinHandle<()>) -> Pair {
    let manager = SessionManager::new();
    let id = info.id.clone();
    let running = manager.clone();
    tokio::spawn(async move { running.run(info, pipe).await });
    let session = manager.get(&id).await.unwrap();
    Pair {
        manager,
        session,
        client,
    }
}

pub(crate) fn open(path: &Path) -> Dir {
    Dir::open_ambient(path).unwrap()
}

pub(crate) fn paths(listing: &[Entry]) -> Vec<&str> {
    listing.iter().map(|entry| entry.path.as_str()).collect()
}

/// A digest prefix that depends on the size, as the real one does.
pub(crate) fn prefix() -> DigestPrefix {
    Arc::new(|entry: &Entry| format!("size {} ", entry.size).into_bytes())
}

pub(crate) fn digest(content: &[u8]) -> Option<[u8; 32]> {
    use sha2::Digest as _;
    let mut hasher = sha2::Sha256::new_with_prefix(format!("size {} ", content.len()));
    hasher.update(content);
    Some(hasher.finalize().into())
}
