//! `Definition`: a graph as it travels, operations still encoded.
//!
//! Digests are taken over these bytes, so they are kept exactly as received and never encoded again.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::graph::VertexDigest;
use crate::source_map::SourceMap;

/// Encoded operations in topological order, their metadata, and where they come from in the user's text.
///
/// The last operation is terminal: it does nothing and its only input names the requested edge. No operations at all
/// stand for the empty result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Definition {
    /// The encoded operations.
    pub ops: Vec<Bytes>,
    /// Metadata by vertex.
    pub metadata: BTreeMap<VertexDigest, OpMetadata>,
    /// Locations in the user's text.
    pub source_map: SourceMap,
}

impl Definition {
    /// Whether this stands for the empty result.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}

/// What is known about a vertex beside its operation. Not part of its digest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpMetadata {
    /// Do not look this vertex's result up.
    pub ignore_cache: bool,
    /// Texts by name; `llb.customname` is the name shown to the user.
    pub description: BTreeMap<String, String>,
    /// Whether the result goes into exported caches; `None` means the exporter decides.
    pub export_cache: Option<bool>,
    /// Capabilities the operation needs.
    pub caps: BTreeMap<String, bool>,
    /// Vertices that are shown as one.
    pub progress_group: Option<ProgressGroup>,
    /// Limits for the process; no part of any key.
    pub linux_resources: Option<LinuxResources>,
}

/// A group of vertices shown as one line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProgressGroup {
    /// Equal for all members.
    pub id: String,
    /// The line's text.
    pub name: String,
    /// A group with only weak members is not shown.
    pub weak: bool,
}

/// Resource limits of a process (`cgroups(7)`); 0 and empty mean unset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinuxResources {
    /// Memory in bytes.
    pub memory: i64,
    /// Memory and swap in bytes; -1 is unlimited.
    pub memory_swap: i64,
    /// Relative CPU weight in the scale of cgroup v1.
    pub cpu_shares: u64,
    /// CFS period in microseconds.
    pub cpu_period: u64,
    /// CFS quota in microseconds.
    pub cpu_quota: i64,
    /// CPUs as a list such as `0-2,7`.
    pub cpuset_cpus: String,
    /// Memory nodes as a list.
    pub cpuset_mems: String,
}
