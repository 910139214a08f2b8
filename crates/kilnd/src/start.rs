//! From flags to a serving daemon.

use std::sync::Arc;

use kiln_executor::{NamespaceConfig, NamespaceExecutor};
use kiln_registry::{HostConfig, Proxies, Registry, RegistryConfig};
use kiln_session::SessionManager;
use kiln_store::{SnapshotterChoice, Store, StoreConfig};
use kiln_worker::{LlbWorker, NetworkOptions, WorkerOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::{Caller, Config, ConfigError};
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
    /// An ordinary user's daemon cannot become root of a namespace.
    #[error("{error}: {}", std::error::Error::source(error).map(ToString::to_string).unwrap_or_default())]
    UserNamespace {
        /// What was attempted; its source is why it failed.
        #[from]
        error: kiln_executor::UserNamespaceError,
    },
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
    // Before the user namespace: inside it everybody is root, and HOME's owner is nobody's business any more.
    let config = Config::load(flags, Caller::of_process())?;
    // Before anything starts a thread: a process of several threads cannot enter one.
    let mapping = kiln_executor::enter_user_namespace()?;
    telemetry::install(&config.log_level, config.log_json);
    for name in &config.ignored {
        tracing::warn!(setting = name, "this setting is ignored");
    }
    if let Some(notice) = mapping.notice() {
        tracing::warn!("{notice}");
    }
    // Whoever needs TLS finds one provider, and only one.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed already");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("kilnd")
        .build()
        .map_err(|source| StartError::Io {
            action: "start the runtime",
            source,
        })?;
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
        cookie_dir: cookie_dir(&config),
        ..StoreConfig::new(&config.root)
    };
    let (store, report) = Store::open(store_config).map_err(|source| StartError::Store {
        root: config.root.display().to_string(),
        source,
    })?;
    if let Some(reason) = &report.rebuilt {
        tracing::warn!(reason, "the index was rebuilt from the records beside trees and blobs");
    }
    if report.incomplete + report.unsealed > 0 {
        let (incomplete, unsealed) = (report.incomplete, report.unsealed);
        tracing::warn!(
            incomplete,
            unsealed,
            "unfinished entries of an earlier run were removed"
        );
    }
    let registry = Registry::new(registry_config(&config));
    registry.check()?;
    let sessions = SessionManager::new();
    let executor = Arc::new(NamespaceExecutor::new(NamespaceConfig::default())?);
    let platforms = if config.platforms.is_empty() {
        platforms::available()
    } else {
        config
            .platforms
            .iter()
            .map(|p| parse_platform(p))
            .collect::<Result<_, _>>()?
    };
    let rootless = executor.is_rootless();
    let worker = LlbWorker::new(WorkerOptions {
        store: Arc::clone(&store),
        executor: Arc::clone(&executor) as Arc<dyn kiln_executor::Executor>,
        sessions: sessions.clone(),
        platforms: platforms.clone(),
        network: network(&config),
        cgroup_parent: config.cgroup_parent.clone(),
        rootless,
    });
    let snapshotter = store.snapshotter().name().to_owned();
    let store_too = Arc::clone(&store);
    let parts = Parts {
        config,
        store: store_too,
        sessions,
        registry,
        worker,
        executor,
        platforms,
        snapshotter,
    };
    Ok((Daemon::new(parts)?, store))
}

/// The directory for the store's cookie, made if it can be.
fn cookie_dir(config: &Config) -> Option<std::path::PathBuf> {
    let dir = config.runtime_dir.as_ref()?;
    match std::fs::create_dir_all(dir) {
        Ok(()) => Some(dir.clone()),
        Err(error) => {
            tracing::debug!(dir = %dir.display(), %error, "no directory that does not survive a reboot");
            None
        }
    }
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
    let bad = |_| ConfigError::Value {
        key: "worker.oci.platforms".into(),
        value: text.to_owned(),
    };
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
    let variable = |names: [&str; 2]| {
        names
            .iter()
            .find_map(|n| std::env::var(n).ok())
            .filter(|v| !v.is_empty())
    };
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
