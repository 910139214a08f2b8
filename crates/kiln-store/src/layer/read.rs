//! The tar parser: USTAR, GNU and PAX archives with their extensions, and limits against hostile input.
//!
//! Understood: long names (GNU `L` and `K`, PAX `path` and `linkpath`, USTAR prefix), numbers in octal and base 256,
//! PAX sizes, owners, times and attributes, sparse files (old GNU, PAX 0.0, 0.1 and 1.0). Global PAX headers are passed
//! over, as the field does. Names are handed out raw; whoever writes files confines them.

use std::io::{self, Read};

use kiln_fs::Timestamp;

use super::fields::{field, number, parse_records, pax_time, size_of, text};

const BLOCK: usize = 512;
/// Longest extended header, long name or sparse map that is read into memory.
const MAX_EXTENSION: u64 = 1 << 20;
/// Extensions in a row that may precede one member.
const MAX_EXTENSIONS: usize = 64;

/// What a member of an archive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberKind {
    /// A regular file.
    Regular,
    /// A hard link to an earlier member.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One member: a header with all its extensions applied.
#[derive(Clone, Debug)]
pub struct Member {
    /// Name as in the archive.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: MemberKind,
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length of the file once written (for sparse files more than what is stored).
    pub size: u64,
    /// Modification time.
    pub mtime: Timestamp,
    /// Target of a link.
    pub link: Vec<u8>,
    /// Device numbers.
    pub device: (u32, u32),
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// For sparse files the stored pieces: offset and length, ascending.
    pub sparse: Option<Vec<(u64, u64)>>,
}

/// Reads members one after the other. Data of the current member is read through [`Read`].
#[derive(Debug)]
pub struct TarReader<R> {
    input: R,
    /// Stored bytes of the current member that were not read yet, and the padding behind them.
    left: u64,
    padding: u64,
    ended: bool,
}

pub(super) fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Values of the extensions seen before a member.
#[derive(Default)]
struct Extensions {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extensions {
    /// The last value of a record. An empty value takes the record back.
    fn get(&self, key: &[u8]) -> Option<&[u8]> {
        self.records
            .iter()
            .rev()
            .find(|(k, _)| k == key)
            .map(|(_, v)| &v[..])
            .filter(|v| !v.is_empty())
    }

    fn number(&self, key: &[u8]) -> io::Result<Option<u64>> {
        let parse = |v: &[u8]| std::str::from_utf8(v).ok().and_then(|t| t.parse().ok());
        match self.get(key) {
            None => Ok(None),
            Some(value) => match parse(value) {
                Some(n) => Ok(Some(n)),
                None => Err(invalid(format!(
                    "archive: bad number in record {}",
                    String::from_utf8_lossy(key)
                ))),
            },
        }
    }
}

impl<R: Read> TarReader<R> {
    /// Reads an archive from `input`, which is not compressed.
    pub fn new(input: R) -> Self {
        TarReader {
            input,
            left: 0,
            padding: 0,
            ended: false,
        }
    }

    /// The next member; `None` at the end of the archive. What is left of the current one is passed over.
    ///
    /// # Errors
    /// `InvalidData` for what is no archive or exceeds a limit, `UnexpectedEof` for a cut one.
    pub fn next_member(&mut self) -> io::Result<Option<Member>> {
        let mut ext = Extensions::default();
        for _ in 0..MAX_EXTENSIONS {
            let Some(block) = self.block()? else {
                if ext.long_name.is_some() || !ext.records.is_empty() {
                    return Err(invalid("archive: an extended header without a member"));
                }
                return Ok(None);
            };
            let flag = field(&block, 156, 1).first().copied().unwrap_or(0);
            let size = size_of(&block)?;
            match flag {
                b'x' | b'X' => {
                    self.begin(size);
                    let data = self.small()?;
                    parse_records(&data, &mut ext.records)?;
                }
                b'g' => self.begin(size),
                b'L' | b'K' => {
                    self.begin(size);
                    let mut data = self.small()?;
                    if let Some(end) = data.iter().position(|b| *b == 0) {
                        data.truncate(end);
                    }
                    let slot = if flag == b'L' {
                        &mut ext.long_name
                    } else {
                        &mut ext.long_link
                    };
                    *slot = Some(data);
                }
                _ => return self.member(&block, flag, size, &ext).map(Some),
            }
        }
        Err(invalid("archive: too many extended headers in a row"))
    }

