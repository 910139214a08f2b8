//! What can be wrong with a definition.

/// A definition that cannot be solved. Messages name the vertex or index concerned.
#[derive(Debug, thiserror::Error)]
pub enum LlbError {
    /// An operation's bytes are not a valid message.
    #[error("failed to parse llb proto op {digest}: {source}")]
    Decode {
        /// The vertex.
        digest: String,
        /// What the decoder says.
        source: prost::DecodeError,
    },
    /// A definition with a terminal operation only.
    #[error("invalid LLB with {0} vertexes")]
    TooFewVertices(usize),
    /// The terminal operation does not name exactly one edge.
    #[error("invalid LLB: the last op must name one result, it has {0} inputs")]
    Terminal(usize),
    /// An input that is not part of the definition.
    #[error("invalid missing input digest {vertex}")]
    MissingInput {
        /// Digest of the missing vertex.
        vertex: String,
    },
    /// An input that is not a digest.
    #[error("invalid input digest: {0}")]
    InputDigest(#[from] kiln_oci::DigestError),
    /// An operation reaches itself.
    #[error("invalid LLB: cycle at {vertex}")]
    Cycle {
        /// A vertex on the cycle.
        vertex: String,
    },
    /// A chain longer than Kiln accepts.
    #[error("invalid LLB: more than {limit} vertices")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
    /// An operation that is structurally wrong.
    #[error("invalid {kind} op: {reason}")]
    Invalid {
        /// Kind of operation.
        kind: &'static str,
        /// What is wrong.
        reason: String,
        /// The vertex, once known.
        vertex: Option<crate::VertexDigest>,
    },
    /// A step under construction lacks something; the text says what.
    #[error("{0}")]
    Empty(&'static str),
    /// An operation needs something this daemon cannot do.
    #[error("unsupported llb capability {id}: unknown or disabled in this daemon")]
    Capability {
        /// Capability id.
        id: String,
    },
}

impl LlbError {
    pub(crate) fn invalid(kind: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            kind,
            reason: reason.into(),
            vertex: None,
        }
    }

    /// The vertex the error is about, if there is one.
    pub fn vertex(&self) -> Option<crate::VertexDigest> {
        match self {
            Self::Invalid { vertex, .. } => *vertex,
            _ => None,
        }
    }
}
