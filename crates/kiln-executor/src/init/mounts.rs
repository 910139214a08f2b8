//! Mounts below the root: the ones every process gets, the ones of the spec, and the paths that are masked.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, fchmod};
use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid, chownat, makedev, mkdirat, mknodat, openat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};

use super::rootfs::{Layers, Stage, attach, clone_host_path, clone_mount, is_dir, mount_fs, open_layers, open_source};
use super::walk::{Make, open_in_root, reach};
use crate::error::Step;
use crate::protocol::{At, CgroupView, Failure, Host};
use crate::spec::{FileMount, MountFlags, MountKind, MountSpec, SecurityMode};
use crate::sys;

const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
const RDONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;
const STRICTATIME: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_STRICTATIME;

/// Hidden from confined processes.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Not writable for confined processes.
const PROTECTED: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Devices of every process: name, major, minor.
const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Further devices of an unconfined process, where the host has them.
const INSECURE_DEVICES: [&str; 5] = ["kmsg", "fuse", "kvm", "net/tun", "loop-control"];

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
];

/// A mount of the spec whose source is open.
pub(crate) struct Source<'a> {
    spec: &'a MountSpec,
    kind: Open<'a>,
}

enum Open<'a> {
    Layers(Layers, &'a str),
    Tmpfs { size: Option<u64>, mode: Option<u32> },
    File(&'a FileMount),
}

/// Opens the sources of a mount, before the daemon's paths go out of sight.
pub(crate) fn open_mount(spec: &MountSpec) -> Result<Source<'_>, Failure> {
    let kind = match &spec.kind {
        MountKind::Bind { source, selector } => Open::Layers(Layers::Plain(open_source(source)?), selector),
        MountKind::Overlay { overlay, selector } => Open::Layers(open_layers(overlay)?, selector),
        MountKind::Tmpfs { size, mode } => Open::Tmpfs {
            size: *size,
            mode: *mode,
        },
        MountKind::File(file) => Open::File(file),
    };
    Ok(Source { spec, kind })
}

impl Source<'_> {
    /// Where it goes.
    pub(crate) fn dest(&self) -> &str {
        &self.spec.dest
    }

    /// Mounts it, detached.
    pub(crate) fn mount(&self, root: impl AsFd, stage: &mut Stage, host: Host) -> Result<OwnedFd, Failure> {
        let dest = &self.spec.dest;
        let (mount, recursive) = match &self.kind {
            Open::Layers(Layers::Plain(source), "") => (clone_mount(source).at(Step::Mount, dest)?, false),
            Open::Layers(Layers::Plain(source), selector) => {
                let selected = open_in_root(source, selector).at(Step::Source, selector)?;
                (clone_mount(selected).at(Step::Mount, dest)?, false)
            }
            Open::Layers(layers, selector) => {
                let whole = stage.attach_layers(layers, host.rootless)?;
                let selected = open_in_root(&whole, selector).at(Step::Source, selector)?;
                (clone_mount(selected).at(Step::Mount, dest)?, false)
            }
            Open::Tmpfs { size, mode } => {
                let covered = || {
                    rustix::fs::fstat(open_in_root(&root, dest).ok()?)
                        .ok()
                        .map(|s| s.st_mode & 0o7777)
                };
                let mode = format!("{:o}", mode.or_else(covered).unwrap_or(0o1777));
                let size = size.map(|s| s.to_string());
                let mut options = vec![("mode", mode.as_str())];
                if let Some(size) = &size {
                    options.push(("size", size));
                }
                (mount_fs("tmpfs", &options, NOSUID).at(Step::Mount, dest)?, false)
            }
            Open::File(file) => (stage.file(file, host.rootless)?, false),
        };
        let mut set = restrictions(self.spec.flags);
        if self.spec.readonly {
            set |= sys::MOUNT_ATTR_RDONLY;
        }
        if !host.devices_confined {
            set |= sys::MOUNT_ATTR_NODEV;
        }
        if set != 0 {
            sys::mount_restrict(&mount, set, recursive).at(Step::Mount, dest)?;
        }
        Ok(mount)
    }

    /// Attaches the mount at its place, making the place if needed.
    pub(crate) fn place(&self, root: impl AsFd, mount: OwnedFd) -> Result<(), Failure> {
        place(root, &mount, self.dest())
    }
}

fn restrictions(flags: MountFlags) -> u64 {
    let mut set = 0;
    for (on, bit) in [
        (flags.nosuid, sys::MOUNT_ATTR_NOSUID),
        (flags.nodev, sys::MOUNT_ATTR_NODEV),
        (flags.noexec, sys::MOUNT_ATTR_NOEXEC),
    ] {
        if on {
            set |= bit;
        }
    }
    set
}

