//! From the wire inward: fallible, and the error names the field.

use kiln_oci::Platform;
use kiln_proto::llb as pb;
use prost::Message as _;

use crate::definition::{Definition, LinuxResources, OpMetadata, ProgressGroup};
use crate::error::LlbError;
use crate::graph::Edge;
use crate::op::*;
use crate::source_map::{SourceInfo, SourceLocation, SourceMap, SourcePosition, SourceRange};

/// An operation taken apart.
#[derive(Clone, Debug)]
pub struct DecodedOp {
    /// `None` for a terminal operation.
    pub op: Option<Op>,
    /// Inputs by position.
    pub inputs: Vec<Edge>,
    /// Platform as sent.
    pub platform: Option<Platform>,
    /// Worker filters.
    pub constraints: Vec<String>,
}

/// Decodes a definition that was stored as bytes.
pub fn definition_from_bytes(bytes: &[u8]) -> Result<Definition, LlbError> {
    let def = pb::Definition::decode(bytes).map_err(|source| LlbError::Decode {
        digest: kiln_oci::Digest::of(bytes).to_string(),
        source,
    })?;
    definition_from_proto(&def)
}

/// Takes a definition over from the wire. The operations stay encoded.
pub fn definition_from_proto(def: &pb::Definition) -> Result<Definition, LlbError> {
    let mut out = Definition {
        ops: def.def.clone(),
        ..Definition::default()
    };
    for (digest, meta) in &def.metadata {
        // Metadata under a key that is no digest can belong to no vertex.
        if let Ok(digest) = digest.parse() {
            out.metadata.insert(digest, metadata(meta));
        }
    }
    if let Some(source) = &def.source {
        out.source_map = source_map(source)?;
    }
    Ok(out)
}

fn metadata(m: &pb::OpMetadata) -> OpMetadata {
    OpMetadata {
        ignore_cache: m.ignore_cache,
        description: m.description.clone(),
        export_cache: m.export_cache.as_ref().map(|e| e.value),
        caps: m.caps.clone(),
        progress_group: m.progress_group.as_ref().map(|g| ProgressGroup {
            id: g.id.clone(),
            name: g.name.clone(),
            weak: g.weak,
        }),
        linux_resources: m.linux_resources.as_ref().map(|r| LinuxResources {
            memory: r.memory,
            memory_swap: r.memory_swap,
            cpu_shares: r.cpu_shares,
            cpu_period: r.cpu_period,
            cpu_quota: r.cpu_quota,
            cpuset_cpus: r.cpuset_cpus.clone(),
            cpuset_mems: r.cpuset_mems.clone(),
        }),
    }
}

fn source_map(s: &pb::Source) -> Result<SourceMap, LlbError> {
    let mut map = SourceMap::default();
    for (digest, locations) in &s.locations {
        let Ok(digest) = digest.parse() else { continue };
        let list = locations
            .locations
            .iter()
            .map(|l| SourceLocation {
                source_index: l.source_index,
                ranges: l.ranges.iter().map(range).collect(),
            })
            .collect();
        map.locations.insert(digest, list);
    }
    for info in &s.infos {
        let definition = match &info.definition {
            Some(d) => Some(Box::new(definition_from_proto(d)?)),
            None => None,
        };
        map.infos.push(SourceInfo {
            filename: info.filename.clone(),
            data: info.data.clone(),
            definition,
            language: info.language.clone(),
        });
    }
    Ok(map)
}

fn range(r: &pb::Range) -> SourceRange {
    let position = |p: &Option<pb::Position>| {
        p.as_ref()
            .map(|p| SourcePosition {
                line: p.line,
                character: p.character,
            })
            .unwrap_or_default()
    };
    SourceRange {
        start: position(&r.start),
        end: position(&r.end),
    }
}

/// A platform as sent, not normalised.
pub fn platform_from_proto(p: &pb::Platform) -> Platform {
    Platform {
        os: p.os.clone(),
        architecture: p.architecture.clone(),
        variant: p.variant.clone(),
        os_version: p.os_version.clone(),
        os_features: p.os_features.clone(),
    }
}

