//! `kiln info`: the daemon's version.

use kiln_proto::control::InfoRequest;

use crate::connect::Daemon;
use crate::error::Result;

pub(super) async fn run(daemon: &Daemon) -> Result<()> {
    let info = daemon.control().info(InfoRequest {}).await?.into_inner();
    let version = info.buildkit_version.unwrap_or_default();
    super::print(&format!(
        "daemon    {} {} {}\n",
        version.package, version.version, version.revision
    ))
}
