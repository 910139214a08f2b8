//! The builder frontends use: file systems as values, made of one another, and written out as a [`Definition`].
//!
//! A [`State`] is a file system plus the surroundings in which the next process would run. States are immutable and cheap to
//! clone; making one does no work. [`State::marshal`] walks what a state is made of, encodes every operation once and puts the
//! parts in the order in which the field's own client library writes them, so that equal builds have equal definitions.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use kiln_oci::Platform;

use crate::definition::{Definition, LinuxResources, OpMetadata, ProgressGroup};
use crate::env_list::EnvList;
use crate::error::LlbError;
use crate::graph::{Edge, vertex_digest};
use crate::op::*;
use crate::source_map::{SourceInfo, SourceLocation, SourceMap, SourceRange};
use crate::wire;

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

/// What is said about a node beside its operation.
#[derive(Clone, Debug, Default)]
pub struct Constraints {
    /// Platform, where the operation has one.
    pub platform: Option<Platform>,
    /// Texts by name; see [`Constraints::named`].
    pub description: BTreeMap<String, String>,
    /// Do not look the result up.
    pub ignore_cache: bool,
    /// Capabilities the operation needs.
    pub caps: BTreeSet<String>,
    /// Shown as one with others.
    pub progress_group: Option<ProgressGroup>,
    /// Limits of the process.
    pub linux_resources: Option<LinuxResources>,
    /// Places in the user's text.
    pub locations: Vec<Location>,
}

/// A place in a text.
#[derive(Clone, Debug)]
pub struct Location {
    /// The text.
    pub file: Arc<SourceInfo>,
    /// The ranges.
    pub ranges: Vec<SourceRange>,
}

impl Constraints {
    /// Constraints with the name that is shown to the user.
    pub fn named(name: impl Into<String>) -> Self {
        Self::default().described("llb.customname", name)
    }

    /// The same with one more text.
    #[must_use]
    pub fn described(mut self, key: &str, text: impl Into<String>) -> Self {
        self.description.insert(key.to_owned(), text.into());
        self
    }

    /// The same for a platform.
    #[must_use]
    pub fn on(mut self, platform: Option<Platform>) -> Self {
        self.platform = platform;
        self
    }

    fn need(&mut self, cap: &str) {
        if !self.caps.contains(cap) {
            self.caps.insert(cap.to_owned());
        }
    }
}

/// A process to run.
#[derive(Clone, Debug, Default)]
pub struct ExecSpec {
    /// Arguments; may not be empty when written out.
    pub args: Vec<String>,
    /// Proxy settings.
    pub proxy_env: Option<ProxyEnv>,
    /// Additional host names.
    pub extra_hosts: Vec<HostIp>,
    /// Resource limits.
    pub ulimits: Vec<Ulimit>,
    /// Parent of the cgroup.
    pub cgroup_parent: String,
    /// Network, if it differs from the surroundings.
    pub network: Option<NetMode>,
    /// Confinement.
    pub security: SecurityMode,
    /// Mounts beside the root.
    pub mounts: Vec<MountSpec>,
    /// Secrets.
    pub secrets: Vec<SecretSpec>,
    /// Agent sockets.
    pub ssh: Vec<SshSpec>,
    /// Devices.
    pub cdi_devices: Vec<CdiDevice>,
    /// Whether the daemon adds a missing `PATH` itself (capability `exec.meta.setsdefaultpath`).
    pub sets_default_path: bool,
}

/// A process with what it runs in.
#[derive(Debug)]
struct Process {
    spec: ExecSpec,
    root: Option<Output>,
    around: Arc<Surroundings>,
}

/// A mount of a process.
#[derive(Clone, Debug, Default)]
pub struct MountSpec {
    /// Where.
    pub target: String,
    /// What; the empty state for nothing.
    pub source: State,
    /// Path in the source; empty is its root.
    pub selector: String,
    /// Not writable.
    pub readonly: bool,
    /// Writable, but what is written is thrown away.
    pub no_output: bool,
    /// A cache directory.
    pub cache: Option<CacheMountOpt>,
    /// A directory in memory of at most so many bytes; 0 is no limit.
    pub tmpfs: Option<i64>,
}

