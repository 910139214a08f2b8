//! `kiln`, the command line: builds images with a Kiln daemon (or any daemon that speaks BuildKit's protocol), one that
//! runs already or one it starts for itself.
//!
//! Tour: [`cli`] (what can be typed), [`connect`] and [`local`] (reaching a daemon, starting one), [`command`] (one module
//! for each command), [`options`] (values with commas in them), [`render`] (progress), [`report`] (results and errors).
//! Deliberately absent: everything a build consists of. That is the daemon's.

mod cli;
mod command;
mod connect;
mod error;
mod local;
mod options;
mod render;
mod report;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("KILN_LOG").unwrap_or_default())
        .with_writer(std::io::stderr)
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            report::error(&error::CliError::io("start", error));
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(command::run(cli));
    // Reads of standard input cannot be cancelled; nobody waits for them.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report::error(&error);
            error.exit_code()
        }
    }
}
