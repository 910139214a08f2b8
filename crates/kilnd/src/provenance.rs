//! What a build was made from: the trail it leaves while it runs, and the provenance statement made of it.
//!
//! Formats: SLSA provenance v1 and v0.2 as BuildKit writes them. Values of secrets never appear; user and password in
//! URLs are replaced.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_frontend::bridge::ResolveImageOptions;
use kiln_llb::op::{MountType, NetMode};
use kiln_llb::{Graph, Op};
use kiln_oci::{Digest, ImageRef, Platform};
use kiln_worker::{ImageMeta, OpError};
use serde_json::{Map, Value, json};
use tokio::sync::OnceCell;

/// Predicate type of version 1.
pub const SLSA_V1: &str = "https://slsa.dev/provenance/v1";
/// Predicate type of version 0.2.
pub const SLSA_V02: &str = "https://slsa.dev/provenance/v0.2";

type ImageKey = (String, Option<String>, String, Option<(String, String)>);

/// What was looked at while a build ran. An image is resolved once in a build, however often it is asked for.
#[derive(Debug, Default)]
pub struct Trail {
    images: Mutex<HashMap<ImageKey, Arc<OnceCell<ImageMeta>>>>,
    request: Mutex<Option<(String, BTreeMap<String, String>)>>,
}

/// An image that was looked up by a frontend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageLookup {
    reference: String,
    platform: Option<Platform>,
    digest: Digest,
    local: bool,
}

impl Trail {
    /// A frontend was asked for; the first one is what the user asked for.
    pub fn frontend(&self, name: &str, attrs: &BTreeMap<String, String>) {
        let mut request = self.request.lock().unwrap_or_else(PoisonError::into_inner);
        request.get_or_insert_with(|| (name.to_owned(), attrs.clone()));
    }

    /// The frontend that was asked for, and its attributes.
    pub fn request(&self) -> Option<(String, BTreeMap<String, String>)> {
        self.request.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The image, resolved by `resolve` if this build has not asked for it yet.
    pub async fn image(
        &self,
        reference: &str,
        options: &ResolveImageOptions,
        resolve: impl AsyncFnOnce() -> Result<ImageMeta, OpError>,
    ) -> Result<ImageMeta, OpError> {
        let store = options
            .store
            .as_ref()
            .map(|s| (s.session_id.clone(), s.store_id.clone()));
        let platform = options.platform.as_ref().map(Platform::id);
        let key = (reference.to_owned(), platform, options.resolve_mode.clone(), store);
        let cell = {
            let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(images.entry(key).or_default())
        };
        cell.get_or_try_init(async || resolve().await).await.cloned()
    }

    fn images(&self) -> Vec<ImageLookup> {
        let images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out: Vec<_> = images
            .iter()
            .filter_map(|((reference, platform, _, store), cell)| {
                let meta = cell.get()?;
                Some(ImageLookup {
                    reference: reference.clone(),
                    platform: platform.as_deref().and_then(|p| p.parse().ok()),
                    digest: meta.digest,
                    local: store.is_some(),
                })
            })
            .collect();
        out.sort();
        out
    }
}

/// How detailed a statement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Without build arguments, labels, secrets' names and the graph.
    Min,
    /// Everything.
    Max,
}

/// Version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `https://slsa.dev/provenance/v1`.
    V1,
    /// `https://slsa.dev/provenance/v0.2`.
    V02,
}

impl Version {
    /// The predicate type.
    pub fn predicate_type(self) -> &'static str {
        match self {
            Self::V1 => SLSA_V1,
            Self::V02 => SLSA_V02,
        }
    }
}

/// What the client asked for (attribute `attest:provenance`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How detailed.
    pub mode: Mode,
    /// Which format.
    pub version: Version,
    /// Attach only where attestations are inlined anyway.
    pub inline_only: bool,
    /// Who builds.
    pub builder_id: String,
    /// Whether the user says the build is reproducible.
    pub reproducible: bool,
    /// Name of the file in directory exports.
    pub filename: String,
    /// Whether unknown materials are an error.
    pub complete_materials: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mode: Mode::Max,
            version: Version::V1,
            inline_only: false,
            builder_id: String::new(),
            reproducible: false,
            filename: "provenance.json".into(),
            complete_materials: false,
        }
    }
}