    fn member(&mut self, block: &[u8; BLOCK], flag: u8, size: u64, ext: &Extensions) -> io::Result<Member> {
        let ustar = field(block, 257, 6) == b"ustar\0";
        let mut name = text(block, 0, 100).to_vec();
        let prefix = if ustar { text(block, 345, 155) } else { &[] };
        if !prefix.is_empty() {
            name = [prefix, b"/", &name].concat();
        }
        if let Some(long) = ext.get(b"path").or(ext.long_name.as_deref()) {
            name = long.to_vec();
        }
        let link = match ext.get(b"linkpath").or(ext.long_link.as_deref()) {
            Some(long) => long.to_vec(),
            None => text(block, 157, 100).to_vec(),
        };
        let kind = match flag {
            b'0' | 0 | b'7' | b'S' if name.last() == Some(&b'/') && flag != b'S' => MemberKind::Directory,
            b'0' | 0 | b'7' | b'S' => MemberKind::Regular,
            b'1' => MemberKind::HardLink,
            b'2' => MemberKind::Symlink,
            b'3' => MemberKind::CharDevice,
            b'4' => MemberKind::BlockDevice,
            b'5' => MemberKind::Directory,
            b'6' => MemberKind::Fifo,
            other => return Err(invalid(format!("archive: unknown member type {:?}", char::from(other)))),
        };
        // Only files carry data, whatever a header says (old archives state a size for links and directories).
        let stored = match kind {
            MemberKind::Regular => ext.number(b"size")?.unwrap_or(size),
            _ => 0,
        };
        let id = |key: &[u8], at| -> io::Result<u32> {
            let value = match ext.number(key)? {
                Some(n) => n,
                None => number(field(block, at, 8))
                    .and_then(|n| u64::try_from(n).ok())
                    .unwrap_or(u64::MAX),
            };
            value
                .try_into()
                .map_err(|_| invalid(format!("archive: {} out of range", String::from_utf8_lossy(key))))
        };
        let device = |at| {
            number(field(block, at, 8))
                .and_then(|n| u32::try_from(n).ok())
                .unwrap_or(0)
        };
        let mtime = match ext.get(b"mtime") {
            Some(value) => pax_time(value).ok_or_else(|| invalid("archive: bad time in an extended header"))?,
            None => Timestamp {
                secs: number(field(block, 136, 12)).unwrap_or(0),
                nanos: 0,
            },
        };
        let xattr = |(k, v): &(Vec<u8>, Vec<u8>)| Some((k.strip_prefix(b"SCHILY.xattr.")?.to_vec(), v.clone()));
        let mut member = Member {
            kind,
            mode: number(field(block, 100, 8)).unwrap_or(0) as u32 & 0o7777,
            uid: id(b"uid", 108)?,
            gid: id(b"gid", 116)?,
            size: stored,
            mtime,
            link,
            device: (device(329), device(337)),
            xattrs: ext.records.iter().filter_map(xattr).collect(),
            sparse: None,
            name,
        };
        self.begin(stored);
        if flag == b'S' {
            self.old_gnu_sparse(block, stored, &mut member)?;
        } else if kind == MemberKind::Regular {
            self.pax_sparse(ext, &mut member)?;
        }
        if let Some(pieces) = &member.sparse {
            check_pieces(pieces, member.size, self.left)?;
        }
        Ok(member)
    }

    /// Old GNU form: four pieces in the header, more in blocks between header and data.
    fn old_gnu_sparse(&mut self, block: &[u8; BLOCK], stored: u64, member: &mut Member) -> io::Result<()> {
        let bad = || invalid("archive: bad sparse map");
        let mut pieces = Vec::new();
        let read = |data: &[u8], count: usize, pieces: &mut Vec<(u64, u64)>| -> Option<()> {
            for at in (0..count).map(|i| i * 24) {
                let (offset, length) = (data.get(at..at + 12)?, data.get(at + 12..at + 24)?);
                if offset.first() == Some(&0) && length.first() == Some(&0) {
                    break;
                }
                pieces.push((number(offset)?.try_into().ok()?, number(length)?.try_into().ok()?));
            }
            Some(())
        };
        read(field(block, 386, 96), 4, &mut pieces).ok_or_else(bad)?;
        member.size = number(field(block, 483, 12))
            .and_then(|n| n.try_into().ok())
            .ok_or_else(bad)?;
        let mut more = field(block, 482, 1) == b"\x01";
        while more {
            if pieces.len() > MAX_EXTENSION as usize / 24 {
                return Err(bad());
            }
            let mut next = [0; BLOCK];
            self.input.read_exact(&mut next)?;
            read(field(&next, 0, 504), 21, &mut pieces).ok_or_else(bad)?;
            more = field(&next, 504, 1) == b"\x01";
        }
        self.begin(stored);
        member.sparse = Some(pieces);
        Ok(())
    }

