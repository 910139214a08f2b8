//! `FileOp`: file changes without a process and without a mount.
//!
//! The actions of an operation form chains, each action on top of an input or of an earlier one. Every output is written
//! as one new layer over the input its chain begins with. An action whose result another one copies from is written to a
//! tree of its own for that.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::try_join_all;
use kiln_fs::{Stop, Timestamp};
use kiln_llb::Vertex;
use kiln_llb::op::{ChownOpt, CopyAction, FileAction, FileActionKind, FileOp, Op as LlbOp, UserOpt};
use kiln_oci::Digest;
use kiln_solver::{CacheMap, Op, OpContext, WorkerError as _};
use kiln_store::{
    ActiveSnapshot, CopySpec, FileWriter, LayerMeta, LayerRef, ModeChange, Owner, OwnerSpec, RecordType, Store,
    StoreError, Tenant, UserSpec, View,
};

use crate::error::{OpError, OpResult};
use crate::key::{OpKey, file_key};
use crate::layers::{blocking, realize_input};
use crate::worker::{LlbWorker, store_tenant};

/// File changes.
#[derive(Debug)]
pub struct FileOperation {
    worker: LlbWorker,
    op: FileOp,
    outputs: usize,
    name: String,
    key: OpKey,
}

impl FileOperation {
    /// The file changes behind a vertex.
    pub fn new(worker: LlbWorker, vertex: Arc<Vertex>) -> Result<Self, OpError> {
        let LlbOp::File(op) = &vertex.op else {
            return Err(OpError::internal("not a file op".into()));
        };
        let key = file_key(op, vertex.inputs.len())?;
        Ok(Self {
            worker,
            op: op.clone(),
            outputs: vertex.outputs() as usize,
            name: vertex.name(),
            key,
        })
    }
}

#[async_trait]
impl Op<LlbWorker> for FileOperation {
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
        let _permit = cx.permit().await;
        let used = used_inputs(&self.op, inputs.len());
        let views = try_join_all(used.into_iter().map(|index| async move {
            let view = realize_input(&self.worker, cx, index, inputs.get(index).and_then(Option::as_ref)).await?;
            OpResult::Ok((index, view))
        }))
        .await?;
        let work = Work {
            store: Arc::clone(self.worker.store()),
            tenant: store_tenant(cx.tenant())?,
            op: self.op.clone(),
            inputs: inputs.to_vec(),
            views: views.into_iter().collect(),
            description: self.name.clone(),
            copied_from: HashMap::new(),
            held: Vec::new(),
        };
        let outputs = self.outputs;
        Ok(blocking(move |stop| work.run(outputs, stop)).await?)
    }
}

/// The vertex's inputs whose files are looked at.
fn used_inputs(op: &FileOp, inputs: usize) -> BTreeSet<usize> {
    let mut used = BTreeSet::new();
    let mut add = |index: Option<u32>| used.extend(index.map(|i| i as usize).filter(|i| *i < inputs));
    for action in &op.actions {
        add(action.input);
        add(action.secondary_input);
        if let Some(owner) = owner_of(&action.kind) {
            for who in [&owner.user, &owner.group].into_iter().flatten() {
                if let UserOpt::ByName { input, .. } = who {
                    add(*input);
                }
            }
        }
    }
    used
}

fn owner_of(kind: &FileActionKind) -> Option<&ChownOpt> {
    match kind {
        FileActionKind::Copy(a) => a.owner.as_ref(),
        FileActionKind::MkFile(a) => a.owner.as_ref(),
        FileActionKind::MkDir(a) => a.owner.as_ref(),
        FileActionKind::Symlink(a) => a.owner.as_ref(),
        FileActionKind::Rm(_) => None,
    }
}

/// What runs on a blocking thread. It owns everything it needs.
struct Work {
    store: Arc<Store>,
    tenant: Tenant,
    op: FileOp,
    inputs: Vec<Option<LayerRef>>,
    views: HashMap<usize, View>,
    description: String,
    /// Views of actions that others copy from.
    copied_from: HashMap<usize, View>,
    /// Keeps the directories of those views until the work is over.
    held: Vec<ActiveSnapshot>,
}

/// Where an index of an action leads.
enum Place {
    Nothing,
    Input(usize),
    Action(usize),
}

impl Work {
    fn place(&self, index: Option<u32>) -> Result<Place, StoreError> {
        let Some(index) = index.map(|i| i as usize) else {
            return Ok(Place::Nothing);
        };
        match index.checked_sub(self.inputs.len()) {
            None => Ok(Place::Input(index)),
            Some(action) if action < self.op.actions.len() => Ok(Place::Action(action)),
            Some(_) => Err(StoreError::Invalid(format!(
                "invalid file op: index {index} is out of range"
            ))),
        }
    }

    fn run(mut self, outputs: usize, stop: &Stop) -> Result<Vec<Option<LayerRef>>, StoreError> {
        for n in 0..self.op.actions.len() {
            let from = self.op.actions.get(n).and_then(|a| a.secondary_input);
            if let Place::Action(action) = self.place(from)?
                && !self.copied_from.contains_key(&action)
            {
                let (snapshot, mut trees) = self.write(action, stop)?;
                trees.push(kiln_store::Tree::open(snapshot.dir()));
                self.copied_from.insert(action, View::new(trees)?);
                self.held.push(snapshot);
            }
        }
        let mut made = vec![None; outputs];
        for n in 0..self.op.actions.len() {
            let Some(output) = self.op.actions.get(n).and_then(|a| a.output) else {
                continue;
            };
            let (snapshot, _) = self.write(n, stop)?;
            let meta = LayerMeta {
                description: self.description.clone(),
                record_type: RecordType::Regular,
                ..LayerMeta::default()
            };
            if let Some(slot) = made.get_mut(output as usize) {
                *slot = Some(snapshot.commit(meta)?);
            }
        }
        Ok(made)
    }