impl Options {
    /// Reads the comma-separated value of the attribute. Without `mode` everything is recorded.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut out = Self::default();
        for field in text.split(',').filter(|f| !f.is_empty()) {
            let (key, value) = field.split_once('=').unwrap_or((field, ""));
            let flag = || match value {
                "" | "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
                "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
                other => Err(format!("invalid value `{other}` for provenance option {key}")),
            };
            match key {
                "mode" => {
                    out.mode = match value {
                        "min" => Mode::Min,
                        "" | "max" | "full" => Mode::Max,
                        other => return Err(format!("invalid provenance mode {other:?}")),
                    }
                }
                "version" => {
                    out.version = match value {
                        "" | "v1" => Version::V1,
                        "v0.2" => Version::V02,
                        other => return Err(format!("invalid provenance version {other:?}")),
                    }
                }
                "inline-only" => out.inline_only = flag()?,
                "reproducible" => out.reproducible = flag()?,
                "builder-id" => out.builder_id = value.to_owned(),
                "filename" => out.filename = value.to_owned(),
                "complete-materials" => out.complete_materials = flag()?,
                // `type` is how clients mark the entry; `capture-usage` has no effect without usage data.
                _ => {}
            }
        }
        Ok(out)
    }
}

/// What a statement is made of.
#[derive(Debug)]
pub struct Capture<'a> {
    /// The graph of the platform.
    pub graph: &'a Graph,
    /// Lookups of the build.
    pub trail: &'a Trail,
    /// Frontend the request named; empty for a graph of the client's.
    pub frontend: &'a str,
    /// Attributes of the request.
    pub attrs: &'a BTreeMap<String, String>,
    /// Platform of the daemon.
    pub builder_platform: &'a Platform,
    /// Platform of the result.
    pub platform: Option<&'a Platform>,
    /// Unique id of the run.
    pub invocation: &'a str,
    /// When it began and ended, RFC 3339.
    pub times: (&'a str, &'a str),
}

/// The predicate, indented by two spaces.
pub fn predicate(capture: &Capture<'_>, options: &Options) -> Vec<u8> {
    let value = match options.version {
        Version::V1 => v1(capture, options),
        Version::V02 => v02(capture, options),
    };
    serde_json::to_vec_pretty(&value).unwrap_or_default()
}

struct Facts {
    materials: Vec<Value>,
    materials_complete: bool,
    hermetic: bool,
    request: Value,
    request_complete: bool,
    config_source: Map<String, Value>,
    vcs: Map<String, Value>,
}

fn facts(c: &Capture<'_>, options: &Options) -> Facts {
    let min = options.mode == Mode::Min;
    let mut args = Map::new();
    let mut vcs = Map::new();
    let mut config_source = Map::new();
    let mut scrubbed = false;
    let context_key = c.attrs.get("contextkey").map_or("context", String::as_str);
    for (key, value) in c.attrs {
        match key.as_str() {
            "cgroup-parent" | "image-resolve-mode" | "platform" | "cache-imports" => {}
            k if k.starts_with("attest:") => {}
            k if k.starts_with("vcs:") => {
                vcs.insert(k.trim_start_matches("vcs:").to_owned(), json!(redact(value)));
            }
            "filename" => {
                config_source.insert("path".into(), json!(value));
            }
            k if k == context_key => {
                config_source.insert("uri".into(), json!(redact(value)));
            }
            k if min && (k.starts_with("build-arg:") || k.starts_with("label:")) => scrubbed = true,
            k if k.starts_with("context:") => {
                args.insert(k.to_owned(), json!(redact(value)));
            }
            k => {
                args.insert(k.to_owned(), json!(value));
            }
        }
    }
    let (mut secrets, mut ssh, mut locals) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    let (mut hermetic, mut complete) = (true, true);
    for vertex in c.graph.vertices() {
        match &vertex.op {
            Op::Exec(exec) => {
                hermetic &= exec.network == NetMode::None;
                for mount in &exec.mounts {
                    match mount.mount_type {
                        MountType::Secret => {
                            let opt = mount.secret.clone().unwrap_or_default();
                            let all = secrets.entry(opt.id).or_insert(true);
                            *all &= opt.optional;
                        }
                        MountType::Ssh => {
                            let opt = mount.ssh.clone().unwrap_or_default();
                            let id = if opt.id.is_empty() {
                                "default".to_owned()
                            } else {
                                opt.id
                            };
                            let all = ssh.entry(id).or_insert(true);
                            *all &= opt.optional;
                        }
                        MountType::Bind | MountType::Cache | MountType::Tmpfs => {}
                    }
                }
                for secret in &exec.secret_env {
                    let all = secrets.entry(secret.id.clone()).or_insert(true);
                    *all &= secret.optional;
                }
            }
            Op::Source(source) if source.scheme() == "local" => {
                locals.insert(source.reference().to_owned());
                complete = false;
            }
            Op::Build(_) => complete = false,
            _ => {}
        }
    }
    let mut request = Map::new();
    if !c.frontend.is_empty() {
        request.insert("frontend".into(), json!(c.frontend));
    }
    if !args.is_empty() {
        request.insert("args".into(), Value::Object(args));
    }
    if !min {
        let list = |map: &BTreeMap<String, bool>| -> Value {
            map.iter()
                .map(|(id, optional)| {
                    if *optional {
                        json!({"id": id, "optional": true})
                    } else {
                        json!({"id": id})
                    }
                })
                .collect()
        };
        if !secrets.is_empty() {
            request.insert("secrets".into(), list(&secrets));
        }
        if !ssh.is_empty() {
            request.insert("ssh".into(), list(&ssh));
        }
    }
    if !locals.is_empty() {
        request.insert(
            "locals".into(),
            locals.iter().map(|name| json!({"name": name})).collect(),
        );
    }
    Facts {
        materials: materials(c),
        materials_complete: complete,
        hermetic: hermetic && complete,
        request: Value::Object(request),
        request_complete: !c.frontend.is_empty() && !scrubbed,
        config_source,
        vcs,
    }
}

