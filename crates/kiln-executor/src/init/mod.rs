//! The other side of the executor: a small single-threaded process that launches, and what happens between its fork and
//! `execve`. No tokio here, and nothing that starts a thread.

mod capabilities;
mod child;
mod identity;
mod launcher;
mod mounts;
mod network;
mod rootfs;
mod seccomp;
mod terminal;
mod walk;

use std::ffi::OsStr;

/// First argument of a process that is to be the launcher.
pub(crate) const LAUNCHER_NAME: &str = "kiln-launcher";
/// Its only other argument.
pub(crate) const LAUNCHER_ARGUMENT: &str = "socket-on-stdin";

/// Must be the first line of `main` of every program that uses [`NamespaceExecutor`](crate::NamespaceExecutor): the executor
/// runs a sealed copy of the program as its launcher, and this is where that copy branches off, never to return.
pub fn maybe_init() {
    let mut args = std::env::args_os();
    if args.next().as_deref() == Some(OsStr::new(LAUNCHER_NAME))
        && args.next().as_deref() == Some(OsStr::new(LAUNCHER_ARGUMENT))
    {
        launcher::main()
    }
}
