//! The daemon: every room wired to the others, listening until it is told to stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Once};
use std::time::Duration;

use kiln_executor::NamespaceExecutor;
use kiln_oci::Platform;
use kiln_proto::content::content_server::ContentServer;
use kiln_proto::control::control_server::ControlServer;
use kiln_proto::gateway::llb_bridge_server::LlbBridgeServer;
use kiln_proto::otlp::trace_service_server::TraceServiceServer;
use kiln_proto::worker::{BuildkitVersion, WorkerRecord};
use kiln_registry::Registry;
use kiln_session::{SessionId, SessionManager};
use kiln_solver::{DirSpool, Solver, SolverOptions};
use kiln_store::Store;
use kiln_worker::LlbWorker;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::builds::Builds;
use crate::config::Config;
use crate::content::Blobs;
use crate::control::Front;
use crate::credentials::SessionCredentials;
use crate::gateway::Gateway;
use crate::history::{History, Limits};
use crate::listen::Listeners;
use crate::start::StartError;
use crate::telemetry::Traces;

/// The largest message accepted and sent, as other BuildKit daemons have it.
const MAX_MESSAGE: usize = 16 << 20;

/// Windows of one stream and of a connection: a session carries a build context through one stream.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// How long running builds have to end when the daemon is told to stop.
const GRACE: Duration = Duration::from_secs(5);

/// A build, as the solver sees it.
pub type Job = kiln_solver::Job<LlbWorker>;

/// Everything the services share.
pub struct Daemon {
    /// What it was told.
    pub config: Config,
    /// Open sessions.
    pub sessions: SessionManager,
    /// Running builds.
    pub builds: Builds,
    /// Ended builds.
    pub history: History,
    /// Registries, as configured.
    pub registry: Registry,
    /// Solves graphs.
    pub solver: Solver<LlbWorker>,
    /// Platforms steps can run on, the native one first.
    pub platforms: Vec<Platform>,
    /// Stable id of the worker.
    pub worker_id: String,
    /// The name of the snapshotter in use.
    pub snapshotter: String,
    store: Arc<Store>,
    progress_dir: PathBuf,
    collector: crate::usage::Collector,
    executor: Arc<NamespaceExecutor>,
    warmed_up: Once,
}

/// What [`Daemon::new`] is made of.
pub struct Parts {
    /// What it was told.
    pub config: Config,
    /// The state directory.
    pub store: Arc<Store>,
    /// Open sessions, shared with the worker.
    pub sessions: SessionManager,
    /// Registries, as configured.
    pub registry: Registry,
    /// Carries operations out.
    pub worker: LlbWorker,
    /// Runs steps; the worker's.
    pub executor: Arc<NamespaceExecutor>,
    /// Platforms steps can run on.
    pub platforms: Vec<Platform>,
    /// The name of the snapshotter in use.
    pub snapshotter: String,
}

