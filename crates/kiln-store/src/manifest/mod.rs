//! A tree's manifest: the sorted list of everything in one layer's upper directory.
//!
//! The manifest is written once, when a tree is sealed, and afterwards answers what would otherwise need a walk: which
//! files a stack of layers shows, content keys of COPY, export, disk usage. Order is by path elements (`a`, `a/x`,
//! `a.txt`), which is at once the order of content hashing, of layer archives and of a walk that sorts each directory.

mod codec;

use std::cmp::Ordering;

use kiln_fs::xattr::Xattrs;
use kiln_fs::{FileType, Metadata, Timestamp};

use crate::error::{Result, StoreError};

/// What an entry of a tree is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A unix socket.
    Socket,
    /// Hides what the layers below have at this path.
    Whiteout,
}

impl Kind {
    const ALL: [Kind; 8] = [
        Kind::Regular,
        Kind::Directory,
        Kind::Symlink,
        Kind::CharDevice,
        Kind::BlockDevice,
        Kind::Fifo,
        Kind::Socket,
        Kind::Whiteout,
    ];

    fn code(self) -> u8 {
        Self::ALL.iter().position(|k| *k == self).unwrap_or_default() as u8
    }

    /// The file type, which a whiteout has only on disk.
    pub fn file_type(self) -> FileType {
        match self {
            Kind::Regular => FileType::Regular,
            Kind::Directory => FileType::Directory,
            Kind::Symlink => FileType::Symlink,
            Kind::CharDevice | Kind::Whiteout => FileType::CharDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            Kind::Fifo => FileType::Fifo,
            Kind::Socket => FileType::Socket,
        }
    }

    /// Whether this is a directory.
    pub fn is_dir(self) -> bool {
        self == Kind::Directory
    }
}

impl From<FileType> for Kind {
    fn from(file_type: FileType) -> Self {
        match file_type {
            FileType::Regular => Kind::Regular,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::CharDevice => Kind::CharDevice,
            FileType::BlockDevice => Kind::BlockDevice,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
        }
    }
}

/// One entry of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path from the root of the tree: no leading slash, clean; empty for the root itself.
    pub path: Box<[u8]>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky (07777); 0777 for symbolic links.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length of a regular file in bytes, else 0.
    pub size: u64,
    /// Modification time.
    pub mtime: Timestamp,
    /// Text of a symbolic link, else empty.
    pub target: Box<[u8]>,
    /// Device number of a device (raw `dev_t`), else 0.
    pub rdev: u64,
    /// Entries of one tree with the same non-zero number are hard links to one file.
    pub link_group: u32,
    /// Extended attributes, sorted by name.
    pub xattrs: Xattrs,
    /// A directory that hides everything the layers below have in it.
    pub opaque: bool,
    /// Equal to what the layers below show at this path (a parent that had to be there, a file copied up and not
    /// changed): not part of the layer when it is exported, other than as a parent.
    pub unchanged: bool,
}

impl Entry {
    /// An entry of the given kind with mode 0, owner 0:0 and no content.
    pub fn new(path: impl Into<Box<[u8]>>, kind: Kind) -> Self {
        Entry {
            path: path.into(),
            kind,
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Timestamp::EPOCH,
            target: Box::default(),
            rdev: 0,
            link_group: 0,
            xattrs: Xattrs::new(),
            opaque: false,
            unchanged: false,
        }
    }

    /// A directory 0755, 0:0.
    pub fn dir(path: impl Into<Box<[u8]>>) -> Self {
        Entry {
            mode: 0o755,
            ..Entry::new(path, Kind::Directory)
        }
    }

    /// A whiteout.
    pub fn whiteout(path: impl Into<Box<[u8]>>) -> Self {
        Entry::new(path, Kind::Whiteout)
    }

    /// An entry from a file's metadata; link text, attributes and link group are the caller's to add.
    pub fn from_metadata(path: impl Into<Box<[u8]>>, md: &Metadata) -> Self {
        let kind = Kind::from(md.file_type);
        Entry {
            mode: if kind == Kind::Symlink { 0o777 } else { md.mode },
            uid: md.uid,
            gid: md.gid,
            size: if kind == Kind::Regular { md.size } else { 0 },
            mtime: md.mtime,
            rdev: if matches!(kind, Kind::CharDevice | Kind::BlockDevice) {
                md.rdev
            } else {
                0
            },
            ..Entry::new(path, kind)
        }
    }

