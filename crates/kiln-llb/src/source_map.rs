//! Where vertices come from in the user's text, so that an error can show its line.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::definition::Definition;
use crate::graph::VertexDigest;

/// Locations by vertex, and the texts they point into.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceMap {
    /// Locations in the order given.
    pub locations: BTreeMap<VertexDigest, Vec<SourceLocation>>,
    /// The texts.
    pub infos: Vec<SourceInfo>,
}

impl SourceMap {
    /// Every location of `vertex` with the text it points into; locations without text are left out.
    pub fn locate(&self, vertex: &VertexDigest) -> impl Iterator<Item = (&SourceInfo, &[SourceRange])> {
        self.locations.get(vertex).into_iter().flatten().filter_map(|l| {
            let info = self.infos.get(usize::try_from(l.source_index).ok()?)?;
            Some((info, l.ranges.as_slice()))
        })
    }
}

/// Ranges in one text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceLocation {
    /// Index into [`SourceMap::infos`].
    pub source_index: i32,
    /// The ranges.
    pub ranges: Vec<SourceRange>,
}

/// A text, usually a Dockerfile.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceInfo {
    /// Name shown to the user.
    pub filename: String,
    /// The text itself.
    pub data: Bytes,
    /// How the text was obtained, if known.
    pub definition: Option<Box<Definition>>,
    /// Language, for example `Dockerfile`.
    pub language: String,
}

/// A range of lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceRange {
    /// First position.
    pub start: SourcePosition,
    /// Last position, inclusive.
    pub end: SourcePosition,
}

/// A position; lines count from 1, characters from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourcePosition {
    /// Line.
    pub line: i32,
    /// Character.
    pub character: i32,
}
