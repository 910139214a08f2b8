//! "Follow these paths": which paths of a tree a client must send so that a COPY of a link finds its target.

use std::collections::BTreeSet;

use crate::Error;
use crate::glob::{go_match, has_wildcard};
use crate::path::clean;

/// A tree whose links are expanded. Paths are relative and clean; errors of the disk are the caller's to remember, a
/// path that cannot be read counts as absent.
pub trait LinkSource {
    /// The text of the link at `path`, or `None` if it is something else or nothing.
    fn read_link(&self, path: &[u8]) -> Option<Vec<u8>>;
    /// The names in directory `path` (empty for the root).
    fn list(&self, path: &[u8]) -> Vec<Vec<u8>>;
}

/// More links than this in one path end its expansion, as the kernel would.
const MAX_LINKS: usize = 255;

/// Expands `paths` (wildcards allowed in any element) over the links of `tree`: the result names every link that was
/// met and every final target, relative and sorted, without those that lie below another one. Paths that do not exist
/// are kept as they are. The result is meant to be added to include patterns.
///
/// # Errors
/// [`Error::BadPattern`].
pub fn follow_links(tree: &dyn LinkSource, paths: &[impl AsRef<[u8]>]) -> Result<Vec<Vec<u8>>, Error> {
    let mut out = BTreeSet::new();
    for path in paths {
        expand(tree, Vec::new(), elements(path.as_ref()), MAX_LINKS, &mut out)?;
    }
    if out.contains(&Vec::new()) {
        return Ok(vec![b".".to_vec()]);
    }
    let all: Vec<Vec<u8>> = out.into_iter().collect();
    let covered = |p: &Vec<u8>| crate::filter::ancestors(p).any(|above| all.iter().any(|o| o == above));
    Ok(all.iter().filter(|p| !covered(p)).cloned().collect())
}

/// The elements of a path, last first, so that the next one is popped from the end.
fn elements(path: &[u8]) -> Vec<Vec<u8>> {
    let mut rooted = vec![b'/'];
    rooted.extend_from_slice(path);
    clean(&rooted)
        .split(|b| *b == b'/')
        .filter(|e| !e.is_empty())
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let mut out = dir.to_vec();
    if !out.is_empty() {
        out.push(b'/');
    }
    out.extend_from_slice(name);
    out
}

fn expand(
    tree: &dyn LinkSource,
    mut at: Vec<u8>,
    mut left: Vec<Vec<u8>>,
    mut links: usize,
    out: &mut BTreeSet<Vec<u8>>,
) -> Result<(), Error> {
    while let Some(name) = left.pop() {
        if has_wildcard(&name) {
            let mut any = false;
            for candidate in tree.list(&at) {
                if go_match(&name, &candidate)? {
                    any = true;
                    let mut rest = left.clone();
                    // Escaped, so that a file whose name holds a wildcard is taken literally.
                    rest.push(escape(&candidate));
                    expand(tree, at.clone(), rest, links, out)?;
                }
            }
            if any {
                return Ok(());
            }
            at = join(&at, &name);
            continue;
        }
        let name = unescape(&name);
        let here = join(&at, &name);
        match tree.read_link(&here) {
            Some(target) if links > 0 => {
                links -= 1;
                out.insert(here);
                let mut to = if target.first() == Some(&b'/') {
                    Vec::new()
                } else {
                    at.clone()
                };
                to.push(b'/');
                to.extend_from_slice(&target);
                let mut next: Vec<Vec<u8>> = elements(&to).iter().map(|e| escape(e)).collect();
                left.append(&mut next);
                at = Vec::new();
            }
            _ => at = here,
        }
    }
    out.insert(at);
    Ok(())
}

fn escape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    for b in name {
        if b"*?[\\".contains(b) {
            out.push(b'\\');
        }
        out.push(*b);
    }
    out
}

fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut escaped = false;
    for b in name {
        if *b == b'\\' && !escaped {
            escaped = true;
        } else {
            out.push(*b);
            escaped = false;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    struct Tree(BTreeMap<&'static str, Option<&'static str>>);

    impl LinkSource for Tree {
        fn read_link(&self, path: &[u8]) -> Option<Vec<u8>> {
            let path = std::str::from_utf8(path).unwrap();
            self.0.get(path).copied().flatten().map(|t| t.as_bytes().to_vec())
        }
        fn list(&self, path: &[u8]) -> Vec<Vec<u8>> {
            let dir = std::str::from_utf8(path).unwrap();
            let below = |p: &&'static str| match p.rsplit_once('/') {
                Some((d, n)) if d == dir => Some(n),
                None if dir.is_empty() => Some(*p),
                _ => None,
            };
            self.0.keys().filter_map(below).map(|n| n.as_bytes().to_vec()).collect()
        }
    }

    fn follow(tree: &[(&'static str, Option<&'static str>)], paths: &[&str]) -> Vec<String> {
        let tree = Tree(tree.iter().copied().collect());
        let got = follow_links(&tree, paths).unwrap();
        got.into_iter().map(|p| String::from_utf8(p).unwrap()).collect()
    }

    #[test]
    fn chains_and_wildcards() {
        let tree = [
            ("dir", None),
            ("dir/foo", Some("/bar")),
            ("bar", Some("baz")),
            ("baz", None),
            ("l1", Some("dir")),
            ("loop", Some("loop")),
            ("out", Some("../../etc")),
        ];
        assert_eq!(follow(&tree, &["dir/foo"]), ["bar", "baz", "dir/foo"]);
        assert_eq!(follow(&tree, &["l1/foo"]), ["bar", "baz", "dir/foo", "l1"]);
        assert_eq!(follow(&tree, &["ba*"]), ["bar", "baz"]);
        assert_eq!(follow(&tree, &["missing"]), ["missing"]);
        assert_eq!(follow(&tree, &["no*/x"]), ["no*/x"]);
        assert_eq!(follow(&tree, &["loop"]), ["loop"]);
        assert_eq!(follow(&tree, &["out"]), ["etc", "out"]);
        assert_eq!(follow(&tree, &["dir", "dir/foo"]), ["bar", "baz", "dir"]);
        assert_eq!(follow(&tree, &["/", "dir"]), ["."]);
    }
}
