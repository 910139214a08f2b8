//! `kilnd`, the daemon.

mod config;
mod flags;
mod listen;
mod size;
mod spool;
mod status;

fn main() {}
