//! Operations that only arrange their inputs: merge, diff, passthrough, and the nested build.

use std::collections::BTreeMap;

use super::InputIndex;

/// Lays inputs over each other, later ones on top. At least two.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MergeOp {
    /// The inputs from bottom to top; `None` is an empty directory.
    pub inputs: Vec<Option<InputIndex>>,
}

/// What `upper` has changed relative to `lower`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiffOp {
    /// The older state; `None` is an empty directory.
    pub lower: Option<InputIndex>,
    /// The newer state; `None` is an empty directory.
    pub upper: Option<InputIndex>,
}

/// Hands inputs on unchanged, to keep vertices alive or in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PassthroughOp {
    /// Tells otherwise equal operations apart.
    pub id: String,
    /// Which input each output is; negative ones are nothing.
    pub outputs: Vec<i64>,
}

/// Solves a definition that a file of an input holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BuildOp {
    /// Who builds; only `-1`, the daemon itself.
    pub builder: i64,
    /// Inputs by name.
    pub inputs: BTreeMap<String, Option<InputIndex>>,
    /// A definition sent along, still encoded.
    pub definition: Option<crate::Definition>,
    /// Options by name.
    pub attrs: BTreeMap<String, String>,
}