impl MountSpec {
    fn has_output(&self) -> bool {
        !self.no_output && !self.readonly && self.cache.is_none() && self.tmpfs.is_none()
    }
}

/// A secret for a process.
#[derive(Clone, Debug, Default)]
pub struct SecretSpec {
    /// File to write it to, with owner and mode.
    pub target: Option<SecretMountTarget>,
    /// Its id.
    pub id: String,
    /// Variable to hand it over in.
    pub env: Option<String>,
    /// Whether it may be missing.
    pub optional: bool,
}

/// Where and how a secret appears as a file.
#[derive(Clone, Debug, Default)]
pub struct SecretMountTarget {
    /// Path.
    pub path: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

/// An agent socket for a process.
#[derive(Clone, Debug, Default)]
pub struct SshSpec {
    /// Path; empty is `/run/buildkit/ssh_agent.<n>`.
    pub target: String,
    /// Id and owner.
    pub opt: SshMountOpt,
}

/// One change of a file operation.
#[derive(Clone, Debug)]
pub enum FileStep {
    /// Makes a directory.
    MkDir {
        /// Path.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Make parents too.
        make_parents: bool,
        /// Owner.
        owner: Option<Owner>,
        /// mtime in nanoseconds, `-1` for now.
        timestamp: i64,
    },
    /// Writes a file.
    MkFile {
        /// Path.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Content.
        data: Bytes,
        /// Owner.
        owner: Option<Owner>,
        /// mtime in nanoseconds, `-1` for now.
        timestamp: i64,
    },
    /// Copies.
    Copy {
        /// Where from; the empty state for nothing.
        from: State,
        /// What and how; paths as given, `owner` is taken from the other field.
        copy: Box<CopyAction>,
        /// Owner.
        owner: Option<Owner>,
    },
}

/// An owner by name or number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub user: Option<OwnerId>,
    /// Group.
    pub group: Option<OwnerId>,
}

/// One half of an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnerId {
    /// Looked up in the file system the change is made to.
    Name(String),
    /// The number itself.
    Id(u32),
}

impl Owner {
    /// From `user[:group]`: `root` is 0, decimal numbers are ids, an empty part is 0, anything else is a name.
    pub fn parse(text: &str) -> Self {
        let half = |text: &str| match text {
            "" | "root" => OwnerId::Id(0),
            // Negative numbers wrap, as the wire has no sign here.
            text => text
                .parse::<i32>()
                .map_or_else(|_| OwnerId::Name(text.to_owned()), |n| OwnerId::Id(n as u32)),
        };
        let mut parts = text.splitn(2, ':');
        Self {
            user: parts.next().map(half),
            group: parts.next().map(half),
        }
    }

    /// From numbers.
    pub fn ids(uid: u32, gid: u32) -> Self {
        Self {
            user: Some(OwnerId::Id(uid)),
            group: Some(OwnerId::Id(gid)),
        }
    }

