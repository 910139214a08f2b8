//! Paths inside a root that may be hostile: resolved beneath a directory descriptor by the kernel (`openat2(2)`,
//! `RESOLVE_IN_ROOT`), created step by step where asked, symlinks never leading out.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2, readlinkat};
use rustix::io::Errno;

use crate::stubs::{ParentTimes, Stub};

/// What to do when the path is missing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    /// Fail with `ENOENT`.
    Nothing,
    /// Create a directory (0755) and missing parents.
    Dir,
    /// Create an empty file (0644) and missing parents.
    File,
}

const SYMLINK_LIMIT: usize = 40;
const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Opens `path` inside `root` as a path descriptor.
pub(crate) fn open_in_root(root: impl AsFd, path: &str) -> Result<OwnedFd, Errno> {
    openat2(
        root,
        relative(path),
        PATH_ONLY,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Opens a regular file inside `root` for reading.
pub(crate) fn open_file_in_root(root: impl AsFd, path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(root, relative(path), flags, Mode::empty(), resolve)?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    Ok(file)
}

/// Opens `path` inside `root`, creating what is missing; new directories get `owner`.
pub(crate) fn reach(root: impl AsFd, path: &str, make: Make, owner: Option<(u32, u32)>) -> Result<OwnedFd, Errno> {
    let root = root.as_fd();
    match open_in_root(root, path) {
        Err(Errno::NOENT) if make != Make::Nothing => {}
        other => return other,
    }
    let walked = walk(root, path)?;
    let mut dir = walked.fd;
    let count = walked.missing.len();
    for (i, name) in walked.missing.iter().enumerate() {
        let last = i + 1 == count;
        if last && make == Make::File {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(&dir, name.as_str(), flags, Mode::from_raw_mode(0o644))?;
        } else {
            match mkdirat(&dir, name.as_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) => {}
                // Someone else who shares this directory (a cache mount) was quicker.
                Err(Errno::EXIST) => {}
                Err(e) => return Err(e),
            }
        }
        let next = openat(&dir, name.as_str(), PATH_ONLY | OFlags::NOFOLLOW, Mode::empty())?;
        if let Some((uid, gid)) = owner {
            let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
            rustix::fs::chownat(&next, "", Some(uid), Some(gid), rustix::fs::AtFlags::EMPTY_PATH)?;
        }
        dir = next;
    }
    Ok(dir)
}

/// How far a path exists.
struct Walked {
    /// Deepest existing part.
    fd: OwnedFd,
    /// Its path in the root, without leading slash.
    path: Vec<String>,
    /// Names that follow and do not exist.
    missing: Vec<String>,
}

/// Resolves as much of `path` as exists, following symlinks (dangling ones too: their target counts as missing).
fn walk(root: BorrowedFd<'_>, path: &str) -> Result<Walked, Errno> {
    let mut rest: VecDeque<String> = components(path);
    let mut done: Vec<String> = Vec::new();
    let mut missing: Vec<String> = Vec::new();
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            if missing.pop().is_none() {
                done.pop();
            }
            continue;
        }
        if !missing.is_empty() {
            missing.push(name);
            continue;
        }
        let parent = open_exact(root, &done)?;
        match openat(&parent, name.as_str(), PATH_ONLY | OFlags::NOFOLLOW, Mode::empty()) {
            Err(Errno::NOENT) => missing.push(name),
            Err(e) => return Err(e),
            Ok(found) => {
                if FileType::from_raw_mode(fstat(&found)?.st_mode) == FileType::Symlink {
                    links += 1;
                    if links > SYMLINK_LIMIT {
                        return Err(Errno::LOOP);
                    }
                    let target = readlinkat(&found, "", Vec::new())?;
                    let target = target.to_str().map_err(|_| Errno::ILSEQ)?;
                    if target.starts_with('/') {
                        done.clear();
                    }
                    for part in components(target).into_iter().rev() {
                        rest.push_front(part);
                    }
                } else {
                    done.push(name);
                }
            }
        }
    }
    Ok(Walked {
        fd: open_exact(root, &done)?,
        path: done,
        missing,
    })
}