/// Decodes one operation.
pub fn decode_op(bytes: &[u8]) -> Result<DecodedOp, LlbError> {
    let op = pb::Op::decode(bytes).map_err(|source| LlbError::Decode {
        digest: crate::vertex_digest(bytes).to_string(),
        source,
    })?;
    let mut inputs = Vec::with_capacity(op.inputs.len());
    for input in &op.inputs {
        inputs.push(Edge {
            vertex: input.digest.parse()?,
            output: u32::try_from(input.index)
                .map_err(|_| LlbError::invalid("input", format!("invalid output index {}", input.index)))?,
        });
    }
    let kind = match op.op {
        None => None,
        Some(pb::op::Op::Exec(e)) => Some(Op::Exec(exec(e)?)),
        Some(pb::op::Op::Source(s)) => Some(Op::Source(SourceOp {
            identifier: s.identifier,
            attrs: s.attrs,
        })),
        Some(pb::op::Op::File(f)) => Some(Op::File(file(f)?)),
        Some(pb::op::Op::Build(b)) => Some(Op::Build(build(b)?)),
        Some(pb::op::Op::Merge(m)) => Some(Op::Merge(MergeOp {
            inputs: m
                .inputs
                .iter()
                .map(|i| index("merge", i.input))
                .collect::<Result<_, _>>()?,
        })),
        Some(pb::op::Op::Diff(d)) => Some(Op::Diff(DiffOp {
            lower: d.lower.map(|l| index("diff", l.input)).transpose()?.flatten(),
            upper: d.upper.map(|u| index("diff", u.input)).transpose()?.flatten(),
        })),
        Some(pb::op::Op::Passthrough(p)) => Some(Op::Passthrough(PassthroughOp {
            id: p.id,
            outputs: p.outputs,
        })),
    };
    Ok(DecodedOp {
        op: kind,
        inputs,
        platform: op.platform.as_ref().map(platform_from_proto),
        constraints: op.constraints.map(|c| c.filter).unwrap_or_default(),
    })
}

/// `-1` is nothing; other negative numbers and numbers beyond 32 bits are errors.
fn index(kind: &'static str, value: i64) -> Result<Option<u32>, LlbError> {
    match value {
        -1 => Ok(None),
        v => u32::try_from(v)
            .map(Some)
            .map_err(|_| LlbError::invalid(kind, format!("invalid index {v}"))),
    }
}

fn exec(e: pb::ExecOp) -> Result<ExecOp, LlbError> {
    let meta = e.meta.ok_or_else(|| LlbError::invalid("exec", "no meta"))?;
    Ok(ExecOp {
        meta: ExecMeta {
            args: meta.args,
            env: meta.env,
            cwd: meta.cwd,
            user: meta.user,
            proxy_env: meta.proxy_env.map(|p| ProxyEnv {
                http_proxy: p.http_proxy,
                https_proxy: p.https_proxy,
                ftp_proxy: p.ftp_proxy,
                no_proxy: p.no_proxy,
                all_proxy: p.all_proxy,
            }),
            extra_hosts: meta
                .extra_hosts
                .into_iter()
                .map(|h| HostIp { host: h.host, ip: h.ip })
                .collect(),
            hostname: meta.hostname,
            ulimit: meta
                .ulimit
                .into_iter()
                .map(|u| Ulimit {
                    name: u.name,
                    soft: u.soft,
                    hard: u.hard,
                })
                .collect(),
            cgroup_parent: meta.cgroup_parent,
            remove_mount_stubs_recursive: meta.remove_mount_stubs_recursive,
            valid_exit_codes: meta.valid_exit_codes,
        },
        mounts: e.mounts.into_iter().map(mount).collect::<Result<_, _>>()?,
        network: match e.network {
            0 => NetMode::Unset,
            1 => NetMode::Host,
            2 => NetMode::None,
            other => return Err(LlbError::invalid("exec", format!("unknown network mode {other}"))),
        },
        security: match e.security {
            0 => SecurityMode::Sandbox,
            1 => SecurityMode::Insecure,
            other => return Err(LlbError::invalid("exec", format!("unknown security mode {other}"))),
        },
        secret_env: e
            .secretenv
            .into_iter()
            .map(|s| SecretEnv {
                id: s.id,
                name: s.name,
                optional: s.optional,
            })
            .collect(),
        cdi_devices: e
            .cdi_devices
            .into_iter()
            .map(|d| CdiDevice {
                name: d.name,
                optional: d.optional,
            })
            .collect(),
    })
}

