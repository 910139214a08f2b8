//! Op digests, selectors and content selectors: what the solver's keys are made of, byte-exact as BuildKit makes them.
//!
//! An op digest says what an operation is, without its inputs: `sha256` over compact JSON as Go's `encoding/json` writes
//! it. The types here are not encoded as they are; each file spells out the members and their order, because a digest that
//! is off by one byte shares no cache with anybody. What must not take part (extra hosts' addresses, proxies, secrets, ids
//! of cache mounts, limits) is left out in the same place.
//!
//! One file per kind of operation: `exec`, `file`, `structure` (merge, diff, passthrough, build), `source`. `select` has
//! the selectors: which paths of an input matter, as part of keys by identity and as a list to be hashed.

mod exec;
mod file;
mod json;
mod select;
mod source;
mod structure;

use kiln_oci::Digest;
use kiln_solver::{Dep, OpDigest};

pub use exec::exec_key;
pub use file::file_key;
pub use select::ContentSelector;
pub use source::{BlobFile, GitKey, HttpKey, blob_key, chain_key, git_key, http_key, image_key, source_digest};
pub use structure::{build_key, diff_key, merge_key, passthrough_key};

/// What an operation's keys are made of, and how to look at its inputs' content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpKey {
    /// The op digest.
    pub digest: OpDigest,
    /// The text it was taken over.
    pub subject: String,
    /// How the operation depends on each of its inputs.
    pub deps: Vec<Dep>,
    /// For each input with [`Dep::content`] what of it is hashed, in order.
    pub selectors: Vec<Vec<ContentSelector>>,
}

impl OpKey {
    fn new(subject: Vec<u8>, inputs: usize) -> Self {
        Self {
            digest: OpDigest(Digest::of(&subject)),
            subject: String::from_utf8_lossy(&subject).into_owned(),
            deps: vec![Dep::default(); inputs],
            selectors: vec![Vec::new(); inputs],
        }
    }
}

/// An operation that cannot be keyed because an index in it leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {op} op: {reason}")]
pub struct KeyError {
    /// Kind of operation.
    pub op: &'static str,
    /// What is wrong.
    pub reason: String,
}

#[cfg(test)]
mod tests;
