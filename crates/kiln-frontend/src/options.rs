//! What the client asks for: the string attributes of a request, parsed once (dockerfile.md §6.1, solve.md §8).

use std::collections::BTreeMap;

use kiln_llb::LinuxResources;
use kiln_llb::op::{HostIp, NetMode, Ulimit};
use kiln_oci::{ImageRef, Platform};

use crate::bridge::CacheImport;
use crate::dockerfile::lint::LintOptions;
use crate::gotext::{csv_fields, parse_bool, parse_int, parse_platform, parse_uint, quote};

/// Attributes of a request.
pub type Attrs = BTreeMap<String, String>;

/// A build request.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    /// All attributes, with those that build-args imply filled in.
    pub attrs: Attrs,
    /// Stage to build, empty for the last.
    pub target: String,
    /// Platforms asked for, normalised, in order.
    pub platforms: Vec<Platform>,
    /// Whether results are a map by platform.
    pub multi_platform: bool,
    /// `--build-arg`.
    pub build_args: Attrs,
    /// `--label`.
    pub labels: Attrs,
    /// Stages whose steps are not looked up; `Some` and empty means all.
    pub no_cache: Option<Vec<String>>,
    /// How image references are resolved.
    pub resolve_mode: ResolveMode,
    /// Network of steps that do not choose one.
    pub network: NetMode,
    /// `--add-host`.
    pub extra_hosts: Vec<HostIp>,
    /// `--shm-size` in bytes; 0 is the default.
    pub shm_size: i64,
    /// `--ulimit`.
    pub ulimits: Vec<Ulimit>,
    /// Limits of steps.
    pub linux_resources: Option<LinuxResources>,
    /// `--cgroup-parent`.
    pub cgroup_parent: String,
    /// Host name of steps.
    pub hostname: String,
    /// Prefix of cache mount ids.
    pub cache_mount_namespace: String,
    /// Caches to import.
    pub cache_imports: Vec<CacheImport>,
    /// SBOM generator and its parameters, if one is asked for.
    pub sbom: Option<SbomOptions>,
    /// Lint options that replace those of the file.
    pub lint: Option<LintOptions>,
}

/// An SBOM generator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SbomOptions {
    /// Its image.
    pub generator: String,
    /// Its parameters.
    pub parameters: Attrs,
}

/// How an image reference is resolved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResolveMode {
    /// As the daemon sees fit.
    #[default]
    Default,
    /// Ask the registry.
    Pull,
    /// Prefer what is there.
    Local,
}

impl ResolveMode {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Pull => "pull",
            Self::Local => "local",
        }
    }
}

/// Frontend capabilities that a client may ask for.
const FRONTEND_CAPS: &[&str] = &[
    "moby.buildkit.frontend.inputs",
    "moby.buildkit.frontend.subrequests",
    "moby.buildkit.frontend.contexts",
    "moby.buildkit.frontend.gitquerystring",
];

/// The first capability in `frontend.caps` that is not known, and whether it may be forwarded to another frontend.
pub fn unsupported_capability(attrs: &Attrs) -> Option<(String, bool)> {
    let list = attrs.get("frontend.caps").filter(|list| !list.is_empty())?;
    let mut found = None;
    for item in list.split(',') {
        let name = item.split('+').next().unwrap_or_default();
        if FRONTEND_CAPS.contains(&name) {
            continue;
        }
        if !item.contains("+forward") {
            return Some((name.to_owned(), false));
        }
        found = Some((name.to_owned(), true));
    }
    found
}

const DEFAULT_GENERATOR: &str = "docker/buildkit-syft-scanner:stable-1";

