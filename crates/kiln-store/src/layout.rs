//! The state directory: names of its parts, its lock, its format stamp.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::error::{IoContext as _, Result, StoreError};
use crate::ids::TreeId;

/// Version of the layout on disk. A higher one is refused, a lower one would be migrated (there is none yet).
const FORMAT: u32 = 1;
/// Size of the file that is freed when a full disk keeps the index from opening, in bytes.
pub(crate) const BALLAST: u64 = 4 << 20;

/// What is mounted for steps can be passed through but not listed; the rest is the daemon's alone.
const MODES: &[(&str, u32)] = &[
    ("trees", 0o711),
    ("active", 0o711),
    ("cache-mounts", 0o711),
    ("contexts", 0o711),
    ("blobs", 0o700),
    ("ingest", 0o700),
    ("index", 0o700),
    ("history", 0o700),
    ("trash", 0o700),
];

/// What the state directory was made for. A mismatch is refused: file owners and overlay attributes would be wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Format {
    version: u32,
    uid_map: String,
    userxattr: bool,
}

/// An open and locked state directory. The lock goes with the value.
#[derive(Debug)]
pub(crate) struct StateDir {
    root: PathBuf,
    handle: File,
    _lock: File,
}

impl StateDir {
    /// Creates what is missing, takes the lock, checks the stamp. The flag tells whether the directory is new.
    pub(crate) fn open(root: &Path, userxattr: bool) -> Result<(Self, bool)> {
        fs::create_dir_all(root).during("create", root)?;
        let root = fs::canonicalize(root).during("resolve", root)?;
        // What steps left behind may be set-uid or private: nobody but the daemon enters. The rootless daemon's mapped
        // users reach trees through mounts, not through this path.
        restrict(&root)?;
        let lock = take_lock(&root)?;
        let new = check_format(&root, userxattr)?;
        let handle = File::open(&root).during("open", &root)?;
        let dir = Self {
            root,
            handle,
            _lock: lock,
        };
        for part in [
            "index",
            "blobs/sha256",
            "trees",
            "active",
            "cache-mounts",
            "contexts",
            "ingest",
            "history",
            "trash",
        ] {
            let path = dir.root.join(part);
            fs::create_dir_all(&path).during("create", &path)?;
        }
        for (part, mode) in MODES {
            let path = dir.root.join(part);
            fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).during("chmod", &path)?;
        }
        Ok((dir, new))
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The root as an open directory, for calls on the file system it lies on.
    pub(crate) fn handle(&self) -> &File {
        &self.handle
    }

    pub(crate) fn part(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn tree(&self, id: &TreeId) -> PathBuf {
        self.root.join("trees").join(id.as_str())
    }

    /// Bytes available to the daemon on the file system, and the file system's size.
    pub(crate) fn space(&self) -> Result<(u64, u64)> {
        let stat = rustix::fs::fstatvfs(self.handle.as_fd()).during("statvfs", &self.root)?;
        Ok((
            stat.f_bavail.saturating_mul(stat.f_frsize),
            stat.f_blocks.saturating_mul(stat.f_frsize),
        ))
    }

    /// Writes everything on this file system to the device.
    pub(crate) fn sync_fs(&self) -> Result<()> {
        rustix::fs::syncfs(self.handle.as_fd()).during("sync the file system of", &self.root)
    }

    /// An id of the file system as far as the kernel gives one.
    pub(crate) fn file_system(&self) -> Result<u64> {
        Ok(rustix::fs::fstatvfs(self.handle.as_fd())
            .during("statvfs", &self.root)?
            .f_fsid)
    }

    /// Sets space aside for opening the index on a full disk. Failing to is no reason not to start.
    pub(crate) fn keep_ballast(&self) -> u64 {
        let path = self.part("ballast");
        if fs::metadata(&path).is_ok_and(|m| m.len() >= BALLAST) {
            return BALLAST;
        }
        let made = File::create(&path).and_then(|file| {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BALLAST).map_err(std::io::Error::from)
        });
        match made {
            Ok(()) => BALLAST,
            Err(error) => {
                tracing::debug!(%error, "no ballast file");
                let _ = fs::remove_file(&path);
                0
            }
        }
    }

