//! Rootless operation: an ordinary user's daemon makes itself root of a user namespace of its own (`user_namespaces(7)`).
//!
//! With subordinate ids (`subuid(5)`) and the helpers `newuidmap` and `newgidmap` many ids are mapped, so that images with
//! several owners work. Without them only the user's own id is mapped, as root.

use std::ffi::CStr;
use std::fs;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::sys::{self, Forked};

/// Which ids exist in the daemon's user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdMapping {
    /// The daemon was root already: nothing was changed.
    Unchanged,
    /// The user is root, and so many further ids are mapped to subordinate ones.
    Subordinate {
        /// Number of user ids.
        uids: u64,
        /// Number of group ids.
        gids: u64,
    },
    /// Only the user is mapped, as root.
    Single {
        /// Why there are no more.
        reason: String,
    },
}

impl IdMapping {
    /// What the operator should know, if anything: a single id has its price.
    pub fn notice(&self) -> Option<String> {
        let IdMapping::Single { reason } = self else {
            return None;
        };
        Some(format!(
            "running with a single user id ({reason}): steps can only run as root, changing owners fails, and images whose \
             files belong to several users lose those owners; give the user ranges in /etc/subuid and /etc/subgid and install \
             newuidmap and newgidmap"
        ))
    }
}

/// The user namespace could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot run without root privileges: {attempt}")]
pub struct UserNamespaceError {
    /// What was attempted.
    attempt: String,
    /// Why it failed.
    #[source]
    source: io::Error,
}

fn failed(attempt: impl Into<String>) -> impl FnOnce(io::Error) -> UserNamespaceError {
    let attempt = attempt.into();
    move |source| UserNamespaceError { attempt, source }
}

/// Makes an ordinary user's process root of a new user and mount namespace; does nothing for root.
///
/// Comes right after [`maybe_init`](crate::maybe_init), before any thread is started. No process stays behind to hold the
/// namespace: it lives as long as the daemon and its steps.
pub fn enter_user_namespace() -> Result<IdMapping, UserNamespaceError> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if uid == 0 {
        return Ok(IdMapping::Unchanged);
    }
    let ranges = subordinate_ranges(uid);
    let helper = match ranges {
        Ok((uids, gids)) => map_with_helpers(uid, gid, &uids, &gids)?,
        Err(reason) => Err(reason),
    };
    let mapping = match helper {
        Ok(mapping) => mapping,
        Err(reason) => {
            map_self(uid, gid)?;
            IdMapping::Single { reason }
        }
    };
    if rustix::process::geteuid().as_raw() != 0 {
        return Err(failed("become root of the user namespace")(io::Error::other(
            "the user is not mapped",
        )));
    }
    Ok(mapping)
}

fn enter() -> Result<(), UserNamespaceError> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).map_err(|e| {
        let hint = "make a user namespace (is kernel.unprivileged_userns_clone or an AppArmor restriction in the way?)";
        failed(hint)(e.into())
    })
}

/// A range of subordinate ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: u32,
    count: u32,
}

fn subordinate_ranges(uid: u32) -> Result<(Vec<Range>, Vec<Range>), String> {
    let name = user_name(uid).ok_or_else(|| format!("user {uid} has no name"))?;
    let read = |file: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let found = parse_ranges(&text, &name, uid);
        if found.is_empty() {
            Err(format!("{name} has no range in {file}"))
        } else {
            Ok(found)
        }
    };
    Ok((read("/etc/subuid")?, read("/etc/subgid")?))
}

fn user_name(uid: u32) -> Option<String> {
    nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid))
        .ok()
        .flatten()
        .map(|u| u.name)
}

fn parse_ranges(text: &str, name: &str, uid: u32) -> Vec<Range> {
    let own = |who: &str| who == name || who.parse() == Ok(uid);
    text.lines()
        .filter_map(|line| {
            let mut fields = line.trim().split(':');
            let who = fields.next()?;
            let range = Range {
                first: fields.next()?.parse().ok()?,
                count: fields.next()?.parse().ok()?,
            };
            (own(who) && range.count > 0).then_some(range)
        })
        .collect()
}

