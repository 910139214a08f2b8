//! Where the output of steps is kept: written once, read by every view of it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Makes a place for the output of one step.
pub trait LogSpool: Send + Sync + 'static {
    /// A new, empty place. It goes away with its last handle.
    fn create(&self) -> io::Result<Arc<dyn LogFile>>;
}

/// The output of one step: appended by its writer, read at any position by anybody.
pub trait LogFile: Send + Sync + 'static {
    /// Adds bytes and returns their position.
    fn append(&self, data: &[u8]) -> io::Result<u64>;
    /// The bytes at a position that [`append`](Self::append) has returned.
    fn read(&self, offset: u64, len: usize) -> io::Result<Bytes>;
}

/// Keeps output in memory: for tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemorySpool;

#[derive(Debug, Default)]
struct MemoryFile(Mutex<Vec<u8>>);

impl LogSpool for MemorySpool {
    fn create(&self) -> io::Result<Arc<dyn LogFile>> {
        Ok(Arc::new(MemoryFile::default()))
    }
}

impl LogFile for MemoryFile {
    fn append(&self, data: &[u8]) -> io::Result<u64> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = all.len() as u64;
        all.extend_from_slice(data);
        Ok(offset)
    }

    fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let end = start.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        all.get(start..end)
            .map(Bytes::copy_from_slice)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// Keeps output in files of one directory. Each is unlinked as soon as it is open, so nothing is left behind by a crash.
#[derive(Debug)]
pub struct DirSpool {
    dir: PathBuf,
    next: AtomicU64,
}

impl DirSpool {
    /// A spool in `dir`, which must exist and belong to this process alone.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            next: AtomicU64::new(0),
        }
    }
}

#[derive(Debug)]
struct DiskFile {
    file: File,
    end: AtomicU64,
}

impl LogSpool for DirSpool {
    fn create(&self) -> io::Result<Arc<dyn LogFile>> {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.join(format!("{}-{n}.log", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Arc::new(DiskFile {
            file,
            end: AtomicU64::new(0),
        }))
    }
}

impl LogFile for DiskFile {
    fn append(&self, data: &[u8]) -> io::Result<u64> {
        let offset = self.end.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.file.write_all_at(data, offset)?;
        Ok(offset)
    }

    fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let mut buf = vec![0; len];
        self.file.read_exact_at(&mut buf, offset)?;
        Ok(buf.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spools_give_back_what_was_written_and_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let spools: [Box<dyn LogSpool>; 2] = [Box::new(MemorySpool), Box::new(DirSpool::new(dir.path()))];
        for spool in spools {
            let file = spool.create().unwrap();
            let a = file.append(b"hello").unwrap();
            let b = file.append(b"world!").unwrap();
            assert_eq!(file.read(b, 6).unwrap(), "world!");
            assert_eq!(file.read(a, 5).unwrap(), "hello");
            assert!(file.read(b, 100).is_err());
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
