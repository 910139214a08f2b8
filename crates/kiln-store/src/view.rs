//! What a stack of trees shows, read from manifests: no mount, no walk of a disk.
//!
//! The rules are overlayfs': the uppermost tree that has a path decides; directories merge downwards until one is opaque
//! or something that is not a directory stands in the way; a whiteout hides. File bytes are opened beneath the directory
//! of the tree that owns them.

use std::any::Any;
use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use kiln_match::path::clean;

use crate::error::{Result, StoreError};
use crate::manifest::{Entry, Kind, Manifest, join};
use crate::tree::Tree;

/// Links followed in one resolution before it fails, as in content hashing.
const MAX_LINKS: usize = 255;

/// A read-only merged view of trees, bottom first. Cheap to clone.
#[derive(Clone)]
pub struct View(Arc<Inner>);

struct Inner {
    trees: Vec<Tree>,
    manifests: Vec<Arc<Manifest>>,
    _keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.trees.iter().map(Tree::dir)).finish()
    }
}

/// Something a view shows: which tree has it, and, for a directory, which trees' directories are merged in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    tree: u32,
    entry: u32,
    /// (tree, entry) of the directories merged here, uppermost first; empty unless this is a directory.
    merged: Vec<(u32, u32)>,
}

impl Node {
    /// Index of the owning tree in [`View::trees`].
    pub fn tree(&self) -> usize {
        self.tree as usize
    }

    /// Index of the entry in that tree's manifest.
    pub fn entry_index(&self) -> u32 {
        self.entry
    }
}

impl View {
    /// A view of `trees`, bottom first. No trees at all is the empty file system ("scratch").
    ///
    /// # Errors
    /// If a manifest cannot be read.
    pub fn new(trees: Vec<Tree>) -> Result<Self> {
        Self::keeping(trees, None)
    }

    /// As [`new`](Self::new), holding on to something (a lease) as long as the view or a clone of it lives.
    pub fn keeping(trees: Vec<Tree>, keep: Option<Arc<dyn Any + Send + Sync>>) -> Result<Self> {
        let manifests = trees.iter().map(Tree::manifest).collect::<Result<_>>()?;
        Ok(View(Arc::new(Inner {
            trees,
            manifests,
            _keep: keep,
        })))
    }

    /// The empty file system.
    pub fn scratch() -> Self {
        View(Arc::new(Inner {
            trees: Vec::new(),
            manifests: Vec::new(),
            _keep: None,
        }))
    }

    /// The trees, bottom first.
    pub fn trees(&self) -> &[Tree] {
        &self.0.trees
    }

    /// The root directory; `None` for the empty file system.
    pub fn root(&self) -> Option<Node> {
        self.merge((0..self.0.trees.len() as u32).rev().map(|t| (t, 0)))
    }

    /// What a node is.
    pub fn entry(&self, node: &Node) -> &Entry {
        self.raw(node.tree, node.entry)
    }

    fn raw(&self, tree: u32, entry: u32) -> &Entry {
        static ROOT: std::sync::LazyLock<Entry> = std::sync::LazyLock::new(|| Entry::dir(*b""));
        // Nodes are made by this view only, so both indexes exist.
        self.0
            .manifests
            .get(tree as usize)
            .and_then(|m| m.get(entry))
            .unwrap_or(&ROOT)
    }

    /// Applies the stacking rules to everything that has one path, uppermost first.
    fn merge(&self, candidates: impl Iterator<Item = (u32, u32)>) -> Option<Node> {
        let mut node: Option<Node> = None;
        for (tree, index) in candidates {
            let entry = self.raw(tree, index);
            let is_dir = entry.kind.is_dir();
            match &mut node {
                None if entry.kind == Kind::Whiteout => return None,
                None => {
                    let merged = if is_dir { vec![(tree, index)] } else { Vec::new() };
                    node = Some(Node {
                        tree,
                        entry: index,
                        merged,
                    });
                    if !is_dir || entry.opaque {
                        break;
                    }
                }
                Some(node) => {
                    if !is_dir {
                        break;
                    }
                    node.merged.push((tree, index));
                    if entry.opaque {
                        break;
                    }
                }
            }
        }
        node
    }

    /// The entry called `name` in a directory.
    pub fn child(&self, dir: &Node, name: &[u8]) -> Option<Node> {
        let find = |(tree, index): &(u32, u32)| {
            let child = self.0.manifests.get(*tree as usize)?.find_child(*index, name)?;
            Some((*tree, child))
        };
        self.merge(dir.merged.iter().filter_map(find))
    }

