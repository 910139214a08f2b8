//! The native snapshotter: the view is copied into a directory; what differs afterwards is the new tree.
//!
//! What was touched is told by the inode change time, which no process can set: an inode older than the end of the copy
//! is as it was copied. Everything younger is compared, content included. Changed files are moved, not copied.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use kiln_fs::xattr::kept_in_tree;
use kiln_fs::{Dir, Links, Metadata, Stop, Timestamp};

use super::{ActiveRoot, Mount, Snapshotter, State};
use crate::error::{IoContext, Result, StoreError};
use crate::files::{FileJob, Writers};
use crate::manifest::{Entry, Kind, join, parent};
use crate::tree::{TreeBuilder, os_path};
use crate::union::same_content;
use crate::view::{Node, View};

/// Name of the copied root beside `fs`.
const ROOT: &str = "root";
/// Name of the file whose change time separates copying from running.
const STAMP: &str = "stamp";

/// Copies views into directories.
#[derive(Clone, Copy, Debug, Default)]
pub struct Native;

impl Snapshotter for Native {
    fn name(&self) -> &'static str {
        "native"
    }

    fn prepare(&self, base: &View, out: TreeBuilder, stop: &Stop) -> Result<ActiveRoot> {
        let path = out.dir().join(ROOT);
        std::fs::create_dir(&path).during("create directory", &path)?;
        let root = Arc::new(Dir::open_ambient(&path)?.with_links(Links::Refuse));
        let skipped = materialise(base, &root, stop)?;
        let above = Dir::open_ambient(out.dir())?;
        above.create_file(STAMP, 0o600)?;
        let stamp = above.symlink_metadata(STAMP)?.ctime;
        let mount = Mount::Bind { path, readonly: false };
        let state = State::Native(Materialised { root, stamp, skipped });
        Ok(ActiveRoot {
            base: base.clone(),
            out,
            mount,
            state,
        })
    }

    fn read_only(&self, base: &View, scratch: &Path, stop: &Stop) -> Result<Mount> {
        let root = Arc::new(Dir::open_ambient(scratch)?.with_links(Links::Refuse));
        materialise(base, &root, stop)?;
        Ok(Mount::Bind {
            path: scratch.to_owned(),
            readonly: true,
        })
    }
}

/// Copies what `view` shows into the empty directory `root`; gives back the paths that could not be made (devices, in a
/// user namespace).
///
/// # Errors
/// I/O errors and [`StoreError::Canceled`].
pub fn materialise(view: &View, root: &Arc<Dir>, stop: &Stop) -> Result<HashSet<Vec<u8>>> {
    let mut skipped = HashSet::new();
    let Some(top) = view.root() else { return Ok(skipped) };
    let mut dirs: Vec<Node> = vec![top.clone()];
    let threads = kiln_fs::parallel::default_threads();
    Writers::run(threads, stop, |writers| {
        let mut links: HashMap<(usize, u32), Vec<u8>> = HashMap::new();
        let mut place: (Vec<u8>, Arc<Dir>) = (Vec::new(), root.clone());
        for node in view.walk(&top) {
            stop.check()?;
            writers.check()?;
            let entry = view.entry(&node);
            let path = os_path(&entry.path);
            if entry.kind.is_dir() {
                root.create_dir(path, 0o700)?;
                dirs.push(node);
                continue;
            }
            if entry.link_group != 0 {
                let group = (node.tree(), entry.link_group);
                if let Some(first) = links.get(&group) {
                    writers.wait()?;
                    root.hard_link(os_path(first), path)?;
                    continue;
                }
                links.insert(group, entry.path.to_vec());
            }
            if place.0 != parent(&entry.path) {
                let above = parent(&entry.path);
                let dir = if above.is_empty() {
                    root.clone()
                } else {
                    Arc::new(root.open_dir(os_path(above))?)
                };
                place = (above.to_vec(), dir);
            }
            let job = FileJob::new(place.1.clone(), entry.name(), entry);
            if entry.kind == Kind::Regular {
                let Some(tree) = view.trees().get(node.tree()).cloned() else {
                    continue;
                };
                let (from, copier, stop) = (entry.path.clone(), writers.copier().clone(), stop.clone());
                writers.submit(move || {
                    let file = tree.fs()?.open_regular(os_path(&from))?;
                    job.copy_from(&file, &copier, &stop).map(|_| ())
                })?;
                continue;
            }
            match job.create_special(entry) {
                Err(StoreError::Io { source, .. })
                    if source.kind() == std::io::ErrorKind::PermissionDenied
                        && matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) =>
                {
                    skipped.insert(entry.path.to_vec());
                }
                other => other?,
            }
        }
        Ok(())
    })?;
    kiln_fs::parallel::for_each(&dirs, threads, |node| {
        let entry = view.entry(node);
        crate::files::finish_dir(root, entry)
    })?;
    Ok(skipped)
}

/// A copied root and when it was complete.
#[derive(Debug)]
pub(super) struct Materialised {
    root: Arc<Dir>,
    stamp: Timestamp,
    skipped: HashSet<Vec<u8>>,
}

