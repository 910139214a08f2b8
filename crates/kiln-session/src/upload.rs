//! A stream the client offers once, such as a tar of the build context on its standard input.

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use kiln_proto::upload::BytesMessage;
use kiln_proto::upload::upload_client::UploadClient;
use tonic::Request;

use crate::channel::origin;
use crate::error::Result;
use crate::metadata;
use crate::session::{MAX_RECEIVED, Session};

impl Session {
    /// Reads the stream behind `http://<host><path>` (host `buildkit-session`). It can be read once.
    pub async fn upload(&self, host: &str, path: &str) -> Result<impl Stream<Item = Result<Bytes>> + Send + use<>> {
        let what = format!("upload {path}");
        self.require("/moby.upload.v1.Upload/Pull", "the client offers no uploads")?;
        let mut client = UploadClient::with_origin(self.channel(), origin()).max_decoding_message_size(MAX_RECEIVED);
        let mut request = Request::new(futures::stream::empty::<BytesMessage>());
        metadata::insert(request.metadata_mut(), "urlhost", [host]);
        metadata::insert(request.metadata_mut(), "urlpath", [path]);
        let body = self.call(&what, client.pull(request)).await?.into_inner();
        let session = self.clone();
        Ok(body.map(move |message| match message {
            Ok(message) => Ok(message.data),
            Err(status) => Err(session.error(&what, &status)),
        }))
    }
}
