//! `kiln build`: one build, on the wire as other clients make it: a session, `Control.Solve` that lives as long as the
//! build, its progress, and beside them the frontend's calls, which end with what the build returns.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use kiln_proto::control::{BytesMessage, CacheOptions, CacheOptionsEntry, Exporter, ListWorkersRequest, StatusRequest};
use kiln_proto::{control, gateway};
use kiln_session::attach::{Attachments, ClientSession, DockerConfig};
use kiln_session::tunnel::{Tunnel, outgoing};
use rand::Rng as _;
use tokio::task::JoinHandle;
use tonic::metadata::MetadataMap;
use tonic::{Request, Status};

use crate::cli::{BuildArgs, ProgressMode};
use crate::connect::Daemon;
use crate::error::{CliError, Result, whole_status};
use crate::options::{self, Cache, Output};
use crate::render::{Display, State};
use crate::report;

/// Metadata key by which calls of the frontend find their build.
const BUILD_ID: &str = "buildkit-controlapi-buildid";

/// How long the last news are waited for once the build is over.
const LAST_NEWS: Duration = Duration::from_secs(5);

/// A build as it goes to the daemon.
struct Plan {
    attachments: Attachments,
    attrs: BTreeMap<String, String>,
    exporters: Vec<Exporter>,
    imports: Vec<Cache>,
    exports: Vec<Cache>,
    entitlements: Vec<String>,
}

pub(super) async fn run(args: BuildArgs, daemon: &Daemon) -> Result<()> {
    daemon
        .control()
        .list_workers(ListWorkersRequest { filter: Vec::new() })
        .await?;
    let plan = plan(&args)?;
    let exports = plan.exports.clone();
    let reference = fresh_id();
    let mode = if args.quiet { ProgressMode::Quiet } else { args.progress };
    let mut state = State::default();
    let response = build(daemon, plan, &reference, &mut Display::new(mode), &mut state).await?;
    if let Some(descriptor) = response.get("cache.manifest") {
        for cache in exports.iter().filter(|cache| cache.kind == "local") {
            options::file_local_cache(cache, descriptor)?;
        }
    }
    if let Some(path) = &args.metadata_file {
        std::fs::write(path, report::metadata(&response, &reference))
            .map_err(|error| CliError::io(format!("write {}", path.display()), error))?;
    }
    finish(&args, daemon, &response, &state).await
}

/// The closing lines, on standard error if the result itself went to standard output.
async fn finish(args: &BuildArgs, daemon: &Daemon, response: &BTreeMap<String, String>, state: &State) -> Result<()> {
    let digest = response.get("containerimage.digest");
    let on_stdout = args
        .output
        .iter()
        .any(|output| output == "-" || output.contains("dest=-"));
    if args.quiet {
        let digest = response.get("containerimage.config.digest").or(digest);
        return match digest {
            Some(digest) if !on_stdout => super::print(&format!("{digest}\n")),
            _ => Ok(()),
        };
    }
    for warning in &state.warnings {
        say(&format!("warning: {warning}\n"));
    }
    let size = match digest {
        Some(digest) => report::image_size(daemon, digest).await,
        None => None,
    };
    let stages = response.get("kiln.stages.bytes").and_then(|text| text.parse().ok());
    let text = report::summary(response, size.as_ref(), stages, state.counts());
    if on_stdout {
        say(&text);
        return Ok(());
    }
    super::print(&text)
}

fn say(text: &str) {
    use std::io::Write as _;
    let _closed = io::stderr().write_all(text.as_bytes());
}

/// 25 characters of lower-case base 36, as other clients name their builds and sessions.
fn fresh_id() -> String {
    let mut random = rand::rng();
    (0..25)
        .map(|_| char::from_digit(random.random_range(0..36), 36).unwrap_or('0'))
        .collect()
}

