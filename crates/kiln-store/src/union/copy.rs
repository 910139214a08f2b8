//! Copying from another view, with everything a COPY can ask for.

use std::collections::HashMap;

use kiln_fs::{Stop, Timestamp};
use kiln_match::{Filter, FilterState, Verdict, go_match, has_wildcard};

use crate::error::{Result, StoreError};
use crate::files::{FileJob, Writers};
use crate::manifest::{Entry, Kind, base, join, parent};
use crate::tree::os_path;
use crate::union::chmod::ModeChange;
use crate::union::owner::Owner;
use crate::union::{FileWriter, Place, copied_xattrs, path_error};
use crate::view::{Children, Node, View, clean_rooted};

/// One copy action. Paths are taken from the root of source and destination.
#[derive(Clone, Debug, Default)]
pub struct CopySpec {
    /// Source path, possibly with wildcards.
    pub src: Vec<u8>,
    /// Destination path; with a slash at the end it is a directory.
    pub dest: Vec<u8>,
    /// Owner of everything copied and of directories made for it; `None` keeps the source's.
    pub owner: Option<Owner>,
    /// Mode of everything copied.
    pub mode: ModeChange,
    /// Time of everything created; `None` keeps the source's.
    pub timestamp: Option<Timestamp>,
    /// Follow a link as last element of the source.
    pub follow_symlink: bool,
    /// A directory copies its content into the destination, not itself.
    pub dir_copy_contents: bool,
    /// Unpack a source file that is an archive.
    pub attempt_unpack: bool,
    /// Make missing directories of the destination.
    pub create_dest_path: bool,
    /// The source may have wildcards.
    pub allow_wildcard: bool,
    /// Wildcards that match nothing are no error.
    pub allow_empty_wildcard: bool,
    /// What is in the way is replaced, whatever it is.
    pub always_replace: bool,
    /// Patterns of what to copy, relative to the source directory; empty is everything.
    pub include: Vec<String>,
    /// Patterns of what to leave out.
    pub exclude: Vec<String>,
    /// With `include`: paths of which something must have been copied.
    pub required: Vec<String>,
}

/// Splits a clean path at the first element with a wildcard: what is before it, and the rest (empty if there is none).
pub(crate) fn split_wildcard(path: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let elements: Vec<&[u8]> = path.split(|b| *b == b'/').collect();
    let at = elements.iter().position(|e| has_wildcard(e)).unwrap_or(elements.len());
    let (fixed, pattern) = elements.split_at_checked(at).unwrap_or((&elements, &[]));
    (fixed.join(&b'/'), pattern.join(&b'/'))
}

/// The paths of `view` that a wildcard path names, in path order; nothing below a match is looked at. Links are followed
/// in the part before the first wildcard only.
pub fn expand_wildcard(view: &View, path: &[u8]) -> Result<Vec<Vec<u8>>> {
    let path = clean_rooted(path);
    let (fixed, pattern) = split_wildcard(&path);
    if pattern.is_empty() {
        return Ok(vec![path]);
    }
    let from = view.resolve(&fixed, true)?;
    let Some(dir) = view.lookup(&from) else {
        return Ok(Vec::new());
    };
    let depth = pattern.split(|b| *b == b'/').count();
    let skip = if from.is_empty() { 0 } else { from.len() + 1 };
    let mut out = Vec::new();
    let mut walk = view.walk(&dir);
    while let Some(node) = walk.next() {
        let path = &view.entry(&node).path;
        let relative = path.get(skip..).unwrap_or_default();
        let level = relative.split(|b| *b == b'/').count();
        // A class may match a slash, so every level counts.
        let matched = go_match(&pattern, relative)?;
        if matched {
            out.push(path.to_vec());
        }
        if matched || (level >= depth && !pattern.contains(&b'[')) {
            walk.skip_dir();
        }
    }
    Ok(out)
}

