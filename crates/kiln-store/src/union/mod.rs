//! Writing a new tree over a view without mounting anything: what FileOp does.
//!
//! [`FileWriter`] keeps the entries of the new tree in memory and their files in the tree's directory, and answers
//! lookups over both the new tree and the view below it, so that several actions of one op see each other's work.
//! Parents come along with the metadata they have below, removed paths become whiteouts, and a directory that replaces
//! one from below hides exactly what vanished.
//!
//! - this file: the state, lookups, and the primitives everything else is made of; mkdir, mkfile, symlink, rm.
//! - [`copy`]: copying from another view, with all the options of a COPY.
//! - [`extract`]: unpacking an archive (ADD).
//! - [`owner`]: owners by name, from the passwd and group files of a view.
//! - [`chmod`]: modes in the syntax of chmod(1).
//! - [`seal`]: what every new tree goes through in the end.
//! - [`stack`]: the difference of two views as a tree.

pub mod chmod;
pub mod copy;
pub mod extract;
pub mod owner;
pub(crate) mod seal;
pub mod stack;

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_fs::xattr::Xattrs;
use kiln_fs::{Dir, Stop, Timestamp};

use crate::error::{Result, StoreError};
use crate::files::FileJob;
use crate::manifest::{Entry, Kind, base, is_below, join, parent};
use crate::tree::{Tree, TreeBuilder, os_path};
use crate::view::{Node, View, clean_rooted, resolve};

pub use chmod::ModeChange;
pub use copy::CopySpec;
pub use owner::{Owner, OwnerSpec, UserSpec};
pub(crate) use seal::{same_content, seal_entries};

/// Writes one new tree over a view.
#[derive(Debug)]
pub struct FileWriter {
    base: View,
    out: TreeBuilder,
    /// The new tree, by sort key.
    upper: BTreeMap<Vec<u8>, Entry>,
    groups: u32,
    /// Time of everything made without a time of its own: one instant for the whole tree.
    now: Timestamp,
}

/// What a path shows, with what lies below it in the base when it is a directory.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) entry: Entry,
    /// Whether the new tree has it.
    pub(crate) upper: bool,
    /// The directory of the base that shows through; `None` if none does.
    pub(crate) lower: Option<Node>,
}

/// A directory of the new tree that things are being created in.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) path: Vec<u8>,
    pub(crate) lower: Option<Node>,
    pub(crate) handle: Arc<Dir>,
}

fn key(path: &[u8]) -> Vec<u8> {
    path.iter().map(|b| if *b == b'/' { 0 } else { *b }).collect()
}

/// An error about a path of the image, in the words users know from the system.
pub(crate) fn path_error(what: &str, path: &[u8], why: &str) -> StoreError {
    StoreError::Invalid(format!("{what} /{}: {why}", String::from_utf8_lossy(path)))
}

impl FileWriter {
    /// Starts a tree over `base` in `out`.
    ///
    /// # Errors
    /// None but I/O.
    pub fn new(base: &View, out: TreeBuilder) -> Result<Self> {
        let now = Timestamp::now();
        let root = match base.root() {
            Some(node) => Entry {
                opaque: false,
                unchanged: true,
                ..base.entry(&node).clone()
            },
            None => Entry {
                mtime: now,
                ..Entry::dir(*b"")
            },
        };
        Ok(FileWriter {
            base: base.clone(),
            out,
            upper: BTreeMap::from([(Vec::new(), root)]),
            groups: 0,
            now,
        })
    }

    /// What lies below.
    pub fn base(&self) -> &View {
        &self.base
    }

    fn get(&self, path: &[u8]) -> Option<&Entry> {
        self.upper.get(&key(path))
    }

    pub(crate) fn insert(&mut self, entry: Entry) {
        self.upper.insert(key(&entry.path), entry);
    }

    pub(crate) fn entry_mut(&mut self, path: &[u8]) -> Option<&mut Entry> {
        self.upper.get_mut(&key(path))
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.now
    }

    pub(crate) fn next_group(&mut self) -> u32 {
        self.groups += 1;
        self.groups
    }

    pub(crate) fn out(&self) -> &TreeBuilder {
        &self.out
    }

