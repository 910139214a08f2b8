//! Mount targets that were made only so that something could be mounted on them, and how they are removed again.

use serde::{Deserialize, Serialize};

/// A mount target (or one of its parents) that was missing in the root and had to be created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stub {
    /// Path inside the root, symlinks resolved, without leading slash.
    pub path: String,
    /// The mount target itself, or one of its missing parents.
    pub is_target: bool,
    /// Times of the directory that contains it, before and after the creation of stubs; `None` if that is a stub as well.
    pub parent: Option<ParentTimes>,
}

/// Times of a directory around the creation of a stub in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentTimes {
    /// Access time before, seconds and nanoseconds.
    pub atime: (i64, u32),
    /// Modification time before.
    pub mtime: (i64, u32),
    /// Modification time when all mounts were made: if it is still this, only the stubs changed the directory.
    pub mtime_after: (i64, u32),
}