    pub(crate) fn drop_ballast(&self) -> bool {
        fs::remove_file(self.part("ballast")).is_ok()
    }
}

fn restrict(root: &Path) -> Result<()> {
    let mode = fs::metadata(root).during("stat", root)?.permissions().mode() & 0o7777;
    // 0711: an unprivileged process of a step's own user must be able to pass through to what is mounted for it.
    let wanted = mode & 0o711;
    if mode != wanted {
        fs::set_permissions(root, fs::Permissions::from_mode(wanted)).during("chmod", root)?;
    }
    Ok(())
}

fn take_lock(root: &Path) -> Result<File> {
    let path = root.join("lock");
    let mut options = OpenOptions::new();
    let mut file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .during("open", &path)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let _ = file.read_to_string(&mut text);
            return Err(StoreError::Locked {
                path: root.to_owned(),
                holder: text.trim().parse().ok(),
            });
        }
        Err(error) => return Err(error).during("lock", &path),
    }
    // Full disk: the number is a courtesy to whoever is refused later.
    let _ = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

fn uid_map() -> String {
    let raw = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let fields: Vec<_> = raw
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    fields.join(";")
}

fn check_format(root: &Path, userxattr: bool) -> Result<bool> {
    let refuse = |reason: String| StoreError::Format {
        path: root.to_owned(),
        reason,
    };
    let path = root.join("format");
    let now = Format {
        version: FORMAT,
        uid_map: uid_map(),
        userxattr,
    };
    let raw = match fs::read(&path) {
        Ok(raw) => raw,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if root.join("trees").exists() {
                return Err(refuse("it holds data but no format file; move it away".into()));
            }
            let raw = serde_json::to_vec(&now).map_err(|e| refuse(e.to_string()))?;
            let draft = root.join(".format.new");
            fs::write(&draft, raw).during("write", &draft)?;
            File::open(&draft).and_then(|f| f.sync_all()).during("sync", &draft)?;
            fs::rename(&draft, &path).during("rename", &draft)?;
            File::open(root).and_then(|f| f.sync_all()).during("sync", root)?;
            return Ok(true);
        }
        Err(error) => return Err(error).during("read", &path),
    };
    let was: Format = serde_json::from_slice(&raw).map_err(|e| refuse(format!("format file: {e}")))?;
    if was.version != FORMAT {
        return Err(refuse(format!(
            "format {} was written by another version; this one knows {FORMAT}",
            was.version
        )));
    }
    if was.uid_map != now.uid_map || was.userxattr != now.userxattr {
        return Err(refuse(format!(
            "it was made under the user id map `{}`{}, the daemon runs under `{}`{}; use another directory",
            was.uid_map,
            if was.userxattr { " (rootless)" } else { "" },
            now.uid_map,
            if now.userxattr { " (rootless)" } else { "" },
        )));
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_opener_and_foreign_formats_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (first, new) = StateDir::open(dir.path(), false).unwrap();
        assert!(new);
        let refused = StateDir::open(dir.path(), false).unwrap_err();
        assert!(
            matches!(refused, StoreError::Locked { holder: Some(pid), .. } if pid == std::process::id()),
            "{refused}"
        );
        drop(first);
        assert!(!StateDir::open(dir.path(), false).unwrap().1);
        let refused = StateDir::open(dir.path(), true).unwrap_err();
        assert!(refused.to_string().contains("rootless"), "{refused}");
        let raw = fs::read_to_string(dir.path().join("format")).unwrap();
        fs::write(dir.path().join("format"), raw.replace("\"version\":1", "\"version\":9")).unwrap();
        assert!(matches!(
            StateDir::open(dir.path(), false).unwrap_err(),
            StoreError::Format { .. }
        ));
    }
}
