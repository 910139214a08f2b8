//! The operations a vertex can stand for, one file per kind.
//!
//! These are Kiln's own types: checked once when they come in from the wire, plain data afterwards. Indexes that may be
//! `-1` on the wire ("nothing", "scratch") are `Option`s here.

mod exec;
mod file;
mod source;
mod structure;

pub use exec::{
    CacheMountOpt, CacheSharing, CdiDevice, ExecMeta, ExecMount, ExecOp, HostIp, MountContentCache, MountType, NetMode,
    ProxyEnv, SecretEnv, SecretMountOpt, SecurityMode, SshMountOpt, TmpfsOpt, Ulimit,
};
pub use file::{
    ChownOpt, CopyAction, FileAction, FileActionKind, FileOp, MkDirAction, MkFileAction, RmAction, SymlinkAction,
    UserOpt,
};
pub use source::SourceOp;
pub use structure::{BuildOp, DiffOp, MergeOp, PassthroughOp};

/// Position in the list of a vertex's inputs.
pub type InputIndex = u32;

/// Position in the list of a vertex's outputs.
pub type OutputIndex = u32;

/// What a vertex does.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Run a process over mounted inputs.
    Exec(ExecOp),
    /// Bring something in from outside the graph.
    Source(SourceOp),
    /// Change files without running anything.
    File(FileOp),
    /// Load a further definition from a file of an input and solve it.
    Build(BuildOp),
    /// Lay inputs over each other.
    Merge(MergeOp),
    /// Only what one input has changed relative to another.
    Diff(DiffOp),
    /// Hand inputs on unchanged.
    Passthrough(PassthroughOp),
}