/// Images, then git, then http, each group sorted.
fn materials(c: &Capture<'_>) -> Vec<Value> {
    let mut images: BTreeMap<String, Digest> = BTreeMap::new();
    let mut other: BTreeMap<(u8, String), Value> = BTreeMap::new();
    for vertex in c.graph.vertices() {
        let Op::Source(source) = &vertex.op else { continue };
        match source.scheme() {
            "docker-image" | "oci-layout" => {
                let local = source.scheme() == "oci-layout";
                let platform = vertex.platform.as_ref().or(c.platform).unwrap_or(c.builder_platform);
                if let Ok(reference) = source.reference().parse::<ImageRef>()
                    && let Some(digest) = reference.digest()
                {
                    images.insert(image_purl(&reference, Some(platform), local), digest);
                }
            }
            "git" => {
                let url = source.attr("git.fullurl").unwrap_or(source.reference());
                let fragment = source.reference().split_once('#').map(|(_, f)| f);
                let uri = match fragment {
                    Some(f) if !url.contains('#') => format!("{}#{f}", redact(url)),
                    _ => redact(url),
                };
                let digest = source.attr("git.checksum").map(|c| json!({ "sha1": c }));
                other.insert((1, uri.clone()), material(&uri, digest));
            }
            "http" | "https" => {
                let uri = redact(&source.identifier);
                let digest = source
                    .attr("http.checksum")
                    .and_then(|c| c.split_once(':'))
                    .map(|(a, hex)| json!({ a: hex }));
                other.insert((2, uri.clone()), material(&uri, digest));
            }
            _ => {}
        }
    }
    for lookup in c.trail.images() {
        if let Ok(reference) = lookup.reference.parse::<ImageRef>()
            && (lookup.platform.is_none() || c.platform.is_none() || lookup.platform.as_ref() == c.platform)
        {
            let platform = lookup.platform.as_ref().or(c.platform).unwrap_or(c.builder_platform);
            images
                .entry(image_purl(&reference, Some(platform), lookup.local))
                .or_insert(lookup.digest);
        }
    }
    images
        .into_iter()
        .map(|(uri, digest)| material(&uri, Some(json!({ "sha256": digest.hex() }))))
        .chain(other.into_values())
        .collect()
}

fn material(uri: &str, digest: Option<Value>) -> Value {
    match digest {
        Some(digest) => json!({ "uri": uri, "digest": digest }),
        None => json!({ "uri": uri }),
    }
}

/// The package URL of an image (purl specification, type `docker`, or `oci` for layouts).
pub fn image_purl(reference: &ImageRef, platform: Option<&Platform>, local: bool) -> String {
    let kind = if local { "oci" } else { "docker" };
    let mut out = format!("pkg:{kind}/{}", reference.familiar_name());
    let mut query = Vec::new();
    match (reference.tag(), reference.digest()) {
        (Some(tag), _) => out.push_str(&format!("@{tag}")),
        (None, Some(digest)) => query.push(format!("digest={digest}")),
        (None, None) => out.push_str("@latest"),
    }
    if let Some(platform) = platform {
        query.push(format!("platform={}", platform.id().replace('/', "%2F")));
    }
    if !query.is_empty() {
        out.push('?');
        out.push_str(&query.join("&"));
    }
    out
}

/// Replaces user and password of a URL.
fn redact(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.to_owned();
    };
    let end = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    match authority.rsplit_once('@') {
        None => text.to_owned(),
        Some((user, host)) => {
            let hidden = if user.contains(':') { "xxxxx:xxxxx" } else { "xxxxx" };
            format!("{scheme}://{hidden}@{host}{path}")
        }
    }
}

fn config_source(f: &Facts) -> Value {
    Value::Object(f.config_source.clone())
}