    /// The last element of the path; empty for the root.
    pub fn name(&self) -> &[u8] {
        base(&self.path)
    }

    /// Value of one extended attribute.
    pub fn xattr(&self, name: &[u8]) -> Option<&[u8]> {
        self.xattrs.iter().find(|(n, _)| &n[..] == name).map(|(_, v)| &v[..])
    }

    /// `st_mode`: type and permission bits.
    pub fn st_mode(&self) -> u32 {
        self.kind.file_type().st_mode_bits() | self.mode
    }
}

/// The last element of a path.
pub fn base(path: &[u8]) -> &[u8] {
    path.rsplit(|b| *b == b'/').next().unwrap_or_default()
}

/// The directory of a path; empty for the root and for what is directly in it.
pub fn parent(path: &[u8]) -> &[u8] {
    path.iter()
        .rposition(|b| *b == b'/')
        .and_then(|i| path.get(..i))
        .unwrap_or_default()
}

/// `dir` and `name` joined; `dir` may be the empty root.
pub fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(dir.len() + name.len() + 1);
    out.extend_from_slice(dir);
    if !dir.is_empty() {
        out.push(b'/');
    }
    out.extend_from_slice(name);
    out
}

/// Whether `path` lies below directory `dir` (not `dir` itself).
pub fn is_below(path: &[u8], dir: &[u8]) -> bool {
    if dir.is_empty() {
        return !path.is_empty();
    }
    path.strip_prefix(dir).is_some_and(|rest| rest.first() == Some(&b'/'))
}

/// Order of paths by their elements: the separator sorts before every other byte.
pub fn compare(a: &[u8], b: &[u8]) -> Ordering {
    let key = |c: &u8| if *c == b'/' { 0 } else { *c };
    match a.iter().zip(b).find(|(x, y)| x != y) {
        Some((x, y)) => key(x).cmp(&key(y)),
        None => a.len().cmp(&b.len()),
    }
}

/// How much a tree takes on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes, each file rounded up to whole 4 KiB blocks, hard links counted once.
    pub bytes: u64,
    /// Inodes, hard links counted once.
    pub inodes: u64,
}

/// The sorted, checked list of entries. The first is the root directory.
#[derive(Debug, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<Entry>,
    /// For each entry the index after the last entry below it.
    ends: Vec<u32>,
}

