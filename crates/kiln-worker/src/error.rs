//! `OpError`: why an operation failed, in the words the user reads.

use std::error::Error;
use std::fmt;

use kiln_executor::ExecError;
use kiln_registry::{RegistryError, error as registry};
use kiln_session::{SessionError, SessionErrorKind};
use kiln_solver::{ErrorKind, ExecFailure, WorkerError};
use kiln_store::StoreError;

use crate::key::KeyError;

/// Result of an operation.
pub type Result<T, E = OpError> = std::result::Result<T, E>;

/// What an operation answers: besides its own failure it may find an input lost.
pub type OpResult<T> = Result<T, ExecFailure<OpError>>;

type Cause = Box<dyn Error + Send + Sync>;

/// Why an operation failed. The message is complete: it names what was attempted on what, and includes the cause.
#[derive(Debug)]
pub struct OpError {
    kind: ErrorKind,
    message: String,
    exit_code: Option<u32>,
    personal: bool,
    not_found: bool,
    source: Option<Cause>,
}

impl OpError {
    /// An error of a kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            exit_code: None,
            personal: false,
            not_found: false,
            source: None,
        }
    }

    /// The user asked for something that cannot be done.
    pub fn user(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::User, message)
    }

    /// The user names something that is not there.
    pub fn missing(message: impl Into<String>) -> Self {
        Self {
            not_found: true,
            ..Self::user(message)
        }
    }

    /// Something outside is out of reach.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    /// A process ended with a code that means failure.
    pub fn exit(message: impl Into<String>, code: u32) -> Self {
        Self {
            exit_code: Some(code),
            ..Self::user(message)
        }
    }

    /// Marks the error as one of the client that was asked: other builds try with their own sessions.
    #[must_use]
    pub fn personal(self) -> Self {
        Self { personal: true, ..self }
    }

    /// Keeps the cause.
    #[must_use]
    pub fn because(self, source: impl Into<Cause>) -> Self {
        Self {
            source: Some(source.into()),
            ..self
        }
    }

    /// Puts `context: ` before the message.
    #[must_use]
    pub fn context(self, context: impl fmt::Display) -> Self {
        Self {
            message: format!("{context}: {}", self.message),
            ..self
        }
    }

    /// The exit code of the process that failed.
    pub fn exit_code(&self) -> Option<u32> {
        self.exit_code
    }

    /// Whether something that was named is not there.
    pub fn is_not_found(&self) -> bool {
        self.not_found
    }
}

impl fmt::Display for OpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for OpError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}

impl WorkerError for OpError {
    fn kind(&self) -> ErrorKind {
        self.kind
    }

    fn is_personal(&self) -> bool {
        self.personal
    }

    fn canceled() -> Self {
        Self::new(ErrorKind::Canceled, "context canceled")
    }

    fn internal(message: String) -> Self {
        Self::new(ErrorKind::Internal, message)
    }
}

impl From<StoreError> for OpError {
    fn from(error: StoreError) -> Self {
        let kind = kind_of(&error);
        let not_found = matches!(error, StoreError::NotFound { .. });
        if kind == ErrorKind::Canceled {
            return Self::canceled().because(error);
        }
        // What one client cannot provide, another one perhaps can.
        let personal = is_provided(&error);
        Self {
            not_found,
            personal,
            ..Self::new(kind, error.to_string()).because(error)
        }
    }
}

fn is_provided(error: &StoreError) -> bool {
    match error {
        StoreError::Shared(inner) => is_provided(inner),
        StoreError::Provider { .. } | StoreError::BlobUnavailable { .. } => true,
        _ => false,
    }
}

/// Whether the store says that a value is gone and nobody at hand can bring it back: the solver then makes it again.
pub(crate) fn is_lost(error: &StoreError) -> bool {
    match error {
        StoreError::Shared(inner) => is_lost(inner),
        StoreError::BlobUnavailable { .. } | StoreError::NotFound { .. } => true,
        _ => false,
    }
}

fn kind_of(error: &StoreError) -> ErrorKind {
    match error {
        StoreError::Shared(inner) => kind_of(inner),
        StoreError::Canceled => ErrorKind::Canceled,
        StoreError::Provider { .. } | StoreError::BlobUnavailable { .. } => ErrorKind::Unavailable,
        StoreError::Invalid(_)
        | StoreError::Unsupported(_)
        | StoreError::NotFound { .. }
        | StoreError::DigestMismatch { .. }
        | StoreError::SizeMismatch { .. }
        | StoreError::DiffIdMismatch { .. } => ErrorKind::User,
        _ => ErrorKind::Internal,
    }
}

impl From<SessionError> for OpError {
    fn from(error: SessionError) -> Self {
        let kind = match error.kind() {
            SessionErrorKind::Canceled => return Self::canceled().personal().because(error),
            SessionErrorKind::Gone => ErrorKind::Unavailable,
            _ => ErrorKind::User,
        };
        let not_found = error.kind() == SessionErrorKind::NotFound;
        Self {
            not_found,
            ..Self::new(kind, error.to_string()).personal().because(error)
        }
    }
}

impl From<RegistryError> for OpError {
    fn from(error: RegistryError) -> Self {
        let (kind, personal) = match error.kind() {
            registry::ErrorKind::Unavailable => (ErrorKind::Unavailable, false),
            registry::ErrorKind::Denied => (ErrorKind::User, true),
            _ => (ErrorKind::User, false),
        };
        let not_found = matches!(error.kind(), registry::ErrorKind::NotFound);
        Self {
            personal,
            not_found,
            ..Self::new(kind, error.to_string()).because(error)
        }
    }
}

impl From<ExecError> for OpError {
    fn from(error: ExecError) -> Self {
        let user = error.is_exec() || matches!(error, ExecError::Invalid(_));
        let kind = if user { ErrorKind::User } else { ErrorKind::Internal };
        Self::new(kind, error.to_string()).because(error)
    }
}

impl From<KeyError> for OpError {
    fn from(error: KeyError) -> Self {
        Self::user(error.to_string()).because(error)
    }
}

impl From<tokio::task::JoinError> for OpError {
    fn from(error: tokio::task::JoinError) -> Self {
        if error.is_cancelled() {
            return Self::canceled().because(error);
        }
        Self::internal(format!("a task of the worker died: {error}")).because(error)
    }
}
