//! The stream of a layer on its way from packed bytes to members: unpacked and hashed by one thread, read by another.

use std::io::{self, Read};

use crossbeam_channel::{Receiver, Sender};
use kiln_fs::Stop;
use kiln_oci::{DiffId, Digest};

use crate::compress::unpack;
use crate::error::{Result, StoreError};

/// Unpacks `input` into chunks and hashes them all; the result is the diff id and the unpacked length.
pub(super) fn unpack_and_hash(input: impl Read + Send, out: &Sender<Vec<u8>>, stop: &Stop) -> Result<(DiffId, u64)> {
    let (_, mut reader) = unpack(input).map_err(read_error)?;
    let mut hasher = kiln_oci::digest::Hasher::new();
    let mut size = 0u64;
    loop {
        stop.check()?;
        let mut chunk = Vec::with_capacity(CHUNK);
        reader
            .by_ref()
            .take(CHUNK as u64)
            .read_to_end(&mut chunk)
            .map_err(read_error)?;
        if chunk.is_empty() {
            let digest: Digest = hasher.finish();
            return Ok((DiffId(digest), size));
        }
        hasher.update(&chunk);
        size += chunk.len() as u64;
        if out.send(chunk).is_err() {
            // The writing side gave up and has the reason.
            return Err(StoreError::Canceled);
        }
    }
}

const CHUNK: usize = 256 << 10;

/// An error of the archive itself is the caller's to see as such; anything else is I/O.
pub(super) fn read_error(e: io::Error) -> StoreError {
    match e.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
            StoreError::Invalid(format!("layer archive: {e}"))
        }
        _ => StoreError::io("read", "layer archive", e),
    }
}

/// Counts the packed bytes for the progress display.
pub(super) struct Counted<'a, R> {
    pub(super) input: R,
    pub(super) read: u64,
    pub(super) told: u64,
    pub(super) progress: Option<&'a (dyn Fn(u64) + Sync)>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buf)?;
        self.read += n as u64;
        if let Some(tell) = self.progress
            && (n == 0 || self.read - self.told >= CHUNK as u64)
        {
            self.told = self.read;
            tell(self.read);
        }
        Ok(n)
    }
}

/// Reads the chunks as one stream again.
pub(super) struct ChunkReader {
    chunks: Receiver<Vec<u8>>,
    current: io::Cursor<Vec<u8>>,
}

impl ChunkReader {
    pub(super) fn new(chunks: Receiver<Vec<u8>>) -> Self {
        ChunkReader {
            chunks,
            current: io::Cursor::new(Vec::new()),
        }
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.current.read(buf)?;
            if n > 0 || buf.is_empty() {
                return Ok(n);
            }
            match self.chunks.recv() {
                Ok(chunk) => self.current = io::Cursor::new(chunk),
                Err(_) => return Ok(0),
            }
        }
    }
}