    /// Everything directly in a directory, sorted by name.
    pub fn children<'v>(&'v self, dir: &Node) -> Children<'v> {
        let cursors = dir.merged.iter().map(|(tree, index)| {
            let end = self.0.manifests.get(*tree as usize).map_or(0, |m| m.end(*index));
            (*tree, *index + 1, end)
        });
        let skip = match self.raw(dir.tree, dir.entry).path.len() {
            0 => 0,
            n => n + 1,
        };
        Children {
            view: self,
            cursors: cursors.filter(|(_, at, end)| at < end).collect(),
            skip,
        }
    }

    /// Everything below a directory, in path order, the directory itself left out.
    pub fn walk<'v>(&'v self, dir: &Node) -> Walk<'v> {
        Walk {
            view: self,
            levels: vec![self.children(dir)],
            into: None,
        }
    }

    /// What is at `path`, taken lexically: no link is followed, also not in the parents.
    pub fn lookup(&self, path: &[u8]) -> Option<Node> {
        let mut node = self.root()?;
        for name in clean_rooted(path).split(|b| *b == b'/').filter(|n| !n.is_empty()) {
            node = self.child(&node, name)?;
        }
        Some(node)
    }

    /// The path that `path` means once links are followed, in its parents always, in its last element if `follow_last`.
    /// Absolute links start again at the root, `..` stops there. What does not exist is taken as written.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] after 255 links.
    pub fn resolve(&self, path: &[u8], follow_last: bool) -> Result<Vec<u8>> {
        resolve(path, follow_last, &mut |at| {
            let node = self.lookup(at)?;
            let entry = self.entry(&node);
            (entry.kind == Kind::Symlink).then(|| entry.target.to_vec())
        })
    }

    /// What is at `path`, links followed as in [`resolve`](Self::resolve).
    pub fn find(&self, path: &[u8], follow_last: bool) -> Result<Option<Node>> {
        Ok(self.lookup(&self.resolve(path, follow_last)?))
    }

    /// Opens a regular file.
    ///
    /// # Errors
    /// If the node is something else, or the tree's file is gone.
    pub fn open(&self, node: &Node) -> Result<File> {
        match self.0.trees.get(node.tree as usize) {
            Some(tree) => tree.open_entry(self.entry(node)),
            None => Err(StoreError::Invalid("a node of another view".into())),
        }
    }

    /// The whole content of the regular file at `path`, links followed; `None` if there is no such regular file.
    ///
    /// # Errors
    /// If it is larger than `limit` bytes, and I/O errors.
    pub fn read(&self, path: &[u8], limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(node) = self.find(path, true)? else {
            return Ok(None);
        };
        let entry = self.entry(&node);
        if entry.kind != Kind::Regular {
            return Ok(None);
        }
        if entry.size > limit {
            let shown = String::from_utf8_lossy(path);
            return Err(StoreError::Invalid(format!(
                "{shown} has {} bytes, more than {limit}",
                entry.size
            )));
        }
        let mut out = Vec::with_capacity(entry.size as usize);
        let file = self.open(&node)?;
        file.take(limit)
            .read_to_end(&mut out)
            .map_err(|e| StoreError::io("read", crate::tree::os_path(path), e))?;
        Ok(Some(out))
    }

    /// The path of a node's file on the host, for mounting a single file or directory of the uppermost tree. Never
    /// derived from a link.
    pub fn host_path(&self, node: &Node) -> Option<std::path::PathBuf> {
        let tree = self.0.trees.get(node.tree as usize)?;
        Some(tree.fs_path().join(crate::tree::os_path(&self.entry(node).path)))
    }
}

/// `path` cleaned as if it started at the root, without the leading slash.
pub(crate) fn clean_rooted(path: &[u8]) -> Vec<u8> {
    let mut rooted = Vec::with_capacity(path.len() + 1);
    rooted.push(b'/');
    rooted.extend_from_slice(path);
    let mut cleaned = clean(&rooted);
    cleaned.remove(0);
    cleaned
}

/// Follows links lexically over any tree that can say what link is at a (fully resolved) path.
pub(crate) fn resolve(
    path: &[u8],
    follow_last: bool,
    link_at: &mut dyn FnMut(&[u8]) -> Option<Vec<u8>>,
) -> Result<Vec<u8>> {
    let mut done: Vec<u8> = Vec::new();
    let split = |p: &[u8]| p.split(|b| *b == b'/').rev().map(<[u8]>::to_vec).collect::<Vec<_>>();
    let mut left = split(path);
    let mut links = 0;
    while let Some(name) = left.pop() {
        match &name[..] {
            b"" | b"." => continue,
            b".." => {
                let up = crate::manifest::parent(&done).len();
                done.truncate(up);
                continue;
            }
            _ => {}
        }
        let here = join(&done, &name);
        let last = left.iter().all(|n| n.is_empty() || n == b".");
        match if last && !follow_last { None } else { link_at(&here) } {
            None => done = here,
            Some(target) => {
                links += 1;
                if links > MAX_LINKS {
                    let shown = String::from_utf8_lossy(path);
                    return Err(StoreError::Invalid(format!("too many links in {shown:?}")));
                }
                if target.first() == Some(&b'/') {
                    done.clear();
                }
                left.extend(split(&target));
            }
        }
    }
    Ok(done)
}

