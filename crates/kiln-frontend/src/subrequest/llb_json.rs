//! `frontend.convertllb`: the LLB of a Dockerfile as JSON, and the JSON forms of what belongs to it.

use kiln_llb::op::*;
use kiln_llb::{
    Definition, LinuxResources, Op, OpMetadata, ProgressGroup, SourceInfo, SourceMap, SourcePosition, SourceRange,
    vertex_digest, wire,
};
use kiln_oci::Platform;
use serde_json::{Map, Value, json};

use super::{Metadata, base64, metadata};
use crate::dockerfile::convert::Converted;
use crate::error::DockerfileError;

/// The two ways in which the field writes its messages as JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// As protobuf prescribes: camel case, 64 bit numbers as strings, enums by name.
    Proto,
    /// As a Go struct: the names of the fields, numbers as numbers.
    Plain,
}

/// An object of which zero values are left out.
struct Object(Map<String, Value>);

impl Object {
    fn new() -> Self {
        Self(Map::new())
    }

    fn value(mut self, key: &str, value: Value) -> Self {
        self.0.insert(key.to_owned(), value);
        self
    }

    fn text(self, key: &str, text: &str) -> Self {
        if text.is_empty() {
            self
        } else {
            self.value(key, text.into())
        }
    }

    fn texts(self, key: &str, list: &[String]) -> Self {
        if list.is_empty() {
            self
        } else {
            self.value(key, list.into())
        }
    }

    fn flag(self, key: &str, on: bool) -> Self {
        if on { self.value(key, true.into()) } else { self }
    }

    fn small(self, key: &str, number: i64) -> Self {
        if number == 0 {
            self
        } else {
            self.value(key, number.into())
        }
    }

    fn long(self, key: &str, number: i64, style: Style) -> Self {
        match (number, style) {
            (0, _) => self,
            (n, Style::Proto) => self.value(key, n.to_string().into()),
            (n, Style::Plain) => self.value(key, n.into()),
        }
    }

    fn list(self, key: &str, items: Vec<Value>) -> Self {
        if items.is_empty() {
            self
        } else {
            self.value(key, items.into())
        }
    }

    fn maybe(self, key: &str, value: Option<Value>) -> Self {
        match value {
            Some(value) => self.value(key, value),
            None => self,
        }
    }

    fn done(self) -> Value {
        Value::Object(self.0)
    }
}

/// The LLB of the target.
pub(super) fn answer(converted: &Converted) -> Result<Metadata, DockerfileError> {
    let wrap = |e: kiln_llb::LlbError| DockerfileError::new(e.to_string());
    let definition = converted.state.marshal(Some(&converted.platform)).map_err(wrap)?;
    let mut ops = std::collections::BTreeMap::new();
    for bytes in &definition.ops {
        ops.insert(vertex_digest(bytes).to_string(), operation(bytes).map_err(wrap)?);
    }
    let about: std::collections::BTreeMap<String, Value> = definition
        .metadata
        .iter()
        .map(|(d, m)| (d.to_string(), op_metadata(m, Style::Plain)))
        .collect();
    let source = source_map(&definition.source_map, Style::Proto);
    let answer = json!({ "def": ops, "metadata": about, "source": source });
    Ok(metadata(&answer, None, "0.1.0"))
}

fn operation(bytes: &[u8]) -> Result<Value, kiln_llb::LlbError> {
    let decoded = wire::decode_op(bytes)?;
    let inputs = decoded.inputs.iter().map(|edge| {
        Object::new()
            .text("digest", &edge.vertex.to_string())
            .long("index", i64::from(edge.output), Style::Proto)
            .done()
    });
    let mut out = Object::new().list("inputs", inputs.collect());
    let terminal = decoded.op.is_none();
    if let Some(op) = &decoded.op {
        let (key, value) = match op {
            Op::Exec(exec) => ("exec", exec_op(exec)),
            Op::Source(source) => ("source", source_op(source)),
            Op::File(file) => ("file", file_op(file)),
            Op::Build(_) => ("build", json!({ "builder": "-1" })),
            Op::Merge(merge) => {
                let input = |i: &Option<InputIndex>| Object::new().long("input", index(*i), Style::Proto).done();
                (
                    "merge",
                    Object::new()
                        .list("inputs", merge.inputs.iter().map(input).collect())
                        .done(),
                )
            }
            Op::Diff(diff) => {
                let side = |i| Object::new().long("input", index(i), Style::Proto).done();
                ("diff", json!({ "lower": side(diff.lower), "upper": side(diff.upper) }))
            }
            Op::Passthrough(op) => ("passthrough", Object::new().text("id", &op.id).done()),
        };
        out = out.value(key, value);
    }
    out = out.maybe("platform", decoded.platform.as_ref().map(platform));
    if !terminal {
        out = out.value(
            "constraints",
            Object::new().texts("filter", &decoded.constraints).done(),
        );
    }
    Ok(out.done())
}

