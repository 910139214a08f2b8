//! Between a snapshot of the store and a mount: its directories before, its manifest after.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use kiln_executor::{Overlay, OverlayWritable};
use kiln_fs::xattr::kept_in_tree;
use kiln_fs::{Dir, Metadata};
use kiln_store::tree::FS;
use kiln_store::{ActiveSnapshot, Entry, Kind, Node, Stop, StoreError, View};

/// The overlay that a process writes into: the upper directory looks like the root below it.
pub(crate) fn mount_overlay(snapshot: &ActiveSnapshot) -> Result<Overlay, StoreError> {
    let builder = snapshot.builder()?;
    let base = snapshot.base();
    if let Some(root) = base.root() {
        let entry = base.entry(&root);
        let fs = builder.fs();
        fs.set_owner(".", entry.uid, entry.gid)?;
        fs.set_mode(".", entry.mode)?;
        for (name, value) in &entry.xattrs {
            fs.set_xattr(".", name, value)?;
        }
        fs.set_mtime(".", entry.mtime)?;
    }
    let work = snapshot.dir().join("work");
    std::fs::create_dir(&work).map_err(|source| StoreError::Io { action: "create", path: work.clone(), source })?;
    Ok(Overlay { lowers: lowers(base), writable: Some(OverlayWritable { upper: builder.fs_path(), work }) })
}

/// Directories of a view, top first.
pub(crate) fn lowers(view: &View) -> Vec<PathBuf> {
    view.trees().iter().rev().map(|t| t.fs_path().to_owned()).collect()
}

/// Writes the manifest of what a process left in the snapshot.
pub(crate) fn seal(snapshot: &ActiveSnapshot, stop: &Stop) -> Result<(), StoreError> {
    let builder = snapshot.builder()?;
    let opaque = builder.overlay_xattr().opaque();
    let base = snapshot.base();
    let mut entries = Vec::new();
    let mut links: HashMap<(u64, u64), u32> = HashMap::new();
    let root = builder.fs().self_metadata()?;
    let lower_root = base.root();
    entries.push(entry(builder.fs(), b"", Path::new("."), &root, base, lower_root.as_ref(), opaque, &mut links)?);
    let mut stack = vec![(Vec::new(), builder.fs().try_clone()?, lower_root)];
    while let Some((path, dir, below)) = stack.pop() {
        for found in dir.entries()? {
            if stop.is_stopped() {
                return Err(StoreError::Canceled);
            }
            let name = found.name.as_encoded_bytes();
            let mut child = path.clone();
            if !child.is_empty() {
                child.push(b'/');
            }
            child.extend_from_slice(name);
            let metadata = dir.symlink_metadata(&found.name)?;
            let lower = below.as_ref().and_then(|b| base.child(b, name));
            let made = entry(&dir, &child, Path::new(&found.name), &metadata, base, lower.as_ref(), opaque, &mut links)?;
            if metadata.file_type.is_dir() {
                let lower = lower.filter(|_| !made.opaque);
                stack.push((child, dir.child_dir(&found.name)?, lower));
            }
            entries.push(made);
        }
    }
    builder.finish(entries)?;
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "one place of two trees, and what is noted about it")]
fn entry(
    dir: &Dir,
    path: &[u8],
    name: &Path,
    metadata: &Metadata,
    base: &View,
    lower: Option<&Node>,
    opaque: &[u8],
    links: &mut HashMap<(u64, u64), u32>,
) -> Result<Entry, StoreError> {
    if metadata.is_overlay_whiteout() {
        return Ok(Entry::whiteout(path));
    }
    let mut made = Entry::from_metadata(path, metadata);
    made.xattrs = dir.xattrs(name, kept_in_tree)?;
    match made.kind {
        Kind::Symlink => made.target = dir.read_link(name)?.into_encoded_bytes().into(),
        Kind::Directory => {
            let marks = dir.xattrs(name, |n| n == opaque)?;
            made.opaque = marks.iter().any(|(_, value)| &value[..] == b"y");
        }
        _ if metadata.nlink > 1 => {
            let next = u32::try_from(links.len() + 1).unwrap_or(u32::MAX);
            made.link_group = *links.entry((metadata.dev, metadata.ino)).or_insert(next);
        }
        _ => {}
    }
    if let Some(lower) = lower {
        let below = base.entry(lower);
        let same = (below.kind, below.mode, below.uid, below.gid, below.mtime, &below.xattrs)
            == (made.kind, made.mode, made.uid, made.gid, made.mtime, &made.xattrs);
        made.unchanged = same && made.kind == Kind::Directory && !made.opaque;
    }
    Ok(made)
}

/// The snapshot's files.
pub(crate) fn files(snapshot: &ActiveSnapshot) -> PathBuf {
    snapshot.dir().join(FS)
}
