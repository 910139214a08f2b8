//! `FileOp`: a list of file changes, each on top of an input or of an earlier change.

use bytes::Bytes;

use super::{InputIndex, OutputIndex};

/// File changes that together make the outputs of one vertex.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileOp {
    /// The changes in order.
    pub actions: Vec<FileAction>,
}

impl FileOp {
    /// Number of outputs: one more than the highest output index.
    pub fn outputs(&self) -> u32 {
        self.actions
            .iter()
            .filter_map(|a| a.output)
            .map(|i| i + 1)
            .max()
            .unwrap_or(0)
    }
}

/// One change. Index space of `input` and `secondary_input`: `0..n` are the vertex's `n` inputs, `n + k` is the result of
/// action `k`, `None` is an empty directory.
#[derive(Clone, Debug, PartialEq)]
pub struct FileAction {
    /// What the change is applied to.
    pub input: Option<InputIndex>,
    /// Where a copy takes its source from.
    pub secondary_input: Option<InputIndex>,
    /// Output of the vertex that this action's result becomes; `None` for intermediate results.
    pub output: Option<OutputIndex>,
    /// The change.
    pub kind: FileActionKind,
}

/// What an action does.
#[derive(Clone, Debug, PartialEq)]
pub enum FileActionKind {
    /// Copy from the secondary input.
    Copy(CopyAction),
    /// Write a file.
    MkFile(MkFileAction),
    /// Make a directory.
    MkDir(MkDirAction),
    /// Remove.
    Rm(RmAction),
    /// Make a symbolic link.
    Symlink(SymlinkAction),
}

/// Copies `src` of the secondary input to `dest`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CopyAction {
    /// Source path; may hold wildcards if `allow_wildcard`.
    pub src: String,
    /// Destination path; a trailing `/` means "into this directory".
    pub dest: String,
    /// New owner; `None` keeps the source's.
    pub owner: Option<ChownOpt>,
    /// New mode bits; `-1` keeps the source's.
    pub mode: i32,
    /// Follow a symlink that `src` itself names.
    pub follow_symlink: bool,
    /// Copy a directory's entries rather than the directory.
    pub dir_copy_contents: bool,
    /// Unpack `src` if it is an archive.
    pub attempt_unpack: bool,
    /// Make missing parents of `dest`.
    pub create_dest_path: bool,
    /// `src` may hold wildcards.
    pub allow_wildcard: bool,
    /// A wildcard without match is no error.
    pub allow_empty_wildcard: bool,
    /// New mtime in nanoseconds since 1970; `-1` keeps the source's.
    pub timestamp: i64,
    /// Only what matches, relative to the source directory.
    pub include_patterns: Vec<String>,
    /// Nothing that matches, relative to the source directory.
    pub exclude_patterns: Vec<String>,
    /// Replace what stands at the destination even if its type differs.
    pub always_replace_existing_dest_paths: bool,
    /// New mode in the symbolic form of `chmod(1)`; empty keeps `mode`.
    pub mode_str: String,
    /// Paths that must have been included.
    pub required_paths: Vec<String>,
}

/// Writes a file, replacing what it held.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MkFileAction {
    /// Path of the file.
    pub path: String,
    /// Permission bits.
    pub mode: i32,
    /// Content.
    pub data: Bytes,
    /// Owner; `None` is root.
    pub owner: Option<ChownOpt>,
    /// mtime in nanoseconds since 1970; `-1` is the current time.
    pub timestamp: i64,
}

/// Makes a directory; an existing one is left as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MkDirAction {
    /// Path of the directory.
    pub path: String,
    /// Permission bits.
    pub mode: i32,
    /// Make missing parents too.
    pub make_parents: bool,
    /// Owner; `None` is root.
    pub owner: Option<ChownOpt>,
    /// mtime in nanoseconds since 1970; `-1` is the current time.
    pub timestamp: i64,
}

/// Removes a path; its last component is not followed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RmAction {
    /// Path; may hold wildcards if `allow_wildcard`.
    pub path: String,
    /// A missing path is no error.
    pub allow_not_found: bool,
    /// `path` may hold wildcards.
    pub allow_wildcard: bool,
}

/// Makes a symbolic link; fails if something stands there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SymlinkAction {
    /// Text of the link.
    pub oldpath: String,
    /// Where the link is made.
    pub newpath: String,
    /// Owner; `None` is root.
    pub owner: Option<ChownOpt>,
    /// mtime in nanoseconds since 1970; `-1` is the current time.
    pub timestamp: i64,
}

/// New owner of files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChownOpt {
    /// The user, if given.
    pub user: Option<UserOpt>,
    /// The group, if given.
    pub group: Option<UserOpt>,
}

/// A user or group by name or number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserOpt {
    /// Looked up in `/etc/passwd` or `/etc/group` of an input (`None` is an empty directory, an error when used).
    ByName {
        /// The name.
        name: String,
        /// The input whose files decide.
        input: Option<InputIndex>,
    },
    /// The number itself.
    ById(u32),
}