impl Materialised {
    /// Moves everything that differs from `base` into the upper directory of `out`, with whiteouts for what is gone.
    pub(super) fn move_changes(self, base: &View, out: &TreeBuilder, stop: &Stop) -> Result<()> {
        let mut mover = Mover {
            base,
            out,
            work: &self,
            made: BTreeMap::new(),
            stop,
        };
        let root_md = self.root.self_metadata()?;
        mover
            .made
            .insert(Vec::new(), self.entry_of(&self.root, b"", Vec::new(), &root_md)?);
        let mut todo = vec![(Vec::new(), base.root(), self.root.clone())];
        while let Some((path, below, dir)) = todo.pop() {
            mover.directory(&path, below.as_ref(), &dir, &mut todo)?;
        }
        // Parents come last: moving things into them has changed their times.
        for entry in mover.made.values() {
            crate::files::finish_dir(out.fs(), entry)?;
        }
        Ok(())
    }

    fn entry_of(&self, dir: &Dir, name: &[u8], path: Vec<u8>, md: &Metadata) -> Result<Entry> {
        let mut entry = Entry::from_metadata(path, md);
        entry.xattrs = dir.xattrs(os_path(name), kept_in_tree)?;
        if entry.kind == Kind::Symlink {
            entry.target = dir.read_link(os_path(name))?.as_bytes().into();
        }
        Ok(entry)
    }

    /// Whether something at `name` is no longer what was copied from `node`.
    fn differs(&self, base: &View, node: &Node, dir: &Dir, name: &[u8], md: &Metadata, stop: &Stop) -> Result<bool> {
        let old = base.entry(node);
        if Kind::from(md.file_type) != old.kind {
            return Ok(true);
        }
        if md.ctime < self.stamp {
            return Ok(false);
        }
        let new = self.entry_of(dir, name, old.path.to_vec(), md)?;
        let kept = |e: &Entry| {
            e.xattrs
                .iter()
                .filter(|(n, _)| kept_in_tree(n))
                .cloned()
                .collect::<Vec<_>>()
        };
        let same = (new.mode, new.uid, new.gid, new.rdev, &new.target)
            == (old.mode, old.uid, old.gid, old.rdev, &old.target)
            && kept(&new) == kept(old);
        if !same || old.kind.is_dir() {
            return Ok(!same);
        }
        if new.size != old.size || new.mtime != old.mtime {
            return Ok(true);
        }
        if old.kind != Kind::Regular || old.size == 0 {
            return Ok(false);
        }
        Ok(!same_content(
            &dir.open_regular(os_path(name))?,
            &base.open(node)?,
            stop,
        )?)
    }
}

struct Mover<'a> {
    base: &'a View,
    out: &'a TreeBuilder,
    work: &'a Materialised,
    /// Directories of the upper that were made as parents, with the metadata they get in the end.
    made: BTreeMap<Vec<u8>, Entry>,
    stop: &'a Stop,
}

type Todo = Vec<(Vec<u8>, Option<Node>, Arc<Dir>)>;

impl Mover<'_> {
    fn directory(&mut self, path: &[u8], below: Option<&Node>, dir: &Arc<Dir>, todo: &mut Todo) -> Result<()> {
        let present: BTreeSet<Vec<u8>> = dir.entries()?.into_iter().map(|e| e.name.as_bytes().to_vec()).collect();
        if let Some(below) = below {
            for node in self.base.children(below) {
                let entry = self.base.entry(&node);
                if !present.contains(entry.name()) && !self.work.skipped.contains(&entry.path[..]) {
                    self.parents(path)?;
                    self.out.put_whiteout(&entry.path)?;
                }
            }
        }
        for name in present {
            self.stop.check()?;
            let here = join(path, &name);
            let md = dir.symlink_metadata(os_path(&name))?;
            let old = below.and_then(|b| self.base.child(b, &name));
            let is_dir = md.file_type.is_dir();
            match old {
                Some(node) if is_dir && self.base.entry(&node).kind.is_dir() => {
                    if self.work.differs(self.base, &node, dir, &name, &md, self.stop)? {
                        self.parents(&here)?;
                    }
                    todo.push((here, Some(node), Arc::new(dir.child_dir(os_path(&name))?)));
                }
                Some(node) if !self.work.differs(self.base, &node, dir, &name, &md, self.stop)? => {}
                _ => {
                    self.parents(path)?;
                    let to = if path.is_empty() {
                        self.out.fs().try_clone()?
                    } else {
                        self.out.fs().open_dir(os_path(path))?
                    };
                    rustix::fs::renameat(dir, os_path(&name), &to, os_path(&name)).during("move", os_path(&here))?;
                }
            }
        }
        Ok(())
    }

    /// Makes the directories of `path` in the upper, to look as they do in the copied root.
    fn parents(&mut self, path: &[u8]) -> Result<()> {
        if self.made.contains_key(path) {
            return Ok(());
        }
        self.parents(parent(path))?;
        let md = self.work.root.symlink_metadata(os_path(path))?;
        let entry = self.work.entry_of(&self.work.root, path, path.to_vec(), &md)?;
        self.out.fs().create_dir(os_path(path), 0o700)?;
        self.made.insert(path.to_vec(), entry);
        Ok(())
    }
}
