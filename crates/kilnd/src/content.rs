//! The read-only content service: blobs of results and of build records, by digest.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use futures::Stream;
use kiln_oci::Digest;
use kiln_proto::content as pb;
use kiln_proto::content::content_server::Content;
use kiln_store::{BlobReader, StoreError, Tenant};
use tonic::{Request, Response, Status, Streaming};

use crate::Daemon;
use crate::progress::timestamp;

/// Serves `containerd.services.content.v1.Content`.
#[derive(Clone)]
pub struct Blobs(pub Arc<Daemon>);

/// Bytes of one message; far below what clients accept.
const CHUNK: usize = 1 << 20;

impl Blobs {
    fn open(&self, digest: &str) -> Result<BlobReader, Status> {
        let digest: Digest = digest.parse().map_err(|e| Status::invalid_argument(format!("{e}")))?;
        self.0
            .store()
            .content(&Tenant::default())
            .open(&digest)
            .map_err(|e| match e {
                StoreError::NotFound { .. } => Status::not_found(format!("content {digest}: not found")),
                other => Status::internal(other.to_string()),
            })
    }
}

fn read_only() -> Status {
    Status::unimplemented("content can only be read")
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Content for Blobs {
    async fn info(&self, request: Request<pb::InfoRequest>) -> Result<Response<pb::InfoResponse>, Status> {
        let digest = request.into_inner().digest;
        let blob = self.open(&digest)?;
        // Clients look at nothing but the size; blobs never change, so one time is as good as another.
        let time = Some(timestamp(SystemTime::UNIX_EPOCH));
        let size = i64::try_from(blob.size()).unwrap_or(i64::MAX);
        let info = pb::Info {
            digest,
            size,
            created_at: time,
            updated_at: time,
            ..Default::default()
        };
        Ok(Response::new(pb::InfoResponse { info: Some(info) }))
    }

    type ReadStream = BoxStream<pb::ReadContentResponse>;

    async fn read(&self, request: Request<pb::ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let file = self.open(&request.digest)?;
        let len = file.size();
        let start = u64::try_from(request.offset).map_err(|_| Status::out_of_range("negative offset"))?;
        let size = u64::try_from(request.size).map_err(|_| Status::out_of_range("negative size"))?;
        if start > len {
            return Err(Status::out_of_range(format!(
                "offset {start} is behind the end at {len}"
            )));
        }
        let end = if size == 0 {
            len
        } else {
            len.min(start.saturating_add(size))
        };
        let file = Arc::new(file);
        Ok(Response::new(Box::pin(async_stream::try_stream! {
            let mut at = start;
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                let source = Arc::clone(&file);
                let data = tokio::task::spawn_blocking(move || -> io::Result<Vec<u8>> {
                    let mut buffer = vec![0; want];
                    let read = source.read_at(&mut buffer, at)?;
                    if read == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    buffer.truncate(read);
                    Ok(buffer)
                })
                .await
                .map_err(|e| Status::internal(e.to_string()))?
                .map_err(|e| Status::internal(format!("failed to read content: {e}")))?;
                let offset = i64::try_from(at).unwrap_or(i64::MAX);
                at += data.len() as u64;
                yield pb::ReadContentResponse { offset, data: Bytes::from(data) };
            }
        })))
    }

    async fn update(&self, _: Request<pb::UpdateRequest>) -> Result<Response<pb::UpdateResponse>, Status> {
        Err(read_only())
    }

    type ListStream = BoxStream<pb::ListContentResponse>;

    async fn list(&self, _: Request<pb::ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        Err(Status::unimplemented("content is not listed: ask for digests"))
    }

    async fn delete(&self, _: Request<pb::DeleteContentRequest>) -> Result<Response<()>, Status> {
        Err(read_only())
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, Status> {
        Err(read_only())
    }

    async fn list_statuses(
        &self,
        _: Request<pb::ListStatusesRequest>,
    ) -> Result<Response<pb::ListStatusesResponse>, Status> {
        Err(read_only())
    }

    type WriteStream = BoxStream<pb::WriteContentResponse>;

    async fn write(
        &self,
        _: Request<Streaming<pb::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        Err(read_only())
    }

    async fn abort(&self, _: Request<pb::AbortRequest>) -> Result<Response<()>, Status> {
        Err(read_only())
    }
}
