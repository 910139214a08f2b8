//! What can go wrong when the daemon talks to its client.

use std::fmt;
use std::io;

use bytes::Bytes;

/// Shorthand for results of this crate.
pub type Result<T, E = SessionError> = std::result::Result<T, E>;

/// A gRPC status that came from the other side, kept whole: its details belong to whoever understands them.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteStatus {
    /// The numeric gRPC code.
    pub code: i32,
    /// The text, as sent.
    pub message: String,
    /// The serialised `google.rpc.Status` of the trailer, empty when there was none.
    pub details: Bytes,
}

impl fmt::Debug for RemoteStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "RemoteStatus({}: {:?}, {} bytes of details)",
            self.code,
            self.message,
            self.details.len()
        )
    }
}

impl fmt::Display for RemoteStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// A call to the client, or the session itself, failed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection to the client ended while the call ran, or before it.
    #[error("session {session} is gone: {reason}")]
    Gone {
        /// The session's id.
        session: String,
        /// Why it ended ("session healthcheck failed fatally", "client closed the connection").
        reason: String,
    },
    /// None of the sessions that could have answered exists.
    #[error("no active sessions")]
    NoActiveSessions,
    /// The session is not registered (and the caller did not want to wait).
    #[error("session {0} not found")]
    UnknownSession(String),
    /// The client did not offer the service.
    #[error("{0}")]
    Unsupported(String),
    /// The client has no such thing: directory, secret, agent, blob.
    #[error("{what}: {status}")]
    NotFound {
        /// What was asked for.
        what: String,
        /// The client's answer.
        status: RemoteStatus,
    },
    /// The client answered with an error.
    #[error("{what}: {status}")]
    Remote {
        /// What was asked for.
        what: String,
        /// The client's answer.
        status: RemoteStatus,
    },
    /// The call was cancelled, by the client or with its caller.
    #[error("{0}: context canceled")]
    Canceled(String),
    /// The client did not answer in time.
    #[error("{what}: no answer within {seconds} s")]
    Timeout {
        /// What was asked for.
        what: String,
        /// How long the daemon waited.
        seconds: u64,
    },
    /// The other side broke the rules of a protocol.
    #[error("{what}: {message}")]
    Protocol {
        /// Which exchange.
        what: String,
        /// Which rule.
        message: String,
    },
    /// A file of this machine could not be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
}

/// The kinds of [`SessionError`] that callers decide by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionErrorKind {
    /// The client is not there (any more).
    Gone,
    /// Cancelled.
    Canceled,
    /// The client has no such thing.
    NotFound,
    /// The client does not offer the service.
    Unsupported,
    /// Another answer of the client, or a broken protocol.
    Remote,
    /// A local file operation.
    Io,
}

impl SessionError {
    /// What kind of failure this is.
    pub fn kind(&self) -> SessionErrorKind {
        match self {
            Self::Gone { .. } | Self::NoActiveSessions | Self::UnknownSession(_) | Self::Timeout { .. } => {
                SessionErrorKind::Gone
            }
            Self::Canceled(_) => SessionErrorKind::Canceled,
            Self::NotFound { .. } => SessionErrorKind::NotFound,
            Self::Unsupported(_) => SessionErrorKind::Unsupported,
            Self::Remote { .. } | Self::Protocol { .. } => SessionErrorKind::Remote,
            Self::Io { .. } => SessionErrorKind::Io,
        }
    }

    /// The client's own status, if it sent one.
    pub fn remote_status(&self) -> Option<&RemoteStatus> {
        match self {
            Self::NotFound { status, .. } | Self::Remote { status, .. } => Some(status),
            _ => None,
        }
    }

    pub(crate) fn protocol(what: &str, message: impl Into<String>) -> Self {
        Self::Protocol {
            what: what.to_owned(),
            message: message.into(),
        }
    }

    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            what: what.into(),
            source: source.into(),
        }
    }

    /// A status from outside any session (the client half), or one whose session is known to live.
    pub(crate) fn from_status(what: &str, status: &tonic::Status) -> Self {
        let what = what.to_owned();
        let remote = RemoteStatus {
            code: status.code() as i32,
            message: status.message().to_owned(),
            details: Bytes::copy_from_slice(status.details()),
        };
        match status.code() {
            tonic::Code::Cancelled => Self::Canceled(what),
            tonic::Code::NotFound => Self::NotFound { what, status: remote },
            tonic::Code::Unimplemented => Self::Unsupported(format!("{what}: {}", remote.message)),
            _ => Self::Remote { what, status: remote },
        }
    }

    /// As what the client half answers to the daemon.
    pub(crate) fn to_status(&self) -> tonic::Status {
        let code = match self {
            Self::NotFound { .. } => tonic::Code::NotFound,
            Self::Canceled(_) => tonic::Code::Cancelled,
            Self::Unsupported(_) => tonic::Code::Unimplemented,
            Self::Gone { .. } | Self::NoActiveSessions | Self::UnknownSession(_) | Self::Timeout { .. } => {
                tonic::Code::Unavailable
            }
            Self::Remote { status, .. } => tonic::Code::from_i32(status.code),
            Self::Protocol { .. } => tonic::Code::InvalidArgument,
            Self::Io { .. } => tonic::Code::Unknown,
        };
        tonic::Status::new(code, self.to_string())
    }
}

/// Whether a status was made on this side because the connection broke, and not sent by the peer.
///
/// A status that arrived in trailers has no source. One that was made from a transport error has, and unless that error
/// is the reset of one stream, the connection is over.
pub(crate) fn is_connection_error(status: &tonic::Status) -> bool {
    let mut source = std::error::Error::source(status);
    let mut local = false;
    while let Some(error) = source {
        if let Some(h2) = error.downcast_ref::<h2::Error>() {
            return h2.is_io() || h2.is_go_away();
        }
        if let Some(hyper) = error.downcast_ref::<hyper::Error>() {
            local = local || hyper.is_closed() || hyper.is_canceled() || hyper.is_incomplete_message();
        }
        if error.downcast_ref::<io::Error>().is_some() {
            local = true;
        }
        source = error.source();
    }
    local
}
