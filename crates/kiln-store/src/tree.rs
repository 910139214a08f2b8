//! A tree: one layer's upper directory on disk, with its manifest.
//!
//! `trees/<id>/fs` holds the files as overlayfs wants them (removed paths are 0:0 character devices, replaced
//! directories carry the opaque attribute), `trees/<id>/manifest` lists them, `trees/<id>/digests` remembers content
//! digests that were asked for. A tree never changes once its manifest is written.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use kiln_fs::{Dir, Links};
use kiln_oci::Digest;

use crate::error::{IoContext, Result, StoreError};
use crate::manifest::{Entry, Kind, Manifest, Usage};

/// Name of the directory with a tree's files.
pub const FS: &str = "fs";
/// Name of the file that lists them.
pub const MANIFEST: &str = "manifest";
/// Name of the file that remembers content digests.
pub const DIGESTS: &str = "digests";

/// By which attribute overlayfs knows an opaque directory: `trusted.*` needs privilege over the file system, `user.*` is
/// what a mount with `userxattr` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverlayXattr {
    /// `trusted.overlay.opaque`.
    Trusted,
    /// `user.overlay.opaque`.
    User,
}

impl OverlayXattr {
    /// The full name of the opaque attribute.
    pub fn opaque(self) -> &'static [u8] {
        match self {
            OverlayXattr::Trusted => b"trusted.overlay.opaque",
            OverlayXattr::User => b"user.overlay.opaque",
        }
    }

    /// Which one this process may write in `dir` (the directory itself is tried and left as it was).
    pub fn detect(dir: &Dir) -> Self {
        let name = b"trusted.overlay.kiln-probe";
        match dir.set_xattr("", name, b"y").and_then(|()| dir.remove_xattr("", name)) {
            Ok(()) => OverlayXattr::Trusted,
            Err(_) => OverlayXattr::User,
        }
    }
}

/// A sealed tree. Clones share the decoded manifest and the digests.
#[derive(Clone, Debug)]
pub struct Tree(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    fs_path: PathBuf,
    fs: OnceLock<Arc<Dir>>,
    manifest: OnceLock<Arc<Manifest>>,
    digests: Mutex<Digests>,
}

#[derive(Debug, Default)]
struct Digests {
    loaded: bool,
    dirty: bool,
    by_entry: HashMap<u32, Digest>,
}

impl Tree {
    /// A handle on the tree in `dir` (the directory that holds `fs` and `manifest`). Nothing is read yet.
    pub fn open(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        let fs_path = dir.join(FS);
        Tree(Arc::new(Inner {
            dir,
            fs_path,
            fs: OnceLock::new(),
            manifest: OnceLock::new(),
            digests: Mutex::new(Digests::default()),
        }))
    }

    /// A tree whose files are kept by someone else, such as a directory received from a client: `fs_path` holds the
    /// files, `manifest` lists them, and `dir` is where digests may be remembered.
    pub fn with_manifest(dir: impl Into<PathBuf>, fs_path: impl Into<PathBuf>, manifest: Manifest) -> Self {
        Tree(Arc::new(Inner {
            dir: dir.into(),
            fs_path: fs_path.into(),
            fs: OnceLock::new(),
            manifest: OnceLock::from(Arc::new(manifest)),
            digests: Mutex::new(Digests::default()),
        }))
    }

    /// The directory that holds `fs` and `manifest`.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The upper directory, for overlay mounts.
    pub fn fs_path(&self) -> &Path {
        &self.0.fs_path
    }

