//! What a frontend may ask of a build: [`Bridge`] over a job. Adds to errors where in the user's text they arose.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use kiln_frontend::bridge::{
    Bridge, BridgeError, BridgeErrorKind, BridgeInfo, FileStat, Frontend as _, FrontendResult, ResolveImageOptions,
    ResolvedImage, ResultRefs, SolveRequest, SourceMeta, SourceSpec, Warning, WorkerInfo,
};
use kiln_frontend::{DockerfileFrontend, FrontendError};
use kiln_llb::{Definition, Graph, SourcePosition, SourceRange, VertexDigest};
use kiln_oci::{Digest, Platform};
use kiln_proto::{Timestamp, gateway as pb};
use kiln_solver::progress::VertexProgress;
use kiln_solver::{ErrorKind, Reporter, SolveError, WorkerError as _};
use kiln_worker::{OpError, RemoteMeta};
use tonic::Code;

use crate::Daemon;
use crate::builds::{Build, BuildRef, BuildResult};
use crate::gateway::wire_error;
use crate::status::{WireError, exit_detail, frontend_cap_detail, source_detail, subrequest_detail, vertex_detail};

/// A build as a frontend sees it.
#[derive(Clone)]
pub struct BuildBridge {
    daemon: Arc<Daemon>,
    build: Arc<Build>,
    /// Inputs of the frontend that asks; they differ where one frontend calls another.
    inputs: Arc<BTreeMap<String, Definition>>,
}

impl std::fmt::Debug for BuildBridge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BuildBridge({})", self.build.reference)
    }
}

impl BuildBridge {
    /// The bridge of a build, with the inputs of its request.
    pub fn new(daemon: Arc<Daemon>, build: Arc<Build>) -> Self {
        let inputs = Arc::new(build.inputs.clone());
        Self { daemon, build, inputs }
    }

    /// The build.
    pub fn build(&self) -> &Arc<Build> {
        &self.build
    }

    /// Checks a definition and makes a lazy result of it; `None` for the empty one.
    pub fn load(&self, definition: Definition) -> Result<Option<BuildRef>, WireError> {
        let graph = Graph::load(&definition).map_err(|e| {
            let error = WireError::invalid(e.to_string());
            match e.vertex() {
                Some(vertex) => self.locate(error, &definition, &vertex),
                None => error,
            }
        })?;
        self.build.entitlements.check(&graph)?;
        if graph.root().is_none() {
            return Ok(None);
        }
        Ok(Some(BuildRef {
            definition: Arc::new(definition),
            graph,
        }))
    }

    fn locate(&self, mut error: WireError, definition: &Definition, vertex: &VertexDigest) -> WireError {
        error.details.push(vertex_detail(vertex));
        for (info, ranges) in definition.source_map.locate(vertex) {
            error.details.push(source_detail(info, ranges));
        }
        error
    }

    /// Makes a result real.
    pub async fn evaluate(&self, reference: &BuildRef) -> Result<kiln_worker::Ref, WireError> {
        let Some(root) = reference.graph.root() else {
            return Err(WireError::new(Code::Internal, "a result without a root"));
        };
        match self.build.job()?.result(&reference.graph, root).await {
            Ok(solved) => Ok(solved.value),
            Err(error) => Err(self.solve_error(&reference.definition, &error)),
        }
    }

    /// Adds where in the graph and where in the text.
    fn solve_error(&self, definition: &Definition, error: &SolveError<OpError>) -> WireError {
        let source = error.source.as_ref();
        let mut wire = op_error(source);
        if let Some(code) = source.exit_code() {
            wire.details.push(exit_detail(code, &wire.message));
        }
        self.locate(wire, definition, &error.vertex)
    }

    /// Runs a step of the daemon under a vertex of its own.
    pub async fn shown<T, E: std::fmt::Display>(
        &self,
        name: &str,
        work: impl AsyncFnOnce(&Reporter) -> Result<T, E>,
    ) -> Result<T, E> {
        // The same name is the same line.
        let digest = VertexDigest(Digest::of(format!("{}:{name}", self.build.reference)));
        let reporter = self
            .build
            .progress
            .vertex(VertexProgress::new(digest, name, Vec::new()));
        let result = work(&reporter).await;
        reporter.complete(result.as_ref().err().map(ToString::to_string));
        result
    }

