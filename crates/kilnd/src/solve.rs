//! One build from request to response: wait for what it ends in, make it real, export it, record it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use kiln_frontend::bridge::{Bridge as _, SolveRequest as FrontendRequest};
use kiln_llb::wire::definition_from_proto;
use kiln_oci::Digest;
use kiln_proto::control::{BuildHistoryRecord, Descriptor, Exporter, SolveRequest, SolveResponse};
use kiln_session::SessionId;
use kiln_solver::{JobId, JobSpec, Tenant};
use prost::Message as _;
use tokio::task::JoinHandle;
use tonic::Code;

use crate::Daemon;
use crate::admission::Entitlements;
use crate::bridge::BuildBridge;
use crate::builds::{Build, BuildResult, NewBuild, already_exists};
use crate::control::blocking;
use crate::export::{self, Exported};
use crate::gateway::wire_error;
use crate::history::{self, HistoryBlob};
use crate::progress::{Counter, record, timestamp};
use crate::spool;
use crate::status::WireError;

/// Versions of the compatibility level that exist.
const COMPATIBILITY: &[i64] = &[0, 10, 20, 30];

/// Carries a build out. Dropping the future gives the build up; it is recorded all the same.
pub async fn solve(daemon: &Arc<Daemon>, mut request: SolveRequest) -> Result<SolveResponse, WireError> {
    if request.exporters.is_empty() && !request.exporter_deprecated.is_empty() {
        request.exporters.push(Exporter {
            r#type: std::mem::take(&mut request.exporter_deprecated),
            attrs: std::mem::take(&mut request.exporter_attrs_deprecated),
        });
    }
    check(daemon, &request)?;
    daemon.before_build();
    let (build, recorder) = begin(daemon, &request)?;
    let registered = daemon.builds.register(Arc::clone(&build))?;
    let give_up = build.canceled.clone().drop_guard();
    // On a task of its own: what follows the build must happen even when the client is gone.
    let task = tokio::spawn(finish(Arc::clone(daemon), request, build, recorder));
    let outcome = task.await;
    drop(give_up.disarm());
    drop(registered);
    match outcome {
        Ok(result) => result,
        Err(error) => Err(WireError::new(Code::Internal, format!("the build died: {error}"))),
    }
}