    /// The upper directory as root of lookups. Paths in it are exact, so links are refused on the way.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn fs(&self) -> Result<Arc<Dir>> {
        if let Some(dir) = self.0.fs.get() {
            return Ok(dir.clone());
        }
        let dir = Arc::new(Dir::open_ambient(&self.0.fs_path)?.with_links(Links::Refuse));
        Ok(self.0.fs.get_or_init(|| dir).clone())
    }

    /// The manifest, read and decoded once.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if it does not parse, and I/O errors.
    pub fn manifest(&self) -> Result<Arc<Manifest>> {
        if let Some(manifest) = self.0.manifest.get() {
            return Ok(manifest.clone());
        }
        let path = self.0.dir.join(MANIFEST);
        let data = std::fs::read(&path).during("read", &path)?;
        let manifest = Manifest::decode(&data).map_err(|e| StoreError::Damaged {
            path,
            reason: e.to_string(),
        })?;
        Ok(self.0.manifest.get_or_init(|| Arc::new(manifest)).clone())
    }

    /// What the tree takes on disk, from its manifest.
    pub fn usage(&self) -> Result<Usage> {
        Ok(self.manifest()?.usage())
    }

    /// Opens the regular file of an entry.
    pub fn open_entry(&self, entry: &Entry) -> Result<File> {
        use std::os::unix::ffi::OsStrExt;
        let path = Path::new(std::ffi::OsStr::from_bytes(&entry.path));
        Ok(self.fs()?.open_regular(path)?)
    }

    /// The remembered content digest (see [`crate::checksum`]) of an entry.
    pub fn digest(&self, entry: u32) -> Option<Digest> {
        let mut digests = self.digests();
        self.load_digests(&mut digests);
        digests.by_entry.get(&entry).copied()
    }

    /// Remembers the content digest of an entry, in memory until [`save_digests`](Self::save_digests).
    pub fn remember_digest(&self, entry: u32, digest: Digest) {
        let mut digests = self.digests();
        self.load_digests(&mut digests);
        if digests.by_entry.insert(entry, digest) != Some(digest) {
            digests.dirty = true;
        }
    }

    /// Writes newly remembered digests beside the manifest. They are only a shortcut: nothing is lost without them.
    pub fn save_digests(&self) -> Result<()> {
        let list = {
            let mut digests = self.digests();
            if !std::mem::take(&mut digests.dirty) {
                return Ok(());
            }
            let mut list: Vec<_> = digests.by_entry.iter().map(|(i, d)| (*i, *d)).collect();
            list.sort();
            list
        };
        let mut data = Vec::with_capacity(list.len() * 36 + 40);
        data.extend_from_slice(DIGESTS_MAGIC);
        data.extend_from_slice(&self.stamp()?.to_le_bytes());
        for (index, digest) in list {
            data.extend_from_slice(&index.to_le_bytes());
            data.extend_from_slice(digest.as_bytes());
        }
        let sum = xxhash_rust::xxh3::xxh3_64(&data);
        data.extend_from_slice(&sum.to_le_bytes());
        replace_file(&self.0.dir, DIGESTS, &data)
    }

    fn digests(&self) -> MutexGuard<'_, Digests> {
        self.0.digests.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Binds the digests to this very manifest.
    fn stamp(&self) -> Result<u64> {
        let manifest = self.manifest()?;
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        for e in manifest.entries() {
            hash.update(&e.path);
            hash.update(&e.size.to_le_bytes());
            hash.update(&e.mtime.unix_nanos().to_le_bytes());
        }
        Ok(hash.digest())
    }

    /// Reads the remembered digests once; whatever is wrong with them only means that they are computed again.
    fn load_digests(&self, digests: &mut Digests) {
        if std::mem::replace(&mut digests.loaded, true) {
            return;
        }
        let Ok(data) = std::fs::read(self.0.dir.join(DIGESTS)) else {
            return;
        };
        let Some((body, sum)) = data.len().checked_sub(8).and_then(|n| data.split_at_checked(n)) else {
            return;
        };
        if xxhash_rust::xxh3::xxh3_64(body).to_le_bytes() != sum {
            return;
        }
        let Some(rest) = body.strip_prefix(DIGESTS_MAGIC) else {
            return;
        };
        let Some((stamp, rows)) = rest.split_at_checked(8) else {
            return;
        };
        if self.stamp().ok().is_none_or(|s| s.to_le_bytes() != stamp) {
            return;
        }
        for row in rows.chunks_exact(36) {
            let (index, raw) = row.split_at(4);
            if let (Ok(index), Ok(raw)) = (index.try_into(), raw.try_into()) {
                digests
                    .by_entry
                    .insert(u32::from_le_bytes(index), Digest::from_bytes(raw));
            }
        }
    }
}

const DIGESTS_MAGIC: &[u8] = b"kiln-digests-1\n";

