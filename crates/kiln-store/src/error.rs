//! What can go wrong in the store, one enum for the crate.

use std::io;
use std::path::{Path, PathBuf};

use kiln_oci::{DiffId, Digest};

/// Result of a store operation.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// An error of the store. Messages are lower case and name what was attempted on what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A system call on a path failed.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb: `open`, `rename`.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Another process holds the state directory.
    #[error("state directory {} is in use by another daemon{}", path.display(), holder.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    Locked {
        /// The state directory.
        path: PathBuf,
        /// The process that wrote the lock file last, where it can be told.
        holder: Option<u32>,
    },
    /// The state directory was written by something this version does not understand, or for other circumstances.
    #[error("state directory {} cannot be used: {reason}", path.display())]
    Format {
        /// The state directory.
        path: PathBuf,
        /// What does not fit and what to do about it.
        reason: String,
    },
    /// No such blob, layer, tree, record or lease.
    #[error("{what} {id} is not in the store")]
    NotFound {
        /// The kind of thing: `blob`, `layer`, `tree`.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// Bytes do not have the digest they were announced with.
    #[error("digest of {what} is {actual}, expected {expected}")]
    DigestMismatch {
        /// What was read.
        what: String,
        /// The digest that was announced.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },
    /// A stream has another length than announced.
    #[error("size of {what} is {actual} bytes, expected {expected}")]
    SizeMismatch {
        /// What was read.
        what: String,
        /// Announced bytes.
        expected: u64,
        /// Bytes that came.
        actual: u64,
    },
    /// A layer's uncompressed content is not what the image config promised.
    #[error("layer {blob} unpacks to diff id {actual}, expected {expected}")]
    DiffIdMismatch {
        /// The compressed blob.
        blob: Digest,
        /// What the image config says.
        expected: DiffId,
        /// What was unpacked.
        actual: DiffId,
    },
    /// A lazy layer's blob is absent and nothing at hand can provide it.
    #[error("blob {blob} of layer {layer} is not present and no provider has it")]
    BlobUnavailable {
        /// The missing blob.
        blob: Digest,
        /// The layer that needs it.
        layer: String,
    },
    /// A provider of lazy blobs failed.
    #[error("fetch blob {blob}: {source}")]
    Provider {
        /// The blob asked for.
        blob: Digest,
        /// What the provider said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Writing was refused because the configured limit or the disk leaves no room.
    #[error("no space for {wanted} bytes: {reason}")]
    NoSpace {
        /// Bytes asked for.
        wanted: u64,
        /// Which limit stands in the way.
        reason: String,
    },
    /// A file of the store does not parse or its checksum is wrong.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Somebody else is using it at the moment.
    #[error("{what} {id} is in use")]
    Busy {
        /// The kind of thing: `ingest`, `layer`.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The index refused an operation.
    #[error("index: {0}")]
    Index(String),
    /// An archive, a tree or a request that is malformed; the text names what and where.
    #[error("{0}")]
    Invalid(String),
    /// A path or feature that this machine or this build of Kiln does not support.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The caller's [`Stop`](kiln_fs::Stop) token was set.
    #[error("canceled")]
    Canceled,
    /// A background task of the store ended abnormally.
    #[error("{task} panicked")]
    Panicked {
        /// Which task.
        task: &'static str,
    },
    /// An error that was shared with several waiters.
    #[error("{0}")]
    Shared(std::sync::Arc<StoreError>),
}

impl From<kiln_fs::Stopped> for StoreError {
    fn from(_: kiln_fs::Stopped) -> Self {
        Self::Canceled
    }
}

impl From<kiln_fs::Error> for StoreError {
    fn from(error: kiln_fs::Error) -> Self {
        match error {
            kiln_fs::Error::Io { op, path, source } => Self::Io {
                action: op,
                path,
                source,
            },
            kiln_fs::Error::BadPath { op, path } => {
                Self::Invalid(format!("{op} {}: not a usable path", path.display()))
            }
            kiln_fs::Error::Stopped(_) => Self::Canceled,
        }
    }
}

impl StoreError {
    /// An I/O error of `action` on `path`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            action,
            path: path.as_ref().to_owned(),
            source: source.into(),
        }
    }

    /// The innermost error of a shared one.
    pub fn root(&self) -> &Self {
        match self {
            Self::Shared(inner) => inner.root(),
            other => other,
        }
    }

    /// Whether the cause is a canceled [`Stop`](kiln_fs::Stop) token.
    pub fn is_canceled(&self) -> bool {
        matches!(self.root(), Self::Canceled)
    }

    /// Whether the thing asked for is simply not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self.root(), Self::NotFound { .. } | Self::BlobUnavailable { .. })
    }

    /// Whether the cause is that a file or directory does not exist.
    pub fn is_missing_file(&self) -> bool {
        matches!(self.root(), Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether a tree cannot be used any more: files of it are missing or damaged.
    pub(crate) fn is_lost_tree(&self) -> bool {
        self.is_missing_file() || matches!(self.root(), Self::Damaged { .. })
    }

    /// Whether the disk, or Kiln's own limit on it, is full.
    pub fn is_no_space(&self) -> bool {
        match self.root() {
            Self::NoSpace { .. } => true,
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }
}

/// Attaches what was attempted on which path to an I/O result.
pub trait IoContext<T> {
    /// Turns the error into [`StoreError::Io`].
    fn during(self, action: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn during(self, action: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| StoreError::io(action, path, source))
    }
}

impl From<kiln_match::Error> for StoreError {
    fn from(error: kiln_match::Error) -> Self {
        Self::Invalid(error.to_string())
    }
}
