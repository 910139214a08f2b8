//! Listeners: unix sockets, tcp (plain or TLS) and sockets handed over by systemd, as one stream of connections.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tonic::transport::server::Connected;

use crate::config::{Config, Tls};

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Not an address Kiln knows.
    #[error("invalid address `{0}`: use unix://path, tcp://host:port or fd://")]
    Address(String),
    /// The operating system refuses.
    #[error("failed to listen on {address}: {source}")]
    Io {
        /// The address.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Another process answers on the socket.
    #[error("failed to listen on {0}: another daemon answers there")]
    InUse(String),
    /// Certificates cannot be used.
    #[error("failed to load TLS material from {path}: {reason}")]
    Tls {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// No socket was handed over.
    #[error("fd:// was asked for and no listening socket was handed over (LISTEN_FDS)")]
    NoFds,
}

/// A byte stream from a client, whatever carries it.
pub struct Connection(Pin<Box<dyn Stream>>);

trait Stream: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

/// All listeners of the daemon. Sockets of unix addresses are removed when this is dropped.
pub struct Listeners {
    incoming: mpsc::Receiver<io::Result<Connection>>,
    addresses: Vec<String>,
    sockets: Vec<PathBuf>,
}

impl Drop for Listeners {
    fn drop(&mut self) {
        for socket in &self.sockets {
            // Nothing to do when it is gone already.
            let _ = std::fs::remove_file(socket);
        }
    }
}

impl Listeners {
    /// Binds every configured address.
    pub async fn bind(config: &Config) -> Result<Self, ListenError> {
        let tls = config.tls.as_ref().map(acceptor).transpose()?;
        // Accepted connections wait here for the server; more than a few means it is busy, so the kernel's backlog may fill.
        let (send, incoming) = mpsc::channel(16);
        let mut out = Self {
            incoming,
            addresses: Vec::new(),
            sockets: Vec::new(),
        };
        for address in &config.addresses {
            if let Some(path) = address.strip_prefix("unix://") {
                let listener = bind_unix(Path::new(path), address, config).await?;
                out.sockets.push(path.into());
                out.addresses.push(address.clone());
                tokio::spawn(accept_unix(listener, send.clone()));
            } else if let Some(host) = address.strip_prefix("tcp://") {
                let io = |source| ListenError::Io {
                    address: address.clone(),
                    source,
                };
                let listener = TcpListener::bind(host).await.map_err(io)?;
                out.addresses
                    .push(format!("tcp://{}", listener.local_addr().map_err(io)?));
                tokio::spawn(accept_tcp(listener, tls.clone(), send.clone()));
            } else if address.starts_with("fd://") {
                out.inherit(address, tls.clone(), &send)?;
            } else {
                return Err(ListenError::Address(address.clone()));
            }
        }
        Ok(out)
    }

    fn inherit(
        &mut self,
        address: &str,
        tls: Option<TlsAcceptor>,
        send: &mpsc::Sender<io::Result<Connection>>,
    ) -> Result<(), ListenError> {
        let io = |source| ListenError::Io {
            address: address.to_owned(),
            source,
        };
        let mut fds = listenfd::ListenFd::from_env();
        let mut found = false;
        for index in 0..fds.len() {
            if let Ok(Some(listener)) = fds.take_unix_listener(index) {
                listener.set_nonblocking(true).map_err(io)?;
                tokio::spawn(accept_unix(UnixListener::from_std(listener).map_err(io)?, send.clone()));
                found = true;
            } else if let Ok(Some(listener)) = fds.take_tcp_listener(index) {
                listener.set_nonblocking(true).map_err(io)?;
                let listener = TcpListener::from_std(listener).map_err(io)?;
                tokio::spawn(accept_tcp(listener, tls.clone(), send.clone()));
                found = true;
            }
        }
        if !found {
            return Err(ListenError::NoFds);
        }
        self.addresses.push(address.to_owned());
        Ok(())
    }

    /// The addresses really listened on, with the port chosen where 0 was asked for.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }
}

impl futures::Stream for Listeners {
    type Item = io::Result<Connection>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.incoming.poll_recv(cx)
    }
}

