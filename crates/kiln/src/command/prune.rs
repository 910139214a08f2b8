//! `kiln prune`: remove what no build uses.

use kiln_proto::control::PruneRequest;

use crate::cli::PruneArgs;
use crate::connect::Daemon;
use crate::error::Result;
use crate::options::{duration, size};
use crate::render::bytes;

pub(super) async fn run(args: PruneArgs, daemon: &Daemon) -> Result<()> {
    let optional = |text: Option<&String>, read: fn(&str) -> Result<i64>| text.map_or(Ok(0), |text| read(text));
    let request = PruneRequest {
        filter: args.filter,
        all: args.all,
        keep_duration: optional(args.keep_duration.as_ref(), duration)?,
        reserved_space: optional(args.reserved_space.as_ref(), size)?,
        max_used_space: optional(args.max_used_space.as_ref(), size)?,
        min_free_space: optional(args.min_free_space.as_ref(), size)?,
    };
    let mut removed = daemon.control().prune(request).await?.into_inner();
    let (mut count, mut total) = (0, 0);
    while let Some(record) = removed.message().await? {
        super::print(&format!("{:<28} {:>10}\n", record.id, bytes(record.size)))?;
        count += 1;
        total += record.size;
    }
    super::print(&format!("removed {count} records, {}\n", bytes(total)))
}
