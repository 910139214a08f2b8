//! The daemon's side of the namespaces back end: a thread that launches, a thread that reaps, handles for what runs.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, socketpair};
use tokio::sync::oneshot;

use crate::cgroup::{CgroupPolicy, Cgroups, Group};
use crate::error::{ExecError, Step};
use crate::executor::{BoxFuture, Executor, Held, Process, ProcessIo, Signal, Usage};
use crate::init::{LAUNCHER_ARGUMENT, LAUNCHER_NAME};
use crate::protocol::{Event, Host, Request, monotonic_ns, recv_packet, send_packet};
use crate::running::{Running, Starting};
use crate::spec::{NetMode, ProcessSpec, Resources, SecurityMode};

/// How a [`NamespaceExecutor`] works.
#[derive(Debug, Clone, Default)]
pub struct NamespaceConfig {
    /// Control groups to use.
    pub cgroups: CgroupPolicy,
}

/// Runs processes in fresh Linux namespaces, without a runtime such as runc.
///
/// Needs root, or root of a user namespace. The program that uses it calls [`maybe_init`](crate::maybe_init) first in `main`.
#[derive(Clone)]
pub struct NamespaceExecutor {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    jobs: Mutex<mpsc::Sender<Job>>,
    pub(crate) core: Arc<Core>,
}

/// Shared by handles and threads.
pub(crate) struct Core {
    table: Mutex<HashMap<u64, Entry>>,
    next_id: AtomicU64,
    cgroups: Cgroups,
    rootless: bool,
}

/// A process from the moment it is asked for until it is reaped.
struct Entry {
    /// Which launcher has it; 0 before one does.
    launcher: u64,
    pidfd: Option<Arc<OwnedFd>>,
    group: Option<Arc<Group>>,
    /// Nobody wants it any more.
    killed: bool,
    done: oneshot::Sender<Result<Ended, ExecError>>,
    held: Held,
}

/// How a process ended, as far as launcher and control group tell.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: Result<u8, i32>,
    pub(crate) oom: bool,
    pub(crate) usage: Usage,
}

/// Work for the launching thread.
pub(crate) struct Job {
    pub(crate) id: u64,
    pub(crate) what: What,
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    pub(crate) reply: oneshot::Sender<Result<Launched, ExecError>>,
}

pub(crate) enum What {
    Run {
        fresh_net: bool,
        parent: String,
        resources: Resources,
        security: SecurityMode,
    },
    Join {
        running: u64,
    },
}

/// A child waits for its task at the other end of `control`.
pub(crate) struct Launched {
    pub(crate) control: OwnedFd,
    pub(crate) host: Host,
}

impl NamespaceExecutor {
    /// Looks at the host's control groups and starts the executor's threads. The launcher process follows with the first use,
    /// or with [`warm_up`](Self::warm_up).
    pub fn new(config: NamespaceConfig) -> Result<Self, ExecError> {
        let rootless = in_user_namespace();
        let core = Arc::new(Core {
            table: Mutex::default(),
            next_id: AtomicU64::new(1),
            cgroups: Cgroups::detect(config.cgroups, rootless),
            rootless,
        });
        let (jobs, queue) = mpsc::channel();
        let thread_core = Arc::clone(&core);
        std::thread::Builder::new()
            .name("kiln-launch".to_owned())
            .spawn(move || launch_thread(&thread_core, &queue))
            .map_err(|source| ExecError::Launcher {
                attempt: "start thread".to_owned(),
                source,
            })?;
        Ok(NamespaceExecutor {
            inner: Arc::new(Inner {
                jobs: Mutex::new(jobs),
                core,
            }),
        })
    }

    /// The daemon is root of a user namespace only.
    pub fn is_rootless(&self) -> bool {
        self.inner.core.rootless
    }

