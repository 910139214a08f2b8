//! What goes wrong at the command line: kinds, hints, exit codes.

use std::io;
use std::process::ExitCode;

use bytes::Bytes;
use kiln_proto::rpc;
use prost::Message as _;

/// Shorthand for results of this program.
pub(crate) type Result<T, E = CliError> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// Something was typed that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// No daemon answers.
    #[error("cannot reach a daemon at {address}: {message}")]
    Unreachable { address: String, message: String },
    /// The daemon that was to be started for this command did not come up.
    #[error("the daemon did not start: {message}")]
    Daemon { message: String, log: String },
    /// The daemon answered with an error.
    #[error("{}", .0.message)]
    Remote(Box<rpc::Status>),
    /// A file or the system.
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

impl CliError {
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source,
        }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    /// What to try, if there is something.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unreachable { .. } => Some("without --addr, kiln starts a daemon for itself"),
            Self::Daemon { .. } => Some("kilnd must lie beside kiln, or be named by KILND"),
            _ => None,
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Usage(_) => 2,
            Self::Unreachable { .. } | Self::Daemon { .. } => 3,
            Self::Interrupted => 130,
            _ => 1,
        })
    }
}

impl From<tonic::Status> for CliError {
    fn from(status: tonic::Status) -> Self {
        Self::Remote(Box::new(whole_status(&status)))
    }
}

/// A status with its details, as the message that carries it.
pub(crate) fn whole_status(status: &tonic::Status) -> rpc::Status {
    let details = rpc::Status::decode(Bytes::copy_from_slice(status.details())).map(|whole| whole.details);
    rpc::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details: details.unwrap_or_default(),
    }
}
