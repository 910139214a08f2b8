//! The journal in front of the tables: commits that the engine may still hold in the memory of the process.
//!
//! Files `journal.<n>`, `n` rising. An entry is its length (u32), the xxh3 of its body (u64), then the body:
//! the sum over all tables after the commit (u64, see `Index`), and for each change the table's byte, key length and key (u32), and value length plus one and value (u32; 0 means removed). All
//! numbers are little-endian.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::{Change, Table};
use crate::error::{IoContext as _, Result};

/// Entries larger than this are not believed.
const MAX_ENTRY: usize = 256 << 20;

/// The file commits are appended to.
pub(super) struct Journal {
    dir: PathBuf,
    file: File,
    number: u64,
    length: u64,
    /// Bytes of a failed append at the end, to be cut off before the next one.
    torn: bool,
}

/// One commit as it was written, with the sum over all tables after it.
pub(super) struct Entry {
    pub(super) changes: Vec<Change>,
    pub(super) sum: u64,
}

type Opened = (Journal, Vec<Entry>, Option<PathBuf>);

impl Journal {
    /// Reads what is there (oldest first) and starts a new file. The third value names a file with an incomplete end.
    pub(super) fn open(dir: &Path) -> Result<Opened> {
        let mut batches = Vec::new();
        let mut torn = None;
        let numbers = numbers(dir)?;
        for number in &numbers {
            let path = path(dir, *number);
            let raw = fs::read(&path).during("read", &path)?;
            if !parse(&raw, &mut batches) {
                torn = Some(path);
                break;
            }
        }
        let number = numbers.last().map_or(0, |n| n + 1);
        let file = create(dir, number)?;
        Ok((
            Self {
                dir: dir.to_owned(),
                file,
                number,
                length: 0,
                torn: false,
            },
            batches,
            torn,
        ))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends one commit with one `write`.
    pub(super) fn append(&mut self, changes: &[Change], sum: u64) -> Result<()> {
        let path = path(&self.dir, self.number);
        if self.torn {
            self.file.set_len(self.length).during("truncate", &path)?;
            self.torn = false;
        }
        let entry = encode(changes, sum);
        if let Err(error) = self.file.write_all(&entry) {
            self.torn = true;
            return Err(error).during("write", &path);
        }
        self.length += entry.len() as u64;
        Ok(())
    }

    /// Starts a new file; returns the number of the newest file that is complete now.
    pub(super) fn rotate(&mut self) -> Result<u64> {
        let sealed = self.number;
        self.file = create(&self.dir, sealed + 1)?;
        self.number = sealed + 1;
        self.length = 0;
        self.torn = false;
        Ok(sealed)
    }

    /// Removes files up to and including `sealed`: the tables hold their commits durably.
    pub(super) fn forget(dir: &Path, sealed: u64) -> Result<()> {
        for number in numbers(dir)?.into_iter().filter(|n| *n <= sealed) {
            let path = path(dir, number);
            fs::remove_file(&path).during("remove", &path)?;
        }
        Ok(())
    }
}

fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("journal.{number}"))
}

fn create(dir: &Path, number: u64) -> Result<File> {
    let path = path(dir, number);
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .during("create", &path)
}

fn numbers(dir: &Path) -> Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).during("list", dir)? {
        let entry = entry.during("list", dir)?;
        let number: Option<u64> = entry
            .file_name()
            .to_str()
            .and_then(|n| n.strip_prefix("journal."))
            .and_then(|n| n.parse().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn encode(changes: &[Change], sum: u64) -> Vec<u8> {
    let mut out = vec![0; 12];
    out.extend_from_slice(&sum.to_le_bytes());
    for change in changes {
        out.push(change.table.code());
        put_bytes(&mut out, &change.key, 0);
        match &change.value {
            Some(value) => put_bytes(&mut out, value, 1),
            None => out.extend_from_slice(&0u32.to_le_bytes()),
        }
    }
    let body = out.get(12..).unwrap_or_default();
    let (length, sum) = ((body.len() as u32).to_le_bytes(), xxh3_64(body).to_le_bytes());
    if let Some((head, _)) = out.split_first_chunk_mut::<12>() {
        let (a, b) = head.split_at_mut(4);
        a.copy_from_slice(&length);
        b.copy_from_slice(&sum);
    }
    out
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8], plus: u32) {
    out.extend_from_slice(&(bytes.len() as u32 + plus).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Adds every whole entry; `false` if something at the end is not one.
fn parse(mut raw: &[u8], batches: &mut Vec<Entry>) -> bool {
    while !raw.is_empty() {
        let Some((body, rest)) = take_entry(raw) else {
            return false;
        };
        let Some((sum, changes)) = body.split_first_chunk::<8>() else {
            return false;
        };
        let Some(changes) = parse_body(changes) else {
            return false;
        };
        batches.push(Entry {
            changes,
            sum: u64::from_le_bytes(*sum),
        });
        raw = rest;
    }
    true
}

fn take_entry(raw: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = take_u32(raw)?;
    let (sum, rest) = rest.split_first_chunk::<8>()?;
    let length = usize::try_from(length).ok().filter(|n| *n <= MAX_ENTRY)?;
    let (body, rest) = rest.split_at_checked(length)?;
    (xxh3_64(body) == u64::from_le_bytes(*sum)).then_some((body, rest))
}

fn parse_body(mut body: &[u8]) -> Option<Vec<Change>> {
    let mut changes = Vec::new();
    while let Some((code, rest)) = body.split_first() {
        let table = Table::from_code(*code)?;
        let (key_length, rest) = take_u32(rest)?;
        let (key, rest) = rest.split_at_checked(key_length as usize)?;
        let (value_length, rest) = take_u32(rest)?;
        let (value, rest) = match value_length.checked_sub(1) {
            None => (None, rest),
            Some(n) => {
                let (value, rest) = rest.split_at_checked(n as usize)?;
                (Some(value.to_vec()), rest)
            }
        };
        changes.push(Change {
            table,
            key: key.to_vec(),
            value,
        });
        body = rest;
    }
    Some(changes)
}

fn take_u32(raw: &[u8]) -> Option<(u32, &[u8])> {
    let (head, rest) = raw.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*head), rest))
}
