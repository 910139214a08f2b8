//! The tar writer: plain USTAR blocks, with a PAX header in front only where a value does not fit.
//!
//! The bytes equal those of Go's `archive/tar` for format PAX (POSIX.1-2001, pax interchange format), field by field:
//! octal numbers with leading zeros and a closing NUL, device numbers always written, two zero blocks at the end.

use std::io::{self, Write};

/// Values of one header.
#[derive(Clone, Debug, Default)]
pub struct Header<'a> {
    /// Name; directories end with a slash.
    pub name: &'a [u8],
    /// Type flag: `0` file, `1` hard link, `2` symbolic link, `3` and `4` devices, `5` directory, `6` fifo.
    pub typeflag: u8,
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of data that follow.
    pub size: u64,
    /// Modification time in seconds since 1970.
    pub mtime: i64,
    /// Target of a link.
    pub linkname: &'a [u8],
    /// Device numbers.
    pub device: (u32, u32),
    /// Extended attributes, written as `SCHILY.xattr.` records.
    pub xattrs: &'a [(&'a [u8], &'a [u8])],
}

const BLOCK: usize = 512;
const NAME: usize = 100;
const PREFIX: usize = 155;

/// Writes an archive. Data of an entry follows its header through [`data`](TarWriter::data).
#[derive(Debug)]
pub struct TarWriter<W> {
    out: W,
    /// Bytes of the current entry's data that are still to come, and the padding after them.
    left: u64,
    padding: usize,
}

impl<W: Write> TarWriter<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        TarWriter {
            out,
            left: 0,
            padding: 0,
        }
    }

    /// Writes a header; extended records come first if a value does not fit into its field.
    ///
    /// # Errors
    /// Of the writer, and if data of the entry before is missing.
    pub fn header(&mut self, h: &Header<'_>) -> io::Result<()> {
        let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        for (key, value) in [(&b"path"[..], h.name), (b"linkpath", h.linkname)] {
            if value.len() > NAME || !value.is_ascii() {
                records.push((key.to_vec(), value.to_vec()));
            }
        }
        let numbers = [
            (&b"uid"[..], i64::from(h.uid), 8),
            (b"gid", i64::from(h.gid), 8),
            (b"mtime", h.mtime, 12),
        ];
        for (key, value, width) in numbers {
            if !fits_octal(width, value) {
                records.push((key.to_vec(), value.to_string().into_bytes()));
            }
        }
        if h.size >= 1 << 33 {
            records.push((b"size".to_vec(), h.size.to_string().into_bytes()));
        }
        for (name, value) in h.xattrs {
            records.push(([b"SCHILY.xattr.", *name].concat(), value.to_vec()));
        }
        if !records.is_empty() {
            records.sort();
            let data: Vec<u8> = records.iter().flat_map(|(k, v)| record(k, v)).collect();
            self.extended(h.name, &data)?;
        }
        let mut block = Block::new();
        block.text(0, NAME, &ascii(h.name));
        self.common(block, h)
    }

    /// Writes a header without any extension unless the name needs one: the form whiteouts take. A long name is split
    /// at a slash into prefix and name.
    ///
    /// # Errors
    /// As [`header`](Self::header).
    pub fn plain_header(&mut self, h: &Header<'_>) -> io::Result<()> {
        if h.name.len() <= NAME && h.name.is_ascii() {
            return self.header(h);
        }
        let Some((prefix, name)) = split_prefix(h.name) else {
            return self.header(h);
        };
        let mut block = Block::new();
        block.text(0, NAME, name);
        block.text(345, PREFIX, prefix);
        self.common(block, h)
    }

    fn common(&mut self, mut block: Block, h: &Header<'_>) -> io::Result<()> {
        block.octal(100, 8, i64::from(h.mode));
        block.octal(108, 8, i64::from(h.uid));
        block.octal(116, 8, i64::from(h.gid));
        block.octal(124, 12, i64::try_from(h.size).unwrap_or(-1));
        block.octal(136, 12, h.mtime);
        block.text(156, 1, &[h.typeflag]);
        block.text(157, NAME, &ascii(h.linkname));
        block.octal(329, 8, i64::from(h.device.0));
        block.octal(337, 8, i64::from(h.device.1));
        self.start(block, h.size)
    }

    fn extended(&mut self, name: &[u8], data: &[u8]) -> io::Result<()> {
        // Named after the entry, inside its directory.
        let (dir, file) = match name.iter().rposition(|b| *b == b'/') {
            Some(i) => (
                name.get(..=i).unwrap_or_default(),
                name.get(i + 1..).unwrap_or_default(),
            ),
            None => (&[][..], name),
        };
        let full = kiln_match::clean(&[dir, b"/PaxHeaders.0/", file].concat());
        let full = if dir.first() == Some(&b'/') {
            &full[..]
        } else {
            full.strip_prefix(b"/").unwrap_or(&full)
        };
        let mut short = ascii(full);
        short.truncate(NAME);
        while short.last() == Some(&b'/') {
            short.pop();
        }
        let mut block = Block::new();
        block.text(0, NAME, &short);
        for at in [100, 108, 116] {
            block.octal(at, 8, 0);
        }
        block.octal(124, 12, data.len() as i64);
        block.octal(136, 12, 0);
        block.text(156, 1, b"x");
        self.start(block, data.len() as u64)?;
        self.data(data)
    }

    fn start(&mut self, mut block: Block, size: u64) -> io::Result<()> {
        self.end_entry()?;
        block.text(257, 8, b"ustar\x0000");
        block.checksum();
        self.out.write_all(&block.0)?;
        self.left = size;
        self.padding = (BLOCK - (size % BLOCK as u64) as usize) % BLOCK;
        Ok(())
    }

    /// Writes data of the current entry.
    ///
    /// # Errors
    /// If it is more than the header announced.
    pub fn data(&mut self, data: &[u8]) -> io::Result<()> {
        self.left = self
            .left
            .checked_sub(data.len() as u64)
            .ok_or_else(|| io::Error::other("more data than the archive header announced"))?;
        self.out.write_all(data)
    }

    fn end_entry(&mut self) -> io::Result<()> {
        if self.left > 0 {
            return Err(io::Error::other("less data than the archive header announced"));
        }
        let padding = std::mem::take(&mut self.padding);
        self.out.write_all([0; BLOCK].get(..padding).unwrap_or_default())
    }

    /// Ends the archive and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.end_entry()?;
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }
}

