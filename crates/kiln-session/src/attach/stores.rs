//! Content stores that are OCI layout directories: blobs under `blobs/sha256/`, uploads under `ingest/`.

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;

use async_stream::try_stream;
use bytes::Bytes;
use futures::Stream;
use kiln_proto::content::content_server::{Content, ContentServer};
use kiln_proto::content::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ListContentRequest, ListContentResponse,
    ListStatusesRequest, ListStatusesResponse, ReadContentRequest, ReadContentResponse, StatusRequest, StatusResponse,
    UpdateRequest, UpdateResponse, WriteAction, WriteContentRequest, WriteContentResponse,
};
use sha2::{Digest as _, Sha256};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::files::MAX_RECEIVED;
use crate::content::KEY_STORE;
use crate::metadata;

pub(super) const METHODS: [&str; 9] = [
    "/containerd.services.content.v1.Content/Info",
    "/containerd.services.content.v1.Content/Update",
    "/containerd.services.content.v1.Content/List",
    "/containerd.services.content.v1.Content/Delete",
    "/containerd.services.content.v1.Content/Read",
    "/containerd.services.content.v1.Content/Status",
    "/containerd.services.content.v1.Content/ListStatuses",
    "/containerd.services.content.v1.Content/Write",
    "/containerd.services.content.v1.Content/Abort",
];

struct Stores(BTreeMap<String, PathBuf>);

pub(super) fn service(stores: BTreeMap<String, PathBuf>) -> ContentServer<impl Content> {
    ContentServer::new(Stores(stores)).max_decoding_message_size(MAX_RECEIVED)
}

fn failed(error: std::io::Error) -> Status {
    match error.kind() {
        std::io::ErrorKind::NotFound => Status::not_found(error.to_string()),
        _ => Status::unknown(error.to_string()),
    }
}

/// The hexadecimal part of a digest, which becomes a file name.
fn hex_of(digest: &str) -> Result<&str, Status> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    if hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        Ok(hex)
    } else {
        Err(Status::invalid_argument(format!("{digest:?} is not a sha256 digest")))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Status> + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Status::internal(error.to_string()))?
}

impl Stores {
    fn root(&self, map: &MetadataMap) -> Result<PathBuf, Status> {
        let id = metadata::value(map, KEY_STORE).unwrap_or_default();
        self.0
            .get(&id)
            .cloned()
            .ok_or_else(|| Status::not_found(format!("unknown store {id:?}")))
    }

    fn blob(&self, map: &MetadataMap, digest: &str) -> Result<PathBuf, Status> {
        Ok(self.root(map)?.join("blobs/sha256").join(hex_of(digest)?))
    }
}

/// An upload: its bytes so far and their digest.
struct Ingest {
    root: PathBuf,
    path: PathBuf,
    file: std::fs::File,
    hasher: Sha256,
    offset: u64,
}

impl Ingest {
    fn begin(root: &Path, reference: &str) -> std::io::Result<Self> {
        let dir = root.join("ingest");
        std::fs::create_dir_all(&dir)?;
        let path = dir.join(hex(&Sha256::digest(reference)));
        // Begun anew each time: what an earlier upload left behind is not trusted.
        let file = std::fs::File::create(&path)?;
        Ok(Ingest {
            root: root.to_owned(),
            path,
            file,
            hasher: Sha256::new(),
            offset: 0,
        })
    }

    fn write(&mut self, data: &[u8]) -> std::io::Result<()> {
        self.hasher.update(data);
        self.offset += data.len() as u64;
        self.file.write_all(data)
    }

