//! Tree to archive: what the tree changes, as a layer of an image.
//!
//! The rules: entries in path order, every directory above an entry listed once before it, removed paths as whiteouts,
//! never an opaque marker (its meaning is spelled out by listing what is below), times in whole seconds, numbers instead
//! of user names, `security.capability` as the only attribute, sockets and the root left out, entries that are as below
//! left out unless they are parents.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};

use kiln_fs::Stop;
use kiln_fs::xattr::SECURITY_CAPABILITY;
use kiln_oci::digest::DigestWriter;
use kiln_oci::{DiffId, Digest};

use crate::compress::{Algorithm, Compression, Compressor};
use crate::error::{IoContext, Result, StoreError};
use crate::layer::write::{Header, TarWriter};
use crate::manifest::{Entry, Kind, Manifest, base, compare, join, parent};
use crate::tree::{Tree, os_path};
use crate::view::{Node, View};

/// How a tree is written.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiffOptions {
    /// Later modification times become this one (seconds since 1970), for reproducible images.
    pub clamp_mtime: Option<i64>,
    /// Threads that compress; 0 is one for each core. The output does not depend on it.
    pub threads: usize,
}

/// A written layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Digest of the archive before compression.
    pub diff_id: DiffId,
    /// Digest of what was written.
    pub digest: Digest,
    /// Bytes written.
    pub size: u64,
    /// Bytes before compression.
    pub unpacked_size: u64,
}

/// Writes the layer that `tree` is over `lower` to `out`, compressed and hashed on the way.
///
/// # Errors
/// I/O errors, [`StoreError::Damaged`] if a file is not what the manifest says, [`StoreError::Canceled`].
pub fn pack(
    lower: &View,
    tree: &Tree,
    compression: Compression,
    options: DiffOptions,
    out: impl Write,
    stop: &Stop,
) -> Result<Packed> {
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
        n => n,
    };
    let what = "layer archive";
    if compression.algorithm == Algorithm::Uncompressed {
        let mut plain = DigestWriter::new(out);
        write_tar(lower, tree, options, &mut plain, stop)?;
        let (mut out, digest, size) = plain.finish();
        out.flush().during("write", what)?;
        return Ok(Packed {
            diff_id: DiffId(digest),
            digest,
            size,
            unpacked_size: size,
        });
    }
    let compressor = Compressor::new(compression, threads, DigestWriter::new(out)).during("write", what)?;
    let mut plain = DigestWriter::new(compressor);
    write_tar(lower, tree, options, &mut plain, stop)?;
    let (compressor, diff_id, unpacked_size) = plain.finish();
    let (mut out, digest, size) = compressor.finish().during("write", what)?.finish();
    out.flush().during("write", what)?;
    Ok(Packed {
        diff_id: DiffId(diff_id),
        digest,
        size,
        unpacked_size,
    })
}

/// Writes the layer as a plain archive.
///
/// # Errors
/// As [`pack`].
pub fn write_tar(lower: &View, tree: &Tree, options: DiffOptions, out: impl Write, stop: &Stop) -> Result<()> {
    let manifest = tree.manifest()?;
    let hidden = spelled_out_whiteouts(&manifest, lower);
    let mut layer = Layer {
        tree,
        manifest: &manifest,
        tar: TarWriter::new(out),
        options,
        dirs: HashSet::new(),
        links: HashMap::new(),
        buf: vec![0; 256 << 10],
    };
    let mut hidden = hidden.iter().peekable();
    for (index, entry) in manifest.entries().iter().enumerate() {
        stop.check()?;
        while let Some(path) = hidden.next_if(|p| compare(p, &entry.path).is_lt()) {
            layer.whiteout(path)?;
        }
        if index == 0 || entry.unchanged || entry.kind == Kind::Socket {
            continue;
        }
        match entry.kind {
            Kind::Whiteout => layer.whiteout(&entry.path)?,
            Kind::Directory => layer.directory(entry)?,
            _ => layer.file(entry, stop)?,
        }
    }
    for path in hidden {
        layer.whiteout(path)?;
    }
    layer.tar.finish().during("write", "layer archive")?;
    Ok(())
}

/// What each opaque directory of the tree hides, as paths in order: children below that the tree does not have itself.
pub(crate) fn spelled_out_whiteouts(manifest: &Manifest, lower: &View) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    let mut index = 0;
    while let Some(entry) = manifest.get(index) {
        if entry.kind.is_dir() && entry.opaque {
            if let Some(below) = lower.lookup(&entry.path)
                && lower.entry(&below).kind.is_dir()
            {
                vanished(manifest, index, lower, &below, &mut out);
            }
            index = manifest.end(index);
        } else {
            index += 1;
        }
    }
    out.sort_by(|a, b| compare(a, b));
    out
}

