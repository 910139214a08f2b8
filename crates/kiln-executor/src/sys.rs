//! All unsafe code of the workspace: the system calls for which rustix and nix have no safe function.
#![allow(unsafe_code, reason = "raw system calls; each block states why it is sound")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Arguments of `clone3(2)`, as the kernel defines them (`struct clone_args`).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Both sides of a [`fork_into`].
pub(crate) enum Forked {
    /// In the new process.
    Child,
    /// In the calling process.
    Parent {
        /// Process id in the caller's namespace.
        pid: i32,
        /// Handle of the new process.
        pidfd: OwnedFd,
    },
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks, the child in fresh namespaces (`CLONE_NEW*` in `flags`) and, where given, in the v2 control group `cgroup`.
///
/// With `as_sibling` the child's parent is the caller's parent (which must itself come from a `fork_into`).
///
/// The process that calls this must have a single thread (checked): only then is the copy of its memory consistent.
pub(crate) fn fork_into(flags: u64, cgroup: Option<BorrowedFd<'_>>, as_sibling: bool) -> io::Result<Forked> {
    // A process that came from here has one thread, and its /proc may be another namespace's.
    if !as_sibling && !single_threaded() {
        return Err(io::Error::other("fork from a process with several threads"));
    }
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: std::ptr::from_mut(&mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if as_sibling {
        // The kernel then takes the exit signal of the caller.
        args.flags |= libc::CLONE_PARENT as u64;
        args.exit_signal = 0;
    }
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: args is a valid clone_args of the size passed; without CLONE_VM the child runs on a copy of this memory and
    // stack, like after fork(2), and the caller is single-threaded.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent {
            pid: pid as i32,
            // SAFETY: the kernel stored a fresh descriptor that nobody else owns.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// This process has exactly one thread.
pub(crate) fn single_threaded() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}

/// Ends the process without running destructors or exit handlers.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// `struct mount_attr` of `mount_setattr(2)`.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Not writable.
pub(crate) const MOUNT_ATTR_RDONLY: u64 = 0x1;
/// No set-user-id.
pub(crate) const MOUNT_ATTR_NOSUID: u64 = 0x2;
/// No device nodes.
pub(crate) const MOUNT_ATTR_NODEV: u64 = 0x4;
/// No execution.
pub(crate) const MOUNT_ATTR_NOEXEC: u64 = 0x8;

/// Adds attributes to the mount that `mount` refers to, and with `recursive` to all mounts below it.
pub(crate) fn mount_restrict(mount: impl AsFd, set: u64, recursive: bool) -> rustix::io::Result<()> {
    let attr = MountAttr {
        attr_set: set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: attr has the layout and size the call expects and outlives it; the path is an empty C string.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    last_result(result)
}

fn last_result(result: libc::c_long) -> rustix::io::Result<()> {
    if result == -1 {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
        return Err(rustix::io::Errno::from_raw_os_error(errno));
    }
    Ok(())
}

/// Marks every descriptor from `first` on close-on-exec.
pub(crate) fn close_on_exec_from(first: u32) -> rustix::io::Result<()> {
    // SAFETY: changes a flag of descriptors only; none is closed here.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    last_result(result)
}

/// Gives every signal its default disposition and unblocks all of them.
pub(crate) fn default_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is a valid disposition; for signals that cannot be changed the call fails without effect.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero sigset_t is the empty set on Linux; sigprocmask reads it only.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut());
    }
}

/// Ignores what a terminal or a service manager sends to a whole process group.
pub(crate) fn ignore_group_signals() {
    for signal in [
        libc::SIGINT,
        libc::SIGTERM,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGTSTP,
        libc::SIGUSR1,
        libc::SIGUSR2,
    ] {
        // SAFETY: SIG_IGN is a valid disposition for these signals.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Removes one capability from the bounding set. Numbers the kernel does not know give `EINVAL`.
pub(crate) fn drop_bounding(capability: u32) -> rustix::io::Result<()> {
    // SAFETY: prctl with integer arguments.
    last_result(libc::c_long::from(unsafe {
        libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0)
    }))
}

/// Raises one capability in the ambient set.
pub(crate) fn raise_ambient(capability: u32) -> rustix::io::Result<()> {
    // SAFETY: prctl with integer arguments.
    last_result(libc::c_long::from(unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_RAISE,
            libc::c_ulong::from(capability),
            0,
            0,
        )
    }))
}

