//! Removing a whole tree.

use std::ffi::OsString;
use std::path::Path;

use rustix::fs::{AtFlags, Mode};
use rustix::io::Errno;

use crate::dir::Dir;
use crate::stop::Stop;
use crate::{Error, Result};

/// Directories deeper than this are first moved to the top, so that neither descriptors nor stack grow with the tree.
const MAX_OPEN: usize = 64;

struct Level {
    dir: Dir,
    name: OsString,
    left: Vec<(OsString, bool)>,
}

impl Level {
    fn open(parent: &Dir, name: OsString) -> Result<Option<Self>> {
        let mut opened = parent.child_dir(&name);
        if opened
            .as_ref()
            .is_err_and(|e| e.raw_os_error() == Some(Errno::ACCESS.raw_os_error()))
        {
            open_up(parent, &name);
            opened = parent.child_dir(&name);
        }
        let dir = match opened {
            Ok(dir) => dir,
            Err(e) if e.is_not_found() => return Ok(None),
            Err(e) => return Err(e),
        };
        let left = dir
            .entries()?
            .into_iter()
            .map(|e| (e.name, e.file_type.is_some_and(|t| t.is_dir())))
            .collect();
        Ok(Some(Level { dir, name, left }))
    }
}

/// Gives the owner all rights on a directory; a rootless daemon owns directories it may not enter otherwise.
fn open_up(parent: &Dir, name: &OsString) {
    // A failure shows in the call that is tried again.
    let _ = rustix::fs::chmodat(parent, name.as_os_str(), Mode::RWXU, AtFlags::empty());
}

/// Removes `name` directly below `parent`, with everything in it. Symbolic links are removed, never followed, and
/// permissions that stand in the way are lifted. That it does not exist is no error.
///
/// # Errors
/// The first entry that cannot be removed, or [`Error::Stopped`]; the rest of the tree is then still there.
pub fn remove_tree(parent: &Dir, name: impl AsRef<Path>, stop: &Stop) -> Result<()> {
    let name = name.as_ref().as_os_str().to_owned();
    match unlink(parent, &name, false) {
        Ok(()) => return Ok(()),
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(Error::io("remove", &name, e)),
    }
    let mut hoisted = 0u64;
    let mut stack = match Level::open(parent, name)? {
        Some(level) => vec![level],
        None => return Ok(()),
    };
    while let Some(level) = stack.last_mut() {
        stop.check()?;
        if let Some((name, is_dir)) = level.left.pop() {
            if !is_dir {
                match unlink(&level.dir, &name, false) {
                    Ok(()) | Err(Errno::NOENT) => continue,
                    Err(Errno::ISDIR) => {}
                    Err(Errno::ACCESS) => {
                        let _ = rustix::fs::fchmod(&level.dir, Mode::RWXU);
                        unlink(&level.dir, &name, false).map_err(|e| Error::io("remove", &name, e))?;
                        continue;
                    }
                    Err(e) => return Err(Error::io("remove", &name, e)),
                }
            }
            if stack.len() >= MAX_OPEN {
                hoist(&mut stack, name, &mut hoisted)?;
                continue;
            }
            let Some(level) = stack.last() else { break };
            if let Some(next) = Level::open(&level.dir, name)? {
                stack.push(next);
            }
        } else if let Some(done) = stack.pop() {
            let above = stack.last().map_or(parent, |level| &level.dir);
            let gone = match unlink(above, &done.name, true) {
                Err(Errno::ACCESS) => {
                    let _ = rustix::fs::fchmod(above, Mode::RWXU);
                    unlink(above, &done.name, true)
                }
                other => other,
            };
            match gone {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(Error::io("remove directory", &done.name, e)),
            }
        }
    }
    Ok(())
}

/// Moves directory `name` of the deepest level up into the topmost directory, to be removed from there.
fn hoist(stack: &mut [Level], name: OsString, counter: &mut u64) -> Result<()> {
    let (Some(top), Some(deep)) = (stack.first(), stack.last()) else {
        return Ok(());
    };
    loop {
        *counter += 1;
        let to = OsString::from(format!(".remove-{counter}"));
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(&deep.dir, &name, &top.dir, &to, flags) {
            Ok(()) => {
                if let Some(top) = stack.first_mut() {
                    top.left.push((to, true));
                }
                return Ok(());
            }
            Err(Errno::EXIST) => {}
            Err(e) => return Err(Error::io("move", &name, e)),
        }
    }
}

fn unlink(parent: &Dir, name: &OsString, dir: bool) -> rustix::io::Result<()> {
    let flags = if dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    rustix::fs::unlinkat(parent, name.as_os_str(), flags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn deep_wide_and_linked() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("outside"), "stays").unwrap();
        let root = Dir::open_ambient(tmp.path()).unwrap();
        root.create_dir("t", 0o755).unwrap();
        let mut dir = root.child_dir("t").unwrap();
        for i in 0..1500 {
            dir.create_dir("d", 0o755).unwrap();
            if i % 100 == 0 {
                dir.create_file("f", 0o644).unwrap();
            }
            dir = dir.child_dir("d").unwrap();
        }
        symlink("../outside", tmp.path().join("t/link")).unwrap();
        symlink("/", tmp.path().join("t/root")).unwrap();
        fs::create_dir(tmp.path().join("t/locked")).unwrap();
        fs::write(tmp.path().join("t/locked/f"), "").unwrap();
        fs::set_permissions(tmp.path().join("t/locked"), fs::Permissions::from_mode(0o000)).unwrap();
        remove_tree(&root, "t", &Stop::new()).unwrap();
        assert!(!tmp.path().join("t").exists());
        assert!(tmp.path().join("outside").exists());
        remove_tree(&root, "t", &Stop::new()).unwrap();
    }
}