impl FileWriter {
    /// Copies from `src` as `spec` says.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] where source or destination do not fit, naming the path; I/O errors;
    /// [`StoreError::Canceled`].
    pub fn copy(&mut self, spec: &CopySpec, src: &View, stop: &Stop) -> Result<()> {
        let dest_clean = clean_rooted(&spec.dest);
        if !spec.create_dest_path {
            let resolved = self.resolve(&dest_clean, true)?;
            if self.look(parent(&resolved)).is_none() {
                return Err(path_error("stat", &dest_clean, "no such file or directory"));
            }
        }
        let src_clean = clean_rooted(&spec.src);
        let sources = if spec.allow_wildcard {
            let found = expand_wildcard(src, &src_clean)?;
            if found.is_empty() && !spec.allow_empty_wildcard {
                return Err(StoreError::Invalid(format!(
                    "{} not found",
                    String::from_utf8_lossy(&spec.src)
                )));
            }
            found
        } else {
            vec![src_clean]
        };
        let filter = Filter::new(&spec.include, &spec.exclude)?;
        let required = spec
            .required
            .iter()
            .map(|p| (clean_rooted(p.as_bytes()), false))
            .collect();
        Writers::run(kiln_fs::parallel::default_threads(), stop, |writers| {
            let mut job = Job {
                spec,
                src,
                filter,
                writers,
                stop,
                links: HashMap::new(),
                required,
            };
            for source in &sources {
                stop.check()?;
                if spec.attempt_unpack && self.try_unpack(spec, src, source, stop)? {
                    continue;
                }
                job.copy_one(self, source)?;
                // What one source wrote may be replaced by the next.
                writers.wait()?;
            }
            match job.required.iter().find(|(_, seen)| !seen) {
                Some((path, _)) if job.filter.has_include() => Err(StoreError::Invalid(format!(
                    "{:?}: not found",
                    String::from_utf8_lossy(path)
                ))),
                _ => Ok(()),
            }
        })
    }

    /// Directories made for a destination: 0755 or the mode asked for, with the owner and time of the action.
    pub(crate) fn dest_dir(&self, spec: &CopySpec) -> Entry {
        let owner = spec.owner.unwrap_or_default();
        let mode = match spec.mode {
            ModeChange::Set(mode) => mode & 0o7777,
            _ => 0o755,
        };
        let mtime = spec.timestamp.unwrap_or(self.now());
        Entry {
            mode,
            uid: owner.uid,
            gid: owner.gid,
            mtime,
            ..Entry::dir(*b"")
        }
    }
}

struct Job<'a> {
    spec: &'a CopySpec,
    src: &'a View,
    filter: Filter,
    writers: &'a Writers,
    stop: &'a Stop,
    /// First copy of each hard-linked source file.
    links: HashMap<(usize, u32), Vec<u8>>,
    required: Vec<(Vec<u8>, bool)>,
}

/// A source directory that is being copied.
struct Frame<'v> {
    children: Children<'v>,
    node: Node,
    /// Path below the source, for the filters.
    relative: Vec<u8>,
    state: FilterState,
    /// Path of the destination directory.
    dest: Vec<u8>,
    /// Set once the destination directory is there.
    place: Option<Place>,
    /// The destination's metadata follow the source even if it existed.
    overwrite: bool,
}

impl<'a> Job<'a> {
    fn copy_one(&mut self, out: &mut FileWriter, source: &[u8]) -> Result<()> {
        let real = self.src.resolve(source, self.spec.follow_symlink)?;
        let missing = || path_error("lstat", source, "no such file or directory");
        let node = match self.src.lookup(&real) {
            Some(node) => node,
            // The empty file system still has a root, with nothing in it.
            None if real.is_empty() => return self.prepare(out, source, true).map(|_| ()),
            None => return Err(missing()),
        };
        let is_dir = self.src.entry(&node).kind.is_dir();
        let dest = self.prepare(out, source, is_dir)?;
        if !is_dir {
            let place = out.enter(parent(&dest))?;
            self.include(parent(source), base(source));
            return self.file(out, &node, &place, base(&dest));
        }
        self.directory(out, source, node, dest)
    }