/// Everything that was typed, checked and put into the daemon's words.
fn plan(args: &BuildArgs) -> Result<Plan> {
    let mut attachments = Attachments::default();
    let mut attrs = BTreeMap::new();
    context(args, &mut attachments, &mut attrs)?;
    for text in &args.build_arg {
        match text.split_once('=') {
            Some((key, value)) => drop(attrs.insert(format!("build-arg:{key}"), value.to_owned())),
            None => {
                if let Ok(value) = std::env::var(text) {
                    attrs.insert(format!("build-arg:{text}"), value);
                }
            }
        }
    }
    for text in &args.label {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        attrs.insert(format!("label:{key}"), value.to_owned());
    }
    let mut set = |key: &str, value: String| drop(attrs.insert(key.to_owned(), value));
    if let Some(target) = &args.target {
        set("target", target.clone());
    }
    if !args.platform.is_empty() {
        set("platform", args.platform.join(","));
    }
    if args.no_cache {
        set("no-cache", String::new());
    } else if !args.no_cache_filter.is_empty() {
        set("no-cache", args.no_cache_filter.join(","));
    }
    if args.pull {
        set("image-resolve-mode", "pull".to_owned());
    }
    let mut entitlements = args.allow.clone();
    match args.network.as_deref() {
        None | Some("default") => {}
        Some(network) => {
            set("force-network-mode", network.to_owned());
            if network == "host" {
                entitlements.push("network.host".to_owned());
            }
        }
    }
    if !args.add_host.is_empty() {
        set("add-hosts", args.add_host.join(",").replace(':', "="));
    }
    if let Some(provenance) = &args.provenance
        && provenance != "false"
    {
        set(
            "attest:provenance",
            if provenance == "true" {
                "mode=min".to_owned()
            } else {
                provenance.clone()
            },
        );
    }
    for text in &args.secret {
        let (id, secret) = options::secret(text)?;
        attachments.secrets.insert(id, secret);
    }
    for text in &args.ssh {
        let (id, socket) = options::ssh(text)?;
        attachments.ssh.insert(id, socket);
    }
    let config = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let config = config.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".docker")));
    if let Some(config) = config {
        let store = DockerConfig::read(&config.join("config.json"));
        let store = store.map_err(|error| CliError::io("registry credentials", error))?;
        attachments.credentials = Some(Arc::new(store));
    }
    let exporters = exporters(args, &mut attachments)?;
    let mut imports = args
        .cache_from
        .iter()
        .map(|text| options::cache(text))
        .collect::<Result<Vec<_>>>()?;
    for cache in imports.iter_mut().filter(|cache| cache.kind == "local") {
        if let Some(digest) = options::local_cache_digest(cache)? {
            cache.attrs.entry("digest".to_owned()).or_insert(digest);
        }
    }
    // A local cache that does not exist yet has nothing to give.
    imports.retain(|cache| cache.kind != "local" || cache.attrs.contains_key("digest"));
    let exports = args
        .cache_to
        .iter()
        .map(|text| options::cache(text))
        .collect::<Result<Vec<_>>>()?;
    for (caches, key) in [(&imports, "src"), (&exports, "dest")] {
        for directory in caches
            .iter()
            .filter(|cache| cache.kind == "local")
            .filter_map(|cache| cache.attrs.get(key))
        {
            attachments
                .stores
                .insert(format!("local:{directory}"), PathBuf::from(directory));
        }
    }
    if !imports.is_empty() {
        let list: Vec<_> = imports
            .iter()
            .map(|cache| serde_json::json!({ "Type": cache.kind, "Attrs": cache.attrs }))
            .collect();
        attrs.insert("cache-imports".to_owned(), serde_json::Value::from(list).to_string());
    }
    Ok(Plan {
        attachments,
        attrs,
        exporters,
        imports,
        exports,
        entitlements,
    })
}

/// The context and the Dockerfile: directories to share, a stream, or a URL for the daemon.
fn context(args: &BuildArgs, attachments: &mut Attachments, attrs: &mut BTreeMap<String, String>) -> Result<()> {
    let mut dockerfile_dir = None;
    let text = args.context.as_str();
    let is_url = ["http://", "https://", "git://", "git@", "ssh://"]
        .iter()
        .any(|scheme| text.starts_with(scheme));
    if text == "-" {
        let id = fresh_id();
        attrs.insert("context".to_owned(), format!("http://buildkit-session/{id}"));
        attachments.uploads.insert(id, Box::pin(tokio::io::stdin()));
    } else if is_url {
        attrs.insert("context".to_owned(), text.to_owned());
    } else {
        let path = directory(text)?;
        attachments.shared_key = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        attachments.dirs.insert("context".to_owned(), path.clone());
        dockerfile_dir = Some(path);
    }
    let mut filename = "Dockerfile".to_owned();
    if let Some(file) = &args.file {
        if dockerfile_dir.is_some() {
            if !file.is_file() {
                return Err(CliError::usage(format!("{} is not a file", file.display())));
            }
            let parent = file
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            dockerfile_dir = Some(directory(&parent.to_string_lossy())?);
            filename = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        } else {
            filename = file.to_string_lossy().into_owned();
        }
    }
    if let Some(dir) = dockerfile_dir {
        attachments.dirs.insert("dockerfile".to_owned(), dir);
    }
    attrs.insert("filename".to_owned(), filename);
    for text in &args.build_context {
        let Some((name, value)) = text.split_once('=') else {
            return Err(CliError::usage(format!(
                "--build-context {text}: NAME=PATH is expected"
            )));
        };
        let key = format!("context:{name}");
        if value.contains("://") || value.starts_with("git@") {
            attrs.insert(key, value.to_owned());
        } else {
            let share = if matches!(name, "context" | "dockerfile") {
                format!("_{name}")
            } else {
                name.to_owned()
            };
            attachments.dirs.insert(share.clone(), directory(value)?);
            attrs.insert(key, format!("local:{share}"));
        }
        attrs.insert(
            "frontend.caps".to_owned(),
            "moby.buildkit.frontend.contexts+forward".to_owned(),
        );
    }
    Ok(())
}

