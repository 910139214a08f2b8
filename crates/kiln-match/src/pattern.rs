//! Ordered lists of patterns with exclusions, as `.dockerignore` and all include and exclude filters use them.
//!
//! A list is read in order: a plain pattern is tried only while the path is unmatched, an exclusion (`!`) only while it
//! is matched, and the last one that took effect decides. What matched a directory matches everything below it, so a
//! walk hands each directory's [`MatchInfo`] to its children.

use regex::Regex;

use crate::glob::go_match;
use crate::path::clean_str;
use crate::{Error, filter};

/// A compiled list of patterns.
#[derive(Clone, Debug)]
pub struct PatternMatcher {
    patterns: Vec<Pattern>,
    exclusions: bool,
}

/// Which patterns of a list matched a directory; its children inherit that. The default says "nothing is known of the
/// parent", and then all parents of a path are tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MatchInfo(Vec<bool>);

#[derive(Clone, Debug)]
struct Pattern {
    kind: Kind,
    exclusion: bool,
    text: String,
}

#[derive(Clone, Debug)]
enum Kind {
    Exact(Vec<u8>),
    Prefix(Vec<u8>),
    Suffix { tail: Vec<u8>, whole: Option<Vec<u8>> },
    Regex(Regex),
}

impl PatternMatcher {
    /// Compiles a list. Patterns are trimmed and cleaned lexically; empty ones do not count.
    ///
    /// # Errors
    /// [`Error::BadPattern`] and [`Error::EmptyExclusion`].
    pub fn new(patterns: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self, Error> {
        let mut out = PatternMatcher {
            patterns: Vec::new(),
            exclusions: false,
        };
        for pattern in patterns {
            let trimmed = pattern.as_ref().trim();
            if trimmed.is_empty() {
                continue;
            }
            let cleaned = clean_str(trimmed);
            let (exclusion, text) = match cleaned.strip_prefix('!') {
                Some("") => return Err(Error::EmptyExclusion),
                Some(rest) => (true, rest.to_owned()),
                None => (false, cleaned),
            };
            go_match(text.as_bytes(), b".")?;
            out.exclusions |= exclusion;
            out.patterns.push(Pattern {
                kind: compile(&text)?,
                exclusion,
                text,
            });
        }
        Ok(out)
    }

    /// Whether the list is empty; it then matches nothing.
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Whether the list has exclusions, so that something below a matched directory may be unmatched again.
    pub fn has_exclusions(&self) -> bool {
        self.exclusions
    }

    /// Whether some plain pattern could match something below directory `dir`: its elements before the first wildcard
    /// must agree with those of `dir`. May say yes where nothing is found, never no where something would be.
    pub fn may_match_below(&self, dir: &[u8]) -> bool {
        self.patterns.iter().filter(|p| !p.exclusion).any(|pattern| {
            let mut wanted = pattern.text.as_bytes().split(|b| *b == b'/');
            for have in dir.split(|b| *b == b'/') {
                match wanted.next() {
                    Some(part) if part.iter().any(|b| b"*?[]\\^".contains(b)) => return true,
                    Some(part) if part == have => {}
                    Some(_) => return false,
                    // The pattern ended above: it matched an ancestor, or nothing here.
                    None => return true,
                }
            }
            true
        })
    }

    /// Whether `path` (relative, clean, slash-separated) or one of its parents is matched.
    pub fn matches(&self, path: &[u8]) -> bool {
        self.matches_below(path, &MatchInfo::default()).0
    }

    /// Whether `path` is matched, given the result for its parent directory, and the result to hand to its children.
    pub fn matches_below(&self, path: &[u8], parent: &MatchInfo) -> (bool, MatchInfo) {
        let inherited = parent.0.len() == self.patterns.len() && !parent.0.is_empty();
        let mut info = vec![false; self.patterns.len()];
        let mut matched = false;
        for (index, (pattern, slot)) in self.patterns.iter().zip(&mut info).enumerate() {
            let mut hit = inherited && parent.0.get(index).copied().unwrap_or(false);
            if !hit {
                if pattern.exclusion != matched {
                    continue;
                }
                hit = pattern.is_match(path);
                if !hit && !inherited {
                    hit = filter::ancestors(path).any(|above| pattern.is_match(above));
                }
            }
            *slot = hit;
            if hit {
                matched = !pattern.exclusion;
            }
        }
        (matched, MatchInfo(info))
    }
}

impl Pattern {
    fn is_match(&self, path: &[u8]) -> bool {
        match &self.kind {
            Kind::Exact(text) => path == text,
            Kind::Prefix(head) => path.starts_with(head),
            Kind::Suffix { tail, whole } => path.ends_with(tail) || whole.as_deref() == Some(path),
            Kind::Regex(regex) => regex.is_match(&String::from_utf8_lossy(path)),
        }
    }
}

/// Chooses how a pattern is tested and translates it: `*` and `?` stay within an element, `**` crosses elements, brackets
/// and `^` go to the regular expression as they are, a backslash escapes what follows.
fn compile(text: &str) -> Result<Kind, Error> {
    let chars: Vec<char> = text.chars().collect();
    let mut kind = Kind::Exact(text.as_bytes().to_vec());
    let mut regex = String::from("^");
    let mut needs_regex = false;
    // Steps of the pattern so far: only a `**` at the very start or end keeps the cheap tests possible.
    let mut at = 0;
    let mut step = 0;
    while let Some(&c) = chars.get(at) {
        at += 1;
        match c {
            '*' if chars.get(at) == Some(&'*') => {
                at += 1;
                // `**/` counts as `**`, as what follows may begin anywhere.
                if chars.get(at) == Some(&'/') {
                    at += 1;
                }
                if at >= chars.len() {
                    if matches!(kind, Kind::Exact(_)) && !needs_regex {
                        let head = text.strip_suffix('/').unwrap_or(text).trim_end_matches("**");
                        kind = Kind::Prefix(head.as_bytes().to_vec());
                    } else {
                        needs_regex = true;
                    }
                    regex.push_str(".*");
                } else {
                    regex.push_str("(.*/)?");
                    if step == 0 {
                        kind = Kind::Suffix {
                            tail: Vec::new(),
                            whole: None,
                        };
                    } else {
                        needs_regex = true;
                    }
                }
            }
            '*' => {
                regex.push_str("[^/]*");
                needs_regex = true;
            }
            '?' => {
                regex.push_str("[^/]");
                needs_regex = true;
            }
            '.' | '+' | '(' | ')' | '|' | '{' | '}' | '$' => {
                regex.push('\\');
                regex.push(c);
            }
            '\\' => {
                needs_regex = true;
                regex.push('\\');
                if let Some(next) = chars.get(at) {
                    regex.push(*next);
                    at += 1;
                }
            }
            '[' | ']' => {
                regex.push(c);
                needs_regex = true;
            }
            _ => regex.push(c),
        }
        step += 1;
    }
    if needs_regex {
        regex.push('$');
        let regex = Regex::new(&from_go_regex(&regex)).map_err(|_| Error::BadPattern)?;
        return Ok(Kind::Regex(regex));
    }
    if let Kind::Suffix { .. } = kind {
        // `**/foo` matches `foo` and `x/foo`; `**foo` matches every path that ends so.
        let tail = text.strip_prefix("**").unwrap_or(text);
        let whole = tail.strip_prefix('/').map(|t| t.as_bytes().to_vec());
        kind = Kind::Suffix {
            tail: tail.as_bytes().to_vec(),
            whole,
        };
    }
    Ok(kind)
}

/// Rewrites a Go (RE2) expression for the `regex` crate: inside a class `[`, `&` and `~` are plain characters in Go but
/// operators there, and Go's letter classes know ASCII only.
fn from_go_regex(go: &str) -> String {
    let chars: Vec<char> = go.chars().collect();
    let mut out = String::with_capacity(go.len() + 8);
    let mut at = 0;
    let mut class_start: Option<usize> = None;
    while let Some(&c) = chars.get(at) {
        at += 1;
        match (c, class_start) {
            ('\\', _) => {
                let Some(&next) = chars.get(at) else {
                    out.push('\\');
                    continue;
                };
                at += 1;
                if matches!(next, 'd' | 'D' | 's' | 'S' | 'w' | 'W' | 'b' | 'B') {
                    // Negated ones would match half a character in byte mode, so they are spelled out.
                    match next {
                        'D' => out.push_str(r"[^0-9]"),
                        'S' => out.push_str(r"[^\t\n\f\r ]"),
                        'W' => out.push_str(r"[^0-9A-Za-z_]"),
                        'd' => out.push_str("[0-9]"),
                        's' => out.push_str(r"[\t\n\f\r ]"),
                        'w' => out.push_str("[0-9A-Za-z_]"),
                        other => out.push_str(&format!(r"(?-u:\{other})")),
                    }
                } else {
                    out.push('\\');
                    out.push(next);
                }
            }
            ('[', None) => {
                out.push('[');
                if chars.get(at) == Some(&'^') {
                    out.push('^');
                    at += 1;
                }
                class_start = Some(at);
                // A bracket right after the start is a member of the class.
                if chars.get(at) == Some(&']') {
                    out.push_str("\\]");
                    at += 1;
                }
            }
            (']', Some(_)) => {
                out.push(']');
                class_start = None;
            }
            ('[', Some(_)) if chars.get(at) == Some(&':') => {
                let rest: String = chars.get(at..).unwrap_or_default().iter().collect();
                match rest.find(":]") {
                    Some(end) => {
                        let name = rest.get(..end + 2).unwrap_or_default();
                        out.push('[');
                        out.push_str(name);
                        at += name.chars().count();
                    }
                    None => out.push_str("\\["),
                }
            }
            ('[' | '&' | '~', Some(_)) => {
                out.push('\\');
                out.push(c);
            }
            ('-', Some(_)) if chars.get(at) == Some(&'-') => {
                // `a--` is a range up to the minus sign.
                out.push_str("-\\-");
                at += 1;
            }
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(pattern: &str, path: &str) -> bool {
        PatternMatcher::new([pattern]).unwrap().matches(path.as_bytes())
    }

    #[test]
    fn single_patterns() {
        for (pattern, path, want) in [
            ("foo", "foo", true),
            ("foo", "foo/a/b", true),
            ("foo", "a/foo", false),
            ("./a/", "a", true),
            ("/a", "a", false),
            ("*", "a", true),
            ("*", "a/b", true),
            ("*.txt", "a/b.txt", false),
            ("?", "a", true),
            ("[a-c]", "b", true),
            ("[^a]", "b", true),
            ("[!a]", "!", true),
            ("[!a]", "b", false),
            ("\\!foo", "!foo", true),
            ("\\#bar", "#bar", true),
            ("**/x", "x", true),
            ("**/x", "a/b/x", true),
            ("**/x", "ax", false),
            ("**x", "a/prefixx", true),
            ("x/**", "x", false),
            ("x/**", "x/y", true),
            ("x/**", "x/y/z", true),
            ("x**", "xyz/w", true),
            ("x**", "axyz", false),
            ("a/**/b", "a/b", true),
            ("a/**/b", "a/x/y/b", true),
            ("a/**/b", "a/xb", false),
            ("a**b", "ab", true),
            ("a**b", "axb", false),
            ("a**b", "ax/b", true),
            ("**", "a/b", true),
            ("**", "", true),
            ("**/", "a", true),
            ("a.b", "axb", false),
            ("a(b)+{c}$|", "a(b)+{c}$|", true),
            ("^x*", "xy", true),
            ("../x", "x", false),
            (".", "a", false),
            ("/", "a", false),
            ("**/*.txt", "a.txt", true),
            ("**/*.txt", "a/b.txt", true),
            ("**.txt", "a/b.txt", true),
            ("**/foo/*.go", "x/foo/a.go", true),
            ("a/*/c", "a/b/c", true),
            ("a/*/c", "a/b/b/c", false),
            ("[\\d]", "5", true),
            ("a[&-~]", "a-", true),
        ] {
            assert_eq!(one(pattern, path), want, "{pattern} on {path}");
        }
    }

    #[test]
    fn lists() {
        let m = |patterns: &[&str], path: &str| PatternMatcher::new(patterns).unwrap().matches(path.as_bytes());
        assert!(!m(&["foo", "!foo/keep"], "foo/keep/x"));
        assert!(m(&["foo", "!foo/keep"], "foo/a"));
        assert!(m(&["foo", "!foo/keep", "foo/keep/no"], "foo/keep/no/y"));
        assert!(m(&["*", "!./a"], "a"), "what follows the mark is not cleaned again");
        assert!(!m(&["!a"], "a"));
        assert!(m(&["  ", "", " a "], "a"));
        assert_eq!(PatternMatcher::new(["!"]).unwrap_err(), Error::EmptyExclusion);
        assert_eq!(PatternMatcher::new(["["]).unwrap_err(), Error::BadPattern);
        assert_eq!(PatternMatcher::new(["a\\"]).unwrap_err(), Error::BadPattern);
    }

    #[test]
    fn parents_pass_their_results_on() {
        let m = PatternMatcher::new(["a", "!a/b", "a/b/c"]).unwrap();
        let (hit, a) = m.matches_below(b"a", &MatchInfo::default());
        assert!(hit);
        let (hit, ab) = m.matches_below(b"a/b", &a);
        assert!(!hit);
        let (hit, _) = m.matches_below(b"a/b/x", &ab);
        assert!(!hit);
        let (hit, _) = m.matches_below(b"a/b/c", &ab);
        assert!(hit);
    }

    proptest::proptest! {
        /// A walk that hands results down and a test of the full path agree, and both agree with a naive reading.
        #[test]
        fn walk_equals_naive(
            patterns in proptest::collection::vec("!?(\\*\\*/)?[ab](/[ab*])?(/\\*\\*)?", 0..5),
            path in "[ab](/[ab]){0,3}",
        ) {
            let m = PatternMatcher::new(&patterns).unwrap();
            let mut info = MatchInfo::default();
            let mut hit = false;
            for end in path.match_indices('/').map(|(i, _)| i).chain([path.len()]) {
                (hit, info) = m.matches_below(&path.as_bytes()[..end], &info);
            }
            let mut naive = false;
            for p in &patterns {
                let (exclusion, text) = p.strip_prefix('!').map_or((false, p.as_str()), |t| (true, t));
                if exclusion == naive && naive_below(text, &path) {
                    naive = !exclusion;
                }
            }
            proptest::prop_assert_eq!(m.matches(path.as_bytes()), naive);
            // Inherited hits count even where the list would not have tested them again, so only plain lists agree.
            if !m.has_exclusions() {
                proptest::prop_assert_eq!(hit, naive);
            }
        }
    }

    /// The pattern matches the path or one of its parents, by trying element against element.
    fn naive_below(pattern: &str, path: &str) -> bool {
        fn elements(p: &[&str], n: &[&str]) -> bool {
            match (p.split_first(), n.split_first()) {
                (None, None) => true,
                (Some((&"**", [])), _) => !n.is_empty(),
                (Some((&"**", rest)), _) => (0..=n.len()).any(|i| elements(rest, &n[i..])),
                (Some((&"*", rest)), Some((_, tail))) => elements(rest, tail),
                (Some((x, rest)), Some((y, tail))) => x == y && elements(rest, tail),
                _ => false,
            }
        }
        let (p, n): (Vec<_>, Vec<_>) = (pattern.split('/').collect(), path.split('/').collect());
        (1..=n.len()).any(|end| elements(&p, &n[..end]))
    }
}
