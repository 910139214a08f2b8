//! Work on files beneath a directory file descriptor.
//!
//! Everything that comes from outside (Dockerfile, LLB, build context, image, archive) names files by path, and none of
//! those paths may leave the tree they belong to. This crate is the one place that turns such a path into a file: every
//! lookup goes through `openat2` beneath a [`Dir`], never through joined strings.
//!
//! Tour:
//! - [`dir`]: [`Dir`], a rooted directory: open, create, rename, remove, metadata, extended attributes.
//! - [`metadata`]: [`Metadata`] and [`FileType`], what `stat` tells, with plain numbers.
//! - [`mode`]: Go's `FileMode` bits, which travel on the wire, to and from `st_mode`.
//! - [`copy`]: the copy ladder (reflink, `copy_file_range`, read and write) behind one function.
//! - [`xattr`]: which extended attributes may enter or leave a tree.
//! - [`remove`]: removing a whole tree, however deep and whatever its permissions.
//! - [`stop`]: [`Stop`], the flag a blocking job checks for every file and every MiB.
//! - [`parallel`]: the same work on many files by a few threads.
//!
//! Deliberately absent: async code (callers choose their blocking pool), walking policies (each caller walks in its own
//! order and with its own filter), and any knowledge of layers, images or builds.

pub mod copy;
pub mod dir;
pub mod error;
pub mod metadata;
pub mod mode;
pub mod parallel;
pub mod remove;
pub mod stop;
pub mod xattr;

pub use copy::Copier;
pub use dir::{Dir, DirEntry, Links};
pub use error::Error;
pub use metadata::{FileType, Metadata, Timestamp};
pub use stop::{Stop, StopGuard, Stopped};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
