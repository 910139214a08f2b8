//! Mounts layers: the root and everything that is laid out like it, inside this process's own mount namespace.
//!
//! Sources are opened first, by the daemon's own paths; after that only descriptors are used. Whatever has to be attached
//! before its place is known waits in a small in-memory directory, the stage, that goes away with the old root.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, StatxFlags, Uid, fchown, fstat, mkdirat, open, openat, statx,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags as LegacyFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::error::Step;
use crate::protocol::{At, Failure};
use crate::spec::{FileMount, Overlay, RootMount};

const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Opened layers of an overlay or a plain directory.
pub(crate) enum Layers {
    /// A single directory (or file), bind-mounted.
    Plain(OwnedFd),
    /// Several layers.
    Overlay {
        /// Top first.
        lowers: Vec<OwnedFd>,
        /// Upper and work directory.
        writable: Option<(OwnedFd, OwnedFd)>,
    },
}

/// Opens a path of the daemon.
pub(crate) fn open_source(path: &Path) -> Result<OwnedFd, Failure> {
    open(path, PATH_ONLY, Mode::empty()).at(Step::Source, path.display())
}

/// Opens the layers of an overlay. One layer alone needs no overlay.
pub(crate) fn open_layers(overlay: &Overlay) -> Result<Layers, Failure> {
    let lowers = overlay
        .lowers
        .iter()
        .map(|p| open_source(p))
        .collect::<Result<Vec<_>, _>>()?;
    let writable = match &overlay.writable {
        Some(w) => Some((open_source(&w.upper)?, open_source(&w.work)?)),
        None => None,
    };
    match (lowers.len(), writable) {
        (0, Some((upper, _))) => Ok(Layers::Plain(upper)),
        (0, None) => Err(Failure::because(Step::Source, "overlay without layers")),
        (1, None) => lowers
            .into_iter()
            .next()
            .map(Layers::Plain)
            .ok_or_else(|| Failure::because(Step::Source, "")),
        (_, writable) => Ok(Layers::Overlay { lowers, writable }),
    }
}

/// Opens what becomes the root.
pub(crate) fn open_root(root: &RootMount) -> Result<Layers, Failure> {
    match root {
        RootMount::Overlay(overlay) => open_layers(overlay),
        RootMount::Bind { path } => open_source(path).map(Layers::Plain),
    }
}

/// A directory of the host on which the stage is mounted: any that certainly exists.
pub(crate) fn stage_place(root: &RootMount) -> PathBuf {
    match root {
        RootMount::Bind { path } => path.clone(),
        RootMount::Overlay(o) => match (&o.writable, o.lowers.first()) {
            (Some(w), _) => w.work.clone(),
            (None, Some(lower)) => lower.clone(),
            (None, None) => PathBuf::from("/"),
        },
    }
}

