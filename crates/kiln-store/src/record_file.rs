//! Records beside what they describe: small JSON files with a version and a checksum, replaced as a whole.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{IoContext as _, Result, StoreError};

/// Numbers drafts: every writer has its own. What a killed process leaves goes with the directory it lies in, or at the
/// next start.
static DRAFTS: AtomicU64 = AtomicU64::new(0);

/// Version written in front of every record file and every index value.
pub(crate) const VERSION: u8 = 1;

/// Wraps a payload: version, little-endian xxh3 of the payload, payload.
pub(crate) fn seal(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 9);
    out.push(VERSION);
    out.extend_from_slice(&xxh3_64(payload).to_le_bytes());
    out.extend_from_slice(payload);
    out
}

/// The payload of what [`seal`] made, or what is wrong with it.
pub(crate) fn unseal(raw: &[u8]) -> Result<&[u8], &'static str> {
    let (version, rest) = raw.split_first().ok_or("empty")?;
    if *version != VERSION {
        return Err("unknown version");
    }
    let (sum, payload) = rest.split_first_chunk::<8>().ok_or("truncated")?;
    if xxh3_64(payload) == u64::from_le_bytes(*sum) {
        Ok(payload)
    } else {
        Err("checksum mismatch")
    }
}

/// Encodes a value for the index or a record file.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let payload = serde_json::to_vec(value).map_err(|e| StoreError::Invalid(format!("encode record: {e}")))?;
    Ok(seal(&payload))
}

/// Decodes what [`encode`] made.
pub(crate) fn decode<T: DeserializeOwned>(raw: &[u8]) -> Result<T, String> {
    let payload = unseal(raw)?;
    serde_json::from_slice(payload).map_err(|e| e.to_string())
}

/// Writes `value` to `path`: first a neighbour with a dot in front, then a rename, so a reader sees all or nothing.
/// Not durable by itself (see `epoch.rs`). Returns the disk space of the file in bytes.
///
/// Writers of one path do not disturb each other, but which of them is last is for the caller to decide.
pub(crate) fn write<T: Serialize>(path: &Path, value: &T) -> Result<u64> {
    let raw = encode(value)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = DRAFTS.fetch_add(1, Ordering::Relaxed);
    let draft = path.with_file_name(format!(".{name}.{number}.new"));
    let written = (|| {
        let mut file = File::create(&draft).during("create", &draft)?;
        file.write_all(&raw).during("write", &draft)?;
        drop(file);
        fs::rename(&draft, path).during("rename", &draft)
    })();
    if let Err(error) = written {
        let _ = fs::remove_file(&draft);
        return Err(error);
    }
    Ok(raw.len() as u64)
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// [`StoreError::Io`] if the file cannot be read, [`StoreError::Damaged`] if it is not a whole record.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let raw = fs::read(path).during("read", path)?;
    decode(&raw).map_err(|reason| StoreError::Damaged {
        path: path.to_owned(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_of_one_record_do_not_disturb_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        std::thread::scope(|scope| {
            for writer in 0..8u32 {
                let path = &path;
                scope.spawn(move || {
                    for n in 0..50u32 {
                        write(path, &vec![writer; n as usize * 40]).unwrap();
                        let seen = read::<Vec<u32>>(path).unwrap();
                        assert!(seen.iter().all(|v| Some(v) == seen.first()), "records are mixed");
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "drafts are left");
    }

    #[test]
    fn flipped_bytes_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        write(&path, &vec![1u32, 2, 3]).unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), [1, 2, 3]);
        let good = fs::read(&path).unwrap();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x40;
            fs::write(&path, &bad).unwrap();
            assert!(
                matches!(read::<Vec<u32>>(&path), Err(StoreError::Damaged { .. })),
                "byte {i}"
            );
        }
        for n in 0..good.len() {
            fs::write(&path, &good[..n]).unwrap();
            assert!(read::<Vec<u32>>(&path).is_err(), "cut at {n}");
        }
    }
}
