//! The client's directories: build contexts, Dockerfiles, named local contexts.

use futures::TryStreamExt as _;
use kiln_fs::Dir;
use kiln_proto::filesync::file_sync_client::FileSyncClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response};

use crate::channel::origin;
use crate::error::Result;
use crate::fsutil::{ReceiveOptions, Received, receive};
use crate::metadata;
use crate::session::{MAX_RECEIVED, Session};

const METHOD: &str = "/moby.filesync.v1.FileSync/DiffCopy";

/// Metadata keys of the request.
pub(crate) const KEY_DIR: &str = "dir-name";
pub(crate) const KEY_INCLUDE: &str = "include-patterns";
pub(crate) const KEY_EXCLUDE: &str = "exclude-patterns";
pub(crate) const KEY_FOLLOW: &str = "followpaths";

/// Which of the client's directories is wanted, and what of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalDir {
    /// The directory's name in the build: `context`, `dockerfile`, or that of a named context.
    pub name: String,
    /// What to send, in the syntax of ignore files; `None` if the source does not say.
    pub include: Option<Vec<String>>,
    /// What not to send.
    pub exclude: Option<Vec<String>>,
    /// Paths that are sent together with what they link to.
    pub follow_paths: Option<Vec<String>>,
}

impl Session {
    /// Receives one of the client's directories into `target`. Dropping the future cancels the transfer; the directory
    /// is then half done, and `options.keep` tells when the last write to it is over.
    ///
    /// # Errors
    /// [`crate::SessionErrorKind::Unsupported`] when the client shares no directories, `NotFound` when not this one.
    pub async fn receive_dir(&self, dir: &LocalDir, target: Dir, options: ReceiveOptions) -> Result<Received> {
        self.require(METHOD, "no local sources enabled")?;
        let what = format!("transfer of {}", dir.name);
        let (replies, packets) = mpsc::unbounded_channel();
        let mut request = Request::new(UnboundedReceiverStream::new(packets));
        let map = request.metadata_mut();
        metadata::insert(map, KEY_DIR, [dir.name.as_str()]);
        let lists = [
            (KEY_INCLUDE, &dir.include),
            (KEY_EXCLUDE, &dir.exclude),
            (KEY_FOLLOW, &dir.follow_paths),
        ];
        for (key, values) in lists {
            if let Some(values) = values {
                metadata::insert(map, key, values.iter().map(String::as_str));
            }
        }
        let mut client = FileSyncClient::with_origin(self.channel(), origin()).max_decoding_message_size(MAX_RECEIVED);
        let inbound = futures::stream::once(async move { client.diff_copy(request).await.map(Response::into_inner) })
            .try_flatten()
            .map_err(|status| self.error(&what, &status));
        tokio::select! {
            biased;
            received = receive(Box::pin(inbound), replies, target, options) => received,
            () = self.closed() => Err(self.gone()),
        }
    }
}
