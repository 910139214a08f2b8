//! The launcher: forks a child per process, reaps it, reports. When its socket ends, the daemon is gone, and everything it
//! started is killed, reaped and cleared away.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

use super::child::{self, Streams};
use crate::protocol::{Event, Request, recv_packet, send_packet};
use crate::sys::{self, Forked};

struct Child {
    id: u64,
    pidfd: OwnedFd,
    cgroups: Vec<PathBuf>,
}

pub(super) fn main() -> ! {
    let code = match serve() {
        Ok(()) => 0,
        Err(e) => {
            tracing::error!("launcher: {e}");
            1
        }
    };
    sys::exit_now(code)
}

fn serve() -> io::Result<()> {
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    drop(null);
    // The terminal's and the service manager's signals are for the daemon; the launcher ends with its socket.
    let _ = rustix::process::setsid();
    sys::ignore_group_signals();
    let _ = rustix::thread::set_name(c"kiln-launcher");
    rustix::process::chdir("/")?;
    let mut mask = SigSet::empty();
    mask.add(NixSignal::SIGCHLD);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    // Made once, inherited by every child.
    let filter = super::seccomp::default_filter();
    let mut children: HashMap<i32, Child> = HashMap::new();
    loop {
        let mut wait = [
            PollFd::new(&socket, PollFlags::IN),
            PollFd::new(&signals, PollFlags::IN),
        ];
        rustix::io::retry_on_intr(|| poll(&mut wait, None))?;
        let [from_daemon, from_children] = wait.map(|w| !w.revents().is_empty());
        if from_children {
            while signals.read_signal()?.is_some() {}
            reap(&socket, &mut children);
        }
        if from_daemon {
            match recv_packet::<Request>(&socket) {
                Ok(Some((request, fds))) => launch(&socket, request, fds, &mut children, &filter),
                Ok(None) => break,
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break,
                Err(e) => return Err(e),
            }
        }
    }
    clear_away(children);
    Ok(())
}

fn reap(socket: &OwnedFd, children: &mut HashMap<i32, Child>) {
    while let Some(ended) = sys::reap() {
        let Some(child) = children.remove(&ended.pid) else {
            continue;
        };
        let (user, system) = ended.cpu;
        let event = Event::Exited {
            id: child.id,
            status: ended.status,
            cpu_user_us: u64::try_from(user.as_micros()).unwrap_or(u64::MAX),
            cpu_system_us: u64::try_from(system.as_micros()).unwrap_or(u64::MAX),
        };
        // A daemon that is gone is noticed at the next poll.
        let _ = send_packet(socket, &event, &[]);
    }
}

/// The daemon is gone: kill, reap, remove control groups.
fn clear_away(mut children: HashMap<i32, Child>) {
    for child in children.values() {
        let _ = pidfd_send_signal(&child.pidfd, rustix::process::Signal::KILL);
    }
    while !children.is_empty() {
        let Ok(Some((pid, _))) = rustix::process::wait(rustix::process::WaitOptions::empty()) else {
            break;
        };
        let Some(child) = children.remove(&pid.as_raw_nonzero().get()) else {
            continue;
        };
        for cgroup in &child.cgroups {
            crate::cgroup::remove_dir(cgroup);
        }
    }
}

fn launch(
    socket: &OwnedFd,
    request: Request,
    fds: Vec<OwnedFd>,
    children: &mut HashMap<i32, Child>,
    filter: &[libc::sock_filter],
) {
    let id = request.id;
    let result = (|| -> Result<(i32, OwnedFd), (i32, &'static str)> {
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or((libc::EBADF, "descriptors of a process"));
        let streams = Streams {
            control: next()?,
            stdin: next()?,
            stdout: next()?,
            stderr: next()?,
        };
        let target = if request.join { Some(next()?) } else { None };
        let cgroup = if request.into_cgroup { Some(next()?) } else { None };
        let enter: Vec<OwnedFd> = fds.collect();
        let forked = match target {
            Some(target) => return join(streams, &target, cgroup, enter, filter),
            None => sys::fork_into(
                child::namespaces(request.fresh_net),
                cgroup.as_ref().map(AsFd::as_fd),
                false,
            ),
        };
        match forked.map_err(|e| (e.raw_os_error().unwrap_or(libc::EAGAIN), ""))? {
            Forked::Child => child::run(streams, &enter, filter),
            Forked::Parent { pid, pidfd } => Ok((pid, pidfd)),
        }
    })();
    let sent = match result {
        Ok((pid, pidfd)) => {
            let sent = send_packet(socket, &Event::Spawned { id, pid }, &[pidfd.as_fd()]);
            children.insert(
                pid,
                Child {
                    id,
                    pidfd,
                    cgroups: request.cgroups,
                },
            );
            sent
        }
        Err((errno, detail)) => send_packet(
            socket,
            &Event::Refused {
                id,
                errno,
                detail: detail.to_owned(),
            },
            &[],
        ),
    };
    if let Err(e) = sent {
        tracing::warn!("launcher: cannot tell about a process: {e}");
    }
}

/// Starts a process inside the namespaces of another: a helper enters them, and forks the process as the launcher's child.
fn join(
    streams: Streams,
    target: &OwnedFd,
    cgroup: Option<OwnedFd>,
    enter: Vec<OwnedFd>,
    filter: &[libc::sock_filter],
) -> Result<(i32, OwnedFd), (i32, &'static str)> {
    let failed = |e: io::Error| {
        (
            e.raw_os_error().unwrap_or(libc::EIO),
            "namespaces of the running process",
        )
    };
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    match sys::fork_into(0, None, false).map_err(failed)? {
        Forked::Child => {
            drop(read);
            // Never visible to what runs inside: not its memory, not its descriptors.
            let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
            let forked = child::enter_namespaces(target)
                .and_then(|()| sys::fork_into(0, cgroup.as_ref().map(AsFd::as_fd), true));
            let answer = match forked {
                Ok(Forked::Child) => {
                    drop(write);
                    child::join(streams, &enter, filter)
                }
                Ok(Forked::Parent { pid, .. }) => pid,
                Err(e) => -e.raw_os_error().unwrap_or(libc::EIO),
            };
            let _ = rustix::io::write(&write, &answer.to_ne_bytes());
            sys::exit_now(0)
        }
        Forked::Parent { .. } => {
            drop(write);
            let mut answer = [0; 4];
            let n = rustix::io::retry_on_intr(|| rustix::io::read(&read, &mut answer)).map_err(|e| failed(e.into()))?;
            let answer = i32::from_ne_bytes(answer);
            if n != 4 || answer <= 0 {
                return Err((
                    if answer < 0 { -answer } else { libc::EIO },
                    "namespaces of the running process",
                ));
            }
            let pid = Pid::from_raw(answer).ok_or((libc::ESRCH, ""))?;
            // It is this process's child and not yet reaped: the number cannot mean another process.
            let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
            Ok((answer, pidfd))
        }
    }
}