    fn commit(&mut self, total: i64, expected: &str) -> Result<String, Status> {
        let digest = format!("sha256:{}", hex(&self.hasher.clone().finalize()));
        if total > 0 && u64::try_from(total) != Ok(self.offset) {
            return Err(Status::failed_precondition(format!(
                "{} bytes instead of {total}",
                self.offset
            )));
        }
        if !expected.is_empty() && expected != digest {
            return Err(Status::failed_precondition(format!(
                "content is {digest} instead of {expected}"
            )));
        }
        let blobs = self.root.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).map_err(failed)?;
        let layout = self.root.join("oci-layout");
        if !layout.exists() {
            std::fs::write(&layout, r#"{"imageLayoutVersion":"1.0.0"}"#).map_err(failed)?;
        }
        std::fs::rename(&self.path, blobs.join(hex_of(&digest)?)).map_err(failed)?;
        Ok(digest)
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        let _committed = std::fs::remove_file(&self.path);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Content for Stores {
    type ListStream = Answers<ListContentResponse>;
    type ReadStream = Answers<ReadContentResponse>;
    type WriteStream = Answers<WriteContentResponse>;

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let path = self.blob(request.metadata(), &request.get_ref().digest)?;
        let size = blocking(move || path.metadata().map(|metadata| metadata.len()).map_err(failed)).await?;
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        let info = Info {
            digest: request.into_inner().digest,
            size,
            ..Info::default()
        };
        Ok(Response::new(InfoResponse { info: Some(info) }))
    }

    async fn read(&self, request: Request<ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let path = self.blob(request.metadata(), &request.get_ref().digest)?;
        let request = request.into_inner();
        let mut offset = u64::try_from(request.offset).unwrap_or(0);
        let mut left = match u64::try_from(request.size) {
            Ok(0) | Err(_) => u64::MAX,
            Ok(size) => size,
        };
        let mut file = blocking(move || {
            let mut file = std::fs::File::open(path).map_err(failed)?;
            file.seek(SeekFrom::Start(offset)).map_err(failed)?;
            Ok(file)
        })
        .await?;
        Ok(Response::new(Box::pin(try_stream! {
            while left > 0 {
                let (data, opened) = blocking(move || {
                    let mut data = Vec::new();
                    (&mut file).take(left.min(1 << 20)).read_to_end(&mut data).map_err(failed)?;
                    Ok((data, file))
                }).await?;
                file = opened;
                if data.is_empty() {
                    break;
                }
                let length = data.len() as u64;
                yield ReadContentResponse { offset: i64::try_from(offset).unwrap_or(i64::MAX), data: Bytes::from(data) };
                offset += length;
                left -= length;
            }
        })))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let root = self.root(request.metadata())?;
        let mut messages = request.into_inner();
        Ok(Response::new(Box::pin(try_stream! {
            let mut ingest: Option<Ingest> = None;
            while let Some(message) = messages.message().await? {
                let action = WriteAction::try_from(message.action).map_err(|_| Status::invalid_argument("unknown action"))?;
                let mut open = ingest.take();
                let root = root.clone();
                let (now, offset, digest) = blocking(move || {
                    if open.is_none() {
                        if !message.expected.is_empty() && root.join("blobs/sha256").join(hex_of(&message.expected)?).exists() {
                            return Err(Status::already_exists(format!("content {} already exists", message.expected)));
                        }
                        open = Some(Ingest::begin(&root, &message.r#ref).map_err(failed)?);
                    }
                    let Some(mut open) = open else { return Err(Status::internal("no upload")) };
                    if action != WriteAction::Stat && u64::try_from(message.offset) != Ok(open.offset) && !message.data.is_empty() {
                        return Err(Status::out_of_range(format!("offset {} instead of {}", message.offset, open.offset)));
                    }
                    open.write(&message.data).map_err(failed)?;
                    let digest = match action {
                        WriteAction::Commit => open.commit(message.total, &message.expected)?,
                        _ => String::new(),
                    };
                    let offset = i64::try_from(open.offset).unwrap_or(i64::MAX);
                    Ok((open, offset, digest))
                }).await?;
                ingest = Some(now);
                let done = action == WriteAction::Commit;
                yield WriteContentResponse { action: action as i32, offset, digest, ..WriteContentResponse::default() };
                if done {
                    break;
                }
            }
        })))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Err(Status::not_found("no such upload"))
    }

    async fn list_statuses(&self, _: Request<ListStatusesRequest>) -> Result<Response<ListStatusesResponse>, Status> {
        Ok(Response::new(ListStatusesResponse { statuses: Vec::new() }))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<()>, Status> {
        // An upload ends with its stream.
        Ok(Response::new(()))
    }

    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        Err(Status::unimplemented("this store keeps no labels"))
    }

    async fn list(&self, _: Request<ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        Err(Status::unimplemented("this store is not listed"))
    }

    async fn delete(&self, _: Request<DeleteContentRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("this store is not deleted from"))
    }
}
