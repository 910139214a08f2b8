//! File contents on their way to disk: messages are gathered while the disk is busy and written in batches on blocking
//! threads, several lanes side by side.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};

use bytes::Bytes;
use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::Entry;
use super::disk::{Listing, Target, apply_metadata};
use super::receive::Event;
use crate::error::{Result, SessionError};

/// Messages handled by one trip to a blocking thread.
const BATCH: usize = 256;

/// Files one lane has open at once. Senders interleave a handful.
const MAX_OPEN: usize = 256;

/// One file whose content is wanted: from the sender, or (for its digest only) from disk.
#[derive(Debug)]
pub(crate) struct FileJob {
    /// The sender's number for it.
    pub(crate) id: u32,
    /// Whether the sender is asked. Otherwise the file is there and only its digest is missing.
    pub(crate) fetch: bool,
    index: usize,
    path: String,
    size: u64,
    mode: u32,
    owner: Option<(u32, u32)>,
    mtime: i64,
    xattrs: std::collections::BTreeMap<String, Bytes>,
    /// Kept to compute the digest's prefix again, should the size turn out different.
    entry: Option<Box<Entry>>,
}

impl FileJob {
    pub(crate) fn new(target: &Target, entry: &Entry, index: usize, id: u32, fetch: bool) -> Self {
        FileJob {
            id,
            fetch,
            index,
            path: entry.path.clone(),
            size: entry.size,
            mode: entry.mode,
            owner: target.owner_of(entry.uid, entry.gid),
            mtime: entry.mtime,
            xattrs: entry.xattrs.clone(),
            entry: target.digest.is_some().then(|| Box::new(entry.clone())),
        }
    }
}

/// What became of a [`FileJob`].
#[derive(Debug)]
pub(crate) struct FileDone {
    pub(crate) index: usize,
    pub(crate) size: u64,
    pub(crate) digest: Option<[u8; 32]>,
}

/// What a lane is told.
#[derive(Debug)]
pub(crate) enum FileMessage {
    /// This file will arrive.
    Job(FileJob),
    /// Bytes of a file; none means that it is complete.
    Data(u32, Bytes, OwnedSemaphorePermit),
}

/// A file that is being written.
struct Open {
    file: File,
    hasher: Option<Sha256>,
    written: u64,
}

/// The blocking side of one lane.
pub(crate) struct FileLane {
    target: Target,
    expected: HashMap<u32, FileJob>,
    open: HashMap<u32, Open>,
    done: Vec<FileDone>,
}

impl FileLane {
    pub(crate) fn new(target: Target) -> Self {
        FileLane {
            target,
            expected: HashMap::new(),
            open: HashMap::new(),
            done: Vec::new(),
        }
    }

    /// Handles a batch; returns how many files became complete.
    fn run(&mut self, batch: Vec<FileMessage>) -> Result<u64> {
        let mut complete = 0;
        for message in batch {
            if self.target.stop.is_stopped() {
                return Err(SessionError::Canceled("receive directory".to_owned()));
            }
            match message {
                FileMessage::Job(job) if job.fetch => {
                    self.expected.insert(job.id, job);
                }
                FileMessage::Job(job) => {
                    let (digest, size) = self.digest_of(&job, job.size)?;
                    self.done.push(FileDone {
                        index: job.index,
                        size,
                        digest,
                    });
                    complete += 1;
                }
                FileMessage::Data(id, data, _permit) if data.is_empty() => {
                    self.complete(id)?;
                    complete += 1;
                }
                FileMessage::Data(id, data, _permit) => self.append(id, &data)?,
            }
        }
        Ok(complete)
    }

    fn append(&mut self, id: u32, data: &[u8]) -> Result<()> {
        let job = self.expected.get(&id).ok_or_else(|| unexpected(id))?;
        if !self.open.contains_key(&id) {
            if self.open.len() >= MAX_OPEN {
                return Err(SessionError::protocol(
                    "receive directory",
                    "the sender interleaves too many files",
                ));
            }
            let open = create(&self.target, job)?;
            self.open.insert(id, open);
        }
        let Some(open) = self.open.get_mut(&id) else {
            return Ok(());
        };
        if let Some(hasher) = &mut open.hasher {
            hasher.update(data);
        }
        open.written += data.len() as u64;
        open.file
            .write_all(data)
            .map_err(|error| SessionError::io(format!("write {}", job.path), error))
    }

    fn complete(&mut self, id: u32) -> Result<()> {
        let job = self.expected.remove(&id).ok_or_else(|| unexpected(id))?;
        let open = match self.open.remove(&id) {
            Some(open) => open,
            None => create(&self.target, &job)?,
        };
        apply_metadata(&open.file, job.mode, job.owner, job.mtime, &job.xattrs)
            .map_err(|error| SessionError::io(format!("write {}", job.path), error))?;
        drop(open.file);
        let digest = match open.hasher {
            // The file changed while it was sent: what the digest begins with says the wrong size.
            Some(_) if open.written != job.size => self.digest_of(&job, open.written)?.0,
            hasher => hasher.map(|hasher| hasher.finalize().into()),
        };
        self.done.push(FileDone {
            index: job.index,
            size: open.written,
            digest,
        });
        Ok(())
    }

