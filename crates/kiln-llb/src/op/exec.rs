//! `ExecOp`: a process, its environment and its mounts.

use super::{InputIndex, OutputIndex};

/// Runs one process. The first mount by destination must be the root, `/`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExecOp {
    /// What to run and as whom.
    pub meta: ExecMeta,
    /// Everything the process sees, in the order sent.
    pub mounts: Vec<ExecMount>,
    /// Which network the process has.
    pub network: NetMode,
    /// How far the process is confined.
    pub security: SecurityMode,
    /// Secrets handed over as environment variables.
    pub secret_env: Vec<SecretEnv>,
    /// Devices of the host asked for by CDI name.
    pub cdi_devices: Vec<CdiDevice>,
}

impl ExecOp {
    /// Number of outputs: one more than the highest output index of a mount that can have one.
    pub fn outputs(&self) -> u32 {
        self.mounts
            .iter()
            .filter_map(ExecMount::output_index)
            .map(|i| i + 1)
            .max()
            .unwrap_or(0)
    }
}

/// Arguments and surroundings of the process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExecMeta {
    /// The argument list; the first is the program.
    pub args: Vec<String>,
    /// `K=V` entries in the order given.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// `user[:group]` by name or id; empty means root.
    pub user: String,
    /// Proxy settings added to the environment after the cache key was made.
    pub proxy_env: Option<ProxyEnv>,
    /// Additional lines for `/etc/hosts`.
    pub extra_hosts: Vec<HostIp>,
    /// Host name; empty means the default.
    pub hostname: String,
    /// Resource limits of the process.
    pub ulimit: Vec<Ulimit>,
    /// Parent of the step's cgroup; empty means the daemon's default.
    pub cgroup_parent: String,
    /// Whether directories made only to hold mount points are removed with their empty parents.
    pub remove_mount_stubs_recursive: bool,
    /// Exit codes that count as success; empty means only 0.
    pub valid_exit_codes: Vec<i32>,
}

/// Proxy variables; empty ones are unset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyEnv {
    /// `HTTP_PROXY`.
    pub http_proxy: String,
    /// `HTTPS_PROXY`.
    pub https_proxy: String,
    /// `FTP_PROXY`.
    pub ftp_proxy: String,
    /// `NO_PROXY`.
    pub no_proxy: String,
    /// `ALL_PROXY`.
    pub all_proxy: String,
}

/// One additional host name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostIp {
    /// The name.
    pub host: String,
    /// Its address.
    pub ip: String,
}

/// One resource limit (`setrlimit(2)`); `-1` is unlimited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ulimit {
    /// Name without the `RLIMIT_` prefix, lower case.
    pub name: String,
    /// Soft limit.
    pub soft: i64,
    /// Hard limit.
    pub hard: i64,
}

/// A secret as environment variable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecretEnv {
    /// Id by which the client knows the secret.
    pub id: String,
    /// Name of the variable.
    pub name: String,
    /// Whether a missing secret is no error.
    pub optional: bool,
}

/// A device asked for by its CDI name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CdiDevice {
    /// Qualified CDI name.
    pub name: String,
    /// Whether a missing device is no error.
    pub optional: bool,
}

/// Network of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NetMode {
    /// What the daemon is configured for.
    #[default]
    Unset = 0,
    /// The host's own network; needs the entitlement `network.host`.
    Host = 1,
    /// Only loopback.
    None = 2,
}

/// Confinement of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SecurityMode {
    /// Default capabilities, seccomp, masked paths.
    #[default]
    Sandbox = 0,
    /// Everything the daemon may do; needs the entitlement `security.insecure`.
    Insecure = 1,
}

/// One mount of a process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExecMount {
    /// Input that is mounted; `None` starts from nothing.
    pub input: Option<InputIndex>,
    /// Path inside the input; empty means its root.
    pub selector: String,
    /// Where the process sees it.
    pub dest: String,
    /// Output that what the process wrote becomes. As sent: secret, ssh and tmpfs mounts carry a meaningless 0, so use
    /// [`ExecMount::output_index`].
    pub output: Option<OutputIndex>,
    /// Whether the process may not write.
    pub readonly: bool,
    /// Kind of mount.
    pub mount_type: MountType,
    /// Set for tmpfs mounts.
    pub tmpfs: Option<TmpfsOpt>,
    /// Set for cache mounts.
    pub cache: Option<CacheMountOpt>,
    /// Set for secret mounts.
    pub secret: Option<SecretMountOpt>,
    /// Set for ssh mounts.
    pub ssh: Option<SshMountOpt>,
    /// A result kept from an earlier failure, for debugging containers only.
    pub result_id: String,
    /// Whether the step is keyed by what the input contains.
    pub content_cache: MountContentCache,
}

impl ExecMount {
    /// The output this mount really has: bind and cache mounts only.
    pub fn output_index(&self) -> Option<OutputIndex> {
        match self.mount_type {
            MountType::Bind | MountType::Cache => self.output,
            MountType::Secret | MountType::Ssh | MountType::Tmpfs => None,
        }
    }
}

/// Kind of mount; numbers as on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MountType {
    /// An input or an empty directory.
    #[default]
    Bind = 0,
    /// A file with a secret, in memory only.
    Secret = 1,
    /// A socket to the client's ssh agent.
    Ssh = 2,
    /// A directory that persists between builds and is no part of results.
    Cache = 3,
    /// An empty directory in memory.
    Tmpfs = 4,
}

/// Whether an input's content takes part in the cache key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MountContentCache {
    /// Yes, except for the root mount.
    #[default]
    Default = 0,
    /// Yes; an error where content cannot decide.
    On = 1,
    /// No.
    Off = 2,
}

/// Options of a tmpfs mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TmpfsOpt {
    /// Limit in bytes; 0 is none.
    pub size: i64,
}

/// Options of a cache mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheMountOpt {
    /// Names the directory across builds.
    pub id: String,
    /// Who may use it at the same time.
    pub sharing: CacheSharing,
}

/// Concurrent use of a cache mount; numbers as on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheSharing {
    /// Everyone at once.
    #[default]
    Shared = 0,
    /// A directory of its own for each concurrent user.
    Private = 1,
    /// One user at a time, the others wait.
    Locked = 2,
}

/// Options of a secret mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecretMountOpt {
    /// Id by which the client knows the secret.
    pub id: String,
    /// Owner of the file.
    pub uid: u32,
    /// Group of the file.
    pub gid: u32,
    /// Permission bits of the file.
    pub mode: u32,
    /// Whether a missing secret is no error.
    pub optional: bool,
}

/// Options of an ssh agent mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SshMountOpt {
    /// Id by which the client knows the agent; empty means `default`.
    pub id: String,
    /// Owner of the socket.
    pub uid: u32,
    /// Group of the socket.
    pub gid: u32,
    /// Permission bits of the socket.
    pub mode: u32,
    /// Whether a missing agent is no error.
    pub optional: bool,
}
