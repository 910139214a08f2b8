//! `PassthroughOp`: inputs handed on as outputs.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_llb::Vertex;
use kiln_llb::op::{Op as LlbOp, PassthroughOp};
use kiln_oci::Digest;
use kiln_solver::{CacheMap, Op, OpContext, WorkerError as _};
use kiln_store::LayerRef;

use crate::error::{OpError, OpResult};
use crate::key::{OpKey, passthrough_key};
use crate::worker::LlbWorker;

/// A passthrough.
#[derive(Debug)]
pub struct PassthroughOperation {
    op: PassthroughOp,
    key: OpKey,
}

impl PassthroughOperation {
    /// The passthrough behind a vertex.
    pub fn new(vertex: Arc<Vertex>) -> Result<Self, OpError> {
        let LlbOp::Passthrough(op) = &vertex.op else {
            return Err(OpError::internal("not a passthrough".into()));
        };
        Ok(Self {
            key: passthrough_key(op, vertex.inputs.len()),
            op: op.clone(),
        })
    }
}

#[async_trait]
impl Op<LlbWorker> for PassthroughOperation {
    async fn cache_map(&self, _cx: &OpContext<LlbWorker>) -> Result<CacheMap, OpError> {
        Ok(super::cache_map(&self.key))
    }

    async fn content_digest(
        &self,
        _input: usize,
        _value: &Option<LayerRef>,
        _cx: &OpContext<LlbWorker>,
    ) -> OpResult<Digest> {
        Err(OpError::internal("a passthrough is not keyed by content".into()).into())
    }

    async fn exec(&self, inputs: &[Option<LayerRef>], _cx: &OpContext<LlbWorker>) -> OpResult<Vec<Option<LayerRef>>> {
        let output = |index: &i64| {
            usize::try_from(*index)
                .ok()
                .and_then(|i| inputs.get(i).cloned())
                .flatten()
        };
        Ok(self.op.outputs.iter().map(output).collect())
    }
}