    /// Starts the launcher process ahead of the first use.
    pub fn warm_up(&self) {
        let Ok(null) = null() else { return };
        let (Ok(stdout), Ok(stderr)) = (null.try_clone(), null.try_clone()) else {
            return;
        };
        let (reply, _) = oneshot::channel();
        // A job for a process that is not in the table starts the launcher and nothing else.
        let _ = self.inner.submit(Job {
            id: 0,
            what: What::Join { running: 0 },
            stdin: null,
            stdout,
            stderr,
            reply,
        });
    }
}

impl std::fmt::Debug for NamespaceExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NamespaceExecutor")
            .field("rootless", &self.is_rootless())
            .finish_non_exhaustive()
    }
}

impl Executor for NamespaceExecutor {
    fn start(&self, spec: ProcessSpec, io: ProcessIo, held: Held) -> BoxFuture<'_, Result<Process, ExecError>> {
        // Registered before the first await: from here on a drop kills.
        let begun = monotonic_ns();
        let what = What::Run {
            fresh_net: spec.net != NetMode::Host,
            parent: spec.cgroup_parent.clone(),
            resources: spec.resources.clone(),
            security: spec.security,
        };
        Box::pin(async move {
            validate(&spec)?;
            let starting = Starting::new(&self.inner, what, io, spec.tty.is_some(), held)?;
            let running: Running = starting.run(spec, begun).await?;
            Ok(Process::new(Box::new(running)))
        })
    }
}

fn validate(spec: &ProcessSpec) -> Result<(), ExecError> {
    let invalid = |text: String| Err(ExecError::Invalid(text));
    if spec.args.is_empty() {
        return invalid("no program".to_owned());
    }
    if spec.hostname.is_empty() || spec.hostname.len() > 64 {
        return invalid(format!("host name {:?}", spec.hostname));
    }
    if let Some(mount) = spec
        .mounts
        .iter()
        .find(|m| !m.dest.starts_with('/') || m.dest.trim_matches('/').is_empty())
    {
        return invalid(format!("mount target {:?}", mount.dest));
    }
    if let NetMode::Bridge(_) = spec.net {
        return invalid("bridge network is not available in this executor".to_owned());
    }
    Ok(())
}

/// Whether root here is not root of the machine: the process is in a user namespace other than the initial one.
pub fn in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().collect::<Vec<_>>() != ["0", "0", "4294967295"]
}

pub(crate) fn null() -> Result<OwnedFd, ExecError> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
    opened.map(OwnedFd::from).map_err(|source| ExecError::Launcher {
        attempt: "open /dev/null".to_owned(),
        source,
    })
}

impl Inner {
    pub(crate) fn submit(&self, job: Job) -> Result<(), ExecError> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.send(job).map_err(|_| ExecError::Launcher {
            attempt: "hand over".to_owned(),
            source: io::Error::other("the launching thread has ended"),
        })
    }
}

impl Core {
    fn table(&self) -> MutexGuard<'_, HashMap<u64, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a process; its end arrives on the receiver.
    pub(crate) fn register(&self, held: Held) -> (u64, oneshot::Receiver<Result<Ended, ExecError>>) {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (done, ended) = oneshot::channel();
        let entry = Entry {
            launcher: 0,
            pidfd: None,
            group: None,
            killed: false,
            done,
            held,
        };
        self.table().insert(id, entry);
        (id, ended)
    }

    /// Kills a process, now or as soon as it exists.
    pub(crate) fn kill(&self, id: u64) {
        let pidfd = match self.table().get_mut(&id) {
            Some(entry) => {
                entry.killed = true;
                entry.pidfd.clone()
            }
            None => None,
        };
        if let Some(pidfd) = pidfd {
            // Gone already, if it fails.
            let _ = rustix::process::pidfd_send_signal(&*pidfd, rustix::process::Signal::KILL);
        }
    }

    /// Sends a signal to a process that runs.
    pub(crate) fn signal(&self, id: u64, signal: Signal) -> Result<(), ExecError> {
        let pidfd = self
            .table()
            .get(&id)
            .and_then(|e| e.pidfd.clone())
            .ok_or(ExecError::Ended)?;
        let named = rustix::process::Signal::from_named_raw(signal.number())
            .ok_or_else(|| ExecError::Invalid(format!("signal {}", signal.number())))?;
        rustix::process::pidfd_send_signal(&*pidfd, named).map_err(|_| ExecError::Ended)
    }