    fn root_seen(&self) -> Seen {
        let entry = self.get(b"").cloned().unwrap_or_else(|| Entry::dir(*b""));
        let lower = if entry.opaque { None } else { self.base.root() };
        Seen {
            entry,
            upper: true,
            lower,
        }
    }

    fn step(&self, path: &[u8], name: &[u8], lower: Option<&Node>) -> Option<Seen> {
        let here = join(path, name);
        let below = lower.and_then(|dir| self.base.child(dir, name));
        match self.get(&here) {
            Some(e) if e.kind == Kind::Whiteout => None,
            Some(e) => {
                let merges = e.kind.is_dir() && !e.opaque;
                let lower = below.filter(|n| merges && self.base.entry(n).kind.is_dir());
                Some(Seen {
                    entry: e.clone(),
                    upper: true,
                    lower,
                })
            }
            None => {
                let node = below?;
                let entry = self.base.entry(&node).clone();
                let lower = entry.kind.is_dir().then_some(node);
                Some(Seen {
                    entry,
                    upper: false,
                    lower,
                })
            }
        }
    }

    /// What `path` (clean, links not followed) shows.
    pub(crate) fn look(&self, path: &[u8]) -> Option<Seen> {
        let mut seen = self.root_seen();
        let mut so_far: Vec<u8> = Vec::new();
        for name in path.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
            if !seen.entry.kind.is_dir() {
                return None;
            }
            seen = self.step(&so_far, name, seen.lower.as_ref())?;
            so_far = join(&so_far, name);
        }
        Some(seen)
    }

    /// The path that `path` means with links followed.
    pub(crate) fn resolve(&self, path: &[u8], follow_last: bool) -> Result<Vec<u8>> {
        resolve(path, follow_last, &mut |at| {
            let seen = self.look(at)?;
            (seen.entry.kind == Kind::Symlink).then(|| seen.entry.target.to_vec())
        })
    }

    /// The names in a directory, sorted.
    pub(crate) fn list(&self, path: &[u8]) -> Vec<Vec<u8>> {
        let Some(seen) = self.look(path) else { return Vec::new() };
        let mut names: BTreeMap<Vec<u8>, bool> = BTreeMap::new();
        if let Some(dir) = &seen.lower {
            names.extend(
                self.base
                    .children(dir)
                    .map(|n| (self.base.entry(&n).name().to_vec(), true)),
            );
        }
        let from = key(path);
        for (_, e) in self
            .upper
            .range(from..)
            .skip(1)
            .take_while(|(_, e)| is_below(&e.path, path))
        {
            if parent(&e.path) == path {
                names.insert(e.name().to_vec(), e.kind != Kind::Whiteout);
            }
        }
        names
            .into_iter()
            .filter(|(_, shown)| *shown)
            .map(|(name, _)| name)
            .collect()
    }

    /// Makes sure that the new tree has directory `path`, which must exist in what is shown, and gives a handle on it.
    ///
    /// # Errors
    /// If it does not exist or is no directory.
    pub(crate) fn enter(&mut self, path: &[u8]) -> Result<Place> {
        let mut seen = self.root_seen();
        let mut so_far: Vec<u8> = Vec::new();
        for name in path.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
            let next = self.step(&so_far, name, seen.lower.as_ref());
            so_far = join(&so_far, name);
            seen = next.ok_or_else(|| path_error("open", &so_far, "no such file or directory"))?;
            if !seen.entry.kind.is_dir() {
                return Err(path_error("open", &so_far, "not a directory"));
            }
            if !seen.upper {
                self.out.fs().create_dir(os_path(&so_far), 0o700)?;
                let path = so_far.clone().into();
                self.insert(Entry {
                    path,
                    opaque: false,
                    unchanged: true,
                    link_group: 0,
                    ..seen.entry.clone()
                });
            }
        }
        let handle = match path {
            b"" => self.out.fs().clone(),
            _ => Arc::new(self.out.fs().open_dir(os_path(path))?),
        };
        Ok(Place {
            path: so_far,
            lower: seen.lower,
            handle,
        })
    }

    /// What `name` in a directory that was entered shows.
    pub(crate) fn look_in(&self, place: &Place, name: &[u8]) -> Option<Seen> {
        self.step(&place.path, name, place.lower.as_ref())
    }

    /// Takes away what the new tree itself has at `path` (a whiteout as well), so that something can be created there.
    pub(crate) fn clear(&mut self, path: &[u8], stop: &Stop) -> Result<()> {
        if self.get(path).is_none() {
            return Ok(());
        }
        self.out.fs().remove_tree(os_path(path), stop)?;
        let gone: Vec<Vec<u8>> = {
            let all = self.upper.range(key(path)..);
            all.take_while(|(_, e)| *e.path == *path || is_below(&e.path, path))
                .map(|(k, _)| k.clone())
                .collect()
        };
        for k in gone {
            self.upper.remove(&k);
        }
        Ok(())
    }

    /// Creates directory `name` in `place`, where nothing is shown, with the metadata of `entry` (its path is set here).
    pub(crate) fn create_dir(&mut self, place: &Place, name: &[u8], entry: Entry, stop: &Stop) -> Result<Place> {
        let path = join(&place.path, name);
        let hidden_dir = place.lower.as_ref().and_then(|d| self.base.child(d, name));
        let opaque = hidden_dir.is_some_and(|n| self.base.entry(&n).kind.is_dir());
        self.clear(&path, stop)?;
        place.handle.create_dir(os_path(name), 0o700)?;
        let handle = Arc::new(place.handle.child_dir(os_path(name))?);
        let entry = Entry {
            path: path.clone().into(),
            kind: Kind::Directory,
            opaque,
            unchanged: false,
            ..entry
        };
        self.insert(Entry {
            link_group: 0,
            size: 0,
            ..entry
        });
        Ok(Place {
            path,
            lower: None,
            handle,
        })
    }

    /// Creates the missing directories of `path` (clean, links resolved), each with the metadata of `like`.
    pub(crate) fn create_missing(&mut self, path: &[u8], like: &Entry, stop: &Stop) -> Result<()> {
        let mut so_far: Vec<u8> = Vec::new();
        for name in path.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
            let here = join(&so_far, name);
            match self.look(&here) {
                Some(seen) if seen.entry.kind.is_dir() => {}
                Some(_) => return Err(path_error("mkdir", &here, "not a directory")),
                None => {
                    let place = self.enter(&so_far)?;
                    self.create_dir(&place, name, like.clone(), stop)?;
                }
            }
            so_far = here;
        }
        Ok(())
    }

    /// Removes what is shown at `path`.
    pub(crate) fn remove(&mut self, path: &[u8], stop: &Stop) -> Result<()> {
        let place = self.enter(parent(path))?;
        self.clear(path, stop)?;
        if place
            .lower
            .as_ref()
            .is_some_and(|d| self.base.child(d, base(path)).is_some())
        {
            self.out.put_whiteout(path)?;
            self.insert(Entry::whiteout(path));
        }
        Ok(())
    }

    fn made(&self, mode: u32, owner: Option<Owner>, mtime: Option<Timestamp>) -> Entry {
        let owner = owner.unwrap_or_default();
        Entry {
            mode,
            uid: owner.uid,
            gid: owner.gid,
            mtime: mtime.unwrap_or(self.now),
            ..Entry::dir(*b"")
        }
    }

    /// Makes a directory, `mode` masked with 0777. What exists is left alone.
    ///
    /// # Errors
    /// If the directory above is missing and `parents` is not set, or something on the way is no directory.
    pub fn mkdir(
        &mut self,
        path: &[u8],
        mode: u32,
        parents: bool,
        owner: Option<Owner>,
        mtime: Option<Timestamp>,
        stop: &Stop,
    ) -> Result<()> {
        let path = self.resolve(&clean_rooted(path), true)?;
        let like = self.made(mode & 0o777, owner, mtime);
        if parents {
            return self.create_missing(&path, &like, stop);
        }
        if self.look(&path).is_some() {
            return Ok(());
        }
        let place = self.enter(parent(&path))?;
        self.create_dir(&place, base(&path), like, stop)?;
        Ok(())
    }

    /// Makes a file, `mode` masked with 0777. An existing file gets new content and keeps mode and, without `owner`, owner.
    ///
    /// # Errors
    /// If the directory is missing or the path is a directory.
    pub fn mkfile(
        &mut self,
        path: &[u8],
        mode: u32,
        data: &[u8],
        owner: Option<Owner>,
        mtime: Option<Timestamp>,
        stop: &Stop,
    ) -> Result<()> {
        let path = self.resolve(&clean_rooted(path), true)?;
        let mut entry = Entry {
            kind: Kind::Regular,
            ..self.made(mode & 0o777, owner, mtime)
        };
        match self.look(&path) {
            Some(seen) if seen.entry.kind == Kind::Regular => {
                entry.mode = seen.entry.mode;
                if owner.is_none() {
                    (entry.uid, entry.gid) = (seen.entry.uid, seen.entry.gid);
                }
            }
            Some(_) => return Err(path_error("open", &path, "is not a regular file")),
            None => {}
        }
        let place = self.enter(parent(&path))?;
        self.clear(&path, stop)?;
        entry.path = path.clone().into();
        entry.size = data.len() as u64;
        FileJob::new(place.handle, base(&path), &entry).write_bytes(data)?;
        self.insert(entry);
        Ok(())
    }

    /// Makes a symbolic link at `path` with the text `target`.
    ///
    /// # Errors
    /// If something is there already.
    pub fn symlink(
        &mut self,
        target: &[u8],
        path: &[u8],
        owner: Option<Owner>,
        mtime: Option<Timestamp>,
        stop: &Stop,
    ) -> Result<()> {
        let path = self.resolve(&clean_rooted(path), false)?;
        if self.look(&path).is_some() {
            return Err(path_error("symlink", &path, "file exists"));
        }
        let place = self.enter(parent(&path))?;
        self.clear(&path, stop)?;
        let made = self.made(0o777, owner, mtime);
        let entry = Entry {
            path: path.clone().into(),
            kind: Kind::Symlink,
            target: target.into(),
            ..made
        };
        FileJob::new(place.handle, base(&path), &entry).create_special(&entry)?;
        self.insert(entry);
        Ok(())
    }

    /// Removes a file or a whole directory; a link as last element is removed itself. With `wildcard`, elements may be
    /// patterns of Go's `path.Match`.
    ///
    /// # Errors
    /// If nothing is there and `allow_not_found` is not set.
    pub fn rm(&mut self, path: &[u8], allow_not_found: bool, wildcard: bool, stop: &Stop) -> Result<()> {
        let path = clean_rooted(path);
        let targets = if wildcard { self.expand(&path)? } else { vec![path] };
        for target in targets {
            stop.check()?;
            if target.is_empty() {
                return Err(StoreError::Invalid("the root directory cannot be removed".into()));
            }
            let real = self.resolve(&target, false)?;
            if self.look(&real).is_some() {
                self.remove(&real, stop)?;
            } else if !allow_not_found {
                return Err(path_error("remove", &target, "no such file or directory"));
            }
        }
        Ok(())
    }

    /// The paths that a wildcard path names here, sorted; a path without wildcards names itself.
    fn expand(&self, path: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (fixed, pattern) = copy::split_wildcard(path);
        if pattern.is_empty() {
            return Ok(vec![path.to_vec()]);
        }
        let from = self.resolve(&fixed, true)?;
        let depth = pattern.split(|b| *b == b'/').count();
        let mut out = Vec::new();
        let mut level = vec![from.clone()];
        for d in 1..=depth {
            let mut next = Vec::new();
            for dir in level {
                next.extend(self.list(&dir).iter().map(|name| join(&dir, name)));
            }
            if d == depth {
                for candidate in &next {
                    let skip = if from.is_empty() { 0 } else { from.len() + 1 };
                    if kiln_match::go_match(&pattern, candidate.get(skip..).unwrap_or_default())? {
                        out.push(candidate.clone());
                    }
                }
            }
            level = next;
        }
        Ok(out)
    }

    /// Completes the tree: directories get their metadata, replaced directories their whiteouts, and what equals the
    /// base is noted.
    pub fn finish(self, stop: &Stop) -> Result<Tree> {
        let entries: Vec<Entry> = self.upper.into_values().collect();
        seal_entries(
            &self.base,
            self.out,
            entries,
            Some(kiln_fs::parallel::default_threads()),
            stop,
        )
    }
}

/// Attributes that a copy of a file keeps.
pub(crate) fn copied_xattrs(xattrs: &Xattrs) -> Xattrs {
    xattrs
        .iter()
        .filter(|(n, _)| kiln_fs::xattr::kept_in_tree(n))
        .cloned()
        .collect()
}