impl BuildOptions {
    /// Parses attributes. The error is the sentence for the user.
    pub fn parse(attrs: &Attrs) -> Result<Self, String> {
        let mut attrs = attrs.clone();
        if attrs.get("override-copy-image").is_some_and(|v| !v.is_empty()) {
            return Err("support for \"override-copy-image\" was removed in BuildKit 0.11".to_owned());
        }
        if attrs
            .get("build-arg:BUILDKIT_DISABLE_FILEOP")
            .and_then(|v| parse_bool(v))
            == Some(true)
        {
            let what = "support for \"BUILDKIT_DISABLE_FILEOP\" build-arg was removed in BuildKit 0.11";
            return Err(what.to_owned());
        }
        let text = |attrs: &Attrs, key: &str| attrs.get(key).cloned().unwrap_or_default();
        let platforms = match attrs.get("platform").map(String::as_str) {
            None | Some("") => Vec::new(),
            Some(list) => list.split(',').map(target_platform).collect::<Result<_, _>>()?,
        };
        let resolve_mode = match text(&attrs, "image-resolve-mode").as_str() {
            "" | "default" => ResolveMode::Default,
            "pull" => ResolveMode::Pull,
            "local" => ResolveMode::Local,
            other => return Err(format!("invalid image-resolve-mode: {other}")),
        };
        let extra_hosts =
            extra_hosts(&text(&attrs, "add-hosts")).map_err(|e| format!("failed to parse additional hosts: {e}"))?;
        let shm_size = match text(&attrs, "shm-size").as_str() {
            "" => 0,
            size => parse_int(size, i64::MIN, i64::MAX).map_err(|e| format!("failed to parse shm size: {e}"))?,
        };
        let ulimits = ulimits(&text(&attrs, "ulimit")).map_err(|e| format!("failed to parse ulimit: {e}"))?;
        let linux_resources = linux_resources(&attrs).map_err(|e| format!("failed to parse resource limits: {e}"))?;
        let network = match text(&attrs, "force-network-mode").as_str() {
            "" | "sandbox" => NetMode::Unset,
            "host" => NetMode::Host,
            "none" => NetMode::None,
            other => return Err(format!("invalid netmode {other}")),
        };
        let no_cache = attrs.get("no-cache").map(|list| match list.as_str() {
            "" => Vec::new(),
            list => list.split(',').map(str::to_owned).collect(),
        });
        for (from, to) in [
            ("build-arg:BUILDKIT_MULTI_PLATFORM", "multi-platform"),
            ("build-arg:BUILDKIT_SANDBOX_HOSTNAME", "hostname"),
        ] {
            if let Some(value) = attrs.get(from).filter(|v| !v.is_empty()).cloned() {
                attrs.insert(to.to_owned(), value);
            }
        }
        let mut multi_platform = platforms.len() > 1;
        if let Some(value) = attrs.get("multi-platform").filter(|v| !v.is_empty()) {
            let wanted =
                parse_bool(value).ok_or_else(|| format!("invalid boolean value for multi-platform: {value}"))?;
            if !wanted && multi_platform {
                return Err("conflicting config: returning multiple target platforms is not allowed".to_owned());
            }
            multi_platform = wanted;
        }
        let cache_imports = cache_imports(&attrs)?;
        let sbom = sbom(&attrs)?;
        let lint = match attrs.get("build-arg:BUILDKIT_DOCKERFILE_CHECK") {
            Some(text) => Some(
                LintOptions::parse(text)
                    .map_err(|e| format!("failed to parse build-arg:BUILDKIT_DOCKERFILE_CHECK: {e}"))?,
            ),
            None => None,
        };
        Ok(Self {
            target: text(&attrs, "target"),
            platforms,
            multi_platform,
            build_args: with_prefix(&attrs, "build-arg:"),
            labels: with_prefix(&attrs, "label:"),
            no_cache,
            resolve_mode,
            network,
            extra_hosts,
            shm_size,
            ulimits,
            linux_resources,
            cgroup_parent: text(&attrs, "cgroup-parent"),
            hostname: text(&attrs, "hostname"),
            cache_mount_namespace: text(&attrs, "build-arg:BUILDKIT_CACHE_MOUNT_NS"),
            cache_imports,
            sbom,
            lint,
            attrs,
        })
    }

    /// An attribute, if it is there.
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attrs.get(name).map(String::as_str)
    }

    /// Whether the steps of stage `name` (empty for an unnamed one) are not looked up.
    pub fn ignores_cache_of(&self, name: &str) -> bool {
        match &self.no_cache {
            None => false,
            Some(stages) if stages.is_empty() => true,
            Some(stages) => stages.iter().any(|s| s.to_lowercase() == name.to_lowercase()),
        }
    }
}

