//! A pseudo-terminal of the process's own devpts as its controlling terminal.

use std::os::fd::OwnedFd;

use rustix::fs::{Gid, Mode, OFlags, Uid, fchmod, fchown, open};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::error::Step;
use crate::protocol::{At, Failure};
use crate::spec::TerminalSize;
use crate::sys;

/// Opens a terminal, makes it the controlling one and the three standard streams; returns the other side and this one.
///
/// The caller leads a session without a terminal.
pub(crate) fn take(size: TerminalSize, uid: u32) -> Result<(OwnedFd, OwnedFd), Failure> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = open("/dev/ptmx", flags, Mode::empty()).at(Step::Terminal, "/dev/ptmx")?;
    let slave = sys::open_terminal(&master).at(Step::Terminal, "")?;
    let winsize = Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&slave, winsize).at(Step::Terminal, "size")?;
    fchown(&slave, Some(Uid::from_raw(uid)), None::<Gid>).at(Step::Terminal, "owner")?;
    fchmod(&slave, Mode::from_raw_mode(0o620)).at(Step::Terminal, "mode")?;
    rustix::process::ioctl_tiocsctty(&slave).at(Step::Terminal, "")?;
    nix::unistd::dup2_stdin(&slave).at(Step::Streams, "stdin")?;
    nix::unistd::dup2_stdout(&slave).at(Step::Streams, "stdout")?;
    nix::unistd::dup2_stderr(&slave).at(Step::Streams, "stderr")?;
    Ok((master, slave))
}
