//! Writing a state out: parents first, every operation once, equal operations as one vertex.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use kiln_oci::Platform;

use super::spec::{Constraints, FileStep, MountSpec, Owner, Process};
use super::{Kind, Node, Output, State};
use crate::definition::{Definition, OpMetadata};
use crate::error::LlbError;
use crate::graph::{Edge, vertex_digest};
use crate::op::*;
use crate::source_map::{SourceInfo, SourceLocation, SourceMap};
use crate::wire;

/// The definition whose result is `root`.
pub(super) fn definition(root: &Output, platform: Option<&Platform>) -> Result<Definition, LlbError> {
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

/// Follows late-bound outputs to what they are.
pub(super) fn settle(output: &Output) -> Option<&Output> {
    let mut output = output;
    loop {
        match &output.node.kind {
            Kind::Late(late) => output = late.0.get()?.as_ref()?,
            _ => return Some(output),
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
                cwd: if around.dir.is_empty() {
                    "/".to_owned()
                } else {
                    around.dir.clone()
                },
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
pub(super) fn clean(path: &str) -> String {
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