    fn resolve(&self, base: Option<InputIndex>) -> ChownOpt {
        let half = |half: &Option<OwnerId>| {
            half.as_ref().map(|half| match half {
                OwnerId::Name(name) => UserOpt::ByName {
                    name: name.clone(),
                    input: base,
                },
                OwnerId::Id(id) => UserOpt::ById(*id),
            })
        };
        ChownOpt {
            user: half(&self.user),
            group: half(&self.group),
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
        let host = Platform::host();
        let mut writer = Writer {
            platform: platform.unwrap_or(&host),
            edges: HashMap::new(),
            written: BTreeSet::new(),
            out: Definition::default(),
            files: Vec::new(),
        };
        writer.write_all(root)?;
        let edge = writer.edge(root)?;
        let terminal = wire::encode_terminal(&edge);
        let mut caps: BTreeMap<String, bool> = ["constraints", "platform"].map(|id| (id.to_owned(), true)).into();
        for metadata in writer.out.metadata.values() {
            if metadata.ignore_cache {
                caps.insert("meta.ignorecache".to_owned(), true);
            }
            if !metadata.description.is_empty() {
                caps.insert("meta.description".to_owned(), true);
            }
            if metadata.export_cache.is_some() {
                caps.insert("meta.exportcache".to_owned(), true);
            }
        }
        let digest = vertex_digest(&terminal);
        writer.out.metadata.insert(
            digest,
            OpMetadata {
                caps,
                ..OpMetadata::default()
            },
        );
        writer.out.ops.push(terminal);
        writer.out.source_map.infos = writer.files.iter().map(|f| (**f).clone()).collect();
        Ok(writer.out)
    }
}

/// Follows late-bound outputs to what they are.
fn settle(output: &Output) -> Option<&Output> {
    let mut output = output;
    loop {
        match &output.node.kind {
            Kind::Late(late) => output = late.0.get()?.as_ref()?,
            _ => return Some(output),
        }
    }
}

fn exec_caps(process: &Process, about: &mut Constraints) {
    let spec = &process.spec;
    about.need("exec.meta.base");
    if spec.sets_default_path {
        about.need("exec.meta.setsdefaultpath");
    }
    let when = [
        (!spec.ulimits.is_empty(), "exec.meta.ulimit"),
        (about.linux_resources.is_some(), "exec.meta.linux.resources"),
        (
            spec.network.unwrap_or(process.around.network) != NetMode::Unset,
            "exec.meta.network",
        ),
        (spec.security == SecurityMode::Insecure, "exec.meta.security"),
        (spec.proxy_env.is_some(), "exec.meta.proxyenv"),
        (process.root.is_some(), "exec.mount.bind"),
        (!spec.secrets.is_empty(), "exec.mount.secret"),
        (spec.secrets.iter().any(|s| s.env.is_some()), "exec.secretenv"),
        (!spec.ssh.is_empty(), "exec.mount.ssh"),
        (!spec.cdi_devices.is_empty(), "exec.meta.cdi"),
    ];
    for (_, cap) in when.iter().filter(|(yes, _)| *yes) {
        about.need(cap);
    }
    for mount in &spec.mounts {
        if !mount.selector.is_empty() {
            about.need("exec.mount.selector");
        }
        if mount.cache.is_some() {
            about.need("exec.mount.cache");
            about.need("exec.mount.cache.sharing");
        } else if let Some(size) = mount.tmpfs {
            about.need("exec.mount.tmpfs");
            if size > 0 {
                about.need("exec.mount.tmpfs.size");
            }
        } else if !mount.source.is_scratch() {
            about.need("exec.mount.bind");
        }
    }
}

type NodeId = *const Node;

struct Writer<'a> {
    platform: &'a Platform,
    edges: HashMap<NodeId, crate::VertexDigest>,
    written: BTreeSet<crate::VertexDigest>,
    out: Definition,
    files: Vec<Arc<SourceInfo>>,
}

/// Inputs of one operation while it is encoded; equal edges are one input.
#[derive(Default)]
struct Inputs {
    edges: Vec<Edge>,
    positions: HashMap<Edge, InputIndex>,
}

impl Inputs {
    fn add(&mut self, edge: Edge) -> InputIndex {
        let next = u32::try_from(self.edges.len()).unwrap_or(u32::MAX);
        *self.positions.entry(edge).or_insert_with(|| {
            self.edges.push(edge);
            next
        })
    }
}

