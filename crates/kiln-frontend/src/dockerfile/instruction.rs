//! Typed instructions: what a Dockerfile says, words not yet expanded.

use super::heredoc::Heredoc;
use super::parser::Pair;
use super::span::Span;
use super::stage::Stage;

/// One instruction of a stage.
#[derive(Clone, Debug)]
pub struct Instruction {
    /// The keyword as written.
    pub keyword: String,
    /// The logical line, trimmed.
    pub text: String,
    /// Its lines.
    pub span: Span,
    /// Comments before it.
    pub comments: Vec<String>,
    /// What it says.
    pub kind: Kind,
}

/// What an instruction says.
#[derive(Clone, Debug)]
pub enum Kind {
    /// ADD.
    Add(Box<Add>),
    /// ARG.
    Arg(Vec<Argument>),
    /// CMD.
    Cmd(CommandLine),
    /// COPY.
    Copy(Box<Copy>),
    /// ENTRYPOINT.
    Entrypoint(CommandLine),
    /// ENV.
    Env(Vec<Pair>),
    /// EXPOSE.
    Expose(Vec<String>),
    /// HEALTHCHECK.
    Healthcheck(Healthcheck),
    /// LABEL.
    Label(Vec<Pair>),
    /// MAINTAINER.
    Maintainer(String),
    /// ONBUILD, with the text of its trigger.
    Onbuild(String),
    /// RUN.
    Run(Box<Run>),
    /// SHELL.
    Shell(Vec<String>),
    /// STOPSIGNAL.
    StopSignal(String),
    /// USER.
    User(String),
    /// VOLUME.
    Volume(Vec<String>),
    /// WORKDIR.
    Workdir(String),
}

/// An instruction, or the FROM that begins a stage.
#[derive(Clone, Debug)]
pub enum Parsed {
    /// FROM.
    Stage(Stage),
    /// Anything else.
    Instruction(Instruction),
}

/// A command in JSON or in shell form.
#[derive(Clone, Debug, Default)]
pub struct CommandLine {
    /// The words; one in shell form.
    pub args: Vec<String>,
    /// Whether a shell runs it.
    pub shell: bool,
}

/// Sources and destination of ADD and COPY.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    /// Paths, and URLs for ADD.
    pub sources: Vec<String>,
    /// Here-documents.
    pub contents: Vec<Content>,
    /// Destination.
    pub destination: String,
}

/// A here-document to copy.
#[derive(Clone, Debug)]
pub struct Content {
    /// File name.
    pub name: String,
    /// Bytes.
    pub data: Vec<u8>,
    /// Whether variables in it are expanded.
    pub expand: bool,
}

/// ADD.
#[derive(Clone, Debug, Default)]
pub struct Add {
    /// What goes where.
    pub paths: Paths,
    /// `--chown`.
    pub chown: String,
    /// `--chmod`.
    pub chmod: String,
    /// `--link`.
    pub link: bool,
    /// `--keep-git-dir`.
    pub keep_git_dir: Option<bool>,
    /// `--checksum`.
    pub checksum: String,
    /// `--unpack`.
    pub unpack: Option<bool>,
    /// `--exclude`.
    pub exclude: Vec<String>,
}

/// COPY.
#[derive(Clone, Debug, Default)]
pub struct Copy {
    /// What goes where.
    pub paths: Paths,
    /// `--from`.
    pub from: String,
    /// `--chown`.
    pub chown: String,
    /// `--chmod`.
    pub chmod: String,
    /// `--link`.
    pub link: bool,
    /// `--parents`.
    pub parents: bool,
    /// `--exclude`.
    pub exclude: Vec<String>,
}

/// One variable of an ARG.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Name.
    pub name: String,
    /// Default value before expansion.
    pub value: Option<String>,
    /// What the comment above says about it.
    pub description: String,
}

/// RUN.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// The command.
    pub command: CommandLine,
    /// Here-documents.
    pub files: Vec<Heredoc>,
    /// `--mount` options as written.
    pub mounts: Vec<String>,
    /// What each mount names as its source.
    pub mount_from: Vec<String>,
    /// `--network`.
    pub network: Network,
    /// `--security=insecure`.
    pub insecure: bool,
    /// `--device`: name, and whether it must be there.
    pub devices: Vec<(String, bool)>,
}

/// Network of a RUN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// What the build is set to.
    #[default]
    Default,
    /// None.
    None,
    /// The host's.
    Host,
}

/// HEALTHCHECK, durations in nanoseconds with 0 for "inherit".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Healthcheck {
    /// `NONE`, `CMD` or `CMD-SHELL` and the command.
    pub test: Vec<String>,
    /// Between checks.
    pub interval: i64,
    /// For one check.
    pub timeout: i64,
    /// Before failures count.
    pub start_period: i64,
    /// Between checks in the start period.
    pub start_interval: i64,
    /// Failures in a row.
    pub retries: i64,
}
