//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Builds container images.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, about)]
pub(crate) struct Cli {
    /// Daemon to use (unix://path or tcp://host:port); without it kiln starts one for itself
    #[arg(long, global = true, env = "KILN_ADDR")]
    pub(crate) addr: Option<String>,
    /// Configuration file for the daemon that kiln starts
    #[arg(long, global = true, env = "KILN_DAEMON_CONFIG")]
    pub(crate) daemon_config: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build an image from a Dockerfile
    Build(Box<BuildArgs>),
    /// Show what the daemon keeps on disk
    Du(DuArgs),
    /// Remove what the daemon keeps and no build uses
    Prune(PruneArgs),
    /// List the daemon's workers
    Workers,
    /// Show the daemon's version
    Info,
}

#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// Directory that COPY and ADD read from, a git or http URL, or - for a tar archive on standard input
    pub(crate) context: String,
    /// Name of the image; may be repeated
    #[arg(short = 't', long = "tag", value_name = "NAME[:TAG]")]
    pub(crate) tags: Vec<String>,
    /// The Dockerfile, by default Dockerfile in the context directory
    #[arg(short = 'f', long, value_name = "PATH")]
    pub(crate) file: Option<PathBuf>,
    /// Stage to build
    #[arg(long)]
    pub(crate) target: Option<String>,
    /// Build argument; without a value it is taken from the environment
    #[arg(long, value_name = "KEY[=VALUE]")]
    pub(crate) build_arg: Vec<String>,
    /// Further directory, image or URL that the Dockerfile may name
    #[arg(long, value_name = "NAME=PATH")]
    pub(crate) build_context: Vec<String>,
    /// Label of the image
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<String>,
    /// Secret for RUN --mount=type=secret
    #[arg(long, value_name = "id=ID[,src=PATH|,env=NAME]")]
    pub(crate) secret: Vec<String>,
    /// ssh agent for RUN --mount=type=ssh
    #[arg(long, value_name = "default|ID[=SOCKET]")]
    pub(crate) ssh: Vec<String>,
    /// Where the result goes, such as type=oci,dest=image.tar or a directory
    #[arg(short = 'o', long, value_name = "type=TYPE[,KEY=VALUE]|PATH")]
    pub(crate) output: Vec<String>,
    /// Push the image to its registry
    #[arg(long)]
    pub(crate) push: bool,
    /// Use no cached results
    #[arg(long)]
    pub(crate) no_cache: bool,
    /// Stages whose cached results are not used
    #[arg(long, value_delimiter = ',', value_name = "STAGE")]
    pub(crate) no_cache_filter: Vec<String>,
    /// Look for newer base images
    #[arg(long)]
    pub(crate) pull: bool,
    /// Platforms to build for
    #[arg(long, value_delimiter = ',', value_name = "OS/ARCH")]
    pub(crate) platform: Vec<String>,
    /// Network of RUN steps
    #[arg(long, value_name = "default|none|host")]
    pub(crate) network: Option<String>,
    /// Entry for /etc/hosts
    #[arg(long, value_name = "NAME:IP")]
    pub(crate) add_host: Vec<String>,
    /// What a build may ask for beyond the ordinary
    #[arg(long, value_name = "ENTITLEMENT")]
    pub(crate) allow: Vec<String>,
    /// Attach a provenance attestation, such as mode=max
    #[arg(long, value_name = "ATTRIBUTES", num_args = 0..=1, default_missing_value = "mode=min")]
    pub(crate) provenance: Option<String>,
    /// Cache to start from, such as type=registry,ref=NAME
    #[arg(long, value_name = "type=TYPE[,KEY=VALUE]")]
    pub(crate) cache_from: Vec<String>,
    /// Where the cache goes
    #[arg(long, value_name = "type=TYPE[,KEY=VALUE]")]
    pub(crate) cache_to: Vec<String>,
    /// How progress is shown
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto)]
    pub(crate) progress: ProgressMode,
    /// Print the image's digest and nothing else
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
    /// Write what the build answered to a file, as JSON
    #[arg(long, value_name = "PATH")]
    pub(crate) metadata_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressMode {
    /// tty on a terminal, plain elsewhere
    Auto,
    /// Line by line
    Plain,
    /// A display that moves
    Tty,
    /// Nothing
    Quiet,
}

#[derive(Debug, Args)]
pub(crate) struct DuArgs {
    /// Show all details of each record
    #[arg(short = 'v', long)]
    pub(crate) verbose: bool,
    /// Restrict to records, such as type==regular
    #[arg(long)]
    pub(crate) filter: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Restrict to records, such as type==exec.cachemount
    #[arg(long)]
    pub(crate) filter: Vec<String>,
    /// Also records of base images and frontends
    #[arg(short = 'a', long)]
    pub(crate) all: bool,
    /// Keep what was used within this time, such as 36h
    #[arg(long, value_name = "DURATION")]
    pub(crate) keep_duration: Option<String>,
    /// Keep at least so much, such as 10GB
    #[arg(long, value_name = "SIZE")]
    pub(crate) reserved_space: Option<String>,
    /// Keep at most so much
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_used_space: Option<String>,
    /// Remove until so much is free on the disk
    #[arg(long, value_name = "SIZE")]
    pub(crate) min_free_space: Option<String>,
}
