//! The receiver's side of the conversation.

use std::any::Any;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use kiln_fs::{Dir, Links, Stop};
use kiln_proto::fsutil::{Packet, packet::PacketType};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use super::disk::{Listing, Target};
use super::lane::{FileDone, FileLane, FileMessage, ListingMessage, blocking, take_listing, write_files};
use super::{Entry, packet};
use crate::error::{Result, SessionError};

/// Where a metadata-only transfer leaves the whole listing: for each entry its length (u32, little endian) and its
/// serialised `Stat`.
pub const METADATA_FILE: &str = ".fsutil-metadata";

/// Bytes of packets that wait for the disk.
const WAITING_BYTES: usize = 16 << 20;

/// Computes what stands before a file's content in its digest, from the entry (whose size is right).
pub type DigestPrefix = Arc<dyn Fn(&Entry) -> Vec<u8> + Send + Sync>;

/// Told about bytes of content received so far; called often, must be cheap.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// What the target directory holds before the transfer.
#[derive(Debug, Default)]
pub enum Existing {
    /// Nothing.
    #[default]
    Empty,
    /// Exactly these entries, in walk order: the listing an earlier transfer returned. Only what differs is asked for,
    /// and what the sender does not have is deleted. An entry whose digest is missing is read again from disk.
    Listing(Vec<Entry>),
    /// Unknown; the disk is looked at. With `delete`, what the sender does not have is deleted.
    Disk {
        /// Whether the result is exactly what was sent.
        delete: bool,
    },
}

/// How a directory is received.
pub struct ReceiveOptions {
    /// What is there already.
    pub existing: Existing,
    /// Whether existing files that look the same are kept. Otherwise everything is asked for again.
    pub differ: bool,
    /// Metadata-only transfer: nothing is materialised but what matches these patterns, with its parents; the listing of
    /// everything goes to [`METADATA_FILE`] in the root, which is not part of the returned listing.
    pub metadata_only: Option<Vec<String>>,
    /// Compute a digest of each file while it is written.
    pub digest: Option<DigestPrefix>,
    /// Told about bytes received so far.
    pub progress: Option<Progress>,
    /// Whether owners are applied as sent. This needs privileges; without them files belong to the process.
    pub owners: bool,
    /// Held until the last write to the directory is over, also when the transfer's future is dropped.
    pub keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        ReceiveOptions {
            existing: Existing::Empty,
            differ: true,
            metadata_only: None,
            digest: None,
            progress: None,
            owners: rustix::process::geteuid().is_root(),
            keep: None,
        }
    }
}

/// What a transfer moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferStats {
    /// Entries the sender listed.
    pub entries: u64,
    /// Files asked for: the REQ packets sent.
    pub requested: u64,
    /// Bytes of content received.
    pub bytes: u64,
}

/// A directory that has been received.
#[derive(Debug)]
pub struct Received {
    /// What the directory holds now, in walk order.
    pub listing: Vec<Entry>,
    /// What was moved.
    pub stats: TransferStats,
}

/// What the lanes tell the conversation.
#[derive(Debug)]
pub(crate) enum Event {
    /// So many more files are complete.
    Complete(u64),
    /// The listing is over.
    Listed { jobs: u64, entries: u64, requested: u64 },
    /// A lane has given up.
    Failed(SessionError),
}

/// A task that is aborted when nobody waits for it any more.
struct Lane<T>(JoinHandle<Result<T>>);

impl<T> Drop for Lane<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Lane<T> {
    async fn join(mut self) -> Result<T> {
        (&mut self.0)
            .await
            .unwrap_or_else(|error| Err(SessionError::io("file work", std::io::Error::other(error))))
    }
}

/// Receives a directory into `root`. `inbound` are the sender's packets, `replies` takes ours; it is unbounded because a
/// receiver that waits while it asks can deadlock with a sender that waits while it lists. What it holds is one small
/// packet for each file.
pub(crate) async fn receive<S>(
    mut inbound: S,
    replies: mpsc::UnboundedSender<Packet>,
    root: Dir,
    mut options: ReceiveOptions,
) -> Result<Received>
where
    S: Stream<Item = Result<Packet>> + Unpin,
{
    let stop = Stop::new();
    let _stopped_when_dropped = stop.guard();
    let target = Target {
        root: Arc::new(root.with_links(Links::Refuse)),
        owner: options
            .owners
            .then(|| (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())),
        digest: options.digest.take(),
        stop,
        _keep: options.keep.take(),
    };
    let progress = options.progress.take();
    let (events, mut happened) = mpsc::unbounded_channel();
    let count = std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(1, 4));
    let mut files = Vec::new();
    let mut writers = Vec::new();
    for _ in 0..count {
        let (sender, receiver) = mpsc::channel(1024);
        let lane = FileLane::new(target.clone());
        writers.push(Lane(tokio::spawn(write_files(receiver, lane, events.clone()))));
        files.push(sender);
    }
    let listing = blocking(move || Listing::new(target, &mut options)).await??;
    let (entries, receiver) = mpsc::channel(1024);
    let asking = replies.clone();
    let ask = move |id| drop(asking.send(packet(PacketType::PacketReq, id, bytes::Bytes::new())));
    let listing = Lane(tokio::spawn(take_listing(
        receiver,
        listing,
        files.clone(),
        ask,
        events,
    )));

    let conversation = Conversation {
        entries: Some(entries),
        files,
        progress,
        budget: Arc::new(Semaphore::new(WAITING_BYTES)),
        stats: TransferStats::default(),
        expected: None,
        complete: 0,
    };
    let stats = match conversation.run(&mut inbound, &replies, &mut happened).await {
        Ok(stats) => stats,
        Err(error) => {
            let text = error.to_string().into();
            let _gone = replies.send(packet(PacketType::PacketErr, 0, text));
            return Err(error);
        }
    };
    drop(replies);
    let mut done: Vec<FileDone> = Vec::new();
    for writer in writers {
        done.extend(writer.join().await?);
    }
    let listing = listing.join().await?;
    let listing = blocking(move || listing.finish(done)).await??;
    Ok(Received { listing, stats })
}