/// Iterator over one directory of a view.
#[derive(Debug)]
pub struct Children<'v> {
    view: &'v View,
    /// (tree, next entry, end), uppermost tree first.
    cursors: Vec<(u32, u32, u32)>,
    skip: usize,
}

impl Children<'_> {
    fn name(&self, tree: u32, entry: u32) -> &[u8] {
        self.view.raw(tree, entry).path.get(self.skip..).unwrap_or_default()
    }

    fn advance(&mut self, which: usize) {
        let Some((tree, at, end)) = self.cursors.get_mut(which) else {
            return;
        };
        *at = self.view.0.manifests.get(*tree as usize).map_or(*end, |m| m.end(*at));
        if *at >= *end {
            self.cursors.remove(which);
        }
    }
}

impl Iterator for Children<'_> {
    type Item = Node;

    fn next(&mut self) -> Option<Node> {
        loop {
            if let [(tree, at, _)] = self.cursors[..] {
                self.advance(0);
                match self.view.merge(std::iter::once((tree, at))) {
                    Some(node) => return Some(node),
                    None => continue,
                }
            }
            let least = self.cursors.iter().map(|(t, at, _)| self.name(*t, *at)).min()?;
            let same: Vec<usize> = (0..self.cursors.len())
                .filter(|i| self.cursors.get(*i).is_some_and(|c| self.name(c.0, c.1) == least))
                .collect();
            let candidates: Vec<(u32, u32)> = same
                .iter()
                .filter_map(|i| self.cursors.get(*i))
                .map(|(t, at, _)| (*t, *at))
                .collect();
            for which in same.into_iter().rev() {
                self.advance(which);
            }
            if let Some(node) = self.view.merge(candidates.into_iter()) {
                return Some(node);
            }
        }
    }
}

/// Iterator over everything below a directory of a view.
#[derive(Debug)]
pub struct Walk<'v> {
    view: &'v View,
    levels: Vec<Children<'v>>,
    /// Directory returned last, entered on the next step unless skipped.
    into: Option<Node>,
}

impl Walk<'_> {
    /// Leaves out what is below the directory that was returned last.
    pub fn skip_dir(&mut self) {
        self.into = None;
    }
}

