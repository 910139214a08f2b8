//! Plain copies of directories that are changed afterwards: a context of which a frozen version is in use.

use std::path::Path;

use kiln_fs::{Copier, Dir, FileType, Stop};

use crate::error::Result;

/// Copies a directory tree into the empty directory `target`, owners, modes, times and attributes included. Hard links
/// become files of their own.
pub(crate) fn copy_dir(source: &Path, target: &Path, stop: &Stop) -> Result<()> {
    let (from, to) = (Dir::open_ambient(source)?, Dir::open_ambient(target)?);
    copy_level(&from, &to, &Copier::new(), stop, 0)
}

/// Deeper directories than this are not copied: a client's tree has no honest reason for them.
const MAX_DEPTH: usize = 512;

fn copy_level(from: &Dir, to: &Dir, copier: &Copier, stop: &Stop, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(crate::StoreError::Invalid(format!(
            "a directory is nested more than {MAX_DEPTH} levels deep"
        )));
    }
    for entry in from.entries()? {
        stop.check()?;
        let name = Path::new(&entry.name);
        let md = from.symlink_metadata(name)?;
        match md.file_type {
            FileType::Directory => {
                to.create_dir(name, 0o700)?;
                copy_level(
                    &from.child_dir(&entry.name)?,
                    &to.child_dir(&entry.name)?,
                    copier,
                    stop,
                    depth + 1,
                )?;
            }
            FileType::Regular => {
                let file = to.create_file(name, 0o600)?;
                copier.copy(&from.open_regular(name)?, &file, stop)?;
            }
            FileType::Symlink => to.symlink(from.read_link(name)?, name)?,
            other => to.create_node(name, other, md.mode, md.rdev)?,
        }
        to.set_owner(name, md.uid, md.gid)?;
        if md.file_type != FileType::Symlink {
            to.set_mode(name, md.mode)?;
        }
        for (key, value) in from.xattrs(name, |_| true)? {
            to.set_xattr(name, &key, &value)?;
        }
        to.set_mtime(name, md.mtime)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_keep_metadata() {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
        let tmp = tempfile::tempdir().unwrap();
        let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
        std::fs::create_dir_all(a.join("d/e")).unwrap();
        std::fs::write(a.join("d/e/f"), "text").unwrap();
        std::fs::set_permissions(a.join("d/e/f"), std::fs::Permissions::from_mode(0o4750)).unwrap();
        std::os::unix::fs::symlink("/etc", a.join("d/link")).unwrap();
        std::fs::create_dir(&b).unwrap();
        copy_dir(&a, &b, &Stop::new()).unwrap();
        assert_eq!(std::fs::read_to_string(b.join("d/e/f")).unwrap(), "text");
        let (was, is) = (
            std::fs::metadata(a.join("d/e/f")).unwrap(),
            std::fs::metadata(b.join("d/e/f")).unwrap(),
        );
        assert_eq!(
            (was.mode(), was.mtime(), was.mtime_nsec()),
            (is.mode(), is.mtime(), is.mtime_nsec())
        );
        assert_eq!(
            std::fs::metadata(a.join("d")).unwrap().mtime_nsec(),
            std::fs::metadata(b.join("d")).unwrap().mtime_nsec()
        );
        assert_eq!(std::fs::read_link(b.join("d/link")).unwrap(), Path::new("/etc"));
    }
}