/// Joins a fresh anonymous session keyring, so that the daemon's keys cannot be reached.
pub(crate) fn new_session_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name asks for an anonymous keyring; failure (no keys in this kernel, quota) leaves things as they are.
    unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
}

/// Installs a seccomp filter for this thread and what it executes.
pub(crate) fn install_filter(program: &[libc::sock_filter]) -> rustix::io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| rustix::io::Errno::INVAL)?;
    let fprog = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: fprog points to `length` instructions that outlive the call; the kernel copies and never writes them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0 as libc::c_uint,
            &raw const fprog,
        )
    };
    last_result(result)
}

/// Brings an interface of the current network namespace up.
pub(crate) fn interface_up(socket: impl AsFd, name: &CStr) -> rustix::io::Result<()> {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.to_bytes();
    if bytes.len() >= request.ifr_name.len() {
        return Err(rustix::io::Errno::NAMETOOLONG);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: SIOCGIFFLAGS reads the name and writes the flags of a valid ifreq.
    last_result(libc::c_long::from(unsafe {
        libc::ioctl(fd, libc::SIOCGIFFLAGS as _, &raw mut request)
    }))?;
    // SAFETY: the kernel has just filled in the flags member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short };
    // SAFETY: SIOCSIFFLAGS reads a valid ifreq.
    last_result(libc::c_long::from(unsafe {
        libc::ioctl(fd, libc::SIOCSIFFLAGS as _, &raw const request)
    }))
}

/// Unlocks the terminal behind the multiplexer `master` and opens it (`TIOCGPTPEER`: no path is involved).
pub(crate) fn open_terminal(master: impl AsFd) -> rustix::io::Result<OwnedFd> {
    let fd = master.as_fd().as_raw_fd();
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    last_result(libc::c_long::from(unsafe {
        libc::ioctl(fd, libc::TIOCSPTLCK as _, &raw const unlock)
    }))?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags and returns a descriptor.
    let slave = unsafe { libc::ioctl(fd, libc::TIOCGPTPEER as _, flags) };
    last_result(libc::c_long::from(slave))?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(slave) })
}

/// Registers a descriptor with the tokio runtime.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd owns its descriptor, and always gives the same one, until it is dropped.
    Ok(unsafe { tokio::io::unix::AsyncFd::register(fd) }?)
}

/// A child that ended.
pub(crate) struct Reaped {
    /// Its process id.
    pub(crate) pid: i32,
    /// Exit status or signal.
    pub(crate) status: Result<u8, i32>,
    /// User and system time of it and the children it waited for.
    pub(crate) cpu: (Duration, Duration),
}

/// Collects one ended child, if there is any.
pub(crate) fn reap() -> Option<Reaped> {
    let mut status: libc::c_int = 0;
    // SAFETY: an all-zero rusage is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for writing.
    let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG | libc::__WALL, &raw mut usage) };
    if pid <= 0 {
        return None;
    }
    let time = |t: libc::timeval| {
        Duration::from_secs(u64::try_from(t.tv_sec).unwrap_or(0))
            + Duration::from_micros(u64::try_from(t.tv_usec).unwrap_or(0))
    };
    let status = if libc::WIFSIGNALED(status) {
        Err(libc::WTERMSIG(status))
    } else {
        Ok(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
    };
    Some(Reaped {
        pid,
        status,
        cpu: (time(usage.ru_utime), time(usage.ru_stime)),
    })
}

/// One instruction of an eBPF program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BpfInstruction {
    pub(crate) code: u8,
    /// Destination register in the low, source register in the high half.
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Loads a program that decides about devices of a control group (`BPF_PROG_TYPE_CGROUP_DEVICE`).
pub(crate) fn load_device_program(program: &[BpfInstruction]) -> io::Result<OwnedFd> {
    /// Leading members of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes the rest as zero.
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
    }
    let attr = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: attr is a valid prefix of bpf_attr of the size passed; the pointers in it outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<Load>()) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Attaches a device program to a v2 control group; it stays until the group is removed.
pub(crate) fn attach_device_program(cgroup: impl AsFd, program: impl AsFd) -> io::Result<()> {
    /// Members of `union bpf_attr` for `BPF_PROG_ATTACH`.
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
        replace: u32,
    }
    let attr = Attach {
        target: cgroup.as_fd().as_raw_fd() as u32,
        program: program.as_fd().as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
        replace: 0,
    };
    // SAFETY: attr is a valid prefix of bpf_attr of the size passed.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<Attach>()) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
