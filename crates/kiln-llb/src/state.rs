//! The builder frontends use: file systems as values, made of one another, and written out as a [`Definition`].
//!
//! A [`State`] is a file system plus the surroundings in which the next process would run. States are immutable and cheap to
//! clone; making one does no work. [`State::marshal`] walks what a state is made of, encodes every operation once and puts the
//! parts in the order in which the field's own client library writes them, so that equal builds have equal definitions.

mod spec;
mod write;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use kiln_oci::Platform;

use crate::definition::Definition;
use crate::env_list::EnvList;
use crate::error::LlbError;
use crate::graph::vertex_digest;
use crate::op::*;
use crate::source_map::SourceInfo;
use crate::wire;

pub use spec::{
    Constraints, ExecSpec, FileStep, Location, MountSpec, Owner, OwnerId, SecretMountTarget, SecretSpec, SshSpec,
};
use spec::{Process, exec_caps};
use write::{clean, settle};

/// A file system and the surroundings of the next process in it.
#[derive(Clone, Debug, Default)]
pub struct State {
    output: Option<Output>,
    around: Arc<Surroundings>,
}

/// Surroundings of a process that instructions change one by one.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Environment.
    pub env: EnvList,
    /// Working directory; `/` while it is empty.
    pub dir: String,
    /// `user[:group]`; empty is root.
    pub user: String,
    /// Host name; empty is the default.
    pub hostname: String,
    /// Network.
    pub network: NetMode,
    /// Platform of the file system, normalised.
    pub platform: Option<Platform>,
}

/// One output of a node of the graph under construction.
#[derive(Clone, Debug)]
pub struct Output {
    node: Arc<Node>,
    index: OutputIndex,
}

#[derive(Debug)]
struct Node {
    kind: Kind,
    about: Constraints,
}

#[derive(Debug)]
enum Kind {
    Source(SourceOp),
    Exec(Box<Process>),
    File {
        base: Option<Output>,
        dir: String,
        steps: Vec<FileStep>,
    },
    Merge(Vec<Output>),
    Encoded {
        bytes: Bytes,
        inputs: Vec<Output>,
    },
    Late(Late),
}

/// A source that becomes known after everything that uses it: what is needed of a build context is the sum of all uses.
#[derive(Clone, Debug, Default)]
pub struct Late(Arc<OnceLock<Option<Output>>>);

impl Late {
    /// Decides what it is; later calls change nothing.
    pub fn set(&self, state: &State) {
        let _ = self.0.set(state.output.clone());
    }

    /// A state on top of it. It must be decided before the state is written out; until then it counts as empty.
    pub fn state(&self) -> State {
        let node = Node {
            kind: Kind::Late(self.clone()),
            about: Constraints::default(),
        };
        State {
            output: Some(Output {
                node: Arc::new(node),
                index: 0,
            }),
            around: Arc::default(),
        }
    }
}

impl State {
    /// The empty file system.
    pub fn scratch() -> Self {
        Self::default()
    }

    /// A source. An image's platform becomes the platform of the state.
    pub fn source(op: SourceOp, mut about: Constraints) -> Self {
        crate::source_caps::add(&op, &mut about.caps);
        let platform = about.platform.as_ref().map(Platform::normalized);
        let node = Node {
            kind: Kind::Source(op),
            about,
        };
        let around = Surroundings {
            platform,
            ..Surroundings::default()
        };
        Self {
            output: Some(Output {
                node: Arc::new(node),
                index: 0,
            }),
            around: Arc::new(around),
        }
    }

    /// The result of a definition, operations and metadata as they are.
    pub fn from_definition(definition: &Definition) -> Result<Self, LlbError> {
        let files: Vec<Arc<SourceInfo>> = definition.source_map.infos.iter().cloned().map(Arc::new).collect();
        let mut nodes = HashMap::new();
        let mut root = None;
        for (position, bytes) in definition.ops.iter().enumerate() {
            let decoded = wire::decode_op(bytes)?;
            let digest = vertex_digest(bytes);
            let mut inputs = Vec::with_capacity(decoded.inputs.len());
            for input in &decoded.inputs {
                let node: &Arc<Node> = nodes.get(&input.vertex).ok_or_else(|| LlbError::MissingInput {
                    vertex: input.vertex.to_string(),
                })?;
                inputs.push(Output {
                    node: node.clone(),
                    index: input.output,
                });
            }
            if decoded.op.is_none() || position + 1 == definition.ops.len() {
                root = inputs.into_iter().next();
                continue;
            }
            let metadata = definition.metadata.get(&digest).cloned().unwrap_or_default();
            let locations = definition.source_map.locations.get(&digest).into_iter().flatten();
            let locations = locations
                .filter_map(|l| {
                    let file = files.get(usize::try_from(l.source_index).ok()?)?;
                    Some(Location {
                        file: file.clone(),
                        ranges: l.ranges.clone(),
                    })
                })
                .collect();
            let about = Constraints {
                platform: None,
                description: metadata.description,
                ignore_cache: metadata.ignore_cache,
                caps: metadata
                    .caps
                    .into_iter()
                    .filter(|(_, on)| *on)
                    .map(|(id, _)| id)
                    .collect(),
                progress_group: metadata.progress_group,
                linux_resources: metadata.linux_resources,
                locations,
            };
            let node = Node {
                kind: Kind::Encoded {
                    bytes: bytes.clone(),
                    inputs,
                },
                about,
            };
            nodes.insert(digest, Arc::new(node));
        }
        Ok(Self {
            output: root,
            around: Arc::default(),
        })
    }

