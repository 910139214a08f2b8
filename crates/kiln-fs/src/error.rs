//! The one error of this crate: what was attempted on which path, and what the kernel said.

use std::io;
use std::path::{Path, PathBuf};

use crate::stop::Stopped;

/// A failed file operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was attempted, in the words of the call ("open", "rename").
        op: &'static str,
        /// The path as the caller named it, relative to its directory.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The path cannot name anything here: empty where a name is needed, or ending in `..`.
    #[error("{op} {}: not a usable path", path.display())]
    BadPath {
        /// What was attempted.
        op: &'static str,
        /// The path as the caller named it.
        path: PathBuf,
    },
    /// The job was told to stop.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

impl Error {
    /// An [`Error::Io`] from any error that converts to [`io::Error`] (rustix' and nix' numbers do).
    pub fn io(op: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Error::Io {
            op,
            path: path.as_ref().to_owned(),
            source: source.into(),
        }
    }

    /// The kernel's kind, if this came from the kernel.
    pub fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            Error::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }

    /// The raw errno, if this came from the kernel.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Error::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the path, or one of its parents, does not exist.
    pub fn is_not_found(&self) -> bool {
        self.kind() == Some(io::ErrorKind::NotFound)
    }

    /// Whether the name is taken.
    pub fn is_already_exists(&self) -> bool {
        self.kind() == Some(io::ErrorKind::AlreadyExists)
    }

    /// Whether a component that had to be a directory is something else.
    pub fn is_not_a_directory(&self) -> bool {
        self.kind() == Some(io::ErrorKind::NotADirectory)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = error.kind().unwrap_or(io::ErrorKind::Other);
        io::Error::new(kind, error)
    }
}