/// All attributes whose name starts with `prefix`, without it.
fn with_prefix(attrs: &Attrs, prefix: &str) -> Attrs {
    let range = attrs.range(prefix.to_owned()..);
    range
        .map_while(|(key, value)| Some((key.strip_prefix(prefix)?.to_owned(), value.clone())))
        .collect()
}

fn target_platform(text: &str) -> Result<Platform, String> {
    let parsed = parse_platform(text).map_err(|e| format!("failed to parse target platform {text}: {e}"))?;
    Ok(parsed.normalized())
}

fn extra_hosts(list: &str) -> Result<Vec<HostIp>, String> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    let host = |field: String| {
        let lower = field.to_lowercase();
        let (host, ip) = lower
            .split_once('=')
            .ok_or_else(|| format!("invalid key-value pair {field}"))?;
        let ip: std::net::IpAddr = ip.parse().map_err(|_| format!("failed to parse IP {ip}"))?;
        // A v4 address in v6 clothes is shown as what it is.
        let ip = ip.to_canonical();
        Ok(HostIp {
            host: host.to_owned(),
            ip: ip.to_string(),
        })
    };
    csv_fields(list)?.into_iter().map(host).collect()
}

const ULIMITS: &[&str] = &[
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

fn ulimits(list: &str) -> Result<Vec<Ulimit>, String> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    csv_fields(list)?.iter().map(|field| ulimit(field)).collect()
}

fn ulimit(field: &str) -> Result<Ulimit, String> {
    let (name, limits) = field
        .split_once('=')
        .ok_or_else(|| format!("invalid ulimit argument: {field}"))?;
    if !ULIMITS.contains(&name) {
        return Err(format!("invalid ulimit type: {name}"));
    }
    let number = |text: &str| parse_int(text, i64::MIN, i64::MAX);
    let parts: Vec<&str> = limits.split(':').collect();
    let (soft, hard) = match parts.as_slice() {
        [soft] => (number(soft)?, number(soft)?),
        [soft, hard] => {
            let hard = number(hard)?;
            (number(soft)?, hard)
        }
        _ => {
            let usage = "can only have up to two, `soft[:hard]`";
            return Err(format!("too many limit value arguments - {limits}, {usage}"));
        }
    };
    let rule = "ulimit soft limit must be less than or equal to hard limit";
    match (soft, hard) {
        (_, -1) => {}
        (-1, hard) => return Err(format!("{rule}: soft: -1 (unlimited), hard: {hard}")),
        (soft, hard) if soft > hard => return Err(format!("{rule}: {soft} > {hard}")),
        _ => {}
    }
    Ok(Ulimit {
        name: name.to_owned(),
        soft,
        hard,
    })
}

fn linux_resources(attrs: &Attrs) -> Result<Option<LinuxResources>, String> {
    let value = |key: &str| attrs.get(key).map(String::as_str).filter(|v| !v.is_empty());
    let signed = |key: &str, valid: fn(i64) -> bool, rule: &str| match value(key) {
        None => Ok(0),
        Some(text) => match parse_int(text, i64::MIN, i64::MAX) {
            Err(e) => Err(format!("invalid {key} value: {text}: {e}")),
            Ok(n) if !valid(n) => Err(format!("invalid {key} value: {text}: {rule}")),
            Ok(n) => Ok(n),
        },
    };
    let unsigned = |key: &str| match value(key) {
        None => Ok(0),
        Some(text) => match parse_uint(text, 10, u64::MAX) {
            Err(e) => Err(format!("invalid {key} value: {text}: {e}")),
            Ok(0) => Err(format!("invalid {key} value: {text}: must be > 0")),
            Ok(n) => Ok(n),
        },
    };
    let list = |key: &str| match value(key) {
        None => Ok(String::new()),
        Some(text) => match cpuset(text) {
            Ok(()) => Ok(text.to_owned()),
            Err(e) => Err(format!("invalid {key} value: {text}: {e}")),
        },
    };
    let resources = LinuxResources {
        memory: signed("memory", |n| n > 0, "must be > 0")?,
        memory_swap: signed("memswap", |n| n == -1 || n > 0, "must be -1 (unlimited) or > 0")?,
        cpu_shares: unsigned("cpushares")?,
        cpu_period: unsigned("cpuperiod")?,
        cpu_quota: signed("cpuquota", |n| n > 0, "must be > 0")?,
        cpuset_cpus: list("cpusetcpus")?,
        cpuset_mems: list("cpusetmems")?,
    };
    Ok((resources != LinuxResources::default()).then_some(resources))
}

