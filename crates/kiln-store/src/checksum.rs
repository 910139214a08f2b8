//! Content digests: what a COPY or a read-only mount sees of its input, as one digest.
//!
//! The scheme is shared with other BuildKit daemons byte for byte (cache records are exchanged by these keys). An entry's
//! digest covers type, permissions, owner, size, link target, attributes and content, but no name and no time; a
//! directory's covers its own header and the names and digests of what is in it. A selector names a path, possibly with
//! wildcards and filters, and gets the digest of what it selects.
//!
//! Directories and links are answered from the manifests; files are read once, several at a time, and their digests are
//! remembered beside the manifest of the tree that owns them.

use std::collections::HashSet;
use std::io::Read;
use std::sync::Mutex;

use kiln_fs::Stop;
use kiln_fs::xattr::kept_in_tree;
use kiln_match::{MatchInfo, PatternMatcher, go_match};
use kiln_oci::Digest;
use kiln_oci::digest::Hasher;

use crate::error::{IoContext, Result, StoreError};
use crate::manifest::{Entry, Kind, base, is_below};
use crate::union::copy::split_wildcard;
use crate::view::{Children, Node, View, clean_rooted};

/// Where a view comes from; it decides two details of the digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A result of a build or an image: the root's header is its real metadata, device numbers count as 0.
    Snapshot,
    /// Files received from a client: the root's header is the digest of nothing (unless nothing was received at all), and
    /// device numbers count as the client sent them.
    Local,
}

/// What to take the digest of.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    /// Path from the root.
    pub path: String,
    /// The path is a pattern of Go's `path.Match`.
    pub wildcard: bool,
    /// Links are followed also in the last element.
    pub follow_links: bool,
    /// Patterns of what counts, relative to the path; empty is everything.
    pub include: Vec<String>,
    /// Patterns of what does not count.
    pub exclude: Vec<String>,
    /// Beginnings of paths of which something must count.
    pub required: Vec<String>,
}

impl Selector {
    /// A plain path.
    pub fn path(path: impl Into<String>, follow_links: bool) -> Self {
        Selector {
            path: path.into(),
            follow_links,
            ..Selector::default()
        }
    }

    fn is_plain(&self) -> bool {
        !self.wildcard && self.include.is_empty() && self.exclude.is_empty()
    }

    fn clean(&self) -> Vec<u8> {
        clean_rooted(self.path.as_bytes())
    }
}

/// Brings the selectors of one input into the order that keys need: equal plain paths and those below another plain path
/// go (links-followed and not-followed ones apart), the rest stays, all sorted by path.
pub fn normalise(selectors: Vec<Selector>) -> Vec<Selector> {
    if selectors.len() < 2 {
        return selectors;
    }
    let (plain, mut out): (Vec<_>, Vec<_>) = selectors.into_iter().partition(Selector::is_plain);
    for follow in [true, false] {
        let mut paths: Vec<(Vec<u8>, Selector)> = plain
            .iter()
            .filter(|s| s.follow_links == follow)
            .map(|s| (s.clean(), s.clone()))
            .collect();
        paths.sort();
        paths.dedup_by(|a, b| a.0 == b.0);
        let covered = |p: &[u8]| paths.iter().any(|(other, _)| is_below(p, other));
        out.extend(paths.iter().filter(|(p, _)| !covered(p)).map(|(_, s)| s.clone()));
    }
    out.sort_by_cached_key(Selector::clean);
    out
}

/// The content digest of an input: of the checksums of its selectors as text, joined by zero bytes.
///
/// # Errors
/// As [`checksum`].
pub fn content_digest(view: &View, selectors: &[Selector], origin: Origin, stop: &Stop) -> Result<Digest> {
    let sums = selectors
        .iter()
        .map(|s| checksum(view, s, origin, stop).map(|d| d.to_string()));
    let sums = sums.collect::<Result<Vec<_>>>()?;
    Ok(Digest::of(sums.join("\0")))
}

/// The checksum of what one selector selects.
///
/// # Errors
/// [`StoreError::Invalid`] with the text `"<path>": not found` where nothing is, I/O errors, [`StoreError::Canceled`].
pub fn checksum(view: &View, selector: &Selector, origin: Origin, stop: &Stop) -> Result<Digest> {
    let sums = Sums { view, origin, stop };
    let result = sums.checksum(selector);
    for tree in view.trees() {
        if let Err(error) = tree.save_digests() {
            tracing::debug!(%error, tree = %tree.dir().display(), "content digests not remembered");
        }
    }
    result
}