fn check(daemon: &Daemon, request: &SolveRequest) -> Result<(), WireError> {
    if request.r#ref.is_empty() {
        return Err(WireError::invalid("a build needs a ref"));
    }
    if daemon.builds.contains(&request.r#ref) {
        return Err(already_exists(&request.r#ref));
    }
    if !COMPATIBILITY.contains(&request.compatibility_version) {
        let version = request.compatibility_version;
        return Err(WireError::invalid(format!(
            "unsupported compatibility version {version}"
        )));
    }
    if request.proxy_network {
        return Err(WireError::new(
            Code::Unimplemented,
            "the policy proxy network is not available",
        ));
    }
    if !request.source_policy_session.is_empty() || request.source_policy.as_ref().is_some_and(|p| !p.rules.is_empty())
    {
        return Err(WireError::new(Code::Unimplemented, "source policies are not available"));
    }
    for exporter in &request.exporters {
        export::check(exporter)?;
    }
    if let Some(cache) = &request.cache
        && let Some(unknown) = cache.exports.first()
    {
        return Err(WireError::new(
            Code::Unimplemented,
            format!(
                "unknown cache exporter: {:?}: caches cannot be exported yet",
                unknown.r#type
            ),
        ));
    }
    Ok(())
}

type Recorder = JoinHandle<std::io::Result<()>>;

fn begin(daemon: &Arc<Daemon>, request: &SolveRequest) -> Result<(Arc<Build>, Recorder), WireError> {
    let entitlements = Entitlements::grant(&request.entitlements, &daemon.config.entitlements)?;
    let inputs = request
        .frontend_inputs
        .iter()
        .map(|(name, def)| {
            Ok((
                name.clone(),
                definition_from_proto(def).map_err(|e| WireError::invalid(e.to_string()))?,
            ))
        })
        .collect::<Result<BTreeMap<_, _>, WireError>>()?;
    let path = daemon.progress_dir().join(crate::random_id());
    let (writer, spool) = spool::create(&path)
        .map_err(|e| WireError::new(Code::Internal, format!("failed to make the progress file: {e}")))?;
    let session = SessionId::new(request.session.clone());
    let job = daemon.solver.job(JobSpec {
        id: JobId::new(request.r#ref.clone()),
        tenant: Tenant::default(),
        client: Arc::new(daemon.client(&session)),
    });
    let counter = Counter::default();
    let recorder = tokio::spawn(record(Arc::clone(job.progress()), writer, counter.clone()));
    let attrs = request.frontend_attrs.clone();
    let reference = request.r#ref.clone();
    let build = Build::new(NewBuild {
        reference,
        job,
        spool,
        counter,
        session,
        attrs,
        inputs,
        entitlements,
    });
    Ok((build, recorder))
}

async fn finish(
    daemon: Arc<Daemon>,
    request: SolveRequest,
    build: Arc<Build>,
    recorder: Recorder,
) -> Result<SolveResponse, WireError> {
    let started = SystemTime::now();
    let mut entry = BuildHistoryRecord {
        r#ref: request.r#ref.clone(),
        frontend: request.frontend.clone(),
        frontend_attrs: request.frontend_attrs.clone(),
        exporters: request.exporters.clone(),
        created_at: Some(timestamp(started)),
        generation: 1,
        ..Default::default()
    };
    if !request.internal {
        daemon.history.started(entry.clone());
    }
    let outcome = tokio::select! {
        biased;
        outcome = run(&daemon, &request, &build, started) => outcome,
        () = build.canceled.cancelled() => Err(WireError::canceled()),
    };
    build.end();
    if let Ok(Err(error)) = recorder.await {
        tracing::error!(build = build.reference, %error, "progress could not be written");
    }
    match &outcome {
        Ok(_) => tracing::info!(build = build.reference, "build completed"),
        Err(e) if e.code == Code::Internal => tracing::error!(build = build.reference, error = %e, "build failed"),
        Err(e) => tracing::info!(build = build.reference, error = %e, "build failed"),
    }
    let log = build.spool.path().to_owned();
    if request.internal {
        // Readers hold the file open; its name is needed no more.
        let _ = std::fs::remove_file(log);
        return outcome.map(|done| SolveResponse {
            exporter_response: done.exported.response,
        });
    }
    let counts = build.counter.steps();
    entry.completed_at = Some(timestamp(SystemTime::now()));
    entry.num_total_steps = counts.total;
    entry.num_cached_steps = counts.cached;
    entry.num_completed_steps = counts.completed;
    entry.num_warnings = counts.warnings;
    let (response, blobs) = match outcome {
        Ok(done) => {
            entry.exporter_response = done.exported.response.clone();
            entry.result = done.info;
            entry.results = done.platforms;
            (
                Ok(SolveResponse {
                    exporter_response: done.exported.response,
                }),
                done.blobs,
            )
        }
        Err(error) => {
            let mut status = error.to_proto();
            let external = status.encode_to_vec();
            status.details.clear();
            entry.error = Some(status);
            let blob = history::descriptor(
                "application/vnd.googeapis.google.rpc.status+proto",
                Digest::of(&external),
                external.len() as u64,
                BTreeMap::new(),
            );
            entry.external_error = Some(blob.clone());
            (Err(error), vec![(blob, HistoryBlob::Bytes(external))])
        }
    };
    let history = daemon.history.clone();
    let stored = blocking(move || {
        store_record(&history, entry, blobs, log)
            .map_err(|e| WireError::new(Code::Internal, format!("failed to store the build record: {e}")))
    })
    .await;
    if let Err(error) = stored {
        // The build itself is what it is.
        tracing::error!(build = build.reference, %error, "build record lost");
    }
    daemon.after_build();
    response
}

fn store_record(
    history: &history::History,
    mut entry: BuildHistoryRecord,
    mut blobs: Vec<(Descriptor, HistoryBlob)>,
    log: PathBuf,
) -> Result<(), kiln_store::StoreError> {
    match history::digest_file(&log) {
        Ok((digest, size)) => {
            let logs = history::descriptor("application/vnd.buildkit.status.v0", digest, size, BTreeMap::new());
            entry.logs = Some(logs.clone());
            blobs.push((logs, HistoryBlob::File(log)));
        }
        // A record without its log is better than none.
        Err(error) => tracing::error!(%error, "the log of a build cannot be read"),
    }
    history.complete(entry, blobs)?;
    history.collect();
    Ok(())
}

/// What a build that succeeded leaves.
struct Done {
    exported: Exported,
    info: Option<kiln_proto::control::BuildResultInfo>,
    platforms: BTreeMap<String, kiln_proto::control::BuildResultInfo>,
    blobs: Vec<(Descriptor, HistoryBlob)>,
}

async fn run(
    daemon: &Arc<Daemon>,
    request: &SolveRequest,
    build: &Arc<Build>,
    started: SystemTime,
) -> Result<Done, WireError> {
    let bridge = BuildBridge::new(Arc::clone(daemon), Arc::clone(build));
    let result = outcome_of(request, &bridge).await?;
    let values = bridge.evaluate_all(&result).await?;
    let finished = export::result(&bridge, &result, values).await?;
    let platforms = export::platforms(&finished)?;
    let statements = crate::attest::statements(daemon, build, &result, &platforms, request, started)?;
    let exported = export::run(daemon, build, request, finished, &statements).await?;
    let (info, platforms, blobs) = crate::attest::history(&statements, &exported);
    Ok(Done {
        exported,
        info,
        platforms,
        blobs,
    })
}

/// What the build ends in: made here if the request says how, else what the client's own frontend returns.
async fn outcome_of(request: &SolveRequest, bridge: &BuildBridge) -> Result<BuildResult, WireError> {
    if request.frontend.is_empty() && request.definition.is_none() {
        return bridge.build().returned().await;
    }
    let definition = request
        .definition
        .as_ref()
        .map(definition_from_proto)
        .transpose()
        .map_err(|e| WireError::invalid(e.to_string()))?;
    let solve = FrontendRequest {
        definition,
        frontend: request.frontend.clone(),
        frontend_attrs: request.frontend_attrs.clone(),
        frontend_inputs: bridge.build().inputs.clone(),
        cache_imports: Vec::new(),
        evaluate: false,
    };
    bridge.solve(solve).await.map_err(|e| wire_error(&e))
}