/// Highest CPU or memory node a list may name.
const MAX_CPU: i64 = 8192;

fn cpuset(text: &str) -> Result<(), String> {
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let number = |t: &str| t.trim().parse::<i64>().ok().filter(|n| *n >= 0);
        match part.split_once('-') {
            None => match number(part) {
                None => return Err(format!("invalid cpuset element {}", quote(part))),
                Some(n) if n > MAX_CPU => {
                    return Err(format!("cpuset element {} exceeds maximum {MAX_CPU}", quote(part)));
                }
                Some(_) => {}
            },
            Some((low, high)) => match (number(low), number(high)) {
                (Some(low), Some(high)) if low <= high && high > MAX_CPU => {
                    return Err(format!("cpuset range {} exceeds maximum {MAX_CPU}", quote(part)));
                }
                (Some(low), Some(high)) if low <= high => {}
                _ => return Err(format!("invalid cpuset range {}", quote(part))),
            },
        }
    }
    Ok(())
}

fn cache_imports(attrs: &Attrs) -> Result<Vec<CacheImport>, String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Entry {
        #[serde(default)]
        r#type: String,
        #[serde(default)]
        attrs: Option<Attrs>,
    }
    let mut imports = Vec::new();
    if let Some(text) = attrs.get("cache-imports").filter(|t| !t.is_empty()) {
        let entries: Option<Vec<Entry>> = serde_json::from_str(text)
            .map_err(|e| format!("failed to unmarshal cache-imports ({}): {e}", quote(text)))?;
        let entries = entries.unwrap_or_default().into_iter();
        imports.extend(entries.map(|e| CacheImport {
            kind: e.r#type,
            attrs: e.attrs.unwrap_or_default(),
        }));
    }
    if let Some(list) = attrs.get("cache-from").filter(|t| !t.is_empty()) {
        imports.extend(list.split(',').map(|reference| CacheImport {
            kind: "registry".to_owned(),
            attrs: [("ref".to_owned(), reference.to_owned())].into(),
        }));
    }
    Ok(imports)
}

