//! Results on their way to the client: one file as a byte stream, or a directory as packets.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use futures::TryStreamExt as _;
use kiln_proto::filesend_packets::file_send_client::FileSendClient as FileSendPackets;
use kiln_proto::filesync::BytesMessage;
use kiln_proto::filesync::file_send_client::FileSendClient;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response};

use crate::channel::origin;
use crate::error::{Result, SessionError};
use crate::fsutil::{Role, SendStats, TreeSource, send_tree};
use crate::metadata;
use crate::session::{MAX_RECEIVED, MAX_SENT, Session};

const METHOD: &str = "/moby.filesync.v1.FileSend/DiffCopy";
pub(crate) const KEY_EXPORTER: &str = "buildkit-attachable-exporter-id";
pub(crate) const KEY_MULTI_PLATFORM: &str = "buildkit-exporter-multi-platform";

/// How a file transfer to the client ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSent {
    /// The client took all bytes.
    Written,
    /// The client said that it has the result already.
    AlreadyThere,
}

/// A file on its way to the client. [`FileWriter::finish`] must be called: a writer that is dropped cancels the call.
///
/// From blocking code it is an [`io::Write`]; from async code use [`FileWriter::send`].
#[derive(Debug)]
pub struct FileWriter {
    sender: Option<mpsc::Sender<BytesMessage>>,
    call: JoinHandle<Result<FileSent>>,
    ended: Option<FileSent>,
    pending: Vec<u8>,
}

/// Small writes are gathered into messages of this size.
const GATHER: usize = 256 << 10;

impl Drop for FileWriter {
    fn drop(&mut self) {
        self.call.abort();
    }
}

impl FileWriter {
    /// Sends bytes; waits while the client is behind. Once the client said that it has the result, bytes are dropped.
    pub async fn send(&mut self, mut data: Bytes) -> Result<()> {
        while !data.is_empty() {
            let Some(sender) = &self.sender else { return Ok(()) };
            let part = data.split_to(data.len().min(MAX_SENT));
            if sender.send(BytesMessage { data: part }).await.is_err() {
                self.outcome().await?;
            }
        }
        Ok(())
    }

    /// Ends the stream and waits for the client to say that it has everything.
    pub async fn finish(mut self) -> Result<FileSent> {
        let pending = std::mem::take(&mut self.pending);
        self.send(pending.into()).await?;
        self.outcome().await
    }

    /// What the call came to; half-closes it first.
    async fn outcome(&mut self) -> Result<FileSent> {
        self.sender = None;
        if let Some(ended) = self.ended {
            return Ok(ended);
        }
        let joined = (&mut self.call).await;
        let ended = joined.unwrap_or_else(|_| Err(SessionError::Canceled("send file to client".to_owned())))?;
        self.ended = Some(ended);
        Ok(ended)
    }

    fn flush_pending(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let data = Bytes::from(std::mem::replace(&mut self.pending, Vec::with_capacity(GATHER)));
        let Some(sender) = &self.sender else { return Ok(()) };
        if sender.blocking_send(BytesMessage { data }).is_err() {
            let handle = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
            handle.block_on(self.outcome()).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// For blocking threads of the runtime (`spawn_blocking`).
impl io::Write for FileWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let take = buf.len().min(GATHER - self.pending.len().min(GATHER));
        self.pending.extend_from_slice(buf.get(..take).unwrap_or(buf));
        if self.pending.len() >= GATHER {
            self.flush_pending()?;
        }
        Ok(take)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flush_pending()
    }
}

fn exporter_metadata(map: &mut MetadataMap, exporter: usize, response: &BTreeMap<String, String>) {
    metadata::insert(map, KEY_EXPORTER, [exporter.to_string().as_str()]);
    for (key, value) in response {
        let key = format!("exporter-md-{}", key.to_lowercase());
        metadata::insert(map, &key, [value.as_str()]);
    }
}

impl Session {
    /// Begins to send a file (tar, OCI or Docker archive) to the client's exporter number `exporter`, its index in the
    /// request. `response` is what the exporters have answered so far.
    pub fn send_file(&self, exporter: usize, response: &BTreeMap<String, String>) -> Result<FileWriter> {
        self.require(METHOD, "the client accepts no files")?;
        let (sender, receiver) = mpsc::channel(4);
        let mut request = Request::new(ReceiverStream::new(receiver));
        exporter_metadata(request.metadata_mut(), exporter, response);
        let session = self.clone();
        let call = tokio::spawn(async move {
            let mut client =
                FileSendClient::with_origin(session.channel(), origin()).max_decoding_message_size(MAX_RECEIVED);
            let sent = session
                .call("send file to client", async {
                    let mut answers = client.diff_copy(request).await?.into_inner();
                    // The client says nothing; its end of the stream says that it has everything.
                    while answers.message().await?.is_some() {}
                    Ok(())
                })
                .await;
            match sent {
                Ok(()) => Ok(FileSent::Written),
                Err(error) => match error.remote_status() {
                    Some(status) if status.code == tonic::Code::AlreadyExists as i32 => Ok(FileSent::AlreadyThere),
                    _ => Err(error),
                },
            }
        });
        Ok(FileWriter {
            sender: Some(sender),
            call,
            ended: None,
            pending: Vec::new(),
        })
    }

    /// Sends a directory to the client's exporter number `exporter`. `multi_platform` says that this one transfer
    /// carries all platforms, without which a client refuses to delete what is not in it.
    pub async fn send_directory(
        &self,
        exporter: usize,
        source: impl TreeSource,
        multi_platform: bool,
        response: &BTreeMap<String, String>,
    ) -> Result<SendStats> {
        self.require(METHOD, "the client accepts no files")?;
        let (sender, receiver) = mpsc::channel(64);
        let mut request = Request::new(ReceiverStream::new(receiver));
        exporter_metadata(request.metadata_mut(), exporter, response);
        if multi_platform {
            metadata::insert(request.metadata_mut(), KEY_MULTI_PLATFORM, ["1"]);
        }
        let what = "send directory to client";
        let mut client = FileSendPackets::with_origin(self.channel(), origin()).max_decoding_message_size(MAX_RECEIVED);
        // The client's headers may come with its first request only, and that comes after our first entries.
        let inbound = futures::stream::once(async move { client.diff_copy(request).await.map(Response::into_inner) })
            .try_flatten()
            .map_err(|status| self.error(what, &status));
        tokio::select! {
            sent = send_tree(source, Box::pin(inbound), sender, Role::Caller) => sent,
            () = self.closed() => Err(self.gone()),
        }
    }
}
