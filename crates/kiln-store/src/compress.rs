//! Compression of layers: block-parallel gzip, zstd, none; and reading whatever an archive happens to be packed in.
//!
//! What is written does not depend on the number of cores: input is cut into blocks of fixed size, and each block is
//! compressed on its own with the last 32 KiB before it as dictionary. The result is one gzip member, so a reader that
//! stops after the first member loses nothing.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use flate2::{Compress, FlushCompress, Status};
use serde::{Deserialize, Serialize};

/// How a layer is packed for the outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Not at all: digest and diff id are equal.
    Uncompressed,
    /// gzip, readable everywhere.
    #[default]
    Gzip,
    /// zstd: smaller and faster, for consumers that know it.
    Zstd,
}

impl Algorithm {
    /// The name that exporter options use.
    pub fn as_str(self) -> &'static str {
        match self {
            Algorithm::Uncompressed => "uncompressed",
            Algorithm::Gzip => "gzip",
            Algorithm::Zstd => "zstd",
        }
    }
}

impl std::str::FromStr for Algorithm {
    type Err = crate::StoreError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "uncompressed" => Ok(Algorithm::Uncompressed),
            "gzip" => Ok(Algorithm::Gzip),
            "zstd" => Ok(Algorithm::Zstd),
            other => Err(crate::StoreError::Invalid(format!(
                "unsupported compression type {other}"
            ))),
        }
    }
}

impl std::fmt::Display for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An algorithm and how hard it tries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Compression {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// The algorithm's own level; `None` is its usual one (gzip 6, zstd 3).
    pub level: Option<i32>,
}

impl From<Algorithm> for Compression {
    fn from(algorithm: Algorithm) -> Self {
        Compression { algorithm, level: None }
    }
}

/// Input of one gzip block.
const BLOCK: usize = 1 << 20;
/// How far back a deflate stream may refer.
const WINDOW: usize = 32 << 10;

/// A writer that compresses what it is given. It must be [`finish`](Compressor::finish)ed.
pub struct Compressor<W: Write>(Inner<W>);

enum Inner<W: Write> {
    Plain(W),
    Gzip(Box<ParallelGzip<W>>),
    Zstd(Box<zstd::stream::write::Encoder<'static, W>>),
}

impl<W: Write> Compressor<W> {
    /// Compresses into `out` by up to `threads` threads.
    ///
    /// # Errors
    /// If a thread or the codec cannot be set up, or `out` does not take the header.
    pub fn new(compression: Compression, threads: usize, out: W) -> io::Result<Self> {
        let threads = threads.clamp(1, 64);
        Ok(Compressor(match compression.algorithm {
            Algorithm::Uncompressed => Inner::Plain(out),
            Algorithm::Gzip => {
                let level = compression.level.unwrap_or(6).clamp(0, 9) as u32;
                Inner::Gzip(Box::new(ParallelGzip::new(out, level, threads)?))
            }
            Algorithm::Zstd => {
                let level = compression.level.unwrap_or(3).clamp(1, 22);
                let mut encoder = zstd::stream::write::Encoder::new(out, level)?;
                // At least one worker, also on one core: with none the library frames its output differently.
                encoder.multithread(threads as u32)?;
                Inner::Zstd(Box::new(encoder))
            }
        }))
    }

    /// Writes what is left and gives the inner writer back.
    pub fn finish(self) -> io::Result<W> {
        match self.0 {
            Inner::Plain(out) => Ok(out),
            Inner::Gzip(gzip) => gzip.finish(),
            Inner::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Inner::Plain(out) => out.write(buf),
            Inner::Gzip(gzip) => gzip.take(buf),
            Inner::Zstd(encoder) => encoder.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // Flushing the codecs would make the output depend on when it is called.
        match &mut self.0 {
            Inner::Plain(out) => out.flush(),
            _ => Ok(()),
        }
    }
}

struct Job {
    data: Vec<u8>,
    dictionary: Vec<u8>,
    last: bool,
    done: Sender<io::Result<Packed>>,
}

struct Packed {
    bytes: Vec<u8>,
    crc: crc32fast::Hasher,
    buffer: Vec<u8>,
}

struct ParallelGzip<W> {
    out: W,
    block: Vec<u8>,
    dictionary: Vec<u8>,
    jobs: Option<Sender<Job>>,
    waiting: VecDeque<Receiver<io::Result<Packed>>>,
    spare: Vec<Vec<u8>>,
    workers: Vec<JoinHandle<()>>,
    ahead: usize,
    crc: crc32fast::Hasher,
    length: u32,
}

impl<W: Write> ParallelGzip<W> {
    fn new(mut out: W, level: u32, threads: usize) -> io::Result<Self> {
        // No name, no time, operating system unknown, as Go's writer has it.
        out.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255])?;
        let (jobs, queue) = bounded::<Job>(threads);
        let mut workers = Vec::with_capacity(threads);
        for _ in 0..threads {
            let queue = queue.clone();
            let work = move || gzip_worker(level, &queue);
            workers.push(std::thread::Builder::new().name("gzip".into()).spawn(work)?);
        }
        Ok(ParallelGzip {
            out,
            block: Vec::with_capacity(BLOCK),
            dictionary: Vec::new(),
            jobs: Some(jobs),
            waiting: VecDeque::new(),
            spare: Vec::new(),
            workers,
            ahead: threads * 2,
            crc: crc32fast::Hasher::new(),
            length: 0,
        })
    }