    /// Whether the file system is empty for sure.
    pub fn is_scratch(&self) -> bool {
        self.output.is_none()
    }

    /// The operation behind a state that is nothing but a source.
    pub fn as_source(&self) -> Option<&SourceOp> {
        let mut output = self.output.as_ref()?;
        loop {
            match &output.node.kind {
                Kind::Source(op) => return Some(op),
                Kind::Late(late) => output = late.0.get()?.as_ref()?,
                _ => return None,
            }
        }
    }

    /// The surroundings of the next process.
    pub fn around(&self) -> &Surroundings {
        &self.around
    }

    /// Changes the surroundings of the next process.
    pub fn around_mut(&mut self) -> &mut Surroundings {
        Arc::make_mut(&mut self.around)
    }

    /// Sets the working directory; a relative one is below the present one.
    pub fn set_dir(&mut self, dir: &str) {
        let around = self.around_mut();
        around.dir = if dir.starts_with('/') {
            dir.to_owned()
        } else {
            clean(&format!("/{}/{dir}", around.dir))
        };
    }

    /// Runs a process; the result is what it left of its root.
    #[must_use]
    pub fn run(&self, mut spec: ExecSpec, mut about: Constraints) -> Self {
        spec.mounts.sort_by(|a, b| a.target.cmp(&b.target));
        for (i, ssh) in spec.ssh.iter_mut().enumerate() {
            if ssh.target.is_empty() {
                ssh.target = format!("/run/buildkit/ssh_agent.{i}");
            }
        }
        let process = Process {
            spec,
            root: self.output.clone(),
            around: self.around.clone(),
        };
        exec_caps(&process, &mut about);
        // The root is first whatever else is mounted, so its result is output 0.
        let node = Node {
            kind: Kind::Exec(Box::new(process)),
            about,
        };
        self.with_output(Some(Output {
            node: Arc::new(node),
            index: 0,
        }))
    }

    /// Changes files. Relative paths are below the working directory.
    #[must_use]
    pub fn file(&self, steps: Vec<FileStep>, mut about: Constraints) -> Self {
        about.need("file.base");
        let kind = Kind::File {
            base: self.output.clone(),
            dir: self.around.dir.clone(),
            steps,
        };
        self.with_output(Some(Output {
            node: Arc::new(Node { kind, about }),
            index: 0,
        }))
    }

    /// Lays `upper` over this file system; an empty one of the two vanishes.
    #[must_use]
    pub fn merge(&self, upper: &State, mut about: Constraints) -> Self {
        let inputs: Vec<Output> = [&self.output, &upper.output].into_iter().flatten().cloned().collect();
        let output = match inputs.as_slice() {
            [] => None,
            [only] => Some(only.clone()),
            _ => {
                about.need("mergeop");
                Some(Output {
                    node: Arc::new(Node {
                        kind: Kind::Merge(inputs),
                        about,
                    }),
                    index: 0,
                })
            }
        };
        self.with_output(output)
    }

    fn with_output(&self, output: Option<Output>) -> Self {
        Self {
            output,
            around: self.around.clone(),
        }
    }

    /// This file system without its surroundings.
    #[must_use]
    pub fn bare(&self) -> Self {
        Self {
            output: self.output.clone(),
            around: Arc::default(),
        }
    }

    /// Writes the file system out. `platform` is that of processes on file systems without one.
    pub fn marshal(&self, platform: Option<&Platform>) -> Result<Definition, LlbError> {
        let Some(root) = self.output.as_ref().and_then(settle) else {
            return Ok(Definition::default());
        };
        write::definition(root, platform)
    }
}

/// A deep graph would otherwise be dropped node by node on the stack.
impl Drop for Node {
    fn drop(&mut self) {
        let mut pending = Vec::new();
        take_outputs(&mut self.kind, &mut pending);
        while let Some(output) = pending.pop() {
            if let Some(mut node) = Arc::into_inner(output.node) {
                take_outputs(&mut node.kind, &mut pending);
            }
        }
    }
}

