//! What a receiver does to its directory: compare, delete, create. Blocking; every path stays beneath the root.

use std::any::Any;
use std::io::Write as _;
use std::iter::Peekable;
use std::sync::Arc;

use kiln_fs::mode::{from_go, permissions_from_go};
use kiln_fs::{Dir, FileType, Stop, Timestamp};
use kiln_match::{MatchInfo, PatternMatcher};
use prost::Message as _;
use rustix::fs::makedev;

use super::lane::{FileDone, FileJob};
use super::path::{self, is_beneath, parent};
use super::receive::{DigestPrefix, METADATA_FILE};
use super::walk::{disk_entry, scan};
use super::{Entry, Existing, ReceiveOptions, compare_paths};
use crate::error::{Result, SessionError};

/// What both the listing's and the files' side of a transfer need.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) root: Arc<Dir>,
    /// Whether owners are applied; an ordinary user's files are its own.
    pub(crate) owner: Option<(u32, u32)>,
    pub(crate) digest: Option<DigestPrefix>,
    pub(crate) stop: Stop,
    /// Held until the last write is over.
    pub(crate) _keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl Target {
    /// The owner to apply to an entry, if it is not what a new file has anyway.
    pub(crate) fn owner_of(&self, uid: u32, gid: u32) -> Option<(u32, u32)> {
        self.owner.is_some_and(|own| own != (uid, gid)).then_some((uid, gid))
    }
}

/// What entries are compared with.
enum Known {
    /// Nothing: the directory is empty, or everything is wanted anew.
    Nothing,
    /// A listing of all there is, in walk order. What it has and the sender has not is deleted.
    Listing(Peekable<std::vec::IntoIter<Entry>>),
    /// Whatever lies on disk; nothing is deleted.
    Disk,
}

/// A directory on the path to the current entry.
struct Ancestor {
    path: String,
    matched: MatchInfo,
    /// Its place in the listing, or the entry while it has not been needed yet.
    placed: Result<usize, Box<Entry>>,
}

/// The listing's side: takes entries in order and brings the directory in line with them, except for file contents.
pub(crate) struct Listing {
    target: Target,
    known: Known,
    differ: bool,
    /// Metadata-only transfer: what is materialised nevertheless, and the file that takes the whole listing.
    selected: Option<(PatternMatcher, std::io::BufWriter<std::fs::File>)>,
    entries: Vec<Entry>,
    /// For each entry: a directory whose metadata must be applied at the end, a file with new content.
    changed: Vec<bool>,
    ancestors: Vec<Ancestor>,
    links: Vec<usize>,
    last: String,
    next_id: u32,
    /// The last path that was removed with everything beneath it.
    removed: Option<String>,
}

fn refused(path: &str, why: &str) -> SessionError {
    SessionError::protocol("receive directory", format!("{path:?}: {why}"))
}

fn failed(path: &str) -> impl FnOnce(kiln_fs::Error) -> SessionError + '_ {
    move |error| match error {
        kiln_fs::Error::Stopped(_) => SessionError::Canceled("receive directory".to_owned()),
        error => SessionError::io(format!("receive {path}"), error),
    }
}

impl Listing {
    pub(crate) fn new(target: Target, options: &mut ReceiveOptions) -> Result<Self> {
        let known = match std::mem::take(&mut options.existing) {
            Existing::Empty => Known::Nothing,
            Existing::Listing(entries) => Known::Listing(entries.into_iter().peekable()),
            Existing::Disk { delete: false } => Known::Disk,
            Existing::Disk { delete: true } => {
                let mut found = scan(&target.root, &target.stop)?;
                // It is written anew, and no part of the tree.
                found.retain(|entry| options.metadata_only.is_none() || entry.path != METADATA_FILE);
                Known::Listing(found.into_iter().peekable())
            }
        };
        let selected = match options.metadata_only.take() {
            None => None,
            Some(patterns) => {
                let matcher = PatternMatcher::new(&patterns)
                    .map_err(|error| SessionError::protocol("metadata-only patterns", error.to_string()))?;
                target
                    .root
                    .remove_tree(METADATA_FILE, &target.stop)
                    .map_err(failed(METADATA_FILE))?;
                let file = target
                    .root
                    .create_file(METADATA_FILE, 0o644)
                    .map_err(failed(METADATA_FILE))?;
                Some((matcher, std::io::BufWriter::new(file)))
            }
        };
        Ok(Listing {
            target,
            known,
            differ: options.differ,
            selected,
            entries: Vec::new(),
            changed: Vec::new(),
            ancestors: Vec::new(),
            links: Vec::new(),
            last: String::new(),
            next_id: 0,
            removed: None,
        })
    }

