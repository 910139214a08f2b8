//! `kilnd`, the daemon.

mod config;
mod filter;
mod flags;
mod listen;
mod platforms;
mod size;
mod spool;
mod status;
mod telemetry;

fn main() {}
