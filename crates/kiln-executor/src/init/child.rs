//! What a forked child does until `execve`: control groups, mounts, identity, confinement, in this order.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::sched::CloneFlags;
use rustix::fs::{FileType, Gid, Mode, Uid, fchown, fstat};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::ThreadNameSpaceType;

use super::identity::{self, Identity};
use super::walk::{Make, StubScan, reach};
use super::{capabilities, mounts, network, rootfs, terminal};
use crate::error::Step;
use crate::protocol::{
    At, CgroupView, Failure, Host, Report, Task, frame, monotonic_ns, read_frame, send_with_fds, write_frame,
};
use crate::spec::{
    FileMount, JoinSpec, MountFlags, MountKind, MountSpec, NetMode, ProcessSpec, SecurityMode, TerminalSize, Ulimit,
};
use crate::stubs::Stub;
use crate::sys;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Descriptors of a child.
pub(super) struct Streams {
    pub(super) control: OwnedFd,
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

/// `clone3(2)` flags of a process in surroundings of its own. The cgroup namespace follows once its control groups are entered.
pub(super) fn namespaces(fresh_net: bool) -> u64 {
    let flags = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
    (flags | if fresh_net { libc::CLONE_NEWNET } else { 0 }) as u64
}

/// Enters all namespaces of a running process; its pid namespace takes effect for the next fork.
pub(super) fn enter_namespaces(pidfd: &OwnedFd) -> io::Result<()> {
    let kinds = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::CONTROL_GROUP;
    Ok(rustix::thread::move_into_thread_name_spaces(pidfd.as_fd(), kinds)?)
}

/// Sets surroundings up and executes; never returns to the launcher.
pub(super) fn run(streams: Streams, enter: &[OwnedFd], filter: &[libc::sock_filter]) -> ! {
    end(streams, |control| {
        begin(enter)?;
        nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP).at(Step::Clone, "cgroup namespace")?;
        match read_task(control)? {
            Task::Run(spec, host) => run_spec(control, &spec, host, filter),
            Task::Join(..) => Err(Failure::because(Step::Spec, "unexpected task")),
        }
    })
}

/// Executes in surroundings that are entered already; never returns.
pub(super) fn join(streams: Streams, enter: &[OwnedFd], filter: &[libc::sock_filter]) -> ! {
    end(streams, |control| {
        begin(enter)?;
        match read_task(control)? {
            Task::Join(spec, host) => join_spec(control, &spec, host, filter),
            Task::Run(..) => Err(Failure::because(Step::Spec, "unexpected task")),
        }
    })
}

/// Runs `work` and reports why it came back: it does so only with a failure.
fn end(streams: Streams, work: impl FnOnce(&OwnedFd) -> Result<std::convert::Infallible, Failure>) -> ! {
    let Streams {
        control,
        stdin,
        stdout,
        stderr,
    } = streams;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        nix::unistd::dup2_stdin(stdin).at(Step::Streams, "stdin")?;
        nix::unistd::dup2_stdout(stdout).at(Step::Streams, "stdout")?;
        nix::unistd::dup2_stderr(stderr).at(Step::Streams, "stderr")?;
        work(&control)
    }));
    let failure = match outcome {
        Ok(Ok(never)) => match never {},
        Ok(Err(failure)) => failure,
        Err(_) => Failure::because(Step::Spec, "panic"),
    };
    if let Ok(control) = control.try_clone() {
        let _ = write_frame(File::from(control), &Report::Failed(failure));
    }
    sys::exit_now(1)
}

fn read_task(control: &OwnedFd) -> Result<Task, Failure> {
    let reader = File::from(control.try_clone().at(Step::Spec, "")?);
    match read_frame(reader) {
        Ok(task) => Ok(task),
        // The daemon gave up: nothing to report, nobody to report to.
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => sys::exit_now(1),
        Err(e) => Err(e).at(Step::Spec, "specification"),
    }
}

/// Dies with the launcher, leads a session of its own, is counted in its control groups.
fn begin(enter: &[OwnedFd]) -> Result<(), Failure> {
    die_with_launcher()?;
    let _ = rustix::process::setsid();
    for file in enter {
        // "0" is the writer itself: on v1 and for a single thread the kernel takes no global lock for that.
        rustix::io::write(file, b"0").at(Step::Cgroup, "")?;
    }
    rustix::process::umask(Mode::empty());
    Ok(())
}

fn die_with_launcher() -> Result<(), Failure> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).at(Step::Clone, "")
}