/// The digest of one entry, but for the content of regular files, which follows in the same hash.
fn header(entry: &Entry, origin: Origin) -> Hasher {
    let (kind, mode) = match entry.kind {
        Kind::Regular | Kind::Socket => ('0', entry.mode),
        Kind::Symlink => ('2', 0o777),
        Kind::CharDevice | Kind::Whiteout => ('3', entry.mode),
        Kind::BlockDevice => ('4', entry.mode),
        Kind::Directory => ('5', entry.mode),
        Kind::Fifo => ('6', entry.mode),
    };
    let (major, minor) = match origin {
        Origin::Snapshot => (0, 0),
        Origin::Local => (rustix::fs::major(entry.rdev), rustix::fs::minor(entry.rdev)),
    };
    let (uid, gid, size) = (entry.uid, entry.gid, entry.size);
    let mut hasher = Hasher::new();
    hasher.update(format!(
        "namemode{mode}uid{uid}gid{gid}size{size}typeflag{kind}linkname"
    ));
    hasher.update(&entry.target);
    hasher.update(format!("unamegnamedevmajor{major}devminor{minor}"));
    for (name, value) in entry.xattrs.iter().filter(|(n, _)| kept_in_tree(n)) {
        hasher.update(name);
        hasher.update(value);
    }
    hasher
}

/// One selected entry: its path (with the base's unresolved name) and where its digest comes from.
struct Included {
    path: Vec<u8>,
    node: Node,
    /// Nothing that lies above it is listed.
    top: bool,
}

struct Sums<'a> {
    view: &'a View,
    origin: Origin,
    stop: &'a Stop,
}

impl<'a> Sums<'a> {
    fn checksum(&self, selector: &Selector) -> Result<Digest> {
        let path = selector.clean();
        if self.view.root().is_none() {
            return if path.is_empty() {
                Ok(Digest::of(""))
            } else {
                Err(not_found(&path))
            };
        }
        if selector.is_plain() {
            self.plain(&path, selector.follow_links)
        } else {
            self.list(&path, selector)
        }
    }

    fn plain(&self, path: &[u8], follow: bool) -> Result<Digest> {
        let node = self.view.find(path, follow)?.ok_or_else(|| not_found(path))?;
        if self.view.entry(&node).kind.is_dir() {
            self.directory(&node)
        } else {
            self.files(std::slice::from_ref(&node))?;
            self.entry(&node)
        }
    }

    fn header(&self, dir: &Node) -> Digest {
        let entry = self.view.entry(dir);
        let is_empty = || self.view.children(dir).next().is_none();
        if entry.path.is_empty() && self.origin == Origin::Local && !is_empty() {
            return Digest::of("");
        }
        header(entry, self.origin).finish()
    }

    /// The digest of anything but a directory; a file's must be known or is computed here.
    fn entry(&self, node: &Node) -> Result<Digest> {
        let entry = self.view.entry(node);
        if entry.kind != Kind::Regular {
            return Ok(header(entry, self.origin).finish());
        }
        let tree = self.view.trees().get(node.tree());
        if let Some(known) = tree.and_then(|t| t.digest(node.entry_index())) {
            return Ok(known);
        }
        let mut hasher = header(entry, self.origin);
        let path = crate::tree::os_path(&entry.path);
        let mut file = self.view.open(node)?;
        let mut buf = vec![0; (entry.size.clamp(1, 1 << 20)) as usize];
        let mut total = 0u64;
        loop {
            self.stop.check()?;
            let n = file.read(&mut buf).during("read", path)?;
            if n == 0 {
                break;
            }
            total += n as u64;
            hasher.update(buf.get(..n).unwrap_or_default());
        }
        if total != entry.size {
            let reason = format!("{total} bytes, its manifest says {}", entry.size);
            return Err(StoreError::Damaged {
                path: path.to_owned(),
                reason,
            });
        }
        let digest = hasher.finish();
        if let Some(tree) = tree {
            tree.remember_digest(node.entry_index(), digest);
        }
        Ok(digest)
    }

