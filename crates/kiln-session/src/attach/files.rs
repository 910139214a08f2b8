//! Directories the daemon may read.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use kiln_fs::Dir;
use kiln_proto::filesync::file_sync_server::{FileSync, FileSyncServer};
use kiln_proto::fsutil::Packet;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::error::SessionError;
use crate::filesync::{KEY_DIR, KEY_EXCLUDE, KEY_FOLLOW, KEY_INCLUDE};
use crate::fsutil::{DirSource, Filter, Role, send_tree};
use crate::metadata;

/// The largest message this half accepts; the daemon sends less.
pub(super) const MAX_RECEIVED: usize = 16 << 20;

pub(super) type Packets = Pin<Box<dyn Stream<Item = Result<Packet, Status>> + Send>>;

struct Files(BTreeMap<String, PathBuf>);

pub(super) fn service(dirs: BTreeMap<String, PathBuf>) -> FileSyncServer<impl FileSync> {
    FileSyncServer::new(Files(dirs)).max_decoding_message_size(MAX_RECEIVED)
}

#[tonic::async_trait]
impl FileSync for Files {
    type DiffCopyStream = Packets;
    type TarStreamStream = Packets;

    async fn diff_copy(&self, request: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        let name = metadata::value(request.metadata(), KEY_DIR).unwrap_or_default();
        let Some(path) = self.0.get(&name).cloned() else {
            return Err(Status::not_found(format!("no access allowed to dir {name:?}")));
        };
        let list = |key| metadata::values(request.metadata(), key).unwrap_or_default();
        let filter = Filter {
            include: list(KEY_INCLUDE),
            exclude: list(KEY_EXCLUDE),
            follow_paths: list(KEY_FOLLOW),
        };
        let opened = tokio::task::spawn_blocking(move || {
            // Whoever owns the files here: in a build context they belong to root.
            Dir::open_ambient(&path)
                .map_err(std::io::Error::from)
                .and_then(|root| DirSource::new(root, &filter, Some((0, 0))))
                .map_err(|error| SessionError::io(format!("read directory {}", path.display()), error))
        });
        let source = opened.await.map_err(|error| Status::internal(error.to_string()))?;
        let source = source.map_err(|error| error.to_status())?;
        let inbound = request
            .into_inner()
            .map_err(|status| SessionError::from_status("send directory", &status));
        let (sender, receiver) = mpsc::channel(64);
        let sending = async move { send_tree(source, inbound, sender, Role::Server).await.map(|_| ()) };
        Ok(Response::new(while_working(ReceiverStream::new(receiver), sending)))
    }

    async fn tar_stream(&self, _: Request<Streaming<Packet>>) -> Result<Response<Packets>, Status> {
        Err(Status::unimplemented("directories are sent as packets only"))
    }
}

/// The stream of what `work` says; it ends with its error. The work is dropped with the stream, when the daemon
/// cancels the call.
pub(super) fn while_working<S, F>(said: S, work: F) -> Packets
where
    S: Stream<Item = Packet> + Send + 'static,
    F: Future<Output = Result<(), SessionError>> + Send + 'static,
{
    let work = AbortOnDrop(tokio::spawn(work));
    let outcome = futures::stream::once(async move {
        let mut work = work;
        match (&mut work.0).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Err(error.to_status())),
            Err(error) => Some(Err(Status::internal(error.to_string()))),
        }
    });
    Box::pin(said.map(Ok).chain(outcome.filter_map(futures::future::ready)))
}

struct AbortOnDrop(tokio::task::JoinHandle<Result<(), SessionError>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
