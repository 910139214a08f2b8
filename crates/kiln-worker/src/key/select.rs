//! Selectors: which paths of an input an operation looks at.

use kiln_oci::Digest;

/// One path whose content is part of a key (cache-keys.md §3, §4.4).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContentSelector {
    /// The path as the operation names it.
    pub path: String,
    /// Whether a symlink that the path itself names is followed.
    pub follow_links: bool,
    /// Whether the path may match several entries.
    pub wildcard: bool,
    /// Only what matches.
    pub include: Vec<String>,
    /// Nothing that matches.
    pub exclude: Vec<String>,
    /// Paths that must be among what is included.
    pub required: Vec<String>,
}

impl ContentSelector {
    /// A path without wildcards and filters.
    pub(super) fn plain(path: impl Into<String>, follow_links: bool) -> Self {
        Self {
            path: path.into(),
            follow_links,
            ..Self::default()
        }
    }

    fn is_plain(&self) -> bool {
        !self.wildcard && self.include.is_empty() && self.exclude.is_empty() && self.required.is_empty()
    }
}

/// The digest that stands for a list of paths in a key by identity.
pub(super) fn selector_of<S: AsRef<str>>(paths: &[S]) -> Digest {
    let texts: Vec<&str> = paths.iter().map(AsRef::as_ref).collect();
    Digest::of(texts.join("\0"))
}

/// Equal paths and paths below another one are dropped, the rest is in byte order. A single path stays as it is.
pub(super) fn without_nested(mut paths: Vec<String>) -> Vec<String> {
    if paths.len() < 2 {
        return paths;
    }
    paths.sort();
    paths.dedup();
    let all = paths.clone();
    paths.retain(|path| {
        !all.iter().any(|other| {
            other != path
                && path
                    .strip_prefix(other.as_str())
                    .is_some_and(|rest| other.ends_with('/') || rest.starts_with('/'))
        })
    });
    paths
}

/// The selectors of a file operation in the order they are hashed: plain paths without nested ones, links followed and not
/// followed apart; everything ordered by path.
pub(super) fn ordered(selectors: Vec<ContentSelector>) -> Vec<ContentSelector> {
    let (plain, mut rest): (Vec<_>, Vec<_>) = selectors.into_iter().partition(ContentSelector::is_plain);
    let (followed, not): (Vec<_>, Vec<_>) = plain.into_iter().partition(|s| s.follow_links);
    for (group, follow) in [(followed, true), (not, false)] {
        let paths = without_nested(group.into_iter().map(|s| s.path).collect());
        rest.extend(paths.into_iter().map(|path| ContentSelector::plain(path, follow)));
    }
    rest.sort_by(|a, b| a.path.cmp(&b.path));
    rest
}
