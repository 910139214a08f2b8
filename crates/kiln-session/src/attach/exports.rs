//! Results from the daemon: files and directories.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::TryStreamExt as _;
use kiln_fs::Dir;
use kiln_proto::filesend_packets::file_send_server as packets;
use kiln_proto::filesync::BytesMessage;
use kiln_proto::filesync::file_send_server as bytes_mode;
use kiln_proto::fsutil::Packet;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;
use tonic::{Request, Response, Status, Streaming};

use super::ExportTarget;
use super::files::{MAX_RECEIVED, Packets, while_working};
use crate::error::SessionError;
use crate::fsutil::{Existing, ReceiveOptions, receive};
use crate::metadata;
use crate::send::{KEY_EXPORTER, KEY_MULTI_PLATFORM};

/// A file or stream that is waiting for its content.
enum FileTarget {
    File(PathBuf),
    Writer(Box<dyn io::Write + Send>),
}

#[derive(Clone, Debug)]
struct DirTarget {
    path: PathBuf,
    delete: bool,
}

/// The service `FileSend`, whose one method speaks two languages: which one is settled by the exporter the call is for.
#[derive(Clone)]
pub(super) struct FileSend {
    dirs: Arc<HashMap<usize, DirTarget>>,
    files: bytes_mode::FileSendServer<Files>,
    packets: packets::FileSendServer<Dirs>,
}

impl FileSend {
    pub(super) fn new(targets: BTreeMap<usize, ExportTarget>) -> Self {
        let mut dirs = HashMap::new();
        let mut files = HashMap::new();
        for (exporter, target) in targets {
            match target {
                ExportTarget::Directory { path, delete } => drop(dirs.insert(exporter, DirTarget { path, delete })),
                ExportTarget::File(path) => drop(files.insert(exporter, FileTarget::File(path))),
                ExportTarget::Writer(writer) => drop(files.insert(exporter, FileTarget::Writer(writer))),
            }
        }
        let dirs = Arc::new(dirs);
        FileSend {
            files: bytes_mode::FileSendServer::new(Files(Mutex::new(files))).max_decoding_message_size(MAX_RECEIVED),
            packets: packets::FileSendServer::new(Dirs(Arc::clone(&dirs))).max_decoding_message_size(MAX_RECEIVED),
            dirs,
        }
    }
}

impl NamedService for FileSend {
    const NAME: &'static str = "moby.filesync.v1.FileSend";
}

impl tower::Service<http::Request<Body>> for FileSend {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let map = MetadataMap::from_headers(request.headers().clone());
        if self.dirs.contains_key(&exporter(&map)) {
            tower::Service::call(&mut self.packets, request)
        } else {
            tower::Service::call(&mut self.files, request)
        }
    }
}

/// The exporter a call is for; absent or unreadable means the first.
fn exporter(map: &MetadataMap) -> usize {
    metadata::value(map, KEY_EXPORTER)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

struct Files(Mutex<HashMap<usize, FileTarget>>);

type NoMessages = futures::stream::Empty<Result<BytesMessage, Status>>;

#[tonic::async_trait]
impl bytes_mode::FileSend for Files {
    type DiffCopyStream = NoMessages;

    async fn diff_copy(&self, request: Request<Streaming<BytesMessage>>) -> Result<Response<NoMessages>, Status> {
        let exporter = exporter(request.metadata());
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&exporter);
        let Some(target) = target else {
            return Err(Status::not_found(format!("exporter {exporter} not found")));
        };
        let mut messages = request.into_inner();
        let (sender, receiver) = mpsc::channel(8);
        let mut writing = tokio::task::spawn_blocking(move || write(target, receiver));
        let mut sender = Some(sender);
        // The writer must know a complete file from one that was cut off.
        while let Some(open) = &sender {
            let chunk = messages.message().await?.map(|message| message.data);
            let last = chunk.is_none();
            if open.send(chunk).await.is_err() || last {
                sender = None;
            }
        }
        match (&mut writing).await {
            Ok(Ok(())) => Ok(Response::new(futures::stream::empty())),
            Ok(Err(error)) => Err(Status::unknown(error.to_string())),
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }
}

/// Writes what arrives until `None` says that it was all. What is cut off leaves no file behind.
fn write(target: FileTarget, mut chunks: mpsc::Receiver<Option<Bytes>>) -> io::Result<()> {
    let copy = |writer: &mut dyn io::Write, chunks: &mut mpsc::Receiver<Option<Bytes>>| loop {
        match chunks.blocking_recv() {
            Some(Some(chunk)) => writer.write_all(&chunk)?,
            Some(None) => return writer.flush(),
            None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the result was cut off")),
        }
    };
    match target {
        FileTarget::Writer(mut writer) => copy(&mut writer, &mut chunks),
        FileTarget::File(path) => {
            let named = |error: io::Error| io::Error::new(error.kind(), format!("write {}: {error}", path.display()));
            let partial = partial_name(&path);
            let mut file = std::fs::File::create(&partial).map_err(named)?;
            let written = copy(&mut file, &mut chunks).and_then(|()| std::fs::rename(&partial, &path));
            if written.is_err() {
                let _gone = std::fs::remove_file(&partial);
            }
            written.map_err(named)
        }
    }
}

fn partial_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    path.with_file_name(name)
}

struct Dirs(Arc<HashMap<usize, DirTarget>>);

#[tonic::async_trait]
impl packets::FileSend for Dirs {
    type DiffCopyStream = Packets;

    async fn diff_copy(&self, request: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        let exporter = exporter(request.metadata());
        let Some(DirTarget { path, delete }) = self.0.get(&exporter).cloned() else {
            return Err(Status::not_found(format!("exporter {exporter} not found")));
        };
        if delete && metadata::value(request.metadata(), KEY_MULTI_PLATFORM).as_deref() != Some("1") {
            return Err(Status::failed_precondition(
                "deleting what is not in the result needs a daemon that sends all platforms at once",
            ));
        }
        let opened = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&path)?;
            Dir::open_ambient(&path).map_err(io::Error::from)
        });
        let root = opened.await.map_err(|error| Status::internal(error.to_string()))?;
        let root = root.map_err(|error| Status::unknown(error.to_string()))?;
        let inbound = request
            .into_inner()
            .map_err(|status| SessionError::from_status("receive result", &status));
        let (sender, receiver) = mpsc::unbounded_channel();
        // The files become the user's own.
        let options = ReceiveOptions {
            existing: Existing::Disk { delete },
            owners: false,
            ..ReceiveOptions::default()
        };
        let receiving = async move { receive(inbound, sender, root, options).await.map(|_| ()) };
        Ok(Response::new(while_working(
            UnboundedReceiverStream::new(receiver),
            receiving,
        )))
    }
}