/// The state of one transfer.
struct Conversation {
    /// Gone once the listing is over.
    entries: Option<mpsc::Sender<ListingMessage>>,
    files: Vec<mpsc::Sender<FileMessage>>,
    progress: Option<Progress>,
    budget: Arc<Semaphore>,
    stats: TransferStats,
    /// Files to complete, known when the listing is over.
    expected: Option<u64>,
    complete: u64,
}

fn broken(message: impl Into<String>) -> SessionError {
    SessionError::protocol("receive directory", message)
}

impl Conversation {
    async fn run<S>(
        mut self,
        inbound: &mut S,
        replies: &mpsc::UnboundedSender<Packet>,
        happened: &mut mpsc::UnboundedReceiver<Event>,
    ) -> Result<TransferStats>
    where
        S: Stream<Item = Result<Packet>> + Unpin,
    {
        let mut fin_sent = false;
        let mut fin_received = false;
        loop {
            tokio::select! {
                biased;
                Some(event) = happened.recv() => {
                    self.note(event)?;
                    if !fin_sent && self.expected.is_some_and(|expected| expected == self.complete) {
                        fin_sent = true;
                        let _gone = replies.send(packet(PacketType::PacketFin, 0, bytes::Bytes::new()));
                    }
                }
                next = inbound.next() => match next {
                    None if fin_received => return Ok(self.stats),
                    None => return Err(broken("the sender ended before everything was there")),
                    Some(next) => {
                        let next = next?;
                        if next.r#type == PacketType::PacketFin as i32 {
                            if !fin_sent {
                                return Err(broken("the sender finished before everything was there"));
                            }
                            fin_received = true;
                        } else if let Err(error) = self.take(next).await {
                            // A lane that gave up says more than the closed channel to it.
                            while let Ok(event) = happened.try_recv() {
                                self.note(event)?;
                            }
                            return Err(error);
                        }
                    }
                },
            }
        }
    }

    fn note(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Complete(more) => self.complete += more,
            Event::Listed {
                jobs,
                entries,
                requested,
            } => {
                self.expected = Some(jobs);
                self.stats.entries = entries;
                self.stats.requested = requested;
            }
            Event::Failed(error) => return Err(error),
        }
        Ok(())
    }

    /// Room for `bytes` among what waits for the disk.
    async fn reserve(&self, bytes: usize) -> Result<tokio::sync::OwnedSemaphorePermit> {
        let wanted = u32::try_from(bytes.clamp(1, WAITING_BYTES)).unwrap_or(1);
        let permit = Arc::clone(&self.budget).acquire_many_owned(wanted).await;
        permit.map_err(|_| SessionError::Canceled("receive directory".to_owned()))
    }

    async fn take(&mut self, packet: Packet) -> Result<()> {
        let gone = |_| SessionError::Canceled("receive directory".to_owned());
        match PacketType::try_from(packet.r#type) {
            Ok(PacketType::PacketStat) => {
                let Some(entries) = &self.entries else {
                    return Err(broken("an entry after the end of the listing"));
                };
                let Some(stat) = packet.stat else {
                    entries.send(ListingMessage::End).await.map_err(|_| gone(()))?;
                    self.entries = None;
                    return Ok(());
                };
                let attributes: usize = stat.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
                let permit = self
                    .reserve(128 + stat.path.len() + stat.linkname.len() + attributes)
                    .await?;
                let message = ListingMessage::Entry(Box::new(stat), permit);
                entries.send(message).await.map_err(|_| gone(()))
            }
            Ok(PacketType::PacketData) => {
                self.stats.bytes += packet.data.len() as u64;
                if let Some(progress) = &self.progress {
                    progress(self.stats.bytes);
                }
                let permit = self.reserve(packet.data.len()).await?;
                let lane = self.files.get(packet.id as usize % self.files.len().max(1));
                let Some(lane) = lane else { return Ok(()) };
                lane.send(FileMessage::Data(packet.id, packet.data, permit))
                    .await
                    .map_err(|_| gone(()))
            }
            Ok(PacketType::PacketErr) => Err(broken(format!(
                "error from sender: {}",
                String::from_utf8_lossy(&packet.data)
            ))),
            Ok(PacketType::PacketReq | PacketType::PacketFin) | Err(_) => {
                Err(broken(format!("unexpected packet of type {}", packet.r#type)))
            }
        }
    }
}