fn take_outputs(kind: &mut Kind, into: &mut Vec<Output>) {
    match kind {
        Kind::Source(_) => {}
        Kind::Exec(process) => {
            into.extend(process.root.take());
            into.extend(process.spec.mounts.iter_mut().filter_map(|m| m.source.output.take()));
        }
        Kind::File { base, steps, .. } => {
            into.extend(base.take());
            for step in steps {
                if let FileStep::Copy { from, .. } = step {
                    into.extend(from.output.take());
                }
            }
        }
        Kind::Merge(list) => into.append(list),
        Kind::Encoded { inputs, .. } => into.append(inputs),
        Kind::Late(late) => {
            if let Some(cell) = Arc::get_mut(&mut late.0) {
                into.extend(cell.take().flatten());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::Graph;

    fn image(name: &str) -> State {
        let op = SourceOp {
            identifier: format!("docker-image://{name}"),
            attrs: BTreeMap::new(),
        };
        let platform = Platform::new("linux", "amd64", "");
        let mut state = State::source(op, Constraints::named(name).on(Some(platform)));
        state.around_mut().env.set("PATH", "/bin");
        state.set_dir("/");
        state
    }

    fn run(state: &State, command: &str) -> State {
        let spec = ExecSpec {
            args: vec![command.to_owned()],
            sets_default_path: true,
            ..ExecSpec::default()
        };
        state.run(spec, Constraints::named(command))
    }

    #[test]
    fn a_definition_loads_again() {
        let base = image("base");
        let late = Late::default();
        let copy = CopyAction {
            src: "a".into(),
            dest: "b/".into(),
            mode: -1,
            timestamp: -1,
            ..CopyAction::default()
        };
        let step = FileStep::Copy {
            from: late.state(),
            copy: Box::new(copy),
            owner: Some(Owner::parse("me:5")),
        };
        let state = run(&base, "x").file(vec![step], Constraints::default());
        let state = run(&state, "y");
        late.set(&image("ctx"));
        let definition = state.marshal(None).unwrap();
        assert_eq!(definition.ops.len(), 6);
        let graph = Graph::load(&definition).unwrap();
        assert_eq!(graph.len(), 5);
        let file = graph.vertices().find_map(|v| match &v.op {
            Op::File(f) => f.actions.first().cloned(),
            _ => None,
        });
        let file = file.unwrap();
        assert_eq!(
            (file.input, file.secondary_input, file.output),
            (Some(0), Some(1), Some(0))
        );
        let FileActionKind::Copy(copy) = file.kind else {
            panic!("not a copy")
        };
        assert_eq!((copy.src.as_str(), copy.dest.as_str()), ("/a", "/b/"));
        let by_name = UserOpt::ByName {
            name: "me".into(),
            input: Some(0),
        };
        assert_eq!(
            copy.owner,
            Some(ChownOpt {
                user: Some(by_name),
                group: Some(UserOpt::ById(5))
            })
        );
        let again = State::from_definition(&definition).unwrap().marshal(None).unwrap();
        assert_eq!(again, definition);
    }

    #[test]
    fn equal_operations_are_one_vertex() {
        let base = image("base");
        let (a, b) = (run(&base, "x"), run(&image("base"), "x"));
        let definition = a.merge(&b, Constraints::default()).marshal(None).unwrap();
        // image, exec, merge, terminal
        assert_eq!(definition.ops.len(), 4);
        assert!(
            State::scratch()
                .merge(&State::scratch(), Constraints::default())
                .is_scratch()
        );
        assert!(State::scratch().marshal(None).unwrap().is_empty());
    }

    #[test]
    fn deep_chains_neither_overflow_nor_crawl() {
        let mut state = image("base");
        for _ in 0..20_000 {
            state = run(&state, "x");
        }
        assert_eq!(state.marshal(None).unwrap().ops.len(), 20_002);
    }

    #[test]
    fn what_cannot_run_is_refused() {
        let error = image("base")
            .run(ExecSpec::default(), Constraints::default())
            .marshal(None)
            .unwrap_err();
        assert_eq!(error.to_string(), "arguments are required");
    }

    #[test]
    fn owners() {
        let id = |n| Some(OwnerId::Id(n));
        for (text, user, group) in [
            ("root", id(0), None),
            ("5:6", id(5), id(6)),
            (":5", id(0), id(5)),
            ("a:root", Some(OwnerId::Name("a".into())), id(0)),
            ("-1", id(u32::MAX), None),
        ] {
            assert_eq!(Owner::parse(text), Owner { user, group }, "{text}");
        }
    }
}
