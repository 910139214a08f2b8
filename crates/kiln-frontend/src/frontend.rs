//! The Dockerfile frontend: from attributes to results.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::try_join_all;
use kiln_oci::{ImageRef, Platform, go_json};

use crate::bridge::{Bridge, Frontend, FrontendResult, ResultRefs, SolveRequest, Warning};
use crate::context::{BuildClient, Entrypoint};
use crate::dockerfile::convert::{self, Converted, Request};
use crate::dockerfile::directive;
use crate::dockerfile::lint::{LintOptions, Linter};
use crate::dockerfile::span::Span;
use crate::error::{DockerfileError, FrontendError, Located};
use crate::options::{Attrs, BuildOptions, unsupported_capability};
use crate::subrequest;

/// The name under which this frontend is built in.
pub const NAME: &str = "dockerfile.v0";

/// Repositories whose images are this frontend under another name.
const OFFICIAL: &[&str] = &["docker.io/docker/dockerfile", "docker.io/docker/dockerfile-upstream"];

/// Builds Dockerfiles.
#[derive(Clone, Copy, Debug)]
pub struct DockerfileFrontend {
    /// Serve `# syntax=docker/dockerfile…` here instead of running that image.
    pub serve_official_syntax: bool,
}

impl Default for DockerfileFrontend {
    fn default() -> Self {
        Self {
            serve_official_syntax: true,
        }
    }
}

#[async_trait]
impl<B: Bridge> Frontend<B> for DockerfileFrontend {
    async fn run(&self, bridge: &B, attrs: &Attrs) -> Result<FrontendResult<B::Ref>, FrontendError> {
        let info = bridge.ping().await?;
        if !info.llb_caps.contains("file.base") {
            return Err(DockerfileError::new("needs BuildKit 0.5 or later").into());
        }
        let options = BuildOptions::parse(attrs).map_err(DockerfileError::new)?;
        let unsupported = unsupported_capability(attrs);
        if let Some((name, false)) = &unsupported {
            return Err(FrontendError::UnsupportedCapability(name.clone()));
        }
        let client = BuildClient::new(bridge, options, info);
        let entrypoint = client.read_dockerfile().await?;
        let labs = match self.forward(&client, &entrypoint).await? {
            Forward::Done(result) => return Ok(result),
            Forward::Here { labs } => labs,
        };
        if let Some((name, _)) = unsupported {
            return Err(FrontendError::UnsupportedCapability(name));
        }
        if let Some(request) = client.options.attr("requestid") {
            let metadata = subrequest::answer(&client, &entrypoint, request, labs).await?;
            return Ok(FrontendResult {
                metadata,
                ..FrontendResult::default()
            });
        }
        let file = entrypoint.file.clone();
        build(&client, &entrypoint, labs)
            .await
            .map_err(|error| FrontendError::Dockerfile {
                error,
                file: Some(file),
            })
    }
}

/// Who builds.
enum Forward<R> {
    /// Another frontend did.
    Done(FrontendResult<R>),
    /// This one.
    Here { labs: bool },
}

impl DockerfileFrontend {
    /// Hands the build to the frontend that the user asks for, unless that is this one.
    async fn forward<B: Bridge>(
        &self,
        client: &BuildClient<'_, B>,
        entrypoint: &Entrypoint,
    ) -> Result<Forward<B::Ref>, FrontendError> {
        let options = &client.options;
        if let Some(cmdline) = options.attr("cmdline") {
            return Ok(Forward::Here { labs: is_labs(cmdline) });
        }
        const ARG: &str = "build-arg:BUILDKIT_SYNTAX";
        let (cmdline, span): (String, Option<Span>) = match options.attr(ARG) {
            Some(cmdline) => (cmdline.to_owned(), None),
            None => match directive::detect_syntax(&entrypoint.file.data) {
                Some(found) => (found.value, Some(found.span)),
                None => return Ok(Forward::Here { labs: false }),
            },
        };
        let source = cmdline.trim().split(' ').next().unwrap_or_default();
        if source == NAME || (self.serve_official_syntax && is_official(source)) {
            return Ok(Forward::Here { labs: is_labs(source) });
        }
        match forward_to(client, source, &cmdline).await {
            Ok(result) => Ok(Forward::Done(result)),
            Err(error) if error.cause().is_some_and(|cause| cause.located) => Err(error.into()),
            Err(error) => Err(match span {
                None => error.context(format!("failed with {ARG} = {cmdline}")).into(),
                Some(span) => FrontendError::Dockerfile {
                    error: error.with_span(span),
                    file: Some(entrypoint.file.clone()),
                },
            }),
        }
    }
}

fn is_official(source: &str) -> bool {
    ImageRef::parse(source).is_ok_and(|r| OFFICIAL.contains(&r.name().as_str()))
}

/// Whether a syntax image is of the labs channel, where unfinished features are allowed.
fn is_labs(source: &str) -> bool {
    let reference = source.split(' ').next().unwrap_or_default();
    let tag = ImageRef::parse(reference)
        .ok()
        .and_then(|r| r.tag().map(str::to_owned))
        .unwrap_or_default();
    tag == "labs" || tag.ends_with("-labs")
}

async fn forward_to<B: Bridge>(
    client: &BuildClient<'_, B>,
    source: &str,
    cmdline: &str,
) -> Result<FrontendResult<B::Ref>, DockerfileError> {
    let mut attrs = client.options.attrs.clone();
    attrs.insert("cmdline".to_owned(), cmdline.to_owned());
    attrs.insert("source".to_owned(), source.to_owned());
    let mut inputs = BTreeMap::new();
    if client.info.frontend_caps.contains("frontend.inputs") {
        inputs = client.bridge.inputs().await.context("failed to get frontend inputs")?;
    }
    let request = SolveRequest {
        frontend: "gateway.v0".to_owned(),
        frontend_attrs: attrs,
        frontend_inputs: inputs,
        ..SolveRequest::default()
    };
    Ok(client.bridge.solve(request).await?)
}