fn place(root: impl AsFd, mount: impl AsFd, dest: &str) -> Result<(), Failure> {
    let make = if is_dir(&mount).at(Step::Mount, dest)? {
        Make::Dir
    } else {
        Make::File
    };
    let target = reach(root, dest, make, None).at(Step::Target, dest)?;
    attach(mount, target).at(Step::Mount, dest)
}

/// What the default mounts depend on.
pub(crate) struct Defaults<'a> {
    pub(crate) security: SecurityMode,
    pub(crate) host: Host,
    /// The spec mounts something of its own here.
    pub(crate) own_shm: bool,
    /// v1 hierarchies as in `/proc/self/cgroup`.
    pub(crate) hierarchies: &'a [String],
}

/// Mounts proc, dev, sysfs and what belongs to them.
pub(crate) fn defaults(root: BorrowedFd<'_>, with: &Defaults<'_>) -> Result<(), Failure> {
    let mount = |kind: &str, options: &[(&str, &str)], attributes, dest: &str| -> Result<OwnedFd, Failure> {
        let mount = mount_fs(kind, options, attributes).at(Step::Mount, dest)?;
        place(root, &mount, dest)?;
        Ok(mount)
    };
    mount("proc", &[], NOSUID | NODEV | NOEXEC, "/proc")?;
    let dev = mount(
        "tmpfs",
        &[("mode", "755"), ("size", "65536k")],
        NOSUID | STRICTATIME,
        "/dev",
    )?;
    devices(dev.as_fd(), with)?;
    let pts: &[(&str, &str)] = &[
        ("newinstance", ""),
        ("ptmxmode", "0666"),
        ("mode", "0620"),
        ("gid", "5"),
    ];
    let group_known = !with.host.rootless || super::identity::is_mapped("gid", 5);
    let pts = if group_known { pts } else { pts.get(..3).unwrap_or(pts) };
    mount("devpts", pts, NOSUID | NOEXEC, "/dev/pts")?;
    if !with.own_shm {
        mount(
            "tmpfs",
            &[("mode", "1777"), ("size", "65536k")],
            NOSUID | NODEV | NOEXEC,
            "/dev/shm",
        )?;
    }
    mount("mqueue", &[], NOSUID | NODEV | NOEXEC, "/dev/mqueue")?;
    if with.host.rootless {
        // The host's network namespace belongs to the initial user namespace, so sysfs cannot be mounted.
        return Ok(());
    }
    let protect = if with.security == SecurityMode::Insecure {
        MountAttrFlags::empty()
    } else {
        RDONLY
    };
    mount("sysfs", &[], NOSUID | NODEV | NOEXEC | protect, "/sys")?;
    cgroups(root, with, NOSUID | NODEV | NOEXEC | protect)
}

fn cgroups(root: BorrowedFd<'_>, with: &Defaults<'_>, attributes: MountAttrFlags) -> Result<(), Failure> {
    const PLACE: &str = "/sys/fs/cgroup";
    match with.host.cgroup_view {
        CgroupView::None => Ok(()),
        CgroupView::Unified => {
            let mount = mount_fs("cgroup2", &[], attributes).at(Step::Mount, PLACE)?;
            place(root, &mount, PLACE)
        }
        CgroupView::Legacy => {
            let top = mount_fs("tmpfs", &[("mode", "755")], attributes.difference(RDONLY)).at(Step::Mount, PLACE)?;
            place(root, &top, PLACE)?;
            for controllers in with.hierarchies {
                let named = controllers.strip_prefix("name=");
                let name = named.unwrap_or(controllers);
                let options: Vec<(&str, &str)> = match named {
                    Some(name) => vec![("none", ""), ("name", name)],
                    None => controllers.split(',').map(|c| (c, "")).collect(),
                };
                // A hierarchy that vanished or cannot be shown is left out.
                let Ok(mount) = mount_fs("cgroup", &options, attributes) else {
                    continue;
                };
                mkdirat(&top, name, Mode::from_raw_mode(0o755)).at(Step::Mount, PLACE)?;
                let target =
                    openat(&top, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).at(Step::Mount, PLACE)?;
                attach(&mount, target).at(Step::Mount, PLACE)?;
                for single in name.split(',').filter(|s| *s != name) {
                    symlinkat(name, &top, single).at(Step::Mount, PLACE)?;
                }
            }
            if attributes.contains(RDONLY) {
                sys::mount_restrict(&top, sys::MOUNT_ATTR_RDONLY, false).at(Step::Mount, PLACE)?;
            }
            Ok(())
        }
    }
}

