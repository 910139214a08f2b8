//! Who a process runs as: `user` of the spec, looked up in the root's own `/etc/passwd` and `/etc/group`.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use crate::error::Step;
use crate::protocol::Failure;

/// Larger user files are refused.
const FILE_LIMIT: u64 = 10 * 1024 * 1024;
/// User and group ids above this are not valid.
const ID_LIMIT: u32 = i32::MAX as u32;

/// Result of a look-up.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups, without `gid`.
    pub(crate) groups: Vec<u32>,
    /// Home directory, `/` when the user has no entry.
    pub(crate) home: String,
}

/// Looks `user` up beneath `root`.
pub(crate) fn resolve(root: impl AsFd, user: &str) -> Result<Identity, Failure> {
    let root = root.as_fd();
    let passwd = read(root, "/etc/passwd")?;
    let group = if numeric_pair(user).is_some() {
        String::new()
    } else {
        read(root, "/etc/group")?
    };
    resolve_in(&passwd, &group, user)
}

/// Fails, in a user namespace, where the user or its group does not exist.
pub(crate) fn ensure_mapped(identity: &Identity) -> Result<(), Failure> {
    for (kind, what, id) in [("uid", "user", identity.uid), ("gid", "group", identity.gid)] {
        if !is_mapped(kind, id) {
            let text = format!("cannot become {what} {id}: it is not mapped in the daemon's user namespace");
            return Err(Failure::because(Step::User, text));
        }
    }
    Ok(())
}

/// The id (`kind` is `uid` or `gid`) exists in this user namespace.
pub(crate) fn is_mapped(kind: &str, id: u32) -> bool {
    let map = std::fs::read_to_string(format!("/proc/self/{kind}_map")).unwrap_or_default();
    map.lines().any(|line| {
        let mut fields = line.split_whitespace().filter_map(|f| f.parse::<u32>().ok());
        match (fields.next(), fields.nth(1)) {
            (Some(first), Some(count)) => id >= first && id - first < count,
            _ => false,
        }
    })
}

fn read(root: impl AsFd, path: &str) -> Result<String, Failure> {
    let Ok(fd) = super::walk::open_file_in_root(root, path) else {
        return Ok(String::new());
    };
    let mut bytes = Vec::new();
    let n = File::from(fd)
        .take(FILE_LIMIT + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Failure::because(Step::User, format!("cannot read {path}: {e}")))?;
    if n as u64 > FILE_LIMIT {
        return Err(Failure::because(Step::User, format!("{path} is larger than 10 MiB")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn numeric_pair(user: &str) -> Option<(u32, u32)> {
    let (uid, gid) = user.split_once(':')?;
    Some((number(uid)?, number(gid)?))
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= ID_LIMIT)
}

fn resolve_in(passwd: &str, group: &str, user: &str) -> Result<Identity, Failure> {
    let home_of = |uid: u32| {
        users(passwd)
            .find(|u| u.uid == uid)
            .map(|u| u.home.to_owned())
            .filter(|h| !h.is_empty())
            .unwrap_or_else(|| "/".to_owned())
    };
    if let Some((uid, gid)) = numeric_pair(user) {
        return Ok(Identity {
            uid,
            gid,
            groups: Vec::new(),
            home: home_of(uid),
        });
    }
    let (name, group_name) = match user.split_once(':') {
        Some((name, group)) => (name, group),
        None => (user, ""),
    };
    let name = if name.is_empty() { "0" } else { name };
    let id = name.parse::<u32>().ok();
    let entry = users(passwd).find(|u| u.name == name || Some(u.uid) == id);
    let (uid, mut gid, member) = match (&entry, id) {
        (Some(entry), _) => (entry.uid, entry.gid, Some(entry.name)),
        (None, Some(id)) if id <= ID_LIMIT => (id, 0, None),
        (None, Some(_)) => {
            return Err(Failure::because(
                Step::User,
                format!("unable to find user {name}: id out of range"),
            ));
        }
        (None, None) => {
            let text = format!("unable to find user {name}: no matching entries in passwd file");
            return Err(Failure::because(Step::User, text));
        }
    };
    let mut supplementary = Vec::new();
    if group_name.is_empty() {
        if let Some(member) = member {
            supplementary = groups(group)
                .filter(|g| g.members().any(|m| m == member))
                .map(|g| g.gid)
                .collect();
            supplementary.retain(|g| *g != gid);
            supplementary.dedup();
        }
    } else {
        let id = group_name.parse::<u32>().ok();
        let found = groups(group).find(|g| match id {
            Some(id) => g.gid == id,
            None => g.name == group_name,
        });
        gid = match (found, id) {
            (Some(found), _) => found.gid,
            (None, Some(id)) if id <= ID_LIMIT => id,
            _ => {
                let text = format!("unable to find group {group_name}: no matching entries in group file");
                return Err(Failure::because(Step::User, text));
            }
        };
    }
    Ok(Identity {
        uid,
        gid,
        groups: supplementary,
        home: home_of(uid),
    })
}

struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn users(passwd: &str) -> impl Iterator<Item = User<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let home = fields.nth(1).unwrap_or("");
        (!name.is_empty()).then_some(User { name, uid, gid, home })
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn members(&self) -> impl Iterator<Item = &'a str> {
        self.members.split(',').map(str::trim)
    }
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let gid = fields.next()?.parse().ok()?;
        Some(Group {
            name,
            gid,
            members: fields.next().unwrap_or(""),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/sh\nbad line\n# comment\n";
    const GROUP: &str = "root:x:0:root\nbin:x:1:root,bin\nnode:x:1000:\nvideo:x:44:node,root\n";

    fn id(user: &str) -> Result<Identity, String> {
        resolve_in(PASSWD, GROUP, user).map_err(|f| f.detail)
    }

    fn who(uid: u32, gid: u32, groups: &[u32], home: &str) -> Result<Identity, String> {
        Ok(Identity {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        })
    }

    #[test]
    fn forms_of_user() {
        assert_eq!(id(""), who(0, 0, &[1, 44], "/root"));
        assert_eq!(id("node"), who(1000, 1000, &[44], "/home/node"));
        assert_eq!(id("1000"), who(1000, 1000, &[44], "/home/node"));
        assert_eq!(id("1000:1000"), who(1000, 1000, &[], "/home/node"));
        assert_eq!(id("4711"), who(4711, 0, &[], "/"));
        assert_eq!(id("node:video"), who(1000, 44, &[], "/home/node"));
        assert_eq!(id("node:7"), who(1000, 7, &[], "/home/node"));
        assert_eq!(id("5:6"), who(5, 6, &[], "/"));
    }

    #[test]
    fn unknown_names_are_named() {
        assert_eq!(
            id("nobody").unwrap_err(),
            "unable to find user nobody: no matching entries in passwd file"
        );
        assert_eq!(
            id("node:x").unwrap_err(),
            "unable to find group x: no matching entries in group file"
        );
        assert!(id("4294967295").is_err());
    }
}