    /// PAX forms 0.0 (a record per number), 0.1 (one record) and 1.0 (the map leads the data).
    fn pax_sparse(&mut self, ext: &Extensions, member: &mut Member) -> io::Result<()> {
        let bad = || invalid("archive: bad sparse map");
        let decimal = |v: &[u8]| std::str::from_utf8(v).ok().and_then(|t| t.trim().parse::<u64>().ok());
        let pair = |numbers: Vec<u64>| -> io::Result<Vec<(u64, u64)>> {
            let pairs = numbers.chunks(2).map(|c| match c {
                [a, b] => Ok((*a, *b)),
                _ => Err(bad()),
            });
            pairs.collect()
        };
        if ext.get(b"GNU.sparse.major") == Some(b"1") {
            let mut consumed = 0u64;
            let mut line = |reader: &mut Self| -> io::Result<u64> {
                let mut digits = Vec::new();
                loop {
                    let mut byte = [0];
                    reader.read_exact(&mut byte)?;
                    consumed += 1;
                    if consumed > MAX_EXTENSION {
                        return Err(bad());
                    }
                    match byte {
                        [b'\n'] => return decimal(&digits).ok_or_else(bad),
                        [b] => digits.push(b),
                    }
                }
            };
            let count = line(self)?;
            let mut numbers = Vec::new();
            for _ in 0..count.checked_mul(2).ok_or_else(bad)? {
                numbers.push(line(self)?);
            }
            let fill = (BLOCK as u64 - consumed % BLOCK as u64) % BLOCK as u64;
            io::copy(&mut self.by_ref().take(fill), &mut io::sink())?;
            member.sparse = Some(pair(numbers)?);
        } else if let Some(map) = ext.get(b"GNU.sparse.map") {
            let numbers = map
                .split(|b| *b == b',')
                .map(|n| decimal(n).ok_or_else(bad))
                .collect::<io::Result<_>>()?;
            member.sparse = Some(pair(numbers)?);
        } else if ext.get(b"GNU.sparse.numblocks").is_some() {
            let wanted = |k: &[u8]| k == b"GNU.sparse.offset" || k == b"GNU.sparse.numbytes";
            let numbers = ext
                .records
                .iter()
                .filter(|(k, _)| wanted(k))
                .map(|(_, v)| decimal(v).ok_or_else(bad));
            member.sparse = Some(pair(numbers.collect::<io::Result<_>>()?)?);
        } else {
            return Ok(());
        }
        let real = match ext.number(b"GNU.sparse.realsize")? {
            Some(size) => Some(size),
            None => ext.number(b"GNU.sparse.size")?,
        };
        member.size = real.ok_or_else(bad)?;
        if let Some(name) = ext.get(b"GNU.sparse.name") {
            member.name = name.to_vec();
        }
        Ok(())
    }

    fn begin(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    /// The whole data of an extension.
    fn small(&mut self) -> io::Result<Vec<u8>> {
        if self.left > MAX_EXTENSION {
            return Err(invalid(format!("archive: an extended header of {} bytes", self.left)));
        }
        let mut data = Vec::with_capacity(self.left as usize);
        self.read_to_end(&mut data)?;
        Ok(data)
    }

    /// The next header block; `None` at the end: two zero blocks, or the end of input between members.
    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        if self.ended {
            return Ok(None);
        }
        let skip = self
            .left
            .checked_add(self.padding)
            .ok_or_else(|| invalid("archive: size out of range"))?;
        let skipped = io::copy(&mut self.input.by_ref().take(skip), &mut io::sink())?;
        if skipped < self.left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (self.left, self.padding) = (0, 0);
        let Some(block) = self.raw_block()? else {
            return Ok(None);
        };
        if block.iter().all(|b| *b == 0) {
            self.ended = true;
            return match self.raw_block()? {
                Some(second) if second.iter().any(|b| *b != 0) => Err(invalid("archive: a single zero block")),
                _ => Ok(None),
            };
        }
        let stated = number(field(&block, 148, 8));
        let at = |(i, b): (usize, &u8)| if (148..156).contains(&i) { b' ' } else { *b };
        let unsigned: i64 = block.iter().enumerate().map(at).map(i64::from).sum();
        let signed: i64 = block.iter().enumerate().map(at).map(|b| i64::from(b as i8)).sum();
        if stated != Some(unsigned) && stated != Some(signed) {
            return Err(invalid("archive: a header's checksum is wrong"));
        }
        Ok(Some(block))
    }

