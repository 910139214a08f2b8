//! What goes wrong between a Dockerfile and its LLB, with the place in the text where it did.
//!
//! A [`DockerfileError`] carries its [`Span`]s from birth; [`FrontendError`] joins them with the file they point into, so the
//! daemon can attach one source excerpt per location (order preserved) without knowing anything about Dockerfiles.

use std::fmt;
use std::sync::Arc;

use crate::bridge::BridgeError;
use crate::dockerfile::span::Span;

/// An error about a Dockerfile: a sentence for its author and the lines it is about.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct DockerfileError {
    message: String,
    spans: Vec<Span>,
    #[source]
    cause: Option<BridgeError>,
}

impl DockerfileError {
    /// An error without a place.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            spans: Vec::new(),
            cause: None,
        }
    }

    /// An error at `span`.
    pub fn at(message: impl Into<String>, span: Span) -> Self {
        Self::new(message).with_span(span)
    }

    /// The same error with one more location. A client prints one excerpt for each, in this order.
    #[must_use]
    pub fn with_span(mut self, span: Span) -> Self {
        self.spans.push(span);
        self
    }

    /// The same error with `span` as its only location, used where text came from elsewhere (ONBUILD triggers).
    #[must_use]
    pub fn relocated(mut self, span: Span) -> Self {
        self.spans.clear();
        self.spans.push(span);
        self
    }

    /// The same error with `context: ` before its message.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// The same error with ` (did you mean …?)` behind its message.
    #[must_use]
    pub fn suggesting(mut self, option: Option<String>) -> Self {
        if let Some(option) = option {
            self.message.push_str(&format!(" (did you mean {option}?)"));
        }
        self
    }

    /// The sentence, without locations.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The locations, innermost first. An empty span stands for a location without lines.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The error of the daemon underneath, if this one only reports it.
    pub fn cause(&self) -> Option<&BridgeError> {
        self.cause.as_ref()
    }
}

impl From<BridgeError> for DockerfileError {
    fn from(error: BridgeError) -> Self {
        Self {
            message: error.to_string(),
            spans: Vec::new(),
            cause: Some(error),
        }
    }
}

impl From<String> for DockerfileError {
    fn from(message: String) -> Self {
        Self::new(message)
    }
}

/// Adds places and context to results of this room.
pub(crate) trait Located<T> {
    /// Adds a location to the error.
    fn at_span(self, span: Span) -> Result<T, DockerfileError>;
    /// Puts `context: ` before the error's message.
    fn context(self, context: impl fmt::Display) -> Result<T, DockerfileError>;
}

impl<T, E: Into<DockerfileError>> Located<T> for Result<T, E> {
    fn at_span(self, span: Span) -> Result<T, DockerfileError> {
        self.map_err(|e| e.into().with_span(span))
    }

    fn context(self, context: impl fmt::Display) -> Result<T, DockerfileError> {
        self.map_err(|e| e.into().context(context))
    }
}

/// Why a frontend gave no result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FrontendError {
    /// The Dockerfile, an option or something they name is wrong.
    #[error("{error}")]
    Dockerfile {
        /// The sentence and the spans.
        #[source]
        error: DockerfileError,
        /// The file the spans point into; `None` when the error is shown without excerpts.
        file: Option<Arc<kiln_llb::SourceInfo>>,
    },
    /// The client asks for a capability this frontend lacks (attribute `frontend.caps`). On the wire: code Unimplemented and a
    /// `FrontendCap` detail, on which buildx falls back to another frontend.
    #[error("unsupported frontend capability {0}")]
    UnsupportedCapability(String),
    /// An unknown `requestid`. On the wire with a `Subrequest` detail.
    #[error("unsupported request {0}")]
    UnsupportedRequest(String),
}

impl From<DockerfileError> for FrontendError {
    fn from(error: DockerfileError) -> Self {
        Self::Dockerfile { error, file: None }
    }
}

impl From<BridgeError> for FrontendError {
    fn from(error: BridgeError) -> Self {
        DockerfileError::from(error).into()
    }
}

impl FrontendError {
    /// The daemon's own error underneath, with whatever details it brought along.
    pub fn bridge_cause(&self) -> Option<&BridgeError> {
        match self {
            Self::Dockerfile { error, .. } => error.cause(),
            _ => None,
        }
    }
}
