//! `LlbWorker`: which operation is carried out by what, and what all of them share.

use std::fmt;
use std::sync::Arc;

use kiln_executor::Executor;
use kiln_llb::Vertex;
use kiln_oci::Platform;
use kiln_session::{Session, SessionError, SessionId, SessionManager};
use kiln_solver::{Op, Worker};
use kiln_store::{LayerRef, Store, Tenant};

use crate::client::Client;
use crate::error::{OpError, Result};
use crate::op;
use crate::source::Asker;

/// A result: a layer with all below it, or the empty file system.
pub type Ref = Option<LayerRef>;

/// What a worker is made of.
pub struct WorkerOptions {
    /// Bytes and trees.
    pub store: Arc<Store>,
    /// Runs processes.
    pub executor: Arc<dyn Executor>,
    /// Open sessions.
    pub sessions: SessionManager,
    /// Platforms steps can run on, the native one first.
    pub platforms: Vec<Platform>,
    /// Network and name resolution of steps.
    pub network: NetworkOptions,
    /// Parent of the control groups of steps that name none; empty for the daemon's own.
    pub cgroup_parent: String,
    /// Whether the daemon has no privileges on the host.
    pub rootless: bool,
}

/// Network and name resolution of steps.
#[derive(Clone, Debug, Default)]
pub struct NetworkOptions {
    /// `auto`, `host`, `none` or `bridge`: what a step has that does not say.
    pub mode: String,
    /// Name servers instead of the host's; empty for the host's.
    pub nameservers: Vec<String>,
    /// Search domains instead of the host's.
    pub search: Vec<String>,
    /// Resolver options instead of the host's.
    pub options: Vec<String>,
}

impl fmt::Debug for WorkerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerOptions")
            .field("platforms", &self.platforms)
            .finish_non_exhaustive()
    }
}

/// What all operations share.
pub struct Shared {
    /// Bytes and trees.
    pub store: Arc<Store>,
    /// Runs processes.
    pub executor: Arc<dyn Executor>,
    /// Open sessions.
    pub sessions: SessionManager,
    /// Platforms steps can run on, the native one first.
    pub platforms: Vec<Platform>,
    /// Network and name resolution of steps.
    pub network: NetworkOptions,
    /// Parent of the control groups of steps that name none.
    pub cgroup_parent: String,
    /// Whether the daemon has no privileges on the host.
    pub rootless: bool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("platforms", &self.platforms)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// The platform a vertex is for, normalised; the native one if it does not say.
    pub fn platform(&self, vertex: &Vertex) -> Platform {
        match &vertex.platform {
            Some(p) if !p.is_empty() => p.normalized(),
            _ => self.native(),
        }
    }

    /// The platform of this machine.
    pub fn native(&self) -> Platform {
        self.platforms.first().cloned().unwrap_or_else(Platform::host)
    }
}

/// Carries LLB out on this machine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LlbWorker {
    pub(crate) shared: Arc<Shared>,
}

impl LlbWorker {
    /// A worker over a store, an executor and the open sessions.
    pub fn new(options: WorkerOptions) -> Self {
        let WorkerOptions {
            store,
            executor,
            sessions,
            platforms,
            network,
            cgroup_parent,
            rootless,
        } = options;
        let shared = Shared {
            store,
            executor,
            sessions,
            platforms,
            network,
            cgroup_parent,
            rootless,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The store results live in.
    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }

    /// The open sessions.
    pub fn sessions(&self) -> &SessionManager {
        &self.shared.sessions
    }

    /// Makes a call on a session of any client that asks; the first that succeeds counts.
    pub(crate) async fn any_session<T, F, Fut>(&self, asker: Asker<'_>, call: F) -> Result<T, SessionError>
    where
        F: FnMut(Session) -> Fut,
        Fut: Future<Output = Result<T, SessionError>>,
    {
        let mut group: Vec<SessionId> = Vec::new();
        for client in asker.clients() {
            if !group.contains(&client.session) {
                group.push(client.session.clone());
            }
        }
        self.sessions().any(&group, call).await
    }
}

impl Worker for LlbWorker {
    type Ref = Ref;
    type Error = OpError;
    type Client = Client;

    fn op(&self, vertex: &Arc<Vertex>) -> Result<Arc<dyn Op<Self>>> {
        op::op(self, vertex)
    }
}

/// The store's name for a tenant.
pub fn store_tenant(tenant: &kiln_solver::Tenant) -> Result<Tenant> {
    Ok(Tenant::new(tenant.as_str())?)
}
