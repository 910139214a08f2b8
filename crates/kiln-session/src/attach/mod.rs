//! The client's half: what a build tool offers to the daemon over its session.
//!
//! [`Attachments`] says what there is; [`ClientSession`] is the session to announce, and serves it on the byte pipe.
//! Directories ([`files`]), results ([`exports`]), credentials ([`credentials`]), secrets, ssh agents and one-time streams
//! ([`small`]), and content stores that are OCI layouts ([`stores`]).

pub mod credentials;
mod exports;
mod files;
mod small;
mod stores;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use http::{HeaderMap, HeaderName, HeaderValue};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::service::Routes;

pub use credentials::{CredentialStore, DockerConfig};
pub use small::Secret;

use crate::session::{KEY_ID, KEY_METHOD, KEY_SHARED_KEY, SessionId};

/// Where the result of one exporter goes.
pub enum ExportTarget {
    /// A file; it appears under its name when it is complete.
    File(PathBuf),
    /// A stream such as standard output.
    Writer(Box<dyn io::Write + Send>),
    /// A directory.
    Directory {
        /// Created if missing.
        path: PathBuf,
        /// Whether what is not part of the result is deleted.
        delete: bool,
    },
}

impl std::fmt::Debug for ExportTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Writer(_) => f.write_str("Writer"),
            Self::Directory { path, delete } => f
                .debug_struct("Directory")
                .field("path", path)
                .field("delete", delete)
                .finish(),
        }
    }
}

/// A stream that can be read once.
pub type UploadSource = Pin<Box<dyn AsyncRead + Send>>;

/// What a client offers. Only what is given is announced.
#[derive(Default)]
pub struct Attachments {
    /// Makes this client's directories meet again in a later build.
    pub shared_key: String,
    /// Directories by their name in the build.
    pub dirs: BTreeMap<String, PathBuf>,
    /// Where results go, by the exporter's index in the request.
    pub exports: BTreeMap<usize, ExportTarget>,
    /// Registry credentials.
    pub credentials: Option<Arc<dyn CredentialStore>>,
    /// Secrets by id.
    pub secrets: BTreeMap<String, Secret>,
    /// Sockets of ssh agents by id (`default`).
    pub ssh: BTreeMap<String, PathBuf>,
    /// Streams by id.
    pub uploads: HashMap<String, UploadSource>,
    /// OCI layout directories by store id (`local:<dir>`, `oci:<id>`), created if missing.
    pub stores: BTreeMap<String, PathBuf>,
}

/// A session as the client sees it.
#[derive(Debug)]
pub struct ClientSession {
    id: SessionId,
    shared_key: String,
    methods: Vec<&'static str>,
    routes: Routes,
}

impl ClientSession {
    /// A session with a fresh `id` (any unique text; clients use 25 characters of lower-case base 36).
    pub fn new(id: impl Into<Arc<str>>, attachments: Attachments) -> Self {
        let (_reporter, health) = tonic_health::server::health_reporter();
        let mut routes = Routes::new(health);
        let mut methods = vec!["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"];
        if !attachments.dirs.is_empty() {
            routes = routes.add_service(files::service(attachments.dirs));
            methods.extend([
                "/moby.filesync.v1.FileSync/DiffCopy",
                "/moby.filesync.v1.FileSync/TarStream",
            ]);
        }
        if !attachments.exports.is_empty() {
            routes = routes.add_service(exports::FileSend::new(attachments.exports));
            methods.push("/moby.filesync.v1.FileSend/DiffCopy");
        }
        if let Some(store) = attachments.credentials {
            routes = routes.add_service(credentials::service(store));
            methods.extend([
                "/moby.filesync.v1.Auth/Credentials",
                "/moby.filesync.v1.Auth/FetchToken",
            ]);
            methods.extend([
                "/moby.filesync.v1.Auth/GetTokenAuthority",
                "/moby.filesync.v1.Auth/VerifyTokenAuthority",
            ]);
        }
        if !attachments.secrets.is_empty() {
            routes = routes.add_service(small::secrets(attachments.secrets));
            methods.push("/moby.buildkit.secrets.v1.Secrets/GetSecret");
        }
        if !attachments.ssh.is_empty() {
            routes = routes.add_service(small::ssh(attachments.ssh));
            methods.extend([
                "/moby.sshforward.v1.SSH/CheckAgent",
                "/moby.sshforward.v1.SSH/ForwardAgent",
            ]);
        }
        if !attachments.uploads.is_empty() {
            routes = routes.add_service(small::uploads(Mutex::new(attachments.uploads)));
            methods.push("/moby.upload.v1.Upload/Pull");
        }
        if !attachments.stores.is_empty() {
            routes = routes.add_service(stores::service(attachments.stores));
            methods.extend(stores::METHODS);
        }
        let shared_key = attachments.shared_key;
        ClientSession {
            id: SessionId::new(id),
            shared_key,
            methods,
            routes: routes.prepare(),
        }
    }

    /// The id to name in build requests.
    pub fn id(&self) -> &SessionId {
        &self.id
    }

    /// The request metadata of `Control.Session` that announces this session.
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let mut add = |key: &'static str, value: &str| {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.append(HeaderName::from_static(key), value);
            }
        };
        add(KEY_ID, self.id.as_str());
        add(KEY_SHARED_KEY, &self.shared_key);
        for method in &self.methods {
            add(KEY_METHOD, method);
        }
        headers
    }

    /// Serves the daemon's calls on the byte pipe until it ends.
    ///
    /// # Errors
    /// A broken connection. That the daemon ends it is none.
    pub async fn serve<T>(&self, pipe: T) -> io::Result<()>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        serve_http2(pipe, self.routes.clone()).await
    }
}

/// The HTTP/2 server on a byte pipe.
async fn serve_http2<T>(pipe: T, routes: Routes) -> io::Result<()>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(64 << 20)
        // The daemon drops calls whenever a build is cancelled; that must not count against the connection.
        .max_local_error_reset_streams(None)
        .max_pending_accept_reset_streams(10_000)
        .serve_connection(TokioIo::new(pipe), TowerToHyperService::new(routes))
        .await
        .map_err(io::Error::other)
}
