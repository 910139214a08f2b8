//! What can go wrong while a result leaves the daemon.

use kiln_oci::{ConfigError, ReferenceError};
use kiln_registry::RegistryError;
use kiln_session::SessionError;
use kiln_store::StoreError;

/// A failed export.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The request makes no sense: unknown exporter, attribute or combination. The text is for the user.
    #[error("{0}")]
    Invalid(String),
    /// What the frontend returned cannot be exported in this form. The text is for the user.
    #[error("{0}")]
    Result(String),
    /// A name is no image reference.
    #[error("failed to parse {name}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        #[source]
        source: ReferenceError,
    },
    /// The image config cannot be used.
    #[error("invalid image config for export")]
    Config(#[from] ConfigError),
    /// JSON that must be written or read has the wrong form.
    #[error("{what}")]
    Json {
        /// What was attempted on what.
        what: String,
        /// Where it failed.
        #[source]
        source: serde_json::Error,
    },
    /// Pushing failed.
    #[error("failed to push {name}")]
    Push {
        /// The name that was pushed to.
        name: String,
        /// Why.
        #[source]
        source: Box<RegistryError>,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The client failed or went away.
    #[error(transparent)]
    Session(Box<SessionError>),
    /// Reading a layer or file failed.
    #[error("{what}")]
    Io {
        /// What was attempted on what.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl From<SessionError> for ExportError {
    fn from(error: SessionError) -> Self {
        Self::Session(Box::new(error))
    }
}

impl ExportError {
    pub(crate) fn json(what: impl Into<String>) -> impl FnOnce(serde_json::Error) -> Self {
        let what = what.into();
        move |source| Self::Json { what, source }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
