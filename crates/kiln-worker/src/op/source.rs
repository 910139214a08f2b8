//! `SourceOp`: hands over to the [`Source`](crate::source::Source) of its scheme.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_llb::Vertex;
use kiln_llb::op::Op as LlbOp;
use kiln_oci::Digest;
use kiln_solver::{CacheMap, Op, OpContext, WorkerError as _};
use kiln_store::LayerRef;

use crate::error::{OpError, OpResult};
use crate::key::source_digest;
use crate::source::SourceInstance;
use crate::worker::LlbWorker;

/// A source.
pub struct SourceOperation {
    instance: Box<dyn SourceInstance>,
}

impl std::fmt::Debug for SourceOperation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SourceOperation")
    }
}

impl SourceOperation {
    /// The source behind a vertex.
    pub fn new(worker: LlbWorker, vertex: Arc<Vertex>) -> Result<Self, OpError> {
        let LlbOp::Source(op) = &vertex.op else {
            return Err(OpError::internal("not a source".into()));
        };
        let source = crate::source::of(op.scheme())
            .ok_or_else(|| OpError::user(format!("no source handles the scheme of `{}`", op.identifier)))?;
        Ok(Self {
            instance: source.open(&worker, &vertex, op)?,
        })
    }
}

#[async_trait]
impl Op<LlbWorker> for SourceOperation {
    async fn cache_map(&self, cx: &OpContext<LlbWorker>) -> Result<CacheMap, OpError> {
        let key = self.instance.key(cx).await?;
        let (keys, subjects): (Vec<_>, Vec<_>) = key.keys.iter().map(|k| source_digest(k)).unzip();
        Ok(CacheMap {
            keys,
            subject: subjects.into_iter().next_back().unwrap_or_default(),
            deps: Vec::new(),
            transient: key.transient,
        })
    }

    async fn content_digest(
        &self,
        _input: usize,
        _value: &Option<LayerRef>,
        _cx: &OpContext<LlbWorker>,
    ) -> OpResult<Digest> {
        Err(OpError::internal("a source has no inputs".into()).into())
    }

    async fn exec(&self, _inputs: &[Option<LayerRef>], cx: &OpContext<LlbWorker>) -> OpResult<Vec<Option<LayerRef>>> {
        Ok(vec![self.instance.fetch(cx).await?])
    }
}