impl Writer<'_> {
    /// Writes everything `root` is made of, parents first, without recursion.
    fn write_all(&mut self, root: &Output) -> Result<(), LlbError> {
        let mut stack = vec![(root.node.clone(), false)];
        while let Some((node, expanded)) = stack.pop() {
            if self.edges.contains_key(&Arc::as_ptr(&node)) {
                continue;
            }
            if expanded {
                self.write(&node)?;
                continue;
            }
            let parents = parents(&node);
            stack.push((node, true));
            stack.extend(parents.into_iter().rev().map(|parent| (parent, false)));
        }
        Ok(())
    }

    fn edge(&self, output: &Output) -> Result<Edge, LlbError> {
        let vertex = self
            .edges
            .get(&Arc::as_ptr(&output.node))
            .ok_or_else(|| LlbError::MissingInput {
                vertex: "of a file system that contains itself".to_owned(),
            })?;
        Ok(Edge {
            vertex: *vertex,
            output: output.index,
        })
    }

    fn input(&self, output: Option<&Output>, inputs: &mut Inputs) -> Result<Option<InputIndex>, LlbError> {
        match output.and_then(settle) {
            Some(output) => Ok(Some(inputs.add(self.edge(output)?))),
            None => Ok(None),
        }
    }

    fn write(&mut self, node: &Arc<Node>) -> Result<(), LlbError> {
        let bytes = match &node.kind {
            Kind::Encoded { bytes, .. } => bytes.clone(),
            kind => {
                let mut inputs = Inputs::default();
                let (op, platform) = self.operation(kind, &node.about, &mut inputs)?;
                wire::encode_op(&op, &inputs.edges, platform.as_ref(), &[])
            }
        };
        let digest = vertex_digest(&bytes);
        self.edges.insert(Arc::as_ptr(node), digest);
        self.describe(digest, &node.about);
        if self.written.insert(digest) {
            self.out.ops.push(bytes);
        }
        Ok(())
    }

    /// Adds what is said about a vertex. Equal operations are one vertex: the last name wins, flags and places add up.
    fn describe(&mut self, digest: crate::VertexDigest, about: &Constraints) {
        let metadata = self.out.metadata.entry(digest).or_default();
        metadata.ignore_cache |= about.ignore_cache;
        metadata.description.extend(about.description.clone());
        metadata.caps.extend(about.caps.iter().map(|id| (id.clone(), true)));
        if about.progress_group.is_some() {
            metadata.progress_group.clone_from(&about.progress_group);
        }
        if about.linux_resources.is_some() {
            metadata.linux_resources.clone_from(&about.linux_resources);
        }
        let SourceMap { locations, .. } = &mut self.out.source_map;
        let list = locations.entry(digest).or_default();
        for location in &about.locations {
            let same = |f: &Arc<SourceInfo>| Arc::ptr_eq(f, &location.file) || **f == *location.file;
            let index = self.files.iter().position(same).unwrap_or_else(|| {
                self.files.push(location.file.clone());
                self.files.len() - 1
            });
            let source_index = i32::try_from(index).unwrap_or(i32::MAX);
            list.push(SourceLocation {
                source_index,
                ranges: location.ranges.clone(),
            });
        }
    }

    fn operation(
        &self,
        kind: &Kind,
        about: &Constraints,
        inputs: &mut Inputs,
    ) -> Result<(Op, Option<Platform>), LlbError> {
        Ok(match kind {
            Kind::Source(op) => {
                let images = ["docker-image://", "oci-layout://"];
                let platform = images
                    .iter()
                    .any(|scheme| op.identifier.starts_with(scheme))
                    .then(|| about.platform.clone().unwrap_or_else(|| self.platform.clone()));
                (Op::Source(op.clone()), platform)
            }
            Kind::Exec(process) => {
                let platform = about
                    .platform
                    .as_ref()
                    .or(process.around.platform.as_ref())
                    .unwrap_or(self.platform);
                (Op::Exec(self.exec(process, platform, inputs)?), Some(platform.clone()))
            }
            Kind::File { base, dir, steps } => (Op::File(self.file(base.as_ref(), dir, steps, inputs)?), None),
            Kind::Merge(layers) => {
                // Merge inputs are not deduplicated: their order is their meaning.
                let mut list = Vec::with_capacity(layers.len());
                for layer in layers {
                    match settle(layer) {
                        Some(layer) => {
                            list.push(u32::try_from(inputs.edges.len()).ok());
                            inputs.edges.push(self.edge(layer)?);
                        }
                        None => list.push(None),
                    }
                }
                (Op::Merge(MergeOp { inputs: list }), None)
            }
            Kind::Encoded { .. } | Kind::Late(_) => {
                return Err(LlbError::invalid("late", "an undecided source cannot be written"));
            }
        })
    }

    fn exec(&self, process: &Process, platform: &Platform, inputs: &mut Inputs) -> Result<ExecOp, LlbError> {
        let Process { spec, root, around } = process;
        if spec.args.is_empty() {
            return Err(LlbError::Empty("arguments are required"));
        }
        let mut env = around.env.to_vec();
        if let Some(first) = spec.ssh.first()
            && around.env.get("SSH_AUTH_SOCK").is_none()
        {
            env.push(format!("SSH_AUTH_SOCK={}", first.target));
        }
        if !spec.sets_default_path && platform.os != "windows" && around.env.get("PATH").is_none() {
            env.push(format!("PATH={}", kiln_oci::image_config::DEFAULT_PATH));
        }
        let root_mount = MountSpec {
            target: "/".to_owned(),
            source: State {
                output: root.clone(),
                around: Arc::default(),
            },
            ..MountSpec::default()
        };
        let mut mounts = Vec::with_capacity(spec.mounts.len() + 1);
        let mut outputs = 0;
        for mount in std::iter::once(&root_mount).chain(&spec.mounts) {
            let output = mount.has_output().then_some(outputs);
            outputs += u32::from(output.is_some());
            mounts.push(ExecMount {
                input: self.input(mount.source.output.as_ref(), inputs)?,
                selector: mount.selector.clone(),
                dest: mount.target.clone(),
                output,
                readonly: mount.readonly,
                mount_type: match (&mount.cache, mount.tmpfs) {
                    (_, Some(_)) => MountType::Tmpfs,
                    (Some(_), None) => MountType::Cache,
                    (None, None) => MountType::Bind,
                },
                tmpfs: mount.tmpfs.map(|size| TmpfsOpt { size }),
                cache: mount.cache.clone(),
                ..ExecMount::default()
            });
        }
        let mut secret_env = Vec::new();
        for secret in &spec.secrets {
            if let Some(name) = &secret.env {
                secret_env.push(SecretEnv {
                    id: secret.id.clone(),
                    name: name.clone(),
                    optional: secret.optional,
                });
            }
            if let Some(target) = &secret.target {
                // Output 0 says nothing here; it is what clients have always sent for secrets and agent sockets.
                mounts.push(ExecMount {
                    dest: target.path.clone(),
                    output: Some(0),
                    mount_type: MountType::Secret,
                    secret: Some(SecretMountOpt {
                        id: secret.id.clone(),
                        uid: target.uid,
                        gid: target.gid,
                        mode: target.mode,
                        optional: secret.optional,
                    }),
                    ..ExecMount::default()
                });
            }
        }
        for ssh in &spec.ssh {
            mounts.push(ExecMount {
                dest: ssh.target.clone(),
                output: Some(0),
                mount_type: MountType::Ssh,
                ssh: Some(ssh.opt.clone()),
                ..ExecMount::default()
            });
        }
        Ok(ExecOp {
            meta: ExecMeta {
                args: spec.args.clone(),
                env,
                cwd: if around.dir.is_empty() { "/".to_owned() } else { around.dir.clone() },
                user: around.user.clone(),
                proxy_env: spec.proxy_env.clone(),
                extra_hosts: spec.extra_hosts.clone(),
                hostname: around.hostname.clone(),
                ulimit: spec.ulimits.clone(),
                cgroup_parent: spec.cgroup_parent.clone(),
                remove_mount_stubs_recursive: true,
                valid_exit_codes: Vec::new(),
            },
            mounts,
            network: spec.network.unwrap_or(around.network),
            security: spec.security,
            secret_env,
            cdi_devices: spec.cdi_devices.clone(),
        })
    }

    fn file(
        &self,
        base: Option<&Output>,
        dir: &str,
        steps: &[FileStep],
        inputs: &mut Inputs,
    ) -> Result<FileOp, LlbError> {
        let base = self.input(base, inputs)?;
        // Indexes of intermediate results start behind the inputs, so all inputs are collected first.
        let mut sources = Vec::with_capacity(steps.len());
        for step in steps {
            sources.push(match step {
                FileStep::Copy { from, .. } => self.input(from.output.as_ref(), inputs)?,
                _ => None,
            });
        }
        let results = u32::try_from(inputs.edges.len()).unwrap_or(u32::MAX);
        let mut actions = Vec::with_capacity(steps.len());
        for (i, (step, source)) in steps.iter().zip(sources).enumerate() {
            let position = u32::try_from(i).unwrap_or(u32::MAX);
            let owner = |owner: &Option<Owner>| owner.as_ref().map(|o| o.resolve(base));
            let kind = match step {
                FileStep::MkDir {
                    path,
                    mode,
                    make_parents,
                    owner: who,
                    timestamp,
                } => FileActionKind::MkDir(MkDirAction {
                    path: absolute(dir, path),
                    mode: (mode & 0o777) as i32,
                    make_parents: *make_parents,
                    owner: owner(who),
                    timestamp: *timestamp,
                }),
                FileStep::MkFile {
                    path,
                    mode,
                    data,
                    owner: who,
                    timestamp,
                } => FileActionKind::MkFile(MkFileAction {
                    path: absolute(dir, path),
                    mode: (mode & 0o777) as i32,
                    data: data.clone(),
                    owner: owner(who),
                    timestamp: *timestamp,
                }),
                FileStep::Copy { from, copy, owner: who } => FileActionKind::Copy(CopyAction {
                    src: absolute(&from.around.dir, &copy.src),
                    dest: with_slash(&copy.dest, absolute(dir, &copy.dest)),
                    owner: owner(who),
                    ..(**copy).clone()
                }),
            };
            actions.push(FileAction {
                input: if i == 0 { base } else { Some(results + position - 1) },
                secondary_input: source,
                output: (i + 1 == steps.len()).then_some(0),
                kind,
            });
        }
        Ok(FileOp { actions })
    }
}

