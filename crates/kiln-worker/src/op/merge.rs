//! `MergeOp`: inputs laid over each other. Records only: nothing is fetched or copied.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_llb::Vertex;
use kiln_llb::op::{MergeOp, Op as LlbOp};
use kiln_oci::Digest;
use kiln_solver::{CacheMap, Op, OpContext, WorkerError as _};
use kiln_store::LayerRef;

use crate::error::{OpError, OpResult};
use crate::key::{OpKey, merge_key};
use crate::layers::blocking;
use crate::worker::{LlbWorker, store_tenant};

/// A merge.
#[derive(Debug)]
pub struct MergeOperation {
    worker: LlbWorker,
    op: MergeOp,
    name: String,
    key: OpKey,
}

impl MergeOperation {
    /// The merge behind a vertex.
    pub fn new(worker: LlbWorker, vertex: Arc<Vertex>) -> Result<Self, OpError> {
        let LlbOp::Merge(op) = &vertex.op else {
            return Err(OpError::internal("not a merge".into()));
        };
        Ok(Self {
            worker,
            key: merge_key(op, vertex.inputs.len()),
            op: op.clone(),
            name: vertex.name(),
        })
    }
}

#[async_trait]
impl Op<LlbWorker> for MergeOperation {
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
        let chosen: Vec<Option<LayerRef>> = self
            .op
            .inputs
            .iter()
            .map(|i| i.and_then(|i| inputs.get(i as usize).cloned().flatten()))
            .collect();
        let (store, tenant, name) = (
            Arc::clone(self.worker.store()),
            store_tenant(cx.tenant())?,
            self.name.clone(),
        );
        let merged = blocking(move |_| store.merge(&tenant, &chosen, &name)).await?;
        Ok(vec![merged])
    }
}
