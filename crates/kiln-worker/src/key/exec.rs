//! The key of a process (cache-keys.md §2 "exec", §3).

use kiln_llb::op::{CacheSharing, ExecMeta, ExecMount, ExecOp, MountContentCache, MountType};
use kiln_oci::Platform;
use kiln_solver::Dep;

use super::json::{Json, Object};
use super::select::{ContentSelector, selector_of, without_nested};
use super::{KeyError, OpKey};

/// The key of `op` on `platform` with `inputs` inputs. CDI devices must be what entitlements left of them.
pub fn exec_key(op: &ExecOp, platform: &Platform, inputs: usize) -> Result<OpKey, KeyError> {
    let exec = Object::new()
        .raw("meta", meta(&op.meta))
        .list(
            "mounts",
            if is_plain_root(&op.mounts) {
                Vec::new()
            } else {
                op.mounts.iter().map(mount).collect()
            },
        )
        .int("network", op.network as i32)
        .int("security", op.security as i32)
        .list(
            "secretenv",
            op.secret_env.iter().map(|s| {
                Object::new()
                    .text("ID", &s.id)
                    .text("name", &s.name)
                    .flag("optional", s.optional)
                    .end()
            }),
        )
        .list(
            "cdiDevices",
            op.cdi_devices
                .iter()
                .map(|d| Object::new().text("name", &d.name).flag("optional", d.optional).end()),
        )
        .end();
    let platform = platform.normalized();
    let subject = Object::new()
        .text_always("Type", "buildkit.exec.v0")
        .raw("Exec", exec)
        .text_always("OS", &platform.os)
        .text_always("Arch", &platform.architecture)
        .text("Variant", &platform.variant)
        .text("OSVersion", &platform.os_version)
        .texts("OSFeatures", &platform.os_features)
        .end();
    let mut key = OpKey::new(subject, inputs);
    for index in 0..inputs {
        let used: Vec<&ExecMount> = op
            .mounts
            .iter()
            .filter(|m| matches!(m.mount_type, MountType::Bind | MountType::Cache))
            .filter(|m| m.input.is_some_and(|i| i as usize == index))
            .collect();
        if used.is_empty() {
            continue;
        }
        let paths: Vec<String> = used.iter().map(|m| selected(m)).collect();
        let mut content = false;
        for mount in &used {
            content = by_content(mount)?;
        }
        if let (Some(dep), Some(selectors)) = (key.deps.get_mut(index), key.selectors.get_mut(index)) {
            *dep = Dep {
                selector: Some(selector_of(&paths)),
                content,
            };
            if content {
                let paths = without_nested(paths);
                *selectors = if paths.iter().any(|p| p == "/") {
                    vec![ContentSelector::plain("/", false)]
                } else {
                    paths.into_iter().map(|p| ContentSelector::plain(p, true)).collect()
                };
            }
        }
    }
    for mount in &op.mounts {
        if let Some(input) = mount.input
            && input as usize >= inputs
        {
            return Err(KeyError {
                op: "exec",
                reason: format!("mount {} uses input {input} of {inputs}", mount.dest),
            });
        }
    }
    Ok(key)
}

/// The selected path, absolute and clean.
fn selected(mount: &ExecMount) -> String {
    kiln_match::path::clean_str(&format!("/{}", mount.selector))
}

fn by_content(mount: &ExecMount) -> Result<bool, KeyError> {
    let allowed = mount.output_index().is_none() || mount.readonly || selected(mount) == "/";
    match mount.content_cache {
        MountContentCache::Off => Ok(false),
        MountContentCache::On if !allowed => Err(KeyError {
            op: "exec",
            reason: format!(
                "invalid mount cache content {}: a writable part of an input cannot be keyed by content",
                mount.dest
            ),
        }),
        MountContentCache::On => Ok(true),
        MountContentCache::Default => Ok(allowed && mount.dest != "/"),
    }
}

/// A root file system and nothing else: then mounts say nothing.
fn is_plain_root(mounts: &[ExecMount]) -> bool {
    let [m] = mounts else { return false };
    m.dest == "/"
        && m.mount_type == MountType::Bind
        && !m.readonly
        && m.cache.is_none()
        && m.ssh.is_none()
        && m.secret.is_none()
        && m.result_id.is_empty()
}

fn meta(meta: &ExecMeta) -> Json {
    Object::new()
        .texts("args", &meta.args)
        .texts("env", &meta.env)
        .text("cwd", &meta.cwd)
        .text("user", &meta.user)
        .list(
            "extraHosts",
            meta.extra_hosts
                .iter()
                .map(|h| Object::new().text("Host", &h.host).end()),
        )
        .text("hostname", &meta.hostname)
        .list(
            "ulimit",
            meta.ulimit.iter().map(|u| {
                Object::new()
                    .text("Name", &u.name)
                    .int("Soft", u.soft)
                    .int("Hard", u.hard)
                    .end()
            }),
        )
        .text("cgroupParent", &meta.cgroup_parent)
        .flag("removeMountStubsRecursive", meta.remove_mount_stubs_recursive)
        .list(
            "validExitCodes",
            meta.valid_exit_codes.iter().map(|c| c.to_string().into_bytes()),
        )
        .end()
}

fn mount(m: &ExecMount) -> Json {
    let cache = m.cache.as_ref().map(|c| {
        let by_place = c.id == m.dest || c.id.split_once('/').is_some_and(|(_, rest)| rest == m.dest);
        if c.sharing == CacheSharing::Shared && by_place {
            Object::new().text("ID", &c.id).int("sharing", c.sharing as i32).end()
        } else {
            Object::new().end()
        }
    });
    let secret = m
        .secret
        .as_ref()
        .map(|s| identified(&s.id, s.uid, s.gid, s.mode, s.optional));
    let ssh = m
        .ssh
        .as_ref()
        .map(|s| identified(&s.id, s.uid, s.gid, s.mode, s.optional));
    Object::new()
        .index("input", m.input)
        .text("dest", &m.dest)
        .index("output", m.output)
        .flag("readonly", m.readonly)
        .int("mountType", m.mount_type as i32)
        .opt(
            "TmpfsOpt",
            m.tmpfs.as_ref().map(|t| Object::new().int("size", t.size).end()),
        )
        .opt("cacheOpt", cache)
        .opt("secretOpt", secret)
        .opt("SSHOpt", ssh)
        .text("resultID", &m.result_id)
        .int("contentCache", m.content_cache as i32)
        .end()
}

fn identified(id: &str, uid: u32, gid: u32, mode: u32, optional: bool) -> Json {
    Object::new()
        .text("ID", id)
        .int("uid", uid)
        .int("gid", gid)
        .int("mode", mode)
        .flag("optional", optional)
        .end()
}