/// Mounts a file system that needs no device.
pub(crate) fn mount_fs(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Shown as the device in /proc/mounts.
    fsconfig_set_string(&context, "source", kind)?;
    for (key, value) in options {
        if value.is_empty() {
            fsconfig_set_flag(&context, *key)?;
        } else {
            fsconfig_set_string(&context, *key, *value)?;
        }
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// A detached copy of the mount of what `source` refers to, restricted to that file or directory.
pub(crate) fn clone_mount(source: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(source, "", flags)
}

/// Puts a mount onto a target.
pub(crate) fn attach(mount: impl AsFd, target: impl AsFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}

/// It is a directory, as opposed to a file or socket.
pub(crate) fn is_dir(fd: impl AsFd) -> Result<bool, Errno> {
    Ok(FileType::from_raw_mode(fstat(fd)?.st_mode) == FileType::Directory)
}

/// The in-memory directory where things wait for their place.
pub(crate) struct Stage {
    dir: OwnedFd,
    place: PathBuf,
    count: usize,
}

impl Stage {
    /// Mounts the stage over `place`, in this namespace only.
    pub(crate) fn new(place: &Path) -> Result<Self, Failure> {
        let options = [("mode", "700"), ("noswap", "")];
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        // "noswap" came with Linux 6.4 and is not for user namespaces.
        let mount = mount_fs("tmpfs", &options, attributes)
            .or_else(|_| mount_fs("tmpfs", options.get(..1).unwrap_or_default(), attributes))
            .at(Step::Root, "stage")?;
        let target = open_source(place)?;
        attach(&mount, target).at(Step::Root, "stage")?;
        Ok(Stage {
            dir: mount,
            place: place.to_owned(),
            count: 0,
        })
    }

    /// Makes a fresh empty directory on the stage.
    fn slot(&mut self) -> Result<(OwnedFd, PathBuf), Failure> {
        let name = self.count.to_string();
        self.count += 1;
        mkdirat(&self.dir, name.as_str(), Mode::RWXU).at(Step::Root, "stage")?;
        let fd = openat(&self.dir, name.as_str(), PATH_ONLY, Mode::empty()).at(Step::Root, "stage")?;
        Ok((fd, self.place.join(name)))
    }

    /// Mounts layers and attaches the mount to the stage, so that parts of it can be cloned.
    pub(crate) fn attach_layers(&mut self, layers: &Layers, rootless: bool) -> Result<OwnedFd, Failure> {
        let (slot, slot_path) = self.slot()?;
        match layers {
            Layers::Plain(dir) => {
                let mount = clone_mount(dir).at(Step::Root, "")?;
                attach(&mount, slot).at(Step::Root, "")?;
                Ok(mount)
            }
            Layers::Overlay { lowers, writable } => {
                // The kernel resolves layer paths against the working directory: descriptor numbers keep the options short
                // and leave no character to be escaped.
                rustix::process::chdir("/proc/self/fd").at(Step::Root, "/proc/self/fd")?;
                let mounted = match overlay(lowers, writable.as_ref(), rootless) {
                    Ok(mount) => attach(&mount, slot).map(|()| mount).at(Step::Root, "overlay"),
                    Err(Errno::INVAL) => legacy_overlay(lowers, writable.as_ref(), rootless, &slot_path),
                    Err(e) => Err(e).at(Step::Root, "overlay"),
                };
                rustix::process::chdir("/").at(Step::Root, "/")?;
                if let Some((_, work)) = writable {
                    clear_volatile_mark(work);
                }
                mounted
            }
        }
    }

    /// Writes a file and returns a detached mount of it.
    pub(crate) fn file(&mut self, file: &FileMount, rootless: bool) -> Result<OwnedFd, Failure> {
        let name = format!("f{}", self.count);
        self.count += 1;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = openat(&self.dir, name.as_str(), flags, Mode::RUSR).at(Step::Mount, "file")?;
        let mut out = File::from(fd);
        out.write_all(&file.content).at(Step::Mount, "file")?;
        match fchown(&out, Some(Uid::from_raw(file.uid)), Some(Gid::from_raw(file.gid))) {
            // The id is not mapped: nobody in this namespace is that user.
            Err(Errno::INVAL) if rootless => {}
            owned => owned.at(Step::Mount, "owner of file")?,
        }
        out.set_permissions(std::fs::Permissions::from_mode(file.mode & 0o777))
            .at(Step::Mount, "mode of file")?;
        let path = openat(&self.dir, name.as_str(), PATH_ONLY, Mode::empty()).at(Step::Mount, "file")?;
        clone_mount(path).at(Step::Mount, "file")
    }
}

/// The kernel marks the work directory of a mount that is never synced, so that nobody mounts it again after a crash. Here the
/// store decides what survives a crash, and the same directories may be mounted again.
fn clear_volatile_mark(work: &OwnedFd) {
    // Absent where the option is unknown.
    let _ = rustix::fs::unlinkat(work, "work/incompat/volatile/dirty", rustix::fs::AtFlags::empty());
    for dir in [
        "work/incompat/volatile/dirty",
        "work/incompat/volatile",
        "work/incompat",
    ] {
        let _ = rustix::fs::unlinkat(work, dir, rustix::fs::AtFlags::REMOVEDIR);
    }
}

/// Options that are never left to the kernel's module defaults.
const OPTIONS: [(&str, &str); 4] = [
    ("index", "off"),
    ("metacopy", "off"),
    ("redirect_dir", "nofollow"),
    ("xino", "off"),
];

/// Overlay through the new mount API: one key per layer (Linux 6.7), no limit of one page.
fn overlay(lowers: &[OwnedFd], writable: Option<&(OwnedFd, OwnedFd)>, rootless: bool) -> Result<OwnedFd, Errno> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "overlay")?;
    for lower in lowers {
        fsconfig_set_string(&context, "lowerdir+", number(lower))?;
    }
    if let Some((upper, work)) = writable {
        fsconfig_set_string(&context, "upperdir", number(upper))?;
        fsconfig_set_string(&context, "workdir", number(work))?;
        // A step's tree becomes durable by the store's own sync after the step; what a step syncs in between is scratch.
        fsconfig_set_flag(&context, "volatile")?;
    }
    for (key, value) in OPTIONS {
        fsconfig_set_string(&context, key, value)?;
    }
    if rootless {
        fsconfig_set_flag(&context, "userxattr")?;
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}

/// Overlay through `mount(2)`, for kernels without `lowerdir+`.
fn legacy_overlay(
    lowers: &[OwnedFd],
    writable: Option<&(OwnedFd, OwnedFd)>,
    rootless: bool,
    place: &Path,
) -> Result<OwnedFd, Failure> {
    let lowers: Vec<String> = lowers.iter().map(number).collect();
    let mut options = format!("lowerdir={}", lowers.join(":"));
    if let Some((upper, work)) = writable {
        options.push_str(&format!(
            ",upperdir={},workdir={},volatile",
            number(upper),
            number(work)
        ));
    }
    for (key, value) in OPTIONS {
        options.push_str(&format!(",{key}={value}"));
    }
    if rootless {
        options.push_str(",userxattr");
    }
    let options = std::ffi::CString::new(options).map_err(|_| Failure::because(Step::Root, "overlay"))?;
    rustix::mount::mount("overlay", place, "overlay", LegacyFlags::empty(), options.as_c_str())
        .at(Step::Root, "overlay")?;
    open(place, PATH_ONLY, Mode::empty()).at(Step::Root, "overlay")
}

fn number(fd: &OwnedFd) -> String {
    fd.as_raw_fd().to_string()
}

/// Makes `root` the root directory and lets go of the old one.
pub(crate) fn pivot(root: BorrowedFd<'_>) -> Result<(), Failure> {
    rustix::process::fchdir(root).at(Step::Pivot, "")?;
    rustix::process::pivot_root(".", ".").at(Step::Pivot, "")?;
    // The old root now lies over the new one, and with it whatever was mounted over it on the host: "/.." is the topmost.
    // All of it must go: who enters this namespace later starts at the top.
    let own = mount_id("/").at(Step::Pivot, "/")?;
    while mount_id("/..").at(Step::Pivot, "/")? != own {
        rustix::mount::unmount("/..", rustix::mount::UnmountFlags::DETACH).at(Step::Pivot, "of the host")?;
    }
    rustix::process::chdir("/").at(Step::Pivot, "/")
}

fn mount_id(path: &str) -> Result<u64, Errno> {
    let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID)?;
    if stat.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
        Err(Errno::NOSYS)
    } else {
        Ok(stat.stx_mnt_id)
    }
}

/// Clones the mount of a path of the host.
pub(crate) fn clone_host_path(path: &str) -> Result<OwnedFd, Errno> {
    open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
}