/// Direct parents in the order in which they are written.
fn parents(node: &Node) -> Vec<Arc<Node>> {
    let mut list: Vec<Arc<Node>> = Vec::new();
    let mut add = |output: Option<&Output>| {
        if let Some(output) = output.and_then(settle)
            && !list.iter().any(|n| Arc::ptr_eq(n, &output.node))
        {
            list.push(output.node.clone());
        }
    };
    match &node.kind {
        Kind::Source(_) | Kind::Late(_) => {}
        Kind::Exec(process) => {
            add(process.root.as_ref());
            process.spec.mounts.iter().for_each(|m| add(m.source.output.as_ref()));
        }
        Kind::File { base, steps, .. } => {
            add(base.as_ref());
            for step in steps.iter().rev() {
                if let FileStep::Copy { from, .. } = step {
                    add(from.output.as_ref());
                }
            }
        }
        Kind::Merge(layers) => layers.iter().for_each(|l| add(Some(l))),
        Kind::Encoded { inputs, .. } => inputs.iter().for_each(|i| add(Some(i))),
    }
    list
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

/// `path` cleaned and below `dir` if it is relative.
fn absolute(dir: &str, path: &str) -> String {
    if path.starts_with('/') {
        clean(path)
    } else {
        clean(&format!("/{dir}/{path}"))
    }
}

/// A trailing `/` or `/.` of a destination means something and survives cleaning.
fn with_slash(written: &str, mut clean: String) -> String {
    if written.ends_with('/') && !clean.ends_with('/') {
        clean.push('/');
    } else if written.ends_with("/.") {
        if clean != "/" {
            clean.push('/');
        }
        clean.push('.');
    }
    clean
}

/// The shortest absolute path with the same meaning, by text alone.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
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
        for _ in 0..50_000 {
            state = run(&state, "x");
        }
        assert_eq!(state.marshal(None).unwrap().ops.len(), 50_002);
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