fn v1(c: &Capture<'_>, options: &Options) -> Value {
    let f = facts(c, options);
    let mut metadata = Map::new();
    metadata.insert("invocationId".into(), json!(c.invocation));
    metadata.insert("startedOn".into(), json!(c.times.0));
    metadata.insert("finishedOn".into(), json!(c.times.1));
    let mut extra = Map::new();
    if !f.vcs.is_empty() {
        extra.insert("vcs".into(), Value::Object(f.vcs.clone()));
    }
    if !extra.is_empty() {
        metadata.insert("buildkit_metadata".into(), Value::Object(extra));
    }
    if f.hermetic {
        metadata.insert("buildkit_hermetic".into(), json!(true));
    }
    metadata.insert(
        "buildkit_completeness".into(),
        json!({ "request": f.request_complete, "resolvedDependencies": f.materials_complete }),
    );
    if options.reproducible {
        metadata.insert("buildkit_reproducible".into(), json!(true));
    }
    let mut internal = Map::new();
    internal.insert("builderPlatform".into(), json!(c.builder_platform.id()));
    json!({
        "buildDefinition": {
            "buildType": "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md",
            "externalParameters": { "configSource": config_source(&f), "request": f.request },
            "internalParameters": internal,
            "resolvedDependencies": f.materials,
        },
        "runDetails": { "builder": { "id": options.builder_id }, "metadata": metadata },
    })
}

fn v02(c: &Capture<'_>, options: &Options) -> Value {
    let f = facts(c, options);
    let mut source = f.config_source.clone();
    if let Some(path) = source.remove("path") {
        source.insert("entryPoint".into(), path);
    }
    let mut metadata = Map::new();
    metadata.insert("buildInvocationID".into(), json!(c.invocation));
    metadata.insert("buildStartedOn".into(), json!(c.times.0));
    metadata.insert("buildFinishedOn".into(), json!(c.times.1));
    metadata.insert(
        "completeness".into(),
        json!({ "parameters": f.request_complete, "environment": true, "materials": f.materials_complete }),
    );
    metadata.insert("reproducible".into(), json!(options.reproducible));
    let mut extra = Map::new();
    if !f.vcs.is_empty() {
        extra.insert("vcs".into(), Value::Object(f.vcs.clone()));
    }
    metadata.insert(
        "https://mobyproject.org/buildkit@v1#metadata".into(),
        Value::Object(extra),
    );
    if f.hermetic {
        metadata.insert("https://mobyproject.org/buildkit@v1#hermetic".into(), json!(true));
    }
    json!({
        "builder": { "id": options.builder_id },
        "buildType": "https://mobyproject.org/buildkit@v1",
        "materials": f.materials,
        "invocation": {
            "configSource": source,
            "parameters": f.request,
            "environment": { "platform": c.builder_platform.id() },
        },
        "metadata": metadata,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_default_to_everything() {
        assert_eq!(Options::parse("type=provenance").unwrap().mode, Mode::Max);
        let o = Options::parse("mode=min,inline-only=true,version=v0.2").unwrap();
        assert_eq!((o.mode, o.inline_only, o.version), (Mode::Min, true, Version::V02));
        for bad in ["mode=x", "version=v3", "inline-only=maybe"] {
            assert!(Options::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn credentials_are_taken_out_of_urls() {
        assert_eq!(
            redact("https://user:pw@host/x.git#main"),
            "https://xxxxx:xxxxx@host/x.git#main"
        );
        assert_eq!(redact("https://token@host/x"), "https://xxxxx@host/x");
        assert_eq!(redact("https://host/a@b"), "https://host/a@b");
        assert_eq!(redact("context"), "context");
    }

    #[test]
    fn min_mode_hides_arguments_and_says_so() {
        let attrs = BTreeMap::from([
            ("build-arg:TOKEN".to_owned(), "s3cret".to_owned()),
            ("filename".to_owned(), "Dockerfile".to_owned()),
            ("attest:provenance".to_owned(), "mode=min".to_owned()),
        ]);
        let (graph, trail, platform) = (Graph::default(), Trail::default(), Platform::new("linux", "amd64", ""));
        let capture = Capture {
            graph: &graph,
            trail: &trail,
            frontend: "dockerfile.v0",
            attrs: &attrs,
            builder_platform: &platform,
            platform: None,
            invocation: "id",
            times: ("2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"),
        };
        let min = Options {
            mode: Mode::Min,
            ..Options::default()
        };
        let text = String::from_utf8(predicate(&capture, &min)).unwrap();
        assert!(
            !text.contains("s3cret") && text.contains(r#""request": false"#),
            "{text}"
        );
        let text = String::from_utf8(predicate(&capture, &Options::default())).unwrap();
        assert!(text.contains("s3cret") && text.contains(r#""request": true"#), "{text}");
    }
}
