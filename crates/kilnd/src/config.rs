//! The configuration file (`buildkitd.toml`) and how flags override it.
//!
//! Keys are buildkitd's. A key Kiln does not know, or knows and does not act on, is named in a warning at start.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::flags::Flags;
use crate::size::{DiskSpace, DiskSpaceText, DurationText, parse_size};

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to read configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("failed to parse configuration {path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be used.
    #[error("invalid value `{value}` for {key}")]
    Value {
        /// Flag or key.
        key: String,
        /// The value.
        value: String,
    },
    /// Something asked for that Kiln does not have.
    #[error("{0}")]
    Unsupported(String),
}

/// The file as written; every key optional.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct File {
    debug: Option<bool>,
    root: Option<PathBuf>,
    #[serde(rename = "insecure-entitlements")]
    insecure_entitlements: Option<Vec<String>>,
    #[serde(default)]
    log: LogFile,
    #[serde(default)]
    grpc: GrpcFile,
    #[serde(default)]
    worker: BTreeMap<String, toml::Value>,
    #[serde(default)]
    registry: BTreeMap<String, RegistryHost>,
    dns: Option<Dns>,
    #[serde(default)]
    history: HistoryFile,
    #[serde(default)]
    system: SystemFile,
    #[serde(default)]
    frontend: BTreeMap<String, FrontendFile>,
    #[serde(flatten)]
    rest: BTreeMap<String, toml::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct LogFile {
    format: Option<String>,
    level: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct GrpcFile {
    #[serde(default)]
    address: Vec<String>,
    uid: Option<u32>,
    gid: Option<u32>,
    #[serde(default)]
    tls: TlsFile,
    #[serde(flatten)]
    rest: BTreeMap<String, toml::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct TlsFile {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct OciWorkerFile {
    enabled: Option<bool>,
    #[serde(default)]
    platforms: Vec<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    snapshotter: Option<String>,
    rootless: Option<bool>,
    gc: Option<bool>,
    #[serde(rename = "reservedSpace")]
    reserved_space: Option<DiskSpaceText>,
    #[serde(rename = "maxUsedSpace")]
    max_used_space: Option<DiskSpaceText>,
    #[serde(rename = "minFreeSpace")]
    min_free_space: Option<DiskSpaceText>,
    gckeepstorage: Option<DiskSpaceText>,
    #[serde(default)]
    gcpolicy: Vec<GcPolicyFile>,
    #[serde(rename = "networkMode")]
    network_mode: Option<String>,
    #[serde(rename = "defaultCgroupParent")]
    default_cgroup_parent: Option<String>,
    #[serde(rename = "max-parallelism")]
    max_parallelism: Option<usize>,
    #[serde(flatten)]
    rest: BTreeMap<String, toml::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct GcPolicyFile {
    #[serde(default)]
    all: bool,
    #[serde(rename = "keepDuration")]
    keep_duration: Option<DurationText>,
    #[serde(default)]
    filters: Vec<String>,
    #[serde(rename = "reservedSpace", alias = "keepBytes")]
    reserved_space: Option<DiskSpaceText>,
    #[serde(rename = "maxUsedSpace")]
    max_used_space: Option<DiskSpaceText>,
    #[serde(rename = "minFreeSpace")]
    min_free_space: Option<DiskSpaceText>,
}

/// How a registry host is reached.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct RegistryHost {
    /// Hosts asked first, in order.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// Speak plain http.
    pub http: Option<bool>,
    /// Accept any certificate.
    pub insecure: Option<bool>,
    /// Certificate authorities to trust.
    #[serde(default)]
    pub ca: Vec<PathBuf>,
    /// Client certificates.
    #[serde(default)]
    pub keypair: Vec<KeyPair>,
    /// Directories with `*.crt`, `*.cert` and `*.key`.
    #[serde(default)]
    pub tlsconfigdir: Vec<PathBuf>,
}

/// A client certificate and its key.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct KeyPair {
    /// Key file.
    pub key: PathBuf,
    /// Certificate file.
    pub cert: PathBuf,
}

/// Name resolution inside steps.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Dns {
    /// Addresses of servers.
    #[serde(default)]
    pub nameservers: Vec<String>,
    /// Options as in `resolv.conf(5)`.
    #[serde(default)]
    pub options: Vec<String>,
    /// Domains searched.
    #[serde(default, rename = "searchDomains")]
    pub search_domains: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct HistoryFile {
    #[serde(rename = "maxAge")]
    max_age: Option<DurationText>,
    #[serde(rename = "maxEntries")]
    max_entries: Option<usize>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct SystemFile {
    #[serde(rename = "maxRegistryConcurrency")]
    max_registry_concurrency: Option<usize>,
    #[serde(flatten)]
    rest: BTreeMap<String, toml::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct FrontendFile {
    enabled: Option<bool>,
    #[serde(default, rename = "allowedRepositories")]
    allowed_repositories: Vec<String>,
    #[serde(rename = "official-as-image")]
    official_as_image: Option<bool>,
}

/// One rule of garbage collection.
#[derive(Clone, Debug, Default)]
pub struct GcRule {
    /// Internal records too.
    pub all: bool,
    /// Only what was not used for this long.
    pub keep: Duration,
    /// Only what matches one of these.
    pub filters: Vec<String>,
    /// Never below this total.
    pub reserved: Option<DiskSpace>,
    /// Down to this total.
    pub max_used: Option<DiskSpace>,
    /// Until this much of the disk is free.
    pub min_free: Option<DiskSpace>,
}

/// Certificates of tcp listeners.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Server certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// CA that clients must come from.
    pub ca: Option<PathBuf>,
}

/// Everything the daemon is told, flags and file joined.
#[derive(Clone, Debug)]
pub struct Config {
    /// State directory.
    pub root: PathBuf,
    /// Listening addresses.
    pub addresses: Vec<String>,
    /// Owner of unix sockets.
    pub socket_uid: Option<u32>,
    /// Group of unix sockets.
    pub socket_gid: Option<u32>,
    /// TLS for tcp and fd listeners.
    pub tls: Option<Tls>,
    /// Log filter.
    pub log_level: String,
    /// Whether logs are JSON.
    pub log_json: bool,
    /// Entitlements that builds may ask for.
    pub entitlements: Vec<String>,
    /// Whether the daemon runs without privileges on the host.
    pub rootless: bool,
    /// A directory that does not survive a reboot, if the machine has one: `$XDG_RUNTIME_DIR/kiln` or `/run/kiln`.
    pub runtime_dir: Option<PathBuf>,
    /// `overlayfs` or `native`; `None` chooses.
    pub snapshotter: Option<String>,
    /// Labels of the worker.
    pub labels: BTreeMap<String, String>,
    /// Platforms given; empty means found out.
    pub platforms: Vec<String>,
    /// Network of steps.
    pub network: String,
    /// Parent of step cgroups.
    pub cgroup_parent: String,
    /// Most steps at the same time.
    pub max_parallelism: Option<usize>,
    /// Whether garbage is collected.
    pub gc: bool,
    /// The rules; empty means the defaults for the disk.
    pub gc_rules: Vec<GcRule>,
    /// Limits for the default rules.
    pub gc_limits: (Option<DiskSpace>, Option<DiskSpace>, Option<DiskSpace>),
    /// Registries by host.
    pub registries: BTreeMap<String, RegistryHost>,
    /// Name resolution in steps.
    pub dns: Option<Dns>,
    /// History: how long entries stay at least.
    pub history_age: Duration,
    /// History: how many entries stay at least.
    pub history_entries: usize,
    /// Connections to one registry host.
    pub registry_connections: usize,
    /// Whether the built-in frontend may be used.
    pub dockerfile_frontend: bool,
    /// Whether frontend images may be used.
    pub gateway_frontend: bool,
    /// Repositories that frontend images may come from; empty means any.
    pub gateway_repositories: Vec<String>,
    /// Whether official Dockerfile frontend images are run instead of the built-in frontend.
    pub official_frontend_as_image: bool,
    /// What was given and has no effect.
    pub ignored: Vec<String>,
}

const UNIMPLEMENTED_TOP: &[&str] = &["proxyNetwork", "provenanceEnvDir", "otel", "cdi", "cache", "trace"];

impl Config {
    /// Joins flags, the file they name (or the default one if it exists) and the defaults.
    pub fn load(flags: &Flags, caller: Caller) -> Result<Self, ConfigError> {
        let file = read_file(flags, caller.has_own_paths())?;
        Self::join(flags, file, caller)
    }

    fn join(flags: &Flags, file: File, caller: Caller) -> Result<Self, ConfigError> {
        let own_paths = caller.has_own_paths();
        let mut ignored: Vec<String> = flags.without_effect().into_iter().map(str::to_owned).collect();
        for key in file.rest.keys() {
            let known = UNIMPLEMENTED_TOP.contains(&key.as_str());
            ignored.push(if known {
                format!("[{key}] (not implemented)")
            } else {
                format!("{key} (unknown key)")
            });
        }
        ignored.extend(file.grpc.rest.keys().map(|k| format!("grpc.{k}")));
        ignored.extend(file.system.rest.keys().map(|k| format!("system.{k}")));
        for (name, value) in &file.worker {
            let on = value.get("enabled").and_then(toml::Value::as_bool).unwrap_or(true);
            if name != "oci" && on {
                ignored.push(format!("worker.{name} (Kiln has one worker, oci)"));
            }
        }
        let oci: OciWorkerFile = match file.worker.get("oci") {
            None => OciWorkerFile::default(),
            Some(v) => v.clone().try_into().map_err(|e: toml::de::Error| ConfigError::Value {
                key: "worker.oci".into(),
                value: e.message().to_owned(),
            })?,
        };
        ignored.extend(oci.rest.keys().map(|k| format!("worker.oci.{k}")));
        worker_switches(flags, &oci)?;
        let snapshotter = snapshotter(flags, &oci)?;
        let network = flags
            .oci_worker_net
            .clone()
            .or(oci.network_mode.clone())
            .unwrap_or_else(|| "auto".into());
        if !["auto", "host", "none", "bridge"].contains(&network.as_str()) {
            return Err(ConfigError::Unsupported(format!(
                "network mode `{network}` is not available: use auto, host, none or bridge"
            )));
        }
        let debug = flags.debug.or(file.debug).unwrap_or(false);
        let log_level = flags.log_level.clone().or(file.log.level.clone());
        let frontend = |name: &str| file.frontend.get(name).cloned().unwrap_or_default();
        Ok(Self {
            root: flags
                .root
                .clone()
                .or(file.root.clone())
                .unwrap_or_else(|| default_root(own_paths)),
            addresses: first_non_empty(&[&flags.addr, &file.grpc.address], || vec![default_address(own_paths)]),
            socket_uid: file.grpc.uid,
            socket_gid: match &flags.group {
                Some(group) => Some(group_id(group)?),
                None => file.grpc.gid,
            },
            tls: tls(flags, &file.grpc.tls)?,
            log_level: log_level.unwrap_or_else(|| if debug { "debug".into() } else { "info".into() }),
            log_json: flags.log_format.clone().or(file.log.format.clone()).as_deref() == Some("json"),
            entitlements: if flags.allow_insecure_entitlement.is_empty() {
                file.insecure_entitlements.clone().unwrap_or_default()
            } else {
                flags.allow_insecure_entitlement.clone()
            },
            rootless: caller.rootless(flags.rootless.or(flags.oci_worker_rootless).or(oci.rootless))?,
            runtime_dir: runtime_dir(own_paths),
            snapshotter,
            labels: labels(flags, &oci)?,
            platforms: first_non_empty(&[&flags.oci_worker_platform, &oci.platforms], Vec::new),
            network,
            cgroup_parent: oci.default_cgroup_parent.clone().unwrap_or_default(),
            max_parallelism: match &flags.oci_max_parallelism {
                Some(text) => Some(parallelism(text)?),
                None => oci.max_parallelism,
            }
            .filter(|n| *n > 0),
            gc: flags.oci_worker_gc.or(oci.gc).unwrap_or(true),
            gc_rules: oci.gcpolicy.iter().map(gc_rule).collect::<Result<_, _>>()?,
            gc_limits: gc_limits(flags, &oci)?,
            registries: file.registry.clone(),
            dns: file.dns.clone(),
            history_age: match &file.history.max_age {
                Some(d) => d.parse().map_err(|value| ConfigError::Value {
                    key: "history.maxAge".into(),
                    value,
                })?,
                None => Duration::from_secs(48 * 3600),
            },
            history_entries: file.history.max_entries.unwrap_or(50),
            registry_connections: file.system.max_registry_concurrency.unwrap_or(4).max(1),
            dockerfile_frontend: frontend("dockerfile.v0").enabled.unwrap_or(true),
            gateway_frontend: frontend("gateway.v0").enabled.unwrap_or(true),
            gateway_repositories: frontend("gateway.v0").allowed_repositories,
            official_frontend_as_image: frontend("dockerfile.v0").official_as_image.unwrap_or(false),
            ignored,
        })
    }
}

/// Who starts the daemon, seen before it makes a user namespace of its own: inside everybody is root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Root of the machine.
    Root,
    /// An ordinary user.
    User,
    /// Root of a user namespace that somebody else made, and whether that is an ordinary user by name (`$USER`).
    Mapped {
        /// It is.
        by_user: bool,
    },
}

impl Caller {
    /// Looks at this process.
    pub fn of_process() -> Self {
        if !rustix::process::geteuid().is_root() {
            return Self::User;
        }
        if !kiln_executor::in_user_namespace() {
            return Self::Root;
        }
        let by_user = std::env::var_os("USER").is_some_and(|name| !name.is_empty() && name != "root");
        Self::Mapped { by_user }
    }

    /// Whether the default paths are the user's own.
    fn has_own_paths(self) -> bool {
        matches!(self, Self::User | Self::Mapped { by_user: true })
    }

    /// Whether the daemon will be rootless, which is not a matter of choice: what is asked for must agree.
    fn rootless(self, wanted: Option<bool>) -> Result<bool, ConfigError> {
        match (self, wanted) {
            (Self::Root, Some(true)) => Err(ConfigError::Unsupported(
                "rootless operation is for ordinary users: start kilnd as one, or leave --rootless out".into(),
            )),
            (Self::User, Some(false)) => Err(ConfigError::Unsupported(
                "an ordinary user's daemon is rootless: start kilnd as root, or leave --rootless=false out".into(),
            )),
            (Self::Root, _) => Ok(false),
            (Self::User | Self::Mapped { .. }, _) => Ok(true),
        }
    }
}

fn read_file(flags: &Flags, rootless: bool) -> Result<File, ConfigError> {
    let (path, must_exist) = match &flags.config {
        Some(path) => (path.clone(), true),
        None => (default_config_file(rootless), false),
    };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !must_exist => return Ok(File::default()),
        Err(source) => return Err(ConfigError::Read { path, source }),
    };
    toml::from_str(&text).map_err(|source| ConfigError::Parse {
        path,
        source: Box::new(source),
    })
}

fn worker_switches(flags: &Flags, oci: &OciWorkerFile) -> Result<(), ConfigError> {
    let oci_on = match flags.oci_worker.as_deref() {
        None => oci.enabled.unwrap_or(true),
        Some("true" | "auto") => true,
        Some("false") => false,
        Some(other) => {
            return Err(ConfigError::Value {
                key: "--oci-worker".into(),
                value: other.into(),
            });
        }
    };
    if !oci_on {
        return Err(ConfigError::Unsupported(
            "no worker found: the oci worker is switched off and Kiln has no other".into(),
        ));
    }
    match flags.containerd_worker.as_deref() {
        Some("true") => Err(ConfigError::Unsupported(
            "Kiln has no containerd worker: leave --containerd-worker out".into(),
        )),
        Some("false" | "auto") | None => Ok(()),
        Some(other) => Err(ConfigError::Value {
            key: "--containerd-worker".into(),
            value: other.into(),
        }),
    }
}

fn snapshotter(flags: &Flags, oci: &OciWorkerFile) -> Result<Option<String>, ConfigError> {
    if flags.oci_worker_proxy_snapshotter_path.is_some() {
        return Err(ConfigError::Unsupported("proxy snapshotters are not available".into()));
    }
    match flags.oci_worker_snapshotter.as_deref().or(oci.snapshotter.as_deref()) {
        None | Some("" | "auto") => Ok(None),
        Some(name @ ("overlayfs" | "native")) => Ok(Some(name.to_owned())),
        Some(other) => Err(ConfigError::Unsupported(format!(
            "snapshotter `{other}` is not available: use auto, overlayfs or native"
        ))),
    }
}

fn labels(flags: &Flags, oci: &OciWorkerFile) -> Result<BTreeMap<String, String>, ConfigError> {
    let mut out = oci.labels.clone();
    for text in &flags.oci_worker_labels {
        let (k, v) = text.split_once('=').ok_or_else(|| ConfigError::Value {
            key: "--oci-worker-labels".into(),
            value: text.clone(),
        })?;
        out.insert(k.to_owned(), v.to_owned());
    }
    Ok(out)
}

fn parallelism(text: &str) -> Result<usize, ConfigError> {
    if text == "num-cpu" {
        return Ok(std::thread::available_parallelism().map_or(1, usize::from));
    }
    text.parse().map_err(|_| ConfigError::Value {
        key: "--oci-max-parallelism".into(),
        value: text.into(),
    })
}

fn gc_rule(file: &GcPolicyFile) -> Result<GcRule, ConfigError> {
    let space = |text: &Option<DiskSpaceText>, key: &str| {
        text.as_ref()
            .map(DiskSpaceText::parse)
            .transpose()
            .map_err(|value| ConfigError::Value {
                key: format!("gcpolicy.{key}"),
                value,
            })
    };
    Ok(GcRule {
        all: file.all,
        keep: file
            .keep_duration
            .as_ref()
            .map(DurationText::parse)
            .transpose()
            .map_err(|value| ConfigError::Value {
                key: "gcpolicy.keepDuration".into(),
                value,
            })?
            .unwrap_or_default(),
        filters: file.filters.clone(),
        reserved: space(&file.reserved_space, "reservedSpace")?,
        max_used: space(&file.max_used_space, "maxUsedSpace")?,
        min_free: space(&file.min_free_space, "minFreeSpace")?,
    })
}

type Limits = (Option<DiskSpace>, Option<DiskSpace>, Option<DiskSpace>);

fn gc_limits(flags: &Flags, oci: &OciWorkerFile) -> Result<Limits, ConfigError> {
    if let Some(text) = &flags.oci_worker_gc_keepstorage {
        let bad = || ConfigError::Value {
            key: "--oci-worker-gc-keepstorage".into(),
            value: text.clone(),
        };
        let mut parts = text.split(',').map(|part| match part.trim() {
            "" => Ok(None),
            p if p.ends_with('%') => crate::size::parse_disk_space(p).map(Some).ok_or_else(bad),
            p => parse_size(&format!("{p}MB"))
                .or_else(|| parse_size(p))
                .map(DiskSpace::Bytes)
                .map(Some)
                .ok_or_else(bad),
        });
        let mut next = || parts.next().transpose().map(Option::flatten);
        let (reserved, free, max) = (next()?, next()?, next()?);
        return Ok((reserved, free, max));
    }
    let space = |text: Option<&DiskSpaceText>, key: &str| {
        text.map(DiskSpaceText::parse)
            .transpose()
            .map_err(|value| ConfigError::Value {
                key: format!("worker.oci.{key}"),
                value,
            })
    };
    Ok((
        space(
            oci.reserved_space.as_ref().or(oci.gckeepstorage.as_ref()),
            "reservedSpace",
        )?,
        space(oci.min_free_space.as_ref(), "minFreeSpace")?,
        space(oci.max_used_space.as_ref(), "maxUsedSpace")?,
    ))
}

fn tls(flags: &Flags, file: &TlsFile) -> Result<Option<Tls>, ConfigError> {
    let cert = flags.tlscert.clone().or(file.cert.clone());
    let key = flags.tlskey.clone().or(file.key.clone());
    let ca = flags.tlscacert.clone().or(file.ca.clone());
    match (cert, key) {
        (Some(cert), Some(key)) => Ok(Some(Tls { cert, key, ca })),
        (None, None) if ca.is_none() => Ok(None),
        _ => Err(ConfigError::Unsupported(
            "TLS needs both a certificate and its key".into(),
        )),
    }
}

fn first_non_empty(lists: &[&Vec<String>], default: impl FnOnce() -> Vec<String>) -> Vec<String> {
    lists
        .iter()
        .find(|l| !l.is_empty())
        .map_or_else(default, |l| (*l).clone())
}

fn group_id(group: &str) -> Result<u32, ConfigError> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    match nix::unistd::Group::from_name(group) {
        Ok(Some(found)) => Ok(found.gid.as_raw()),
        _ => Err(ConfigError::Value {
            key: "--group".into(),
            value: group.into(),
        }),
    }
}