    /// Metadata of a git or http source in the form that goes on the wire.
    pub async fn resolve_remote(
        &self,
        spec: SourceSpec,
        log_name: &str,
        return_object: bool,
    ) -> Result<pb::ResolveSourceMetaResponse, BridgeError> {
        let name = if log_name.is_empty() {
            format!("resolve {}", spec.identifier)
        } else {
            log_name.to_owned()
        };
        let meta = self
            .shown(&name, async |reporter| {
                let client = &self.build.client;
                self.daemon
                    .worker()
                    .resolve_remote(client, &spec.identifier, &spec.attrs, return_object, reporter)
                    .await
            })
            .await
            .map_err(bridge_error)?;
        let mut response = pb::ResolveSourceMetaResponse {
            source: Some(kiln_proto::llb::SourceOp {
                identifier: spec.identifier,
                attrs: spec.attrs,
            }),
            ..Default::default()
        };
        match meta {
            RemoteMeta::None => {}
            RemoteMeta::Git(git) => {
                response.git = Some(pb::ResolveSourceGitResponse {
                    checksum: git.checksum,
                    r#ref: git.reference,
                    commit_checksum: git.commit_checksum,
                    commit_object: git.commit_object.unwrap_or_default(),
                    tag_object: git.tag_object.unwrap_or_default(),
                });
            }
            RemoteMeta::Http(http) => {
                response.http = Some(pb::ResolveSourceHttpResponse {
                    checksum: http.checksum.to_string(),
                    filename: http.filename,
                    last_modified: http.last_modified.map(|seconds| Timestamp { seconds, nanos: 0 }),
                    checksum_response: None,
                });
            }
        }
        Ok(response)
    }

    /// A warning as a client sends it.
    pub fn warn_from_client(&self, request: pb::WarnRequest) -> Result<(), WireError> {
        let vertex = request
            .digest
            .parse()
            .map_err(|e| WireError::invalid(format!("invalid vertex: {e}")))?;
        let text = |b: &Bytes| String::from_utf8_lossy(b).into_owned();
        let range = |r: &kiln_proto::llb::Range| {
            let at = |p: &Option<kiln_proto::llb::Position>| {
                p.as_ref()
                    .map(|p| SourcePosition {
                        line: p.line,
                        character: p.character,
                    })
                    .unwrap_or_default()
            };
            SourceRange {
                start: at(&r.start),
                end: at(&r.end),
            }
        };
        self.build.progress.warn(kiln_solver::progress::Warning {
            vertex: Some(vertex),
            level: request.level,
            short: text(&request.short),
            detail: request.detail.iter().map(text).collect(),
            url: request.url,
            info: request.info.map(|i| kiln_llb::SourceInfo {
                filename: i.filename,
                data: i.data,
                definition: None,
                language: i.language,
            }),
            ranges: request.ranges.iter().map(range).collect(),
        });
        Ok(())
    }

    /// Runs a frontend by name.
    async fn frontend(&self, request: &SolveRequest) -> Result<BuildResult, WireError> {
        let mut attrs = request.frontend_attrs.clone();
        self.build.trail.frontend(&request.frontend, &attrs);
        match request.frontend.as_str() {
            "dockerfile.v0" => {}
            "gateway.v0" => {
                let source = attrs.remove("source").unwrap_or_default();
                if source.is_empty() {
                    return Err(WireError::invalid("no source specified for gateway"));
                }
                if source != "dockerfile.v0" && !is_official_dockerfile(&source) {
                    return Err(WireError::new(
                        Code::Unimplemented,
                        format!(
                            "frontend image {source} cannot be run: this daemon serves docker/dockerfile with its \
                             built-in frontend and does not run other frontend images yet"
                        ),
                    ));
                }
                // Served by the built-in frontend, which must not forward to itself again.
                attrs.entry("cmdline".to_owned()).or_insert(source);
            }
            other => {
                return Err(WireError::new(
                    Code::Unknown,
                    format!("no frontend named {other} found"),
                ));
            }
        }
        if !self.daemon.config.dockerfile_frontend {
            return Err(WireError::new(
                Code::Unknown,
                "the frontend dockerfile.v0 is disabled by configuration",
            ));
        }
        let bridge = Self {
            inputs: Arc::new(request.frontend_inputs.clone()),
            ..self.clone()
        };
        DockerfileFrontend::default()
            .run(&bridge, &attrs)
            .await
            .map_err(|e| frontend_error(&e))
    }
}

/// Official names of the Dockerfile frontend, any tag: `docker/dockerfile`, `docker/dockerfile-upstream`, and the same with
/// Docker Hub's host before them.
fn is_official_dockerfile(source: &str) -> bool {
    let name = source.split_once('@').map_or(source, |(name, _)| name);
    let name = name
        .strip_prefix("docker.io/")
        .or_else(|| name.strip_prefix("index.docker.io/"))
        .unwrap_or(name);
    let name = name.split_once(':').map_or(name, |(name, _)| name);
    matches!(name, "docker/dockerfile" | "docker/dockerfile-upstream")
}

