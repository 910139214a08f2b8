//! The client's side of a build as the frontend sees it: options, session, and the sources the client named.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::lock::Mutex;
use kiln_llb::state::Constraints;
use kiln_llb::{Definition, SourceInfo, State, VertexDigest, vertex_digest};
use kiln_oci::Platform;

use super::named::NamedContext;
use super::source::{self, CONTEXT_FILE, Local};
use crate::bridge::{Bridge, BridgeError, BridgeInfo, ResolveImageOptions, ResolvedImage, SolveRequest, SourceSpec};
use crate::error::{DockerfileError, Located};
use crate::git_ref::{self, Detected};
use crate::gotext::{base_name, dir_name, join_path, parse_bool};
use crate::options::BuildOptions;

const DOCKERFILE: &str = "Dockerfile";
const IGNORE_FILE: &str = ".dockerignore";

/// A build request with everything that is asked for it once.
pub(crate) struct BuildClient<'a, B: Bridge> {
    /// The daemon.
    pub bridge: &'a B,
    /// What it can do.
    pub info: BridgeInfo,
    /// What the client asks for.
    pub options: BuildOptions,
    /// Platform of the first worker.
    pub build_platform: Platform,
    context: Mutex<Option<Arc<MainContext<B::Ref>>>>,
    ignore: Mutex<Option<IgnoreFile>>,
    images: Mutex<HashMap<ImageQuery, ImageSlot>>,
}

type ImageQuery = (String, Option<Platform>, String, Option<String>);
type ImageSlot = Arc<Mutex<Option<Result<ResolvedImage, BridgeError>>>>;

#[derive(Clone)]
struct IgnoreFile {
    name: String,
    text: Bytes,
}

/// The main context, as far as it is known before the Dockerfile is read.
pub(crate) struct MainContext<R> {
    /// The file system, unless it is a directory of the client.
    pub state: Option<State>,
    /// What the Dockerfile is read from instead of a directory of the client.
    dockerfile: Option<State>,
    /// The downloaded file, for URL contexts.
    pub reference: Option<R>,
    /// Path of the Dockerfile.
    pub filename: String,
    dockerfile_local: String,
    /// The source itself, for git and URL contexts.
    pub source: Option<SourceSpec>,
    /// Whether a URL context is an archive.
    pub is_archive: bool,
}

/// The Dockerfile.
pub(crate) struct Entrypoint {
    /// Name, bytes, and how they were obtained.
    pub file: Arc<SourceInfo>,
    /// The vertex that loads it, to which warnings are attached.
    pub vertex: Option<VertexDigest>,
}

impl<'a, B: Bridge> BuildClient<'a, B> {
    /// A request to a daemon.
    pub(crate) fn new(bridge: &'a B, options: BuildOptions, info: BridgeInfo) -> Self {
        let first = info.workers.first().and_then(|w| w.platforms.first()).cloned();
        Self {
            bridge,
            build_platform: first.unwrap_or_else(Platform::host),
            info,
            options,
            context: Mutex::new(None),
            ignore: Mutex::new(None),
            images: Mutex::new(HashMap::new()),
        }
    }

    /// Whether the daemon has an LLB capability.
    pub(crate) fn has(&self, cap: &str) -> bool {
        self.info.llb_caps.contains(cap)
    }

    /// The session that serves the client's directory `name`.
    pub(crate) fn session_of(&self, name: &str) -> &str {
        self.options
            .attr(&format!("local-sessionid:{name}"))
            .unwrap_or(&self.info.session_id)
    }

    /// Solves a definition to its only result.
    pub(crate) async fn solve(&self, definition: Definition, evaluate: bool) -> Result<Option<B::Ref>, BridgeError> {
        let request = SolveRequest {
            definition: Some(definition),
            evaluate,
            ..SolveRequest::default()
        };
        Ok(self.bridge.solve(request).await?.into_single())
    }

    /// An image's configuration; equal questions are asked once.
    pub(crate) async fn resolve_image(
        &self,
        reference: &str,
        options: ResolveImageOptions,
    ) -> Result<ResolvedImage, BridgeError> {
        let store = options
            .store
            .as_ref()
            .map(|s| format!("{}/{}", s.session_id, s.store_id));
        let query = (
            reference.to_owned(),
            options.platform.clone(),
            options.resolve_mode.clone(),
            store,
        );
        let slot = self.images.lock().await.entry(query).or_default().clone();
        let mut answer = slot.lock().await;
        match &*answer {
            Some(known) => known.clone(),
            None => {
                let fresh = self.bridge.resolve_image_config(reference, options).await;
                answer.insert(fresh).clone()
            }
        }
    }