    fn host(&self, group: &Group) -> Host {
        Host {
            rootless: self.rootless,
            devices_confined: group.devices_confined,
            cgroup_view: self.cgroups.view(),
        }
    }
}

/// A running launcher process.
struct Launcher {
    socket: OwnedFd,
    generation: u64,
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // Ends the reaper's connection too: the launcher sees the end and clears away.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

fn launch_thread(core: &Arc<Core>, queue: &mpsc::Receiver<Job>) {
    let mut launcher: Option<Launcher> = None;
    let mut generation = 0;
    while let Ok(Job {
        id,
        what,
        stdin,
        stdout,
        stderr,
        reply,
    }) = queue.recv()
    {
        let started = match launcher.take() {
            Some(alive) => Ok(alive),
            None => {
                generation += 1;
                start_launcher(core, generation)
            }
        };
        let result = started.and_then(|alive| {
            let result = launch(core, &alive, id, what, [&stdin, &stdout, &stderr]);
            // One that cannot be talked to is dropped; the next job starts another.
            if !matches!(result, Err(ExecError::Launcher { .. })) {
                launcher = Some(alive);
            }
            result
        });
        if result.is_err() {
            // Whatever was held is released here, on a thread that may block.
            let entry = core.table().remove(&id);
            drop(entry);
        }
        let _ = reply.send(result);
    }
}

fn failed(attempt: &str) -> impl FnOnce(io::Error) -> ExecError {
    let attempt = attempt.to_owned();
    move |source| ExecError::Launcher { attempt, source }
}

/// Copies this program into a sealed memory file, so that nothing a step does can change what the launcher executes, and runs
/// it from there.
fn start_launcher(core: &Arc<Core>, generation: u64) -> Result<Launcher, ExecError> {
    let program = sealed_copy().map_err(failed("copy the program"))?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|e| failed("make a socket")(e.into()))?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&program));
    let child = Command::new(path)
        .arg0(LAUNCHER_NAME)
        .arg(LAUNCHER_ARGUMENT)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(failed("start the launcher"))?;
    let reading = ours.try_clone().map_err(failed("copy a socket"))?;
    let core = Arc::clone(core);
    std::thread::Builder::new()
        .name("kiln-reaper".to_owned())
        .spawn(move || reap_thread(&core, &reading, generation, child))
        .map_err(failed("start thread"))?;
    Ok(Launcher {
        socket: ours,
        generation,
    })
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let mut source = File::open("/proc/self/exe")?;
    let memory = rustix::fs::memfd_create(LAUNCHER_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut target = File::from(memory);
    io::copy(&mut source, &mut target)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&target, seals)?;
    Ok(target.into())
}

