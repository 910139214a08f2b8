//! `ExecOp` as the solver sees it: keyed here, run by [`ExecRunner`].

use std::sync::Arc;

use async_trait::async_trait;
use kiln_executor::Resources;
use kiln_llb::op::{ExecOp, Op as LlbOp};
use kiln_llb::{LinuxResources, Vertex};
use kiln_oci::Digest;
use kiln_session::SessionId;
use kiln_solver::{CacheMap, ExecFailure, Op, OpContext, WorkerError as _};
use kiln_store::LayerRef;

use super::exec::{ExecFailed, ExecRunner, ExecSettings};
use crate::error::{OpError, OpResult};
use crate::key::{OpKey, exec_key};
use crate::layers::realize_ctx;
use crate::surroundings::DnsSettings;
use crate::worker::{LlbWorker, store_tenant};

/// A process.
pub struct ExecOperation {
    worker: LlbWorker,
    runner: ExecRunner,
    op: ExecOp,
    key: OpKey,
}

impl std::fmt::Debug for ExecOperation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecOperation")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl ExecOperation {
    /// The process behind a vertex.
    pub fn new(worker: LlbWorker, vertex: Arc<Vertex>) -> Result<Self, OpError> {
        let LlbOp::Exec(op) = &vertex.op else {
            return Err(OpError::internal("not an exec".into()));
        };
        let shared = &worker.shared;
        let key = exec_key(op, &shared.platform(&vertex), vertex.inputs.len())?;
        let runner = ExecRunner {
            store: Arc::clone(&shared.store),
            executor: Arc::clone(&shared.executor),
            sessions: shared.sessions.clone(),
            settings: ExecSettings {
                isolated_network: shared.network.mode == "none",
                dns: DnsSettings {
                    nameservers: shared.network.nameservers.clone(),
                    options: shared.network.options.clone(),
                    search_domains: shared.network.search.clone(),
                },
                cgroup_parent: shared.cgroup_parent.clone(),
                resources: vertex
                    .metadata
                    .linux_resources
                    .as_ref()
                    .map(resources)
                    .unwrap_or_default(),
            },
        };
        Ok(Self {
            op: op.clone(),
            runner,
            key,
            worker,
        })
    }
}

/// Limits as the wire has them; 0 and empty are unset.
fn resources(limits: &LinuxResources) -> Resources {
    let text = |s: &String| (!s.is_empty()).then(|| s.clone());
    let signed = |n: i64| (n != 0).then_some(n);
    let unsigned = |n: u64| (n != 0).then_some(n);
    Resources {
        memory: u64::try_from(limits.memory).ok().and_then(unsigned),
        memory_swap: signed(limits.memory_swap),
        cpu_shares: unsigned(limits.cpu_shares),
        cpu_period: unsigned(limits.cpu_period),
        cpu_quota: signed(limits.cpu_quota),
        cpuset_cpus: text(&limits.cpuset_cpus),
        cpuset_mems: text(&limits.cpuset_mems),
        ..Resources::default()
    }
}

#[async_trait]
impl Op<LlbWorker> for ExecOperation {
    async fn cache_map(&self, _cx: &OpContext<LlbWorker>) -> Result<CacheMap, OpError> {
        Ok(super::cache_map(&self.key))
    }

    async fn content_digest(
        &self,
        input: usize,
        value: &Option<LayerRef>,
        cx: &OpContext<LlbWorker>,
    ) -> OpResult<Digest> {
        super::content_digest(&self.worker, &self.key, input, value.as_ref(), cx).await
    }

    async fn exec(&self, inputs: &[Option<LayerRef>], cx: &OpContext<LlbWorker>) -> OpResult<Vec<Option<LayerRef>>> {
        let tenant = store_tenant(cx.tenant())?;
        let mut group: Vec<SessionId> = Vec::new();
        for client in cx.clients() {
            // A client without a session has an empty id.
            if !client.session.as_str().is_empty() && !group.contains(&client.session) {
                group.push(client.session.clone());
            }
        }
        let ran = self
            .runner
            .run(&self.op, inputs, cx, &tenant, &group, &realize_ctx(cx))
            .await;
        ran.map_err(|error| match error {
            ExecFailed::InputLost(input) => ExecFailure::InputLost(input),
            ExecFailed::Failed(error) => ExecFailure::Failed(error),
        })
    }
}
