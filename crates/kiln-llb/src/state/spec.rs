//! What steps are made of: processes, file changes, owners, and what is said about them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use kiln_oci::Platform;

use super::{Output, State, Surroundings};
use crate::definition::{LinuxResources, ProgressGroup};
use crate::op::*;
use crate::source_map::{SourceInfo, SourceRange};

/// What is said about a node beside its operation.
#[derive(Clone, Debug, Default)]
pub struct Constraints {
    /// Platform, where the operation has one.
    pub platform: Option<Platform>,
    /// Texts by name; see [`Constraints::named`].
    pub description: BTreeMap<String, String>,
    /// Do not look the result up.
    pub ignore_cache: bool,
    /// Capabilities the operation needs.
    pub caps: BTreeSet<String>,
    /// Shown as one with others.
    pub progress_group: Option<ProgressGroup>,
    /// Limits of the process.
    pub linux_resources: Option<LinuxResources>,
    /// Places in the user's text.
    pub locations: Vec<Location>,
}

/// A place in a text.
#[derive(Clone, Debug)]
pub struct Location {
    /// The text.
    pub file: Arc<SourceInfo>,
    /// The ranges.
    pub ranges: Vec<SourceRange>,
}

impl Constraints {
    /// Constraints with the name that is shown to the user.
    pub fn named(name: impl Into<String>) -> Self {
        Self::default().described("llb.customname", name)
    }

    /// The same with one more text.
    #[must_use]
    pub fn described(mut self, key: &str, text: impl Into<String>) -> Self {
        self.description.insert(key.to_owned(), text.into());
        self
    }

    /// The same for a platform.
    #[must_use]
    pub fn on(mut self, platform: Option<Platform>) -> Self {
        self.platform = platform;
        self
    }

    pub(super) fn need(&mut self, cap: &str) {
        if !self.caps.contains(cap) {
            self.caps.insert(cap.to_owned());
        }
    }
}

/// A process to run.
#[derive(Clone, Debug, Default)]
pub struct ExecSpec {
    /// Arguments; may not be empty when written out.
    pub args: Vec<String>,
    /// Proxy settings.
    pub proxy_env: Option<ProxyEnv>,
    /// Additional host names.
    pub extra_hosts: Vec<HostIp>,
    /// Resource limits.
    pub ulimits: Vec<Ulimit>,
    /// Parent of the cgroup.
    pub cgroup_parent: String,
    /// Network, if it differs from the surroundings.
    pub network: Option<NetMode>,
    /// Confinement.
    pub security: SecurityMode,
    /// Mounts beside the root.
    pub mounts: Vec<MountSpec>,
    /// Secrets.
    pub secrets: Vec<SecretSpec>,
    /// Agent sockets.
    pub ssh: Vec<SshSpec>,
    /// Devices.
    pub cdi_devices: Vec<CdiDevice>,
    /// Whether the daemon adds a missing `PATH` itself (capability `exec.meta.setsdefaultpath`).
    pub sets_default_path: bool,
}

/// A process with what it runs in.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) spec: ExecSpec,
    pub(super) root: Option<Output>,
    pub(super) around: Arc<Surroundings>,
}

/// A mount of a process.
#[derive(Clone, Debug, Default)]
pub struct MountSpec {
    /// Where.
    pub target: String,
    /// What; the empty state for nothing.
    pub source: State,
    /// Path in the source; empty is its root.
    pub selector: String,
    /// Not writable.
    pub readonly: bool,
    /// Writable, but what is written is thrown away.
    pub no_output: bool,
    /// A cache directory.
    pub cache: Option<CacheMountOpt>,
    /// A directory in memory of at most so many bytes; 0 is no limit.
    pub tmpfs: Option<i64>,
}

impl MountSpec {
    pub(super) fn has_output(&self) -> bool {
        !self.no_output && !self.readonly && self.cache.is_none() && self.tmpfs.is_none()
    }
}

/// A secret for a process.
#[derive(Clone, Debug, Default)]
pub struct SecretSpec {
    /// File to write it to, with owner and mode.
    pub target: Option<SecretMountTarget>,
    /// Its id.
    pub id: String,
    /// Variable to hand it over in.
    pub env: Option<String>,
    /// Whether it may be missing.
    pub optional: bool,
}