    /// Computes the digests of files that are not known yet, several at a time.
    fn files(&self, nodes: &[Node]) -> Result<()> {
        let mut seen = HashSet::new();
        let unknown = |n: &&Node| {
            self.view.entry(n).kind == Kind::Regular
                && self
                    .view
                    .trees()
                    .get(n.tree())
                    .is_some_and(|t| t.digest(n.entry_index()).is_none())
        };
        let todo: Vec<&Node> = nodes
            .iter()
            .filter(unknown)
            .filter(|n| seen.insert((n.tree(), n.entry_index())))
            .collect();
        // Several threads only where there is something to share out.
        let threads = if todo.len() < 4 {
            1
        } else {
            kiln_fs::parallel::default_threads()
        };
        // Hard links hash as the file they share: the first name's digest serves all of a group.
        let groups: Mutex<std::collections::HashMap<(usize, u32), Digest>> = Mutex::default();
        kiln_fs::parallel::for_each(&todo, threads, |node| {
            let entry = self.view.entry(node);
            let group = (entry.link_group != 0).then_some((node.tree(), entry.link_group));
            let lock = || groups.lock().unwrap_or_else(|p| p.into_inner());
            if let Some(known) = group.and_then(|g| lock().get(&g).copied()) {
                if let Some(tree) = self.view.trees().get(node.tree()) {
                    tree.remember_digest(node.entry_index(), known);
                }
                return Ok(());
            }
            let digest = self.entry(node)?;
            if let Some(group) = group {
                lock().insert(group, digest);
            }
            Ok(())
        })
    }

