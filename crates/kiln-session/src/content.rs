//! Blobs by digest in a store that the client serves: local caches, OCI layouts, and exports that are not packed as tar.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use kiln_proto::content::content_client::ContentClient;
use kiln_proto::content::{
    AbortRequest, InfoRequest, ReadContentRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming};

use crate::channel::{Channel, origin};
use crate::error::{Result, SessionError};
use crate::metadata;
use crate::session::{MAX_RECEIVED, MAX_SENT, Session};

const LIMIT: Duration = Duration::from_secs(60);

/// Metadata key that names the store a call is for.
pub(crate) const KEY_STORE: &str = "buildkit-attachable-store-id";

/// One of the client's content stores.
#[derive(Clone, Debug)]
pub struct ClientContent {
    session: Session,
    store: String,
}

/// What the client says about a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobInfo {
    /// `sha256:…`
    pub digest: String,
    /// Bytes.
    pub size: u64,
    /// Labels; often none.
    pub labels: BTreeMap<String, String>,
}

impl Session {
    /// The client's content store `store`: `local:<dir>`, `oci:<store id>` or `export`.
    pub fn content(&self, store: impl Into<String>) -> ClientContent {
        ClientContent {
            session: self.clone(),
            store: store.into(),
        }
    }
}

impl ClientContent {
    fn client(&self) -> ContentClient<Channel> {
        ContentClient::with_origin(self.session.channel(), origin()).max_decoding_message_size(MAX_RECEIVED)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        metadata::insert(
            request.metadata_mut(),
            "buildkit-attachable-store-id",
            [self.store.as_str()],
        );
        request
    }

    /// Size and labels of a blob; `None` when the store does not have it.
    pub async fn info(&self, digest: &str) -> Result<Option<BlobInfo>> {
        let mut client = self.client();
        let call = client.info(self.request(InfoRequest {
            digest: digest.to_owned(),
        }));
        match self.session.call_within(LIMIT, &format!("blob {digest}"), call).await {
            Ok(answer) => Ok(answer.into_inner().info.map(|info| BlobInfo {
                digest: info.digest,
                size: u64::try_from(info.size).unwrap_or(0),
                labels: info.labels,
            })),
            Err(SessionError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The bytes of a blob from `offset`; `size` 0 means to the end. Nothing is checked: the caller compares the digest.
    /// The stream may be dropped early.
    pub async fn read(
        &self,
        digest: &str,
        offset: u64,
        size: u64,
    ) -> Result<impl Stream<Item = Result<Bytes>> + Send + use<>> {
        let what = format!("read blob {digest}");
        let request = ReadContentRequest {
            digest: digest.to_owned(),
            offset: i64::try_from(offset).unwrap_or(i64::MAX),
            size: i64::try_from(size).unwrap_or(i64::MAX),
        };
        let mut client = self.client();
        let body = self
            .session
            .call(&what, client.read(self.request(request)))
            .await?
            .into_inner();
        let session = self.session.clone();
        Ok(body.map(move |message| match message {
            Ok(message) => Ok(message.data),
            Err(status) => Err(session.error(&what, &status)),
        }))
    }

    /// Begins to write a blob; `None` when the store already has it. `reference` names the upload.
    pub async fn write(&self, reference: &str, size: u64, digest: &str) -> Result<Option<BlobWriter>> {
        let what = format!("write blob {digest}");
        let total = i64::try_from(size).unwrap_or(i64::MAX);
        let (sender, receiver) = mpsc::channel(2);
        let first = WriteContentRequest {
            action: WriteAction::Stat as i32,
            r#ref: reference.to_owned(),
            total,
            expected: digest.to_owned(),
            ..WriteContentRequest::default()
        };
        // The first message waits in the channel while the call is made: some clients answer only after it.
        let _capacity_is_two = sender.try_send(first);
        let request = self.request(ReceiverStream::new(receiver));
        let mut client = self.client();
        let opened = self.session.call(&what, client.write(request)).await;
        let mut writer = match opened {
            Ok(answers) => BlobWriter {
                content: self.clone(),
                what,
                reference: reference.to_owned(),
                digest: digest.to_owned(),
                total,
                offset: 0,
                sender,
                answers: answers.into_inner(),
            },
            Err(error) if exists(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        match writer.answer().await {
            Ok(answer) if answer.offset == 0 => Ok(Some(writer)),
            // Somebody's unfinished upload of the same name: what it holds is unknown, so it is thrown away.
            Ok(_) => {
                writer.abort().await?;
                Err(SessionError::protocol(
                    &format!("write blob {digest}"),
                    "an earlier upload was left unfinished",
                ))
            }
            Err(error) if exists(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn exists(error: &SessionError) -> bool {
    error
        .remote_status()
        .is_some_and(|status| status.code == tonic::Code::AlreadyExists as i32)
}

/// A blob on its way into a client's store.
#[derive(Debug)]
pub struct BlobWriter {
    content: ClientContent,
    what: String,
    reference: String,
    digest: String,
    total: i64,
    offset: i64,
    sender: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

impl BlobWriter {
    async fn answer(&mut self) -> Result<WriteContentResponse> {
        let session = &self.content.session;
        match session.call(&self.what, self.answers.message()).await? {
            Some(answer) => Ok(answer),
            None => Err(SessionError::protocol(&self.what, "the client ended the upload")),
        }
    }

    async fn send(&mut self, message: WriteContentRequest) -> Result<WriteContentResponse> {
        // A closed channel means that the call has ended; its answer says why.
        let _ended = self.sender.send(message).await;
        self.answer().await
    }

    /// Appends bytes.
    pub async fn write(&mut self, mut data: Bytes) -> Result<()> {
        while !data.is_empty() {
            let part = data.split_to(data.len().min(MAX_SENT));
            let length = i64::try_from(part.len()).unwrap_or(i64::MAX);
            let message = WriteContentRequest {
                action: WriteAction::Write as i32,
                offset: self.offset,
                data: part,
                ..WriteContentRequest::default()
            };
            let answer = self.send(message).await?;
            self.offset += length;
            if answer.offset != self.offset {
                let message = format!("the client is at {} instead of {}", answer.offset, self.offset);
                return Err(SessionError::protocol(&self.what, message));
            }
        }
        Ok(())
    }

    /// Finishes the blob. That it exists already is success.
    pub async fn commit(mut self) -> Result<()> {
        let message = WriteContentRequest {
            action: WriteAction::Commit as i32,
            total: self.total,
            offset: self.offset,
            expected: self.digest.clone(),
            ..WriteContentRequest::default()
        };
        match self.send(message).await {
            Ok(answer) if answer.digest.is_empty() || answer.digest == self.digest => Ok(()),
            Ok(answer) => Err(SessionError::protocol(
                &self.what,
                format!("the client stored {}", answer.digest),
            )),
            Err(error) if exists(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Gives the upload up.
    pub async fn abort(self) -> Result<()> {
        let mut client = self.content.client();
        let call = client.abort(self.content.request(AbortRequest {
            r#ref: self.reference.clone(),
        }));
        self.content.session.call_within(LIMIT, &self.what, call).await?;
        Ok(())
    }
}
