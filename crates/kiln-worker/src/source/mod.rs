//! Where things come from that are not made by another vertex: one file per kind of source.

use std::sync::Arc;

use async_trait::async_trait;
use kiln_llb::Vertex;
use kiln_llb::op::SourceOp;
use kiln_solver::OpContext;
use kiln_store::LayerRef;

use crate::error::{OpError, OpResult};
use crate::worker::LlbWorker;

/// A kind of source.
pub trait Source: Send + Sync + 'static {
    /// The schemes of identifiers it serves, without `://`.
    fn schemes(&self) -> &'static [&'static str];

    /// The source behind an operation. Checks identifier and attributes; no I/O.
    fn open(&self, worker: &LlbWorker, vertex: &Arc<Vertex>, op: &SourceOp)
    -> Result<Box<dyn SourceInstance>, OpError>;
}

/// One source of one vertex.
#[async_trait]
pub trait SourceInstance: Send + Sync {
    /// Finds out what the source stands for at the moment. Called once, before [`fetch`](Self::fetch); what it finds out
    /// (manifest, commit) it may keep. It also tells every client of `cx` what it found ([`crate::Client::offer`],
    /// [`crate::Client::pin`]).
    async fn key(&self, cx: &OpContext<LlbWorker>) -> Result<SourceKey, OpError>;

    /// What it stands for, as a layer that may be lazy. Takes a permit if it transfers anything.
    async fn fetch(&self, cx: &OpContext<LlbWorker>) -> OpResult<Option<LayerRef>>;
}

/// What a source's keys are made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceKey {
    /// The texts that [`crate::key::source_digest`] is taken over, the canonical one last. An image has two.
    pub keys: Vec<String>,
    /// They mean nothing beyond the client's session.
    pub transient: bool,
}

mod asker;
mod file_layer;
pub mod git;
mod git_remote;
pub mod http;
pub mod image;
pub mod local;
mod local_listing;
mod manifest;
pub mod oci_layout;
pub mod remote;

pub(crate) use asker::Asker;

/// Every kind of source there is.
static ALL: [&dyn Source; 6] = [
    &local::LocalSource,
    &git::GitSource,
    &http::HttpSource,
    &image::ImageSource,
    &image::ImageBlobSource,
    &oci_layout::OciLayoutSource,
];

/// The source that serves a scheme.
pub(crate) fn of(scheme: &str) -> Option<&'static dyn Source> {
    ALL.iter().copied().find(|s| s.schemes().contains(&scheme))
}