fn index(i: Option<u32>) -> i64 {
    i.map_or(-1, i64::from)
}

fn platform(p: &Platform) -> Value {
    Object::new()
        .text("Architecture", &p.architecture)
        .text("OS", &p.os)
        .text("Variant", &p.variant)
        .text("OSVersion", &p.os_version)
        .texts("OSFeatures", &p.os_features)
        .done()
}

fn source_op(op: &SourceOp) -> Value {
    let attrs = (!op.attrs.is_empty()).then(|| json!(op.attrs));
    Object::new()
        .text("identifier", &op.identifier)
        .maybe("attrs", attrs)
        .done()
}

fn exec_op(op: &ExecOp) -> Value {
    let meta = &op.meta;
    let proxy = meta.proxy_env.as_ref().map(|p| {
        Object::new()
            .text("httpProxy", &p.http_proxy)
            .text("httpsProxy", &p.https_proxy)
            .text("ftpProxy", &p.ftp_proxy)
            .text("noProxy", &p.no_proxy)
            .text("allProxy", &p.all_proxy)
            .done()
    });
    let hosts = meta
        .extra_hosts
        .iter()
        .map(|h| Object::new().text("Host", &h.host).text("IP", &h.ip).done());
    let ulimits = meta.ulimit.iter().map(|u| {
        let out = Object::new().text("Name", &u.name);
        out.long("Soft", u.soft, Style::Proto)
            .long("Hard", u.hard, Style::Proto)
            .done()
    });
    let codes = meta.valid_exit_codes.iter().map(|c| Value::from(*c));
    let meta = Object::new()
        .texts("args", &meta.args)
        .texts("env", &meta.env)
        .text("cwd", &meta.cwd)
        .text("user", &meta.user)
        .maybe("proxyEnv", proxy)
        .list("extraHosts", hosts.collect())
        .text("hostname", &meta.hostname)
        .list("ulimit", ulimits.collect())
        .text("cgroupParent", &meta.cgroup_parent)
        .flag("removeMountStubsRecursive", meta.remove_mount_stubs_recursive)
        .list("validExitCodes", codes.collect());
    let secrets = op.secret_env.iter().map(|s| {
        Object::new()
            .text("ID", &s.id)
            .text("name", &s.name)
            .flag("optional", s.optional)
            .done()
    });
    let devices = op
        .cdi_devices
        .iter()
        .map(|d| Object::new().text("name", &d.name).flag("optional", d.optional).done());
    let network = match op.network {
        NetMode::Unset => "",
        NetMode::Host => "HOST",
        NetMode::None => "NONE",
    };
    let security = if op.security == SecurityMode::Insecure {
        "INSECURE"
    } else {
        ""
    };
    Object::new()
        .value("meta", meta.done())
        .list("mounts", op.mounts.iter().map(mount).collect())
        .text("network", network)
        .text("security", security)
        .list("secretenv", secrets.collect())
        .list("cdiDevices", devices.collect())
        .done()
}

