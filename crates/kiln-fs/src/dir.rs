//! A directory as the root of lookups: whatever a path says, it stays beneath this directory.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::metadata::{FileType, Metadata, Timestamp};
use crate::stop::Stop;
use crate::xattr::Xattrs;
use crate::{Error, Result, remove};

/// What happens when a lookup meets a symbolic link before the last element of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// It is followed; absolute links and `..` stop at the root, as `chroot` would have it.
    InRoot,
    /// It is an error (`ELOOP`). For trees whose paths are exact, such as the files of one layer.
    Refuse,
}

/// A directory that confines lookups: every path is resolved beneath it by the kernel (`openat2`).
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    links: Links,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without any directory.
    pub name: OsString,
    /// The type, where the file system tells it with the name.
    pub file_type: Option<FileType>,
    /// The inode number.
    pub ino: u64,
}

impl Dir {
    /// Opens a directory of the host by a path that Kiln itself chose. Never for paths from outside.
    pub fn open_ambient(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Error::io("open", path, e))?;
        Ok(Dir {
            fd,
            links: Links::InRoot,
        })
    }

    /// A directory from an open descriptor.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Dir {
            fd,
            links: Links::InRoot,
        }
    }

    /// The same directory with another rule for links.
    pub fn with_links(mut self, links: Links) -> Self {
        self.links = links;
        self
    }

    /// A second handle on the same directory.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.fd.try_clone().map_err(|e| Error::io("duplicate", ".", e))?;
        Ok(Dir { fd, links: self.links })
    }

    fn resolve(&self) -> ResolveFlags {
        match self.links {
            Links::InRoot => ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            Links::Refuse => ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS,
        }
    }

    /// `openat2` beneath this directory with the given flags; the building block of everything below.
    pub fn open_with(&self, path: impl AsRef<Path>, flags: OFlags, mode: u32) -> Result<OwnedFd> {
        let path = path.as_ref();
        let shown = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let flags = flags | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode);
        // EAGAIN: a rename elsewhere raced with the lookup of `..`; the kernel asks to try again.
        for _ in 0..64 {
            match rustix::fs::openat2(&self.fd, shown, flags, mode, self.resolve()) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(Error::io("open", path, e)),
                Ok(fd) => return Ok(fd),
            }
        }
        Err(Error::io("open", path, Errno::AGAIN))
    }

    /// Opens a directory beneath this one; the result is again a root, with the same rule for links.
    pub fn open_dir(&self, path: impl AsRef<Path>) -> Result<Dir> {
        let fd = self.open_with(path, OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
        Ok(Dir { fd, links: self.links })
    }

    /// Opens the directory called `name` directly in this one, without following a link of that name.
    pub fn child_dir(&self, name: impl AsRef<OsStr>) -> Result<Dir> {
        let name = single(name.as_ref(), "open")?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty()).map_err(|e| Error::io("open", name, e))?;
        Ok(Dir { fd, links: self.links })
    }

    /// Opens a file for reading, following links within the root. Fifos and devices are not waited for.
    pub fn open_file(&self, path: impl AsRef<Path>) -> Result<File> {
        Ok(self
            .open_with(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY, 0)?
            .into())
    }

    /// Opens a regular file for reading without following its last element; anything else is an error.
    pub fn open_regular(&self, path: impl AsRef<Path>) -> Result<File> {
        let path = path.as_ref();
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = self.open_with(path, flags, 0)?;
        let st = rustix::fs::fstat(&fd).map_err(|e| Error::io("stat", path, e))?;
        if !Metadata::from(st).file_type.is_file() {
            return Err(Error::io("open", path, Errno::INVAL));
        }
        Ok(fd.into())
    }

    /// The directory that holds the last element of `path`, and that element. Links in the parents follow the rule of
    /// this directory.
    ///
    /// # Errors
    /// [`Error::BadPath`] when the path has no last element (`/`, empty) or ends in `..`.
    pub fn parent<'p>(&self, path: &'p Path) -> Result<(Parent<'_>, &'p OsStr)> {
        let mut parts = path.components();
        let Some(Component::Normal(name)) = parts.next_back() else {
            return Err(Error::BadPath {
                op: "find parent of",
                path: path.to_owned(),
            });
        };
        let above = parts.as_path();
        if above.as_os_str().is_empty() || above == Path::new("/") {
            return Ok((Parent::Same(self), name));
        }
        let fd = self.open_with(above, OFlags::PATH | OFlags::DIRECTORY, 0)?;
        Ok((Parent::Other(fd), name))
    }

    /// Creates a file that must not exist and opens it for reading and writing. `mode` is applied whatever the umask.
    pub fn create_file(&self, path: impl AsRef<Path>, mode: u32) -> Result<File> {
        let path = path.as_ref();
        let (parent, name) = self.parent(path)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o600))
            .map_err(|e| Error::io("create", path, e))?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode)).map_err(|e| Error::io("set mode of", path, e))?;
        Ok(fd.into())
    }

    /// Creates a directory that must not exist. `mode` is applied whatever the umask.
    pub fn create_dir(&self, path: impl AsRef<Path>, mode: u32) -> Result<()> {
        let path = path.as_ref();
        let (parent, name) = self.parent(path)?;
        rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(mode & 0o777))
            .map_err(|e| Error::io("create directory", path, e))?;
        rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(mode), AtFlags::empty())
            .map_err(|e| Error::io("set mode of", path, e))
    }

    /// Creates a directory and what is missing above it, all with `mode`; directories that exist are left alone.
    pub fn create_dir_all(&self, path: impl AsRef<Path>, mode: u32) -> Result<()> {
        let path = path.as_ref();
        match self.create_dir(path, mode) {
            Ok(()) => return Ok(()),
            Err(Error::BadPath { .. }) => return Ok(()),
            Err(e) if e.is_already_exists() => {
                self.open_with(path, OFlags::PATH | OFlags::DIRECTORY, 0)?;
                return Ok(());
            }
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(e),
        }
        let mut so_far = PathBuf::new();
        for part in path.components() {
            so_far.push(part);
            match self.create_dir(&so_far, mode) {
                Ok(()) | Err(Error::BadPath { .. }) => {}
                Err(e) if e.is_already_exists() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Creates a symbolic link with the text `target`.
    pub fn symlink(&self, target: impl AsRef<OsStr>, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (parent, name) = self.parent(path)?;
        rustix::fs::symlinkat(target.as_ref(), &parent, name).map_err(|e| Error::io("create symlink", path, e))
    }

    /// Creates a hard link `path` to the existing file `existing`, both beneath this directory; a symbolic link as last
    /// element is linked itself.
    pub fn hard_link(&self, existing: impl AsRef<Path>, path: impl AsRef<Path>) -> Result<()> {
        let (existing, path) = (existing.as_ref(), path.as_ref());
        let (from, from_name) = self.parent(existing)?;
        let (to, to_name) = self.parent(path)?;
        rustix::fs::linkat(&from, from_name, &to, to_name, AtFlags::empty()).map_err(|e| Error::io("link", path, e))
    }

    /// Creates a device, fifo or socket node. `rdev` counts for devices only; `mode` is applied whatever the umask.
    pub fn create_node(&self, path: impl AsRef<Path>, file_type: FileType, mode: u32, rdev: u64) -> Result<()> {
        let path = path.as_ref();
        let (parent, name) = self.parent(path)?;
        let kind = rustix::fs::FileType::from_raw_mode(file_type.st_mode_bits());
        rustix::fs::mknodat(&parent, name, kind, Mode::from_raw_mode(mode & 0o777), rdev)
            .map_err(|e| Error::io("create node", path, e))?;
        rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(mode), AtFlags::empty())
            .map_err(|e| Error::io("set mode of", path, e))
    }

    /// Renames within this directory's tree, replacing what is there as `rename` does.
    pub fn rename(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
        self.rename_flags(from.as_ref(), to.as_ref(), RenameFlags::empty())
    }

    /// Renames within this directory's tree; `to` must not exist.
    pub fn rename_new(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
        self.rename_flags(from.as_ref(), to.as_ref(), RenameFlags::NOREPLACE)
    }

    fn rename_flags(&self, from: &Path, to: &Path, flags: RenameFlags) -> Result<()> {
        let (a, a_name) = self.parent(from)?;
        let (b, b_name) = self.parent(to)?;
        rustix::fs::renameat_with(&a, a_name, &b, b_name, flags).map_err(|e| Error::io("rename", from, e))
    }

    /// Removes a file, link or node; its last element is not followed.
    pub fn remove_file(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (parent, name) = self.parent(path)?;
        rustix::fs::unlinkat(&parent, name, AtFlags::empty()).map_err(|e| Error::io("remove", path, e))
    }

    /// Removes an empty directory.
    pub fn remove_dir(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (parent, name) = self.parent(path)?;
        rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR).map_err(|e| Error::io("remove directory", path, e))
    }

    /// Removes whatever `path` is, with everything in it; a missing path is no error.
    pub fn remove_tree(&self, path: impl AsRef<Path>, stop: &Stop) -> Result<()> {
        let path = path.as_ref();
        let (parent, name) = match self.parent(path) {
            Err(e) if e.is_not_found() => return Ok(()),
            other => other?,
        };
        match parent {
            Parent::Same(dir) => remove::remove_tree(dir, name, stop),
            Parent::Other(fd) => remove::remove_tree(
                &Dir {
                    fd,
                    links: Links::Refuse,
                },
                name,
                stop,
            ),
        }
    }

    /// Metadata of what `path` names, links followed within the root.
    pub fn metadata(&self, path: impl AsRef<Path>) -> Result<Metadata> {
        let path = path.as_ref();
        let fd = self.open_with(path, OFlags::PATH, 0)?;
        Ok(rustix::fs::fstat(&fd).map_err(|e| Error::io("stat", path, e))?.into())
    }

    /// Metadata of `path` itself: its last element is not followed. An empty path or `/` is this directory.
    pub fn symlink_metadata(&self, path: impl AsRef<Path>) -> Result<Metadata> {
        let path = path.as_ref();
        let (parent, name) = match self.parent(path) {
            Err(Error::BadPath { .. }) if is_self(path) => return self.self_metadata(),
            other => other?,
        };
        let st =
            rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| Error::io("stat", path, e))?;
        Ok(st.into())
    }

    /// Metadata of this directory itself.
    pub fn self_metadata(&self) -> Result<Metadata> {
        Ok(rustix::fs::fstat(&self.fd)
            .map_err(|e| Error::io("stat", ".", e))?
            .into())
    }

    /// The text of a symbolic link.
    pub fn read_link(&self, path: impl AsRef<Path>) -> Result<OsString> {
        let path = path.as_ref();
        let (parent, name) = self.parent(path)?;
        let text = rustix::fs::readlinkat(&parent, name, Vec::new()).map_err(|e| Error::io("read link", path, e))?;
        Ok(OsString::from_vec(text.into_bytes()))
    }

    /// All names in this directory except `.` and `..`, in the order the file system gives them.
    pub fn entries(&self) -> Result<Vec<DirEntry>> {
        let mut out = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).map_err(|e| Error::io("list", ".", e))? {
            let entry = entry.map_err(|e| Error::io("list", ".", e))?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let file_type = match entry.file_type() {
                rustix::fs::FileType::Unknown => None,
                known => Some(FileType::from_st_mode(known.as_raw_mode())),
            };
            out.push(DirEntry {
                name: OsString::from_vec(name.to_vec()),
                file_type,
                ino: entry.ino(),
            });
        }
        Ok(out)
    }

    /// Sets owner and group of `path` itself (a link is not followed). An empty path is this directory.
    pub fn set_owner(&self, path: impl AsRef<Path>, uid: u32, gid: u32) -> Result<()> {
        let path = path.as_ref();
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        let done = match self.parent(path) {
            Err(Error::BadPath { .. }) if is_self(path) => rustix::fs::fchown(&self.fd, uid, gid),
            other => {
                let (parent, name) = other?;
                rustix::fs::chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
            }
        };
        done.map_err(|e| Error::io("set owner of", path, e))
    }

    /// Sets the permission bits (07777) of `path`, which must not be a symbolic link.
    pub fn set_mode(&self, path: impl AsRef<Path>, mode: u32) -> Result<()> {
        let path = path.as_ref();
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let done = match self.parent(path) {
            Err(Error::BadPath { .. }) if is_self(path) => rustix::fs::fchmod(&self.fd, mode),
            other => {
                let (parent, name) = other?;
                // The C library's emulation of NOFOLLOW is not needed: what is at `name` was made by the caller, and a
                // link there is refused.
                let st = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| Error::io("stat", path, e))?;
                if Metadata::from(st).file_type.is_symlink() {
                    return Err(Error::io("set mode of", path, Errno::LOOP));
                }
                rustix::fs::chmodat(&parent, name, mode, AtFlags::empty())
            }
        };
        done.map_err(|e| Error::io("set mode of", path, e))
    }

    /// Sets access and modification time of `path` itself (a link is not followed) to `mtime`.
    pub fn set_mtime(&self, path: impl AsRef<Path>, mtime: Timestamp) -> Result<()> {
        let path = path.as_ref();
        let times = timestamps(mtime);
        let done = match self.parent(path) {
            Err(Error::BadPath { .. }) if is_self(path) => rustix::fs::futimens(&self.fd, &times),
            other => {
                let (parent, name) = other?;
                rustix::fs::utimensat(&parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            }
        };
        done.map_err(|e| Error::io("set time of", path, e))
    }

    /// Extended attributes of `path` itself whose name passes `keep`, sorted by name. Attributes that vanish or may not
    /// be read are left out; a file system without attributes has none.
    pub fn xattrs(&self, path: impl AsRef<Path>, keep: impl Fn(&[u8]) -> bool) -> Result<Xattrs> {
        let path = path.as_ref();
        let (at, _parent) = self.xattr_path(path)?;
        let mut names = Vec::new();
        for _ in 0..8 {
            // Most files have none, and asking for the length alone answers that in one call.
            let len = match rustix::fs::llistxattr_query(&at) {
                Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
                Ok(len) => len,
                Err(e) => return Err(Error::io("list attributes of", path, e)),
            };
            names.resize(len + 64, 0u8);
            match rustix::fs::llistxattr(&at, &mut names[..]) {
                Ok(n) => {
                    names.truncate(n);
                    break;
                }
                Err(Errno::RANGE) => {}
                Err(e) => return Err(Error::io("list attributes of", path, e)),
            }
        }
        let mut out = Xattrs::new();
        for name in names.split(|b| *b == 0).filter(|n| !n.is_empty() && keep(n)) {
            let Ok(key) = CString::new(name) else { continue };
            let mut value = vec![0u8; 256];
            loop {
                match rustix::fs::lgetxattr(&at, &key, &mut value[..]) {
                    Ok(n) => {
                        value.truncate(n);
                        out.push((name.into(), value.into_boxed_slice()));
                        break;
                    }
                    Err(Errno::RANGE) if value.len() < 1 << 20 => value = vec![0; value.len() * 16],
                    Err(_) => break,
                }
            }
        }
        out.sort();
        Ok(out)
    }

    /// Sets one extended attribute of `path` itself.
    pub fn set_xattr(&self, path: impl AsRef<Path>, name: &[u8], value: &[u8]) -> Result<()> {
        let path = path.as_ref();
        let (at, _parent) = self.xattr_path(path)?;
        rustix::fs::lsetxattr(&at, name, value, XattrFlags::empty()).map_err(|e| Error::io("set attribute of", path, e))
    }

    /// Removes one extended attribute of `path` itself; that it is not there is no error.
    pub fn remove_xattr(&self, path: impl AsRef<Path>, name: &[u8]) -> Result<()> {
        let path = path.as_ref();
        let (at, _parent) = self.xattr_path(path)?;
        match rustix::fs::lremovexattr(&at, name) {
            Ok(()) | Err(Errno::NODATA) => Ok(()),
            Err(e) => Err(Error::io("remove attribute of", path, e)),
        }
    }

    /// The attribute calls take no directory descriptor (before Linux 6.13), so the confined parent is named through
    /// the process's own descriptor table.
    fn xattr_path(&self, path: &Path) -> Result<(OsString, Parent<'_>)> {
        let mut at = Vec::with_capacity(64);
        let (parent, name) = match self.parent(path) {
            Err(Error::BadPath { .. }) if is_self(path) => (Parent::Same(self), OsStr::new(".")),
            other => other?,
        };
        at.extend_from_slice(format!("/proc/self/fd/{}/", parent.as_fd().as_raw_fd()).as_bytes());
        at.extend_from_slice(name.as_bytes());
        Ok((OsString::from_vec(at), parent))
    }

    /// Flushes the directory's own entries to disk.
    pub fn sync(&self) -> Result<()> {
        rustix::fs::fsync(&self.fd).map_err(|e| Error::io("sync", ".", e))
    }

    /// The descriptor, given away.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

/// Both times set to `mtime`, for calls that take a pair.
pub fn timestamps(mtime: Timestamp) -> Timestamps {
    let t = Timespec {
        tv_sec: mtime.secs,
        tv_nsec: i64::from(mtime.nanos) as _,
    };
    Timestamps {
        last_access: t,
        last_modification: t,
    }
}

/// Whether a path names the directory it starts from.
fn is_self(path: &Path) -> bool {
    path.components()
        .all(|c| matches!(c, Component::RootDir | Component::CurDir))
}

fn single<'n>(name: &'n OsStr, op: &'static str) -> Result<&'n OsStr> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.contains(&b'/') || bytes == b".." {
        return Err(Error::BadPath { op, path: name.into() });
    }
    Ok(name)
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The directory in which a last element lives: the root itself, or one found beneath it.
#[derive(Debug)]
pub enum Parent<'d> {
    /// The root of the lookup.
    Same(&'d Dir),
    /// A directory beneath it, opened as a path only.
    Other(OwnedFd),
}

impl AsFd for Parent<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Parent::Same(dir) => dir.as_fd(),
            Parent::Other(fd) => fd.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    fn tree() -> (tempfile::TempDir, Dir) {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir_all(tmp.path().join("root/sub")).unwrap();
        fs::write(tmp.path().join("secret"), "host").unwrap();
        fs::write(tmp.path().join("root/sub/file"), "inside").unwrap();
        let dir = Dir::open_ambient(tmp.path().join("root")).unwrap();
        (tmp, dir)
    }

    #[test]
    fn nothing_leaves_the_root() {
        let (tmp, dir) = tree();
        symlink("/secret", tmp.path().join("root/abs")).unwrap();
        symlink("../../secret", tmp.path().join("root/up")).unwrap();
        symlink("/../../sub", tmp.path().join("root/dirlink")).unwrap();
        symlink(tmp.path(), tmp.path().join("root/host")).unwrap();
        for path in [
            "../secret",
            "/../secret",
            "abs",
            "up",
            "host/secret",
            "sub/../../secret",
        ] {
            assert!(dir.open_file(path).unwrap_err().is_not_found(), "{path}");
        }
        let text = std::io::read_to_string(dir.open_file("dirlink/file").unwrap()).unwrap();
        assert_eq!(text, "inside");
        dir.create_file("dirlink/new", 0o640).unwrap().write_all(b"x").unwrap();
        assert!(tmp.path().join("root/sub/new").exists());
        assert!(dir.create_file("host/new", 0o644).is_err());
        let strict = dir.try_clone().unwrap().with_links(Links::Refuse);
        assert_eq!(
            strict.open_file("dirlink/file").unwrap_err().raw_os_error(),
            Some(Errno::LOOP.raw_os_error())
        );
    }

    #[test]
    fn modes_ignore_the_umask_and_links_are_not_followed() {
        let (tmp, dir) = tree();
        dir.create_dir("d", 0o1777).unwrap();
        assert_eq!(dir.metadata("d").unwrap().mode, 0o1777);
        dir.create_file("f", 0o4666).unwrap();
        assert_eq!(dir.symlink_metadata("f").unwrap().mode, 0o4666);
        symlink("../secret", tmp.path().join("root/l")).unwrap();
        assert!(dir.set_mode("l", 0o777).is_err());
        dir.set_mtime("l", Timestamp { secs: 5, nanos: 6 }).unwrap();
        assert_eq!(
            dir.symlink_metadata("l").unwrap().mtime,
            Timestamp { secs: 5, nanos: 6 }
        );
        assert!(dir.open_regular("l").is_err());
        assert_eq!(dir.read_link("l").unwrap(), "../secret");
        dir.create_node("p", FileType::Fifo, 0o622, 0).unwrap();
        assert_eq!(dir.symlink_metadata("p").unwrap().file_type, FileType::Fifo);
        assert!(dir.open_regular("p").is_err());
        dir.create_dir_all("x/y/z", 0o750).unwrap();
        dir.create_dir_all("x/y/z", 0o750).unwrap();
        assert_eq!(dir.metadata("x/y").unwrap().mode, 0o750);
        dir.set_mode("", 0o711).unwrap();
        assert_eq!(dir.symlink_metadata("/").unwrap().mode, 0o711);
        assert!(matches!(dir.set_mode("..", 0o711), Err(Error::BadPath { .. })));
    }

    #[test]
    fn attributes() {
        let (_tmp, dir) = tree();
        if dir.set_xattr("sub/file", b"user.b", b"2").is_err() {
            return; // a file system without user attributes
        }
        dir.set_xattr("sub/file", b"user.a", b"1").unwrap();
        dir.set_xattr("sub", b"user.d", &[7; 900]).unwrap();
        let got = dir.xattrs("sub/file", |_| true).unwrap();
        let names: Vec<_> = got.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        assert!(names.contains(&(&b"user.a"[..], &b"1"[..])) && names.contains(&(&b"user.b"[..], &b"2"[..])));
        assert_eq!(dir.xattrs("sub/file", |n| n == b"user.b").unwrap().len(), 1);
        assert_eq!(dir.xattrs("sub", |n| n == b"user.d").unwrap()[0].1.len(), 900);
        dir.remove_xattr("sub/file", b"user.a").unwrap();
        dir.remove_xattr("sub/file", b"user.a").unwrap();
        assert_eq!(dir.xattrs("sub/file", |n| n.starts_with(b"user.")).unwrap().len(), 1);
    }
}
