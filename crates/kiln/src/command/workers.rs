//! `kiln workers`: what can run builds.

use kiln_proto::control::ListWorkersRequest;

use crate::connect::Daemon;
use crate::error::Result;

pub(super) async fn run(daemon: &Daemon) -> Result<()> {
    let workers = daemon
        .control()
        .list_workers(ListWorkersRequest { filter: Vec::new() })
        .await?
        .into_inner();
    let mut text = String::new();
    for worker in workers.record {
        let platforms: Vec<String> = worker.platforms.iter().map(super::platform).collect();
        text.push_str(&format!(
            "worker    {}\nplatforms {}\n",
            worker.id,
            platforms.join(", ")
        ));
        for (key, value) in &worker.labels {
            text.push_str(&format!("label     {key}={value}\n"));
        }
    }
    super::print(&text)
}