    /// Works out what the source becomes, and makes the directories above it.
    fn prepare(&self, out: &mut FileWriter, source: &[u8], is_dir: bool) -> Result<Vec<u8>> {
        let like = out.dest_dir(self.spec);
        let dest = clean_rooted(&self.spec.dest);
        let ends_in_slash = self.spec.dest.last().is_none_or(|b| *b == b'/') || self.spec.dest.ends_with(b"/.");
        let ensure = if ends_in_slash { &dest[..] } else { parent(&dest) };
        let ensure = out.resolve(ensure, true)?;
        out.create_missing(&ensure, &like, self.stop)?;
        let mut dest = out.resolve(&dest, true)?;
        let existing = out.look(&dest).map(|seen| seen.entry.kind);
        let contents = self.spec.dir_copy_contents;
        let inside = match (is_dir, existing) {
            (true, Some(_)) => !contents,
            (false, Some(kind)) => kind.is_dir(),
            (_, None) => false,
        };
        // The root has no name: what is in it goes into the directory itself.
        if inside && !base(source).is_empty() {
            dest = join(&dest, base(source));
        }
        let above = if is_dir && contents && existing.is_none() {
            &dest[..]
        } else {
            parent(&dest)
        };
        out.create_missing(above, &like, self.stop)?;
        Ok(dest)
    }

    /// Notes that something was copied, for the paths that are required. They are beginnings of the path below the source
    /// or of the whole path.
    fn include(&mut self, source: &[u8], relative: &[u8]) {
        if self.required.is_empty() {
            return;
        }
        let whole = join(source, relative);
        for (wanted, seen) in &mut self.required {
            *seen = *seen || relative.starts_with(wanted) || whole.starts_with(wanted);
        }
    }

    fn directory(&mut self, out: &mut FileWriter, source: &[u8], node: Node, dest: Vec<u8>) -> Result<()> {
        let src = self.src;
        let top = Frame {
            children: src.children(&node),
            node,
            relative: Vec::new(),
            state: FilterState::default(),
            dest,
            place: None,
            overwrite: false,
        };
        let mut stack = vec![top];
        self.arrive(out, &mut stack)?;
        while let Some(frame) = stack.last_mut() {
            self.stop.check()?;
            self.writers.check()?;
            let Some(node) = frame.children.next() else {
                stack.pop();
                continue;
            };
            let entry = src.entry(&node);
            let name = entry.name();
            let relative = join(&frame.relative, name);
            let is_dir = entry.kind.is_dir();
            let (verdict, state) = self.filter.check(&relative, is_dir, &frame.state);
            if verdict == Verdict::Skip {
                continue;
            }
            if is_dir {
                let dest = join(&frame.dest, name);
                let children = src.children(&node);
                stack.push(Frame {
                    children,
                    node: node.clone(),
                    relative: relative.clone(),
                    state,
                    dest,
                    place: None,
                    overwrite: true,
                });
            }
            if verdict == Verdict::Descend {
                continue;
            }
            self.include(source, &relative);
            self.arrive(out, &mut stack)?;
            if !is_dir && let Some(place) = stack.last().and_then(|f| f.place.clone()) {
                self.file(out, &node, &place, name)?;
            }
        }
        Ok(())
    }

