//! The verified graph: vertices by digest, and the edge somebody wants.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use kiln_oci::{Digest, Platform};

use crate::definition::{Definition, OpMetadata};
use crate::error::LlbError;
use crate::op::{FileActionKind, Op, OutputIndex};
use crate::source_map::SourceMap;

kiln_oci::digest_id! {
    /// Digest of an operation's encoded bytes: the identity of a vertex towards clients.
    VertexDigest
}

/// One output of a vertex.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Edge {
    /// The vertex.
    pub vertex: VertexDigest,
    /// Which of its outputs.
    pub output: OutputIndex,
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.vertex.0.short(), self.output)
    }
}

/// An operation with its inputs and everything known about it.
#[derive(Clone, Debug)]
pub struct Vertex {
    /// Digest of `bytes`, or of the bytes a rewrite gave it.
    pub digest: VertexDigest,
    /// What it does.
    pub op: Op,
    /// Edges it works on; operations refer to them by position.
    pub inputs: Vec<Edge>,
    /// Platform it is for, as sent; `None` means the daemon's own.
    pub platform: Option<Platform>,
    /// Filters for workers.
    pub constraints: Vec<String>,
    /// Name, cache flags, groups.
    pub metadata: OpMetadata,
    /// The encoded operation.
    pub bytes: Bytes,
}

impl Vertex {
    /// The name shown to the user: the custom one, else one made from the operation.
    pub fn name(&self) -> String {
        if let Some(name) = self.metadata.description.get("llb.customname") {
            return name.clone();
        }
        match &self.op {
            Op::Source(s) => s.identifier.clone(),
            Op::Exec(e) => e.meta.args.join(" "),
            Op::File(f) => f
                .actions
                .iter()
                .map(|a| match &a.kind {
                    FileActionKind::Copy(c) => format!("copy {} {}", c.src, c.dest),
                    FileActionKind::MkFile(m) => format!("mkfile {}", m.path),
                    FileActionKind::MkDir(m) => format!("mkdir {}", m.path),
                    FileActionKind::Rm(r) => format!("rm {}", r.path),
                    FileActionKind::Symlink(s) => format!("symlink {} -> {}", s.newpath, s.oldpath),
                })
                .collect::<Vec<_>>()
                .join(", "),
            Op::Build(_) => "build.llb".to_owned(),
            Op::Merge(_) => "merge".to_owned(),
            Op::Diff(_) => "diff".to_owned(),
            Op::Passthrough(_) => "passthrough".to_owned(),
        }
    }

    /// Number of outputs the operation has; at least one.
    pub fn outputs(&self) -> u32 {
        match &self.op {
            Op::Exec(e) => e.outputs().max(1),
            Op::File(f) => f.outputs().max(1),
            Op::Passthrough(p) => u32::try_from(p.outputs.len()).unwrap_or(u32::MAX).max(1),
            Op::Source(_) | Op::Build(_) | Op::Merge(_) | Op::Diff(_) => 1,
        }
    }
}

/// A verified graph. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    vertices: HashMap<VertexDigest, Arc<Vertex>>,
    root: Option<Edge>,
    source_map: SourceMap,
}

impl Graph {
    /// Decodes and checks a definition: every operation well formed, every input present, one terminal operation. Only
    /// what the requested edge reaches is kept and checked.
    pub fn load(definition: &Definition) -> Result<Self, LlbError> {
        crate::load::load(definition)
    }

    /// Builds a graph from parts that are known to be consistent.
    pub(crate) fn from_parts(
        vertices: HashMap<VertexDigest, Arc<Vertex>>,
        root: Option<Edge>,
        source_map: SourceMap,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                vertices,
                root,
                source_map,
            }),
        }
    }

    /// The requested edge; `None` is the empty result.
    pub fn root(&self) -> Option<Edge> {
        self.inner.root
    }

    /// The vertex with this digest.
    pub fn vertex(&self, digest: &VertexDigest) -> Option<&Arc<Vertex>> {
        self.inner.vertices.get(digest)
    }

    /// All vertices, in no particular order.
    pub fn vertices(&self) -> impl Iterator<Item = &Arc<Vertex>> {
        self.inner.vertices.values()
    }

    /// Number of vertices.
    pub fn len(&self) -> usize {
        self.inner.vertices.len()
    }

    /// Whether there are no vertices.
    pub fn is_empty(&self) -> bool {
        self.inner.vertices.is_empty()
    }

    /// Where vertices come from in the user's text.
    pub fn source_map(&self) -> &SourceMap {
        &self.inner.source_map
    }

    /// The same graph with other vertices wanted: `root` must be an edge of it.
    pub fn with_root(&self, root: Edge) -> Result<Self, LlbError> {
        if !self.inner.vertices.contains_key(&root.vertex) {
            return Err(LlbError::MissingInput {
                vertex: root.vertex.0.to_string(),
            });
        }
        Ok(Self::from_parts(
            self.inner.vertices.clone(),
            Some(root),
            self.inner.source_map.clone(),
        ))
    }
}

/// The digest of an encoded operation.
pub fn vertex_digest(bytes: &[u8]) -> VertexDigest {
    VertexDigest(Digest::of(bytes))
}