fn launch(
    core: &Core,
    launcher: &Launcher,
    id: u64,
    what: What,
    streams: [&OwnedFd; 3],
) -> Result<Launched, ExecError> {
    let cgroup_failed = |source| ExecError::Cgroup {
        attempt: "open",
        path: String::new(),
        source,
    };
    let mut target = None;
    let (group, fresh_net, cgroups) = match what {
        What::Run {
            fresh_net,
            parent,
            resources,
            security,
        } => {
            let group = Arc::new(core.cgroups.create(id, &parent, &resources, security)?);
            let paths = group.paths();
            (group, fresh_net, paths)
        }
        What::Join { running } => {
            let found = core.table().get(&running).map(|e| (e.group.clone(), e.pidfd.clone()));
            let (Some(group), Some(pidfd)) = found.ok_or(ExecError::Ended)? else {
                return Err(ExecError::Ended);
            };
            target = Some(pidfd);
            (group, false, Vec::new())
        }
    };
    let host = core.host(&group);
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|e| failed("make a socket")(e.into()))?;
    let birthplace = group.birthplace().map_err(cgroup_failed)?;
    let enter = group.enter_files().map_err(cgroup_failed)?;
    let mut fds: Vec<BorrowedFd<'_>> = vec![theirs.as_fd()];
    fds.extend(streams.iter().map(|s| s.as_fd()));
    fds.extend(target.iter().map(|t| t.as_fd()));
    fds.extend(birthplace.iter().map(AsFd::as_fd));
    fds.extend(enter.iter().map(AsFd::as_fd));
    let request = Request {
        id,
        fresh_net,
        join: target.is_some(),
        into_cgroup: birthplace.is_some(),
        enter_files: enter.len(),
        cgroups,
    };
    {
        let mut table = core.table();
        let entry = table.get_mut(&id).ok_or(ExecError::Ended)?;
        if entry.killed {
            return Err(ExecError::Ended);
        }
        entry.launcher = launcher.generation;
        entry.group = Some(Arc::clone(&group));
    }
    send_packet(&launcher.socket, &request, &fds).map_err(failed("ask the launcher"))?;
    Ok(Launched { control: ours, host })
}

fn reap_thread(core: &Core, socket: &OwnedFd, generation: u64, mut launcher: std::process::Child) {
    loop {
        match recv_packet::<Event>(socket) {
            Ok(Some((event, fds))) => handle(core, event, fds),
            Ok(None) => break,
            Err(e) => {
                tracing::error!("connection to the launcher: {e}");
                break;
            }
        }
    }
    let lost: Vec<Entry> = {
        let mut table = core.table();
        let ids: Vec<u64> = table
            .iter()
            .filter(|(_, e)| e.launcher == generation)
            .map(|(id, _)| *id)
            .collect();
        ids.iter().filter_map(|id| table.remove(id)).collect()
    };
    for entry in lost {
        if let Some(pidfd) = &entry.pidfd {
            // Its processes die with it; what is held may be let go only when they are dead.
            let _ = rustix::process::pidfd_send_signal(&**pidfd, rustix::process::Signal::KILL);
            let mut wait = [rustix::event::PollFd::new(&**pidfd, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
            let _ = rustix::event::poll(&mut wait, Some(&limit));
        }
        let source = io::Error::other("the launcher has ended");
        let _ = entry.done.send(Err(ExecError::Launcher {
            attempt: "wait for a process".to_owned(),
            source,
        }));
        drop((entry.group, entry.held));
    }
    if let Err(e) = launcher.wait() {
        tracing::warn!("wait for the launcher: {e}");
    }
}

fn handle(core: &Core, event: Event, fds: Vec<OwnedFd>) {
    match event {
        Event::Spawned { id, .. } => {
            let mut kill = None;
            if let Some(entry) = core.table().get_mut(&id) {
                entry.pidfd = fds.into_iter().next().map(Arc::new);
                if entry.killed {
                    kill.clone_from(&entry.pidfd);
                }
            }
            if let Some(pidfd) = kill {
                let _ = rustix::process::pidfd_send_signal(&*pidfd, rustix::process::Signal::KILL);
            }
        }
        Event::Refused { id, errno, detail } => {
            let Some(entry) = core.table().remove(&id) else { return };
            let _ = entry.done.send(Err(ExecError::Setup {
                step: Step::Clone,
                errno,
                detail,
            }));
            drop((entry.group, entry.held));
        }
        Event::Exited {
            id,
            status,
            cpu_user_us,
            cpu_system_us,
        } => {
            let Some(entry) = core.table().remove(&id) else { return };
            let (mut usage, oom) = entry.group.as_ref().map(|g| g.usage()).unwrap_or_default();
            usage.cpu_user = Duration::from_micros(cpu_user_us);
            usage.cpu_system = Duration::from_micros(cpu_system_us);
            let _ = entry.done.send(Ok(Ended { status, oom, usage }));
            drop((entry.group, entry.held));
        }
    }
}