    fn directory(&self, dir: &Node) -> Result<Digest> {
        let below: Vec<Node> = self
            .view
            .walk(dir)
            .filter(|n| self.view.entry(n).kind == Kind::Regular)
            .collect();
        self.files(&below)?;
        struct Level<'v> {
            name: Vec<u8>,
            children: Children<'v>,
            hasher: Hasher,
        }
        let open = |node: &Node| {
            let mut hasher = Hasher::new();
            hasher.update(b"\0");
            hasher.update(self.header(node).to_string());
            Level {
                name: self.view.entry(node).name().to_vec(),
                children: self.view.children(node),
                hasher,
            }
        };
        let mut stack = vec![open(dir)];
        loop {
            self.stop.check()?;
            let Some(level) = stack.last_mut() else {
                return Err(StoreError::Canceled);
            };
            let (name, digest) = match level.children.next() {
                Some(child) if self.view.entry(&child).kind.is_dir() => {
                    stack.push(open(&child));
                    continue;
                }
                Some(child) => (self.view.entry(&child).name().to_vec(), self.entry(&child)?),
                None => match stack.pop() {
                    Some(done) if stack.is_empty() => return Ok(done.hasher.finish()),
                    Some(done) => (done.name, done.hasher.finish()),
                    None => return Err(StoreError::Canceled),
                },
            };
            if let Some(level) = stack.last_mut() {
                level.hasher.update(b"\0");
                level.hasher.update(name);
                level.hasher.update(digest.to_string());
            }
        }
    }

    fn list(&self, path: &[u8], selector: &Selector) -> Result<Digest> {
        let (named, real) = if selector.wildcard {
            let (fixed, _) = split_wildcard(path);
            let real = self.view.resolve(&fixed, true)?;
            (fixed, real)
        } else {
            (path.to_vec(), self.view.resolve(path, false)?)
        };
        let Some(start) = self.view.lookup(&real) else {
            if selector.wildcard {
                return Ok(Digest::of(""));
            }
            return Err(not_found(path));
        };
        let listed = self.select(path, &named, &real, start, selector)?;
        for required in &selector.required {
            let full = |i: &Included| [b"/", &i.path[..]].concat();
            let wanted = required.as_bytes();
            let hit = |i: &Included| full(i).starts_with(wanted) || i.path.starts_with(wanted);
            if !listed.iter().any(hit) {
                return Err(not_found(required.trim_start_matches('/').as_bytes()));
            }
        }
        let nodes: Vec<Node> = listed.iter().map(|i| i.node.clone()).collect();
        self.files(&nodes)?;
        let mut sums = Vec::with_capacity(listed.len());
        for item in &listed {
            let kind = self.view.entry(&item.node).kind;
            sums.push(match kind {
                Kind::Symlink if selector.follow_links && item.top => self.plain(&item.path, true)?,
                Kind::Directory => self.header(&item.node),
                _ => self.entry(&item.node)?,
            });
        }
        match (&listed[..], &sums[..]) {
            ([], _) => Ok(Digest::of("")),
            ([only], [sum]) if base(&only.path) == base(path) => Ok(*sum),
            _ => {
                let mut hasher = Hasher::new();
                for (item, sum) in listed.iter().zip(&sums) {
                    let relative = item.path.strip_prefix(&named[..]).unwrap_or(&item.path);
                    let relative = relative.strip_prefix(b"/").unwrap_or(relative);
                    hasher.update(b"\0");
                    let key: Vec<u8> = relative.iter().map(|b| if *b == b'/' { 0 } else { *b }).collect();
                    hasher.update(key);
                    hasher.update(sum.to_string());
                }
                Ok(hasher.finish())
            }
        }
    }

    /// The entries that a wildcard or filtered selector selects, in key order.
    fn select(
        &self,
        path: &[u8],
        named: &[u8],
        real: &[u8],
        start: Node,
        selector: &Selector,
    ) -> Result<Vec<Included>> {
        let matcher = |list: &[String]| -> Result<Option<PatternMatcher>> {
            let m = PatternMatcher::new(list)?;
            Ok((!list.is_empty()).then_some(m))
        };
        let (include, exclude) = (matcher(&selector.include)?, matcher(&selector.exclude)?);
        let pattern = [b"/", path].concat();
        let mut listed: Vec<Included> = Vec::new();
        /// A directory that was looked at: its header, listed or still waiting, and what its patterns said.
        struct Above {
            path: Vec<u8>,
            waiting: Option<Node>,
            include: MatchInfo,
            exclude: MatchInfo,
        }
        let mut above: Vec<Above> = Vec::new();
        let mut matched: Option<Vec<u8>> = (!selector.wildcard).then(|| path.to_vec());
        let is_dir = self.view.entry(&start).kind.is_dir();
        let below = is_dir.then(|| self.view.walk(&start)).into_iter().flatten();
        for node in std::iter::once(start).chain(below) {
            self.stop.check()?;
            let entry = self.view.entry(&node);
            let rest = entry.path.get(real.len()..).unwrap_or_default();
            let name = clean_rooted(&[named, b"/", rest].concat());
            if selector.wildcard {
                let inside = matched.as_ref().is_some_and(|m| is_below(&name, m));
                if !inside {
                    if !go_match(&pattern, &[b"/", &name[..]].concat())? {
                        continue;
                    }
                    matched = Some(name.clone());
                }
            }
            let root = matched.as_deref().unwrap_or_default();
            let candidate = name.strip_prefix(root).unwrap_or(&name);
            let candidate = candidate.strip_prefix(b"/").unwrap_or(candidate);
            while above.last().is_some_and(|a| !is_below(&name, &a.path)) {
                above.pop();
            }
            if entry.kind.is_dir() && name.is_empty() && path.is_empty() {
                continue;
            }
            let (parent_include, parent_exclude) = above
                .last()
                .map(|a| (a.include.clone(), a.exclude.clone()))
                .unwrap_or_default();
            let mut wanted = true;
            let (mut include_info, mut exclude_info) = (MatchInfo::default(), MatchInfo::default());
            if let Some(m) = &include {
                let (hit, info) = m.matches_below(candidate, &parent_include);
                (wanted, include_info) = (hit, info);
            }
            if let Some(m) = &exclude {
                let (hit, info) = m.matches_below(candidate, &parent_exclude);
                wanted = wanted && !hit;
                exclude_info = info;
            }
            let top = above.is_empty();
            if wanted {
                for (depth, dir) in above.iter_mut().enumerate() {
                    if let Some(node) = dir.waiting.take() {
                        listed.push(Included {
                            path: dir.path.clone(),
                            node,
                            top: depth == 0,
                        });
                    }
                }
                listed.push(Included {
                    path: name.clone(),
                    node: node.clone(),
                    top,
                });
            }
            if entry.kind.is_dir() {
                let waiting = (!wanted).then_some(node);
                above.push(Above {
                    path: name,
                    waiting,
                    include: include_info,
                    exclude: exclude_info,
                });
            }
        }
        Ok(listed)
    }
}

fn not_found(path: &[u8]) -> StoreError {
    StoreError::Invalid(format!("\"/{}\": not found", String::from_utf8_lossy(path)))
}
