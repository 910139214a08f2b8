//! A directory of this machine as the source of a transfer, and as a listing to compare with.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use kiln_fs::mode::to_go;
use kiln_fs::{Dir, FileType, Links, Metadata, Stop};
use kiln_match::{FilterState, LinkSource, Verdict, follow_links};

use super::Entry;
use super::send::{TreeFiles, TreeSource};
use crate::error::{Result, SessionError};

/// What of a directory is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// What is sent, in the syntax of ignore files; nothing here means everything.
    pub include: Vec<String>,
    /// What is not.
    pub exclude: Vec<String>,
    /// Paths that are sent together with everything they point to as symlinks.
    pub follow_paths: Vec<String>,
}

impl Filter {
    fn compile(&self, root: &Dir) -> io::Result<kiln_match::Filter> {
        let invalid = |error: kiln_match::Error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let mut include = self.include.clone();
        if !self.follow_paths.is_empty() {
            for path in follow_links(&LinksOf(root), &self.follow_paths).map_err(invalid)? {
                include.push(literal(&path));
            }
        }
        // The root itself is wanted: nothing is filtered by inclusion.
        if include.iter().any(|path| path == ".") {
            include.clear();
        }
        kiln_match::Filter::new(&include, &self.exclude).map_err(invalid)
    }
}

/// A path as a pattern that matches it and nothing else.
fn literal(path: &[u8]) -> String {
    let mut pattern = String::new();
    for character in String::from_utf8_lossy(path).chars() {
        if "*?[]\\!".contains(character) {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

/// The links of a directory, for the expansion of `follow_paths`.
struct LinksOf<'d>(&'d Dir);

impl LinkSource for LinksOf<'_> {
    fn read_link(&self, path: &[u8]) -> Option<Vec<u8>> {
        self.0
            .read_link(Path::new(OsStr::from_bytes(path)))
            .ok()
            .map(OsString::into_vec)
    }

    fn list(&self, path: &[u8]) -> Vec<Vec<u8>> {
        let path = if path.is_empty() { b"." } else { path };
        let entries = self
            .0
            .open_dir(Path::new(OsStr::from_bytes(path)))
            .and_then(|dir| dir.entries());
        let mut names: Vec<_> = entries
            .unwrap_or_default()
            .into_iter()
            .map(|entry| entry.name.into_vec())
            .collect();
        names.sort();
        names
    }
}

/// A directory, walked in order.
#[derive(Debug)]
pub struct DirSource {
    root: Arc<Dir>,
    filter: kiln_match::Filter,
    /// Owner written into every entry instead of the real one.
    owner: Option<(u32, u32)>,
    levels: Vec<Level>,
    /// The first path of an inode with several names.
    inodes: HashMap<(u64, u64), String>,
    /// What was found and has not been handed out; last first.
    ready: Vec<Entry>,
}

/// A directory that is being listed.
#[derive(Debug)]
struct Level {
    dir: Dir,
    /// With a slash at its end, or empty for the root.
    prefix: String,
    /// Names that are left, last first.
    names: Vec<OsString>,
    state: FilterState,
    /// The directory's own entry, if it only comes along with something in it and nothing was found yet.
    pending: Option<Entry>,
}

/// Opens files of a directory by the paths it listed.
#[derive(Debug)]
pub(crate) struct DirFiles(Arc<Dir>);

impl TreeFiles for DirFiles {
    fn open(&self, path: &str) -> io::Result<Box<dyn io::Read + Send>> {
        Ok(Box::new(self.0.open_regular(path)?))
    }
}

impl DirSource {
    /// The tree beneath `root`. With `owner`, every entry says that it belongs to it (a build context belongs to 0:0).
    ///
    /// # Errors
    /// A directory that cannot be read, and malformed patterns.
    pub fn new(root: Dir, filter: &Filter, owner: Option<(u32, u32)>) -> io::Result<Self> {
        let filter = filter.compile(&root)?;
        let root = root.with_links(Links::Refuse);
        let top = Level {
            names: names(&root)?,
            dir: root.try_clone()?,
            prefix: String::new(),
            state: FilterState::default(),
            pending: None,
        };
        let root = Arc::new(root);
        Ok(DirSource {
            root,
            filter,
            owner,
            levels: vec![top],
            inodes: HashMap::new(),
            ready: Vec::new(),
        })
    }

    /// Looks at one more name; `false` when there are none left.
    fn step(&mut self) -> io::Result<bool> {
        let Some(level) = self.levels.last_mut() else {
            return Ok(false);
        };
        let Some(name) = level.names.pop() else {
            self.levels.pop();
            return Ok(true);
        };
        let Some(metadata) = vanished(level.dir.symlink_metadata(&name))? else {
            return Ok(true);
        };
        if metadata.file_type == FileType::Socket {
            return Ok(true);
        }
        let mut path = level.prefix.clone().into_bytes();
        path.extend_from_slice(name.as_bytes());
        let is_dir = metadata.file_type.is_dir();
        let (verdict, state) = self.filter.check(&path, is_dir, &level.state);
        if verdict == Verdict::Skip {
            return Ok(true);
        }
        let path = String::from_utf8(path).map_err(|error| {
            let path = String::from_utf8_lossy(error.as_bytes()).into_owned();
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{path}: file name is not valid UTF-8"),
            )
        })?;
        let Some(mut entry) = vanished(entry_of(&level.dir, &name, path, &metadata))? else {
            return Ok(true);
        };
        if let Some((uid, gid)) = self.owner {
            (entry.uid, entry.gid) = (uid, gid);
        }
        let keep = verdict == Verdict::Keep;
        if keep && !is_dir && metadata.nlink > 1 {
            let first = self
                .inodes
                .entry((metadata.dev, metadata.ino))
                .or_insert_with(|| entry.path.clone());
            if *first != entry.path && !entry.is_symlink() {
                entry.linkname.clone_from(first);
                entry.size = 0;
            }
        }
        let below = if is_dir {
            vanished(level.dir.child_dir(&name).and_then(|dir| Ok((names(&dir)?, dir))))?
        } else {
            None
        };
        let prefix = format!("{}/", entry.path);
        let mut pending = None;
        if keep {
            self.ready.push(entry);
            for level in self.levels.iter_mut().rev() {
                self.ready.extend(level.pending.take());
            }
        } else {
            pending = Some(entry);
        }
        if let Some((names, dir)) = below {
            self.levels.push(Level {
                dir,
                prefix,
                names,
                state,
                pending,
            });
        }
        Ok(true)
    }
}