impl Iterator for Walk<'_> {
    type Item = Node;

    fn next(&mut self) -> Option<Node> {
        if let Some(dir) = self.into.take() {
            self.levels.push(self.view.children(&dir));
        }
        while let Some(level) = self.levels.last_mut() {
            match level.next() {
                Some(node) => {
                    if !node.merged.is_empty() {
                        self.into = Some(node.clone());
                    }
                    return Some(node);
                }
                None => {
                    self.levels.pop();
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(specs: &[&str]) -> Tree {
        let mut entries = vec![Entry::dir(*b"")];
        for spec in specs {
            let (path, what) = spec.split_once(' ').unwrap_or((spec, "f"));
            let mut e = Entry::new(path.as_bytes().to_vec(), Kind::Regular);
            match what {
                "d" => e = Entry::dir(path.as_bytes().to_vec()),
                "o" => {
                    e = Entry {
                        opaque: true,
                        ..Entry::dir(path.as_bytes().to_vec())
                    }
                }
                "w" => e = Entry::whiteout(path.as_bytes().to_vec()),
                "f" => {}
                link => {
                    e.kind = Kind::Symlink;
                    e.target = link.as_bytes().into();
                }
            }
            entries.push(e);
        }
        Tree::with_manifest("/nonexistent", "/nonexistent/fs", Manifest::new(entries).unwrap())
    }

    fn shown(view: &View) -> Vec<String> {
        let root = view.root().unwrap();
        let line = |n: &Node| format!("{}@{}", String::from_utf8_lossy(&view.entry(n).path), n.tree());
        view.walk(&root).map(|n| line(&n)).collect()
    }

    #[test]
    fn stacking_rules() {
        let a = tree(&[
            "a d", "a/x", "a/y", "b", "c d", "c/deep d", "c/deep/f", "e d", "e/1", "g d", "g/1",
        ]);
        let b = tree(&["a d", "a/x w", "a/z", "b d", "b/new", "c w", "e o", "e/2", "g"]);
        let c = tree(&["c d", "c/again", "e d", "e/3", "g d", "g/2"]);
        let v = View::new(vec![a.clone(), b.clone()]).unwrap();
        assert_eq!(
            shown(&v),
            ["a@1", "a/y@0", "a/z@1", "b@1", "b/new@1", "e@1", "e/2@1", "g@1"]
        );
        let v = View::new(vec![a, b, c]).unwrap();
        assert_eq!(
            shown(&v),
            [
                "a@1",
                "a/y@0",
                "a/z@1",
                "b@1",
                "b/new@1",
                "c@2",
                "c/again@2",
                "e@2",
                "e/2@1",
                "e/3@2",
                "g@2",
                "g/2@2"
            ]
        );
        assert!(v.lookup(b"/c/deep/f").is_none());
        assert!(v.lookup(b"a/y/").is_some());
        assert!(v.lookup(b"../a/./y").is_some());
        assert!(v.lookup(b"g/1").is_none());
        assert!(View::scratch().root().is_none());
    }

    #[test]
    fn links_stay_inside() {
        let v = View::new(vec![tree(&[
            "d d",
            "d/f",
            "abs /d",
            "up ../../d/f",
            "rel d/../abs/f",
            "loop loop",
            "d/here .",
            "dangling /no/where",
        ])])
        .unwrap();
        let r = |p: &str, last: bool| v.resolve(p.as_bytes(), last).map(|b| String::from_utf8(b).unwrap());
        assert_eq!(r("abs/f", false).unwrap(), "d/f");
        assert_eq!(r("abs", false).unwrap(), "abs");
        assert_eq!(r("abs/", true).unwrap(), "d");
        assert_eq!(r("up", true).unwrap(), "d/f");
        assert_eq!(r("rel", true).unwrap(), "d/f");
        assert_eq!(r("d/here/here/f", true).unwrap(), "d/f");
        assert_eq!(r("dangling/x", true).unwrap(), "no/where/x");
        assert_eq!(r("../../abs/../x", true).unwrap(), "x");
        assert!(r("loop", true).is_err());
        assert!(v.find(b"abs/f", true).unwrap().is_some());
    }

    proptest::proptest! {
        /// The view of random stacks equals a naive application of the trees one after the other to a map of paths.
        #[test]
        fn equals_naive_application(stack in proptest::collection::vec(proptest::collection::btree_map(
            "[ab](/[ab]){0,2}", 0u8..5, 0..8), 1..4)) {
            use std::collections::BTreeMap;
            let mut naive: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
            let mut trees = Vec::new();
            for (index, layer) in stack.iter().enumerate() {
                let mut specs: BTreeMap<String, &str> = BTreeMap::new();
                for (path, what) in layer {
                    // Parents of anything are directories; whatever was there as something else becomes one.
                    for (i, _) in path.match_indices('/') {
                        let e = specs.entry(path[..i].to_owned()).or_insert("d");
                        if *e != "o" { *e = "d"; }
                    }
                    let has_children = layer.keys().any(|p| p.starts_with(&format!("{path}/")));
                    let kind = ["f", "d", "o", "w", "target"][usize::from(*what)];
                    specs.entry(path.clone()).or_insert(if has_children && !"do".contains(kind) { "d" } else { kind });
                }
                let lines: Vec<String> = specs.iter().map(|(p, k)| format!("{p} {k}")).collect();
                trees.push(tree(&lines.iter().map(String::as_str).collect::<Vec<_>>()));
                for (path, kind) in &specs {
                    let path = path.as_bytes().to_vec();
                    let was_dir = naive.get(&path).is_some_and(|t| {
                        trees[*t].manifest().unwrap().entries().iter().any(|e| *e.path == *path && e.kind.is_dir())
                    });
                    if *kind != "d" || !was_dir {
                        naive.retain(|p, t| !(crate::manifest::is_below(p, &path) && *t < index));
                    }
                    if *kind == "w" { naive.remove(&path); } else { naive.insert(path, index); }
                }
            }
            let mut want: Vec<(Vec<u8>, usize)> = naive.into_iter().collect();
            want.sort_by(|a, b| crate::manifest::compare(&a.0, &b.0));
            let view = View::new(trees).unwrap();
            let got: Vec<(Vec<u8>, usize)> =
                view.walk(&view.root().unwrap()).map(|n| (view.entry(&n).path.to_vec(), n.tree())).collect();
            proptest::prop_assert_eq!(&got, &want);
            for (path, tree) in want {
                proptest::prop_assert_eq!(view.lookup(&path).map(|n| n.tree()), Some(tree));
            }
        }
    }
}