impl Manifest {
    /// Sorts and checks entries: the root is a directory and present, every parent is, paths are clean and unique.
    ///
    /// # Errors
    /// [`StoreError::Invalid`], naming the entry.
    pub fn new(mut entries: Vec<Entry>) -> Result<Self> {
        let sorted = entries.is_sorted_by(|a, b| compare(&a.path, &b.path) == Ordering::Less);
        if !sorted {
            entries.sort_by(|a, b| compare(&a.path, &b.path));
        }
        let count = u32::try_from(entries.len()).map_err(|_| StoreError::Invalid("a tree of too many files".into()))?;
        let bad = |e: &Entry, what: &str| {
            StoreError::Invalid(format!("manifest entry {:?}: {what}", String::from_utf8_lossy(&e.path)))
        };
        if entries.is_empty() {
            return Err(StoreError::Invalid("a manifest without a root directory".into()));
        }
        let mut ends = vec![0u32; entries.len()];
        let mut open: Vec<u32> = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            let above = parent(&entry.path);
            let at = |i: u32| entries.get(i as usize);
            if index == 0 {
                if !entry.path.is_empty() || !entry.kind.is_dir() {
                    return Err(bad(entry, "the root directory is missing"));
                }
            } else {
                let elements = entry.path.split(|b| *b == b'/');
                let bad_name = |n: &[u8]| n.is_empty() || n == b"." || n == b".." || n.contains(&0);
                if elements.into_iter().next_back().is_none_or(bad_name) {
                    return Err(bad(entry, "not a clean path"));
                }
                while open.last().and_then(|i| at(*i)).is_some_and(|top| *top.path != *above) {
                    if let Some(closed) = open.pop()
                        && let Some(end) = ends.get_mut(closed as usize)
                    {
                        *end = index as u32;
                    }
                }
                if open.is_empty() {
                    return Err(bad(entry, "its directory is missing"));
                }
                if entries.get(index - 1).is_some_and(|before| before.path == entry.path) {
                    return Err(bad(entry, "listed twice"));
                }
            }
            if let Some(end) = ends.get_mut(index) {
                *end = index as u32 + 1;
            }
            if entry.kind.is_dir() {
                open.push(index as u32);
            }
        }
        for closed in open {
            if let Some(end) = ends.get_mut(closed as usize) {
                *end = count;
            }
        }
        Ok(Manifest { entries, ends })
    }

    /// All entries in order, the root first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entries, in order.
    pub fn into_entries(self) -> Vec<Entry> {
        self.entries
    }

    /// The entry with the given index.
    pub fn get(&self, index: u32) -> Option<&Entry> {
        self.entries.get(index as usize)
    }

    /// The index after the last entry below entry `index`; for anything but a directory the index after itself.
    pub fn end(&self, index: u32) -> u32 {
        self.ends
            .get(index as usize)
            .copied()
            .unwrap_or(index.saturating_add(1))
    }

    /// The index of the entry with exactly this path.
    pub fn find(&self, path: &[u8]) -> Option<u32> {
        self.entries
            .binary_search_by(|e| compare(&e.path, path))
            .ok()
            .map(|i| i as u32)
    }

    /// The index of `name` in the directory with index `dir`.
    pub fn find_child(&self, dir: u32, name: &[u8]) -> Option<u32> {
        let (from, to) = (dir as usize + 1, self.end(dir) as usize);
        let skip = match self.get(dir)?.path.len() {
            0 => 0,
            n => n + 1,
        };
        let below = self.entries.get(from..to)?;
        let rest = |e: &Entry| compare(e.path.get(skip..).unwrap_or_default(), name);
        below.binary_search_by(rest).ok().map(|i| (from + i) as u32)
    }

    /// What the tree takes on disk.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        let mut seen = std::collections::HashSet::new();
        for e in &self.entries {
            if e.link_group != 0 && !seen.insert(e.link_group) {
                continue;
            }
            usage.inodes += 1;
            usage.bytes += match e.kind {
                Kind::Directory => 4096,
                Kind::Regular => e.size.div_ceil(4096) * 4096,
                _ => 0,
            };
        }
        usage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<Entry> {
        let mut file = Entry::new(*b"a/x", Kind::Regular);
        file.size = 1 << 40;
        file.mtime = Timestamp { secs: -3, nanos: 7 };
        file.xattrs = vec![((*b"user.k").into(), (*b"v\0w").into())];
        file.link_group = 9;
        let mut link = Entry::new(*b"a.txt", Kind::Symlink);
        link.target = (*b"../x").into();
        let mut dir = Entry::dir(*b"a");
        dir.opaque = true;
        dir.unchanged = true;
        let mut dev = Entry::new(*b"z", Kind::CharDevice);
        dev.rdev = rustix::fs::makedev(1, 3);
        vec![
            link,
            Entry::whiteout(*b"b"),
            file,
            dir,
            Entry::dir(*b""),
            dev,
            Entry::dir(*b"a/sub"),
        ]
    }

    #[test]
    fn order_and_round_trip() {
        let m = Manifest::new(sample()).unwrap();
        let paths: Vec<_> = m.entries().iter().map(|e| String::from_utf8_lossy(&e.path)).collect();
        assert_eq!(paths, ["", "a", "a/sub", "a/x", "a.txt", "b", "z"]);
        assert_eq!((m.end(0), m.end(1), m.end(2)), (7, 4, 3));
        assert_eq!(m.find(b"a/x"), Some(3));
        assert_eq!(m.find_child(1, b"x"), Some(3));
        assert_eq!(m.find_child(0, b"a.txt"), Some(4));
        assert_eq!(m.find_child(0, b"x"), None);
        let back = Manifest::decode(&m.encode()).unwrap();
        assert_eq!(back, m);
    }

    #[test]
    fn damage_is_noticed() {
        let good = Manifest::new(sample()).unwrap().encode();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert!(Manifest::decode(&bad).is_err(), "byte {at}");
            assert!(Manifest::decode(&good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_is_refused() {
        let root = || Entry::dir(*b"");
        for bad in [
            vec![],
            vec![Entry::dir(*b"a")],
            vec![root(), Entry::dir(*b"a/b")],
            vec![root(), Entry::new(*b"a", Kind::Regular), Entry::dir(*b"a/b")],
            vec![root(), Entry::dir(*b"a"), Entry::dir(*b"a")],
            vec![root(), Entry::dir(*b"..")],
            vec![root(), Entry::dir(*b"a/")],
        ] {
            assert!(Manifest::new(bad).is_err());
        }
    }
}
