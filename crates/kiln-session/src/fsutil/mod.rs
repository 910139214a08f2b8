//! The packet protocol that moves a directory tree, from either end.
//!
//! The sender lists its tree in walk order, one packet for each entry; an entry's number is its place in that list. The
//! receiver asks for the files it wants by number, at any time, and the sender answers with their bytes, several files
//! at once. When the listing is over and every wanted file is there, the receiver says so and the sender confirms.
//!
//! - [`receive`]: the receiver's conversation; [`disk`] is what it does to the directory, on blocking threads.
//! - [`send`]: the sender's conversation, over a [`TreeSource`]; [`walk`] is the source that is a directory.
//! - [`path`]: which paths are acceptable, and their order.

pub(crate) mod disk;
pub(crate) mod lane;
pub(crate) mod path;
pub(crate) mod receive;
pub(crate) mod send;
pub(crate) mod walk;

use std::collections::BTreeMap;

use bytes::Bytes;
use kiln_fs::mode::{GO_CHAR_DEVICE, GO_DEVICE, GO_DIR, GO_SYMLINK, GO_TYPE};
use kiln_proto::fsutil::{Packet, Stat, packet::PacketType};

/// Go's mode bits of a `st_mode`, as [`Entry::mode`] carries them.
pub use kiln_fs::mode::to_go as go_mode;
pub use path::compare as compare_paths;
pub(crate) use receive::receive;
pub use receive::{DigestPrefix, Existing, METADATA_FILE, Progress, ReceiveOptions, Received, TransferStats};
pub(crate) use send::{Role, send_tree};
pub use send::{SendStats, TreeFiles, TreeSource};
pub use walk::{DirSource, Filter, scan};

/// Payload of one DATA packet.
pub(crate) const DATA_CHUNK: usize = 32 << 10;

/// One entry of a tree, as it is listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Relative, `/` separated, without leading or trailing slash.
    pub path: String,
    /// Go's mode bits (`kiln_fs::mode`).
    pub mode: u32,
    /// Owner; 0 in a build context, whoever owns the files there.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of a regular file; 0 for everything else.
    pub size: u64,
    /// Unix time in nanoseconds.
    pub mtime: i64,
    /// Text of a symlink; on any other entry, the earlier entry whose inode it shares.
    pub linkname: String,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes by name.
    pub xattrs: BTreeMap<String, Bytes>,
    /// SHA-256 over the caller's prefix (see [`ReceiveOptions::digest`]) and the content; regular files only. A hard
    /// link has the digest of the entry it names.
    pub digest: Option<[u8; 32]>,
}

impl Entry {
    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & GO_DIR != 0
    }

    /// Whether this is a symlink.
    pub fn is_symlink(&self) -> bool {
        self.mode & GO_SYMLINK != 0
    }

    /// Whether this is a regular file (also one that is a hard link).
    pub fn is_file(&self) -> bool {
        self.mode & GO_TYPE == 0
    }

    /// Whether this is a further name of an earlier entry.
    pub fn is_hard_link(&self) -> bool {
        !self.is_symlink() && !self.is_dir() && !self.linkname.is_empty()
    }

    /// Whether this is the character device 0:0, by which overlayfs marks a removed file.
    pub(crate) fn is_whiteout(&self) -> bool {
        let device = GO_DEVICE | GO_CHAR_DEVICE;
        self.mode & device == device && self.device == (0, 0)
    }

    /// Whether two listings of the same path tell of the same thing, so that nothing has to be transferred. A
    /// directory's size and time change with what is in it and do not count.
    pub fn is_same(&self, other: &Entry) -> bool {
        let dir = self.is_dir();
        self.mode == other.mode
            && (self.uid, self.gid) == (other.uid, other.gid)
            && (dir || (self.size == other.size && self.mtime == other.mtime))
            && self.linkname == other.linkname
            && self.device == other.device
            && self.xattrs == other.xattrs
    }

    pub(crate) fn from_wire(stat: Stat) -> Self {
        let number = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
        let file = stat.mode & GO_TYPE == 0 && stat.linkname.is_empty();
        Entry {
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            size: if file { u64::try_from(stat.size).unwrap_or(0) } else { 0 },
            mtime: stat.mod_time,
            device: (number(stat.devmajor), number(stat.devminor)),
            xattrs: stat.xattrs,
            path: stat.path,
            linkname: stat.linkname,
            digest: None,
        }
    }

    pub(crate) fn to_wire(&self) -> Stat {
        Stat {
            path: self.path.clone(),
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            size: i64::try_from(self.size).unwrap_or(i64::MAX),
            mod_time: self.mtime,
            linkname: self.linkname.clone(),
            devmajor: i64::from(self.device.0),
            devminor: i64::from(self.device.1),
            xattrs: self.xattrs.clone(),
        }
    }
}

pub(crate) fn packet(kind: PacketType, id: u32, data: Bytes) -> Packet {
    Packet {
        r#type: kind as i32,
        stat: None,
        id,
        data,
    }
}

pub(crate) fn stat_packet(stat: Option<Stat>) -> Packet {
    Packet {
        r#type: PacketType::PacketStat as i32,
        stat,
        id: 0,
        data: Bytes::new(),
    }
}