    fn take(&mut self, buf: &[u8]) -> io::Result<usize> {
        // A full block leaves only when more follows, since the last one is ended differently.
        if self.block.len() == BLOCK && !buf.is_empty() {
            self.submit(false)?;
        }
        let n = buf.len().min(BLOCK - self.block.len());
        self.block.extend_from_slice(buf.get(..n).unwrap_or_default());
        Ok(n)
    }

    fn submit(&mut self, last: bool) -> io::Result<()> {
        while self.waiting.len() >= self.ahead {
            self.collect()?;
        }
        let mut next = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(BLOCK));
        next.clear();
        let data = std::mem::replace(&mut self.block, next);
        let tail = data
            .get(data.len().saturating_sub(WINDOW)..)
            .unwrap_or_default()
            .to_vec();
        let dictionary = std::mem::replace(&mut self.dictionary, tail);
        self.length = self.length.wrapping_add(data.len() as u32);
        let (done, result) = bounded(1);
        let gone = || io::Error::other("compression thread ended");
        self.jobs
            .as_ref()
            .ok_or_else(gone)?
            .send(Job {
                data,
                dictionary,
                last,
                done,
            })
            .map_err(|_| gone())?;
        self.waiting.push_back(result);
        Ok(())
    }

    fn collect(&mut self) -> io::Result<()> {
        let Some(result) = self.waiting.pop_front() else {
            return Ok(());
        };
        let packed = result
            .recv()
            .map_err(|_| io::Error::other("compression thread ended"))??;
        self.out.write_all(&packed.bytes)?;
        self.crc.combine(&packed.crc);
        self.spare.push(packed.buffer);
        Ok(())
    }

    fn finish(mut self) -> io::Result<W> {
        self.submit(true)?;
        while !self.waiting.is_empty() {
            self.collect()?;
        }
        self.jobs = None;
        for worker in self.workers {
            worker
                .join()
                .map_err(|_| io::Error::other("compression thread panicked"))?;
        }
        self.out.write_all(&self.crc.finalize().to_le_bytes())?;
        self.out.write_all(&self.length.to_le_bytes())?;
        Ok(self.out)
    }
}

fn gzip_worker(level: u32, queue: &Receiver<Job>) {
    let mut codec = Compress::new(flate2::Compression::new(level), false);
    while let Ok(job) = queue.recv() {
        let result = deflate_block(&mut codec, &job).map(|bytes| {
            let mut crc = crc32fast::Hasher::new();
            crc.update(&job.data);
            Packed {
                bytes,
                crc,
                buffer: job.data,
            }
        });
        // The other side is gone when the whole write was given up.
        let _ = job.done.send(result);
    }
}

fn deflate_block(codec: &mut Compress, job: &Job) -> io::Result<Vec<u8>> {
    codec.reset();
    if !job.dictionary.is_empty() {
        codec.set_dictionary(&job.dictionary).map_err(io::Error::other)?;
    }
    let mut out = Vec::with_capacity(job.data.len() / 2 + 1024);
    let flush = if job.last {
        FlushCompress::Finish
    } else {
        FlushCompress::Sync
    };
    loop {
        if out.capacity() - out.len() < 1024 {
            out.reserve(64 << 10);
        }
        let rest = job.data.get(codec.total_in() as usize..).unwrap_or_default();
        let status = codec.compress_vec(rest, &mut out, flush).map_err(io::Error::other)?;
        let all_in = codec.total_in() as usize == job.data.len();
        if all_in && (status == Status::StreamEnd || (!job.last && out.len() < out.capacity())) {
            return Ok(out);
        }
    }
}

/// How an archive that was found somewhere is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    None,
    /// gzip, one member or several.
    Gzip,
    /// zstd frames.
    Zstd,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
}