/// Arguments of `newuidmap`: inside, outside, count; the user itself is 0, the ranges follow from 1 on.
fn map_arguments(own: u32, ranges: &[Range]) -> Vec<String> {
    let mut out = vec!["0".to_owned(), own.to_string(), "1".to_owned()];
    let mut inside = 1u64;
    for range in ranges {
        out.extend([inside.to_string(), range.first.to_string(), range.count.to_string()]);
        inside += u64::from(range.count);
    }
    out
}

/// Enters the namespace while a child that stays outside calls the helpers. The inner error is a reason to go on with one id.
fn map_with_helpers(
    uid: u32,
    gid: u32,
    uids: &[Range],
    gids: &[Range],
) -> Result<Result<IdMapping, String>, UserNamespaceError> {
    let target = std::process::id().to_string();
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed("make a pipe")(e.into()));
    let ((go_read, go_write), (answer_read, answer_write)) = (pipe()?, pipe()?);
    match sys::fork_into(0, None, false).map_err(failed("fork"))? {
        Forked::Child => {
            drop((go_write, answer_read));
            let mut byte = [0];
            let entered = rustix::io::retry_on_intr(|| rustix::io::read(&go_read, &mut byte));
            if entered == Ok(1) {
                let text = [(c"newuidmap", uid, uids), (c"newgidmap", gid, gids)]
                    .into_iter()
                    .find_map(|(helper, own, ranges)| call_helper(helper, &target, &map_arguments(own, ranges)).err())
                    .unwrap_or_else(|| "ok".to_owned());
                let _ = rustix::io::write(&answer_write, text.as_bytes());
            }
            sys::exit_now(0)
        }
        Forked::Parent { pid, .. } => {
            drop((go_read, answer_write));
            enter()?;
            fs::File::from(go_write)
                .write_all(b"x")
                .map_err(failed("call newuidmap"))?;
            let mut text = String::new();
            fs::File::from(answer_read)
                .read_to_string(&mut text)
                .map_err(failed("call newuidmap"))?;
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
            let count = |ranges: &[Range]| 1 + ranges.iter().map(|r| u64::from(r.count)).sum::<u64>();
            if text == "ok" {
                return Ok(Ok(IdMapping::Subordinate {
                    uids: count(uids),
                    gids: count(gids),
                }));
            }
            let mapped = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
            if !mapped.trim().is_empty() {
                return Err(failed("map group ids")(io::Error::other(text)));
            }
            write_single_maps(uid, gid)?;
            Ok(Ok(IdMapping::Single { reason: text }))
        }
    }
}

fn call_helper(helper: &CStr, target: &str, arguments: &[String]) -> Result<(), String> {
    let name = helper.to_string_lossy();
    let done = Command::new(&*name)
        .arg(target)
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    match done {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{name} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(e) => Err(format!("{name}: {e}")),
    }
}

fn map_self(uid: u32, gid: u32) -> Result<(), UserNamespaceError> {
    enter()?;
    write_single_maps(uid, gid)
}

fn write_single_maps(uid: u32, gid: u32) -> Result<(), UserNamespaceError> {
    // Without privileges outside, a group map may be written only once setgroups(2) is given up.
    for (file, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ] {
        fs::write(file, text).map_err(failed(format!("write {file}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_by_name_and_number() {
        let text = "other:1:2\nme:100000:65536\n1000:300000:10\nbroken\nme:5:0\n";
        let found = parse_ranges(text, "me", 1000);
        assert_eq!(
            found,
            [
                Range {
                    first: 100_000,
                    count: 65536
                },
                Range {
                    first: 300_000,
                    count: 10
                }
            ]
        );
        assert_eq!(
            map_arguments(1000, &found),
            ["0", "1000", "1", "1", "100000", "65536", "65537", "300000", "10"]
        );
    }

    #[test]
    fn single_id_says_what_it_costs() {
        let notice = IdMapping::Single {
            reason: "me has no range in /etc/subuid".into(),
        }
        .notice()
        .unwrap();
        assert!(notice.contains("no range in /etc/subuid") && notice.contains("newuidmap"));
        assert_eq!(IdMapping::Subordinate { uids: 2, gids: 2 }.notice(), None);
    }
}
