//! Outward to the wire: never fails, and the same value always gives the same bytes (fields ascending, maps by key).

use bytes::Bytes;
use kiln_oci::Platform;
use kiln_proto::llb as pb;
use prost::Message as _;

use crate::definition::{Definition, OpMetadata};
use crate::graph::Edge;
use crate::op::*;
use crate::source_map::{SourceInfo, SourceMap, SourceRange};

/// Puts a definition on the wire. The operations keep their bytes.
pub fn definition_to_proto(def: &Definition) -> pb::Definition {
    pb::Definition {
        def: def.ops.clone(),
        metadata: def
            .metadata
            .iter()
            .map(|(digest, m)| (digest.to_string(), metadata(m)))
            .collect(),
        source: Some(source_map(&def.source_map)),
    }
}

fn metadata(m: &OpMetadata) -> pb::OpMetadata {
    pb::OpMetadata {
        ignore_cache: m.ignore_cache,
        description: m.description.clone(),
        export_cache: m.export_cache.map(|value| pb::ExportCache { value }),
        caps: m.caps.clone(),
        progress_group: m.progress_group.as_ref().map(|g| pb::ProgressGroup {
            id: g.id.clone(),
            name: g.name.clone(),
            weak: g.weak,
        }),
        linux_resources: m.linux_resources.as_ref().map(|r| pb::LinuxResources {
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

fn source_map(map: &SourceMap) -> pb::Source {
    pb::Source {
        // A map entry with an empty message loses its value on the wire, and clients read that as a null pointer.
        locations: map
            .locations
            .iter()
            .filter(|(_, list)| !list.is_empty())
            .map(|(digest, list)| {
                let locations = list
                    .iter()
                    .map(|l| pb::Location {
                        source_index: l.source_index,
                        ranges: l.ranges.iter().map(range_to_proto).collect(),
                    })
                    .collect();
                (digest.to_string(), pb::Locations { locations })
            })
            .collect(),
        infos: map.infos.iter().map(source_info_to_proto).collect(),
    }
}

/// Puts a text on the wire.
pub fn source_info_to_proto(info: &SourceInfo) -> pb::SourceInfo {
    pb::SourceInfo {
        filename: info.filename.clone(),
        data: info.data.clone(),
        definition: info.definition.as_deref().map(definition_to_proto),
        language: info.language.clone(),
    }
}

/// Puts a range on the wire.
pub fn range_to_proto(r: &SourceRange) -> pb::Range {
    pb::Range {
        start: Some(pb::Position {
            line: r.start.line,
            character: r.start.character,
        }),
        end: Some(pb::Position {
            line: r.end.line,
            character: r.end.character,
        }),
    }
}

/// Puts a platform on the wire as it is.
pub fn platform_to_proto(p: &Platform) -> pb::Platform {
    pb::Platform {
        architecture: p.architecture.clone(),
        os: p.os.clone(),
        variant: p.variant.clone(),
        os_version: p.os_version.clone(),
        os_features: p.os_features.clone(),
    }
}

/// Encodes an operation. Every operation carries a constraints message, also an empty one, as clients send it.
pub fn encode_op(op: &Op, inputs: &[Edge], platform: Option<&Platform>, constraints: &[String]) -> Bytes {
    let kind = match op {
        Op::Exec(e) => pb::op::Op::Exec(exec(e)),
        Op::Source(s) => pb::op::Op::Source(pb::SourceOp {
            identifier: s.identifier.clone(),
            attrs: s.attrs.clone(),
        }),
        Op::File(f) => pb::op::Op::File(pb::FileOp {
            actions: f.actions.iter().map(action).collect(),
        }),
        Op::Build(b) => pb::op::Op::Build(pb::BuildOp {
            builder: b.builder,
            inputs: b
                .inputs
                .iter()
                .map(|(name, i)| (name.clone(), pb::BuildInput { input: index(*i) }))
                .collect(),
            def: b.definition.as_ref().map(definition_to_proto),
            attrs: b.attrs.clone(),
        }),
        Op::Merge(m) => pb::op::Op::Merge(pb::MergeOp {
            inputs: m.inputs.iter().map(|i| pb::MergeInput { input: index(*i) }).collect(),
        }),
        Op::Diff(d) => pb::op::Op::Diff(pb::DiffOp {
            lower: Some(pb::LowerDiffInput { input: index(d.lower) }),
            upper: Some(pb::UpperDiffInput { input: index(d.upper) }),
        }),
        Op::Passthrough(p) => pb::op::Op::Passthrough(pb::PassthroughOp {
            id: p.id.clone(),
            outputs: p.outputs.clone(),
        }),
    };
    let mut around = pb::Op {
        inputs: inputs.iter().map(input).collect(),
        op: None,
        platform: platform.map(platform_to_proto),
        constraints: Some(pb::WorkerConstraints {
            filter: constraints.to_vec(),
        }),
    }
    .encode_to_vec();
    let chosen = pb::Op {
        op: Some(kind),
        ..pb::Op::default()
    };
    // Go's library writes the members of a oneof behind all other fields, whatever their numbers, and vertex digests are
    // taken over its bytes.
    around.extend_from_slice(&chosen.encode_to_vec());
    around.into()
}

/// Encodes the terminal operation that names the requested edge.
pub fn encode_terminal(root: &Edge) -> Bytes {
    pb::Op {
        inputs: vec![input(root)],
        op: None,
        platform: None,
        constraints: None,
    }
    .encode_to_vec()
    .into()
}

fn input(edge: &Edge) -> pb::Input {
    pb::Input {
        digest: edge.vertex.to_string(),
        index: i64::from(edge.output),
    }
}

fn index(value: Option<u32>) -> i64 {
    value.map_or(-1, i64::from)
}

fn exec(e: &ExecOp) -> pb::ExecOp {
    let m = &e.meta;
    pb::ExecOp {
        meta: Some(pb::Meta {
            args: m.args.clone(),
            env: m.env.clone(),
            cwd: m.cwd.clone(),
            user: m.user.clone(),
            proxy_env: m.proxy_env.as_ref().map(|p| pb::ProxyEnv {
                http_proxy: p.http_proxy.clone(),
                https_proxy: p.https_proxy.clone(),
                ftp_proxy: p.ftp_proxy.clone(),
                no_proxy: p.no_proxy.clone(),
                all_proxy: p.all_proxy.clone(),
            }),
            extra_hosts: m
                .extra_hosts
                .iter()
                .map(|h| pb::HostIp {
                    host: h.host.clone(),
                    ip: h.ip.clone(),
                })
                .collect(),
            hostname: m.hostname.clone(),
            ulimit: m
                .ulimit
                .iter()
                .map(|u| pb::Ulimit {
                    name: u.name.clone(),
                    soft: u.soft,
                    hard: u.hard,
                })
                .collect(),
            cgroup_parent: m.cgroup_parent.clone(),
            remove_mount_stubs_recursive: m.remove_mount_stubs_recursive,
            valid_exit_codes: m.valid_exit_codes.clone(),
        }),
        mounts: e.mounts.iter().map(mount).collect(),
        network: e.network as i32,
        security: e.security as i32,
        secretenv: e
            .secret_env
            .iter()
            .map(|s| pb::SecretEnv {
                id: s.id.clone(),
                name: s.name.clone(),
                optional: s.optional,
            })
            .collect(),
        cdi_devices: e
            .cdi_devices
            .iter()
            .map(|d| pb::CdiDevice {
                name: d.name.clone(),
                optional: d.optional,
            })
            .collect(),
    }
}

fn mount(m: &ExecMount) -> pb::Mount {
    pb::Mount {
        input: index(m.input),
        selector: m.selector.clone(),
        dest: m.dest.clone(),
        output: index(m.output),
        readonly: m.readonly,
        mount_type: m.mount_type as i32,
        tmpfs_opt: m.tmpfs.as_ref().map(|t| pb::TmpfsOpt { size: t.size }),
        cache_opt: m.cache.as_ref().map(|c| pb::CacheOpt {
            id: c.id.clone(),
            sharing: c.sharing as i32,
        }),
        secret_opt: m.secret.as_ref().map(|s| pb::SecretOpt {
            id: s.id.clone(),
            uid: s.uid,
            gid: s.gid,
            mode: s.mode,
            optional: s.optional,
        }),
        ssh_opt: m.ssh.as_ref().map(|s| pb::SshOpt {
            id: s.id.clone(),
            uid: s.uid,
            gid: s.gid,
            mode: s.mode,
            optional: s.optional,
        }),
        result_id: m.result_id.clone(),
        content_cache: m.content_cache as i32,
    }
}

fn action(a: &FileAction) -> pb::FileAction {
    use pb::file_action::Action;
    let kind = match &a.kind {
        FileActionKind::Copy(c) => Action::Copy(pb::FileActionCopy {
            src: c.src.clone(),
            dest: c.dest.clone(),
            owner: c.owner.as_ref().map(chown),
            mode: c.mode,
            follow_symlink: c.follow_symlink,
            dir_copy_contents: c.dir_copy_contents,
            attempt_unpack_docker_compatibility: c.attempt_unpack,
            create_dest_path: c.create_dest_path,
            allow_wildcard: c.allow_wildcard,
            allow_empty_wildcard: c.allow_empty_wildcard,
            timestamp: c.timestamp,
            include_patterns: c.include_patterns.clone(),
            exclude_patterns: c.exclude_patterns.clone(),
            always_replace_existing_dest_paths: c.always_replace_existing_dest_paths,
            mode_str: c.mode_str.clone(),
            required_paths: c.required_paths.clone(),
        }),
        FileActionKind::MkFile(m) => Action::Mkfile(pb::FileActionMkFile {
            path: m.path.clone(),
            mode: m.mode,
            data: m.data.clone(),
            owner: m.owner.as_ref().map(chown),
            timestamp: m.timestamp,
        }),
        FileActionKind::MkDir(m) => Action::Mkdir(pb::FileActionMkDir {
            path: m.path.clone(),
            mode: m.mode,
            make_parents: m.make_parents,
            owner: m.owner.as_ref().map(chown),
            timestamp: m.timestamp,
        }),
        FileActionKind::Rm(r) => Action::Rm(pb::FileActionRm {
            path: r.path.clone(),
            allow_not_found: r.allow_not_found,
            allow_wildcard: r.allow_wildcard,
        }),
        FileActionKind::Symlink(s) => Action::Symlink(pb::FileActionSymlink {
            oldpath: s.oldpath.clone(),
            newpath: s.newpath.clone(),
            owner: s.owner.as_ref().map(chown),
            timestamp: s.timestamp,
        }),
    };
    pb::FileAction {
        input: index(a.input),
        secondary_input: index(a.secondary_input),
        output: index(a.output),
        action: Some(kind),
    }
}

fn chown(c: &ChownOpt) -> pb::ChownOpt {
    pb::ChownOpt {
        user: c.user.as_ref().map(user),
        group: c.group.as_ref().map(user),
    }
}

fn user(u: &UserOpt) -> pb::UserOpt {
    let user = match u {
        UserOpt::ById(id) => pb::user_opt::User::ById(*id),
        UserOpt::ByName { name, input } => pb::user_opt::User::ByName(pb::NamedUserOpt {
            name: name.clone(),
            input: index(*input),
        }),
    };
    pb::UserOpt { user: Some(user) }
}
