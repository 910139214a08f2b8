//! One run of an operation: the last lookup, the work itself, the save.

use std::sync::Arc;

use crate::cache::{ContentAlias, KeyAlias, RecordVersion, Save};
use crate::cache_key::{KeyId, KeyInput, KeyParts};
use crate::context::OpContext;
use crate::edge::Known;
use crate::error::{SolveError, WorkerError as _};
use crate::job::{JobInner, Mapped, Node};
use crate::op::{CacheMap, ExecFailure, Worker};
use crate::progress::Warning;
use crate::solver::{Ran, RunFailure};

/// One run, shared by all jobs that want it.
pub(crate) struct Run<W: Worker> {
    /// The job that started it. It is only used for what all jobs of the tenant have in common.
    pub(crate) job: Arc<JobInner<W>>,
    pub(crate) mapped: Mapped<W>,
    pub(crate) inputs: Arc<[W::Ref]>,
    pub(crate) save: Arc<Save<W::Ref>>,
    pub(crate) may_look_up: bool,
    pub(crate) stored: bool,
    pub(crate) fresh: bool,
    pub(crate) outputs: usize,
}

impl<W: Worker> Run<W> {
    pub(crate) async fn go(self, cx: &OpContext<W>) -> Result<Ran<W::Ref>, RunFailure<W::Error>> {
        let digest = cx.vertex().digest;
        let (solver, tenant) = (&self.job.solver, &self.job.tenant);
        let record = self.save.record;
        if self.may_look_up
            && let Some(hit) = solver.find(tenant, record).await
        {
            solver.learn(tenant, (*self.save).clone()).await;
            return Ok(Ran {
                outputs: hit.outputs,
                run: hit.run,
                hit: true,
                fresh: false,
            });
        }
        cx.progress().start();
        let outputs = match self.mapped.op.exec(&self.inputs, cx).await {
            Ok(outputs) if outputs.len() >= self.outputs => outputs,
            Ok(outputs) => {
                let message = format!("{} of {} outputs were made", outputs.len(), self.outputs);
                return Err(self.failed(cx, SolveError::new(digest, W::Error::internal(message))));
            }
            Err(ExecFailure::Failed(error)) => return Err(self.failed(cx, SolveError::new(digest, error))),
            Err(ExecFailure::InputLost(input)) => {
                cx.progress().complete(None);
                return Err(RunFailure::InputLost(input));
            }
        };
        let outputs: Arc<[W::Ref]> = outputs.into();
        let mut run = None;
        if self.stored {
            let mut save = (*self.save).clone();
            save.outputs = Some(Arc::clone(&outputs));
            match solver.cache.save(tenant, save).await {
                Ok(saved) => run = Some(saved),
                Err(error) => {
                    tracing::warn!(%error, vertex = %digest, "result not cached");
                    let short = format!("result not cached: {error}");
                    cx.progress().warn(Warning {
                        level: 1,
                        short,
                        ..Warning::default()
                    });
                }
            }
        }
        cx.progress().complete(None);
        Ok(Ran {
            outputs,
            run: run.unwrap_or_else(|| solver.unsaved(record)),
            hit: false,
            fresh: self.fresh,
        })
    }

    fn failed(&self, cx: &OpContext<W>, error: SolveError<W::Error>) -> RunFailure<W::Error> {
        cx.progress().finish(Some(error.to_string()), error.is_personal());
        RunFailure::Failed(error)
    }
}

/// The key of an operation over inputs as far as they are known.
pub(crate) fn parts_of<W: Worker>(map: &CacheMap, known: &[Known<W>]) -> KeyParts {
    let inputs = known.iter().zip(&map.deps).map(|(known, dep)| {
        let lasting = known.outcome.as_ref().is_none_or(|o| !o.volatile);
        KeyInput {
            key: known.key.filter(|_| lasting || !dep.content),
            selector: dep.selector,
            content: known.content.filter(|_| dep.content).map(|(_, content)| content),
        }
    });
    KeyParts {
        ops: map.keys.clone(),
        subject: map.subject.clone(),
        inputs: inputs.collect(),
    }
}

/// What is to be written about a record made of these inputs.
pub(crate) fn save_of<W: Worker>(
    node: &Node<W>,
    record: KeyId,
    parts: KeyParts,
    known: &[Known<W>],
    outputs: Option<Arc<[W::Ref]>>,
) -> Save<W::Ref> {
    let looked_at: Vec<RecordVersion> = known.iter().filter_map(|k| k.content.map(|(of, _)| of)).collect();
    let contents = known
        .iter()
        .zip(&parts.inputs)
        .filter_map(|(known, input)| {
            let (of, content) = known.content?;
            let key = input.key?;
            Some(ContentAlias {
                of,
                output: key.output,
                selector: input.selector,
                content,
            })
        })
        .collect();
    let aliases = parts
        .aliases()
        .into_iter()
        .map(|key| KeyAlias {
            key,
            while_current: looked_at.clone(),
        })
        .collect();
    let links = parts.links();
    Save {
        record,
        description: node.vertex.name(),
        parts: Arc::new(parts),
        outputs,
        aliases,
        contents,
        links,
    }
}