    /// Writes the result of an action as a new tree over the input its chain begins with, and returns it with the trees
    /// below.
    fn write(&self, last: usize, stop: &Stop) -> Result<(ActiveSnapshot, Vec<kiln_store::Tree>), StoreError> {
        let mut chain = vec![last];
        let mut at = last;
        let base = loop {
            let action = self.action(at)?;
            match self.place(action.input)? {
                Place::Nothing => break None,
                Place::Input(input) => break Some(input),
                // Only earlier actions can be meant, so this ends.
                Place::Action(earlier) if earlier < at => {
                    chain.push(earlier);
                    at = earlier;
                }
                Place::Action(_) => {
                    return Err(StoreError::Invalid(
                        "invalid file op: an action is based on a later one".into(),
                    ));
                }
            }
        };
        let parent = base.and_then(|i| self.inputs.get(i)).and_then(Option::as_ref);
        let below = base
            .and_then(|i| self.views.get(&i))
            .cloned()
            .unwrap_or_else(View::scratch);
        let snapshot = self.store.new_active(&self.tenant, parent, &below)?;
        let mut writer = FileWriter::new(&below, snapshot.builder()?)?;
        for index in chain.into_iter().rev() {
            stop.check().map_err(|_| StoreError::Canceled)?;
            self.apply(self.action(index)?, &mut writer, stop)?;
        }
        writer.finish(stop)?;
        Ok((snapshot, below.trees().to_vec()))
    }

    fn action(&self, index: usize) -> Result<&FileAction, StoreError> {
        self.op
            .actions
            .get(index)
            .ok_or_else(|| StoreError::Invalid(format!("invalid file op: no action {index}")))
    }

    fn apply(&self, action: &FileAction, writer: &mut FileWriter, stop: &Stop) -> Result<(), StoreError> {
        let owner = owner_of(&action.kind).map(|o| self.owner(o)).transpose()?;
        let mode = |mode: i32| u32::try_from(mode).unwrap_or(0);
        match &action.kind {
            FileActionKind::MkDir(a) => writer.mkdir(
                a.path.as_bytes(),
                mode(a.mode),
                a.make_parents,
                owner,
                time(a.timestamp),
                stop,
            ),
            FileActionKind::MkFile(a) => {
                writer.mkfile(a.path.as_bytes(), mode(a.mode), &a.data, owner, time(a.timestamp), stop)
            }
            FileActionKind::Symlink(a) => writer.symlink(
                a.oldpath.as_bytes(),
                a.newpath.as_bytes(),
                owner,
                time(a.timestamp),
                stop,
            ),
            FileActionKind::Rm(a) => writer.rm(a.path.as_bytes(), a.allow_not_found, a.allow_wildcard, stop),
            FileActionKind::Copy(a) => {
                let scratch = View::scratch();
                let source = match self.place(action.secondary_input)? {
                    Place::Nothing => &scratch,
                    Place::Input(input) => self.views.get(&input).unwrap_or(&scratch),
                    Place::Action(earlier) => self.copied_from.get(&earlier).unwrap_or(&scratch),
                };
                writer.copy(&copy_spec(a, owner)?, source, stop)
            }
        }
    }

    fn owner(&self, owner: &ChownOpt) -> Result<Owner, StoreError> {
        let who = |who: &UserOpt| match who {
            UserOpt::ById(id) => UserSpec::Id(*id),
            UserOpt::ByName { name, input } => {
                UserSpec::Name(name.clone(), input.and_then(|i| self.views.get(&(i as usize))).cloned())
            }
        };
        OwnerSpec {
            user: owner.user.as_ref().map(who),
            group: owner.group.as_ref().map(who),
        }
        .resolve()
    }
}

/// A time of the wire: nanoseconds, or -1 for none.
fn time(nanos: i64) -> Option<Timestamp> {
    (nanos != -1).then(|| Timestamp::from_unix_nanos(nanos))
}

fn copy_spec(a: &CopyAction, owner: Option<Owner>) -> Result<CopySpec, StoreError> {
    let mode = match u32::try_from(a.mode) {
        _ if !a.mode_str.is_empty() => ModeChange::parse(&a.mode_str)?,
        Ok(mode) => ModeChange::Set(mode & 0o7777),
        Err(_) => ModeChange::Keep,
    };
    Ok(CopySpec {
        src: a.src.clone().into_bytes(),
        dest: a.dest.clone().into_bytes(),
        owner,
        mode,
        timestamp: time(a.timestamp),
        follow_symlink: a.follow_symlink,
        dir_copy_contents: a.dir_copy_contents,
        attempt_unpack: a.attempt_unpack,
        create_dest_path: a.create_dest_path,
        allow_wildcard: a.allow_wildcard,
        allow_empty_wildcard: a.allow_empty_wildcard,
        always_replace: a.always_replace_existing_dest_paths,
        include: a.include_patterns.clone(),
        exclude: a.exclude_patterns.clone(),
        required: a.required_paths.clone(),
    })
}