fn run_spec(
    control: &OwnedFd,
    spec: &ProcessSpec,
    host: Host,
    filter: &[libc::sock_filter],
) -> Result<std::convert::Infallible, Failure> {
    rustix::system::sethostname(spec.hostname.as_bytes()).at(Step::Hostname, &spec.hostname)?;
    if spec.net != NetMode::Host {
        network::loopback()?;
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).at(Step::Propagation, "")?;
    let (identity, stubs) = surroundings(spec, host)?;
    if let Some(size) = spec.tty {
        let terminal = offer_terminal(control, size, identity.uid)?;
        mounts::console(terminal)?;
    }
    let last = Last {
        args: &spec.args,
        env: &spec.env,
        cwd: &spec.cwd,
        security: spec.security,
        ulimits: &spec.ulimits,
        tty: spec.tty.is_some(),
        make_cwd: !spec.root_readonly,
        host,
    };
    execute(control, &last, &identity, stubs, filter)
}

fn join_spec(
    control: &OwnedFd,
    spec: &JoinSpec,
    host: Host,
    filter: &[libc::sock_filter],
) -> Result<std::convert::Infallible, Failure> {
    rustix::process::chdir("/").at(Step::Join, "/")?;
    let root = rootfs::open_source(std::path::Path::new("/"))?;
    let identity = identity::resolve(&root, &spec.user)?;
    if let Some(size) = spec.tty {
        offer_terminal(control, size, identity.uid)?;
    }
    let last = Last {
        args: &spec.args,
        env: &spec.env,
        cwd: &spec.cwd,
        security: spec.security,
        ulimits: &[],
        tty: spec.tty.is_some(),
        make_cwd: false,
        host,
    };
    execute(control, &last, &identity, Vec::new(), filter)
}

fn offer_terminal(control: &OwnedFd, size: TerminalSize, uid: u32) -> Result<OwnedFd, Failure> {
    let (master, slave) = terminal::take(size, uid)?;
    let message = frame(&Report::Terminal).at(Step::Terminal, "")?;
    send_with_fds(control, &message, &[master.as_fd()]).at(Step::Terminal, "")?;
    Ok(slave)
}

/// Makes everything that is mounted, and changes into it.
fn surroundings(spec: &ProcessSpec, host: Host) -> Result<(Identity, Vec<Stub>), Failure> {
    let hierarchies = match host.cgroup_view {
        CgroupView::Legacy => own_hierarchies().at(Step::Cgroup, "/proc/self/cgroup")?,
        _ => Vec::new(),
    };
    let mut specs: Vec<MountSpec> = Vec::with_capacity(spec.mounts.len() + 2);
    for (path, content) in [("/etc/hosts", &spec.hosts), ("/etc/resolv.conf", &spec.resolv_conf)] {
        if let Some(content) = content {
            let file = FileMount {
                content: content.clone().into_bytes(),
                mode: 0o644,
                uid: 0,
                gid: 0,
            };
            let flags = MountFlags {
                nosuid: true,
                nodev: true,
                noexec: true,
            };
            specs.push(MountSpec {
                dest: path.to_owned(),
                kind: MountKind::File(file),
                readonly: true,
                flags,
            });
        }
    }
    specs.extend(spec.mounts.iter().cloned());
    specs.sort_by(|a, b| parts(&a.dest).cmp(parts(&b.dest)));

    let layers = rootfs::open_root(&spec.root)?;
    let sources = specs.iter().map(mounts::open_mount).collect::<Result<Vec<_>, _>>()?;
    let mut stage = rootfs::Stage::new(&rootfs::stage_place(&spec.root))?;
    let root = stage.attach_layers(&layers, host.rootless)?;
    if !host.devices_confined {
        sys::mount_restrict(&root, sys::MOUNT_ATTR_NODEV, false).at(Step::Root, "")?;
    }

    let mut scan = StubScan::default();
    for dest in ["/etc/resolv.conf", "/etc/hosts"]
        .into_iter()
        .chain(specs.iter().map(|m| m.dest.as_str()))
    {
        scan.note(&root, dest);
    }
    let identity = identity::resolve(&root, &spec.user)?;
    if host.rootless {
        identity::ensure_mapped(&identity)?;
    }
    reach(&root, &spec.cwd, Make::Dir, Some((identity.uid, identity.gid))).at(Step::Cwd, &spec.cwd)?;

    let with = mounts::Defaults {
        security: spec.security,
        host,
        own_shm: specs.iter().any(|m| m.dest.trim_end_matches('/') == "/dev/shm"),
        hierarchies: &hierarchies,
    };
    mounts::defaults(root.as_fd(), &with)?;
    for source in &sources {
        let mount = source.mount(&root, &mut stage, host)?;
        source.place(&root, mount)?;
    }
    if spec.security == SecurityMode::Sandbox {
        mounts::mask(root.as_fd())?;
    }
    let stubs = scan.finish();
    if spec.root_readonly {
        sys::mount_restrict(&root, sys::MOUNT_ATTR_RDONLY, false).at(Step::Root, "")?;
    }
    rootfs::pivot(root.as_fd())?;
    Ok((identity, stubs))
}

fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|c| !c.is_empty())
}

/// Controllers (or `name=…`) of the v1 hierarchies.
fn own_hierarchies() -> io::Result<Vec<String>> {
    let text = std::fs::read_to_string("/proc/self/cgroup")?;
    let names = text
        .lines()
        .filter_map(|l| l.split(':').nth(1))
        .filter(|n| !n.is_empty());
    Ok(names.map(str::to_owned).collect())
}

/// What is left once the surroundings stand.
struct Last<'a> {
    args: &'a [String],
    env: &'a [String],
    cwd: &'a str,
    security: SecurityMode,
    ulimits: &'a [Ulimit],
    tty: bool,
    make_cwd: bool,
    host: Host,
}

fn execute(
    control: &OwnedFd,
    last: &Last<'_>,
    identity: &Identity,
    stubs: Vec<Stub>,
    filter: &[libc::sock_filter],
) -> Result<std::convert::Infallible, Failure> {
    let environment = Environment::new(last, identity)?;
    for limit in last.ulimits {
        set_limit(limit)?;
    }
    enter_cwd(last, identity)?;
    if !last.tty {
        own_streams(identity.uid, identity.gid)?;
    }
    sys::new_session_keyring();
    let wanted = capabilities::wanted(last.security)?;
    if last.security == SecurityMode::Sandbox {
        sys::install_filter(filter).at(Step::Seccomp, "")?;
    }
    capabilities::bound(wanted)?;
    become_user(identity, last.host)?;
    capabilities::apply(wanted, last.security)?;
    // The change of credentials has cleared it.
    die_with_launcher()?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    sys::close_on_exec_from(3).at(Step::Streams, "")?;
    sys::default_signals();
    let ready = Report::Ready {
        at_ns: monotonic_ns(),
        stubs,
        uid: identity.uid,
        gid: identity.gid,
    };
    let writer = File::from(control.try_clone().at(Step::Spec, "")?);
    write_frame(writer, &ready).at(Step::Spec, "report")?;
    Err(environment.execute())
}

fn enter_cwd(last: &Last<'_>, identity: &Identity) -> Result<(), Failure> {
    let cwd = if last.cwd.is_empty() { "/" } else { last.cwd };
    let here = || -> Result<(), Errno> {
        rustix::process::chdir(cwd)?;
        // A path that leads outside the root (through a leaked descriptor) has no absolute name here.
        if rustix::process::getcwd(Vec::new())?.as_bytes().first() == Some(&b'/') {
            Ok(())
        } else {
            Err(Errno::NOENT)
        }
    };
    match here() {
        Err(Errno::NOENT) if last.make_cwd => {
            // It exists in the root, but a mount covers it.
            let root = rootfs::open_source(std::path::Path::new("/"))?;
            reach(root, cwd, Make::Dir, Some((identity.uid, identity.gid))).at(Step::Cwd, cwd)?;
            here().at(Step::Cwd, cwd)
        }
        other => other.at(Step::Cwd, cwd),
    }
}

/// Lets the user reopen `/dev/stdout` and its like.
fn own_streams(uid: u32, gid: u32) -> Result<(), Failure> {
    if uid == 0 {
        return Ok(());
    }
    for fd in [io::stdin().as_fd(), io::stdout().as_fd(), io::stderr().as_fd()] {
        let kind = FileType::from_raw_mode(fstat(fd).at(Step::Streams, "")?.st_mode);
        if matches!(kind, FileType::Fifo | FileType::Socket) {
            // Refused where the id is not mapped; then the user merely cannot reopen them.
            let _ = fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        }
    }
    Ok(())
}

fn become_user(identity: &Identity, host: Host) -> Result<(), Failure> {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    let mut groups = vec![gid];
    groups.extend(identity.groups.iter().map(|g| Gid::from_raw(*g)));
    rustix::thread::set_keep_capabilities(true).at(Step::User, "keep capabilities")?;
    match rustix::thread::set_thread_groups(&groups) {
        Ok(()) => {}
        // With a single mapped id the kernel allows no supplementary groups.
        Err(Errno::PERM | Errno::INVAL) if host.rootless => {}
        Err(e) => return Err(e).at(Step::User, "supplementary groups"),
    }
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(|e| user_failure("group", identity.gid, e))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(|e| user_failure("user", identity.uid, e))?;
    rustix::thread::set_keep_capabilities(false).at(Step::User, "keep capabilities")
}

