//! What `stat` tells, with plain numbers.

/// What kind of file an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileType {
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
}

impl FileType {
    /// The type bits of `st_mode`. An unknown type counts as a regular file.
    pub fn from_st_mode(st_mode: u32) -> Self {
        match st_mode & 0o170000 {
            0o040000 => FileType::Directory,
            0o120000 => FileType::Symlink,
            0o020000 => FileType::CharDevice,
            0o060000 => FileType::BlockDevice,
            0o010000 => FileType::Fifo,
            0o140000 => FileType::Socket,
            _ => FileType::Regular,
        }
    }

    /// The type bits of `st_mode` for this type.
    pub fn st_mode_bits(self) -> u32 {
        match self {
            FileType::Directory => 0o040000,
            FileType::Symlink => 0o120000,
            FileType::CharDevice => 0o020000,
            FileType::BlockDevice => 0o060000,
            FileType::Fifo => 0o010000,
            FileType::Socket => 0o140000,
            FileType::Regular => 0o100000,
        }
    }

    /// Whether this is a directory.
    pub fn is_dir(self) -> bool {
        self == FileType::Directory
    }

    /// Whether this is a regular file.
    pub fn is_file(self) -> bool {
        self == FileType::Regular
    }

    /// Whether this is a symbolic link.
    pub fn is_symlink(self) -> bool {
        self == FileType::Symlink
    }
}

/// A point in time of the file system: seconds since 1970 (may be negative) and nanoseconds within that second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Timestamp {
    /// Whole seconds since 1970, UTC.
    pub secs: i64,
    /// Nanoseconds, 0 to 999,999,999.
    pub nanos: u32,
}

impl Timestamp {
    /// The start of 1970.
    pub const EPOCH: Timestamp = Timestamp { secs: 0, nanos: 0 };

    /// From nanoseconds since 1970, as LLB carries times.
    pub fn from_unix_nanos(nanos: i64) -> Self {
        Timestamp {
            secs: nanos.div_euclid(1_000_000_000),
            nanos: nanos.rem_euclid(1_000_000_000) as u32,
        }
    }

    /// As nanoseconds since 1970, saturating.
    pub fn unix_nanos(self) -> i64 {
        self.secs
            .saturating_mul(1_000_000_000)
            .saturating_add(i64::from(self.nanos))
    }

    /// The current time.
    pub fn now() -> Self {
        match std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
            Ok(since) => Timestamp {
                secs: since.as_secs() as i64,
                nanos: since.subsec_nanos(),
            },
            Err(_) => Timestamp::EPOCH,
        }
    }
}

/// The metadata of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// What kind of file it is.
    pub file_type: FileType,
    /// Permission bits with setuid, setgid and sticky (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes as `stat` reports it.
    pub size: u64,
    /// Blocks of 512 bytes that are allocated.
    pub blocks: u64,
    /// Time of the last change of content.
    pub mtime: Timestamp,
    /// Time of the last change of the inode.
    pub ctime: Timestamp,
    /// Device number of a device file (raw `dev_t`).
    pub rdev: u64,
    /// Device the file lives on (raw `dev_t`).
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Number of hard links.
    pub nlink: u64,
}

impl Metadata {
    /// `st_mode`: type and permission bits.
    pub fn st_mode(&self) -> u32 {
        self.file_type.st_mode_bits() | self.mode
    }

    /// Major and minor number of a device file.
    pub fn rdev_numbers(&self) -> (u32, u32) {
        (rustix::fs::major(self.rdev), rustix::fs::minor(self.rdev))
    }

    /// Whether this is the 0:0 character device by which overlayfs marks a removed file.
    pub fn is_overlay_whiteout(&self) -> bool {
        self.file_type == FileType::CharDevice && self.rdev == 0
    }
}

#[allow(clippy::unnecessary_cast)] // the widths differ between architectures
impl From<rustix::fs::Stat> for Metadata {
    fn from(st: rustix::fs::Stat) -> Self {
        Metadata {
            file_type: FileType::from_st_mode(st.st_mode as u32),
            mode: st.st_mode as u32 & 0o7777,
            uid: st.st_uid,
            gid: st.st_gid,
            size: st.st_size.max(0) as u64,
            blocks: st.st_blocks.max(0) as u64,
            mtime: Timestamp {
                secs: st.st_mtime as i64,
                nanos: st.st_mtime_nsec as u32,
            },
            ctime: Timestamp {
                secs: st.st_ctime as i64,
                nanos: st.st_ctime_nsec as u32,
            },
            rdev: st.st_rdev as u64,
            dev: st.st_dev as u64,
            ino: st.st_ino as u64,
            nlink: st.st_nlink as u64,
        }
    }
}