impl Packing {
    /// Tells the packing from the first bytes.
    pub fn sniff(head: &[u8]) -> Self {
        const MAGIC: [(&[u8], Packing); 4] = [
            (&[0x1f, 0x8b], Packing::Gzip),
            (&[0x28, 0xb5, 0x2f, 0xfd], Packing::Zstd),
            (b"BZh", Packing::Bzip2),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Packing::Xz),
        ];
        let skippable = matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
        match MAGIC.iter().find(|(magic, _)| head.starts_with(magic)) {
            Some((_, packing)) => *packing,
            None if skippable => Packing::Zstd,
            None => Packing::None,
        }
    }
}

/// Reads the content of `input`, whatever it is packed in; the packing is told by its first bytes.
///
/// # Errors
/// I/O errors of the first read. Damage shows when reading.
pub fn unpack<'r>(input: impl Read + Send + 'r) -> io::Result<(Packing, Box<dyn Read + Send + 'r>)> {
    let mut input = BufReader::with_capacity(256 << 10, Prefixed::new(input)?);
    let packing = Packing::sniff(input.fill_buf()?);
    let reader: Box<dyn Read + Send + 'r> = match packing {
        Packing::None => Box::new(input),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Packing::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(input)?),
        Packing::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
        Packing::Xz => Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(input)),
    };
    Ok((packing, reader))
}

/// A reader whose first read returns at least the bytes that tell the packing, if there are that many.
struct Prefixed<R> {
    head: Vec<u8>,
    input: R,
}

impl<R: Read> Prefixed<R> {
    fn new(mut input: R) -> io::Result<Self> {
        let mut head = Vec::with_capacity(8);
        input.by_ref().take(8).read_to_end(&mut head)?;
        Ok(Prefixed { head, input })
    }
}

impl<R: Read> Read for Prefixed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.head.is_empty() {
            return self.input.read(buf);
        }
        let n = self.head.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..n), self.head.get(..n)) {
            to.copy_from_slice(from);
        }
        self.head.drain(..n);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(len: usize) -> Vec<u8> {
        let mut x = 12345u32;
        (0..len)
            .map(|i| {
                x = x.wrapping_mul(1664525).wrapping_add(1013904223);
                if (i / 4096) % 3 == 0 {
                    (x >> 24) as u8
                } else {
                    (i / 97) as u8
                }
            })
            .collect()
    }

    fn pack(kind: Algorithm, threads: usize, data: &[u8], step: usize) -> Vec<u8> {
        let mut c = Compressor::new(kind.into(), threads, Vec::new()).unwrap();
        for part in data.chunks(step.max(1)) {
            c.write_all(part).unwrap();
        }
        c.finish().unwrap()
    }

    #[test]
    fn same_bytes_for_any_number_of_threads_and_any_write_size() {
        for len in [0, 1, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 9 * BLOCK + 77] {
            let data = sample(len);
            for kind in [Algorithm::Uncompressed, Algorithm::Gzip, Algorithm::Zstd] {
                let one = pack(kind, 1, &data, 1 << 16);
                assert_eq!(one, pack(kind, 2, &data, 12_345), "{kind} {len}");
                assert_eq!(one, pack(kind, 7, &data, 5 << 20), "{kind} {len}");
                let (packing, mut reader) = unpack(&one[..]).unwrap();
                let mut back = Vec::new();
                reader.read_to_end(&mut back).unwrap();
                assert!(back == data, "{kind} {len}");
                if len > 100 {
                    let want = [Packing::None, Packing::Gzip, Packing::Zstd][kind as usize];
                    assert_eq!(packing, want);
                }
            }
        }
    }

    #[test]
    fn one_member_with_a_plain_header() {
        let data = sample(3 * BLOCK);
        let packed = pack(Algorithm::Gzip, 2, &data, 1 << 16);
        assert_eq!(&packed[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255]);
        let mut back = Vec::new();
        flate2::read::GzDecoder::new(&packed[..])
            .read_to_end(&mut back)
            .unwrap();
        assert!(back == data, "a reader of one member sees everything");
    }

    #[test]
    fn damage_and_truncation_are_errors() {
        let data = sample(2 * BLOCK);
        for kind in [Algorithm::Gzip, Algorithm::Zstd] {
            let packed = pack(kind, 2, &data, 1 << 16);
            for cut in [packed.len() - 1, packed.len() / 2, 20] {
                let (_, mut reader) = unpack(&packed[..cut]).unwrap();
                assert!(reader.read_to_end(&mut Vec::new()).is_err(), "{kind} cut at {cut}");
            }
        }
    }

    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from(io::ErrorKind::StorageFull))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_failing_writer_is_reported() {
        assert!(Compressor::new(Algorithm::Gzip.into(), 2, Full).is_err());
        let mut c = Compressor::new(Algorithm::Zstd.into(), 2, Full).unwrap();
        let failed = c.write_all(&sample(40 << 20)).is_err() || c.finish().is_err();
        assert!(failed);
    }
}
