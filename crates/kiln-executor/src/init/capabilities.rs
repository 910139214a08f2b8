//! Capability sets of the process (`capabilities(7)`).

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use crate::error::Step;
use crate::protocol::{At, Failure};
use crate::spec::SecurityMode;
use crate::sys;

/// What a confined process keeps: the fourteen that builds are used to.
pub(crate) const DEFAULT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// Highest capability number that may exist.
const LAST: u32 = 63;

/// The sets a process of this mode ends up with: never more than the daemon has.
pub(crate) fn wanted(security: SecurityMode) -> Result<CapabilitySet, Failure> {
    let own = capabilities(None).at(Step::Capabilities, "")?.permitted;
    Ok(match security {
        SecurityMode::Sandbox => DEFAULT & own,
        SecurityMode::Insecure => own,
    })
}

/// Shrinks the bounding set; needs `CAP_SETPCAP`, so it comes before the change of user.
pub(crate) fn bound(wanted: CapabilitySet) -> Result<(), Failure> {
    for number in 0..=LAST {
        if wanted.bits() & (1 << number) != 0 {
            continue;
        }
        match sys::drop_bounding(number) {
            Ok(()) => {}
            // The kernel knows no capability of this or a higher number.
            Err(rustix::io::Errno::INVAL) => break,
            Err(e) => return Err(e).at(Step::Capabilities, "of the bounding set"),
        }
    }
    Ok(())
}

/// Sets the final sets; comes after the change of user (with "keep capabilities" on).
pub(crate) fn apply(wanted: CapabilitySet, security: SecurityMode) -> Result<(), Failure> {
    let inheritable = match security {
        SecurityMode::Sandbox => CapabilitySet::empty(),
        SecurityMode::Insecure => wanted,
    };
    set_capabilities(
        None,
        CapabilitySets {
            effective: wanted,
            permitted: wanted,
            inheritable,
        },
    )
    .at(Step::Capabilities, "")?;
    if security == SecurityMode::Insecure {
        for number in (0..=LAST).filter(|n| wanted.bits() & (1 << n) != 0) {
            sys::raise_ambient(number).at(Step::Capabilities, "of the ambient set")?;
        }
    }
    Ok(())
}