    /// Takes the next entry. Files whose content is wanted are added to `jobs`.
    pub(crate) fn add(&mut self, stat: kiln_proto::fsutil::Stat, jobs: &mut Vec<FileJob>) -> Result<()> {
        self.target.stop.check().map_err(|stopped| failed("")(stopped.into()))?;
        let id = self.next_id;
        self.next_id = id
            .checked_add(1)
            .ok_or_else(|| refused(&stat.path, "too many entries"))?;
        if let Some((_, file)) = &mut self.selected {
            let frame = stat.encode_to_vec();
            let length = u32::try_from(frame.len()).unwrap_or(u32::MAX).to_le_bytes();
            file.write_all(&length)
                .and_then(|()| file.write_all(&frame))
                .map_err(|error| SessionError::io(METADATA_FILE, error))?;
        }
        let mut entry = Entry::from_wire(stat);
        self.check(&entry)?;
        entry
            .xattrs
            .retain(|name, _| !kiln_fs::xattr::is_overlay_private(name.as_bytes()));
        self.last.clone_from(&entry.path);

        let (wanted, matched) = match &self.selected {
            None => (true, MatchInfo::default()),
            Some((matcher, _)) => {
                let nothing = MatchInfo::default();
                let above = self.ancestors.last().map_or(&nothing, |ancestor| &ancestor.matched);
                matcher.matches_below(entry.path.as_bytes(), above)
            }
        };
        let is_dir = entry.is_dir();
        let path = entry.path.clone();
        let placed = if wanted {
            self.place_ancestors(jobs)?;
            Ok(self.place(entry, id, jobs)?)
        } else {
            Err(Box::new(entry))
        };
        if is_dir {
            self.ancestors.push(Ancestor { path, matched, placed });
        }
        Ok(())
    }

    /// The rules a listing must keep: clean paths in strictly increasing order, each after its directory; link targets
    /// that came before; kinds of files that a tree may have.
    fn check(&mut self, entry: &Entry) -> Result<()> {
        let path = entry.path.as_str();
        if let Some(why) = path::refusal(path) {
            return Err(refused(path, why));
        }
        if !self.last.is_empty() && compare_paths(&self.last, path) != std::cmp::Ordering::Less {
            return Err(refused(path, &format!("out of order after {:?}", self.last)));
        }
        while self.ancestors.last().is_some_and(|dir| !is_beneath(path, &dir.path)) {
            self.ancestors.pop();
        }
        if self.ancestors.last().map_or("", |dir| &dir.path) != parent(path) {
            return Err(refused(path, "its directory was not listed"));
        }
        if entry.is_symlink()
            && let Some(why) = path::link_refusal(&entry.linkname)
        {
            return Err(refused(path, why));
        }
        let kind = FileType::from_st_mode(from_go(entry.mode));
        if kind == FileType::Socket || (!entry.is_file() && kind == FileType::Regular) || entry.is_whiteout() {
            return Err(refused(path, "not a kind of file that can be transferred"));
        }
        Ok(())
    }

    /// A hard link must name an entry of its own kind that came before and was materialised.
    fn check_link(&self, entry: &Entry) -> Result<()> {
        let target = self.find(&entry.linkname).and_then(|index| self.entries.get(index));
        let fits = |target: &Entry| {
            !target.is_dir() && !target.is_hard_link() && !target.is_symlink() && target.is_file() == entry.is_file()
        };
        if target.is_some_and(fits) {
            return Ok(());
        }
        Err(refused(
            &entry.path,
            &format!("hard link to {:?}, which was not listed before", entry.linkname),
        ))
    }

    fn find(&self, path: &str) -> Option<usize> {
        self.entries
            .binary_search_by(|entry| compare_paths(&entry.path, path))
            .ok()
    }

    /// Directories that have only been listed so far become real when something in them does.
    fn place_ancestors(&mut self, jobs: &mut Vec<FileJob>) -> Result<()> {
        for depth in 0..self.ancestors.len() {
            let Some(Err(entry)) = self.ancestors.get(depth).map(|dir| &dir.placed) else {
                continue;
            };
            let index = self.place(Entry::clone(entry), 0, jobs)?;
            if let Some(dir) = self.ancestors.get_mut(depth) {
                dir.placed = Ok(index);
            }
        }
        Ok(())
    }

