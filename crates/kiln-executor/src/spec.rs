//! What to run and in which surroundings: pure data, made by the caller, carried out by an [`Executor`](crate::Executor).

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One process and everything around it.
///
/// Paths under `root` and mount sources are the daemon's own (its state directory) and trusted; every path *inside* the root
/// (destinations, `cwd`, user files, selectors) is untrusted and resolved beneath the root with `openat2(RESOLVE_IN_ROOT)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessSpec {
    /// The file system the process sees as `/`.
    pub root: RootMount,
    /// The root is made read-only after all mount targets exist.
    pub root_readonly: bool,
    /// Mounts below the root, carried out in this order (callers sort by destination, so deeper ones come later).
    pub mounts: Vec<MountSpec>,
    /// Program and arguments; never empty. A program without `/` is looked up in the `PATH` of `env`.
    pub args: Vec<String>,
    /// `NAME=value`; of equal names the last counts. `PATH` and `HOME` get the usual defaults when absent.
    pub env: Vec<String>,
    /// Working directory inside the root; created (0755, owned by the user) when missing. Empty means `/`.
    pub cwd: String,
    /// `uid:gid`, or `name|uid[:group|gid]` looked up in the root's `/etc/passwd` and `/etc/group`; empty means root.
    pub user: String,
    /// Host name in the process's UTS namespace.
    pub hostname: String,
    /// Content of `/etc/hosts`, bind-mounted read-only; `None` leaves the image's file.
    pub hosts: Option<String>,
    /// Content of `/etc/resolv.conf`, bind-mounted read-only; `None` leaves the image's file.
    pub resolv_conf: Option<String>,
    /// Network the process sees.
    pub net: NetMode,
    /// Confined (the default) or all privileges.
    pub security: SecurityMode,
    /// Resource limits of the process (`setrlimit(2)`); what is not named is inherited from the daemon.
    pub ulimits: Vec<Ulimit>,
    /// Parent of the process's cgroup, as the client gave it (`foo`, `/foo/bar`, or `name.slice:…`); empty for the default.
    pub cgroup_parent: String,
    /// Limits of the process's cgroup.
    pub resources: Resources,
    /// Gives the process a pseudo-terminal of this size as its controlling terminal instead of pipes.
    pub tty: Option<TerminalSize>,
}

impl ProcessSpec {
    /// A confined process with the documented defaults: root user, cwd `/`, host network, no mounts, no limits.
    pub fn new(root: RootMount, args: Vec<String>) -> Self {
        ProcessSpec {
            root,
            root_readonly: false,
            mounts: Vec::new(),
            args,
            env: Vec::new(),
            cwd: String::new(),
            user: String::new(),
            hostname: "buildkitsandbox".to_owned(),
            hosts: None,
            resolv_conf: None,
            net: NetMode::Host,
            security: SecurityMode::Sandbox,
            ulimits: Vec::new(),
            cgroup_parent: String::new(),
            resources: Resources::default(),
            tty: None,
        }
    }
}

/// The file system that becomes `/`. Mounted inside the process's own mount namespace only: the host never sees the mount, and
/// it ends with the process whatever happens to the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootMount {
    /// An overlay of directories.
    Overlay(Overlay),
    /// A directory as it is (native snapshotter); the process writes into it.
    Bind {
        /// The directory.
        path: PathBuf,
    },
}

impl RootMount {
    /// The host directory that receives what the process writes into its root.
    pub fn writable_dir(&self) -> Option<&std::path::Path> {
        match self {
            RootMount::Overlay(o) => o.writable.as_ref().map(|w| w.upper.as_path()),
            RootMount::Bind { path } => Some(path),
        }
    }
}

/// Directories laid over one another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// Read-only layers, **top first**. May be empty only together with `writable` (an empty image).
    pub lowers: Vec<PathBuf>,
    /// Where writes go; `None` makes the overlay read-only.
    pub writable: Option<OverlayWritable>,
}

/// The writable part of an overlay; both directories are on one file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayWritable {
    /// Directory that receives changes.
    pub upper: PathBuf,
    /// Empty scratch directory for the kernel.
    pub work: PathBuf,
}

/// One mount below the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// Absolute path inside the root; missing targets are created and reported as [`Stub`](crate::Stub)s.
    pub dest: String,
    /// What is mounted.
    pub kind: MountKind,
    /// Not writable through this mount.
    pub readonly: bool,
    /// Set-user-id bits, device nodes and execution refused through this mount.
    pub flags: MountFlags,
}