impl Daemon {
    /// Joins the rooms. Blocking.
    pub fn new(parts: Parts) -> Result<Arc<Self>, StartError> {
        let Parts {
            config,
            store,
            sessions,
            registry,
            worker,
            executor,
            platforms,
            snapshotter,
        } = parts;
        let limits = Limits {
            age: config.history_age,
            entries: config.history_entries,
        };
        let history = History::new(&store, limits);
        let io = |source| StartError::Io {
            action: "prepare the state directory",
            source,
        };
        // Progress of builds that a killed daemon left behind is of no use.
        let progress_dir = config.root.join("active/progress");
        match std::fs::remove_dir_all(&progress_dir) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(e)),
        }
        std::fs::create_dir_all(&progress_dir).map_err(io)?;
        let spool = Arc::new(DirSpool::new(progress_dir.clone()));
        let cache = kiln_worker::StoreCache::new(Arc::clone(&store));
        let options = SolverOptions {
            max_parallelism: config.max_parallelism,
            spool,
            ..SolverOptions::default()
        };
        let solver = Solver::new(worker, Arc::new(cache), options);
        let worker_id = worker_id(&config).map_err(io)?;
        let collector = crate::usage::Collector::new(&config, &store)?;
        Ok(Arc::new(Self {
            config,
            sessions,
            builds: Builds::default(),
            history,
            registry,
            solver,
            platforms,
            worker_id,
            snapshotter,
            store,
            progress_dir,
            collector,
            executor,
            warmed_up: Once::new(),
        }))
    }

    /// Carries operations out.
    pub fn worker(&self) -> &LlbWorker {
        self.solver.worker()
    }

    /// What a build of this session brings along for its operations.
    pub fn client(&self, session: &SessionId) -> kiln_worker::Client {
        let credentials = SessionCredentials::new(self.sessions.clone(), session.clone());
        kiln_worker::Client::new(session.clone(), self.registry.client(Arc::new(credentials)))
    }

    /// The state directory.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Where progress of running builds is kept.
    pub fn progress_dir(&self) -> &PathBuf {
        &self.progress_dir
    }

    /// Lets the executor get ready while the first build still loads what it needs. Not at start: an idle daemon is small.
    pub fn before_build(&self) {
        self.warmed_up.call_once(|| self.executor.warm_up());
    }

    /// Collects garbage a moment later, if that is switched on.
    pub fn after_build(&self) {
        self.collector.wake();
    }

    /// How the worker is described to clients.
    pub fn worker_record(&self) -> WorkerRecord {
        let mut labels: BTreeMap<String, String> = BTreeMap::new();
        let mut label = |name: &str, value: &str| {
            labels.insert(format!("org.mobyproject.buildkit.worker.{name}"), value.to_owned());
        };
        label("executor", "oci");
        label("snapshotter", &self.snapshotter);
        label("hostname", &hostname());
        label(
            "network",
            if self.config.network == "auto" {
                "host"
            } else {
                &self.config.network
            },
        );
        label("oci.process-mode", "sandbox");
        label("selinux.enabled", "false");
        labels.extend(self.config.labels.clone());
        WorkerRecord {
            id: self.worker_id.clone(),
            labels,
            platforms: self.platforms.iter().map(kiln_llb::wire::platform_to_proto).collect(),
            gc_policy: self.collector.policies(),
            buildkit_version: Some(version()),
            cdi_devices: Vec::new(),
        }
    }
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The id is made once and kept in the state directory, so that clients recognise the worker.
fn worker_id(config: &Config) -> std::io::Result<String> {
    let path = config.root.join("workerid");
    match std::fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => Ok(id.trim().to_owned()),
        _ => {
            let id = crate::random_id();
            std::fs::write(&path, &id)?;
            Ok(id)
        }
    }
}

/// The version clients are told. The numbers are those of the BuildKit whose behaviour is offered, since clients compare
/// them; the package says who answers.
pub fn version() -> BuildkitVersion {
    BuildkitVersion {
        package: "kiln".to_owned(),
        version: concat!("v", env!("CARGO_PKG_VERSION")).to_owned(),
        revision: option_env!("KILN_REVISION").unwrap_or_default().to_owned(),
        dockerfile_version: String::new(),
    }
}

/// Serves until `shutdown` is canceled, then gives running builds a moment to end.
pub async fn serve(
    daemon: Arc<Daemon>,
    listeners: Listeners,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (_health, health) = tonic_health::server::health_reporter();
    let background = daemon.collector.run(shutdown.clone());
    let collector = tokio::spawn(background);
    let server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // Clients may cancel as many streams as they like.
        .http2_max_local_error_reset_streams(None)
        .add_service(health)
        .add_service(
            ControlServer::new(Front(Arc::clone(&daemon)))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            LlbBridgeServer::new(Gateway(Arc::clone(&daemon)))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            ContentServer::new(Blobs(Arc::clone(&daemon)))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(TraceServiceServer::new(Traces).max_decoding_message_size(MAX_MESSAGE));
    let stop = {
        let (daemon, shutdown) = (Arc::clone(&daemon), shutdown.clone());
        async move {
            shutdown.cancelled().await;
            daemon.builds.cancel_all();
            daemon.sessions.shutdown();
        }
    };
    let serving = server.serve_with_incoming_shutdown(listeners, stop);
    let limit = async {
        shutdown.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    let result = tokio::select! {
        result = serving => result,
        // Idle connections would keep the server waiting for ever.
        () = limit => Ok(()),
    };
    shutdown.cancel();
    if let Err(error) = collector.await {
        tracing::error!(%error, "garbage collection died");
    }
    result
}