/// Takes one mount over; also used for the mounts of debugging containers.
pub fn mount(m: pb::Mount) -> Result<ExecMount, LlbError> {
    Ok(ExecMount {
        input: index("exec", m.input)?,
        selector: m.selector,
        dest: m.dest,
        output: index("exec", m.output)?,
        readonly: m.readonly,
        mount_type: match m.mount_type {
            0 => MountType::Bind,
            1 => MountType::Secret,
            2 => MountType::Ssh,
            3 => MountType::Cache,
            4 => MountType::Tmpfs,
            other => return Err(LlbError::invalid("exec", format!("unknown mount type {other}"))),
        },
        tmpfs: m.tmpfs_opt.map(|t| TmpfsOpt { size: t.size }),
        cache: m
            .cache_opt
            .map(|c| {
                Ok::<_, LlbError>(CacheMountOpt {
                    id: c.id,
                    sharing: match c.sharing {
                        0 => CacheSharing::Shared,
                        1 => CacheSharing::Private,
                        2 => CacheSharing::Locked,
                        other => return Err(LlbError::invalid("exec", format!("unknown cache sharing {other}"))),
                    },
                })
            })
            .transpose()?,
        secret: m.secret_opt.map(|s| SecretMountOpt {
            id: s.id,
            uid: s.uid,
            gid: s.gid,
            mode: s.mode,
            optional: s.optional,
        }),
        ssh: m.ssh_opt.map(|s| SshMountOpt {
            id: s.id,
            uid: s.uid,
            gid: s.gid,
            mode: s.mode,
            optional: s.optional,
        }),
        result_id: m.result_id,
        content_cache: match m.content_cache {
            0 => MountContentCache::Default,
            1 => MountContentCache::On,
            2 => MountContentCache::Off,
            other => return Err(LlbError::invalid("exec", format!("unknown content cache mode {other}"))),
        },
    })
}

fn file(f: pb::FileOp) -> Result<FileOp, LlbError> {
    use pb::file_action::Action;
    let mut actions = Vec::with_capacity(f.actions.len());
    for a in f.actions {
        let kind = match a
            .action
            .ok_or_else(|| LlbError::invalid("file", "action without a kind"))?
        {
            Action::Copy(c) => FileActionKind::Copy(CopyAction {
                src: c.src,
                dest: c.dest,
                owner: c.owner.map(chown).transpose()?,
                mode: c.mode,
                follow_symlink: c.follow_symlink,
                dir_copy_contents: c.dir_copy_contents,
                attempt_unpack: c.attempt_unpack_docker_compatibility,
                create_dest_path: c.create_dest_path,
                allow_wildcard: c.allow_wildcard,
                allow_empty_wildcard: c.allow_empty_wildcard,
                timestamp: c.timestamp,
                include_patterns: c.include_patterns,
                exclude_patterns: c.exclude_patterns,
                always_replace_existing_dest_paths: c.always_replace_existing_dest_paths,
                mode_str: c.mode_str,
                required_paths: c.required_paths,
            }),
            Action::Mkfile(m) => FileActionKind::MkFile(MkFileAction {
                path: m.path,
                mode: m.mode,
                data: m.data,
                owner: m.owner.map(chown).transpose()?,
                timestamp: m.timestamp,
            }),
            Action::Mkdir(m) => FileActionKind::MkDir(MkDirAction {
                path: m.path,
                mode: m.mode,
                make_parents: m.make_parents,
                owner: m.owner.map(chown).transpose()?,
                timestamp: m.timestamp,
            }),
            Action::Rm(r) => FileActionKind::Rm(RmAction {
                path: r.path,
                allow_not_found: r.allow_not_found,
                allow_wildcard: r.allow_wildcard,
            }),
            Action::Symlink(s) => FileActionKind::Symlink(SymlinkAction {
                oldpath: s.oldpath,
                newpath: s.newpath,
                owner: s.owner.map(chown).transpose()?,
                timestamp: s.timestamp,
            }),
        };
        actions.push(FileAction {
            input: index("file", a.input)?,
            secondary_input: index("file", a.secondary_input)?,
            output: index("file", a.output)?,
            kind,
        });
    }
    Ok(FileOp { actions })
}

fn chown(c: pb::ChownOpt) -> Result<ChownOpt, LlbError> {
    Ok(ChownOpt {
        user: user(c.user)?,
        group: user(c.group)?,
    })
}

fn user(u: Option<pb::UserOpt>) -> Result<Option<UserOpt>, LlbError> {
    Ok(match u.and_then(|u| u.user) {
        None => None,
        Some(pb::user_opt::User::ById(id)) => Some(UserOpt::ById(id)),
        Some(pb::user_opt::User::ByName(n)) => {
            let input = match n.input {
                -1 => return Err(LlbError::invalid("file", "invalid user index -1")),
                v => index("file", v)?,
            };
            Some(UserOpt::ByName { name: n.name, input })
        }
    })
}

fn build(b: pb::BuildOp) -> Result<BuildOp, LlbError> {
    Ok(BuildOp {
        builder: b.builder,
        inputs: b
            .inputs
            .into_iter()
            .map(|(name, i)| Ok((name, index("build", i.input)?)))
            .collect::<Result<_, LlbError>>()?,
        definition: b.def.as_ref().map(definition_from_proto).transpose()?,
        attrs: b.attrs,
    })
}