    /// The digest of a file as it is on disk.
    fn digest_of(&self, job: &FileJob, size: u64) -> Result<(Option<[u8; 32]>, u64)> {
        let (Some(prefix), Some(entry)) = (&self.target.digest, &job.entry) else {
            return Ok((None, size));
        };
        let failed = |error: std::io::Error| SessionError::io(format!("read {}", job.path), error);
        let mut entry = Entry::clone(entry);
        entry.size = size;
        let mut hasher = Sha256::new_with_prefix(prefix(&entry));
        let mut file = self
            .target
            .root
            .open_regular(&job.path)
            .map_err(|error| failed(error.into()))?;
        let mut buffer = vec![0; 256 << 10];
        let mut total = 0;
        loop {
            let read = file.read(&mut buffer).map_err(failed)?;
            if read == 0 {
                return Ok((Some(hasher.finalize().into()), total));
            }
            if self.target.stop.is_stopped() {
                return Err(SessionError::Canceled("receive directory".to_owned()));
            }
            hasher.update(buffer.get(..read).unwrap_or_default());
            total += read as u64;
        }
    }
}

fn unexpected(id: u32) -> SessionError {
    SessionError::protocol(
        "receive directory",
        format!("data for file {id}, which was not asked for"),
    )
}

fn create(target: &Target, job: &FileJob) -> Result<Open> {
    // Mode, owner and time follow when the content is complete.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let file = target.root.open_with(&job.path, flags, 0o600);
    let file = File::from(file.map_err(|error| SessionError::io(format!("create {}", job.path), error))?);
    let hasher = target.digest.as_ref().zip(job.entry.as_ref());
    let hasher = hasher.map(|(prefix, entry)| Sha256::new_with_prefix(prefix(entry)));
    Ok(Open {
        file,
        hasher,
        written: 0,
    })
}

/// Writes what arrives until the senders are gone; returns what became of the files.
pub(crate) async fn write_files(
    mut messages: mpsc::Receiver<FileMessage>,
    mut lane: FileLane,
    events: mpsc::UnboundedSender<Event>,
) -> Result<Vec<FileDone>> {
    let mut batch = Vec::new();
    while messages.recv_many(&mut batch, BATCH).await > 0 {
        let work = std::mem::take(&mut batch);
        let outcome;
        (lane, outcome) = blocking(move || {
            let outcome = lane.run(work);
            (lane, outcome)
        })
        .await?;
        match outcome {
            Ok(0) => {}
            Ok(complete) => drop(events.send(Event::Complete(complete))),
            Err(error) => {
                let _ended = events.send(Event::Failed(error));
                return Err(SessionError::Canceled("receive directory".to_owned()));
            }
        }
    }
    Ok(lane.done)
}

/// What the listing's lane is told.
#[derive(Debug)]
pub(crate) enum ListingMessage {
    /// The next entry.
    Entry(Box<kiln_proto::fsutil::Stat>, OwnedSemaphorePermit),
    /// There are no more.
    End,
}

/// Takes the listing as it arrives; asks for files (through `ask`) after their lane has been told of them.
pub(crate) async fn take_listing(
    mut messages: mpsc::Receiver<ListingMessage>,
    mut listing: Listing,
    lanes: Vec<mpsc::Sender<FileMessage>>,
    ask: impl Fn(u32),
    events: mpsc::UnboundedSender<Event>,
) -> Result<Listing> {
    let mut batch = Vec::new();
    let mut jobs_total = 0;
    let mut requested = 0;
    while messages.recv_many(&mut batch, BATCH).await > 0 {
        let work = std::mem::take(&mut batch);
        let outcome;
        (listing, outcome) = blocking(move || {
            let outcome = run_listing(&mut listing, work);
            (listing, outcome)
        })
        .await?;
        let (jobs, ended) = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                let _ended = events.send(Event::Failed(error));
                return Err(SessionError::Canceled("receive directory".to_owned()));
            }
        };
        for job in jobs {
            jobs_total += 1;
            let (id, fetch) = (job.id, job.fetch);
            let Some(lane) = lanes.get(id as usize % lanes.len().max(1)) else {
                continue;
            };
            if lane.send(FileMessage::Job(job)).await.is_err() {
                return Err(SessionError::Canceled("receive directory".to_owned()));
            }
            if fetch {
                requested += 1;
                ask(id);
            }
        }
        if ended {
            let _ended = events.send(Event::Listed {
                jobs: jobs_total,
                entries: listing.listed(),
                requested,
            });
        }
    }
    Ok(listing)
}

fn run_listing(listing: &mut Listing, batch: Vec<ListingMessage>) -> Result<(Vec<FileJob>, bool)> {
    let mut jobs = Vec::new();
    let mut ended = false;
    for message in batch {
        match message {
            ListingMessage::Entry(stat, _permit) => listing.add(*stat, &mut jobs)?,
            ListingMessage::End => {
                listing.end()?;
                ended = true;
            }
        }
    }
    Ok((jobs, ended))
}

/// Runs blocking work; a panic in it is reported as an error of this transfer.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| SessionError::io("file work", std::io::Error::other(error)))
}