impl TreeSource for DirSource {
    fn next(&mut self) -> io::Result<Option<Entry>> {
        loop {
            if let Some(entry) = self.ready.pop() {
                return Ok(Some(entry));
            }
            if !self.step()? {
                return Ok(None);
            }
        }
    }

    fn files(&self) -> Arc<dyn TreeFiles> {
        Arc::new(DirFiles(Arc::clone(&self.root)))
    }
}

/// Names in a directory, last first.
fn names(dir: &Dir) -> kiln_fs::Result<Vec<OsString>> {
    let mut names: Vec<_> = dir.entries()?.into_iter().map(|entry| entry.name).collect();
    names.sort_unstable_by(|a, b| b.cmp(a));
    Ok(names)
}

/// A file that goes away during the walk was never there.
fn vanished<T>(result: kiln_fs::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn entry_of(dir: &Dir, name: &OsStr, path: String, metadata: &Metadata) -> kiln_fs::Result<Entry> {
    let linkname = if metadata.file_type.is_symlink() {
        String::from_utf8_lossy(dir.read_link(name)?.as_bytes()).into_owned()
    } else {
        String::new()
    };
    let mut xattrs = BTreeMap::new();
    for (name, value) in dir.xattrs(name, kiln_fs::xattr::kept_in_tree)? {
        if let Ok(name) = String::from_utf8(name.into_vec()) {
            xattrs.insert(name, Bytes::from(value));
        }
    }
    let device = match metadata.file_type {
        FileType::CharDevice | FileType::BlockDevice => metadata.rdev_numbers(),
        _ => (0, 0),
    };
    Ok(Entry {
        path,
        mode: to_go(metadata.st_mode()),
        uid: metadata.uid,
        gid: metadata.gid,
        size: if metadata.file_type.is_file() { metadata.size } else { 0 },
        mtime: metadata.mtime.unix_nanos(),
        linkname,
        device,
        xattrs,
        digest: None,
    })
}

/// What is on disk at a path, without following a link there; `None` if nothing is.
pub(crate) fn disk_entry(root: &Dir, path: &str) -> Result<Option<Entry>> {
    let found = root
        .symlink_metadata(path)
        .and_then(|metadata| entry_of(root, OsStr::new(path), path.to_owned(), &metadata));
    vanished(found).map_err(|error| SessionError::io(format!("look at {path}"), error))
}

/// Lists everything beneath `root`, without digests, for [`super::Existing::Listing`] when no listing was kept.
///
/// # Errors
/// A directory that cannot be read; [`SessionError::Canceled`] when told to stop.
pub fn scan(root: &Dir, stop: &Stop) -> Result<Vec<Entry>> {
    let failed = |error: io::Error| SessionError::io("list directory", error);
    let root = root.try_clone().map_err(|error| failed(error.into()))?;
    let mut source = DirSource::new(root, &Filter::default(), None).map_err(failed)?;
    let mut entries = Vec::new();
    while let Some(entry) = source.next().map_err(failed)? {
        if stop.is_stopped() {
            return Err(SessionError::Canceled("list directory".to_owned()));
        }
        entries.push(entry);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        for sub in ["a/deep/er", "b", "node_modules/x"] {
            fs::create_dir_all(at(sub)).unwrap();
        }
        for file in ["a/one", "a/deep/er/two", "a.txt", "b/three", "node_modules/x/four", "z"] {
            fs::write(at(file), file).unwrap();
        }
        std::os::unix::fs::symlink("deep", at("a/link")).unwrap();
        fs::hard_link(at("a/one"), at("b/one")).unwrap();
        dir
    }

    fn walk(dir: &tempfile::TempDir, filter: &Filter) -> Vec<String> {
        let root = Dir::open_ambient(dir.path()).unwrap();
        let mut source = DirSource::new(root, filter, Some((0, 0))).unwrap();
        std::iter::from_fn(|| source.next().unwrap())
            .map(|entry| entry.path)
            .collect()
    }

    #[test]
    fn everything_in_order() {
        let dir = tree();
        let all = walk(&dir, &Filter::default());
        let mut sorted = all.clone();
        sorted.sort_by(|a, b| super::super::compare_paths(a, b));
        assert_eq!(all, sorted);
        assert_eq!(all.iter().position(|p| p == "a.txt"), Some(6));
        let entries = scan(&Dir::open_ambient(dir.path()).unwrap(), &Stop::new()).unwrap();
        let link = entries.iter().find(|entry| entry.path == "b/one").unwrap();
        assert_eq!((link.linkname.as_str(), link.size), ("a/one", 0));
    }

    #[test]
    fn parents_come_along_only_with_something_in_them() {
        let dir = tree();
        let filter = Filter {
            include: vec!["**/two".to_owned()],
            ..Filter::default()
        };
        assert_eq!(walk(&dir, &filter), ["a", "a/deep", "a/deep/er", "a/deep/er/two"]);
        let filter = Filter {
            exclude: vec!["node_modules".to_owned(), "a".to_owned()],
            ..Filter::default()
        };
        assert_eq!(walk(&dir, &filter), ["a.txt", "b", "b/one", "b/three", "z"]);
        let filter = Filter {
            exclude: vec!["*".to_owned(), "!b/three".to_owned()],
            ..Filter::default()
        };
        assert_eq!(walk(&dir, &filter), ["b", "b/three"]);
    }

    #[test]
    fn followed_links_bring_their_targets() {
        let dir = tree();
        let filter = Filter {
            follow_paths: vec!["a/link/er".to_owned()],
            ..Filter::default()
        };
        assert_eq!(
            walk(&dir, &filter),
            ["a", "a/deep", "a/deep/er", "a/deep/er/two", "a/link"]
        );
        let filter = Filter {
            follow_paths: vec![".".to_owned()],
            ..Filter::default()
        };
        assert_eq!(walk(&dir, &filter), walk(&dir, &Filter::default()));
    }
}