    /// The main context.
    pub(crate) async fn context(&self) -> Result<Arc<MainContext<B::Ref>>, DockerfileError> {
        let mut known = self.context.lock().await;
        if let Some(context) = &*known {
            return Ok(context.clone());
        }
        let context = Arc::new(self.init_context().await?);
        Ok(known.insert(context).clone())
    }

    async fn init_context(&self) -> Result<MainContext<B::Ref>, DockerfileError> {
        let attr = |name| self.options.attr(name);
        let mut context = MainContext {
            state: None,
            dockerfile: None,
            reference: None,
            filename: attr("filename").unwrap_or(DOCKERFILE).to_owned(),
            dockerfile_local: attr("dockerfilekey").unwrap_or("dockerfile").to_owned(),
            source: None,
            is_archive: false,
        };
        let address = attr(attr("contextkey").unwrap_or("context")).unwrap_or_default();
        match git_ref::detect(address) {
            Detected::Invalid(message) => return Err(DockerfileError::new(message)),
            Detected::Git(mut git) => {
                let keep_arg = attr("build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR").and_then(parse_bool) == Some(true);
                let epoch = attr("build-arg:SOURCE_DATE_EPOCH").is_some_and(|v| !v.is_empty());
                if git.mtime.is_empty() && epoch {
                    git.mtime = "commit".to_owned();
                }
                let keep = keep_arg || git.keep_git_dir == Some(true);
                let about = Constraints::named(format!("[internal] load git source {address}"));
                let state = source::git(&git, keep, about);
                context.source = source_spec(&state);
                context.dockerfile = Some(state.clone());
                context.state = Some(state);
            }
            Detected::Other if address.starts_with("http://") || address.starts_with("https://") => {
                let about = Constraints::named("[internal] load remote build context");
                let state = source::http(address, CONTEXT_FILE, "", about);
                let definition = state.marshal(None).map_err(|e| DockerfileError::new(e.to_string()))?;
                let reference = self
                    .solve(definition, false)
                    .await
                    .context("failed to resolve httpcontext")?;
                let head = self
                    .bridge
                    .read_file(reference.as_ref(), CONTEXT_FILE, Some((0, 1024)))
                    .await;
                context.is_archive = source::is_archive(&head.context("failed to read downloaded context")?);
                context.source = source_spec(&state);
                context.reference = reference;
                let files = if context.is_archive {
                    source::unpacked(&state, CONTEXT_FILE)
                } else {
                    CONTEXT_FILE.clone_into(&mut context.filename);
                    state
                };
                context.dockerfile = Some(files.clone());
                context.state = Some(files);
            }
            Detected::Other if self.info.frontend_caps.contains("frontend.inputs") => {
                let inputs = self.bridge.inputs().await.context("failed to get frontend inputs")?;
                let input = |name: &str| match inputs.get(name) {
                    Some(definition) => State::from_definition(definition)
                        .map(Some)
                        .map_err(|e| DockerfileError::new(e.to_string())),
                    None => Ok(None),
                };
                if attr("dockerfilekey").is_none() {
                    context.dockerfile = input(&context.dockerfile_local)?;
                }
                context.state = input("context")?;
            }
            Detected::Other => {}
        }
        if let (Some(state), Some(dir)) = (&context.state, attr("contextsubdir")) {
            context.state = Some(source::sub_directory(state, dir));
        }
        Ok(context)
    }