fn directory(text: &str) -> Result<PathBuf> {
    let path = Path::new(text)
        .canonicalize()
        .map_err(|error| CliError::io(text, error))?;
    if path.is_dir() {
        Ok(path)
    } else {
        Err(CliError::usage(format!("{text} is not a directory")))
    }
}

fn exporters(args: &BuildArgs, attachments: &mut Attachments) -> Result<Vec<Exporter>> {
    let mut outputs = Vec::new();
    for text in &args.output {
        outputs.extend(options::output(text)?);
    }
    if args.output.is_empty() || (args.push && !outputs.iter().any(|output| output.kind == "image")) {
        outputs.push(Output {
            kind: "image".to_owned(),
            attrs: BTreeMap::new(),
            target: None,
        });
    }
    let mut exporters = Vec::new();
    for (index, mut output) in outputs.into_iter().enumerate() {
        if matches!(output.kind.as_str(), "image" | "oci" | "docker") && !args.tags.is_empty() {
            output
                .attrs
                .entry("name".to_owned())
                .or_insert_with(|| args.tags.join(","));
        }
        if output.kind == "image" && args.push {
            output.attrs.insert("push".to_owned(), "true".to_owned());
        }
        if let Some(target) = output.target {
            attachments.exports.insert(index, target);
        }
        exporters.push(Exporter {
            r#type: output.kind,
            attrs: output.attrs,
        });
    }
    Ok(exporters)
}

/// A task that ends with the build.
struct Background<T>(JoinHandle<T>);

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs the build and returns what its exporters answered.
async fn build(
    daemon: &Daemon,
    plan: Plan,
    reference: &str,
    display: &mut Display,
    state: &mut State,
) -> Result<BTreeMap<String, String>> {
    let Plan {
        attachments,
        attrs,
        exporters,
        imports,
        exports,
        entitlements,
    } = plan;
    let session = ClientSession::new(fresh_id(), attachments);
    let entry = |cache: &Cache| CacheOptionsEntry {
        r#type: cache.kind.clone(),
        attrs: cache.attrs.clone(),
    };
    let first = exporters.first().cloned().unwrap_or_default();
    let solve = control::SolveRequest {
        r#ref: reference.to_owned(),
        // Older daemons read the first exporter here only.
        exporter_deprecated: first.r#type,
        exporter_attrs_deprecated: first.attrs,
        session: session.id().to_string(),
        frontend_attrs: attrs.clone(),
        cache: Some(CacheOptions {
            exports: exports.iter().map(entry).collect(),
            imports: imports.iter().map(entry).collect(),
            ..CacheOptions::default()
        }),
        entitlements,
        exporters,
        ..control::SolveRequest::default()
    };
    let _serving = Background(tokio::spawn(serve(daemon.clone(), session)));
    let mut control = daemon.control();
    let mut solving = Background(tokio::spawn(async move { control.solve(solve).await }));
    let _frontend = Background(tokio::spawn(frontend(
        daemon.clone(),
        reference.to_owned(),
        attrs,
        imports,
    )));

    let mut control = daemon.control();
    let status = StatusRequest {
        r#ref: reference.to_owned(),
    };
    let news = async move { control.status(status).await.map(tonic::Response::into_inner) };
    let news = futures::stream::once(news).flat_map(|opened| match opened {
        Ok(stream) => stream.left_stream(),
        Err(status) => futures::stream::once(async { Err(status) }).right_stream(),
    });
    let mut news = std::pin::pin!(news.fuse());
    let mut clock = tokio::time::interval(Duration::from_millis(100));
    let mut outcome = None;
    let screen = |error| CliError::io("show progress", error);
    let deadline = tokio::time::sleep(Duration::from_secs(0));
    let mut deadline = std::pin::pin!(deadline);
    loop {
        tokio::select! {
            biased;
            next = news.next() => match next {
                Some(Ok(message)) => display.update(state, message).map_err(screen)?,
                Some(Err(status)) => tracing::debug!(%status, "progress ended"),
                None if outcome.is_some() => break,
                // The stream may end just before the answer comes.
                None => outcome = Some((&mut solving.0).await),
            },
            ended = &mut solving.0, if outcome.is_none() => {
                outcome = Some(ended);
                deadline.as_mut().reset(tokio::time::Instant::now() + LAST_NEWS);
            }
            () = &mut deadline, if outcome.is_some() => break,
            _ = clock.tick() => display.tick(state).map_err(screen)?,
        }
    }
    display.finish(state).map_err(screen)?;
    match outcome {
        Some(Ok(answer)) => Ok(answer?.into_inner().exporter_response),
        Some(Err(error)) => Err(CliError::io("build", io::Error::other(error))),
        None => Err(CliError::Interrupted),
    }
}

