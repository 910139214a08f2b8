//! How registries are reached: what `[registry."host"]` and `[system]` of the daemon's configuration say.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of one registry host, named as in `buildkitd.toml`.
#[derive(Clone, Debug, Default)]
pub struct HostConfig {
    /// Tried in order before the host itself, for reading only: `host[:port][/path]`, optionally with a scheme.
    pub mirrors: Vec<String>,
    /// Plain HTTP. Unset means: only for loopback hosts.
    pub http: Option<bool>,
    /// Accept any certificate, and plain HTTP if TLS fails.
    pub insecure: Option<bool>,
    /// Additional CA certificates (PEM files).
    pub ca: Vec<PathBuf>,
    /// Client certificates: key and certificate (PEM files).
    pub keypair: Vec<(PathBuf, PathBuf)>,
    /// Directories with `*.crt` (CAs) and pairs of `*.cert` and `*.key`.
    pub tlsconfigdir: Vec<PathBuf>,
}

/// Proxies, as the binary found them in its environment.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    /// For `http` URLs.
    pub http: Option<String>,
    /// For `https` URLs.
    pub https: Option<String>,
    /// Hosts to reach directly, comma-separated. Loopback is always reached directly.
    pub no_proxy: Option<String>,
}

/// How often and how long failed requests are tried again.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Attempts in all, at least one.
    pub attempts: u32,
    /// Pause after the first failure; it doubles each time and is shortened at random by up to half.
    pub base: Duration,
    /// Longest pause. A `Retry-After` answer is honoured up to four times this.
    pub cap: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 6,
            base: Duration::from_millis(300),
            cap: Duration::from_secs(8),
        }
    }
}

/// When a silent peer counts as gone.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// To open a connection, TLS included.
    pub connect: Duration,
    /// From the end of a request to the head of its answer.
    pub headers: Duration,
    /// Without a single byte moving in a body.
    pub stall: Duration,
    /// From the last byte of an upload to its confirmation (registries copy blobs then).
    pub commit: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(20),
            headers: Duration::from_secs(60),
            stall: Duration::from_secs(30),
            commit: Duration::from_secs(600),
        }
    }
}

/// Everything a [`crate::Registry`] is made from.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// Settings by host; `docker.io` stands for Docker Hub.
    pub hosts: BTreeMap<String, HostConfig>,
    /// Concurrent requests per host, one more being kept for small JSON documents.
    pub max_concurrency: usize,
    /// Proxies to use.
    pub proxies: Proxies,
    /// Retry policy.
    pub retry: RetryPolicy,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// Value of the `User-Agent` header.
    pub user_agent: String,
    /// Uploads larger than this that failed once continue in chunks of this size, in bytes.
    pub upload_chunk: u64,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            hosts: BTreeMap::new(),
            max_concurrency: 4,
            proxies: Proxies::default(),
            retry: RetryPolicy::default(),
            timeouts: Timeouts::default(),
            user_agent: concat!("kiln/", env!("CARGO_PKG_VERSION")).to_owned(),
            upload_chunk: 32 << 20,
        }
    }
}
