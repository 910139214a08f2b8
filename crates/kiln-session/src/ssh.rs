//! The client's ssh agents, as unix sockets on the daemon's side.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures::StreamExt as _;
use kiln_proto::ssh::ssh_client::SshClient;
use kiln_proto::ssh::{BytesMessage, CheckAgentRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

use crate::channel::{Channel, origin};
use crate::error::{Result, SessionError};
use crate::metadata;
use crate::session::{MAX_RECEIVED, Session};

const CHECK: &str = "/moby.sshforward.v1.SSH/CheckAgent";
const LIMIT: Duration = Duration::from_secs(60);

/// The agent's name when none is given.
pub const DEFAULT_AGENT: &str = "default";

/// A unix socket whose connections are forwarded to the client's agent. Dropping it closes the connections and removes
/// the socket.
#[derive(Debug)]
pub struct AgentSocket {
    path: PathBuf,
    accepting: JoinHandle<()>,
}

impl AgentSocket {
    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        self.accepting.abort();
        let _may_be_gone = std::fs::remove_file(&self.path);
    }
}

impl Session {
    fn ssh(&self) -> SshClient<Channel> {
        SshClient::with_origin(self.channel(), origin()).max_decoding_message_size(MAX_RECEIVED)
    }

    /// Fails unless the client offers the agent `id` (empty: the default one).
    pub async fn check_agent(&self, id: &str) -> Result<()> {
        self.require(CHECK, "no SSH key forwarded from the client")?;
        let mut client = self.ssh();
        let call = client.check_agent(CheckAgentRequest {
            id: agent(id).to_owned(),
        });
        self.call_within(LIMIT, &format!("ssh agent {}", agent(id)), call)
            .await?;
        Ok(())
    }

    /// Listens on a new unix socket at `path`, in a directory of the daemon's own, and forwards every connection to the
    /// client's agent `id`. Who may connect is up to the caller, by the socket's owner and mode.
    pub fn forward_agent(&self, id: &str, path: impl Into<PathBuf>) -> Result<AgentSocket> {
        let path = path.into();
        let listener = UnixListener::bind(&path)
            .map_err(|error| SessionError::io(format!("listen on {}", path.display()), error))?;
        let session = self.clone();
        let id = agent(id).to_owned();
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok((socket, _)) => {
                            let (session, id) = (session.clone(), id.clone());
                            connections.spawn(async move {
                                if let Err(error) = session.forward_connection(&id, socket).await {
                                    tracing::debug!(%error, agent = id, "ssh agent connection ended");
                                }
                            });
                        }
                        // Out of descriptors, or a connection that was gone before it was accepted.
                        Err(error) => {
                            tracing::debug!(%error, agent = id, "ssh agent socket");
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    },
                    Some(_) = connections.join_next() => {}
                    () = session.closed() => return,
                }
            }
        });
        Ok(AgentSocket { path, accepting })
    }

    /// Copies one connection to the client's agent and back.
    async fn forward_connection(&self, id: &str, socket: UnixStream) -> Result<()> {
        let what = format!("ssh agent {id}");
        let (mut reader, mut writer) = socket.into_split();
        let (sender, receiver) = mpsc::channel(4);
        let mut request = Request::new(ReceiverStream::new(receiver));
        metadata::insert(request.metadata_mut(), "buildkit.ssh.id", [id]);
        let mut client = self.ssh();

        // Up: ends with the step's side of the socket; dropping the sender half-closes the call.
        let up = async move {
            let mut buffer = BytesMut::with_capacity(32 << 10);
            loop {
                buffer.reserve(32 << 10);
                match reader.read_buf(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(_) => {}
                }
                let data: Bytes = buffer.split().freeze();
                if sender.send(BytesMessage { data }).await.is_err() {
                    break;
                }
            }
            drop(sender);
            std::future::pending::<()>().await;
        };
        // Down: ends when the client ends the call, and that ends the connection.
        let down = async {
            let mut answers = self.call(&what, client.forward_agent(request)).await?.into_inner();
            while let Some(message) = answers.next().await {
                let mut data = message.map_err(|status| self.error(&what, &status))?.data;
                while data.has_remaining() {
                    if writer.write_all_buf(&mut data).await.is_err() {
                        return Ok(());
                    }
                }
            }
            let _gone = writer.shutdown().await;
            Ok(())
        };
        tokio::select! {
            () = up => Ok(()),
            ended = down => ended,
        }
    }
}

fn agent(id: &str) -> &str {
    if id.is_empty() { DEFAULT_AGENT } else { id }
}