/// An operation's error without the place.
pub fn op_error(error: &OpError) -> WireError {
    // Go's clients print any other code in front of the text, and read Unavailable as a daemon that is not there.
    let code = match error.kind() {
        ErrorKind::Canceled => Code::Cancelled,
        ErrorKind::Unavailable | ErrorKind::Internal | ErrorKind::User => Code::Unknown,
    };
    let mut wire = WireError::new(code, error.to_string());
    if error.kind() == ErrorKind::Canceled && !wire.message.ends_with("context canceled") {
        wire.message.push_str(": context canceled");
    }
    wire
}

/// A frontend's error with all its places.
fn frontend_error(error: &FrontendError) -> WireError {
    match error {
        FrontendError::Dockerfile { error, file } => {
            let mut wire = match error.cause() {
                Some(cause) => WireError {
                    message: error.message().to_owned(),
                    ..wire_error(cause)
                },
                None => WireError::new(Code::Unknown, error.message()),
            };
            if let Some(file) = file {
                for span in error.spans() {
                    wire.details.push(source_detail(file, &ranges(span)));
                }
            }
            wire
        }
        FrontendError::UnsupportedCapability(id) => {
            WireError::new(Code::Unimplemented, error.to_string()).with(frontend_cap_detail(id))
        }
        FrontendError::UnsupportedRequest(id) => {
            WireError::new(Code::Unimplemented, error.to_string()).with(subrequest_detail(id))
        }
    }
}

fn ranges(span: &kiln_frontend::dockerfile::span::Span) -> Vec<SourceRange> {
    span.iter()
        .map(|line| {
            let at = SourcePosition {
                line: i32::try_from(line).unwrap_or(i32::MAX),
                character: 0,
            };
            SourceRange { start: at, end: at }
        })
        .collect()
}

fn bridge_error(error: OpError) -> BridgeError {
    let kind = match error.kind() {
        ErrorKind::Canceled => BridgeErrorKind::Canceled,
        _ if error.is_not_found() => BridgeErrorKind::NotFound,
        _ => BridgeErrorKind::Other,
    };
    from_wire(op_error(&error)).with_kind(kind)
}

fn from_wire(error: WireError) -> BridgeError {
    let kind = match error.code {
        Code::Cancelled => BridgeErrorKind::Canceled,
        Code::NotFound => BridgeErrorKind::NotFound,
        _ => BridgeErrorKind::Other,
    };
    BridgeError::new(error.message.clone())
        .with_kind(kind)
        .with_source(error)
}

fn not_found(path: &str) -> BridgeError {
    BridgeError::new(format!("open {path}: no such file or directory")).with_kind(BridgeErrorKind::NotFound)
}

#[async_trait]
impl Bridge for BuildBridge {
    type Ref = BuildRef;

    async fn ping(&self) -> Result<BridgeInfo, BridgeError> {
        let ids = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<BTreeSet<_>>();
        Ok(BridgeInfo {
            frontend_caps: ids(kiln_llb::caps::FRONTEND_CAPS),
            llb_caps: ids(kiln_llb::caps::LLB_CAPS),
            workers: vec![WorkerInfo {
                id: self.daemon.worker_id.clone(),
                platforms: self.daemon.platforms.clone(),
            }],
            session_id: self.build.session.as_str().to_owned(),
        })
    }

    async fn solve(&self, request: SolveRequest) -> Result<FrontendResult<BuildRef>, BridgeError> {
        let result = if request.frontend.is_empty() {
            let reference = match request.definition {
                Some(definition) => self.load(definition).map_err(from_wire)?,
                None => None,
            };
            FrontendResult {
                refs: ResultRefs::Single(reference),
                ..Default::default()
            }
        } else {
            self.frontend(&request).await.map_err(from_wire)?
        };
        if request.evaluate {
            self.evaluate_all(&result).await.map_err(from_wire)?;
        }
        Ok(result)
    }

    async fn read_file(
        &self,
        reference: Option<&BuildRef>,
        path: &str,
        range: Option<(u64, u64)>,
    ) -> Result<Bytes, BridgeError> {
        let Some(reference) = reference else {
            return Err(not_found(path));
        };
        let value = self.evaluate(reference).await.map_err(from_wire)?;
        self.daemon
            .worker()
            .read_file(&self.build.client, &value, path, range)
            .await
            .map_err(bridge_error)
    }

