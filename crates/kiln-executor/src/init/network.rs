//! The network of a fresh namespace.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::error::Step;
use crate::protocol::{At, Failure};
use crate::sys;

/// Brings the loopback device up; its addresses come with it.
pub(crate) fn loopback() -> Result<(), Failure> {
    let socket =
        socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).at(Step::Network, "socket")?;
    sys::interface_up(socket, c"lo").at(Step::Network, "lo")
}