impl MountSpec {
    /// A mount without restrictions.
    pub fn new(dest: impl Into<String>, kind: MountKind) -> Self {
        MountSpec {
            dest: dest.into(),
            kind,
            readonly: false,
            flags: MountFlags::default(),
        }
    }

    /// The same mount, read-only.
    #[must_use]
    pub fn readonly(mut self) -> Self {
        self.readonly = true;
        self
    }
}

/// Per-mount restrictions (`mount(8)`: nosuid, nodev, noexec).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountFlags {
    /// Ignore set-user-id and file capabilities.
    pub nosuid: bool,
    /// Ignore device nodes.
    pub nodev: bool,
    /// Refuse to execute.
    pub noexec: bool,
}

/// What a mount shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountKind {
    /// A file or directory of the host's file system.
    Bind {
        /// Directory (or file, or socket) of the daemon.
        source: PathBuf,
        /// Path beneath `source` that is mounted instead of it, symlinks resolved with `source` as root; empty for all of it.
        selector: String,
    },
    /// Layers, combined for this process.
    Overlay {
        /// The layers.
        overlay: Overlay,
        /// As in `Bind`.
        selector: String,
    },
    /// A fresh in-memory directory.
    Tmpfs {
        /// Upper limit in bytes; `None` is the kernel's default of half the memory.
        size: Option<u64>,
        /// Mode of the directory, e.g. `0o1777`; `None` takes that of the directory it covers, or 1777 where there is none.
        mode: Option<u32>,
    },
    /// A single file with this content, on a private in-memory file system (secrets: never on disk, not swapped where the
    /// kernel can say so). Mode is masked with 0777.
    File(FileMount),
}

/// Content and ownership of a [`MountKind::File`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMount {
    /// The bytes.
    #[serde(with = "crate::protocol::bytes_as_text")]
    pub content: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Never prints the content: it may be a secret.
impl std::fmt::Debug for FileMount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "FileMount({} bytes, {:o}, {}:{})",
            self.content.len(),
            self.mode,
            self.uid,
            self.gid
        )
    }
}

/// Network of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetMode {
    /// The daemon's own network namespace.
    Host,
    /// A fresh namespace with only the loopback device, up.
    None,
    /// A fresh namespace with an interface on the daemon's bridge.
    Bridge(BridgeAddress),
}

/// The interface of a process on the bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeAddress {
    /// Address of the process.
    pub address: IpAddr,
    /// Prefix length of the subnet.
    pub prefix: u8,
    /// Default route.
    pub gateway: IpAddr,
}

/// How much a process may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SecurityMode {
    /// Default capabilities, seccomp filter, masked paths.
    Sandbox,
    /// Everything the daemon may do (`security.insecure`).
    Insecure,
}

/// One `setrlimit(2)` value pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// Name as in `ulimit` options of the field: `nofile`, `nproc`, `core`, `memlock`, …
    pub name: String,
    /// Soft limit; -1 is unlimited.
    pub soft: i64,
    /// Hard limit; -1 is unlimited.
    pub hard: i64,
}

/// Limits of a cgroup; absent means unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Bytes of memory **and** swap together (-1 unlimited), as `docker build --memory-swap`.
    pub memory_swap: Option<i64>,
    /// Relative weight as v1 `cpu.shares` (2..=262144); translated to v2 `cpu.weight`.
    pub cpu_shares: Option<u64>,
    /// CFS period in microseconds.
    pub cpu_period: Option<u64>,
    /// CFS quota in microseconds per period.
    pub cpu_quota: Option<i64>,
    /// Cores, e.g. `0-2,4`.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes.
    pub cpuset_mems: Option<String>,
    /// Number of tasks.
    pub pids: Option<u64>,
}

impl Resources {
    /// No limit is set.
    pub fn is_empty(&self) -> bool {
        *self == Resources::default()
    }
}

/// Size of a terminal in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Height.
    pub rows: u16,
    /// Width.
    pub cols: u16,
}

/// A further process in the surroundings of one that runs (same namespaces, root and cgroup).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinSpec {
    /// As in [`ProcessSpec`].
    pub args: Vec<String>,
    /// As in [`ProcessSpec`].
    pub env: Vec<String>,
    /// As in [`ProcessSpec`], but never created.
    pub cwd: String,
    /// As in [`ProcessSpec`].
    pub user: String,
    /// As in [`ProcessSpec`].
    pub security: SecurityMode,
    /// As in [`ProcessSpec`].
    pub tty: Option<TerminalSize>,
}
