//! Include and exclude lists for the walk of a tree, with pruning.

use crate::Error;
use crate::pattern::{MatchInfo, PatternMatcher};

/// Include and exclude patterns. Without include patterns everything is included; exclusion wins over inclusion.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    include: Option<PatternMatcher>,
    exclude: Option<PatternMatcher>,
}

/// What a directory hands to its children; the default is the state of the root.
#[derive(Clone, Debug, Default)]
pub struct FilterState {
    include: MatchInfo,
    exclude: MatchInfo,
}

/// What to do with one entry of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The entry itself is wanted.
    Keep,
    /// The directory itself is not wanted, but something below it may be; it then comes along as a parent.
    Descend,
    /// Neither the entry nor anything below it is wanted.
    Skip,
}

impl Filter {
    /// Compiles both lists. A list without any effective pattern counts as not given.
    ///
    /// # Errors
    /// As [`PatternMatcher::new`].
    pub fn new(
        include: impl IntoIterator<Item = impl AsRef<str>>,
        exclude: impl IntoIterator<Item = impl AsRef<str>>,
    ) -> Result<Self, Error> {
        let some = |m: PatternMatcher| (!m.is_empty()).then_some(m);
        Ok(Filter {
            include: some(PatternMatcher::new(include)?),
            exclude: some(PatternMatcher::new(exclude)?),
        })
    }

    /// Whether nothing is filtered.
    pub fn is_empty(&self) -> bool {
        self.include.is_none() && self.exclude.is_none()
    }

    /// Whether include patterns are given.
    pub fn has_include(&self) -> bool {
        self.include.is_some()
    }

    /// Judges `path` (relative to the root of the walk, clean) by its own name and the state of its directory; the state
    /// that comes back is for what lies below it.
    pub fn check(&self, path: &[u8], is_dir: bool, parent: &FilterState) -> (Verdict, FilterState) {
        let mut state = FilterState::default();
        let mut keep = true;
        let mut below = is_dir;
        if let Some(include) = &self.include {
            let (hit, info) = include.matches_below(path, &parent.include);
            if !hit {
                keep = false;
                below = below && include.may_match_below(path);
            }
            state.include = info;
        }
        if let Some(exclude) = &self.exclude {
            let (hit, info) = exclude.matches_below(path, &parent.exclude);
            if hit {
                keep = false;
                // Below an excluded directory everything is excluded, unless the list takes something back.
                below = below && exclude.has_exclusions();
            }
            state.exclude = info;
        }
        let verdict = match (keep, below) {
            (true, _) => Verdict::Keep,
            (false, true) => Verdict::Descend,
            (false, false) => Verdict::Skip,
        };
        (verdict, state)
    }

    /// Whether a single path passes, its parents considered.
    pub fn matches(&self, path: &[u8]) -> bool {
        self.include.as_ref().is_none_or(|m| m.matches(path)) && !self.exclude.as_ref().is_some_and(|m| m.matches(path))
    }
}

/// The proper parents of a relative path, outermost first.
pub(crate) fn ancestors(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter()
        .enumerate()
        .filter(|(_, b)| **b == b'/')
        .filter_map(|(i, _)| path.get(..i))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(include: &[&str], exclude: &[&str], path: &str) -> Verdict {
        let filter = Filter::new(include, exclude).unwrap();
        let mut state = FilterState::default();
        let mut verdict = Verdict::Keep;
        for end in path.match_indices('/').map(|(i, _)| i).chain([path.len()]) {
            let is_dir = end < path.len();
            (verdict, state) = filter.check(&path.as_bytes()[..end], is_dir, &state);
            if verdict == Verdict::Skip {
                return verdict;
            }
        }
        verdict
    }

    #[test]
    fn verdicts() {
        assert_eq!(walk(&["a/b"], &[], "a/b/c"), Verdict::Keep);
        assert_eq!(walk(&["a/b"], &[], "a/x"), Verdict::Skip);
        assert_eq!(walk(&["**/x"], &[], "q/r/x"), Verdict::Keep);
        assert_eq!(walk(&[], &["a", "!a/k"], "a/k"), Verdict::Keep);
        assert_eq!(walk(&[], &["a", "!a/k"], "a/z"), Verdict::Skip);
        assert_eq!(walk(&["a"], &["a/b"], "a/b/c"), Verdict::Skip);
        assert_eq!(walk(&["a", "!a/b"], &[], "a/b"), Verdict::Skip);
        let f = Filter::new(["a/b/c"], Vec::<&str>::new()).unwrap();
        assert_eq!(f.check(b"a", true, &FilterState::default()).0, Verdict::Descend);
        assert_eq!(f.check(b"b", true, &FilterState::default()).0, Verdict::Skip);
    }

    proptest::proptest! {
        /// Pruning never loses a path that the plain test lets through (for include lists without exclusions).
        #[test]
        fn pruning_is_safe(
            patterns in proptest::collection::vec("(\\*\\*/)?[ab*](/[ab?])?(/[ab])?", 1..4),
            path in "[ab](/[ab]){0,3}",
        ) {
            let refs: Vec<&str> = patterns.iter().map(String::as_str).collect();
            let naive = Filter::new(&refs, Vec::<&str>::new()).unwrap().matches(path.as_bytes());
            proptest::prop_assert_eq!(walk(&refs, &[], &path) == Verdict::Keep, naive);
        }
    }
}