async fn bind_unix(path: &Path, address: &str, config: &Config) -> Result<UnixListener, ListenError> {
    let io = |source| ListenError::Io {
        address: address.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io)?;
    }
    if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        // A socket that nobody answers on is what a killed daemon leaves behind.
        if tokio::net::UnixStream::connect(path).await.is_ok() {
            return Err(ListenError::InUse(address.to_owned()));
        }
        std::fs::remove_file(path).map_err(io)?;
    }
    let listener = UnixListener::bind(path).map_err(io)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(io)?;
    if config.socket_uid.is_some() || config.socket_gid.is_some() {
        std::os::unix::fs::chown(path, config.socket_uid, config.socket_gid).map_err(io)?;
    }
    Ok(listener)
}

async fn accept_unix(listener: UnixListener, send: mpsc::Sender<io::Result<Connection>>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = send.closed() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                if send.send(Ok(Connection(Box::pin(stream)))).await.is_err() {
                    return;
                }
            }
            Err(error) => pause_after(error).await,
        }
    }
}

async fn accept_tcp(listener: TcpListener, tls: Option<TlsAcceptor>, send: mpsc::Sender<io::Result<Connection>>) {
    loop {
        let accepted: io::Result<(tokio::net::TcpStream, SocketAddr)> = tokio::select! {
            accepted = listener.accept() => accepted,
            () = send.closed() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                // Small control messages must not wait for each other.
                let _ = stream.set_nodelay(true);
                match &tls {
                    None => {
                        if send.send(Ok(Connection(Box::pin(stream)))).await.is_err() {
                            return;
                        }
                    }
                    Some(tls) => {
                        // A slow or hostile handshake must not hold others up.
                        let (tls, send) = (tls.clone(), send.clone());
                        tokio::spawn(async move {
                            match tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await {
                                Ok(Ok(stream)) => drop(send.send(Ok(Connection(Box::pin(stream)))).await),
                                Ok(Err(error)) => tracing::info!(%peer, %error, "TLS handshake failed"),
                                Err(_) => tracing::info!(%peer, "TLS handshake took too long"),
                            }
                        });
                    }
                }
            }
            Err(error) => pause_after(error).await,
        }
    }
}

const HANDSHAKE: std::time::Duration = std::time::Duration::from_secs(20);

/// Running out of descriptors makes `accept` fail again at once: wait instead of spinning.
async fn pause_after(error: io::Error) {
    tracing::warn!(%error, "failed to accept a connection");
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
}

/// TLS as both kinds of clients need it: `h2` is offered, and a client that names no protocol at all is accepted.
fn acceptor(tls: &Tls) -> Result<TlsAcceptor, ListenError> {
    let bad = |path: &Path, reason: String| ListenError::Tls {
        path: path.to_owned(),
        reason,
    };
    let certs = certificates(&tls.cert)?;
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|e| bad(&tls.key, e.to_string()))?;
    let builder = rustls::ServerConfig::builder();
    let builder = match &tls.ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = rustls::RootCertStore::empty();
            for cert in certificates(ca)? {
                roots.add(cert).map_err(|e| bad(ca, e.to_string()))?;
            }
            let verifier = rustls::server::WebPkiClientVerifier::builder(Arc::new(roots))
                .build()
                .map_err(|e| bad(ca, e.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(certs, key)
        .map_err(|e| bad(&tls.cert, e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ListenError> {
    let bad = |reason: String| ListenError::Tls {
        path: path.to_owned(),
        reason,
    };
    let certs: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(|e| bad(e.to_string()))?
        .collect::<Result<_, _>>()
        .map_err(|e| bad(e.to_string()))?;
    if certs.is_empty() {
        return Err(bad("no certificate in it".into()));
    }
    Ok(certs)
}
