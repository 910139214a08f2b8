//! `BuildOp`: solves a definition that a file of an input holds, within the build that asks for it.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_llb::op::{BuildOp, Op as LlbOp};
use kiln_llb::wire::definition_from_bytes;
use kiln_llb::{Graph, Vertex};
use kiln_oci::Digest;
use kiln_solver::{CacheMap, ExecFailure, Op, OpContext, WorkerError as _};
use kiln_store::LayerRef;

use crate::error::{OpError, OpResult};
use crate::key::{OpKey, build_key};
use crate::layers::{blocking, realize_input};
use crate::worker::LlbWorker;

/// Name of the input that holds the definition.
const DEFINITION_INPUT: &str = "buildkit.llb.definition";
/// Attribute with the path of the definition in it.
const FILENAME: &str = "llbbuild.filename";
/// The file's name unless the attribute says otherwise.
const DEFAULT_FILENAME: &str = "/buildkit.llb.definition";
/// No definition may be longer.
const MAX_DEFINITION: u64 = 64 << 20;

/// A nested build.
#[derive(Debug)]
pub struct BuildOperation {
    worker: LlbWorker,
    op: BuildOp,
    key: OpKey,
}

impl BuildOperation {
    /// The nested build behind a vertex.
    pub fn new(worker: LlbWorker, vertex: Arc<Vertex>) -> Result<Self, OpError> {
        let LlbOp::Build(op) = &vertex.op else {
            return Err(OpError::internal("not a build".into()));
        };
        Ok(Self {
            worker,
            key: build_key(op, vertex.inputs.len()),
            op: op.clone(),
        })
    }
}

#[async_trait]
impl Op<LlbWorker> for BuildOperation {
    async fn cache_map(&self, _cx: &OpContext<LlbWorker>) -> Result<CacheMap, OpError> {
        Ok(super::cache_map(&self.key))
    }

    async fn content_digest(
        &self,
        _input: usize,
        _value: &Option<LayerRef>,
        _cx: &OpContext<LlbWorker>,
    ) -> OpResult<Digest> {
        Err(OpError::internal("a nested build is not keyed by content".into()).into())
    }

    async fn exec(&self, inputs: &[Option<LayerRef>], cx: &OpContext<LlbWorker>) -> OpResult<Vec<Option<LayerRef>>> {
        let index = self.op.inputs.get(DEFINITION_INPUT).copied().flatten();
        let index = index.ok_or_else(|| OpError::user(format!("no {DEFINITION_INPUT} input found")))? as usize;
        let view = realize_input(&self.worker, cx, index, inputs.get(index).and_then(Option::as_ref)).await?;
        let path = self
            .op
            .attrs
            .get(FILENAME)
            .map_or(DEFAULT_FILENAME, String::as_str)
            .to_owned();
        let name = path.clone();
        let bytes = blocking(move |_| view.read(path.as_bytes(), MAX_DEFINITION))
            .await?
            .ok_or_else(|| OpError::missing(format!("failed to read definition {name}: no such file")))?;
        let invalid = |e: &dyn std::fmt::Display| OpError::user(format!("failed to parse definition {name}: {e}"));
        let definition = definition_from_bytes(&bytes).map_err(|e| invalid(&e))?;
        let graph = Graph::load(&definition).map_err(|e| invalid(&e))?;
        match cx.solve(&graph).await {
            Ok(value) => Ok(vec![value.flatten()]),
            Err(error) => Err(ExecFailure::Failed(nested(&error))),
        }
    }
}

/// The error of a vertex of the nested build as one of the vertex that asked for it.
fn nested(error: &kiln_solver::SolveError<OpError>) -> OpError {
    let own = match error.source.exit_code() {
        Some(code) => OpError::exit(error.to_string(), code),
        None => OpError::new(error.kind(), error.to_string()),
    };
    let own = own.because(error.clone());
    if kiln_solver::WorkerError::is_personal(error.source.as_ref()) {
        own.personal()
    } else {
        own
    }
}
