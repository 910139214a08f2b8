//! Go's `os.FileMode` bits, as they travel in file-sync packets and directory listings, to and from `st_mode`.

/// Go's bit for directories.
pub const GO_DIR: u32 = 1 << 31;
/// Go's bit for symbolic links.
pub const GO_SYMLINK: u32 = 1 << 27;
/// Go's bit for devices; block devices carry it alone.
pub const GO_DEVICE: u32 = 1 << 26;
/// Go's bit for named pipes.
pub const GO_NAMED_PIPE: u32 = 1 << 25;
/// Go's bit for unix sockets.
pub const GO_SOCKET: u32 = 1 << 24;
/// Go's bit for set-user-id.
pub const GO_SETUID: u32 = 1 << 23;
/// Go's bit for set-group-id.
pub const GO_SETGID: u32 = 1 << 22;
/// Go's bit that, together with [`GO_DEVICE`], marks a character device.
pub const GO_CHAR_DEVICE: u32 = 1 << 21;
/// Go's bit for the sticky bit.
pub const GO_STICKY: u32 = 1 << 20;
/// All bits of Go's mode that say what kind of file it is.
pub const GO_TYPE: u32 = GO_DIR | GO_SYMLINK | GO_NAMED_PIPE | GO_SOCKET | GO_DEVICE | GO_CHAR_DEVICE | (1 << 19);

const S_IFMT: u32 = 0o170000;
const S_IFSOCK: u32 = 0o140000;
const S_IFLNK: u32 = 0o120000;
const S_IFREG: u32 = 0o100000;
const S_IFBLK: u32 = 0o060000;
const S_IFDIR: u32 = 0o040000;
const S_IFCHR: u32 = 0o020000;
const S_IFIFO: u32 = 0o010000;

/// `st_mode` (type and permission bits) as Go's `FileMode`.
pub fn to_go(st_mode: u32) -> u32 {
    let mut go = st_mode & 0o777;
    go |= match st_mode & S_IFMT {
        S_IFDIR => GO_DIR,
        S_IFLNK => GO_SYMLINK,
        S_IFBLK => GO_DEVICE,
        S_IFCHR => GO_DEVICE | GO_CHAR_DEVICE,
        S_IFIFO => GO_NAMED_PIPE,
        S_IFSOCK => GO_SOCKET,
        _ => 0,
    };
    for (bit, flag) in [(0o4000, GO_SETUID), (0o2000, GO_SETGID), (0o1000, GO_STICKY)] {
        if st_mode & bit != 0 {
            go |= flag;
        }
    }
    go
}

/// Go's `FileMode` as `st_mode`. A mode with no type bit is a regular file.
pub fn from_go(go: u32) -> u32 {
    let kind = if go & GO_DIR != 0 {
        S_IFDIR
    } else if go & GO_SYMLINK != 0 {
        S_IFLNK
    } else if go & GO_NAMED_PIPE != 0 {
        S_IFIFO
    } else if go & GO_SOCKET != 0 {
        S_IFSOCK
    } else if go & GO_DEVICE != 0 {
        if go & GO_CHAR_DEVICE != 0 { S_IFCHR } else { S_IFBLK }
    } else {
        S_IFREG
    };
    kind | permissions_from_go(go)
}

/// The twelve permission bits (setuid, setgid and sticky included) of a Go mode, as `chmod` wants them.
pub fn permissions_from_go(go: u32) -> u32 {
    let mut mode = go & 0o777;
    for (bit, flag) in [(0o4000, GO_SETUID), (0o2000, GO_SETGID), (0o1000, GO_STICKY)] {
        if go & flag != 0 {
            mode |= bit;
        }
    }
    mode
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        for kind in [S_IFSOCK, S_IFLNK, S_IFREG, S_IFBLK, S_IFDIR, S_IFCHR, S_IFIFO] {
            for perm in [0, 0o644, 0o7777, 0o4755, 0o1777, 0o2000] {
                assert_eq!(from_go(to_go(kind | perm)), kind | perm);
            }
        }
    }

    #[test]
    fn known_values() {
        assert_eq!(to_go(S_IFDIR | 0o755), 0x8000_01ed);
        assert_eq!(to_go(S_IFLNK | 0o777), 0x0800_01ff);
        assert_eq!(to_go(S_IFREG | 0o4755), 0x0080_01ed);
    }
}