struct Block([u8; BLOCK]);

impl Block {
    fn new() -> Self {
        Block([0; BLOCK])
    }

    fn text(&mut self, at: usize, width: usize, text: &[u8]) {
        let n = text.len().min(width);
        if let (Some(field), Some(text)) = (self.0.get_mut(at..at + n), text.get(..n)) {
            field.copy_from_slice(text);
        }
        // Some readers take a cut name that ends with a slash for a directory, whatever its type says.
        if text.len() > width {
            let mut last = at + n;
            while last > at && self.0.get(last - 1) == Some(&b'/') {
                last -= 1;
                if let Some(b) = self.0.get_mut(last) {
                    *b = 0;
                }
            }
        }
    }

    /// Leading zeros, a NUL at the end; a number that does not fit is written as zero (the extended record has it).
    fn octal(&mut self, at: usize, width: usize, value: i64) {
        let value = if fits_octal(width, value) { value } else { 0 };
        let digits = format!("{value:0w$o}", w = width - 1);
        self.text(at, width, digits.as_bytes());
    }

    fn checksum(&mut self) {
        self.text(148, 8, b"        ");
        let sum: u32 = self.0.iter().map(|b| u32::from(*b)).sum();
        self.text(148, 8, format!("{sum:06o}\0 ").as_bytes());
    }
}

fn fits_octal(width: usize, value: i64) -> bool {
    value >= 0 && (width >= 22 || value < 1 << ((width - 1) * 3))
}

fn ascii(text: &[u8]) -> Vec<u8> {
    text.iter().copied().filter(u8::is_ascii).collect()
}

/// Splits a name over 100 bytes at a slash, so that what is after it fits the name field and what is before it the prefix.
fn split_prefix(name: &[u8]) -> Option<(&[u8], &[u8])> {
    if name.len() <= NAME || !name.is_ascii() {
        return None;
    }
    let mut length = name.len();
    if length > PREFIX + 1 {
        length = PREFIX + 1;
    } else if name.last() == Some(&b'/') {
        length -= 1;
    }
    let at = name
        .get(..length)?
        .iter()
        .rposition(|b| *b == b'/')
        .filter(|i| *i > 0)?;
    let (prefix, rest) = (name.get(..at)?, name.get(at + 1..)?);
    (!rest.is_empty() && rest.len() <= NAME && prefix.len() <= PREFIX).then_some((prefix, rest))
}

