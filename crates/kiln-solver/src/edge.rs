//! How the value of a vertex is found: definition key, content key, run.
//!
//! Everything here runs in the task of one vertex of one job (see [`Lazy`]); what jobs share happens in
//! [`Flights`](crate::flight::Flights). The three steps are those of `docs/cache.md`:
//!
//! 1. The definition key, if there is one, is looked up. Nothing was made so far.
//! 2. If the operation is keyed by content, the inputs concerned are identified by what they hold, from memory or by making
//!    them, and the content key is looked up. Skipped if no record can match; then all inputs are made at once.
//! 3. All inputs are made, the key is made again from what they really are, and the run under that key is joined or
//!    started. It looks the key up a last time, runs the operation and saves the result.

use std::sync::{Arc, PoisonError};

use futures::future::{BoxFuture, try_join_all};
use kiln_llb::OutputIndex;
use kiln_oci::Digest;
use tokio_util::sync::CancellationToken;

use crate::cache::RecordVersion;
use crate::cache_key::{KeyId, RecordOutput};
use crate::context::OpContext;
use crate::error::{SolveError, WorkerError as _};
use crate::flight::Launch;
use crate::job::{JobInner, Mapped, Node, NodeId, Outcome};
use crate::op::{ExecFailure, Worker};
use crate::reporter::Reporter;
use crate::run::{Run, parts_of, save_of};
use crate::solver::{ContentId, MapId, RunFailure, RunId};

type Solve<W, T> = Result<T, SolveError<<W as Worker>::Error>>;

/// How often the inputs of one vertex may turn out to be lost before the build fails.
const MAX_LOSSES: usize = 8;

/// An input of which something is known.
pub(crate) struct Known<W: Worker> {
    pub(crate) outcome: Option<Outcome<W>>,
    /// Its lasting identity.
    pub(crate) key: Option<RecordOutput>,
    /// Digest of what it holds, with the run it was taken from.
    pub(crate) content: Option<(RecordVersion, Digest)>,
}

impl<W: Worker> JobInner<W> {
    fn at<T>(&self, node: &Node<W>, answer: Option<Solve<W, T>>) -> Solve<W, T> {
        answer.unwrap_or_else(|| {
            let message = format!("the work of `{}` panicked", node.vertex.name());
            Err(SolveError::new(node.vertex.digest, W::Error::internal(message)))
        })
    }

    fn get(&self, id: NodeId) -> Solve<W, Arc<Node<W>>> {
        // Nodes go when the job ends.
        let nowhere = kiln_llb::VertexDigest(Digest::from_bytes([0; 32]));
        self.node(id)
            .ok_or_else(|| SolveError::new(nowhere, W::Error::canceled()))
    }

