//! `kiln du`: what the daemon keeps on disk.

use kiln_proto::Timestamp;
use kiln_proto::control::{DiskUsageRequest, UsageRecord};

use crate::cli::DuArgs;
use crate::connect::Daemon;
use crate::error::Result;
use crate::render::bytes;

pub(super) async fn run(args: DuArgs, daemon: &Daemon) -> Result<()> {
    let request = DiskUsageRequest {
        filter: args.filter,
        age_limit: 0,
    };
    let mut records = daemon.control().disk_usage(request).await?.into_inner().record;
    records.sort_by_key(|record| std::cmp::Reverse(record.size));
    let mut text = String::new();
    if args.verbose {
        for record in &records {
            text.push_str(&details(record));
        }
    } else if !records.is_empty() {
        text.push_str(&format!(
            "{:<28} {:<12} {:>10}  {}\n",
            "ID", "RECLAIMABLE", "SIZE", "LAST USED"
        ));
        for record in &records {
            let id: String = record.id.chars().take(27).collect();
            let used = record.last_used_at.as_ref().map(time).unwrap_or_default();
            text.push_str(&format!(
                "{id:<28} {:<12} {:>10}  {used}\n",
                !record.in_use,
                bytes(record.size)
            ));
        }
    }
    let sum = |keep: fn(&UsageRecord) -> bool| bytes(records.iter().filter(|r| keep(r)).map(|r| r.size).sum());
    text.push_str(&format!("shared       {}\n", sum(|record| record.shared)));
    text.push_str(&format!("private      {}\n", sum(|record| !record.shared)));
    text.push_str(&format!("reclaimable  {}\n", sum(|record| !record.in_use)));
    text.push_str(&format!("total        {}\n", sum(|_| true)));
    super::print(&text)
}

/// All of one record.
pub(super) fn details(record: &UsageRecord) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            text.push_str(&format!("{name:<13} {value}\n"));
        }
    };
    line("id", record.id.clone());
    line("parents", record.parents.join(", "));
    line("created", record.created_at.as_ref().map(time).unwrap_or_default());
    line("last used", record.last_used_at.as_ref().map(time).unwrap_or_default());
    line("usage count", record.usage_count.to_string());
    line("mutable", record.mutable.to_string());
    line("reclaimable", (!record.in_use).to_string());
    line("shared", record.shared.to_string());
    line("size", bytes(record.size));
    line("description", record.description.clone());
    line("type", record.record_type.clone());
    text.push('\n');
    text
}

fn time(at: &Timestamp) -> String {
    let found = jiff::Timestamp::new(at.seconds, at.nanos);
    found
        .map(|at| at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
        .unwrap_or_default()
}
