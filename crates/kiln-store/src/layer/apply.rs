//! Archive to tree: one pass that unpacks, hashes and writes.
//!
//! One thread unpacks and hashes the stream (the diff id covers everything, also what follows the archive's end), one
//! reads members and makes directories and links, a few write files. Names cannot leave the tree: they are cleaned as if
//! they began at the root, links met in parents are followed inside the layer, and the files are created beneath a
//! directory descriptor that refuses links.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::sync::Arc;

use crossbeam_channel::bounded;
use kiln_fs::xattr::{Xattrs, kept_from_layer};
use kiln_fs::{Dir, Stop};
use kiln_oci::DiffId;

use crate::error::{Result, StoreError};
use crate::files::{FileJob, Writers};
use crate::layer::read::{Member, MemberKind, TarReader};
use crate::layer::stream::{ChunkReader, Counted, read_error, unpack_and_hash};
use crate::manifest::{Entry, Kind, base, join, parent};
use crate::tree::{Tree, TreeBuilder, os_path};
use crate::view::{View, clean_rooted, resolve};

/// How an archive is applied.
#[derive(Default)]
pub struct ApplyOptions<'a> {
    /// What lies below this layer, where it is known: directories that the archive needs but does not list take their
    /// metadata from there, and hard links may point into it.
    pub lower: Option<&'a View>,
    /// Threads that write files; 0 is the usual number.
    pub threads: usize,
    /// Called with the number of packed bytes read so far, now and then.
    pub progress: Option<&'a (dyn Fn(u64) + Sync)>,
}

/// An applied layer.
#[derive(Debug)]
pub struct Applied {
    /// The tree, with its manifest written.
    pub tree: Tree,
    /// Digest of the unpacked archive.
    pub diff_id: DiffId,
    /// Length of the unpacked archive.
    pub size: u64,
}

/// Unpacks the layer archive `input` (packed in any known way) into `out`.
///
/// The caller compares the diff id, and the digest of what it fed in, with what was announced.
///
/// # Errors
/// [`StoreError::Invalid`] for a malformed or hostile archive, naming the member; I/O errors; [`StoreError::Canceled`].
/// `out`'s directory is then garbage.
pub fn apply(input: impl Read + Send, out: TreeBuilder, options: &ApplyOptions<'_>, stop: &Stop) -> Result<Applied> {
    let threads = if options.threads == 0 {
        kiln_fs::parallel::default_threads()
    } else {
        options.threads
    };
    let counted = Counted {
        input,
        read: 0,
        told: 0,
        progress: options.progress,
    };
    let (chunks, stream) = bounded::<Vec<u8>>(16);
    std::thread::scope(|scope| {
        let hashing = scope.spawn(move || unpack_and_hash(counted, &chunks, stop));
        let written = Writers::run(threads, stop, |writers| {
            let mut stream = ChunkReader::new(stream);
            let mut layer = Layer::new(&out, options.lower, writers)?;
            let mut archive = TarReader::new(&mut stream);
            layer.members(&mut archive, stop)?;
            // What follows the archive belongs to the hashed stream; the hashing thread must not be left waiting.
            io::copy(&mut stream, &mut io::sink()).map_err(read_error)?;
            writers.wait()?;
            layer.finish(threads, stop)
        });
        let hashed = hashing
            .join()
            .unwrap_or(Err(StoreError::Panicked { task: "unpack layer" }));
        match (written, hashed) {
            // A damaged stream looks like a cut archive to the reader: the first cause counts.
            (_, Err(e)) if !matches!(e, StoreError::Canceled) || stop.is_stopped() => Err(e),
            (Err(e), _) | (Ok(_), Err(e)) => Err(e),
            (Ok(entries), Ok((diff_id, size))) => Ok(Applied {
                tree: out.finish(entries)?,
                diff_id,
                size,
            }),
        }
    })
}

/// Key that sorts paths by their elements.
fn key(path: &[u8]) -> Vec<u8> {
    path.iter().map(|b| if *b == b'/' { 0 } else { *b }).collect()
}

