//! Which capabilities a source's attributes need.

use std::collections::BTreeSet;

use crate::op::SourceOp;

/// Scheme, and capability it needs.
const SCHEMES: &[(&str, &str)] = &[
    ("docker-image", "source.image"),
    ("oci-layout", "source.ocilayout"),
    ("local", "source.local"),
    ("git", "source.git"),
    ("http", "source.http"),
    ("https", "source.http"),
];

/// Attribute, and capability it needs.
const ATTRS: &[(&str, &str)] = &[
    ("image.layerlimit", "source.image.layerlimit"),
    ("image.checksum", "source.image.checksum"),
    ("local.session", "source.local.sessionid"),
    ("local.unique", "source.local.unique"),
    ("local.includepattern", "source.local.includepatterns"),
    ("local.followpaths", "source.local.followpaths"),
    ("local.excludepatterns", "source.local.excludepatterns"),
    ("local.sharedkeyhint", "source.local.sharedkeyhint"),
    ("local.metadatatransfer", "source.local.metadatatransfer"),
    ("git.keepgitdir", "source.git.keepgitdir"),
    ("git.fullurl", "source.git.fullurl"),
    ("git.knownsshhosts", "source.git.knownsshhosts"),
    ("git.mountsshsock", "source.git.mountsshsock"),
    ("git.checksum", "source.git.checksum"),
    ("git.skipsubmodules", "source.git.skipsubmodules"),
    ("git.mtime", "source.git.mtime"),
    ("git.fetchbycommit", "source.git.fetchbycommit"),
    ("http.checksum", "source.http.checksum"),
    ("http.perm", "source.http.perm"),
    ("http.uid", "soruce.http.uidgid"),
    ("http.gid", "soruce.http.uidgid"),
    ("http.authheadersecret", "source.http.auth"),
];

/// Adds what `op` needs to `caps`. Only a forced pull is required of the daemon; the other resolve modes and the way contexts
/// are compared are wishes.
pub(crate) fn add(op: &SourceOp, caps: &mut BTreeSet<String>) {
    let mut need = |cap: &str| {
        caps.insert(cap.to_owned());
    };
    for (_, cap) in SCHEMES.iter().filter(|(scheme, _)| *scheme == op.scheme()) {
        need(cap);
    }
    for (_, cap) in ATTRS.iter().filter(|(name, _)| op.attrs.contains_key(*name)) {
        need(cap);
    }
    if op.attr("image.resolvemode") == Some("pull") {
        need("source.image.resolvemode");
    }
    if op.attrs.contains_key("git.mountsshsock") {
        need("source.git.knownsshhosts");
    }
}