fn vanished(manifest: &Manifest, dir: u32, lower: &View, below: &Node, out: &mut Vec<Vec<u8>>) {
    for node in lower.children(below) {
        let entry = lower.entry(&node);
        let mine = manifest.find_child(dir, entry.name());
        match mine.and_then(|i| Some((i, manifest.get(i)?))) {
            None => out.push(entry.path.to_vec()),
            Some((index, own)) if own.kind.is_dir() && entry.kind.is_dir() => {
                vanished(manifest, index, lower, &node, out);
            }
            Some(_) => {}
        }
    }
}

struct Layer<'a, W> {
    tree: &'a Tree,
    manifest: &'a Manifest,
    tar: TarWriter<W>,
    options: DiffOptions,
    /// Directories listed so far.
    dirs: HashSet<Vec<u8>>,
    /// First name written for each link group.
    links: HashMap<u32, Vec<u8>>,
    buf: Vec<u8>,
}

impl<W: Write> Layer<'_, W> {
    fn mtime(&self, entry: &Entry) -> i64 {
        self.options
            .clamp_mtime
            .map_or(entry.mtime.secs, |limit| entry.mtime.secs.min(limit))
    }

    /// Lists the directories above `path` that were not listed yet, outermost first.
    fn parents(&mut self, path: &[u8]) -> Result<()> {
        let above = parent(path);
        if above.is_empty() || self.dirs.contains(above) {
            return Ok(());
        }
        self.parents(above)?;
        let found = self.manifest.find(above).and_then(|i| self.manifest.get(i));
        match found.cloned() {
            Some(entry) => self.directory(&entry),
            None => Err(StoreError::Invalid(format!(
                "manifest lacks {}",
                String::from_utf8_lossy(above)
            ))),
        }
    }

    fn directory(&mut self, entry: &Entry) -> Result<()> {
        if self.dirs.contains(&entry.path[..]) {
            return Ok(());
        }
        self.parents(&entry.path)?;
        self.dirs.insert(entry.path.to_vec());
        let name = [&entry.path, &b"/"[..]].concat();
        self.header(&name, entry, b'5', 0, &[])
    }

    fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        self.parents(path)?;
        let name = join(parent(path), &[b".wh.", base(path)].concat());
        let header = Header {
            name: &name,
            typeflag: b'0',
            ..Header::default()
        };
        self.tar.plain_header(&header).during("write", "layer archive")
    }

    fn header(&mut self, name: &[u8], entry: &Entry, typeflag: u8, size: u64, link: &[u8]) -> Result<()> {
        let capability = entry.xattr(SECURITY_CAPABILITY).map(|v| [(SECURITY_CAPABILITY, v)]);
        let device = matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice);
        let header = Header {
            name,
            typeflag,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            size,
            mtime: self.mtime(entry),
            linkname: link,
            device: if device {
                (rustix::fs::major(entry.rdev), rustix::fs::minor(entry.rdev))
            } else {
                (0, 0)
            },
            xattrs: capability.as_ref().map_or(&[], |c| &c[..]),
        };
        self.tar.header(&header).during("write", "layer archive")
    }

    fn file(&mut self, entry: &Entry, stop: &Stop) -> Result<()> {
        self.parents(&entry.path)?;
        if entry.link_group != 0 {
            if let Some(first) = self.links.get(&entry.link_group).cloned() {
                return self.header(&entry.path, entry, b'1', 0, &first);
            }
            self.links.insert(entry.link_group, entry.path.to_vec());
        }
        let flag = match entry.kind {
            Kind::Symlink => b'2',
            Kind::CharDevice => b'3',
            Kind::BlockDevice => b'4',
            Kind::Fifo => b'6',
            _ => b'0',
        };
        let size = if entry.kind == Kind::Regular { entry.size } else { 0 };
        self.header(&entry.path, entry, flag, size, &entry.target)?;
        if size > 0 { self.content(entry, stop) } else { Ok(()) }
    }

    fn content(&mut self, entry: &Entry, stop: &Stop) -> Result<()> {
        let path = os_path(&entry.path);
        let mut file = self.tree.open_entry(entry)?;
        let mut left = entry.size;
        let mut moved = 0u64;
        while left > 0 {
            let want = self.buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let part = self.buf.get_mut(..want).unwrap_or_default();
            let n = file.read(part).during("read", path)?;
            if n == 0 {
                let path = self.tree.fs_path().join(path);
                return Err(StoreError::Damaged {
                    path,
                    reason: format!("{left} bytes shorter than its manifest says"),
                });
            }
            self.tar
                .data(self.buf.get(..n).unwrap_or_default())
                .during("write", "layer archive")?;
            left -= n as u64;
            moved += n as u64;
            if moved >= 1 << 20 {
                stop.check()?;
                moved = 0;
            }
        }
        Ok(())
    }
}
