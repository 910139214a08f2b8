//! Mounts of a RUN instruction.

use kiln_llb::State;
use kiln_llb::op::{CacheMountOpt, CacheSharing, SshMountOpt};
use kiln_llb::state::{Constraints, ExecSpec, FileStep, MountSpec, Owner, SecretMountTarget, SecretSpec, SshSpec};

use super::dispatch::Step;
use super::outline::Requirement;
use super::{Bridge, Conversion};
use crate::dockerfile::mount::{Mount, MountKind};
use crate::error::DockerfileError;
use crate::gotext::{base_name, clean_path, join_path, quote};

impl<B: Bridge> Conversion<'_, B> {
    /// Adds the mounts of an instruction. Bind, cache and tmpfs mounts are sorted by target when written out; secrets and
    /// agents keep their order.
    pub(super) fn add_mounts(
        &mut self,
        step: &Step<'_>,
        mounts: &[Mount],
        spec: &mut ExecSpec,
    ) -> Result<(), DockerfileError> {
        for (mount, &source) in mounts.iter().zip(step.sources) {
            let from_stage = !mount.from.is_empty() || mount.kind == MountKind::Cache;
            if from_stage && !self.table.stages[source].dispatched {
                return Err(DockerfileError::new(format!(
                    "cannot mount from stage {} to {}, stage needs to be defined before current command",
                    quote(&mount.from),
                    quote(&mount.target)
                )));
            }
            match mount.kind {
                MountKind::Secret => spec.secrets.push(self.secret(step, mount)?),
                MountKind::Ssh => spec.ssh.push(self.ssh(step, mount)?),
                MountKind::Bind | MountKind::Cache | MountKind::Tmpfs => {
                    let files = match (mount.kind, from_stage) {
                        (MountKind::Tmpfs, _) => State::scratch(),
                        (_, true) => self.table.stages[source].state.bare(),
                        (_, false) => self.context.state(),
                    };
                    spec.mounts.push(self.mount(step, mount, files)?);
                    if from_stage {
                        self.table.use_path(source, &mount.source);
                    } else {
                        let path = join_path("/", &mount.source);
                        self.table.stages[step.stage].context_paths.insert(path);
                    }
                }
            }
        }
        Ok(())
    }

    fn mount(&self, step: &Step<'_>, mount: &Mount, files: State) -> Result<MountSpec, DockerfileError> {
        let dir = &self.table.stages[step.stage].state.around().dir;
        let target = if mount.target.starts_with('/') {
            mount.target.clone()
        } else {
            join_path("/", &format!("{dir}/{}", mount.target))
        };
        if target == "/" {
            return Err(DockerfileError::new(format!("invalid mount target {}", quote(&target))));
        }
        let mut out = MountSpec {
            target,
            source: files,
            readonly: mount.readonly,
            ..MountSpec::default()
        };
        out.no_output =
            !mount.readonly && mount.kind == MountKind::Bind && self.client.has("exec.mount.bind.readwrite-nooutput");
        if mount.kind == MountKind::Tmpfs {
            out.tmpfs = Some(mount.size);
        }
        if mount.kind == MountKind::Cache {
            let sharing = match mount.sharing.as_str() {
                "private" => CacheSharing::Private,
                "locked" => CacheSharing::Locked,
                _ => CacheSharing::Shared,
            };
            let id = if mount.id.is_empty() {
                clean_path(&mount.target)
            } else {
                mount.id.clone()
            };
            let id = format!("{}/{id}", self.client.options.cache_mount_namespace);
            out.cache = Some(CacheMountOpt { id, sharing });
        }
        let selected = join_path("/", &mount.source);
        if selected != "/" {
            out.selector = selected;
        } else if mount.uid.is_some() || mount.gid.is_some() || mount.mode.is_some() {
            out.source = owned_directory(&out.source, mount);
            out.selector = "/cache".to_owned();
        }
        Ok(out)
    }

    fn secret(&mut self, step: &Step<'_>, mount: &Mount) -> Result<SecretSpec, DockerfileError> {
        let id = match (mount.source.as_str(), mount.id.as_str(), mount.target.as_str()) {
            ("", "", "") => return Err(DockerfileError::new("one of source, target required")),
            ("", "", target) => base_name(target).to_owned(),
            ("", id, _) => id.to_owned(),
            (source, _, _) => source.to_owned(),
        };
        let path = match (mount.target.as_str(), &mount.env) {
            ("", Some(_)) => None,
            ("", None) => Some(format!("/run/secrets/{}", base_name(&id))),
            (target, _) => Some(target.to_owned()),
        };
        let (uid, gid, mode) = owner_and_mode(mount, 0o400);
        let needed = Requirement {
            name: id.clone(),
            required: mount.required,
            span: step.instruction.span,
        };
        self.table.stages[step.stage]
            .capture
            .secrets
            .entry(id.clone())
            .or_insert(needed);
        Ok(SecretSpec {
            target: path.map(|path| SecretMountTarget { path, uid, gid, mode }),
            id,
            env: mount.env.clone(),
            optional: !mount.required,
        })
    }

    fn ssh(&mut self, step: &Step<'_>, mount: &Mount) -> Result<SshSpec, DockerfileError> {
        if !mount.source.is_empty() {
            return Err(DockerfileError::new("ssh does not support source"));
        }
        let name = if mount.id.is_empty() {
            "default".to_owned()
        } else {
            mount.id.clone()
        };
        let needed = Requirement {
            name: name.clone(),
            required: mount.required,
            span: step.instruction.span,
        };
        self.table.stages[step.stage].capture.ssh.entry(name).or_insert(needed);
        let (uid, gid, mode) = owner_and_mode(mount, 0o600);
        let opt = SshMountOpt {
            id: mount.id.clone(),
            uid,
            gid,
            mode,
            optional: !mount.required,
        };
        Ok(SshSpec {
            target: mount.target.clone(),
            opt,
        })
    }
}

fn owner_and_mode(mount: &Mount, mode: u32) -> (u32, u32, u32) {
    (
        mount.uid.unwrap_or(0),
        mount.gid.unwrap_or(0),
        mount.mode.unwrap_or(mode),
    )
}

/// A cache begins with a directory of the owner and mode asked for.
fn owned_directory(base: &State, mount: &Mount) -> State {
    let (uid, gid, mode) = owner_and_mode(mount, 0o755);
    let owner = Some(Owner::ids(uid, gid));
    let mkdir = FileStep::MkDir {
        path: "/cache".to_owned(),
        mode,
        make_parents: false,
        owner,
        timestamp: -1,
    };
    base.file(
        vec![mkdir],
        Constraints::named("[internal] setting cache mount permissions"),
    )
}