fn user_failure(what: &str, id: u32, e: Errno) -> Failure {
    Failure {
        step: Step::User,
        errno: e.raw_os_error(),
        detail: format!("cannot become {what} {id}: {e}"),
    }
}

fn set_limit(limit: &Ulimit) -> Result<(), Failure> {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    let resource = match limit.name.as_str() {
        "as" => Resource::RLIMIT_AS,
        "core" => Resource::RLIMIT_CORE,
        "cpu" => Resource::RLIMIT_CPU,
        "data" => Resource::RLIMIT_DATA,
        "fsize" => Resource::RLIMIT_FSIZE,
        "locks" => Resource::RLIMIT_LOCKS,
        "memlock" => Resource::RLIMIT_MEMLOCK,
        "msgqueue" => Resource::RLIMIT_MSGQUEUE,
        "nice" => Resource::RLIMIT_NICE,
        "nofile" => Resource::RLIMIT_NOFILE,
        "nproc" => Resource::RLIMIT_NPROC,
        "rss" => Resource::RLIMIT_RSS,
        "rtprio" => Resource::RLIMIT_RTPRIO,
        "rttime" => Resource::RLIMIT_RTTIME,
        "sigpending" => Resource::RLIMIT_SIGPENDING,
        "stack" => Resource::RLIMIT_STACK,
        other => return Err(Failure::because(Step::Ulimit, format!("{other}: unknown limit"))),
    };
    let value = |v: i64| u64::try_from(v).unwrap_or(RLIM_INFINITY);
    setrlimit(resource, value(limit.soft), value(limit.hard)).at(Step::Ulimit, &limit.name)
}

/// Arguments and environment as `execve(2)` wants them.
struct Environment {
    args: Vec<CString>,
    env: Vec<CString>,
    path: String,
}

impl Environment {
    fn new(last: &Last<'_>, identity: &Identity) -> Result<Self, Failure> {
        let mut env: Vec<&str> = Vec::with_capacity(last.env.len() + 3);
        for variable in last.env {
            let name = variable.split('=').next().unwrap_or_default();
            match env.iter_mut().find(|e| e.split('=').next() == Some(name)) {
                Some(earlier) => *earlier = variable,
                None => env.push(variable),
            }
        }
        let has = |name: &str| env.iter().any(|e| e.split_once('=').is_some_and(|(n, _)| n == name));
        let path = format!("PATH={DEFAULT_PATH}");
        let home = format!("HOME={}", identity.home);
        let (has_path, has_home, has_term) = (has("PATH"), has("HOME"), has("TERM"));
        if !has_path {
            env.push(&path);
        }
        if !has_home {
            env.push(&home);
        }
        if last.tty && !has_term {
            env.push("TERM=xterm");
        }
        let path = env
            .iter()
            .find_map(|e| e.strip_prefix("PATH="))
            .unwrap_or_default()
            .to_owned();
        let c = |s: &str| CString::new(s).map_err(|_| Failure::because(Step::Spec, "argument with a zero byte"));
        Ok(Environment {
            args: last.args.iter().map(|a| c(a)).collect::<Result<_, _>>()?,
            env: env.into_iter().map(c).collect::<Result<_, _>>()?,
            path,
        })
    }

    /// Comes back only with what went wrong.
    fn execute(&self) -> Failure {
        let Some(program) = self.args.first() else {
            return Failure::because(Step::Exec, "no program");
        };
        let name = program.to_string_lossy().into_owned();
        let quoted = format!("{name:?}");
        let run = |path: &CString| match nix::unistd::execve(path, &self.args, &self.env) {
            Ok(never) => match never {},
            Err(e) => e,
        };
        if name.contains('/') {
            return Failure {
                step: Step::Exec,
                errno: run(program) as i32,
                detail: quoted,
            };
        }
        let mut outcome = None;
        for dir in self.path.split(':') {
            let dir = if dir.is_empty() { "." } else { dir };
            let Ok(path) = CString::new(format!("{dir}/{name}")) else {
                continue;
            };
            match run(&path) {
                nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR => {}
                e @ nix::errno::Errno::EACCES => outcome = Some(e),
                e => {
                    return Failure {
                        step: Step::Exec,
                        errno: e as i32,
                        detail: quoted,
                    };
                }
            }
        }
        match outcome {
            Some(e) => Failure {
                step: Step::Exec,
                errno: e as i32,
                detail: quoted,
            },
            None => Failure {
                step: Step::Exec,
                errno: libc::ENOENT,
                detail: format!("{quoted} (not found in PATH)"),
            },
        }
    }
}
