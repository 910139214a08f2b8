//! Command line flags, named as buildkitd's so that existing unit files and manifests work unchanged.

use std::path::PathBuf;

use clap::Parser;

/// The flags as given; [`crate::config::Config`] joins them with the configuration file.
#[derive(Debug, Default, Parser)]
#[command(
    name = "kilnd",
    version,
    about = "Image builder daemon that speaks BuildKit's protocol",
    disable_version_flag = true
)]
pub struct Flags {
    /// Listening address (unix://path, tcp://host:port or fd://); may be repeated
    #[arg(long)]
    pub addr: Vec<String>,
    /// Path of the configuration file
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// State directory
    #[arg(long)]
    pub root: Option<PathBuf>,
    /// Log at debug level
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub debug: Option<bool>,
    /// Log level: trace, debug, info, warn, error
    #[arg(long, env = "BUILDKITD_LOG_LEVEL")]
    pub log_level: Option<String>,
    /// Log format: text or json
    #[arg(long)]
    pub log_format: Option<String>,
    /// Group (name or id) that owns unix sockets
    #[arg(long)]
    pub group: Option<String>,
    /// Address of a debugging listener (not implemented: said at start)
    #[arg(long)]
    pub debugaddr: Option<String>,
    /// Server certificate for tcp listeners
    #[arg(long)]
    pub tlscert: Option<PathBuf>,
    /// Key of the server certificate
    #[arg(long)]
    pub tlskey: Option<PathBuf>,
    /// CA that client certificates must come from
    #[arg(long)]
    pub tlscacert: Option<PathBuf>,
    /// Entitlement that builds may ask for; may be repeated
    #[arg(long, value_delimiter = ',')]
    pub allow_insecure_entitlement: Vec<String>,
    /// Route steps through the policy proxy (not implemented: said at start)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub proxy_network: Option<bool>,
    /// Socket for traces of steps (not implemented: said at start)
    #[arg(long)]
    pub otel_socket_path: Option<PathBuf>,
    /// Switch CDI devices off (they are not implemented)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub cdi_disabled: Option<bool>,
    /// Directories of CDI specifications (not implemented: said at start)
    #[arg(long)]
    pub cdi_spec_dir: Vec<PathBuf>,
    /// Keep debugging data for cache keys; Kiln always keeps the parts of each key
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub save_cache_debug: Option<bool>,
    /// Run without privileges on the host
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub rootless: Option<bool>,
    /// Print the version
    #[arg(long, short = 'v')]
    pub version: bool,

    /// Switch the worker on: true, false or auto
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub oci_worker: Option<String>,
    /// Labels of the worker, `key=value`; may be repeated
    #[arg(long)]
    pub oci_worker_labels: Vec<String>,
    /// Snapshotter: auto, overlayfs or native
    #[arg(long)]
    pub oci_worker_snapshotter: Option<String>,
    /// Socket of a proxy snapshotter (not implemented: an error)
    #[arg(long)]
    pub oci_worker_proxy_snapshotter_path: Option<PathBuf>,
    /// Platforms of the worker, the native one first; may be repeated
    #[arg(long)]
    pub oci_worker_platform: Vec<String>,
    /// Network of steps: auto, host, none or bridge
    #[arg(long)]
    pub oci_worker_net: Option<String>,
    /// OCI runtime binary (Kiln has its own executor: said at start)
    #[arg(long)]
    pub oci_worker_binary: Option<String>,
    /// AppArmor profile (not implemented: said at start)
    #[arg(long)]
    pub oci_worker_apparmor_profile: Option<String>,
    /// SELinux labels (not implemented: said at start)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub oci_worker_selinux: Option<bool>,
    /// Run the worker without privileges
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub oci_worker_rootless: Option<bool>,
    /// Run steps in the daemon's pid namespace (not implemented: said at start)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub oci_worker_no_process_sandbox: Option<bool>,
    /// Collect garbage
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub oci_worker_gc: Option<bool>,
    /// What garbage collection keeps, in MB: reserved[,free[,max]]
    #[arg(long)]
    pub oci_worker_gc_keepstorage: Option<String>,
    /// Most steps that run at the same time
    #[arg(long)]
    pub oci_max_parallelism: Option<String>,
    /// CNI configuration (not implemented: said at start)
    #[arg(long)]
    pub oci_cni_config_path: Option<PathBuf>,
    /// CNI binaries (not implemented: said at start)
    #[arg(long)]
    pub oci_cni_binary_dir: Option<PathBuf>,
    /// CNI namespaces kept ready (not implemented: said at start)
    #[arg(long)]
    pub oci_cni_pool_size: Option<i64>,
    /// Containerd worker: only false and auto are accepted, Kiln has none
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub containerd_worker: Option<String>,
    /// Address of containerd (no containerd worker: said at start)
    #[arg(long)]
    pub containerd_worker_addr: Option<String>,
}

impl Flags {
    /// Flags that are accepted so that existing set-ups start, but change nothing; each is named once at start.
    pub fn without_effect(&self) -> Vec<&'static str> {
        let mut out = Vec::new();
        let mut note = |given: bool, name| {
            if given {
                out.push(name);
            }
        };
        note(self.debugaddr.is_some(), "--debugaddr");
        note(self.proxy_network == Some(true), "--proxy-network");
        note(self.otel_socket_path.is_some(), "--otel-socket-path");
        note(!self.cdi_spec_dir.is_empty(), "--cdi-spec-dir");
        note(self.save_cache_debug == Some(true), "--save-cache-debug");
        note(self.oci_worker_binary.is_some(), "--oci-worker-binary");
        note(
            self.oci_worker_apparmor_profile.is_some(),
            "--oci-worker-apparmor-profile",
        );
        note(self.oci_worker_selinux == Some(true), "--oci-worker-selinux");
        note(
            self.oci_worker_no_process_sandbox == Some(true),
            "--oci-worker-no-process-sandbox",
        );
        note(self.oci_cni_config_path.is_some(), "--oci-cni-config-path");
        note(self.oci_cni_binary_dir.is_some(), "--oci-cni-binary-dir");
        note(self.oci_cni_pool_size.is_some(), "--oci-cni-pool-size");
        note(self.containerd_worker_addr.is_some(), "--containerd-worker-addr");
        out
    }
}
