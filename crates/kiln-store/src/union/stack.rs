//! The difference of two views as a tree: what must lie on `lower` so that it shows `upper`.

use std::collections::HashMap;

use kiln_fs::{Copier, Stop};

use crate::error::Result;
use crate::manifest::{Entry, Kind, base, parent};
use crate::tree::{Tree, TreeBuilder};
use crate::union::{FileWriter, same_content};
use crate::view::{Node, View};

/// Writes the difference from `lower` to `upper` into `out`. When the trees of `lower` are the first of `upper`, the rest
/// of `upper` is that difference already and this need not be called.
///
/// # Errors
/// I/O errors and [`crate::StoreError::Canceled`].
pub fn diff_views(lower: &View, upper: &View, out: TreeBuilder, stop: &Stop) -> Result<Tree> {
    let mut writer = FileWriter::new(lower, out)?;
    match (lower.root(), upper.root()) {
        (below, Some(root)) => {
            let (links, copier) = (HashMap::new(), Copier::new());
            let mut differ = Differ {
                lower,
                upper,
                writer: &mut writer,
                links,
                copier,
                stop,
            };
            differ.directory(below.as_ref(), &root)?;
        }
        (Some(below), None) => {
            for gone in lower.children(&below) {
                writer.remove(&lower.entry(&gone).path, stop)?;
            }
        }
        (None, None) => {}
    }
    writer.finish(stop)
}

struct Differ<'a> {
    lower: &'a View,
    upper: &'a View,
    writer: &'a mut FileWriter,
    links: HashMap<(usize, u32), Vec<u8>>,
    copier: Copier,
    stop: &'a Stop,
}

impl Differ<'_> {
    fn directory(&mut self, below: Option<&Node>, above: &Node) -> Result<()> {
        // Explicit stack: a tree may be deeper than a thread's stack likes.
        let mut todo = vec![(below.cloned(), above.clone())];
        while let Some((below, above)) = todo.pop() {
            self.stop.check()?;
            if let Some(dir) = &below {
                for gone in self.lower.children(dir) {
                    let entry = self.lower.entry(&gone);
                    if self.upper.child(&above, entry.name()).is_none() {
                        self.writer.remove(&entry.path, self.stop)?;
                    }
                }
            }
            for node in self.upper.children(&above) {
                self.stop.check()?;
                let entry = self.upper.entry(&node);
                let old = below.as_ref().and_then(|d| self.lower.child(d, entry.name()));
                if entry.kind.is_dir() {
                    let old = old.filter(|n| self.lower.entry(n).kind.is_dir());
                    self.own_directory(old.as_ref(), entry)?;
                    todo.push((old, node));
                } else if !self.equal(old.as_ref(), &node)? {
                    self.file(&node)?;
                }
            }
        }
        Ok(())
    }

    fn own_directory(&mut self, old: Option<&Node>, entry: &Entry) -> Result<()> {
        match old {
            Some(node) => {
                let other = self.lower.entry(node);
                let same = (other.mode, other.uid, other.gid, &other.xattrs)
                    == (entry.mode, entry.uid, entry.gid, &entry.xattrs);
                if !same {
                    self.writer.enter(&entry.path)?;
                    self.writer.insert(Entry {
                        opaque: false,
                        unchanged: false,
                        ..entry.clone()
                    });
                }
                Ok(())
            }
            None => {
                if self.writer.look(&entry.path).is_some() {
                    self.writer.remove(&entry.path, self.stop)?;
                }
                let place = self.writer.enter(parent(&entry.path))?;
                self.writer
                    .create_dir(&place, entry.name(), entry.clone(), self.stop)
                    .map(|_| ())
            }
        }
    }

    fn equal(&self, old: Option<&Node>, new: &Node) -> Result<bool> {
        let Some(old) = old else { return Ok(false) };
        let (a, b) = (self.lower.entry(old), self.upper.entry(new));
        let meta = |e: &Entry| (e.kind, e.mode, e.uid, e.gid, e.size, e.mtime, e.rdev);
        if meta(a) != meta(b) || a.target != b.target || a.xattrs != b.xattrs {
            return Ok(false);
        }
        if a.kind != Kind::Regular || a.size == 0 {
            return Ok(true);
        }
        let same_tree =
            self.lower.trees().get(old.tree()).map(|t| t.dir()) == self.upper.trees().get(new.tree()).map(|t| t.dir());
        if same_tree {
            return Ok(true);
        }
        same_content(&self.lower.open(old)?, &self.upper.open(new)?, self.stop)
    }

    fn file(&mut self, node: &Node) -> Result<()> {
        let entry = self.upper.entry(node);
        if entry.kind == Kind::Socket {
            return Ok(());
        }
        let path = entry.path.to_vec();
        let place = self.writer.enter(parent(&path))?;
        self.writer.clear(&path, self.stop)?;
        let plain = Entry {
            unchanged: false,
            opaque: false,
            link_group: 0,
            ..entry.clone()
        };
        if entry.link_group != 0 {
            let group = (node.tree(), entry.link_group);
            if let Some(first) = self.links.get(&group).cloned() {
                let number = match self.writer.entry_mut(&first).map(|e| e.link_group) {
                    Some(0) | None => self.writer.next_group(),
                    Some(n) => n,
                };
                self.writer
                    .out()
                    .fs()
                    .hard_link(crate::tree::os_path(&first), crate::tree::os_path(&path))?;
                if let Some(known) = self.writer.entry_mut(&first) {
                    known.link_group = number;
                }
                self.writer.insert(Entry {
                    link_group: number,
                    ..plain
                });
                return Ok(());
            }
            self.links.insert(group, path.clone());
        }
        let job = crate::files::FileJob::new(place.handle, base(&path), &plain);
        match entry.kind {
            Kind::Regular => {
                job.copy_from(&self.upper.open(node)?, &self.copier, self.stop)?;
            }
            _ => job.create_special(&plain)?,
        }
        self.writer.insert(plain);
        Ok(())
    }
}
