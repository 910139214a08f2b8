//! Copying the bytes of a file: reflink, then `copy_file_range`, then read and write.
//!
//! Linking (sharing the inode) is a decision of the tree that owns the files and is not made here.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use crate::stop::Stop;
use crate::{Error, Result};

/// How much is moved between two looks at the [`Stop`] flag.
const CHUNK: usize = 1 << 20;

/// Copies file contents and remembers which rungs of the ladder this pair of file systems does not have.
#[derive(Debug, Default)]
pub struct Copier {
    no_reflink: AtomicBool,
    no_range: AtomicBool,
}

impl Copier {
    /// A copier that has not tried anything yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Copies everything in `src` to `dst`, which must be empty and open for writing, and returns the number of bytes.
    ///
    /// # Errors
    /// I/O errors of either file, or [`Error::Stopped`]; `dst` is then incomplete.
    pub fn copy(&self, src: &File, dst: &File, stop: &Stop) -> Result<u64> {
        stop.check()?;
        if !self.no_reflink.load(Ordering::Relaxed) {
            match rustix::fs::ioctl_ficlone(dst, src) {
                Ok(()) => return Ok(dst.metadata().map_err(|e| Error::io("stat", "copied file", e))?.len()),
                Err(_) => self.no_reflink.store(true, Ordering::Relaxed),
            }
        }
        let mut done = 0;
        if !self.no_range.load(Ordering::Relaxed) {
            loop {
                match rustix::fs::copy_file_range(src, None, dst, None, CHUNK) {
                    Ok(0) if done > 0 => return Ok(done),
                    // Nothing at once: empty, or a file system (such as proc) that reports no length. Reading tells.
                    Ok(0) => break,
                    Ok(n) => done += n as u64,
                    Err(Errno::INTR) => {}
                    Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM) if done == 0 => {
                        self.no_range.store(true, Ordering::Relaxed);
                        break;
                    }
                    Err(e) => return Err(Error::io("copy", "file contents", e)),
                }
                stop.check()?;
            }
        }
        copy_by_hand(src, dst, stop)
    }
}

fn copy_by_hand(mut src: &File, mut dst: &File, stop: &Stop) -> Result<u64> {
    let mut buf = vec![0; 64 << 10];
    let mut done = 0u64;
    loop {
        let n = match src.read(&mut buf) {
            Ok(0) => return Ok(done),
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io("read", "file contents", e)),
        };
        dst.write_all(buf.get(..n).unwrap_or_default())
            .map_err(|e| Error::io("write", "file contents", e))?;
        done += n as u64;
        if done % (CHUNK as u64) < n as u64 {
            stop.check()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn copies_by_every_rung() {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7) as u8).collect();
        fs::write(dir.path().join("a"), &data).unwrap();
        for rungs in 0..3 {
            let copier = Copier::new();
            copier.no_reflink.store(rungs > 0, Ordering::Relaxed);
            copier.no_range.store(rungs > 1, Ordering::Relaxed);
            let src = File::open(dir.path().join("a")).unwrap();
            let out = dir.path().join(format!("b{rungs}"));
            let n = copier.copy(&src, &File::create(&out).unwrap(), &Stop::new()).unwrap();
            assert_eq!(n, data.len() as u64);
            assert_eq!(fs::read(out).unwrap(), data);
        }
    }

    #[test]
    fn stops() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), b"x").unwrap();
        let stop = Stop::new();
        stop.stop();
        let src = File::open(dir.path().join("a")).unwrap();
        let dst = File::create(dir.path().join("b")).unwrap();
        assert!(matches!(Copier::new().copy(&src, &dst, &stop), Err(Error::Stopped(_))));
    }
}
