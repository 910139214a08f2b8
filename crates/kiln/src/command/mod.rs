//! The commands, and how each gets its daemon.

mod build;
mod du;
mod info;
mod prune;
mod workers;

use std::future::Future;
use std::io::{self, Write as _};

use crate::cli::{Cli, Command};
use crate::connect::Daemon;
use crate::error::{CliError, Result};
use crate::local::LocalDaemon;

/// Runs what was typed; Ctrl-C ends it in order.
pub(crate) async fn run(cli: Cli) -> Result<()> {
    let (daemon, own) = match &cli.addr {
        Some(address) => (Daemon::connect(address).await?, None),
        None => {
            let (own, daemon) = LocalDaemon::acquire(cli.daemon_config.as_deref()).await?;
            (daemon, Some(own))
        }
    };
    let outcome = interruptible(command(cli.command, &daemon)).await;
    drop(daemon);
    let released = match own {
        Some(own) => own.release().await,
        None => Ok(()),
    };
    outcome.and(released)
}

async fn command(command: Command, daemon: &Daemon) -> Result<()> {
    match command {
        Command::Build(args) => build::run(*args, daemon).await,
        Command::Du(args) => du::run(args, daemon).await,
        Command::Prune(args) => prune::run(args, daemon).await,
        Command::Workers => workers::run(daemon).await,
        Command::Info => info::run(daemon).await,
    }
}

/// The work, unless the user or the system asks to stop; it is then dropped, which cancels its calls.
async fn interruptible(work: impl Future<Output = Result<()>>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error| CliError::io("listen for signals", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    tokio::select! {
        outcome = work => outcome,
        _ = tokio::signal::ctrl_c() => Err(CliError::Interrupted),
        _ = terminate.recv() => Err(CliError::Interrupted),
    }
}

/// Writes to standard output; that nobody reads it is no error.
fn print(text: &str) -> Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CliError::io("write standard output", error)),
        _ => Ok(()),
    }
}

/// `linux/amd64`, `linux/arm/v7`.
fn platform(platform: &kiln_proto::llb::Platform) -> String {
    let mut text = format!("{}/{}", platform.os, platform.architecture);
    if !platform.variant.is_empty() {
        text.push('/');
        text.push_str(&platform.variant);
    }
    text
}