/// Lint options of a build: those of the request, else those of the file.
pub(crate) fn lint_options(options: &BuildOptions, text: &[u8]) -> Result<LintOptions, DockerfileError> {
    if let Some(options) = &options.lint {
        return Ok(options.clone());
    }
    let directive = directive::detect("check", text);
    let text = directive.as_ref().map(|d| d.first_word()).unwrap_or_default();
    LintOptions::parse(text).map_err(|e| DockerfileError::new(format!("failed to parse check options: {e}")))
}

/// The result for one platform.
struct Built<R> {
    id: String,
    platform: Platform,
    reference: Option<R>,
    converted: Converted,
}

async fn build<B: Bridge>(
    client: &BuildClient<'_, B>,
    entrypoint: &Entrypoint,
    labs: bool,
) -> Result<FrontendResult<B::Ref>, DockerfileError> {
    let wanted: Vec<Option<Platform>> = match client.options.platforms.as_slice() {
        [] => vec![None],
        platforms => platforms.iter().cloned().map(Some).collect(),
    };
    let built = try_join_all(
        wanted
            .into_iter()
            .enumerate()
            .map(|(i, platform)| build_one(client, entrypoint, labs, platform, i == 0)),
    )
    .await?;
    Ok(result_of(built, client.options.multi_platform))
}

async fn build_one<B: Bridge>(
    client: &BuildClient<'_, B>,
    entrypoint: &Entrypoint,
    labs: bool,
    platform: Option<Platform>,
    reports: bool,
) -> Result<Built<B::Ref>, DockerfileError> {
    let options = lint_options(&client.options, &entrypoint.file.data)?;
    // Findings do not depend on the platform; one conversion reports them.
    let linter = if reports {
        Linter::new(options)
    } else {
        Linter::silent()
    };
    let request = Request {
        file: entrypoint.file.clone(),
        platform: platform.clone(),
        all_stages: false,
        linter: &linter,
        labs,
    };
    let converted = convert::convert(client, &request).await;
    warn(client, entrypoint, &linter).await;
    let converted = converted?;
    let definition = converted
        .state
        .marshal(Some(&converted.platform))
        .map_err(|e| DockerfileError::new(format!("failed to marshal LLB definition: {e}")))?;
    let request = SolveRequest {
        definition: Some(definition),
        cache_imports: client.options.cache_imports.clone(),
        ..SolveRequest::default()
    };
    let reference = client.bridge.solve(request).await?.into_single();
    let mut platform = platform.unwrap_or_else(Platform::host).normalized();
    let id = platform.id();
    let image = &converted.image;
    if platform.os == "windows" && image.os == platform.os {
        if platform.os_version.is_empty() {
            platform.os_version.clone_from(&image.os_version);
        }
        if platform.os_features.is_empty() {
            platform.os_features.clone_from(&image.os_features);
        }
        platform = platform.normalized();
    }
    Ok(Built {
        id,
        platform,
        reference,
        converted,
    })
}

/// Shows what lint found. A daemon that takes no warnings loses nothing else.
pub(crate) async fn warn<B: Bridge>(client: &BuildClient<'_, B>, entrypoint: &Entrypoint, linter: &Linter) {
    let Some(vertex) = entrypoint.vertex else { return };
    for finding in linter.findings() {
        let warning = Warning {
            level: 1,
            short: finding.short(),
            detail: vec![finding.rule.description.to_owned()],
            url: finding.rule.url(),
            span: finding.span,
            file: Some(Arc::clone(&entrypoint.file)),
        };
        if client.bridge.warn(vertex, warning).await.is_err() {
            return;
        }
    }
}

fn result_of<R>(built: Vec<Built<R>>, multi_platform: bool) -> FrontendResult<R> {
    #[derive(serde::Serialize)]
    struct Entry<'a> {
        #[serde(rename = "ID")]
        id: &'a str,
        #[serde(rename = "Platform")]
        platform: &'a Platform,
    }
    #[derive(serde::Serialize)]
    struct Platforms<'a> {
        #[serde(rename = "Platforms")]
        platforms: Vec<Entry<'a>>,
    }
    let platforms = built
        .iter()
        .map(|b| Entry {
            id: &b.id,
            platform: &b.platform,
        })
        .collect();
    let list = go_json::to_vec(&Platforms { platforms }).unwrap_or_default();
    let mut metadata = BTreeMap::from([("refs.platforms".to_owned(), Bytes::from(list))]);
    let mut refs = Vec::with_capacity(built.len());
    for Built {
        id,
        reference,
        converted,
        ..
    } in built
    {
        let mut put = |key: &str, value: Vec<u8>| {
            let key = if multi_platform {
                format!("{key}/{id}")
            } else {
                key.to_owned()
            };
            metadata.insert(key, value.into());
        };
        put("containerimage.config", converted.image.to_json());
        if let Some(base) = &converted.base_image {
            put("containerimage.base.config", base.to_json());
        }
        if let Some(epoch) = converted.epoch {
            put("source.date.epoch", epoch.seconds().to_string().into_bytes());
        }
        refs.push((id, reference));
    }
    let refs = if multi_platform {
        ResultRefs::ByPlatform(refs)
    } else {
        ResultRefs::Single(refs.into_iter().next().and_then(|(_, r)| r))
    };
    FrontendResult {
        refs,
        metadata,
        attestations: BTreeMap::new(),
    }
}
