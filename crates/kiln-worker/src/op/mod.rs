//! The operations, one file per kind: each is keyed by [`crate::key`] and carried out here.

pub mod build;
pub mod diff;
pub mod exec;
pub mod file;
pub mod merge;
pub mod passthrough;
pub mod process;
pub mod source;

use std::sync::Arc;

use kiln_llb::{Op as LlbOp, Vertex};
use kiln_oci::Digest;
use kiln_solver::{CacheMap, Op, OpContext};
use kiln_store::LayerRef;

use crate::content;
use crate::error::{OpResult, Result};
use crate::key::OpKey;
use crate::layers;
use crate::worker::LlbWorker;

/// The operation behind a vertex.
pub(crate) fn op(worker: &LlbWorker, vertex: &Arc<Vertex>) -> Result<Arc<dyn Op<LlbWorker>>> {
    let (worker, vertex) = (worker.clone(), Arc::clone(vertex));
    Ok(match &vertex.op {
        LlbOp::Exec(_) => Arc::new(process::ExecOperation::new(worker, vertex)?),
        LlbOp::Source(_) => Arc::new(source::SourceOperation::new(worker, vertex)?),
        LlbOp::File(_) => Arc::new(file::FileOperation::new(worker, vertex)?),
        LlbOp::Merge(_) => Arc::new(merge::MergeOperation::new(worker, vertex)?),
        LlbOp::Diff(_) => Arc::new(diff::DiffOperation::new(worker, vertex)?),
        LlbOp::Passthrough(_) => Arc::new(passthrough::PassthroughOperation::new(vertex)?),
        LlbOp::Build(_) => Arc::new(build::BuildOperation::new(worker, vertex)?),
    })
}

/// The solver's view of a key.
pub(crate) fn cache_map(key: &OpKey) -> CacheMap {
    CacheMap {
        keys: vec![key.digest],
        subject: key.subject.clone(),
        deps: key.deps.clone(),
        transient: false,
    }
}

/// Digest of what an input holds where `key` looks.
pub(crate) async fn content_digest(
    worker: &LlbWorker,
    key: &OpKey,
    input: usize,
    value: Option<&LayerRef>,
    cx: &OpContext<LlbWorker>,
) -> OpResult<Digest> {
    let selectors = key.selectors.get(input).cloned().unwrap_or_default();
    let origin = content::origin(value);
    let view = layers::realize_input(worker, cx, input, value).await?;
    Ok(layers::blocking(move |stop| content::digest(&view, &selectors, origin, stop)).await?)
}