    /// Brings the directory in line with one entry and returns its place in the listing.
    fn place(&mut self, mut entry: Entry, id: u32, jobs: &mut Vec<FileJob>) -> Result<usize> {
        if entry.is_hard_link() {
            self.check_link(&entry)?;
        }
        let found = self.existing(&entry)?;
        let index = self.entries.len();
        let same = self.differ && found.as_ref().is_some_and(|found| found.is_same(&entry));
        let kept_dir = entry.is_dir() && found.as_ref().is_some_and(Entry::is_dir);
        if let Some(found) = &found
            && !same
            && !kept_dir
        {
            self.remove(&entry.path, found.is_dir())?;
        }
        let mut changed = !same;
        if entry.is_dir() {
            if !kept_dir {
                self.target
                    .root
                    .create_dir(&entry.path, 0o700)
                    .map_err(failed(&entry.path))?;
            } else if self.target.owner.is_none() && permissions_from_go(entry.mode) & 0o700 != 0o700 {
                // Without privileges a directory must be made writable to be worked in; its mode comes back at the end.
                self.target
                    .root
                    .set_mode(&entry.path, 0o700)
                    .map_err(failed(&entry.path))?;
                changed = true;
            }
        } else if entry.is_hard_link() {
            self.links.push(index);
        } else if entry.is_file() {
            let known = found.filter(|_| same);
            entry.digest = known.as_ref().and_then(|known| known.digest);
            if !same || (entry.digest.is_none() && self.target.digest.is_some()) {
                jobs.push(FileJob::new(&self.target, &entry, index, id, !same));
            }
        } else if !same {
            self.create_special(&entry)?;
        }
        if changed && !kept_dir {
            self.touch(parent(&entry.path));
        }
        self.entries.push(entry);
        self.changed.push(changed);
        Ok(index)
    }

    /// What is there under the entry's path. Deletes what the sender does not have.
    fn existing(&mut self, entry: &Entry) -> Result<Option<Entry>> {
        match &self.known {
            Known::Nothing => Ok(None),
            Known::Disk => {
                let mut found = disk_entry(&self.target.root, &entry.path)?;
                if let (None, Some(found)) = (self.target.owner, &mut found) {
                    (found.uid, found.gid) = (entry.uid, entry.gid);
                }
                Ok(found)
            }
            Known::Listing(_) => {
                self.delete_before(Some(&entry.path))?;
                let Known::Listing(previous) = &mut self.known else {
                    return Ok(None);
                };
                let found = previous.next_if(|previous| previous.path == entry.path);
                // A file inside what was removed as a whole is not there any more.
                Ok(found.filter(|found| !self.removed.as_ref().is_some_and(|gone| is_beneath(&found.path, gone))))
            }
        }
    }

    /// Deletes what the previous listing has before `path` (or to its end) and the sender has not.
    fn delete_before(&mut self, path: Option<&str>) -> Result<()> {
        loop {
            let Known::Listing(previous) = &mut self.known else {
                return Ok(());
            };
            let before = |entry: &Entry| path.is_none_or(|path| compare_paths(&entry.path, path).is_lt());
            let Some(gone) = previous.next_if(before) else {
                return Ok(());
            };
            if self
                .removed
                .as_ref()
                .is_some_and(|removed| is_beneath(&gone.path, removed))
            {
                continue;
            }
            self.remove(&gone.path, gone.is_dir())?;
            self.touch(parent(&gone.path));
        }
    }

    fn remove(&mut self, path: &str, is_dir: bool) -> Result<()> {
        let removed = if is_dir {
            self.target.root.remove_tree(path, &self.target.stop)
        } else {
            self.target.root.remove_file(path)
        };
        match removed {
            Err(error) if !error.is_not_found() => return Err(failed(path)(error)),
            _ => {}
        }
        if is_dir {
            self.removed = Some(path.to_owned());
        }
        Ok(())
    }

    /// Notes that the directory's content changes, so that its time is set afterwards.
    fn touch(&mut self, dir: &str) {
        let index = match self.ancestors.last() {
            Some(Ancestor {
                path,
                placed: Ok(index),
                ..
            }) if path == dir => Some(*index),
            _ => self.find(dir),
        };
        if let Some(changed) = index.and_then(|index| self.changed.get_mut(index)) {
            *changed = true;
        }
    }