fn sbom(attrs: &Attrs) -> Result<Option<SbomOptions>, String> {
    let mut wanted: BTreeMap<String, &str> = BTreeMap::new();
    for (key, value) in attrs {
        let kind = key
            .strip_prefix("attest:")
            .or_else(|| key.strip_prefix("build-arg:BUILDKIT_ATTEST_"));
        if let Some(kind) = kind {
            wanted.insert(kind.to_lowercase(), value);
        }
    }
    let mut found = None;
    for (kind, value) in &wanted {
        let fields = if value.is_empty() {
            Vec::new()
        } else {
            csv_fields(value).map_err(|e| format!("failed to parse {kind}: {e}"))?
        };
        match kind.as_str() {
            "sbom" => {
                let mut generator = DEFAULT_GENERATOR.to_owned();
                let mut parameters = Attrs::new();
                for field in fields {
                    let (key, value) = field.split_once('=').unwrap_or((&field, ""));
                    if key == "generator" {
                        value.clone_into(&mut generator);
                    } else {
                        parameters.insert(key.to_owned(), value.to_owned());
                    }
                }
                let image = ImageRef::parse(&generator)
                    .map_err(|e| format!("failed to parse sbom scanner {generator}: {e}"))?;
                found = Some(SbomOptions {
                    generator: image.or_latest().to_string(),
                    parameters,
                });
            }
            "provenance" => {}
            other => return Err(format!("unknown attestation type {}", quote(other))),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<BuildOptions, String> {
        BuildOptions::parse(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    #[test]
    fn attributes() {
        let o = parse(&[
            ("platform", "linux/arm,x86_64"),
            ("build-arg:A", "1"),
            ("build-arg:BUILDKIT_SANDBOX_HOSTNAME", "box"),
            ("label:l", "v"),
            ("add-hosts", "Db=10.0.0.1,x=::1"),
            ("ulimit", "nofile=1:2,core=-1"),
            ("memory", "5"),
            ("cache-imports", r#"[{"Type":"local","Attrs":{"src":"x"}}]"#),
            ("cache-from", "a,b"),
            ("no-cache", "One,two"),
        ])
        .unwrap();
        assert_eq!(
            o.platforms.iter().map(Platform::id).collect::<Vec<_>>(),
            ["linux/arm/v7", "linux/amd64"]
        );
        assert!(o.multi_platform);
        assert_eq!(
            (o.hostname.as_str(), o.labels.get("l").map(String::as_str)),
            ("box", Some("v"))
        );
        assert_eq!(
            o.extra_hosts[0],
            HostIp {
                host: "db".into(),
                ip: "10.0.0.1".into()
            }
        );
        assert_eq!(
            o.ulimits[1],
            Ulimit {
                name: "core".into(),
                soft: -1,
                hard: -1
            }
        );
        assert_eq!(o.linux_resources.as_ref().map(|r| r.memory), Some(5));
        assert_eq!(o.cache_imports.len(), 3);
        assert!(o.ignores_cache_of("one") && !o.ignores_cache_of(""));
        assert!(parse(&[("no-cache", "")]).unwrap().ignores_cache_of(""));
        assert_eq!(
            parse(&[("attest:sbom", "a=b")]).unwrap().sbom.unwrap().generator,
            "docker.io/docker/buildkit-syft-scanner:stable-1"
        );
    }

    #[test]
    fn refused_attributes() {
        for (key, value, message) in [
            ("platform", "a/b/c/d", "failed to parse target platform a/b/c/d: "),
            ("multi-platform", "x", "invalid boolean value for multi-platform: x"),
            ("image-resolve-mode", "x", "invalid image-resolve-mode: x"),
            ("force-network-mode", "x", "invalid netmode x"),
            (
                "add-hosts",
                "a",
                "failed to parse additional hosts: invalid key-value pair a",
            ),
            (
                "add-hosts",
                "a=b",
                "failed to parse additional hosts: failed to parse IP b",
            ),
            (
                "shm-size",
                "x",
                "failed to parse shm size: strconv.ParseInt: parsing \"x\": invalid syntax",
            ),
            ("ulimit", "x", "failed to parse ulimit: invalid ulimit argument: x"),
            ("ulimit", "x=1", "failed to parse ulimit: invalid ulimit type: x"),
            (
                "memory",
                "0",
                "failed to parse resource limits: invalid memory value: 0: must be > 0",
            ),
            (
                "memswap",
                "0",
                "failed to parse resource limits: invalid memswap value: 0: must be -1 (unlimited) or > 0",
            ),
            (
                "cpusetcpus",
                "3-1",
                "failed to parse resource limits: invalid cpusetcpus value: 3-1: invalid cpuset range \"3-1\"",
            ),
            ("cache-imports", "x", "failed to unmarshal cache-imports (\"x\"): "),
            ("attest:foo", "", "unknown attestation type \"foo\""),
            ("attest:sbom", "generator=A", "failed to parse sbom scanner A: "),
            (
                "override-copy-image",
                "x",
                "support for \"override-copy-image\" was removed in BuildKit 0.11",
            ),
            (
                "build-arg:BUILDKIT_DISABLE_FILEOP",
                "1",
                "support for \"BUILDKIT_DISABLE_FILEOP\" build-arg was removed in BuildKit 0.11",
            ),
            (
                "build-arg:BUILDKIT_DOCKERFILE_CHECK",
                "x",
                "failed to parse build-arg:BUILDKIT_DOCKERFILE_CHECK: invalid check option \"x\"",
            ),
        ] {
            let error = parse(&[(key, value)]).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
        assert_eq!(
            parse(&[("platform", "linux/amd64,linux/arm64"), ("multi-platform", "0")]).unwrap_err(),
            "conflicting config: returning multiple target platforms is not allowed"
        );
    }

    #[test]
    fn frontend_capabilities() {
        let of = |caps: &str| unsupported_capability(&[("frontend.caps".to_owned(), caps.to_owned())].into());
        assert_eq!(of("moby.buildkit.frontend.inputs"), None);
        assert_eq!(of("a+forward,b"), Some(("b".into(), false)));
        assert_eq!(of("a+forward"), Some(("a".into(), true)));
    }
}
