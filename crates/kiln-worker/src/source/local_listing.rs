//! What a client's directory held: kept between transfers, turned into a tree's entries, and hashed.

use std::fs;
use std::io;
use std::path::Path;

use bytes::Bytes;
use kiln_fs::{FileType, Timestamp, mode};
use kiln_oci::Digest;
use kiln_session::Entry as Listed;
use kiln_store::{Entry, Kind};
use serde::{Deserialize, Serialize};

/// Name of the file with the listing, in the context's state directory.
const FILE: &str = "listing";
/// First line of that file; another one is not read.
const FORMAT: &str = "kiln listing 1\n";

/// One entry as it is kept: short names, as there are many.
#[derive(Serialize, Deserialize)]
struct Kept {
    p: String,
    m: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    u: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    g: u32,
    #[serde(default, skip_serializing_if = "is_zero_u64")]
    s: u64,
    t: i64,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    l: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    v: Option<(u32, u32)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    x: Vec<(String, Vec<u8>)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    d: Option<Digest>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

fn is_zero_u64(n: &u64) -> bool {
    *n == 0
}

/// Takes the kept listing away and returns it; `None` if there is none that can be trusted.
pub(super) fn take(dir: &Path) -> Option<Vec<Listed>> {
    let path = dir.join(FILE);
    let bytes = fs::read(&path).ok()?;
    fs::remove_file(&path).ok()?;
    let text = bytes.strip_prefix(FORMAT.as_bytes())?;
    let (sum, body) = text.split_at_checked(71)?;
    if std::str::from_utf8(sum).ok()?.parse::<Digest>().ok()? != Digest::of(body) {
        return None;
    }
    let kept: Vec<Kept> = serde_json::from_slice(body).ok()?;
    Some(kept.into_iter().map(listed).collect())
}

/// Keeps a listing for the next transfer.
pub(super) fn keep(dir: &Path, listing: &[Listed]) -> io::Result<()> {
    let kept: Vec<Kept> = listing.iter().map(kept).collect();
    let body = serde_json::to_vec(&kept)?;
    let mut out = Vec::with_capacity(body.len() + 100);
    out.extend_from_slice(FORMAT.as_bytes());
    out.extend_from_slice(Digest::of(&body).to_string().as_bytes());
    out.extend_from_slice(&body);
    fs::create_dir_all(dir)?;
    let new = dir.join("listing.new");
    fs::write(&new, out)?;
    fs::rename(new, dir.join(FILE))
}

fn kept(e: &Listed) -> Kept {
    Kept {
        p: e.path.clone(),
        m: e.mode,
        u: e.uid,
        g: e.gid,
        s: e.size,
        t: e.mtime,
        l: e.linkname.clone(),
        v: (e.device != (0, 0)).then_some(e.device),
        x: e.xattrs
            .iter()
            .map(|(name, value)| (name.clone(), value.to_vec()))
            .collect(),
        d: e.digest.map(Digest::from_bytes),
    }
}

fn listed(k: Kept) -> Listed {
    Listed {
        path: k.p,
        mode: k.m,
        uid: k.u,
        gid: k.g,
        size: k.s,
        mtime: k.t,
        linkname: k.l,
        device: k.v.unwrap_or_default(),
        xattrs: k
            .x
            .into_iter()
            .map(|(name, value)| (name, Bytes::from(value)))
            .collect(),
        digest: k.d.map(|d| *d.as_bytes()),
    }
}

/// What stands before a file's bytes in its content digest (cache-keys.md §4.1).
pub(super) fn entry_prefix(e: &Listed) -> Vec<u8> {
    let mode = mode::from_go(e.mode) & 0o7777;
    let mut out = format!(
        "namemode{mode}uid{}gid{}size{}typeflag0linknameunamegnamedevmajor{}devminor{}",
        e.uid, e.gid, e.size, e.device.0, e.device.1
    )
    .into_bytes();
    for (name, value) in &e.xattrs {
        let counts = match name.split_once('.') {
            Some(("security", rest)) => rest == "capability",
            Some(("system", _)) => false,
            _ => true,
        };
        if counts {
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(value);
        }
    }
    out
}

/// The entries of the tree that a listing describes, and the content digests that are known, by path.
pub(super) fn store_entries(listing: &[Listed]) -> (Vec<Entry>, Vec<(Vec<u8>, Digest)>) {
    let mut entries = Vec::with_capacity(listing.len() + 1);
    let mut digests = Vec::new();
    let mut root = Entry::dir(*b"");
    root.mode = 0o755;
    entries.push(root);
    let mut groups: std::collections::HashMap<&str, u32> = std::collections::HashMap::new();
    let mut first_names: std::collections::HashMap<&str, usize> = std::collections::HashMap::new();
    for e in listing {
        let st_mode = mode::from_go(e.mode);
        let kind = Kind::from(FileType::from_st_mode(st_mode));
        let mut entry = Entry::new(e.path.as_bytes(), kind);
        entry.mode = st_mode & 0o7777;
        (entry.uid, entry.gid) = (e.uid, e.gid);
        entry.mtime = Timestamp::from_unix_nanos(e.mtime);
        entry.xattrs = e
            .xattrs
            .iter()
            .map(|(n, v)| (n.as_bytes().into(), v.as_ref().into()))
            .collect();
        match kind {
            Kind::Symlink => {
                entry.mode = 0o777;
                entry.target = e.linkname.as_bytes().into();
            }
            Kind::Regular => entry.size = e.size,
            _ => entry.rdev = packed_device(e.device),
        }
        if e.is_hard_link() {
            let next = u32::try_from(groups.len()).unwrap_or(u32::MAX - 1) + 1;
            let group = *groups.entry(e.linkname.as_str()).or_insert(next);
            entry.link_group = group;
            if let Some(first) = first_names.get(e.linkname.as_str()).and_then(|i| entries.get_mut(*i)) {
                first.link_group = group;
                entry.size = first.size;
            }
        }
        if let Some(digest) = e.digest {
            digests.push((e.path.clone().into_bytes(), Digest::from_bytes(digest)));
        }
        first_names.insert(e.path.as_str(), entries.len());
        entries.push(entry);
    }
    (entries, digests)
}

/// A device number as the kernel packs it.
fn packed_device((major, minor): (u32, u32)) -> u64 {
    let (major, minor) = (u64::from(major), u64::from(minor));
    (major & 0xffff_f000) << 32 | (major & 0xfff) << 8 | (minor & 0xffff_ff00) << 12 | (minor & 0xff)
}
