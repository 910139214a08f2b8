//! The common end of every tree that is written over a view.

use std::collections::HashSet;

use kiln_fs::Stop;

use crate::error::{Result, StoreError};
use crate::files::finish_dirs;
use crate::layer::diff::spelled_out_whiteouts;
use crate::manifest::{Entry, Kind, Manifest, parent};
use crate::tree::{Tree, TreeBuilder, os_path};
use crate::union::copied_xattrs;
use crate::view::{Node, View};

/// The common end of every tree written over a view: opaque directories are spelled out, entries that equal what is below
/// are noted, directories get their metadata if `finish_with` threads are given, and the manifest is written.
pub(crate) fn seal_entries(
    below: &View,
    out: TreeBuilder,
    entries: Vec<Entry>,
    finish_with: Option<usize>,
    stop: &Stop,
) -> Result<Tree> {
    let manifest = Manifest::new(entries)?;
    let hidden = spelled_out_whiteouts(&manifest, below);
    let mut entries = manifest.into_entries();
    let was_opaque: Vec<Vec<u8>> = entries.iter().filter(|e| e.opaque).map(|e| e.path.to_vec()).collect();
    for path in &hidden {
        stop.check()?;
        out.put_whiteout(path)?;
        entries.push(Entry::whiteout(path.clone()));
    }
    for path in was_opaque {
        // Marked on disk only where a mounted overlay did it; the attribute goes, the whiteouts stay.
        out.fs().remove_xattr(os_path(&path), out.overlay_xattr().opaque())?;
    }
    let mut touched: HashSet<Vec<u8>> = hidden.iter().map(|p| parent(p).to_vec()).collect();
    let mut kept = Vec::with_capacity(entries.len());
    for mut entry in entries {
        stop.check()?;
        entry.opaque = false;
        if entry.kind != Kind::Whiteout && !entry.path.is_empty() {
            let node = below.lookup(&entry.path);
            entry.unchanged = match &node {
                Some(node) => same_as_below(&out, &entry, below, node, stop)?,
                None => false,
            };
            let xattrs = |e: &Entry| copied_xattrs(&e.xattrs);
            if entry.unchanged
                && !entry.kind.is_dir()
                && node.is_some_and(|n| xattrs(below.entry(&n)) == xattrs(&entry))
            {
                // A file copied up and not changed. In another stack (MergeOp) it would hide what is there.
                out.fs().remove_file(os_path(&entry.path))?;
                touched.insert(parent(&entry.path).to_vec());
                continue;
            }
        }
        kept.push(entry);
    }
    let entries = kept;
    // Directories in which something was added or removed here have other times now, so metadata comes last.
    let dirs: Vec<&Entry> = entries
        .iter()
        .filter(|e| e.kind.is_dir() && (finish_with.is_some() || touched.contains(&e.path[..])))
        .collect();
    finish_dirs(&out, &dirs, finish_with.unwrap_or(1), stop)?;
    out.finish(entries)
}

/// Whether an entry of a new tree is what the layers below show anyway: same kind, mode, owner, device, link text and
/// capabilities; for files also size, time and content. Times of directories do not count.
fn same_as_below(out: &TreeBuilder, entry: &Entry, below: &View, node: &Node, stop: &Stop) -> Result<bool> {
    use kiln_fs::xattr::SECURITY_CAPABILITY;
    let other = below.entry(node);
    let same = entry.kind == other.kind
        && (entry.mode, entry.uid, entry.gid, entry.rdev) == (other.mode, other.uid, other.gid, other.rdev)
        && entry.xattr(SECURITY_CAPABILITY) == other.xattr(SECURITY_CAPABILITY);
    if !same || entry.kind.is_dir() {
        return Ok(same);
    }
    if entry.mtime != other.mtime || entry.size != other.size || entry.target != other.target {
        return Ok(false);
    }
    if entry.kind != Kind::Regular || entry.size == 0 {
        return Ok(true);
    }
    let mine = out.fs().open_regular(os_path(&entry.path))?;
    same_content(&mine, &below.open(node)?, stop)
}

pub(crate) fn same_content(a: &std::fs::File, b: &std::fs::File, stop: &Stop) -> Result<bool> {
    use std::os::unix::fs::FileExt;
    let (mut x, mut y) = (vec![0u8; 128 << 10], vec![0u8; 128 << 10]);
    let full = |f: &std::fs::File, buf: &mut [u8], at: u64| -> Result<usize> {
        let mut n = 0;
        while let Some(rest) = buf.get_mut(n..).filter(|r| !r.is_empty()) {
            match f.read_at(rest, at + n as u64) {
                Ok(0) => break,
                Ok(k) => n += k,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(StoreError::io("read", "compared file", e)),
            }
        }
        Ok(n)
    };
    let mut at = 0;
    loop {
        stop.check()?;
        let (n, m) = (full(a, &mut x, at)?, full(b, &mut y, at)?);
        if n != m || x.get(..n) != y.get(..m) {
            return Ok(false);
        }
        if n < x.len() {
            return Ok(true);
        }
        at += n as u64;
    }
}
