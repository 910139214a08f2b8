//! `SourceOp`: something that comes from outside the graph.

use std::collections::BTreeMap;

/// A source named by an identifier such as `docker-image://…`, `local://…`, `git://…`, `https://…`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceOp {
    /// Scheme and reference.
    pub identifier: String,
    /// Options by name; booleans are the text `true`.
    pub attrs: BTreeMap<String, String>,
}

impl SourceOp {
    /// The part before `://`; empty if there is none.
    pub fn scheme(&self) -> &str {
        self.identifier.split_once("://").map_or("", |(scheme, _)| scheme)
    }

    /// The part after `://`; the whole identifier if there is none.
    pub fn reference(&self) -> &str {
        self.identifier
            .split_once("://")
            .map_or(self.identifier.as_str(), |(_, reference)| reference)
    }

    /// An attribute's text, if set.
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attrs.get(name).map(String::as_str)
    }

    /// Whether a boolean attribute is the text `true`.
    pub fn flag(&self, name: &str) -> bool {
        self.attr(name) == Some("true")
    }
}