    async fn read_dir(
        &self,
        reference: Option<&BuildRef>,
        path: &str,
        include: Option<&str>,
    ) -> Result<Vec<FileStat>, BridgeError> {
        let Some(reference) = reference else {
            return Err(not_found(path));
        };
        let value = self.evaluate(reference).await.map_err(from_wire)?;
        let client = &self.build.client;
        let entries = self
            .daemon
            .worker()
            .read_dir(client, &value, path, include)
            .await
            .map_err(bridge_error)?;
        Ok(entries.into_iter().map(file_stat).collect())
    }

    async fn stat_file(&self, reference: Option<&BuildRef>, path: &str) -> Result<FileStat, BridgeError> {
        let Some(reference) = reference else {
            return Err(not_found(path));
        };
        let value = self.evaluate(reference).await.map_err(from_wire)?;
        let found = self.daemon.worker().stat_file(&self.build.client, &value, path).await;
        found.map(file_stat).map_err(bridge_error)
    }

    async fn resolve_image_config(
        &self,
        reference: &str,
        options: ResolveImageOptions,
    ) -> Result<ResolvedImage, BridgeError> {
        let name = if options.log_name.is_empty() {
            format!("[internal] load metadata for {reference}")
        } else {
            options.log_name.clone()
        };
        let found = self
            .build
            .trail
            .image(reference, &options, async || {
                self.shown(&name, async |reporter| {
                    let store = options
                        .store
                        .as_ref()
                        .map(|s| (s.session_id.as_str(), s.store_id.as_str()));
                    let platform: Option<&Platform> = options.platform.as_ref();
                    let client = &self.build.client;
                    let worker = self.daemon.worker();
                    worker
                        .resolve_image(client, reference, platform, &options.resolve_mode, store, reporter)
                        .await
                })
                .await
            })
            .await
            .map_err(|e| from_wire(op_error(&e)))?;
        Ok(ResolvedImage {
            reference: found.reference.clone(),
            digest: found.digest.to_string(),
            config: found.config.clone(),
        })
    }

    async fn resolve_source_meta(
        &self,
        source: SourceSpec,
        log_name: &str,
        return_object: bool,
    ) -> Result<SourceMeta, BridgeError> {
        let response = self.resolve_remote(source, log_name, return_object).await?;
        Ok(SourceMeta {
            source: response.source.map(|s| SourceSpec {
                identifier: s.identifier,
                attrs: s.attrs,
            }),
            git_commit_object: response.git.map(|g| g.commit_object).filter(|b| !b.is_empty()),
            http_last_modified: response.http.and_then(|h| h.last_modified).map(|t| t.seconds),
        })
    }

    async fn warn(&self, vertex: VertexDigest, warning: Warning) -> Result<(), BridgeError> {
        self.build.progress.warn(kiln_solver::progress::Warning {
            vertex: Some(vertex),
            level: warning.level,
            short: warning.short,
            detail: warning.detail,
            url: warning.url,
            info: warning.file.as_deref().cloned(),
            ranges: ranges(&warning.span),
        });
        Ok(())
    }

    async fn inputs(&self) -> Result<BTreeMap<String, Definition>, BridgeError> {
        Ok(self.inputs.as_ref().clone())
    }
}

impl BuildBridge {
    /// Makes all file systems of a result real, all at once; the first error ends it.
    pub async fn evaluate_all(&self, result: &BuildResult) -> Result<Vec<kiln_worker::Ref>, WireError> {
        let one = async |r: &Option<BuildRef>| match r {
            Some(r) => self.evaluate(r).await,
            None => Ok(None),
        };
        match &result.refs {
            ResultRefs::Single(r) => Ok(vec![one(r).await?]),
            ResultRefs::ByPlatform(refs) => futures::future::try_join_all(refs.iter().map(|(_, r)| one(r))).await,
        }
    }
}

fn file_stat(e: kiln_worker::FileInfo) -> FileStat {
    FileStat {
        path: e.path,
        mode: e.mode,
        uid: e.uid,
        gid: e.gid,
        size: e.size,
        mod_time: e.mod_time,
        linkname: e.linkname,
    }
}

#[cfg(test)]
mod tests {
    use super::is_official_dockerfile;

    #[test]
    fn official_names_of_the_dockerfile_frontend() {
        for yes in [
            "docker/dockerfile",
            "docker/dockerfile:1",
            "docker.io/docker/dockerfile:1.7-labs",
            "docker/dockerfile-upstream:master",
            "docker/dockerfile:1@sha256:abc",
        ] {
            assert!(is_official_dockerfile(yes), "{yes}");
        }
        for no in [
            "docker/dockerfile2",
            "example.com/docker/dockerfile",
            "me/dockerfile:1",
            "",
        ] {
            assert!(!is_official_dockerfile(no), "{no}");
        }
    }
}
