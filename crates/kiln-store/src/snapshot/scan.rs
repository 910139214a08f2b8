//! Reading an upper directory into entries: one walk, one `stat` and one attribute listing for each file.

use std::collections::HashMap;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use kiln_fs::xattr::{is_overlay_private, kept_in_tree};
use kiln_fs::{Dir, Stop};

use crate::error::{Result, StoreError};
use crate::manifest::{Entry, Kind, join};
use crate::tree::TreeBuilder;

/// Everything in the upper directory of `out`, the root first, otherwise in no particular order. Attributes of overlayfs'
/// own are removed from the files, except that opaque directories keep their mark and are noted as such.
///
/// # Errors
/// I/O errors, [`StoreError::Invalid`] for a path too long to be opened again, [`StoreError::Canceled`].
pub fn upper(out: &TreeBuilder, stop: &Stop) -> Result<Vec<Entry>> {
    let (fs, mark) = (out.fs(), out.overlay_xattr().opaque());
    let mut root = Entry::from_metadata(Vec::new(), &fs.self_metadata()?);
    attributes(fs, b"", mark, &mut root)?;
    let mut entries = vec![root];
    let mut groups = Groups::default();
    let mut todo = vec![(Vec::new(), fs.clone())];
    while let Some((path, dir)) = todo.pop() {
        for found in dir.entries()? {
            stop.check()?;
            let name = found.name.as_bytes();
            let here = join(&path, name);
            if here.len() > 4000 {
                let shown = String::from_utf8_lossy(&here).into_owned();
                return Err(StoreError::Invalid(format!(
                    "the step made a path of {} bytes, more than can be kept: {:.80}…",
                    here.len(),
                    shown
                )));
            }
            let md = dir.symlink_metadata(&found.name)?;
            if md.is_overlay_whiteout() {
                entries.push(Entry::whiteout(here));
                continue;
            }
            let mut entry = Entry::from_metadata(here, &md);
            attributes(&dir, name, mark, &mut entry)?;
            match entry.kind {
                Kind::Directory => todo.push((entry.path.to_vec(), Arc::new(dir.child_dir(&found.name)?))),
                _ if md.nlink > 1 => entry.link_group = groups.of(md.ino),
                _ => {}
            }
            if entry.kind == Kind::Symlink {
                entry.target = dir.read_link(&found.name)?.into_vec().into();
            }
            entries.push(entry);
        }
    }
    // A link count alone says nothing: the other names may be elsewhere.
    for entry in &mut entries {
        if entry.link_group != 0 && !groups.is_shared(entry.link_group) {
            entry.link_group = 0;
        }
    }
    Ok(entries)
}

/// Notes kept attributes and opaque marks; removes what overlayfs left behind.
fn attributes(dir: &Dir, name: &[u8], mark: &[u8], entry: &mut Entry) -> Result<()> {
    let name = crate::tree::os_path(name);
    let mut leftover = Vec::new();
    let found = dir.xattrs(name, |n| kept_in_tree(n) || is_overlay_private(n))?;
    for (attribute, value) in found {
        // Only the mark that the kernel heeds counts; a process may have set the other one.
        if &attribute[..] == mark && entry.kind == Kind::Directory && &value[..] == b"y" {
            entry.opaque = true;
        } else if is_overlay_private(&attribute) {
            leftover.push(attribute);
        } else {
            entry.xattrs.push((attribute, value));
        }
    }
    for attribute in leftover {
        dir.remove_xattr(name, &attribute)?;
    }
    Ok(())
}

#[derive(Default)]
struct Groups {
    by_inode: HashMap<u64, (u32, u32)>,
    shared: std::collections::HashSet<u32>,
}

impl Groups {
    fn of(&mut self, ino: u64) -> u32 {
        let next = self.by_inode.len() as u32 + 1;
        let (group, seen) = self.by_inode.entry(ino).or_insert((next, 0));
        *seen += 1;
        if *seen > 1 {
            self.shared.insert(*group);
        }
        *group
    }

    fn is_shared(&self, group: u32) -> bool {
        self.shared.contains(&group)
    }
}