/// Offers the session and serves it until the build is over.
async fn serve(daemon: Daemon, session: ClientSession) {
    let (writer, outbound) = outgoing();
    let mut request = Request::new(outbound.map(|data| BytesMessage { data }));
    *request.metadata_mut() = MetadataMap::from_headers(session.headers());
    let inbound = match daemon.control().session(request).await {
        Ok(answer) => answer.into_inner(),
        // The build finds out by itself that its session is missing.
        Err(status) => return tracing::warn!(%status, "session"),
    };
    let inbound = inbound.map(|message| message.map(|message| message.data).map_err(io::Error::other));
    if let Err(error) = session.serve(Tunnel::join(inbound, writer)).await {
        tracing::debug!(%error, "session ended");
    }
}

/// The frontend's part: has the daemon read the Dockerfile and hands back what it made of it, or the error.
async fn frontend(daemon: Daemon, reference: String, attrs: BTreeMap<String, String>, imports: Vec<Cache>) {
    let outcome = solve_frontend(&daemon, &reference, attrs, imports).await;
    let answer = match outcome {
        Ok(result) => gateway::ReturnRequest {
            result: Some(result),
            error: None,
        },
        Err(status) => gateway::ReturnRequest {
            result: None,
            error: Some(whole_status(&status)),
        },
    };
    let request = with_build_id(answer, &reference);
    if let Err(status) = daemon.bridge().r#return(request).await {
        tracing::debug!(%status, "return");
    }
}

async fn solve_frontend(
    daemon: &Daemon,
    reference: &str,
    attrs: BTreeMap<String, String>,
    imports: Vec<Cache>,
) -> Result<gateway::Result, Status> {
    let mut bridge = daemon.bridge();
    bridge.ping(with_build_id(gateway::PingRequest {}, reference)).await?;
    let entry = |cache: Cache| gateway::CacheOptionsEntry {
        r#type: cache.kind,
        attrs: cache.attrs,
    };
    let syntax = attrs.get("build-arg:BUILDKIT_SYNTAX").cloned();
    let mut opts = attrs;
    let frontend = match syntax {
        Some(source) => {
            opts.insert("source".to_owned(), source.clone());
            opts.insert("cmdline".to_owned(), source);
            "gateway.v0"
        }
        None => "dockerfile.v0",
    };
    let request = gateway::SolveRequest {
        frontend: frontend.to_owned(),
        frontend_opt: opts,
        allow_result_return: true,
        allow_result_array_ref: true,
        cache_imports: imports.into_iter().map(entry).collect(),
        ..gateway::SolveRequest::default()
    };
    let answer = bridge.solve(with_build_id(request, reference)).await?.into_inner();
    Ok(answer.result.unwrap_or_default())
}

fn with_build_id<T>(message: T, reference: &str) -> Request<T> {
    let mut request = Request::new(message);
    if let Ok(value) = reference.parse() {
        request.metadata_mut().insert(BUILD_ID, value);
    }
    request
}
