//! Secrets, ssh agents and one-time streams.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};

use async_stream::try_stream;
use bytes::{Bytes, BytesMut};
use futures::Stream;
use kiln_proto::secrets::secrets_server::{Secrets, SecretsServer};
use kiln_proto::secrets::{GetSecretRequest, GetSecretResponse};
use kiln_proto::ssh::ssh_server::{Ssh, SshServer};
use kiln_proto::ssh::{BytesMessage, CheckAgentRequest, CheckAgentResponse};
use kiln_proto::upload;
use kiln_proto::upload::upload_server::{Upload, UploadServer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tonic::{Request, Response, Status, Streaming};

use super::UploadSource;
use super::files::MAX_RECEIVED;
use crate::metadata;
use crate::ssh::DEFAULT_AGENT;

/// The most a secret may hold.
const MAX_SECRET: u64 = 500 << 10;

/// Where a secret comes from; it is read when it is asked for.
#[derive(Clone)]
pub enum Secret {
    /// The content of a file.
    File(PathBuf),
    /// The value itself, for instance of an environment variable.
    Value(Bytes),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Value(_) => f.write_str("Value"),
        }
    }
}

struct SecretStore(BTreeMap<String, Secret>);

pub(super) fn secrets(secrets: BTreeMap<String, Secret>) -> SecretsServer<impl Secrets> {
    SecretsServer::new(SecretStore(secrets))
}

#[tonic::async_trait]
impl Secrets for SecretStore {
    async fn get_secret(&self, request: Request<GetSecretRequest>) -> Result<Response<GetSecretResponse>, Status> {
        let id = request.into_inner().id;
        let data = match self.0.get(&id) {
            None => return Err(Status::not_found(format!("secret {id} not found"))),
            Some(Secret::Value(value)) => value.clone(),
            Some(Secret::File(path)) => match read_secret(path).await {
                Ok(data) => data,
                Err(error) => return Err(Status::unknown(format!("secret {id}: {}: {error}", path.display()))),
            },
        };
        if data.len() as u64 > MAX_SECRET {
            return Err(Status::invalid_argument(format!(
                "secret {id} is larger than {MAX_SECRET} bytes"
            )));
        }
        Ok(Response::new(GetSecretResponse { data }))
    }
}

async fn read_secret(path: &PathBuf) -> io::Result<Bytes> {
    let mut data = Vec::new();
    tokio::fs::File::open(path)
        .await?
        .take(MAX_SECRET + 1)
        .read_to_end(&mut data)
        .await?;
    Ok(data.into())
}

struct Agents(BTreeMap<String, PathBuf>);

pub(super) fn ssh(agents: BTreeMap<String, PathBuf>) -> SshServer<impl Ssh> {
    SshServer::new(Agents(agents)).max_decoding_message_size(MAX_RECEIVED)
}

impl Agents {
    fn find(&self, id: &str) -> Result<&PathBuf, Status> {
        let id = if id.is_empty() { DEFAULT_AGENT } else { id };
        self.0
            .get(id)
            .ok_or_else(|| Status::not_found(format!("unset ssh forward key {id}")))
    }
}

/// What an agent's connection waits for.
enum Event {
    Message(Result<Option<BytesMessage>, Status>),
    Read(io::Result<usize>),
}

type AgentBytes = Pin<Box<dyn Stream<Item = Result<BytesMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Ssh for Agents {
    type ForwardAgentStream = AgentBytes;

    async fn check_agent(&self, request: Request<CheckAgentRequest>) -> Result<Response<CheckAgentResponse>, Status> {
        self.find(&request.get_ref().id)?;
        Ok(Response::new(CheckAgentResponse {}))
    }

    async fn forward_agent(&self, request: Request<Streaming<BytesMessage>>) -> Result<Response<AgentBytes>, Status> {
        let id = metadata::value(request.metadata(), "buildkit.ssh.id").unwrap_or_default();
        let path = self.find(&id)?;
        let failed = |error: io::Error| Status::unavailable(format!("ssh agent: {error}"));
        let (mut reader, mut writer) = UnixStream::connect(path).await.map_err(failed)?.into_split();
        let mut messages = request.into_inner();
        Ok(Response::new(Box::pin(try_stream! {
            let mut buffer = BytesMut::new();
            let mut writing = true;
            loop {
                buffer.reserve(32 << 10);
                let event = tokio::select! {
                    message = messages.message(), if writing => Event::Message(message),
                    read = reader.read_buf(&mut buffer) => Event::Read(read),
                };
                match event {
                    Event::Message(message) => match message? {
                        Some(message) => writer.write_all(&message.data).await.map_err(failed)?,
                        None => {
                            writing = false;
                            let _gone = writer.shutdown().await;
                        }
                    },
                    Event::Read(read) => {
                        if read.map_err(failed)? == 0 {
                            break;
                        }
                        yield BytesMessage { data: buffer.split().freeze() };
                    }
                }
            }
        })))
    }
}

struct Uploads(Mutex<HashMap<String, UploadSource>>);

pub(super) fn uploads(sources: Mutex<HashMap<String, UploadSource>>) -> UploadServer<impl Upload> {
    UploadServer::new(Uploads(sources))
}

type UploadBytes = Pin<Box<dyn Stream<Item = Result<upload::BytesMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Upload for Uploads {
    type PullStream = UploadBytes;

    async fn pull(&self, request: Request<Streaming<upload::BytesMessage>>) -> Result<Response<UploadBytes>, Status> {
        let path = metadata::value(request.metadata(), "urlpath").unwrap_or_default();
        let id = path.rsplit('/').next().unwrap_or_default();
        let source = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        let Some(mut source) = source else {
            return Err(Status::not_found(format!("no upload {id}")));
        };
        Ok(Response::new(Box::pin(try_stream! {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(64 << 10);
                let read = source.read_buf(&mut buffer).await;
                if read.map_err(|error| Status::unknown(format!("read upload: {error}")))? == 0 {
                    break;
                }
                yield upload::BytesMessage { data: buffer.split().freeze() };
            }
        })))
    }
}
