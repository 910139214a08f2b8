//! The operations, one file each.

pub mod exec;

use std::sync::Arc;

use kiln_llb::{Op as LlbOp, Vertex};
use kiln_solver::Op;

use crate::error::{OpError, Result};
use crate::worker::{LlbWorker, Shared};

/// The operation behind a vertex.
pub(crate) fn op(_shared: &Arc<Shared>, vertex: &Arc<Vertex>) -> Result<Arc<dyn Op<LlbWorker>>> {
    // Each room member adds the arm of its operation.
    match &vertex.op {
        LlbOp::Exec(_) => Err(OpError::user("exec operations are not available")),
        LlbOp::File(_) => Err(OpError::user("file operations are not available")),
        LlbOp::Merge(_) => Err(OpError::user("merge operations are not available")),
        LlbOp::Diff(_) => Err(OpError::user("diff operations are not available")),
        LlbOp::Passthrough(_) => Err(OpError::user("passthrough operations are not available")),
        LlbOp::Source(_) => Err(OpError::user("source operations are not available")),
        LlbOp::Build(_) => Err(OpError::user("build operations are not available")),
    }
}
