//! Layers as archives: a tar stream becomes a tree, a tree becomes a tar stream.
//!
//! - [`read`]: the tar parser, with every extension that occurs in the wild and limits against hostile input.
//! - [`write`]: the tar writer, byte for byte what Go's `archive/tar` writes for the same headers, so that diff ids are
//!   comparable between daemons.
//! - [`apply`]: archive to tree, in one pass.
//! - [`diff`]: tree to archive, compressed and hashed in the same pass.

pub mod apply;
pub mod diff;
mod fields;
pub mod read;
mod stream;
pub mod write;

pub use apply::{Applied, ApplyOptions, apply};
pub use diff::{DiffOptions, Packed, pack, write_tar};