    /// Symlinks, devices and fifos, complete with owner and time.
    fn create_special(&self, entry: &Entry) -> Result<()> {
        let (root, path) = (&self.target.root, &entry.path);
        if entry.is_symlink() {
            root.symlink(&entry.linkname, path).map_err(failed(path))?;
        } else {
            let kind = FileType::from_st_mode(from_go(entry.mode));
            let device = makedev(entry.device.0, entry.device.1);
            root.create_node(path, kind, permissions_from_go(entry.mode), device)
                .map_err(failed(path))?;
        }
        if let Some((uid, gid)) = self.target.owner_of(entry.uid, entry.gid) {
            root.set_owner(path, uid, gid).map_err(failed(path))?;
            if !entry.is_symlink() {
                root.set_mode(path, permissions_from_go(entry.mode))
                    .map_err(failed(path))?;
            }
        }
        root.set_mtime(path, Timestamp::from_unix_nanos(entry.mtime))
            .map_err(failed(path))
    }

    /// The sender has no more entries.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.delete_before(None)?;
        if let Some((_, file)) = &mut self.selected {
            file.flush().map_err(|error| SessionError::io(METADATA_FILE, error))?;
        }
        Ok(())
    }

    /// How many entries the sender listed, materialised or not.
    pub(crate) fn listed(&self) -> u64 {
        u64::from(self.next_id)
    }

    /// After all contents have arrived: hard links, then directories from the inside out, whose times would otherwise
    /// move on.
    pub(crate) fn finish(mut self, done: Vec<FileDone>) -> Result<Vec<Entry>> {
        for file in done {
            if let Some(entry) = self.entries.get_mut(file.index) {
                entry.size = file.size;
                entry.digest = file.digest;
            }
        }
        for index in std::mem::take(&mut self.links) {
            self.link(index)?;
        }
        for index in (0..self.entries.len()).rev() {
            if let (Some(entry), Some(true)) = (self.entries.get(index), self.changed.get(index))
                && entry.is_dir()
            {
                self.finish_dir(entry)?;
            }
        }
        Ok(self.entries)
    }

    fn link(&mut self, index: usize) -> Result<()> {
        let Some(entry) = self.entries.get(index) else {
            return Ok(());
        };
        let Some(first) = self.find(&entry.linkname) else {
            return Ok(());
        };
        let digest = self.entries.get(first).and_then(|first| first.digest);
        let renewed = [index, first]
            .iter()
            .any(|at| self.changed.get(*at).copied().unwrap_or(false));
        if renewed {
            let path = entry.path.clone();
            let root = &self.target.root;
            // The name may still be there, on the content the first name had before.
            match root.remove_file(&path) {
                Err(error) if !error.is_not_found() => return Err(failed(&path)(error)),
                _ => {}
            }
            root.hard_link(&entry.linkname, &path).map_err(failed(&path))?;
            self.touch(parent(&path));
        }
        if let Some(entry) = self.entries.get_mut(index) {
            entry.digest = digest;
        }
        Ok(())
    }

    fn finish_dir(&self, entry: &Entry) -> Result<()> {
        let path = &entry.path;
        let dir = self.target.root.open_dir(path).map_err(failed(path))?;
        let owner = self.target.owner_of(entry.uid, entry.gid);
        apply_metadata(&dir, entry.mode, owner, entry.mtime, &entry.xattrs)
            .map_err(|error| SessionError::io(format!("receive {path}"), error))
    }
}

/// Sets owner, mode, attributes and time of an open file or directory, in the order in which they do not undo each
/// other. An attribute that this file system or this user cannot set is left out.
pub(crate) fn apply_metadata(
    file: impl std::os::fd::AsFd,
    mode: u32,
    owner: Option<(u32, u32)>,
    mtime: i64,
    xattrs: &std::collections::BTreeMap<String, bytes::Bytes>,
) -> std::io::Result<()> {
    use rustix::fs::{Gid, Mode, Uid, XattrFlags, fchmod, fchown, fsetxattr, futimens};
    let file = file.as_fd();
    if let Some((uid, gid)) = owner {
        fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    fchmod(file, Mode::from_raw_mode(permissions_from_go(mode)))?;
    for (name, value) in xattrs {
        if let Err(error) = fsetxattr(file, name.as_str(), value, XattrFlags::empty()) {
            tracing::debug!(name, %error, "extended attribute left out");
        }
    }
    futimens(file, &kiln_fs::dir::timestamps(Timestamp::from_unix_nanos(mtime)))?;
    Ok(())
}