    /// Reads the Dockerfile, and the ignore file beside it.
    pub(crate) async fn read_dockerfile(&self) -> Result<Entrypoint, DockerfileError> {
        let context = self.context().await?;
        let filename = &context.filename;
        let is_default_name = base_name(filename) == DOCKERFILE;
        let lower = join_path(&dir_name(filename), &DOCKERFILE.to_lowercase());
        let ignore_name = format!("{filename}{IGNORE_FILE}");
        let remote = context
            .dockerfile
            .clone()
            .filter(|_| self.options.attr("dockerfilekey").is_none());
        let state = remote.unwrap_or_else(|| {
            let mut follow = vec![filename.clone(), ignore_name.clone()];
            if is_default_name {
                follow.push(lower.clone());
            }
            let local = Local {
                name: &context.dockerfile_local,
                session: self.session_of(&context.dockerfile_local),
                follow: &follow,
                shared_key: &context.dockerfile_local,
                no_diff: true,
                ..Local::default()
            };
            local.state(Constraints::named(format!(
                "[internal] load build definition from {filename}"
            )))
        });
        let definition = state
            .marshal(None)
            .map_err(|e| DockerfileError::new(format!("failed to marshal local source: {e}")))?;
        let vertex = definition
            .ops
            .len()
            .checked_sub(2)
            .and_then(|i| definition.ops.get(i))
            .map(|op| vertex_digest(op));
        let reference = self
            .solve(definition.clone(), false)
            .await
            .context("failed to resolve dockerfile")?;
        let reference = reference.as_ref();
        let text = match self.bridge.read_file(reference, filename, None).await {
            Err(error) if is_default_name => self.bridge.read_file(reference, &lower, None).await.map_err(|_| error),
            result => result,
        };
        let text = text.context("failed to read dockerfile")?;
        if let Ok(text) = self.bridge.read_file(reference, &ignore_name, None).await {
            *self.ignore.lock().await = Some(IgnoreFile {
                name: ignore_name,
                text,
            });
        }
        let file = SourceInfo {
            filename: filename.clone(),
            data: text,
            definition: Some(Box::new(definition)),
            language: DOCKERFILE.to_owned(),
        };
        Ok(Entrypoint {
            file: Arc::new(file),
            vertex,
        })
    }

    /// Patterns of the ignore file, none for contexts that are no directory of the client.
    pub(crate) async fn ignore_patterns(&self) -> Result<Vec<String>, DockerfileError> {
        let context = self.context().await?;
        if context.state.is_some() {
            return Ok(Vec::new());
        }
        let mut known = self.ignore.lock().await;
        if known.is_none() {
            let shared_key = format!("context-{IGNORE_FILE}");
            let local = Local {
                name: "context",
                session: self.session_of("context"),
                follow: &[IGNORE_FILE.to_owned()],
                shared_key: &shared_key,
                no_diff: true,
                ..Local::default()
            };
            let state = local.state(Constraints::named(format!("[internal] load {IGNORE_FILE}")));
            let definition = state.marshal(None).map_err(|e| DockerfileError::new(e.to_string()))?;
            let reference = self.solve(definition, false).await?;
            // A context without the file is the normal case.
            let text = self
                .bridge
                .read_file(reference.as_ref(), IGNORE_FILE, None)
                .await
                .unwrap_or_default();
            *known = Some(IgnoreFile {
                name: IGNORE_FILE.to_owned(),
                text,
            });
        }
        let Some(file) = &*known else { return Ok(Vec::new()) };
        kiln_match::parse_ignore_file(&file.text)
            .map_err(|e| DockerfileError::new(format!("failed parsing {}: {e}", file.name)))
    }

    /// The main context, of which only `follow` is needed (all of it if empty).
    pub(crate) async fn main_context(&self, follow: &[String]) -> Result<State, DockerfileError> {
        let context = self.context().await?;
        if let Some(state) = &context.state {
            return Ok(state.clone());
        }
        let exclude = self
            .ignore_patterns()
            .await
            .context("failed to read dockerignore patterns")?;
        let local = Local {
            name: "context",
            session: self.session_of("context"),
            follow,
            exclude: &exclude,
            shared_key: "context",
            no_diff: false,
        };
        Ok(local.state(Constraints::named("[internal] load build context")))
    }

    /// The named context for `name`, if the client has given one for it on `platform`.
    pub(crate) fn named_context(
        &self,
        name: &str,
        platform: Option<&Platform>,
    ) -> Result<Option<NamedContext>, DockerfileError> {
        NamedContext::find(&self.options, name, platform)
    }
}

fn source_spec(state: &State) -> Option<SourceSpec> {
    let op = state.as_source()?;
    Some(SourceSpec {
        identifier: op.identifier.clone(),
        attrs: op.attrs.clone(),
    })
}
