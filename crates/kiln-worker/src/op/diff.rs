//! `DiffOp`: what one input has over another. A matter of records where one is built on the other.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_llb::Vertex;
use kiln_llb::op::{DiffOp, Op as LlbOp};
use kiln_oci::Digest;
use kiln_solver::{CacheMap, Op, OpContext, WorkerError as _};
use kiln_store::LayerRef;

use crate::error::{OpError, OpResult, is_lost};
use crate::key::{OpKey, diff_key};
use crate::layers::{realize_ctx, realize_input};
use crate::worker::{LlbWorker, store_tenant};

/// A diff.
#[derive(Debug)]
pub struct DiffOperation {
    worker: LlbWorker,
    op: DiffOp,
    name: String,
    key: OpKey,
}

impl DiffOperation {
    /// The diff behind a vertex.
    pub fn new(worker: LlbWorker, vertex: Arc<Vertex>) -> Result<Self, OpError> {
        let LlbOp::Diff(op) = &vertex.op else {
            return Err(OpError::internal("not a diff".into()));
        };
        Ok(Self {
            worker,
            key: diff_key(op, vertex.inputs.len()),
            op: op.clone(),
            name: vertex.name(),
        })
    }
}

#[async_trait]
impl Op<LlbWorker> for DiffOperation {
    async fn cache_map(&self, _cx: &OpContext<LlbWorker>) -> Result<CacheMap, OpError> {
        Ok(super::cache_map(&self.key))
    }

    async fn content_digest(
        &self,
        input: usize,
        value: &Option<LayerRef>,
        cx: &OpContext<LlbWorker>,
    ) -> OpResult<Digest> {
        super::content_digest(&self.worker, &self.key, input, value.as_ref(), cx).await
    }

    async fn exec(&self, inputs: &[Option<LayerRef>], cx: &OpContext<LlbWorker>) -> OpResult<Vec<Option<LayerRef>>> {
        let input = |index: Option<u32>| index.and_then(|i| inputs.get(i as usize)).and_then(Option::as_ref);
        let (lower, upper) = (input(self.op.lower), input(self.op.upper));
        let tenant = store_tenant(cx.tenant())?;
        let ctx = realize_ctx(cx);
        match self.worker.store().diff(&tenant, lower, upper, &self.name, &ctx).await {
            Ok(difference) => Ok(vec![difference]),
            Err(error) if is_lost(&error) => {
                // Which of the two it is becomes clear when they are asked for.
                for index in [self.op.lower, self.op.upper].into_iter().flatten() {
                    realize_input(&self.worker, cx, index as usize, input(Some(index))).await?;
                }
                Err(OpError::from(error).into())
            }
            Err(error) => Err(OpError::from(error).into()),
        }
    }
}
