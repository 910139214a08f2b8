//! From values to what the client asked for: all exporters at once, each under a vertex of its own, then all pushes.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_exporter::{
    AttestationContent, AttestationKind, BuildResult as ExportResult, ExportError, ExportProgress, ExportRequest,
    Exported as ExportedImage, Exporter, Refs, ResultPlatform, StatusUpdate,
};
use kiln_frontend::bridge::ResultRefs;
use kiln_llb::VertexDigest;
use kiln_oci::Digest;
use kiln_proto::control::{Descriptor, Exporter as WireExporter, SolveRequest};
use kiln_session::Session;
use kiln_solver::progress::VertexProgress;
use kiln_solver::{Reporter, StatusHandle};
use kiln_store::{RealizeCtx, StoreError, Tenant};
use kiln_worker::Ref;
use tonic::Code;

use crate::Daemon;
use crate::attest::Statements;
use crate::bridge::BuildBridge;
use crate::builds::{Build, BuildResult};
use crate::history::descriptor;
use crate::status::WireError;

/// A build's session is there, or about to be.
const WAIT_FOR_SESSION: Duration = Duration::from_secs(5);

/// What came out of all exporters.
#[derive(Debug, Default)]
pub struct Exported {
    /// Entries of the response; where several exporters write one, the later wins.
    pub response: BTreeMap<String, String>,
    /// Roots of images by exporter.
    pub results: BTreeMap<i64, Descriptor>,
    /// Documents that the build record keeps.
    pub kept: Vec<Descriptor>,
}