    /// The value of a vertex.
    pub(crate) fn value(self: &Arc<Self>, id: NodeId) -> BoxFuture<'_, Solve<W, Outcome<W>>> {
        Box::pin(async move {
            let node = self.get(id)?;
            let value = node.value.get(|| {
                let (job, node) = (Arc::clone(self), Arc::clone(&node));
                async move { job.find_value(id, &node).await }
            });
            let value = value.await;
            self.at(&node, value)
        })
    }

    /// The identity of a vertex, if it can be told without making anything.
    pub(crate) fn key(self: &Arc<Self>, id: NodeId) -> BoxFuture<'_, Solve<W, Option<KeyId>>> {
        Box::pin(async move {
            let node = self.get(id)?;
            let key = node.key.get(|| {
                let (job, node) = (Arc::clone(self), Arc::clone(&node));
                async move { job.find_key(&node).await }
            });
            let key = key.await;
            self.at(&node, key)
        })
    }

    async fn map(self: &Arc<Self>, node: &Arc<Node<W>>) -> Solve<W, Mapped<W>> {
        let map = node.map.get(|| {
            let (job, node) = (Arc::clone(self), Arc::clone(node));
            async move { job.find_map(&node).await }
        });
        let map = map.await;
        self.at(node, map)
    }

    /// Forgets a value that turned out to be gone.
    pub(crate) async fn lose(&self, id: NodeId, run: RecordVersion) {
        self.solver.forget(&self.tenant, run).await;
        if let Some(node) = self.node(id) {
            node.value
                .reset_if(|value| matches!(value, Ok(outcome) if outcome.run == run));
        }
    }

    fn context(
        &self,
        node: &Node<W>,
        teardown: &crate::flight::TeardownGuard,
        canceled: CancellationToken,
    ) -> OpContext<W> {
        OpContext::new(
            Arc::clone(&node.vertex),
            self.tenant.clone(),
            Reporter::new(Arc::clone(&self.solver.spool)),
            self.solver.permits.clone(),
            Some(teardown.downgrade()),
            canceled,
        )
    }

    /// Reports an error that arose before the vertex's own work began.
    fn failed_early(&self, node: &Node<W>, error: &SolveError<W::Error>) {
        let reporter = Reporter::new(Arc::clone(&self.solver.spool));
        reporter.attach(&self.progress, node.vertex.digest, true);
        reporter.start();
        reporter.complete(Some(error.to_string()));
    }

    async fn find_map(self: &Arc<Self>, node: &Arc<Node<W>>) -> Solve<W, Mapped<W>> {
        let digest = node.vertex.digest;
        let op = self
            .solver
            .worker
            .op(&node.vertex)
            .map_err(|e| SolveError::new(digest, e))
            .inspect_err(|e| {
                self.failed_early(node, e);
            })?;
        let id = MapId {
            tenant: self.tenant.clone(),
            vertex: digest,
        };
        let is_source = node.inputs.is_empty();
        loop {
            // The starter is there before the work begins, which may ask its client at once.
            let mut here = None;
            let ticket = self
                .solver
                .maps
                .join(&id, |teardown, canceled| {
                    let cx = self.context(node, &teardown, canceled);
                    here = Some(cx.attach(self, digest, true));
                    let (op, shared) = (Arc::clone(&op), cx.clone());
                    let work = async move {
                        let _teardown = teardown;
                        if is_source {
                            cx.progress().start();
                        }
                        let map = op.cache_map(&cx).await.map_err(|e| SolveError::new(digest, e));
                        let map = map.map(|map| Mapped { op, map: Arc::new(map) });
                        if let Err(error) = &map {
                            if !is_source {
                                cx.progress().start();
                            }
                            cx.progress().finish(Some(error.to_string()), error.is_personal());
                        } else {
                            cx.progress().complete(None);
                        }
                        map
                    };
                    Launch { shared, work }
                })
                .await;
            let _here = here.unwrap_or_else(|| ticket.shared().attach(self, digest, false));
            match self.at(node, ticket.wait().await) {
                Err(error) if error.is_personal() && !ticket.starter => {}
                Err(error) => return Err(error),
                Ok(mapped) => {
                    let missing = if mapped.map.keys.is_empty() {
                        "a digest"
                    } else if mapped.map.deps.len() != node.inputs.len() {
                        "a dependency for each input"
                    } else {
                        return Ok(mapped);
                    };
                    let message = format!("the operation of `{}` was keyed without {missing}", node.vertex.name());
                    return Err(SolveError::new(digest, W::Error::internal(message)));
                }
            }
        }
    }

    async fn find_key(self: &Arc<Self>, node: &Arc<Node<W>>) -> Solve<W, Option<KeyId>> {
        if node.vertex.metadata.ignore_cache {
            return Ok(None);
        }
        let Mapped { map, .. } = self.map(node).await?;
        if map.transient {
            return Ok(None);
        }
        let known = self.input_keys(node).await?;
        if known.iter().any(|k| k.key.is_none()) {
            return Ok(None);
        }
        let Some(definition) = parts_of(&map, &known).definition() else {
            return Ok(None);
        };
        if map.deps.iter().any(|d| d.content) {
            Ok(self.solver.resolve_key(&self.tenant, definition).await)
        } else {
            Ok(Some(definition))
        }
    }

    /// What can be told about the inputs without making them.
    async fn input_keys(self: &Arc<Self>, node: &Arc<Node<W>>) -> Solve<W, Vec<Known<W>>> {
        try_join_all(node.inputs.iter().map(|&(input, output)| async move {
            let key = self.key(input).await?.map(|record| RecordOutput { record, output });
            Ok(Known {
                outcome: None,
                key,
                content: None,
            })
        }))
        .await
    }

    async fn find_value(self: &Arc<Self>, id: NodeId, node: &Arc<Node<W>>) -> Solve<W, Outcome<W>> {
        let Mapped { op, map } = self.map(node).await?;
        let ignores_cache = node.vertex.metadata.ignore_cache;
        let mut known = if ignores_cache {
            node.inputs
                .iter()
                .map(|_| Known {
                    outcome: None,
                    key: None,
                    content: None,
                })
                .collect()
        } else {
            if let Some(key) = self.key(id).await?
                && let Some(hit) = self.solver.find(&self.tenant, key).await
            {
                return Ok(self.hit(node, hit.run, hit.outputs));
            }
            self.input_keys(node).await?
        };
        let mapped = Mapped { op, map };
        if !ignores_cache && let Some(outcome) = self.find_by_content(node, &mapped, &mut known).await? {
            return Ok(outcome);
        }
        self.make(node, &mapped, known).await
    }

    fn hit(&self, node: &Node<W>, run: RecordVersion, outputs: Arc<[W::Ref]>) -> Outcome<W> {
        self.progress.cached(node.vertex.digest);
        Outcome {
            outputs,
            run,
            trusted: true,
            volatile: false,
        }
    }

    /// Step 2. Leaves in `known` what was found out.
    async fn find_by_content(
        self: &Arc<Self>,
        node: &Arc<Node<W>>,
        mapped: &Mapped<W>,
        known: &mut [Known<W>],
    ) -> Solve<W, Option<Outcome<W>>> {
        let map = &mapped.map;
        if map.transient || !map.deps.iter().any(|d| d.content) {
            return Ok(None);
        }
        let parts = parts_of(map, known);
        for (index, dep) in map.deps.iter().enumerate() {
            if !dep.content
                && let Some(link) = parts.link(index)
                && !self.solver.linked(&self.tenant, link).await
            {
                return Ok(None);
            }
        }
        for _ in 0..MAX_LOSSES {
            let jobs = known.iter_mut().enumerate().map(|(index, known)| async move {
                let dep = map.deps.get(index).cloned().unwrap_or_default();
                if dep.content && known.content.is_none() {
                    self.identify_by_content(node, mapped, index, known).await
                } else if !dep.content && known.key.is_none() {
                    self.make_input(node, index, known).await.map_err(RunFailure::Failed)
                } else {
                    Ok(())
                }
            });
            match try_join_all(jobs).await {
                Ok(_) => {}
                Err(RunFailure::Failed(error)) => return Err(error),
                Err(RunFailure::InputLost(input)) => {
                    self.lose_input(node, known, input).await;
                    continue;
                }
            }
            let usable = map
                .deps
                .iter()
                .zip(known.iter())
                .all(|(dep, known)| dep.content || known.outcome.as_ref().is_none_or(|o| o.trusted && !o.volatile));
            if !usable {
                return Ok(None);
            }
            let parts = parts_of(map, known);
            let Some(key) = parts.canonical() else { return Ok(None) };
            let Some(hit) = self.solver.find(&self.tenant, key).await else {
                return Ok(None);
            };
            self.solver
                .learn(&self.tenant, save_of(node, key, parts, known, None))
                .await;
            return Ok(Some(self.hit(node, hit.run, hit.outputs)));
        }
        Err(self.lost_too_often(node))
    }

    /// Step 3.
    async fn make(
        self: &Arc<Self>,
        node: &Arc<Node<W>>,
        mapped: &Mapped<W>,
        mut known: Vec<Known<W>>,
    ) -> Solve<W, Outcome<W>> {
        let map = &mapped.map;
        for _ in 0..MAX_LOSSES {
            let jobs = known.iter_mut().enumerate().map(|(index, known)| async move {
                self.make_input(node, index, known).await.map_err(RunFailure::Failed)?;
                if map.deps.get(index).is_some_and(|d| d.content) {
                    self.identify_by_content(node, mapped, index, known).await?;
                }
                Ok(())
            });
            let outcome = match try_join_all(jobs).await {
                Ok(_) => self.run(node, mapped, &known).await,
                Err(failure) => Err(failure),
            };
            match outcome {
                Ok(outcome) => return Ok(outcome),
                Err(RunFailure::Failed(error)) => return Err(error),
                Err(RunFailure::InputLost(input)) => self.lose_input(node, &mut known, input).await,
            }
        }
        Err(self.lost_too_often(node))
    }

    fn lost_too_often(&self, node: &Node<W>) -> SolveError<W::Error> {
        let message = format!("the inputs of `{}` were lost again and again", node.vertex.name());
        SolveError::new(node.vertex.digest, W::Error::internal(message))
    }

    async fn lose_input(&self, node: &Node<W>, known: &mut [Known<W>], index: usize) {
        if let (Some(known), Some(&(input, _))) = (known.get_mut(index), node.inputs.get(index))
            && let Some(outcome) = known.outcome.take()
        {
            known.content = None;
            self.lose(input, outcome.run).await;
        }
    }

    /// Makes an input; its identity is that of what it really is from now on.
    async fn make_input(self: &Arc<Self>, node: &Node<W>, index: usize, known: &mut Known<W>) -> Solve<W, ()> {
        if known.outcome.is_some() {
            return Ok(());
        }
        let Some(&(input, output)) = node.inputs.get(index) else {
            return Ok(());
        };
        let outcome = self.value(input).await?;
        known.key = Some(RecordOutput {
            record: outcome.run.record,
            output,
        });
        // A digest remembered from another run says nothing about this one.
        known.content = known.content.filter(|(of, _)| *of == outcome.run);
        known.outcome = Some(outcome);
        Ok(())
    }

    /// Finds out what an input holds at the paths used, making it only if nothing is remembered.
    async fn identify_by_content(
        self: &Arc<Self>,
        node: &Arc<Node<W>>,
        mapped: &Mapped<W>,
        index: usize,
        known: &mut Known<W>,
    ) -> Result<(), RunFailure<W::Error>> {
        if known.content.is_some() {
            return Ok(());
        }
        let selector = mapped.map.deps.get(index).and_then(|d| d.selector);
        if known.outcome.is_none()
            && let Some(key) = known.key
            && let Some(found) = self
                .solver
                .content(&self.tenant, key.record, key.output, selector)
                .await
        {
            known.content = Some(found);
            return Ok(());
        }
        self.make_input(node, index, known).await.map_err(RunFailure::Failed)?;
        let (Some(outcome), Some(key)) = (&known.outcome, known.key) else {
            return Ok(());
        };
        let memo = (outcome.run, key.output, selector);
        let remembered = self
            .contents
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&memo)
            .copied();
        let content = match remembered {
            Some(content) => content,
            None => {
                let stored = self
                    .solver
                    .content(&self.tenant, key.record, key.output, selector)
                    .await;
                match stored.filter(|(of, _)| *of == outcome.run) {
                    Some((_, content)) => content,
                    None => {
                        self.digest_content(node, mapped, index, outcome, key.output, selector)
                            .await?
                    }
                }
            }
        };
        self.contents
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(memo, content);
        known.content = Some((outcome.run, content));
        Ok(())
    }

    async fn digest_content(
        self: &Arc<Self>,
        node: &Arc<Node<W>>,
        mapped: &Mapped<W>,
        index: usize,
        outcome: &Outcome<W>,
        output: OutputIndex,
        selector: Option<Digest>,
    ) -> Result<Digest, RunFailure<W::Error>> {
        let digest = node.vertex.digest;
        let value = self.output(node, index, outcome, output).map_err(RunFailure::Failed)?;
        // Equal selectors stand for equal paths, but links are followed or not by the operation: it is part of the id.
        let op = mapped.map.keys.last().map(|k| k.0).unwrap_or(digest.0);
        let salted = Digest::of(format!("{op} {index} {selector:?}"));
        let id = ContentId {
            tenant: self.tenant.clone(),
            of: outcome.run,
            output,
            selector: Some(salted),
        };
        loop {
            let mut here = None;
            let ticket = self
                .solver
                .contents
                .join(&id, |teardown, canceled| {
                    let cx = self.context(node, &teardown, canceled);
                    here = Some(cx.attach(self, digest, true));
                    let (op, value, shared) = (Arc::clone(&mapped.op), value.clone(), cx.clone());
                    let work = async move {
                        let _teardown = teardown;
                        match op.content_digest(index, &value, &cx).await {
                            Ok(content) => Ok(content),
                            Err(ExecFailure::InputLost(input)) => Err(RunFailure::InputLost(input)),
                            Err(ExecFailure::Failed(error)) => {
                                let error = SolveError::new(digest, error);
                                cx.progress().start();
                                cx.progress().finish(Some(error.to_string()), error.is_personal());
                                Err(RunFailure::Failed(error))
                            }
                        }
                    };
                    Launch { shared, work }
                })
                .await;
            let _here = here.unwrap_or_else(|| ticket.shared().attach(self, digest, false));
            match ticket.wait().await {
                Some(Err(RunFailure::Failed(error))) if error.is_personal() && !ticket.starter => {}
                Some(Err(RunFailure::InputLost(_))) => return Err(RunFailure::InputLost(index)),
                Some(answer) => return answer,
                None => return Err(RunFailure::Failed(self.panicked(node))),
            }
        }
    }

    fn panicked(&self, node: &Node<W>) -> SolveError<W::Error> {
        let message = format!("the work of `{}` panicked", node.vertex.name());
        SolveError::new(node.vertex.digest, W::Error::internal(message))
    }

    fn output(&self, node: &Node<W>, index: usize, outcome: &Outcome<W>, output: OutputIndex) -> Solve<W, W::Ref> {
        outcome.outputs.get(output as usize).cloned().ok_or_else(|| {
            let message = format!(
                "input {index} of `{}` is output {output}, which does not exist",
                node.vertex.name()
            );
            SolveError::new(node.vertex.digest, W::Error::internal(message))
        })
    }

    /// Joins or starts the run of this vertex over inputs that are all there.
    async fn run(
        self: &Arc<Self>,
        node: &Arc<Node<W>>,
        mapped: &Mapped<W>,
        known: &[Known<W>],
    ) -> Result<Outcome<W>, RunFailure<W::Error>> {
        let digest = node.vertex.digest;
        let map = &mapped.map;
        let ignores_cache = node.vertex.metadata.ignore_cache;
        let parts = parts_of(map, known);
        let Some(key) = parts.canonical() else {
            let message = format!("`{}` has no key although its inputs are there", node.vertex.name());
            return Err(RunFailure::Failed(SolveError::new(digest, W::Error::internal(message))));
        };
        let mut inputs = Vec::with_capacity(known.len());
        let mut by_identity = Vec::new();
        let (mut trusted, mut volatile) = (!ignores_cache, map.transient);
        for (index, (known, dep)) in known.iter().zip(&map.deps).enumerate() {
            let (Some(outcome), Some(key)) = (&known.outcome, known.key) else {
                continue;
            };
            inputs.push(
                self.output(node, index, outcome, key.output)
                    .map_err(RunFailure::Failed)?,
            );
            if !dep.content {
                by_identity.push(outcome.run);
                trusted &= outcome.trusted;
                volatile |= outcome.volatile;
            }
        }
        let inputs: Arc<[W::Ref]> = inputs.into();
        let limits = node.vertex.metadata.linux_resources.as_ref();
        let surroundings = RunId::surroundings(by_identity.into_iter(), limits);
        let id = RunId {
            tenant: self.tenant.clone(),
            key,
            inputs: surroundings,
            ignores_cache,
        };
        let save = Arc::new(save_of(node, key, parts, known, None));
        loop {
            let anew = RunId {
                ignores_cache: true,
                ..id.clone()
            };
            let joined = if ignores_cache {
                None
            } else {
                self.solver.runs.join_running(&anew)
            };
            let mut here = None;
            let ticket = match joined {
                Some(ticket) => ticket,
                None => {
                    self.solver
                        .runs
                        .join(&id, |teardown, canceled| {
                            let cx = self.context(node, &teardown, canceled);
                            here = Some(cx.attach(self, digest, true));
                            let run = Run {
                                job: Arc::clone(self),
                                mapped: mapped.clone(),
                                inputs: Arc::clone(&inputs),
                                save: Arc::clone(&save),
                                may_look_up: trusted && !volatile,
                                stored: !volatile,
                                fresh: !trusted,
                                outputs: node.vertex.outputs() as usize,
                            };
                            let shared = cx.clone();
                            let work = async move {
                                let _teardown = teardown;
                                run.go(&cx).await
                            };
                            Launch { shared, work }
                        })
                        .await
                }
            };
            let _here = here.unwrap_or_else(|| ticket.shared().attach(self, digest, false));
            match ticket.wait().await {
                Some(Ok(ran)) => {
                    if ran.hit {
                        self.progress.cached(digest);
                    }
                    return Ok(Outcome {
                        outputs: ran.outputs,
                        run: ran.run,
                        trusted: !ran.fresh,
                        volatile,
                    });
                }
                Some(Err(RunFailure::Failed(error))) if error.is_personal() && !ticket.starter => {}
                Some(Err(failure)) => return Err(failure),
                None => {
                    let error = self.panicked(node);
                    ticket.shared().progress().finish(Some(error.to_string()), false);
                    return Err(RunFailure::Failed(error));
                }
            }
        }
    }
}
