//! `kilnd`: an image builder daemon that speaks BuildKit's protocol.
//!
//! Tour: [`flags`] and [`config`] say what is wanted, [`daemon`] wires the rooms and serves, [`listen`] accepts. A build goes
//! through [`control`] to [`solve`]; its frontend asks [`bridge`], from the client's side through [`gateway`]; [`export`] and
//! [`attest`] make what comes out, [`history`] remembers. [`progress`] and [`spool`] carry what is shown, [`status`] makes
//! every error that leaves the daemon.
//!
//! Absent on purpose: decisions that belong to a room.

mod admission;
mod attest;
mod bridge;
mod builds;
mod config;
mod content;
mod control;
mod credentials;
mod daemon;
mod export;
mod filter;
mod flags;
mod gateway;
mod history;
mod history_filter;
mod listen;
mod notify;
mod platforms;
mod progress;
mod provenance;
mod results;
mod size;
mod solve;
mod spool;
mod start;
mod status;
mod telemetry;
mod usage;

use clap::Parser as _;
use rand::Rng as _;

pub(crate) use daemon::{Daemon, Job, version};

use crate::flags::Flags;

fn main() -> std::process::ExitCode {
    // Re-executed by the executor, this process is a step's init and nothing else.
    kiln_executor::maybe_init();
    let flags = Flags::parse();
    if flags.version {
        let v = version();
        // The only thing this program ever prints to standard output.
        #[allow(clippy::print_stdout, reason = "asked for by the user")]
        {
            println!("kilnd {} {} {}", v.package, v.version, v.revision);
        }
        return std::process::ExitCode::SUCCESS;
    }
    match start::run(&flags) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            #[allow(clippy::print_stderr, reason = "logs may not be set up yet")]
            {
                eprintln!("kilnd: {error}");
            }
            std::process::ExitCode::FAILURE
        }
    }
}

/// An id as clients make them: 25 lower-case letters and digits.
pub(crate) fn random_id() -> String {
    const ALPHABET: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut rng = rand::rng();
    (0..25)
        .map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]))
        .collect()
}