/// Where and how a secret appears as a file.
#[derive(Clone, Debug, Default)]
pub struct SecretMountTarget {
    /// Path.
    pub path: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

/// An agent socket for a process.
#[derive(Clone, Debug, Default)]
pub struct SshSpec {
    /// Path; empty is `/run/buildkit/ssh_agent.<n>`.
    pub target: String,
    /// Id and owner.
    pub opt: SshMountOpt,
}

/// One change of a file operation.
#[derive(Clone, Debug)]
pub enum FileStep {
    /// Makes a directory.
    MkDir {
        /// Path.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Make parents too.
        make_parents: bool,
        /// Owner.
        owner: Option<Owner>,
        /// mtime in nanoseconds, `-1` for now.
        timestamp: i64,
    },
    /// Writes a file.
    MkFile {
        /// Path.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Content.
        data: Bytes,
        /// Owner.
        owner: Option<Owner>,
        /// mtime in nanoseconds, `-1` for now.
        timestamp: i64,
    },
    /// Copies.
    Copy {
        /// Where from; the empty state for nothing.
        from: State,
        /// What and how; paths as given, `owner` is taken from the other field.
        copy: Box<CopyAction>,
        /// Owner.
        owner: Option<Owner>,
    },
}

/// An owner by name or number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub user: Option<OwnerId>,
    /// Group.
    pub group: Option<OwnerId>,
}

/// One half of an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnerId {
    /// Looked up in the file system the change is made to.
    Name(String),
    /// The number itself.
    Id(u32),
}

impl Owner {
    /// From `user[:group]`: `root` is 0, decimal numbers are ids, an empty part is 0, anything else is a name.
    pub fn parse(text: &str) -> Self {
        let half = |text: &str| match text {
            "" | "root" => OwnerId::Id(0),
            // Negative numbers wrap, as the wire has no sign here.
            text => text
                .parse::<i32>()
                .map_or_else(|_| OwnerId::Name(text.to_owned()), |n| OwnerId::Id(n as u32)),
        };
        let mut parts = text.splitn(2, ':');
        Self {
            user: parts.next().map(half),
            group: parts.next().map(half),
        }
    }

    /// From numbers.
    pub fn ids(uid: u32, gid: u32) -> Self {
        Self {
            user: Some(OwnerId::Id(uid)),
            group: Some(OwnerId::Id(gid)),
        }
    }

    pub(super) fn resolve(&self, base: Option<InputIndex>) -> ChownOpt {
        let half = |half: &Option<OwnerId>| {
            half.as_ref().map(|half| match half {
                OwnerId::Name(name) => UserOpt::ByName {
                    name: name.clone(),
                    input: base,
                },
                OwnerId::Id(id) => UserOpt::ById(*id),
            })
        };
        ChownOpt {
            user: half(&self.user),
            group: half(&self.group),
        }
    }
}

/// Adds the capabilities that a process needs.
pub(super) fn exec_caps(process: &Process, about: &mut Constraints) {
    let spec = &process.spec;
    about.need("exec.meta.base");
    if spec.sets_default_path {
        about.need("exec.meta.setsdefaultpath");
    }
    let when = [
        (!spec.ulimits.is_empty(), "exec.meta.ulimit"),
        (about.linux_resources.is_some(), "exec.meta.linux.resources"),
        (
            spec.network.unwrap_or(process.around.network) != NetMode::Unset,
            "exec.meta.network",
        ),
        (spec.security == SecurityMode::Insecure, "exec.meta.security"),
        (spec.proxy_env.is_some(), "exec.meta.proxyenv"),
        (process.root.is_some(), "exec.mount.bind"),
        (!spec.secrets.is_empty(), "exec.mount.secret"),
        (spec.secrets.iter().any(|s| s.env.is_some()), "exec.secretenv"),
        (!spec.ssh.is_empty(), "exec.mount.ssh"),
        (!spec.cdi_devices.is_empty(), "exec.meta.cdi"),
    ];
    for (_, cap) in when.iter().filter(|(yes, _)| *yes) {
        about.need(cap);
    }
    for mount in &spec.mounts {
        if !mount.selector.is_empty() {
            about.need("exec.mount.selector");
        }
        if mount.cache.is_some() {
            about.need("exec.mount.cache");
            about.need("exec.mount.cache.sharing");
        } else if let Some(size) = mount.tmpfs {
            about.need("exec.mount.tmpfs");
            if size > 0 {
                about.need("exec.mount.tmpfs.size");
            }
        } else if !mount.source.is_scratch() {
            about.need("exec.mount.bind");
        }
    }
}
