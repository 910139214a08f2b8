//! A manifest as bytes: prefix-compressed paths, variable-length numbers, a version in front and a checksum behind.

use super::{Entry, Kind, Manifest};
use crate::error::{Result, StoreError};

impl Manifest {
    /// The manifest as bytes, with version and checksum.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.entries.len() * 48 + 32);
        out.extend_from_slice(MAGIC);
        varint(&mut out, self.entries.len() as u64);
        let mut before: &[u8] = &[];
        for e in &self.entries {
            let shared = before.iter().zip(e.path.iter()).take_while(|(a, b)| a == b).count();
            let flags = [e.opaque, e.unchanged, !e.xattrs.is_empty(), e.link_group != 0];
            let bits = flags
                .iter()
                .enumerate()
                .map(|(i, f)| u8::from(*f) << (i + 4))
                .sum::<u8>();
            out.push(e.kind.code() | bits);
            varint(&mut out, shared as u64);
            bytes(&mut out, e.path.get(shared..).unwrap_or_default());
            varint(&mut out, u64::from(e.mode));
            varint(&mut out, u64::from(e.uid));
            varint(&mut out, u64::from(e.gid));
            varint(&mut out, ((e.mtime.secs << 1) ^ (e.mtime.secs >> 63)) as u64);
            varint(&mut out, u64::from(e.mtime.nanos));
            match e.kind {
                Kind::Regular => varint(&mut out, e.size),
                Kind::Symlink => bytes(&mut out, &e.target),
                Kind::CharDevice | Kind::BlockDevice => varint(&mut out, e.rdev),
                _ => {}
            }
            if e.link_group != 0 {
                varint(&mut out, u64::from(e.link_group));
            }
            if !e.xattrs.is_empty() {
                varint(&mut out, e.xattrs.len() as u64);
                for (name, value) in &e.xattrs {
                    bytes(&mut out, name);
                    bytes(&mut out, value);
                }
            }
            before = &e.path;
        }
        let sum = xxhash_rust::xxh3::xxh3_64(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the bytes are of another version, damaged, or no valid manifest.
    pub fn decode(data: &[u8]) -> Result<Self> {
        let damaged = |what: &str| StoreError::Invalid(format!("manifest: {what}"));
        let body = data.len().checked_sub(8).and_then(|n| data.split_at_checked(n));
        let Some((body, sum)) = body else {
            return Err(damaged("too short"));
        };
        if xxhash_rust::xxh3::xxh3_64(body).to_le_bytes() != sum {
            return Err(damaged("checksum does not match"));
        }
        let Some(rest) = body.strip_prefix(MAGIC) else {
            return Err(damaged("unknown version"));
        };
        let mut cursor = Cursor(rest);
        let entries = cursor.entries().ok_or_else(|| damaged("does not parse"))?;
        Manifest::new(entries)
    }
}

const MAGIC: &[u8] = b"kiln-manifest-1\n";

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn bytes(out: &mut Vec<u8>, data: &[u8]) {
    varint(out, data.len() as u64);
    out.extend_from_slice(data);
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let b = self.byte()?;
            value |= u64::from(b & 0x7f) << shift;
            if b < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn number(&mut self) -> Option<u32> {
        self.varint()?.try_into().ok()
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.varint()?).ok()?;
        let (data, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(data)
    }

    fn entries(&mut self) -> Option<Vec<Entry>> {
        let count = self.varint()?;
        let mut out: Vec<Entry> = Vec::with_capacity(count.min(self.0.len() as u64 / 8) as usize);
        for _ in 0..count {
            let flags = self.byte()?;
            let kind = *Kind::ALL.get(usize::from(flags & 15))?;
            let shared = usize::try_from(self.varint()?).ok()?;
            let mut path = out.last().map_or(Some(&[][..]), |e| e.path.get(..shared))?.to_vec();
            path.extend_from_slice(self.bytes()?);
            let mut e = Entry::new(path, kind);
            (e.mode, e.uid, e.gid) = (self.number()?, self.number()?, self.number()?);
            let zigzag = self.varint()?;
            e.mtime.secs = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
            e.mtime.nanos = self.number()?;
            match kind {
                Kind::Regular => e.size = self.varint()?,
                Kind::Symlink => e.target = self.bytes()?.into(),
                Kind::CharDevice | Kind::BlockDevice => e.rdev = self.varint()?,
                _ => {}
            }
            e.opaque = flags & 16 != 0;
            e.unchanged = flags & 32 != 0;
            if flags & 128 != 0 {
                e.link_group = self.number()?;
            }
            if flags & 64 != 0 {
                for _ in 0..self.varint()? {
                    let name = self.bytes()?;
                    e.xattrs.push((name.into(), self.bytes()?.into()));
                }
            }
            out.push(e);
        }
        self.0.is_empty().then_some(out)
    }
}
