//! Errors as the solver sees them: what kind they are, whom they concern, and at which vertex they arose.

use std::fmt;
use std::sync::Arc;

use kiln_llb::VertexDigest;

/// What an error means for the person who started the build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// What was asked for is wrong: a command failed, a file is missing, an option makes no sense.
    User,
    /// Something outside is out of reach at the moment: a registry, a client, a network.
    Unavailable,
    /// Nobody waits for the answer any more.
    Canceled,
    /// The daemon itself is at fault.
    Internal,
}

/// What the solver needs to know about a worker's errors.
pub trait WorkerError: std::error::Error + Send + Sync + 'static {
    /// What the error means.
    fn kind(&self) -> ErrorKind;

    /// Whether the error concerns the client whose sessions were used rather than the work itself: a session that went
    /// away, credentials, a missing secret. Another build that waits for the same work then tries with its own sessions
    /// instead of failing too.
    fn is_personal(&self) -> bool;

    /// An error that says the work was given up.
    fn canceled() -> Self
    where
        Self: Sized;

    /// An error of the daemon itself.
    fn internal(message: String) -> Self
    where
        Self: Sized;
}

/// Why an edge has no value. Shared by everybody who waits for it; cheap to clone.
pub struct SolveError<E> {
    /// The vertex whose operation failed.
    pub vertex: VertexDigest,
    /// What its operation said.
    pub source: Arc<E>,
}

impl<E: WorkerError> SolveError<E> {
    /// `source` at `vertex`.
    pub fn new(vertex: VertexDigest, source: E) -> Self {
        Self {
            vertex,
            source: Arc::new(source),
        }
    }

    /// What the error means.
    pub fn kind(&self) -> ErrorKind {
        self.source.kind()
    }

    /// Whether other builds may run the same work again with their own sessions.
    pub(crate) fn is_personal(&self) -> bool {
        self.source.is_personal() || self.source.kind() == ErrorKind::Canceled
    }
}

impl<E> Clone for SolveError<E> {
    fn clone(&self) -> Self {
        Self {
            vertex: self.vertex,
            source: Arc::clone(&self.source),
        }
    }
}

impl<E: fmt::Debug> fmt::Debug for SolveError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SolveError")
            .field("vertex", &self.vertex)
            .field("source", &self.source)
            .finish()
    }
}

impl<E: fmt::Display> fmt::Display for SolveError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.source, f)
    }
}

impl<E: std::error::Error + 'static> std::error::Error for SolveError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.source.as_ref())
    }
}