fn devices(dev: BorrowedFd<'_>, with: &Defaults<'_>) -> Result<(), Failure> {
    let bind = with.host.rootless || !with.host.devices_confined;
    for (name, major, minor) in DEVICES {
        if bind {
            bind_device(dev, name)?;
            continue;
        }
        let on = format_args!("/dev/{name}").to_string();
        mknodat(
            dev,
            name,
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            makedev(major, minor),
        )
        .at(Step::Devices, &on)?;
    }
    for (target, name) in LINKS {
        symlinkat(target, dev, name).at(Step::Devices, name)?;
    }
    symlinkat("pts/ptmx", dev, "ptmx").at(Step::Devices, "ptmx")?;
    if std::path::Path::new("/proc/kcore").exists() {
        symlinkat("/proc/kcore", dev, "core").at(Step::Devices, "core")?;
    }
    // A file system that the step mounts on /dev/shm takes the mode of what it covers: everybody may write there.
    for (name, mode) in [("pts", 0o755), ("shm", 0o1777), ("mqueue", 0o755)] {
        mkdirat(dev, name, Mode::from_raw_mode(mode)).at(Step::Devices, name)?;
    }
    if with.security == SecurityMode::Insecure && !with.host.rootless {
        mkdirat(dev, "net", Mode::from_raw_mode(0o755)).at(Step::Devices, "net")?;
        for name in INSECURE_DEVICES {
            copy_device(dev, name)?;
        }
        for n in 0..8 {
            copy_device(dev, &format!("loop{n}"))?;
        }
    }
    Ok(())
}

/// The host's device node itself, for where none may be made.
fn bind_device(dev: BorrowedFd<'_>, name: &str) -> Result<(), Failure> {
    let host_path = format!("/dev/{name}");
    let Ok(mount) = clone_host_path(&host_path) else {
        return Ok(());
    };
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    openat(dev, name, flags, Mode::from_raw_mode(0o666)).at(Step::Devices, &host_path)?;
    let target = openat(dev, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).at(Step::Devices, &host_path)?;
    attach(mount, target).at(Step::Devices, &host_path)
}

/// A node with the numbers, mode and owner that the host's has, if it has it.
fn copy_device(dev: BorrowedFd<'_>, name: &str) -> Result<(), Failure> {
    let Ok(stat) = rustix::fs::statat(CWD, format!("/dev/{name}"), AtFlags::SYMLINK_NOFOLLOW) else {
        return Ok(());
    };
    let kind = FileType::from_raw_mode(stat.st_mode);
    if !matches!(kind, FileType::CharacterDevice | FileType::BlockDevice) {
        return Ok(());
    }
    mknodat(dev, name, kind, Mode::from_raw_mode(stat.st_mode & 0o777), stat.st_rdev).at(Step::Devices, name)?;
    chownat(
        dev,
        name,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
        AtFlags::empty(),
    )
    .at(Step::Devices, name)
}

/// Hides and protects what a confined process must not see or change.
pub(crate) fn mask(root: BorrowedFd<'_>) -> Result<(), Failure> {
    let mut empty: Option<OwnedFd> = None;
    for path in MASKED {
        let target = match open_in_root(root, path) {
            Ok(target) => target,
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(e) => return Err(e).at(Step::Mask, path),
        };
        if is_dir(&target).at(Step::Mask, path)? {
            let mount = match &empty {
                Some(first) => clone_mount(first).at(Step::Mask, path)?,
                None => mount_fs(
                    "tmpfs",
                    &[("size", "0"), ("nr_inodes", "1")],
                    RDONLY | NOSUID | NODEV | NOEXEC,
                )
                .or_else(|_| mount_fs("tmpfs", &[], RDONLY | NOSUID | NODEV | NOEXEC))
                .at(Step::Mask, path)?,
            };
            attach(&mount, target).at(Step::Mask, path)?;
            empty.get_or_insert(mount);
        } else {
            let null = open_in_root(root, "/dev/null")
                .and_then(clone_mount)
                .at(Step::Mask, path)?;
            attach(null, target).at(Step::Mask, path)?;
        }
    }
    for path in PROTECTED {
        let target = match open_in_root(root, path) {
            Ok(target) => target,
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(e) => return Err(e).at(Step::Mask, path),
        };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        let mount = open_tree(&target, "", flags).at(Step::Mask, path)?;
        sys::mount_restrict(&mount, sys::MOUNT_ATTR_RDONLY, true).at(Step::Mask, path)?;
        attach(mount, target).at(Step::Mask, path)?;
    }
    Ok(())
}

/// Shows a terminal as the console.
pub(crate) fn console(terminal: impl AsFd) -> Result<(), Failure> {
    let make = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open("/dev/console", make, Mode::from_raw_mode(0o666)).at(Step::Terminal, "/dev/console")?;
    fchmod(file, Mode::from_raw_mode(0o666)).at(Step::Terminal, "/dev/console")?;
    let target = rustix::fs::open("/dev/console", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .at(Step::Terminal, "/dev/console")?;
    let mount = clone_mount(terminal).at(Step::Terminal, "/dev/console")?;
    attach(mount, target).at(Step::Terminal, "/dev/console")
}