fn home_dir(variable: &str, below_home: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => Path::new(&std::env::var_os("HOME").unwrap_or_else(|| "/".into())).join(below_home),
    }
}

fn default_root(rootless: bool) -> PathBuf {
    if rootless {
        home_dir("XDG_DATA_HOME", ".local/share").join("buildkit")
    } else {
        "/var/lib/buildkit".into()
    }
}

fn default_config_file(rootless: bool) -> PathBuf {
    if rootless {
        home_dir("XDG_CONFIG_HOME", ".config").join("buildkit/buildkitd.toml")
    } else {
        "/etc/buildkit/buildkitd.toml".into()
    }
}

fn default_address(rootless: bool) -> String {
    if rootless {
        format!("unix://{}/buildkit/buildkitd.sock", user_runtime_dir().display())
    } else {
        "unix:///run/buildkit/buildkitd.sock".into()
    }
}

fn user_runtime_dir() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => format!("/run/user/{}", rustix::process::getuid().as_raw()).into(),
    }
}

/// Only in memory: what lies on a disk says nothing about this boot.
fn runtime_dir(rootless: bool) -> Option<PathBuf> {
    const TMPFS: i64 = 0x0102_1994;
    let above = if rootless { user_runtime_dir() } else { "/run".into() };
    let found = rustix::fs::statfs(&above).ok()?;
    (found.f_type as i64 == TMPFS).then(|| above.join("kiln"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn join_as(caller: Caller, args: &[&str], file: &str) -> Result<Config, ConfigError> {
        let flags = Flags::parse_from(std::iter::once("kilnd").chain(args.iter().copied()));
        Config::join(&flags, toml::from_str(file).unwrap(), caller)
    }

    fn join(args: &[&str], file: &str) -> Result<Config, ConfigError> {
        join_as(Caller::Root, args, file)
    }

    #[test]
    fn who_starts_it_decides_whether_it_is_rootless() {
        let mapped = Caller::Mapped { by_user: true };
        let root = join_as(Caller::Root, &[], "").unwrap();
        assert_eq!((root.root, root.rootless), ("/var/lib/buildkit".into(), false));
        for caller in [Caller::User, mapped] {
            let config = join_as(caller, &["--rootless"], "").unwrap();
            assert!(config.rootless && config.root.ends_with("buildkit"), "{caller:?}");
            assert_ne!(config.root, PathBuf::from("/var/lib/buildkit"));
            assert!(join_as(caller, &[], "").unwrap().rootless);
        }
        let container = join_as(Caller::Mapped { by_user: false }, &[], "").unwrap();
        assert_eq!((container.root, container.rootless), ("/var/lib/buildkit".into(), true));
        assert!(join_as(Caller::Root, &["--rootless"], "").is_err());
        assert!(join_as(Caller::Root, &[], "[worker.oci]\nrootless = true").is_err());
        assert!(join_as(Caller::User, &["--oci-worker-rootless=false"], "").is_err());
    }

    #[test]
    fn flags_override_the_file() {
        let file = r#"
            root = "/a"
            insecure-entitlements = ["network.host"]
            [grpc]
            address = ["unix:///x.sock"]
            [worker.oci]
            max-parallelism = 3
            reservedSpace = "10%"
            [[worker.oci.gcpolicy]]
            keepDuration = "48h"
            filters = ["type==source.local"]
            reservedSpace = "512MB"
            [registry."docker.io"]
            mirrors = ["localhost:5000"]
            [registry."localhost:5000"]
            http = true
        "#;
        let c = join(
            &["--root", "/b", "--oci-worker-gc=false", "--addr", "tcp://0.0.0.0:1"],
            file,
        )
        .unwrap();
        assert_eq!(c.root, PathBuf::from("/b"));
        assert_eq!(c.addresses, ["tcp://0.0.0.0:1"]);
        assert_eq!(c.max_parallelism, Some(3));
        assert!(!c.gc);
        assert_eq!(c.entitlements, ["network.host"]);
        assert_eq!(c.gc_rules.len(), 1);
        assert_eq!(c.gc_rules[0].keep, Duration::from_secs(48 * 3600));
        assert_eq!(c.registries["docker.io"].mirrors, ["localhost:5000"]);
        assert_eq!(c.registries["localhost:5000"].http, Some(true));
        assert!(c.ignored.is_empty(), "{:?}", c.ignored);
    }

    #[test]
    fn what_has_no_effect_is_named_and_what_is_wrong_refused() {
        let c = join(
            &["--oci-worker-binary=crun"],
            "nonsense = 1\n[otel]\nsocketPath='/x'\n[worker.oci]\nselinux=true",
        )
        .unwrap();
        assert_eq!(
            c.ignored,
            [
                "--oci-worker-binary",
                "nonsense (unknown key)",
                "[otel] (not implemented)",
                "worker.oci.selinux"
            ]
        );
        for args in [
            &["--oci-worker=false"][..],
            &["--containerd-worker=true"],
            &["--oci-worker-snapshotter=stargz"],
            &["--tlscert=/x"],
            &["--oci-max-parallelism=x"],
            &["--oci-worker-net=cni"],
        ] {
            assert!(join(args, "").is_err(), "{args:?}");
        }
        assert!(join(&[], "[[worker.oci.gcpolicy]]\nkeepDuration='x'").is_err());
    }
}