fn open_exact(root: BorrowedFd<'_>, parts: &[String]) -> Result<OwnedFd, Errno> {
    let path = if parts.is_empty() {
        ".".to_owned()
    } else {
        parts.join("/")
    };
    openat2(
        root,
        path,
        PATH_ONLY,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS,
    )
}

fn components(path: &str) -> VecDeque<String> {
    path.split('/')
        .filter(|c| !c.is_empty() && *c != ".")
        .map(str::to_owned)
        .collect()
}

fn relative(path: &str) -> &str {
    let path = path.trim_start_matches('/');
    if path.is_empty() { "." } else { path }
}

/// Notes which mount targets are missing, before anything is created.
#[derive(Default)]
pub(crate) struct StubScan {
    stubs: Vec<Stub>,
    /// For each stub with a parent, that directory.
    parents: Vec<Option<OwnedFd>>,
}

impl StubScan {
    /// Notes `dest`, should it be missing.
    pub(crate) fn note(&mut self, root: impl AsFd, dest: &str) {
        let Ok(walked) = walk(root.as_fd(), dest) else { return };
        let count = walked.missing.len();
        for depth in (0..count).rev() {
            let mut parts = walked.path.clone();
            parts.extend(walked.missing.iter().take(depth + 1).cloned());
            let path = parts.join("/");
            if self.stubs.iter().any(|s| s.path == path) {
                continue;
            }
            let mut parent = None;
            let mut parent_fd = None;
            if depth == 0
                && let Ok(stat) = fstat(&walked.fd)
            {
                let mtime = (stat.st_mtime, stat.st_mtime_nsec as u32);
                let atime = (stat.st_atime, stat.st_atime_nsec as u32);
                parent = Some(ParentTimes {
                    atime,
                    mtime,
                    mtime_after: mtime,
                });
                parent_fd = walked.fd.try_clone().ok();
            }
            self.stubs.push(Stub {
                path,
                is_target: depth + 1 == count,
                parent,
            });
            self.parents.push(parent_fd);
        }
    }

    /// Completes the notes once all targets exist.
    pub(crate) fn finish(mut self) -> Vec<Stub> {
        for (stub, fd) in self.stubs.iter_mut().zip(&self.parents) {
            if let (Some(times), Some(fd)) = (&mut stub.parent, fd)
                && let Ok(stat) = fstat(fd)
            {
                times.mtime_after = (stat.st_mtime, stat.st_mtime_nsec as u32);
            }
        }
        self.stubs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(dir.path(), PATH_ONLY, Mode::empty()).unwrap();
        (dir, fd)
    }

    #[test]
    fn creates_beneath_the_root_through_absolute_symlinks() {
        let (dir, fd) = root();
        symlink("/inside/deep", dir.path().join("link")).unwrap();
        reach(&fd, "/link/x/file", Make::File, None).unwrap();
        assert!(dir.path().join("inside/deep/x/file").is_file());
    }

    #[test]
    fn dots_do_not_leave_the_root() {
        let (dir, fd) = root();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        symlink("../../../../a", dir.path().join("up")).unwrap();
        reach(&fd, "/up/../../../b", Make::Dir, None).unwrap();
        assert!(dir.path().join("b").is_dir());
        reach(&fd, "up/made", Make::Dir, None).unwrap();
        assert!(dir.path().join("a/made").is_dir());
    }

    #[test]
    fn symlink_loops_are_refused() {
        let (dir, fd) = root();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        assert_eq!(reach(&fd, "a/x", Make::Dir, None).unwrap_err(), Errno::LOOP);
    }

    #[test]
    fn scan_names_target_and_missing_parents() {
        let (dir, fd) = root();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let mut scan = StubScan::default();
        scan.note(&fd, "/etc");
        scan.note(&fd, "/etc/hosts");
        scan.note(&fd, "/a/b");
        reach(&fd, "/etc/hosts", Make::File, None).unwrap();
        reach(&fd, "/a/b", Make::Dir, None).unwrap();
        let stubs = scan.finish();
        let names: Vec<_> = stubs
            .iter()
            .map(|s| (s.path.as_str(), s.is_target, s.parent.is_some()))
            .collect();
        assert_eq!(
            names,
            [("etc/hosts", true, true), ("a/b", true, false), ("a", false, true)]
        );
        let times = stubs[0].parent.unwrap();
        assert!(times.mtime_after >= times.mtime);
    }
}