fn mount(m: &ExecMount) -> Value {
    let kind = match m.mount_type {
        MountType::Bind => "",
        MountType::Secret => "SECRET",
        MountType::Ssh => "SSH",
        MountType::Cache => "CACHE",
        MountType::Tmpfs => "TMPFS",
    };
    let tmpfs = m
        .tmpfs
        .as_ref()
        .map(|t| Object::new().long("size", t.size, Style::Proto).done());
    let cache = m.cache.as_ref().map(|c| {
        let sharing = match c.sharing {
            CacheSharing::Shared => "",
            CacheSharing::Private => "PRIVATE",
            CacheSharing::Locked => "LOCKED",
        };
        Object::new().text("ID", &c.id).text("sharing", sharing).done()
    });
    let owned = |id: &str, uid: u32, gid: u32, mode: u32, optional: bool| {
        let out = Object::new()
            .text("ID", id)
            .small("uid", uid.into())
            .small("gid", gid.into());
        out.small("mode", mode.into()).flag("optional", optional).done()
    };
    let content_cache = match m.content_cache {
        MountContentCache::Default => "",
        MountContentCache::On => "ON",
        MountContentCache::Off => "OFF",
    };
    Object::new()
        .long("input", index(m.input), Style::Proto)
        .text("selector", &m.selector)
        .text("dest", &m.dest)
        .long("output", index(m.output), Style::Proto)
        .flag("readonly", m.readonly)
        .text("mountType", kind)
        .maybe("TmpfsOpt", tmpfs)
        .maybe("cacheOpt", cache)
        .maybe(
            "secretOpt",
            m.secret
                .as_ref()
                .map(|s| owned(&s.id, s.uid, s.gid, s.mode, s.optional)),
        )
        .maybe(
            "SSHOpt",
            m.ssh.as_ref().map(|s| owned(&s.id, s.uid, s.gid, s.mode, s.optional)),
        )
        .text("resultID", &m.result_id)
        .text("contentCache", content_cache)
        .done()
}

fn file_op(op: &FileOp) -> Value {
    let action = |a: &FileAction| {
        let (key, value) = match &a.kind {
            FileActionKind::Copy(c) => ("copy", copy_action(c)),
            FileActionKind::MkFile(m) => {
                let data = if m.data.is_empty() {
                    String::new()
                } else {
                    base64(&m.data)
                };
                let out = Object::new()
                    .text("path", &m.path)
                    .small("mode", m.mode.into())
                    .text("data", &data);
                let out = out.maybe("owner", m.owner.as_ref().map(owner));
                ("mkfile", out.long("timestamp", m.timestamp, Style::Proto).done())
            }
            FileActionKind::MkDir(m) => {
                let out = Object::new().text("path", &m.path).small("mode", m.mode.into());
                let out = out
                    .flag("makeParents", m.make_parents)
                    .maybe("owner", m.owner.as_ref().map(owner));
                ("mkdir", out.long("timestamp", m.timestamp, Style::Proto).done())
            }
            FileActionKind::Rm(r) => {
                let out = Object::new()
                    .text("path", &r.path)
                    .flag("allowNotFound", r.allow_not_found);
                ("rm", out.flag("allowWildcard", r.allow_wildcard).done())
            }
            FileActionKind::Symlink(s) => {
                let out = Object::new().text("oldpath", &s.oldpath).text("newpath", &s.newpath);
                let out = out.maybe("owner", s.owner.as_ref().map(owner));
                ("symlink", out.long("timestamp", s.timestamp, Style::Proto).done())
            }
        };
        Object::new()
            .long("input", index(a.input), Style::Proto)
            .long("secondaryInput", index(a.secondary_input), Style::Proto)
            .long("output", index(a.output), Style::Proto)
            .value(key, value)
            .done()
    };
    Object::new()
        .list("actions", op.actions.iter().map(action).collect())
        .done()
}

fn copy_action(c: &CopyAction) -> Value {
    Object::new()
        .text("src", &c.src)
        .text("dest", &c.dest)
        .maybe("owner", c.owner.as_ref().map(owner))
        .small("mode", c.mode.into())
        .flag("followSymlink", c.follow_symlink)
        .flag("dirCopyContents", c.dir_copy_contents)
        .flag("attemptUnpackDockerCompatibility", c.attempt_unpack)
        .flag("createDestPath", c.create_dest_path)
        .flag("allowWildcard", c.allow_wildcard)
        .flag("allowEmptyWildcard", c.allow_empty_wildcard)
        .long("timestamp", c.timestamp, Style::Proto)
        .texts("includePatterns", &c.include_patterns)
        .texts("excludePatterns", &c.exclude_patterns)
        .flag("alwaysReplaceExistingDestPaths", c.always_replace_existing_dest_paths)
        .text("modeStr", &c.mode_str)
        .texts("requiredPaths", &c.required_paths)
        .done()
}