/// One extended record: its own length in decimal, key, value.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut size = body + body.to_string().len();
    size = body + size.to_string().len();
    let mut out = size.to_string().into_bytes();
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(h: &Header<'_>) -> Vec<u8> {
        let mut w = TarWriter::new(Vec::new());
        w.header(h).unwrap();
        w.data(&vec![b'x'; h.size as usize]).unwrap();
        w.finish().unwrap()
    }

    #[test]
    fn fields_where_they_belong() {
        let out = one(&Header {
            name: b"a/b",
            typeflag: b'0',
            mode: 0o4755,
            uid: 1000,
            size: 3,
            mtime: 1,
            ..Header::default()
        });
        assert_eq!(out.len(), 512 * 4);
        assert_eq!(&out[..4], b"a/b\0");
        assert_eq!(&out[100..108], b"0004755\0");
        assert_eq!(&out[108..116], b"0001750\0");
        assert_eq!(&out[124..136], b"00000000003\0");
        assert_eq!(&out[136..148], b"00000000001\0");
        assert_eq!(&out[257..265], b"ustar\x0000");
        assert_eq!(&out[265..329], [0; 64]);
        assert_eq!(&out[329..345], b"0000000\x000000000\0");
        let sum: u32 = out[..512]
            .iter()
            .enumerate()
            .map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) })
            .sum();
        assert_eq!(&out[148..156], format!("{sum:06o}\0 ").as_bytes());
    }

    #[test]
    fn records_count_their_own_length() {
        for len in [1, 80, 88, 89, 90, 91, 92, 93, 94, 985, 990, 991, 992, 993, 994, 995] {
            let r = record(b"path", &vec![b'y'; len]);
            let digits = r.iter().position(|b| *b == b' ').unwrap();
            assert_eq!(
                std::str::from_utf8(&r[..digits]).unwrap().parse::<usize>().unwrap(),
                r.len()
            );
        }
    }

    #[test]
    fn long_and_foreign_names_get_a_record() {
        let long = [b"d/".to_vec(), vec![b'n'; 120], b"/".to_vec()].concat();
        let out = one(&Header {
            name: &long,
            typeflag: b'5',
            ..Header::default()
        });
        assert_eq!(out[156], b'x');
        assert!(out[..100].starts_with(b"d/nnn"));
        assert!(out[512..1024].starts_with(b"133 path=d/nnn"));
        let out = one(&Header {
            name: "é".as_bytes(),
            typeflag: b'0',
            ..Header::default()
        });
        assert_eq!(&out[..13], b"PaxHeaders.0\0");
        let out = one(&Header {
            name: b"f",
            typeflag: b'0',
            uid: 1 << 21,
            mtime: -5,
            ..Header::default()
        });
        assert!(out[512..].starts_with(b"12 mtime=-5\n15 uid=2097152\n"));
    }

    #[test]
    fn whiteouts_are_split_like_ustar() {
        let name = [vec![b'a'; 90], b"/".to_vec(), vec![b'b'; 60]].concat();
        let mut w = TarWriter::new(Vec::new());
        w.plain_header(&Header {
            name: &name,
            typeflag: b'0',
            ..Header::default()
        })
        .unwrap();
        let out = w.finish().unwrap();
        assert_eq!(out[156], b'0');
        assert_eq!(&out[..61], [vec![b'b'; 60], vec![0]].concat());
        assert_eq!(&out[345..435], vec![b'a'; 90]);
    }

    #[test]
    fn announced_sizes_hold() {
        let mut w = TarWriter::new(Vec::new());
        w.header(&Header {
            name: b"f",
            typeflag: b'0',
            size: 2,
            ..Header::default()
        })
        .unwrap();
        assert!(w.data(b"abc").is_err());
        let mut w = TarWriter::new(Vec::new());
        w.header(&Header {
            name: b"f",
            typeflag: b'0',
            size: 2,
            ..Header::default()
        })
        .unwrap();
        assert!(w.finish().is_err());
    }
}
