//! From flags to a serving daemon.

use std::sync::Arc;

use kiln_executor::{NamespaceConfig, NamespaceExecutor};
use kiln_registry::{HostConfig, Proxies, Registry, RegistryConfig};
use kiln_session::SessionManager;
use kiln_store::{SnapshotterChoice, Store, StoreConfig};
use kiln_worker::{LlbWorker, NetworkOptions, WorkerOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, ConfigError};
use crate::daemon::{Daemon, Parts, serve};
use crate::flags::Flags;
use crate::listen::{ListenError, Listeners};
use crate::{notify, platforms, telemetry};

/// Why the daemon cannot start, or why it stopped.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Flags or file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Addresses.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The state directory.
    #[error("failed to open the state directory {root}: {source}")]
    Store {
        /// The directory.
        root: String,
        /// Why.
        source: kiln_store::StoreError,
    },
    /// Registries.
    #[error("invalid registry configuration: {0}")]
    Registry(#[from] kiln_registry::RegistryError),
    /// Namespaces.
    #[error("steps cannot be run on this machine: {0}")]
    Executor(#[from] kiln_executor::ExecError),
    /// Anything the operating system refuses.
    #[error("failed to {action}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Rules that cannot be read.
    #[error("invalid garbage collection rules: {0}")]
    Rules(#[from] crate::status::WireError),
    /// The server itself.
    #[error("failed to serve: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// Runs the daemon until it is told to stop.
pub fn run(flags: &Flags) -> Result<(), StartError> {
    let rootless = flags.rootless.or(flags.oci_worker_rootless).unwrap_or(false);
    let config = Config::load(flags, rootless)?;
    telemetry::install(&config.log_level, config.log_json);
    for name in &config.ignored {
        tracing::warn!(setting = name, "this setting is ignored");
    }
    // Whoever needs TLS finds one provider, and only one.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed already");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("kilnd")
        .build()
        .map_err(|source| StartError::Io { action: "start the runtime", source })?;
    let result = runtime.block_on(daemon(config));
    // Blocking jobs check their stop tokens; one that hangs in a system call must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    result
}

async fn daemon(config: Config) -> Result<(), StartError> {
    let io = |action| move |source| StartError::Io { action, source };
    let mut terminate = signal(SignalKind::terminate()).map_err(io("listen for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io("listen for signals"))?;
    let (daemon, store) = wire(config)?;
    let listeners = Listeners::bind(&daemon.config).await?;
    for address in listeners.addresses() {
        tracing::info!(address, "listening");
    }
    notify::ready();
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        stop.cancel();
    });
    serve(daemon, listeners, shutdown).await?;
    if let Err(error) = store.close() {
        tracing::error!(%error, "the state directory could not be closed in order");
    }
    Ok(())
}

/// Opens the rooms and joins them.
fn wire(config: Config) -> Result<(Arc<Daemon>, Arc<Store>), StartError> {
    let store_config = StoreConfig {
        snapshotter: match config.snapshotter.as_deref() {
            None => SnapshotterChoice::Auto,
            Some("native") => SnapshotterChoice::Native,
            Some(_) => SnapshotterChoice::Overlay,
        },
        ..StoreConfig::new(&config.root)
    };
    let (store, report) = Store::open(store_config)
        .map_err(|source| StartError::Store { root: config.root.display().to_string(), source })?;
    if let Some(reason) = &report.rebuilt {
        tracing::warn!(reason, "the index was rebuilt from the records beside trees and blobs");
    }
    if report.incomplete + report.unsealed > 0 {
        let (incomplete, unsealed) = (report.incomplete, report.unsealed);
        tracing::warn!(incomplete, unsealed, "unfinished entries of an earlier run were removed");
    }
    let registry = Registry::new(registry_config(&config));
    registry.check()?;
    let sessions = SessionManager::new();
    let executor = Arc::new(NamespaceExecutor::new(NamespaceConfig::default())?);
    let platforms = if config.platforms.is_empty() {
        platforms::available()
    } else {
        config.platforms.iter().map(|p| parse_platform(p)).collect::<Result<_, _>>()?
    };
    let worker = LlbWorker::new(WorkerOptions {
        store: Arc::clone(&store),
        executor,
        sessions: sessions.clone(),
        platforms: platforms.clone(),
        network: network(&config),
        cgroup_parent: config.cgroup_parent.clone(),
        rootless: config.rootless,
    });
    let snapshotter = store.snapshotter().name().to_owned();
    let parts = Parts { config, store: Arc::clone(&store), sessions, registry, worker, platforms, snapshotter };
    Ok((Daemon::new(parts)?, store))
}

fn network(config: &Config) -> NetworkOptions {
    let dns = config.dns.clone().unwrap_or_default();
    NetworkOptions {
        mode: config.network.clone(),
        nameservers: dns.nameservers,
        search: dns.search_domains,
        options: dns.options,
    }
}

fn parse_platform(text: &str) -> Result<kiln_oci::Platform, ConfigError> {
    let bad = |_| ConfigError::Value { key: "worker.oci.platforms".into(), value: text.to_owned() };
    text.parse::<kiln_oci::Platform>().map(|p| p.normalized()).map_err(bad)
}

fn registry_config(config: &Config) -> RegistryConfig {
    let hosts = config
        .registries
        .iter()
        .map(|(name, host)| {
            let host = HostConfig {
                mirrors: host.mirrors.clone(),
                http: host.http,
                insecure: host.insecure,
                ca: host.ca.clone(),
                keypair: host.keypair.iter().map(|k| (k.key.clone(), k.cert.clone())).collect(),
                tlsconfigdir: host.tlsconfigdir.clone(),
            };
            (name.clone(), host)
        })
        .collect();
    let variable = |names: [&str; 2]| names.iter().find_map(|n| std::env::var(n).ok()).filter(|v| !v.is_empty());
    RegistryConfig {
        hosts,
        max_concurrency: config.registry_connections,
        proxies: Proxies {
            http: variable(["HTTP_PROXY", "http_proxy"]),
            https: variable(["HTTPS_PROXY", "https_proxy"]),
            no_proxy: variable(["NO_PROXY", "no_proxy"]),
        },
        user_agent: concat!("kiln/", env!("CARGO_PKG_VERSION")).to_owned(),
        ..RegistryConfig::default()
    }
}