    fn raw_block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = Vec::with_capacity(BLOCK);
        self.input.by_ref().take(BLOCK as u64).read_to_end(&mut block)?;
        match block.len() {
            0 => {
                self.ended = true;
                Ok(None)
            }
            _ => block
                .try_into()
                .map(Some)
                .map_err(|_| io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let n = self.input.read(buf.get_mut(..want).unwrap_or_default())?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        Ok(n)
    }
}

fn check_pieces(pieces: &[(u64, u64)], size: u64, stored: u64) -> io::Result<()> {
    let mut end = 0u64;
    let mut total = 0u64;
    for (offset, length) in pieces {
        let stop = offset
            .checked_add(*length)
            .filter(|stop| *offset >= end && *stop <= size);
        end = stop.ok_or_else(|| invalid("archive: pieces of a sparse file overlap or exceed it"))?;
        total += length;
    }
    if total == stored {
        Ok(())
    } else {
        Err(invalid("archive: pieces of a sparse file do not add up"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::write::{Header, TarWriter};

    #[test]
    fn reads_what_the_writer_writes() {
        let long = [b"some/dir/".to_vec(), vec![b'n'; 300]].concat();
        let mut w = TarWriter::new(Vec::new());
        w.header(&Header {
            name: b"d/",
            typeflag: b'5',
            mode: 0o1777,
            uid: 5,
            gid: 6,
            mtime: 7,
            ..Header::default()
        })
        .unwrap();
        let xattrs = [(&b"security.capability"[..], &b"\x01\0=\n"[..])];
        let h = Header {
            name: &long,
            typeflag: b'0',
            mode: 0o4755,
            uid: 3_000_000,
            size: 1024,
            mtime: -9,
            xattrs: &xattrs,
            ..Header::default()
        };
        w.header(&h).unwrap();
        w.data(&[b'z'; 1024]).unwrap();
        w.header(&Header {
            name: b"l",
            typeflag: b'2',
            linkname: &long,
            ..Header::default()
        })
        .unwrap();
        w.header(&Header {
            name: b"c",
            typeflag: b'3',
            device: (1, 300),
            ..Header::default()
        })
        .unwrap();
        let bytes = w.finish().unwrap();
        let mut r = TarReader::new(&bytes[..]);
        let d = r.next_member().unwrap().unwrap();
        assert_eq!(
            (d.kind, d.mode, d.uid, d.gid, d.mtime.secs),
            (MemberKind::Directory, 0o1777, 5, 6, 7)
        );
        let f = r.next_member().unwrap().unwrap();
        assert_eq!((&f.name, f.uid, f.size, f.mtime.secs), (&long, 3_000_000, 1024, -9));
        assert_eq!(f.xattrs, [(b"security.capability".to_vec(), b"\x01\0=\n".to_vec())]);
        let mut data = Vec::new();
        r.read_to_end(&mut data).unwrap();
        assert_eq!(data, [b'z'; 1024]);
        assert_eq!(r.next_member().unwrap().unwrap().link, long);
        assert_eq!(r.next_member().unwrap().unwrap().device, (1, 300));
        assert!(r.next_member().unwrap().is_none());
        assert!(r.next_member().unwrap().is_none());
        for cut in (1..bytes.len() - 1024).filter(|c| c % 512 != 0) {
            let mut r = TarReader::new(&bytes[..cut]);
            let ended = loop {
                match r.next_member() {
                    Ok(Some(_)) => {}
                    other => break other,
                }
            };
            assert!(ended.is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn huge_extensions_are_refused() {
        let mut w = TarWriter::new(Vec::new());
        w.header(&Header {
            name: b"x",
            typeflag: b'x',
            size: 2 << 20,
            ..Header::default()
        })
        .unwrap();
        w.data(&vec![b'1'; 2 << 20]).unwrap();
        let bytes = w.finish().unwrap();
        assert!(TarReader::new(&bytes[..]).next_member().is_err());
        let mut w = TarWriter::new(Vec::new());
        for _ in 0..MAX_EXTENSIONS + 1 {
            w.header(&Header {
                name: b"x",
                typeflag: b'x',
                ..Header::default()
            })
            .unwrap();
        }
        let bytes = w.finish().unwrap();
        assert!(TarReader::new(&bytes[..]).next_member().is_err());
    }

    proptest::proptest! {
        /// Whatever the bytes are, reading ends with an answer and allocates little.
        #[test]
        fn garbage_never_panics(flips in proptest::collection::vec((0usize..2048, 0u8..255), 0..6)) {
            let mut w = TarWriter::new(Vec::new());
            w.header(&Header { name: b"f", typeflag: b'0', size: 3, uid: 9_999_999, ..Header::default() }).unwrap();
            w.data(b"abc").unwrap();
            let mut bytes = w.finish().unwrap();
            for (at, to) in flips {
                let n = bytes.len();
                bytes[at % n] = to;
            }
            let mut r = TarReader::new(&bytes[..]);
            while let Ok(Some(_)) = r.next_member() {}
        }
    }
}