    /// Makes the destination directories of all frames that do not have theirs yet.
    fn arrive(&mut self, out: &mut FileWriter, stack: &mut [Frame<'a>]) -> Result<()> {
        let first = stack.iter().rposition(|f| f.place.is_some()).map_or(0, |i| i + 1);
        for at in first..stack.len() {
            let above = at
                .checked_sub(1)
                .and_then(|i| stack.get(i))
                .and_then(|f| f.place.clone());
            let Some(frame) = stack.get_mut(at) else { break };
            let above = match above {
                Some(place) => place,
                None if frame.dest.is_empty() => out.enter(b"")?,
                None => out.enter(parent(&frame.dest))?,
            };
            let source = self.copied(self.src.entry(&frame.node));
            let name = base(&frame.dest).to_vec();
            let seen = if frame.dest.is_empty() {
                out.look(b"")
            } else {
                out.look_in(&above, &name)
            };
            let place = match seen {
                Some(seen) if seen.entry.kind.is_dir() => {
                    let place = if frame.dest.is_empty() {
                        above
                    } else {
                        out.enter(&frame.dest)?
                    };
                    if frame.overwrite && !self.filter.has_include() {
                        let merged = Entry {
                            path: frame.dest.clone().into(),
                            opaque: seen.entry.opaque,
                            ..source
                        };
                        out.insert(merged);
                    }
                    place
                }
                Some(_) if !self.spec.always_replace => {
                    return Err(path_error("cannot copy to non-directory", &frame.dest, "exists"));
                }
                Some(_) => {
                    self.writers.wait()?;
                    out.remove(&frame.dest, self.stop)?;
                    out.create_dir(&above, &name, source, self.stop)?
                }
                None => out.create_dir(&above, &name, source, self.stop)?,
            };
            frame.place = Some(place);
        }
        Ok(())
    }

    /// A source entry with the metadata that its copy gets.
    fn copied(&self, source: &Entry) -> Entry {
        let mut entry = source.clone();
        if let Some(owner) = self.spec.owner {
            (entry.uid, entry.gid) = (owner.uid, owner.gid);
        }
        if entry.kind != Kind::Symlink {
            entry.mode = self.spec.mode.apply(entry.mode, entry.kind.is_dir());
        }
        if let Some(time) = self.spec.timestamp {
            entry.mtime = time;
        }
        entry.xattrs = copied_xattrs(&entry.xattrs);
        (entry.opaque, entry.unchanged, entry.link_group) = (false, false, 0);
        entry
    }

    fn file(&mut self, out: &mut FileWriter, node: &Node, place: &Place, name: &[u8]) -> Result<()> {
        let source = self.src.entry(node);
        if source.kind == Kind::Socket {
            return Ok(());
        }
        let path = join(&place.path, name);
        if let Some(seen) = out.look_in(place, name) {
            if seen.entry.kind.is_dir() && !self.spec.always_replace {
                return Err(path_error("cannot replace directory", &path, "with a file"));
            }
            if seen.upper {
                self.writers.wait()?;
            }
        }
        out.clear(&path, self.stop)?;
        let mut entry = Entry {
            path: path.clone().into(),
            ..self.copied(source)
        };
        if source.link_group != 0 {
            let group = (node.tree(), source.link_group);
            if let Some(first) = self.links.get(&group).cloned()
                && let Some(known) = out.get(&first).cloned()
            {
                let number = if known.link_group != 0 {
                    known.link_group
                } else {
                    out.next_group()
                };
                self.writers.wait()?;
                out.out().fs().hard_link(os_path(&first), os_path(&path))?;
                if let Some(known) = out.entry_mut(&first) {
                    known.link_group = number;
                }
                out.insert(Entry {
                    path: path.into(),
                    link_group: number,
                    ..known
                });
                return Ok(());
            }
            self.links.insert(group, path.clone());
        }
        let job = FileJob::new(place.handle.clone(), name, &entry);
        match source.kind {
            Kind::Regular => {
                let Some(tree) = self.src.trees().get(node.tree()).cloned() else {
                    return Ok(());
                };
                entry.size = source.size;
                let (from, stop) = (source.path.clone(), self.stop.clone());
                let copier = self.writers.copier().clone();
                let announced = source.size;
                self.writers.submit(move || {
                    let file = tree.fs()?.open_regular(os_path(&from))?;
                    let copied = job.copy_from(&file, &copier, &stop)?;
                    if copied != announced {
                        let path = tree.fs_path().join(os_path(&from));
                        let reason = format!("{copied} bytes, its manifest says {announced}");
                        return Err(StoreError::Damaged { path, reason });
                    }
                    Ok(())
                })?;
            }
            Kind::CharDevice | Kind::BlockDevice => match job.create_special(&entry) {
                Err(StoreError::Io { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied => {
                    // Inside a user namespace devices cannot be made; images get by without them there.
                    return Ok(());
                }
                other => other?,
            },
            _ => job.create_special(&entry)?,
        }
        out.insert(entry);
        Ok(())
    }
}