/// The layer as far as it was read.
struct Layer<'a> {
    out: &'a TreeBuilder,
    lower: Option<&'a View>,
    writers: &'a Writers,
    entries: BTreeMap<Vec<u8>, Entry>,
    whiteouts: BTreeSet<Vec<u8>>,
    /// The directory files were last created in.
    last_dir: Option<(Vec<u8>, Arc<Dir>)>,
    groups: u32,
}

impl<'a> Layer<'a> {
    fn new(out: &'a TreeBuilder, lower: Option<&'a View>, writers: &'a Writers) -> Result<Self> {
        let root = match lower.and_then(|v| Some(v.entry(&v.root()?).clone())) {
            Some(e) => Entry {
                unchanged: true,
                opaque: false,
                link_group: 0,
                xattrs: Xattrs::new(),
                ..e
            },
            None => Entry::dir(*b""),
        };
        let entries = BTreeMap::from([(Vec::new(), root)]);
        let whiteouts = BTreeSet::new();
        Ok(Layer {
            out,
            lower,
            writers,
            entries,
            whiteouts,
            last_dir: None,
            groups: 0,
        })
    }

    fn get(&self, path: &[u8]) -> Option<&Entry> {
        self.entries.get(&key(path))
    }

    fn members(&mut self, archive: &mut TarReader<&mut ChunkReader>, stop: &Stop) -> Result<()> {
        while let Some(member) = archive.next_member().map_err(read_error)? {
            stop.check()?;
            self.writers.check()?;
            let shown = String::from_utf8_lossy(&member.name).into_owned();
            self.member(member, archive, stop).map_err(|e| match e {
                StoreError::Invalid(why) if !why.contains(&shown) => {
                    StoreError::Invalid(format!("layer member {shown:?}: {why}"))
                }
                StoreError::Io { action, source, .. } => StoreError::Io {
                    action,
                    path: shown.into(),
                    source,
                },
                other => other,
            })?;
        }
        Ok(())
    }

