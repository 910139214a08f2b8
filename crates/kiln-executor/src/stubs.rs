//! Mount targets that were made only so that something could be mounted on them, and how they are removed again.

use std::io;
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, fstat, futimens, open, openat2, statat,
    unlinkat,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// A mount target (or one of its parents) that was missing in the root and had to be created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stub {
    /// Path inside the root, symlinks resolved, without leading slash.
    pub path: String,
    /// The mount target itself, or one of its missing parents.
    pub is_target: bool,
    /// Times of the directory that contains it, before and after the creation of stubs; `None` if that is a stub as well.
    pub parent: Option<ParentTimes>,
}

/// Times of a directory around the creation of a stub in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentTimes {
    /// Access time before, seconds and nanoseconds.
    pub atime: (i64, u32),
    /// Modification time before.
    pub mtime: (i64, u32),
    /// Modification time when all mounts were made: if it is still this, only the stubs changed the directory.
    pub mtime_after: (i64, u32),
}

/// Removes stubs that are still as empty as they were made, and gives the directories around them their times back.
///
/// `writable` is the directory that received the process's writes ([`RootMount::writable_dir`](crate::RootMount::writable_dir));
/// the process must be dead. A stub that got content stays. With `recursive` the parents that had to be made go as well, if
/// they are empty; without it only the targets.
///
/// The times of a directory go back to what they were before if nothing but stubs changed it; otherwise they stay as the
/// process left them: the removal itself never shows.
pub fn clean_stubs(writable: &Path, stubs: &[Stub], recursive: bool) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(writable, flags, Mode::empty())?;
    for stub in stubs.iter().filter(|s| s.is_target || recursive) {
        let (parent, name) = stub.path.rsplit_once('/').unwrap_or((".", &stub.path));
        // The process may have replaced any of it: what is not a plain path any more is left alone.
        let beneath = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        let Ok(dir) = openat2(
            &root,
            parent,
            OFlags::RDONLY | flags.difference(OFlags::PATH),
            Mode::empty(),
            beneath,
        ) else {
            continue;
        };
        let Ok(stat) = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        let before = fstat(&dir)?;
        let removed = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => unlinkat(&dir, name, AtFlags::REMOVEDIR),
            FileType::RegularFile if stat.st_size == 0 => unlinkat(&dir, name, AtFlags::empty()),
            _ => continue,
        };
        match removed {
            Ok(()) => {}
            Err(Errno::NOTEMPTY | Errno::NOENT) => continue,
            Err(e) => return Err(e.into()),
        }
        let left = (
            (before.st_atime, before.st_atime_nsec as u32),
            (before.st_mtime, before.st_mtime_nsec as u32),
        );
        let (atime, mtime) = match stub.parent {
            // Several stubs of one directory: the first removal has set the old times already.
            Some(times) if left.1 == times.mtime_after || left.1 == times.mtime => (times.atime, times.mtime),
            _ => left,
        };
        let time = |(seconds, nanos): (i64, u32)| Timespec {
            tv_sec: seconds,
            tv_nsec: i64::from(nanos),
        };
        futimens(
            &dir,
            &Timestamps {
                last_access: time(atime),
                last_modification: time(mtime),
            },
        )?;
    }
    Ok(())
}
