//! Patterns over slash-separated paths, exactly as the container field writes them.
//!
//! Three dialects meet in a build: Go's `filepath.Match` (wildcards of COPY sources), the pattern lists of
//! `.dockerignore` files (include and exclude filters everywhere use the same engine), and the link-following lists by
//! which a client sends only what a COPY needs.
//!
//! Tour:
//! - [`glob`]: Go's `filepath.Match`, and which patterns hold wildcards.
//! - [`pattern`]: [`PatternMatcher`], an ordered list of patterns with exclusions and inherited results.
//! - [`ignore_file`]: reading a `.dockerignore`.
//! - [`filter`]: [`Filter`], include and exclude lists for a tree walk that prunes.
//! - [`follow`]: expanding "follow these paths" over the symbolic links of a tree.
//! - [`path`]: lexical cleaning of paths, as Go's `path.Clean`.
//!
//! Paths are bytes: a name need not be text. Deliberately absent: any access to a disk (callers walk), Windows
//! separators, case folding, and brace expansion, which none of the dialects has.

pub mod filter;
pub mod follow;
pub mod glob;
pub mod ignore_file;
pub mod path;
pub mod pattern;

pub use filter::{Filter, FilterState, Verdict};
pub use follow::{LinkSource, follow_links};
pub use glob::{go_match, has_wildcard};
pub use ignore_file::parse_ignore_file;
pub use path::clean;
pub use pattern::{MatchInfo, PatternMatcher};

/// What is wrong with a pattern or with a file of patterns.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The pattern is not well formed (an open bracket, a trailing backslash, an empty class).
    #[error("syntax error in pattern")]
    BadPattern,
    /// A pattern that is an exclusion mark and nothing else.
    #[error("illegal exclusion pattern: \"!\"")]
    EmptyExclusion,
    /// A line of an ignore file is longer than 64 KiB.
    #[error("line {line} of the ignore file is too long")]
    LineTooLong {
        /// The line's number, from 1.
        line: usize,
    },
}