/// Writes a file under another name and renames it, so that no reader sees half of it.
fn replace_file(dir: &Path, name: &str, data: &[u8]) -> Result<()> {
    static COUNTER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let n = COUNTER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let staged = dir.join(format!(".{name}.{}.{n}", std::process::id()));
    let mut file = File::create(&staged).during("create", &staged)?;
    file.write_all(data).during("write", &staged)?;
    std::fs::rename(&staged, dir.join(name)).during("rename", &staged)
}

/// A tree that is being written: a directory with `fs` in it, and no manifest yet.
#[derive(Debug)]
pub struct TreeBuilder {
    dir: PathBuf,
    fs: Arc<Dir>,
    overlay: OverlayXattr,
}

impl TreeBuilder {
    /// Starts a tree in the existing directory `dir`; `fs` is created in it, 0755, unless it is there already.
    pub fn create(dir: impl Into<PathBuf>, overlay: OverlayXattr) -> Result<Self> {
        let dir = dir.into();
        let above = Dir::open_ambient(&dir)?;
        match above.create_dir(FS, 0o755) {
            Err(e) if !e.is_already_exists() => return Err(e.into()),
            _ => {}
        }
        let fs = Arc::new(above.child_dir(FS)?.with_links(Links::Refuse));
        Ok(TreeBuilder { dir, fs, overlay })
    }

    /// The directory that will hold the manifest.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The upper directory's path, for mounts.
    pub fn fs_path(&self) -> PathBuf {
        self.dir.join(FS)
    }

    /// The upper directory. Paths in it are exact: links on the way are refused.
    pub fn fs(&self) -> &Arc<Dir> {
        &self.fs
    }

    /// How opaque directories are marked.
    pub fn overlay_xattr(&self) -> OverlayXattr {
        self.overlay
    }

    /// Puts a whiteout at `path`, whose directory must exist.
    pub fn put_whiteout(&self, path: &[u8]) -> Result<()> {
        Ok(self.fs.create_node(os_path(path), Kind::Whiteout.file_type(), 0, 0)?)
    }

    /// Marks directory `path` opaque.
    pub fn put_opaque(&self, path: &[u8]) -> Result<()> {
        Ok(self.fs.set_xattr(os_path(path), self.overlay.opaque(), b"y")?)
    }

    /// Writes the manifest; with that the tree is complete (though not yet durable: that is the store's business).
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the entries are no tree, and I/O errors.
    pub fn finish(self, entries: Vec<Entry>) -> Result<Tree> {
        let manifest = Manifest::new(entries)?;
        replace_file(&self.dir, MANIFEST, &manifest.encode())?;
        let fs_path = self.dir.join(FS);
        Ok(Tree::with_manifest(self.dir, fs_path, manifest))
    }
}

/// A manifest path as the operating system takes it.
pub(crate) fn os_path(path: &[u8]) -> &Path {
    use std::os::unix::ffi::OsStrExt;
    Path::new(std::ffi::OsStr::from_bytes(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_tree_reads_back_with_its_digests() {
        let tmp = tempfile::tempdir().unwrap();
        let b = TreeBuilder::create(tmp.path(), OverlayXattr::User).unwrap();
        b.fs().create_file("f", 0o644).unwrap().write_all(b"hi").unwrap();
        let mut f = Entry::new(*b"f", Kind::Regular);
        f.size = 2;
        let tree = b.finish(vec![Entry::dir(*b""), f]).unwrap();
        tree.remember_digest(1, Digest::of("x"));
        tree.save_digests().unwrap();
        let again = Tree::open(tmp.path());
        assert_eq!(again.digest(1), Some(Digest::of("x")));
        assert_eq!(again.digest(0), None);
        let manifest = again.manifest().unwrap();
        let entry = manifest.get(1).unwrap();
        assert_eq!(std::io::read_to_string(again.open_entry(entry).unwrap()).unwrap(), "hi");
        assert_eq!(again.usage().unwrap(), Usage { bytes: 8192, inodes: 2 });
        std::fs::write(tmp.path().join(DIGESTS), "junk").unwrap();
        assert_eq!(Tree::open(tmp.path()).digest(1), None);
    }
}