    fn member(&mut self, member: Member, archive: &mut TarReader<&mut ChunkReader>, stop: &Stop) -> Result<()> {
        if member.name.contains(&0) {
            return Err(StoreError::Invalid("a name with a zero byte".into()));
        }
        let written = clean_rooted(&member.name);
        if written.len() > 4096 {
            return Err(StoreError::Invalid("its path is longer than 4096 bytes".into()));
        }
        if written.is_empty() {
            if member.kind == MemberKind::Directory {
                let root = self.entry_for(&member, Vec::new());
                self.entries.insert(Vec::new(), root);
            }
            return Ok(());
        }
        let name = base(&written).to_vec();
        let dir = self.directory(parent(&written))?;
        if name == b".wh..wh..opq" {
            if let Some(entry) = self.entries.get_mut(&key(&dir)) {
                entry.opaque = true;
            }
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            // Other names of this family are bookkeeping of a storage driver (aufs) and mean nothing here.
            if hidden.starts_with(b".wh.") {
                return Ok(());
            }
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(StoreError::Invalid("a whiteout of nothing".into()));
            }
            self.whiteouts.insert(join(&dir, hidden));
            return Ok(());
        }
        let path = join(&dir, &name);
        self.make_room(&path, member.kind, stop)?;
        match member.kind {
            MemberKind::Directory => {
                if self.get(&path).is_none() {
                    self.out.fs().create_dir(os_path(&path), 0o700)?;
                }
                let opaque = self.get(&path).is_some_and(|e| e.opaque);
                let entry = Entry {
                    opaque,
                    ..self.entry_for(&member, path.clone())
                };
                self.entries.insert(key(&path), entry);
            }
            MemberKind::HardLink => self.hard_link(&member, path, stop)?,
            MemberKind::Regular => {
                let entry = self.entry_for(&member, path.clone());
                let at = self.dir_handle(&dir)?;
                let job = FileJob::new(at, &name, &entry);
                self.writers
                    .write(job, member.size, member.sparse.as_deref(), archive)
                    .map_err(|e| match e {
                        StoreError::Io { source, .. } => read_error(source),
                        other => other,
                    })?;
                self.entries.insert(key(&path), entry);
            }
            _ => {
                let entry = self.entry_for(&member, path.clone());
                let at = self.dir_handle(&dir)?;
                let made = FileJob::new(at, &name, &entry).create_special(&entry);
                match made {
                    // Inside a user namespace devices cannot be made; images get by without them there.
                    Err(StoreError::Io { source, .. })
                        if source.kind() == io::ErrorKind::PermissionDenied
                            && matches!(member.kind, MemberKind::CharDevice | MemberKind::BlockDevice) => {}
                    Err(e) => return Err(e),
                    Ok(()) => {
                        self.entries.insert(key(&path), entry);
                    }
                }
            }
        }
        Ok(())
    }

    fn entry_for(&self, member: &Member, path: Vec<u8>) -> Entry {
        let kind = match member.kind {
            MemberKind::Regular | MemberKind::HardLink => Kind::Regular,
            MemberKind::Symlink => Kind::Symlink,
            MemberKind::CharDevice => Kind::CharDevice,
            MemberKind::BlockDevice => Kind::BlockDevice,
            MemberKind::Directory => Kind::Directory,
            MemberKind::Fifo => Kind::Fifo,
        };
        let device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        let kept = |(n, v): &(Vec<u8>, Vec<u8>)| kept_from_layer(n).then(|| (n.clone().into(), v.clone().into()));
        let mut xattrs: Xattrs = member.xattrs.iter().filter_map(kept).collect();
        xattrs.sort();
        xattrs.dedup_by(|a, b| a.0 == b.0);
        Entry {
            mode: if kind == Kind::Symlink { 0o777 } else { member.mode },
            uid: member.uid,
            gid: member.gid,
            size: if kind == Kind::Regular { member.size } else { 0 },
            mtime: member.mtime,
            target: if kind == Kind::Symlink {
                member.link.clone().into()
            } else {
                Box::default()
            },
            rdev: if device {
                rustix::fs::makedev(member.device.0, member.device.1)
            } else {
                0
            },
            xattrs,
            ..Entry::new(path, kind)
        }
    }

    /// The directory that `path` means inside this layer, links followed; what is missing is made.
    fn directory(&mut self, path: &[u8]) -> Result<Vec<u8>> {
        if self.get(path).is_some_and(|e| e.kind.is_dir()) {
            return Ok(path.to_vec());
        }
        let real = resolve(path, true, &mut |at| {
            let entry = self.get(at)?;
            (entry.kind == Kind::Symlink).then(|| entry.target.to_vec())
        })?;
        let mut so_far = Vec::new();
        for name in real.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
            so_far = join(&so_far, name);
            match self.get(&so_far).map(|e| e.kind) {
                Some(Kind::Directory) => {}
                Some(_) => {
                    let shown = String::from_utf8_lossy(&so_far).into_owned();
                    return Err(StoreError::Invalid(format!(
                        "it lies below {shown:?}, which is not a directory"
                    )));
                }
                None => {
                    self.out.fs().create_dir(os_path(&so_far), 0o700)?;
                    let known = self.lower.and_then(|v| Some((v, v.lookup(&so_far)?)));
                    let entry = match known.map(|(v, n)| v.entry(&n).clone()).filter(|e| e.kind.is_dir()) {
                        Some(e) => Entry {
                            opaque: false,
                            unchanged: true,
                            path: so_far.clone().into(),
                            ..e
                        },
                        None => Entry::dir(so_far.clone()),
                    };
                    self.entries.insert(key(&so_far), entry);
                }
            }
        }
        Ok(real)
    }

    fn dir_handle(&mut self, dir: &[u8]) -> Result<Arc<Dir>> {
        if let Some((path, handle)) = &self.last_dir
            && path == dir
        {
            return Ok(handle.clone());
        }
        let handle = if dir.is_empty() {
            self.out.fs().clone()
        } else {
            Arc::new(self.out.fs().open_dir(os_path(dir))?)
        };
        self.last_dir = Some((dir.to_vec(), handle.clone()));
        Ok(handle)
    }

    /// Removes what an earlier member put at `path`, unless both are directories, which merge.
    fn make_room(&mut self, path: &[u8], kind: MemberKind, stop: &Stop) -> Result<()> {
        let Some(old) = self.get(path) else { return Ok(()) };
        if old.kind.is_dir() && kind == MemberKind::Directory {
            return Ok(());
        }
        // A file that is still being written must be there before it can be removed.
        self.writers.wait()?;
        self.out.fs().remove_tree(os_path(path), stop)?;
        self.last_dir = None;
        let from = key(path);
        let below: Vec<Vec<u8>> = {
            let start = from.clone();
            let inside = |k: &&Vec<u8>| **k == start || (k.starts_with(&start) && k.get(start.len()) == Some(&0));
            self.entries
                .range(from..)
                .map(|(k, _)| k)
                .take_while(inside)
                .cloned()
                .collect()
        };
        for k in below {
            self.entries.remove(&k);
        }
        // Everything below `path` lies between `path/` and `path0` ('0' follows '/').
        let (from, to) = ([path, b"/"].concat(), [path, b"0"].concat());
        let hidden: Vec<Vec<u8>> = self.whiteouts.range(from..to).cloned().collect();
        for k in hidden {
            self.whiteouts.remove(&k);
        }
        Ok(())
    }

    fn hard_link(&mut self, member: &Member, path: Vec<u8>, stop: &Stop) -> Result<()> {
        let target = clean_rooted(&member.link);
        let dir = resolve(parent(&target), true, &mut |at| {
            let entry = self.get(at)?;
            (entry.kind == Kind::Symlink).then(|| entry.target.to_vec())
        })?;
        let target = join(&dir, base(&target));
        if target == path {
            return Err(StoreError::Invalid("a hard link to itself".into()));
        }
        if self.get(&target).is_none() {
            self.copy_up(&target, stop)?;
        }
        let group = match self.entries.get_mut(&key(&target)) {
            Some(entry) if !entry.kind.is_dir() => {
                if entry.link_group == 0 {
                    self.groups += 1;
                    entry.link_group = self.groups;
                }
                entry.link_group
            }
            _ => {
                let shown = String::from_utf8_lossy(&member.link).into_owned();
                return Err(StoreError::Invalid(format!(
                    "a hard link to {shown:?}, which is no file of this layer"
                )));
            }
        };
        self.writers.wait()?;
        self.out.fs().hard_link(os_path(&target), os_path(&path))?;
        let Some(entry) = self.get(&target).cloned() else {
            return Ok(());
        };
        let entry = Entry {
            path: path.clone().into(),
            link_group: group,
            ..entry
        };
        self.entries.insert(key(&path), entry);
        Ok(())
    }

    /// Brings a file of the layers below into this one, for a hard link that points there.
    fn copy_up(&mut self, path: &[u8], stop: &Stop) -> Result<()> {
        let Some(view) = self.lower else { return Ok(()) };
        let Some(node) = view.lookup(path) else { return Ok(()) };
        let entry = view.entry(&node);
        if entry.kind != Kind::Regular {
            return Ok(());
        }
        let dir = self.directory(parent(path))?;
        let at = self.dir_handle(&dir)?;
        let entry = Entry {
            unchanged: true,
            link_group: 0,
            ..entry.clone()
        };
        let job = FileJob::new(at, base(path), &entry);
        job.copy_from(&view.open(&node)?, self.writers.copier(), stop)?;
        self.entries.insert(key(path), entry);
        Ok(())
    }

    /// Whiteouts, opaque marks, and the metadata of directories, which creating their content would have changed.
    fn finish(mut self, threads: usize, stop: &Stop) -> Result<Vec<Entry>> {
        for path in std::mem::take(&mut self.whiteouts) {
            match self.entries.get_mut(&key(&path)) {
                // Removed below and made anew in this layer: nothing from below shows through.
                Some(entry) if entry.kind.is_dir() => entry.opaque = true,
                Some(_) => {}
                None => {
                    self.out.put_whiteout(&path)?;
                    self.entries.insert(key(&path), Entry::whiteout(path));
                }
            }
        }
        let entries: Vec<Entry> = self.entries.into_values().collect();
        let dirs: Vec<&Entry> = entries.iter().filter(|e| e.kind.is_dir()).collect();
        crate::files::finish_dirs(self.out, &dirs, threads, stop)?;
        Ok(entries)
    }
}
