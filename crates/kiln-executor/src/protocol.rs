//! Messages between daemon, launcher and init. All three are the same program, so there is no versioning.
//!
//! Daemon and launcher share a sequenced-packet socket: a [`Request`] per process (its descriptors attached), [`Event`]s back.
//! Daemon and init share a stream socket per process: one [`Task`] in, [`Report`]s out, end of stream on a successful `execve`.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::Step;
use crate::spec::{JoinSpec, ProcessSpec};
use crate::stubs::Stub;

/// Largest packet between daemon and launcher.
pub(crate) const PACKET_LIMIT: usize = 32 * 1024;
/// Largest message to init: arguments, environment and secrets together.
const FRAME_LIMIT: u32 = 64 * 1024 * 1024;
/// Most descriptors in one packet.
const FD_LIMIT: usize = 48;

/// Asks the launcher for a process. Descriptors: control socket, stdin, stdout, stderr, then as the fields say.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// Number of the process, chosen by the daemon, never reused.
    pub(crate) id: u64,
    /// A network namespace of its own.
    pub(crate) fresh_net: bool,
    /// Enter the surroundings of a running process: its pidfd is the next descriptor.
    pub(crate) join: bool,
    /// The directory of a v2 control group to be born in is the next descriptor.
    pub(crate) into_cgroup: bool,
    /// Descriptors of files to which the process writes itself to enter control groups; the last ones.
    pub(crate) enter_files: usize,
    /// Control groups the launcher removes if the daemon is no longer there to do it.
    pub(crate) cgroups: Vec<PathBuf>,
}

/// What the launcher tells.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Event {
    /// The process exists; its pidfd is attached.
    Spawned { id: u64, pid: i32 },
    /// It could not be made.
    Refused { id: u64, errno: i32, detail: String },
    /// It ended and is reaped, and with it every process of its pid namespace.
    Exited {
        id: u64,
        status: Result<u8, i32>,
        cpu_user_us: u64,
        cpu_system_us: u64,
    },
}

/// What an init has to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Set up surroundings and execute.
    Run(Box<ProcessSpec>, Host),
    /// Execute in the surroundings already entered.
    Join(Box<JoinSpec>, Host),
}

/// What init must know about the host.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Host {
    /// The daemon is not the initial user namespace's root.
    pub(crate) rootless: bool,
    /// Device access is confined by a control group; otherwise mounts are made `nodev`.
    pub(crate) devices_confined: bool,
    /// What `/sys/fs/cgroup` shows.
    pub(crate) cgroup_view: CgroupView,
}

/// What `/sys/fs/cgroup` shows inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum CgroupView {
    /// Nothing.
    None,
    /// The unified hierarchy.
    Unified,
    /// One directory per v1 hierarchy.
    Legacy,
}

/// What an init tells.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The controlling side of the terminal is attached.
    Terminal,
    /// `execve` comes next; `at_ns` is the monotonic clock.
    Ready {
        at_ns: u64,
        stubs: Vec<Stub>,
        uid: u32,
        gid: u32,
    },
    /// Something failed; the init exits.
    Failed(Failure),
}

/// A failed step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) step: Step,
    pub(crate) errno: i32,
    pub(crate) detail: String,
}

impl Failure {
    /// A failure without a system call behind it.
    pub(crate) fn because(step: Step, detail: impl Into<String>) -> Self {
        Failure {
            step,
            errno: 0,
            detail: detail.into(),
        }
    }
}

/// Puts a step and a subject to an error of a system call.
pub(crate) trait At<T> {
    /// The result with the step that failed, and on what.
    fn at(self, step: Step, on: impl std::fmt::Display) -> Result<T, Failure>;
}

impl<T> At<T> for Result<T, rustix::io::Errno> {
    fn at(self, step: Step, on: impl std::fmt::Display) -> Result<T, Failure> {
        self.map_err(|e| Failure {
            step,
            errno: e.raw_os_error(),
            detail: on.to_string(),
        })
    }
}

impl<T> At<T> for Result<T, nix::errno::Errno> {
    fn at(self, step: Step, on: impl std::fmt::Display) -> Result<T, Failure> {
        self.map_err(|e| Failure {
            step,
            errno: e as i32,
            detail: on.to_string(),
        })
    }
}

impl<T> At<T> for io::Result<T> {
    fn at(self, step: Step, on: impl std::fmt::Display) -> Result<T, Failure> {
        self.map_err(|e| match e.raw_os_error() {
            Some(errno) => Failure {
                step,
                errno,
                detail: on.to_string(),
            },
            None => Failure {
                step,
                errno: 0,
                detail: format!("{on}: {e}"),
            },
        })
    }
}

/// Nanoseconds of the monotonic clock, comparable between processes.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Sends bytes and descriptors in one message.
pub(crate) fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FD_LIMIT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    Ok(rustix::io::retry_on_intr(|| {
        sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    })?)
}

/// Receives bytes and descriptors of one message; no bytes is the end.
pub(crate) fn recv_with_fds(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FD_LIMIT))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::io::retry_on_intr(|| {
        recvmsg(
            &socket,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    Ok((message.bytes, fds))
}

/// Sends one message as a packet.
pub(crate) fn send_packet(socket: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with_fds(socket, &serde_json::to_vec(message)?, fds).map(drop)
}

/// Receives one packet; `None` at the end of the connection.
pub(crate) fn recv_packet<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; PACKET_LIMIT];
    let (n, fds) = recv_with_fds(socket, &mut buffer)?;
    if n == 0 {
        return Ok(None);
    }
    Ok(Some((
        serde_json::from_slice(buffer.get(..n).unwrap_or_default())?,
        fds,
    )))
}

/// A message as length (4 bytes, little endian) and JSON.
pub(crate) fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).ok().filter(|n| *n <= FRAME_LIMIT);
    let length = length.ok_or_else(|| io::Error::other("message too large"))?;
    bytes.splice(..4, length.to_le_bytes());
    Ok(bytes)
}

/// Splits a complete message off the front of `buffer`.
pub(crate) fn take_frame<T: DeserializeOwned>(buffer: &mut Vec<u8>) -> io::Result<Option<T>> {
    let Some(length) = buffer.first_chunk::<4>().map(|b| u32::from_le_bytes(*b)) else {
        return Ok(None);
    };
    if length > FRAME_LIMIT {
        return Err(io::Error::other("message too large"));
    }
    let end = 4 + length as usize;
    let Some(bytes) = buffer.get(4..end) else {
        return Ok(None);
    };
    let message = serde_json::from_slice(bytes)?;
    buffer.drain(..end);
    Ok(Some(message))
}

/// Writes one message (init's side, blocking).
pub(crate) fn write_frame(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    to.write_all(&frame(message)?)
}

/// Reads one message (init's side, blocking); the end of the stream is `UnexpectedEof`.
pub(crate) fn read_frame<T: DeserializeOwned>(mut from: impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > FRAME_LIMIT {
        return Err(io::Error::other("message too large"));
    }
    let mut bytes = vec![0; length as usize];
    from.read_exact(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Bytes in JSON as a string with one character per byte: compact, and free of a second encoding layer.
pub(crate) mod bytes_as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&bytes.iter().map(|b| char::from(*b)).collect::<String>())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(d)?;
        text.chars()
            .map(|c| u8::try_from(u32::from(c)).map_err(|_| D::Error::custom("not a byte")))
            .collect()
    }
}