/// Refuses an exporter that does not exist or has bad attributes, before anything is built.
pub fn check(exporter: &WireExporter) -> Result<(), WireError> {
    Exporter::new(&exporter.r#type, &exporter.attrs)
        .map(drop)
        .map_err(|e| export_error(&e))
}

/// The result in the exporters' terms, without statements of the daemon.
pub async fn result(bridge: &BuildBridge, result: &BuildResult, values: Vec<Ref>) -> Result<ExportResult, WireError> {
    let refs = match &result.refs {
        ResultRefs::Single(_) => Refs::Single(values.into_iter().next().flatten()),
        ResultRefs::ByPlatform(refs) => Refs::ByPlatform(refs.iter().map(|(id, _)| id.clone()).zip(values).collect()),
    };
    let mut attestations: BTreeMap<String, Vec<kiln_exporter::Attestation>> = BTreeMap::new();
    for (platform, list) in &result.attestations {
        for a in list {
            let Some(reference) = &a.reference else { continue };
            let Some(layer) = bridge.evaluate(reference).await? else {
                continue;
            };
            let text = |(k, v): (&String, &bytes::Bytes)| (k.clone(), String::from_utf8_lossy(v).into_owned());
            attestations
                .entry(platform.clone())
                .or_default()
                .push(kiln_exporter::Attestation {
                    kind: if a.bundle {
                        AttestationKind::Bundle
                    } else {
                        AttestationKind::InToto
                    },
                    content: AttestationContent::Layer(layer),
                    path: a.path.clone(),
                    predicate_type: a.predicate_type.clone(),
                    subjects: Vec::new(),
                    metadata: a.metadata.iter().map(text).collect(),
                });
        }
    }
    Ok(ExportResult {
        refs,
        metadata: result.metadata.iter().map(|(k, v)| (k.clone(), v.to_vec())).collect(),
        attestations,
        inline_cache: BTreeMap::new(),
    })
}

/// The platforms of a result, at least one.
pub fn platforms(result: &ExportResult) -> Result<Vec<ResultPlatform>, WireError> {
    result.platforms().map_err(|e| export_error(&e))
}

/// Runs every exporter of the request.
pub async fn run(
    daemon: &Arc<Daemon>,
    build: &Arc<Build>,
    request: &SolveRequest,
    mut result: ExportResult,
    statements: &Statements,
) -> Result<Exported, WireError> {
    for (platform, attestation) in &statements.attached {
        result
            .attestations
            .entry(platform.clone())
            .or_default()
            .push(attestation.clone());
    }
    let session = session(daemon, build, request).await;
    let exports = request.exporters.iter().enumerate().map(|(index, exporter)| {
        let (result, session) = (&result, session.clone());
        async move { one(daemon, build, index, exporter, result, session).await }
    });
    let finished = futures::future::try_join_all(exports).await?;
    // Pushing begins when every export has got through.
    futures::future::try_join_all(finished.iter().map(Finished::push)).await?;
    let mut out = Exported::default();
    for metadata in result.metadata.iter().filter(|(k, _)| k.starts_with("frontend.")) {
        out.response
            .insert(metadata.0.clone(), String::from_utf8_lossy(metadata.1).into_owned());
    }
    for (index, finished) in finished.into_iter().enumerate() {
        out.response.extend(finished.exported.response.clone());
        if let Some(root) = &finished.exported.descriptor {
            let root = descriptor(&root.media_type, root.digest, root.size, root.annotations.clone());
            out.results.insert(i64::try_from(index).unwrap_or(i64::MAX), root);
        }
        for lease in &finished.exported.leases {
            let kept = lease.descriptor();
            out.kept
                .push(descriptor(&kept.media_type, kept.digest, kept.size, BTreeMap::new()));
        }
    }
    Ok(out)
}

async fn session(daemon: &Daemon, build: &Build, request: &SolveRequest) -> Option<Session> {
    if request.exporters.is_empty() || build.session.as_str().is_empty() {
        return None;
    }
    daemon.sessions.get_within(&build.session, WAIT_FOR_SESSION).await.ok()
}

struct Finished {
    exported: ExportedImage,
    reporter: Reporter,
}

impl Finished {
    /// The second phase, under the same vertex, which starts and completes once more.
    async fn push(&self) -> Result<(), WireError> {
        if !self.exported.is_pending() {
            return Ok(());
        }
        self.reporter.start();
        let pushed = self.exported.finalize().await.map_err(|e| export_error(&e));
        self.reporter.complete(pushed.as_ref().err().map(|e| e.message.clone()));
        pushed
    }
}

async fn one(
    daemon: &Daemon,
    build: &Build,
    index: usize,
    wire: &WireExporter,
    result: &ExportResult,
    session: Option<Session>,
) -> Result<Finished, WireError> {
    let exporter = Exporter::new(&wire.r#type, &wire.attrs).map_err(|e| export_error(&e))?;
    let digest = VertexDigest(Digest::of(format!("{}-export-{index}", build.session.as_str())));
    let vertex = VertexProgress::new(digest, exporter.vertex_name(), Vec::new());
    let reporter = build.progress.vertex(vertex);
    let request = ExportRequest {
        index,
        session,
        registry: build.client.registry.clone(),
        content: daemon.store().content(&Tenant::default()),
        realize: RealizeCtx::default(),
        progress: Arc::new(Statuses::new(reporter.clone())),
    };
    let exported = exporter.export(result, &request).await.map_err(|e| export_error(&e));
    reporter.complete(exported.as_ref().err().map(|e| e.message.clone()));
    Ok(Finished {
        exported: exported?,
        reporter,
    })
}

/// Shows an exporter's statuses under its vertex.
struct Statuses {
    reporter: Reporter,
    open: Mutex<BTreeMap<String, StatusHandle>>,
}

impl Statuses {
    fn new(reporter: Reporter) -> Self {
        Self {
            reporter,
            open: Mutex::default(),
        }
    }
}

impl ExportProgress for Statuses {
    fn status(&self, update: StatusUpdate) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let id = update.id.clone();
        let handle = open
            .entry(id.clone())
            .or_insert_with(|| self.reporter.status(id.as_str()));
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        if update.current > 0 || update.total > 0 {
            handle.set(number(update.current), number(update.total));
        }
        if update.completed.is_some() {
            // Dropping the handle completes the status.
            open.remove(&id);
        }
    }
}

/// An exporter's error with its whole chain as one text.
fn export_error(error: &ExportError) -> WireError {
    let code = match error {
        ExportError::Store(StoreError::Canceled) => Code::Cancelled,
        ExportError::Invalid(_) => Code::InvalidArgument,
        ExportError::Session(_) => Code::Unavailable,
        ExportError::Store(_) | ExportError::Io { .. } => Code::Internal,
        _ => Code::Unknown,
    };
    WireError::new(code, chain(error))
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        // A transparent wrapper says what its cause says.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = cause.source();
    }
    text
}