fn owner(o: &ChownOpt) -> Value {
    let half = |u: &UserOpt| match u {
        UserOpt::ByName { name, input } => {
            let by_name = Object::new()
                .text("name", name)
                .long("input", index(*input), Style::Proto);
            json!({ "byName": by_name.done() })
        }
        UserOpt::ById(id) => json!({ "byID": id }),
    };
    Object::new()
        .maybe("user", o.user.as_ref().map(half))
        .maybe("group", o.group.as_ref().map(half))
        .done()
}

fn name(style: Style, proto: &'static str, plain: &'static str) -> &'static str {
    if style == Style::Proto { proto } else { plain }
}

fn op_metadata(m: &OpMetadata, style: Style) -> Value {
    let map = |present: bool, value: Value| present.then_some(value);
    let group = |g: &ProgressGroup| {
        Object::new()
            .text("id", &g.id)
            .text("name", &g.name)
            .flag("weak", g.weak)
            .done()
    };
    Object::new()
        .flag(name(style, "ignoreCache", "ignore_cache"), m.ignore_cache)
        .maybe("description", map(!m.description.is_empty(), json!(m.description)))
        .maybe(
            name(style, "exportCache", "export_cache"),
            m.export_cache.map(|on| Object::new().flag("Value", on).done()),
        )
        .maybe("caps", map(!m.caps.is_empty(), json!(m.caps)))
        .maybe(
            name(style, "progressGroup", "progress_group"),
            m.progress_group.as_ref().map(group),
        )
        .maybe(
            name(style, "linuxResources", "linux_resources"),
            m.linux_resources.as_ref().map(|r| limits(r, style)),
        )
        .done()
}

fn limits(r: &LinuxResources, style: Style) -> Value {
    let unsigned = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    Object::new()
        .long("memory", r.memory, style)
        .long("memorySwap", r.memory_swap, style)
        .long("cpuShares", unsigned(r.cpu_shares), style)
        .long("cpuPeriod", unsigned(r.cpu_period), style)
        .long("cpuQuota", r.cpu_quota, style)
        .text("cpusetCpus", &r.cpuset_cpus)
        .text("cpusetMems", &r.cpuset_mems)
        .done()
}

fn source_map(map: &SourceMap, style: Style) -> Value {
    let position = |p: &SourcePosition| {
        Object::new()
            .small("line", p.line.into())
            .small("character", p.character.into())
            .done()
    };
    let range = |r: &SourceRange| json!({ "start": position(&r.start), "end": position(&r.end) });
    let locations = map.locations.iter().map(|(digest, list)| {
        let list = list.iter().map(|l| {
            let out = Object::new().small("sourceIndex", l.source_index.into());
            out.list("ranges", l.ranges.iter().map(range).collect()).done()
        });
        (
            digest.to_string(),
            Object::new().list("locations", list.collect()).done(),
        )
    });
    let locations: Map<String, Value> = locations.collect();
    let infos = map.infos.iter().map(|info| source_info(info, style));
    Object::new()
        .maybe("locations", (!locations.is_empty()).then_some(Value::Object(locations)))
        .list("infos", infos.collect())
        .done()
}

fn definition(d: &Definition, style: Style) -> Value {
    let ops = d.ops.iter().map(|op| Value::from(base64(op)));
    let about: Map<String, Value> = d
        .metadata
        .iter()
        .map(|(k, m)| (k.to_string(), op_metadata(m, style)))
        .collect();
    Object::new()
        .list("def", ops.collect())
        .maybe("metadata", (!about.is_empty()).then_some(Value::Object(about)))
        .value("Source", source_map(&d.source_map, style))
        .done()
}

/// A text of the user.
pub(super) fn source_info(info: &SourceInfo, style: Style) -> Value {
    Object::new()
        .text("filename", &info.filename)
        .text(
            "data",
            &if info.data.is_empty() {
                String::new()
            } else {
                base64(&info.data)
            },
        )
        .maybe("definition", info.definition.as_deref().map(|d| definition(d, style)))
        .text("language", &info.language)
        .done()
}
