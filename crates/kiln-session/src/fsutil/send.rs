//! The sender's side of the conversation.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use kiln_fs::Stop;
use kiln_proto::fsutil::{Packet, packet::PacketType};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::lane::blocking;
use super::{DATA_CHUNK, Entry, packet, stat_packet};
use crate::error::{Result, SessionError};

/// Files that are read side by side.
const READERS: usize = 4;
/// What is read from a file at once.
const READ: usize = 4 * DATA_CHUNK;

/// A tree to send. Blocking: it is used on blocking threads only.
pub trait TreeSource: Send + 'static {
    /// The next entry in walk order ([`super::compare_paths`]); directories before what is in them.
    ///
    /// # Errors
    /// Any error ends the transfer.
    fn next(&mut self) -> io::Result<Option<Entry>>;

    /// Opens the contents of entries that were handed out.
    fn files(&self) -> Arc<dyn TreeFiles>;
}

/// The contents of a [`TreeSource`].
pub trait TreeFiles: Send + Sync {
    /// Opens a regular file that was listed.
    ///
    /// # Errors
    /// A file that cannot be opened arrives empty, as one that went away.
    fn open(&self, path: &str) -> io::Result<Box<dyn io::Read + Send>>;
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendStats {
    /// Entries listed.
    pub entries: u64,
    /// Files the receiver asked for.
    pub requested: u64,
}

/// For each listed entry its path, if it may be asked for and has not been.
type Table = Arc<Mutex<Vec<Option<Box<str>>>>>;

fn broken(message: impl Into<String>) -> SessionError {
    SessionError::protocol("send directory", message)
}

fn gone() -> SessionError {
    SessionError::Canceled("send directory".to_owned())
}

/// Who made the call that carries the packets. The one who made it ends last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The sender called: it waits for the receiver's answer, which may still be an error.
    Caller,
    /// The receiver called, and waits for the sender's end.
    Server,
}

/// Sends a tree: `inbound` are the receiver's packets, `out` takes ours and is closed when all is said. Returns when
/// the receiver has everything.
pub(crate) async fn send_tree<S>(
    source: impl TreeSource,
    mut inbound: S,
    out: mpsc::Sender<Packet>,
    role: Role,
) -> Result<SendStats>
where
    S: Stream<Item = Result<Packet>> + Unpin,
{
    let stop = Stop::new();
    let _stopped_when_dropped = stop.guard();
    let table: Table = Arc::default();
    let files = source.files();
    let (ask, asked) = mpsc::unbounded_channel();
    let asked = Arc::new(tokio::sync::Mutex::new(asked));
    // Tasks of one kind each: they end by themselves, and only an error is told.
    let mut tasks: JoinSet<Result<Option<u64>>> = JoinSet::new();
    tasks.spawn(list(source, Arc::clone(&table), out.clone(), stop.clone()));
    for _ in 0..READERS {
        tasks.spawn(serve(Arc::clone(&asked), Arc::clone(&files), out.clone(), stop.clone()));
    }
    let mut stats = SendStats::default();
    let outcome: Result<()> = async {
        loop {
            tokio::select! {
                biased;
                Some(ended) = tasks.join_next() => {
                    let ended = ended.unwrap_or_else(|error| Err(SessionError::io("read files", io::Error::other(error))));
                    if let Some(entries) = ended? {
                        stats.entries = entries;
                    }
                }
                next = inbound.next() => {
                    let Some(next) = next else { return Err(broken("the receiver ended before everything was there")) };
                    let next = next?;
                    match PacketType::try_from(next.r#type) {
                        Ok(PacketType::PacketReq) => {
                            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
                            let path = table.get_mut(next.id as usize).and_then(Option::take);
                            drop(table);
                            let path = path.ok_or_else(|| broken(format!("invalid file id {}", next.id)))?;
                            stats.requested += 1;
                            let _served = ask.send((next.id, path));
                        }
                        Ok(PacketType::PacketFin) => return Ok(()),
                        Ok(PacketType::PacketErr) => {
                            let text = String::from_utf8_lossy(&next.data).into_owned();
                            return Err(broken(format!("error from receiver: {text}")));
                        }
                        _ => return Err(broken(format!("unexpected packet of type {}", next.r#type))),
                    }
                }
            }
        }
    }
    .await;
    if let Err(error) = outcome {
        let _gone = out.try_send(packet(PacketType::PacketErr, 0, error.to_string().into()));
        return Err(error);
    }
    out.send(packet(PacketType::PacketFin, 0, Bytes::new()))
        .await
        .map_err(|_| gone())?;
    drop(out);
    drop(ask);
    tasks.shutdown().await;
    while role == Role::Caller
        && let Some(next) = inbound.next().await
    {
        next?;
    }
    Ok(stats)
}

/// Lists the tree; returns how many entries it has.
async fn list(mut source: impl TreeSource, table: Table, out: mpsc::Sender<Packet>, stop: Stop) -> Result<Option<u64>> {
    blocking(move || {
        let failed = |error| SessionError::io("list directory", error);
        let mut entries = 0;
        while let Some(entry) = source.next().map_err(failed)? {
            if stop.is_stopped() {
                return Err(gone());
            }
            entries += 1;
            let path = (entry.is_file() && !entry.is_hard_link()).then(|| entry.path.clone().into_boxed_str());
            // Before the entry is sent, so that it can be asked for as soon as it is seen.
            table.lock().unwrap_or_else(PoisonError::into_inner).push(path);
            out.blocking_send(stat_packet(Some(entry.to_wire())))
                .map_err(|_| gone())?;
        }
        out.blocking_send(stat_packet(None)).map_err(|_| gone())?;
        Ok(Some(entries))
    })
    .await?
}

type Asked = Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<(u32, Box<str>)>>>;

/// Sends files that were asked for, until nobody can ask any more.
async fn serve(asked: Asked, files: Arc<dyn TreeFiles>, out: mpsc::Sender<Packet>, stop: Stop) -> Result<Option<u64>> {
    loop {
        let mut batch = Vec::new();
        if asked.lock().await.recv_many(&mut batch, 32).await == 0 {
            return Ok(None);
        }
        let (files, out, stop) = (Arc::clone(&files), out.clone(), stop.clone());
        blocking(move || {
            batch
                .iter()
                .try_for_each(|(id, path)| send_file(&*files, *id, path, &out, &stop))
        })
        .await??;
    }
}

fn send_file(files: &dyn TreeFiles, id: u32, path: &str, out: &mpsc::Sender<Packet>, stop: &Stop) -> Result<()> {
    let send = |data| {
        out.blocking_send(packet(PacketType::PacketData, id, data))
            .map_err(|_| gone())
    };
    if let Ok(mut file) = files.open(path) {
        loop {
            if stop.is_stopped() {
                return Err(gone());
            }
            let mut buffer = vec![0; READ];
            let read = file
                .read(&mut buffer)
                .map_err(|error| SessionError::io(format!("read {path}"), error))?;
            buffer.truncate(read);
            let mut data = Bytes::from(buffer);
            if data.is_empty() {
                break;
            }
            while !data.is_empty() {
                send(data.split_to(data.len().min(DATA_CHUNK)))?;
            }
        }
    }
    send(Bytes::new())
}
