//! Progress of a build on disk: a file of status messages that is written once and read by everyone who watches.
//!
//! The live stream is a view on this file, so no line is lost however slow a watcher is, memory stays flat, and a
//! finished build can be replayed after a restart. Format: frames of a little-endian `u32` length and an encoded
//! `StatusResponse`, which is also the format of the `logs` blob of a build record.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::Stream;
use kiln_proto::control::StatusResponse;
use prost::Message as _;
use tokio::sync::watch;

/// The longest frame that is read back; longer ones are not written.
const MAX_FRAME: usize = 16 << 20;

/// How far a spool has got.
#[derive(Clone, Copy, Debug, Default)]
struct Extent {
    /// Bytes written and readable.
    written: u64,
    /// Nothing will follow.
    ended: bool,
}

/// The writing end. Dropping it ends the spool.
#[derive(Debug)]
pub struct SpoolWriter {
    file: File,
    extent: watch::Sender<Extent>,
    buffer: Vec<u8>,
}

/// A spool to read from; cheap to clone.
#[derive(Clone, Debug)]
pub struct Spool {
    path: Arc<PathBuf>,
    file: Arc<File>,
    extent: watch::Receiver<Extent>,
}

/// Makes a new spool at `path`, which must not exist.
pub fn create(path: &Path) -> io::Result<(SpoolWriter, Spool)> {
    let file = File::options().create_new(true).append(true).open(path)?;
    let reader = File::open(path)?;
    let (extent, receiver) = watch::channel(Extent::default());
    let spool = Spool {
        path: Arc::new(path.to_owned()),
        file: Arc::new(reader),
        extent: receiver,
    };
    Ok((
        SpoolWriter {
            file,
            extent,
            buffer: Vec::new(),
        },
        spool,
    ))
}

impl SpoolWriter {
    /// Appends one message and shows it to readers. Blocking, but only into the page cache.
    pub fn append(&mut self, message: &StatusResponse) -> io::Result<()> {
        let len = message.encoded_len();
        if len > MAX_FRAME {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("status message of {len} bytes"),
            ));
        }
        self.buffer.clear();
        self.buffer
            .extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        message.encode_raw(&mut self.buffer);
        self.file.write_all(&self.buffer)?;
        let written = self.buffer.len() as u64;
        self.extent.send_modify(|e| e.written += written);
        Ok(())
    }
}

impl Drop for SpoolWriter {
    fn drop(&mut self) {
        self.extent.send_modify(|e| e.ended = true);
    }
}

impl Spool {
    /// Where the spool lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every message from the first on; follows a running build and ends with it.
    pub fn follow(&self) -> impl Stream<Item = io::Result<StatusResponse>> + Send + use<> {
        let Self { file, mut extent, .. } = self.clone();
        async_stream::try_stream! {
            let mut at = 0u64;
            loop {
                let now = *extent.borrow_and_update();
                while at < now.written {
                    let (next, message) = read_frame(&file, at)?;
                    at = next;
                    yield message;
                }
                if now.ended || extent.changed().await.is_err() {
                    // A sender that is gone has set `ended`; look once more for what came in between.
                    let now = *extent.borrow();
                    if at >= now.written {
                        break;
                    }
                }
            }
        }
    }
}

/// The messages of a finished spool.
pub fn replay(reader: impl Read) -> impl Iterator<Item = io::Result<StatusResponse>> {
    let mut reader = BufReader::new(reader);
    let mut ended = false;
    std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let next = next_frame(&mut reader).transpose();
        ended = !matches!(next, Some(Ok(_)));
        next
    })
}

fn next_frame(reader: &mut impl BufRead) -> io::Result<Option<StatusResponse>> {
    if reader.fill_buf()?.is_empty() {
        return Ok(None);
    }
    let mut header = [0u8; 4];
    reader.read_exact(&mut header)?;
    let mut frame = vec![0u8; frame_length(header)?];
    reader.read_exact(&mut frame)?;
    StatusResponse::decode(Bytes::from(frame))
        .map(Some)
        .map_err(io::Error::other)
}

fn frame_length(header: [u8; 4]) -> io::Result<usize> {
    let len = u32::from_le_bytes(header) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("progress frame of {len} bytes"),
        ));
    }
    Ok(len)
}

fn read_frame(file: &File, at: u64) -> io::Result<(u64, StatusResponse)> {
    let mut header = [0u8; 4];
    file.read_exact_at(&mut header, at)?;
    let len = u32::from_le_bytes(header) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("progress frame of {len} bytes"),
        ));
    }
    let mut frame = vec![0u8; len];
    file.read_exact_at(&mut frame, at + 4)?;
    let message = StatusResponse::decode(Bytes::from(frame)).map_err(io::Error::other)?;
    Ok((at + 4 + len as u64, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt as _;
    use kiln_proto::control::Vertex;

    fn message(name: &str) -> StatusResponse {
        StatusResponse {
            vertexes: vec![Vertex {
                name: name.into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn every_watcher_sees_everything_and_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spool");
        let (mut writer, spool) = create(&path).unwrap();
        writer.append(&message("a")).unwrap();
        let mut early = Box::pin(spool.follow());
        assert_eq!(early.next().await.unwrap().unwrap(), message("a"));
        let waiting = tokio::spawn(async move { early.map(|m| m.unwrap()).collect::<Vec<_>>().await });
        writer.append(&message("b")).unwrap();
        writer.append(&message("c")).unwrap();
        drop(writer);
        assert_eq!(waiting.await.unwrap(), [message("b"), message("c")]);
        let late: Vec<_> = spool.follow().map(|m| m.unwrap()).collect().await;
        assert_eq!(late, [message("a"), message("b"), message("c")]);
        let replayed: Vec<_> = replay(File::open(&path).unwrap()).map(|m| m.unwrap()).collect();
        assert_eq!(replayed, late);
    }

    #[test]
    fn a_torn_file_gives_what_is_whole_and_then_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spool");
        let (mut writer, _spool) = create(&path).unwrap();
        writer.append(&message("a")).unwrap();
        writer.append(&message("b")).unwrap();
        drop(writer);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let replayed: Vec<_> = replay(File::open(&path).unwrap()).collect();
        assert_eq!(replayed.len(), 2);
        assert_eq!(*replayed[0].as_ref().unwrap(), message("a"));
        assert!(replayed[1].is_err());
    }
}
