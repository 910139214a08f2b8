//! Build records: what was built, how it ended, its log and its provenance. They survive a restart.
//!
//! The store keeps a record as bytes, with the blobs it refers to; this file gives the bytes their meaning, knows the
//! builds that run, and tells listeners what happens.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_stream::stream;
use futures::Stream;
use kiln_oci::Digest;
use kiln_proto::control::{BuildHistoryEvent, BuildHistoryRecord, BuildHistoryRequest, Descriptor};
use kiln_store::{HistoryRecord, Store, StoreError, Tenant, Time};
use prost::Message as _;
use tokio::sync::broadcast;

use crate::history_filter::HistoryFilter;
use crate::status::WireError;

/// Event types on the wire.
const STARTED: i32 = 0;
const COMPLETE: i32 = 1;
const DELETED: i32 = 2;

/// What belongs to a record beside itself.
#[derive(Debug)]
pub enum HistoryBlob {
    /// Bytes.
    Bytes(Vec<u8>),
    /// A finished file; removed once it is stored.
    File(PathBuf),
    /// A blob that is in the store already.
    Stored,
}

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Records younger than this stay.
    pub age: Duration,
    /// This many of the newest stay.
    pub entries: usize,
}

/// All build records.
#[derive(Clone, Debug)]
pub struct History(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Arc<Store>,
    stored: kiln_store::History,
    limits: Limits,
    active: Mutex<BTreeMap<String, BuildHistoryRecord>>,
    events: broadcast::Sender<BuildHistoryEvent>,
}

impl History {
    /// The records of the default tenant.
    pub fn new(store: &Arc<Store>, limits: Limits) -> Self {
        // Slow listeners miss events rather than hold builds up.
        let (events, _) = broadcast::channel(1024);
        let stored = store.history(&Tenant::default());
        Self(Arc::new(Inner {
            store: Arc::clone(store),
            stored,
            limits,
            active: Mutex::default(),
            events,
        }))
    }

    fn active(&self) -> MutexGuard<'_, BTreeMap<String, BuildHistoryRecord>> {
        self.0.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, kind: i32, record: BuildHistoryRecord) {
        // Nobody listening is fine.
        let _ = self.0.events.send(BuildHistoryEvent {
            r#type: kind,
            record: Some(record),
        });
    }

    /// A build has begun.
    pub fn started(&self, record: BuildHistoryRecord) {
        self.active().insert(record.r#ref.clone(), record.clone());
        self.send(STARTED, record);
    }

    /// A build has ended; the record is stored with its blobs. Blocking.
    pub fn complete(
        &self,
        record: BuildHistoryRecord,
        blobs: impl IntoIterator<Item = (Descriptor, HistoryBlob)>,
    ) -> Result<(), StoreError> {
        let stored = self.store(&record, blobs);
        self.active().remove(&record.r#ref);
        self.send(COMPLETE, record);
        stored
    }

    fn store(
        &self,
        record: &BuildHistoryRecord,
        blobs: impl IntoIterator<Item = (Descriptor, HistoryBlob)>,
    ) -> Result<(), StoreError> {
        let content = self.0.store.content(&Tenant::default());
        // Held until the record itself holds them.
        let mut handles = Vec::new();
        let mut digests = Vec::new();
        for (descriptor, blob) in blobs {
            match blob {
                HistoryBlob::Bytes(bytes) => handles.push(content.put(&descriptor.media_type, &bytes)?),
                HistoryBlob::File(path) => {
                    let mut writer = content.writer(None)?;
                    writer.set_media_type(&descriptor.media_type);
                    let io = |source| StoreError::Io {
                        action: "read",
                        path: path.clone(),
                        source,
                    };
                    io::copy(&mut File::open(&path).map_err(io)?, &mut writer).map_err(io)?;
                    handles.push(writer.commit(None)?);
                    // Its name is needed no more; readers hold it open.
                    let _ = std::fs::remove_file(&path);
                }
                HistoryBlob::Stored => {}
            }
            digests.extend(descriptor.digest.parse::<Digest>());
        }
        self.put(record, digests)
    }

    fn put(&self, record: &BuildHistoryRecord, blobs: Vec<Digest>) -> Result<(), StoreError> {
        self.0.stored.put(HistoryRecord {
            reference: record.r#ref.clone(),
            created_at: created(record).map_or_else(Time::now, store_time),
            pinned: record.pinned,
            blobs,
            payload: record.encode_to_vec(),
        })
    }

    /// The record of a finished build.
    pub fn get(&self, reference: &str) -> Option<BuildHistoryRecord> {
        self.0.stored.get(reference).and_then(|r| decode(&r))
    }

    /// Builds that run, builds that ended, and, unless the request wants to leave early, what happens from now on.
    pub fn listen(
        &self,
        request: BuildHistoryRequest,
    ) -> Result<impl Stream<Item = Result<BuildHistoryEvent, WireError>> + Send + use<>, WireError> {
        let filter = HistoryFilter::parse(&request.filter).map_err(|e| WireError::invalid(e.to_string()))?;
        let mut live = self.0.events.subscribe();
        let (active, stored) = self.matching(&request, &filter);
        Ok(stream! {
            for record in active {
                yield Ok(BuildHistoryEvent { r#type: STARTED, record: Some(record) });
            }
            for record in stored {
                yield Ok(BuildHistoryEvent { r#type: COMPLETE, record: Some(record) });
            }
            if request.early_exit {
                return;
            }
            loop {
                let event = match live.recv().await {
                    Ok(event) => event,
                    Err(broadcast::error::RecvError::Lagged(_)) => continue,
                    Err(broadcast::error::RecvError::Closed) => return,
                };
                let Some(record) = &event.record else { continue };
                if !request.r#ref.is_empty() {
                    if record.r#ref != request.r#ref {
                        continue;
                    }
                    if event.r#type == DELETED {
                        yield Err(WireError::new(tonic::Code::Unknown, format!("ref {} is deleted", record.r#ref)));
                        return;
                    }
                } else if !filter.matches(record) {
                    continue;
                }
                yield Ok(event);
            }
        })
    }

    fn matching(
        &self,
        request: &BuildHistoryRequest,
        filter: &HistoryFilter,
    ) -> (Vec<BuildHistoryRecord>, Vec<BuildHistoryRecord>) {
        let wanted = |r: &BuildHistoryRecord| request.r#ref.is_empty() || r.r#ref == request.r#ref;
        let active = self.active().values().filter(|r| wanted(r)).cloned().collect();
        if request.active_only {
            return (active, Vec::new());
        }
        // Newest first.
        let records = self.0.stored.list();
        let mut stored: Vec<_> = records
            .iter()
            .filter_map(decode)
            .filter(|r| wanted(r) && filter.matches(r))
            .collect();
        match usize::try_from(request.limit) {
            Ok(limit) if limit > 0 => stored.truncate(limit),
            _ => stored.reverse(),
        }
        (active, stored)
    }

    /// Removes a record. Blocking.
    pub fn delete(&self, reference: &str) -> Result<(), WireError> {
        let record = self.get(reference).ok_or_else(|| unknown(reference))?;
        self.0.stored.delete(reference).map_err(|e| store_error(&e))?;
        self.send(DELETED, record);
        Ok(())
    }

    /// Protects a record from being collected, or no longer. Blocking.
    pub fn pin(&self, reference: &str, pinned: bool) -> Result<(), WireError> {
        let old = self.0.stored.get(reference).ok_or_else(|| unknown(reference))?;
        let mut record = decode(&old).ok_or_else(|| unknown(reference))?;
        record.pinned = pinned;
        record.generation += 1;
        self.put(&record, old.blobs).map_err(|e| store_error(&e))?;
        self.send(COMPLETE, record);
        Ok(())
    }

    /// Removes records that are both too old and too many. Blocking.
    pub fn collect(&self) {
        let Limits { age, entries } = self.0.limits;
        if let Err(error) = self.0.stored.collect(age, entries) {
            tracing::warn!(%error, "old build records cannot be removed");
        }
    }
}

fn decode(stored: &HistoryRecord) -> Option<BuildHistoryRecord> {
    BuildHistoryRecord::decode(stored.payload.as_slice())
        .inspect_err(|error| tracing::warn!(build = stored.reference, %error, "build record cannot be read"))
        .ok()
}

fn unknown(reference: &str) -> WireError {
    WireError::new(
        tonic::Code::NotFound,
        format!("could not find build record {reference}"),
    )
}

fn store_error(error: &StoreError) -> WireError {
    WireError::new(tonic::Code::Internal, error.to_string())
}

fn created(record: &BuildHistoryRecord) -> Option<SystemTime> {
    record.created_at.and_then(|t| SystemTime::try_from(t).ok())
}

fn store_time(time: SystemTime) -> Time {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Time(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

/// The digest of a file's content, and its size. Blocking.
pub fn digest_file(path: &Path) -> io::Result<(Digest, u64)> {
    let mut reader = kiln_oci::DigestReader::new(File::open(path)?);
    io::copy(&mut reader, &mut io::sink())?;
    let (_, digest, size) = reader.finish();
    Ok((digest, size))
}

/// A descriptor as records have it.
pub fn descriptor(media_type: &str, digest: Digest, size: u64, annotations: BTreeMap<String, String>) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: digest.to_string(),
        size: i64::try_from(size).unwrap_or(i64::MAX),
        annotations,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::timestamp;
    use futures::StreamExt as _;
    use kiln_store::StoreConfig;

    const LIMITS: Limits = Limits {
        age: Duration::from_secs(3600),
        entries: 1,
    };

    fn open(dir: &Path) -> (Arc<Store>, History) {
        let (store, _) = Store::open(StoreConfig::new(dir)).unwrap();
        let history = History::new(&store, LIMITS);
        (store, history)
    }

    fn record(name: &str, seconds_ago: u64) -> BuildHistoryRecord {
        let at = SystemTime::now() - Duration::from_secs(seconds_ago);
        BuildHistoryRecord {
            r#ref: name.into(),
            created_at: Some(timestamp(at)),
            ..Default::default()
        }
    }

    async fn list(history: &History, request: BuildHistoryRequest) -> Vec<(i32, String)> {
        let stream = history
            .listen(BuildHistoryRequest {
                early_exit: true,
                ..request
            })
            .unwrap();
        Box::pin(stream)
            .map(|e| e.map(|e| (e.r#type, e.record.unwrap().r#ref)).unwrap())
            .collect()
            .await
    }

    #[tokio::test]
    async fn records_survive_a_restart_with_their_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let (store, history) = open(dir.path());
        history.started(record("a", 5));
        assert_eq!(list(&history, Default::default()).await, [(STARTED, "a".into())]);
        let digest = Digest::of("log");
        let log = descriptor("text/plain", digest, 3, BTreeMap::new());
        history
            .complete(record("a", 5), [(log, HistoryBlob::Bytes(b"log".to_vec()))])
            .unwrap();
        history.complete(record("b", 1), []).unwrap();
        let newest = BuildHistoryRequest {
            limit: 1,
            ..Default::default()
        };
        assert_eq!(list(&history, newest).await, [(COMPLETE, "b".into())]);
        store.close().unwrap();
        drop((store, history));
        let (store, history) = open(dir.path());
        assert_eq!(
            list(&history, Default::default()).await,
            [(COMPLETE, "a".into()), (COMPLETE, "b".into())]
        );
        assert_eq!(store.content(&Tenant::default()).read(&digest, 10).unwrap(), b"log");
        history.delete("a").unwrap();
        assert!(history.get("a").is_none());
        assert!(history.delete("a").is_err());
    }

    #[tokio::test]
    async fn an_unknown_ref_is_an_empty_list_for_who_leaves_early() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, history) = open(dir.path());
        let probe = BuildHistoryRequest {
            active_only: true,
            r#ref: "nobody".into(),
            ..Default::default()
        };
        assert!(list(&history, probe).await.is_empty());
    }

    #[test]
    fn old_records_beyond_the_limit_are_collected_unless_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, history) = open(dir.path());
        for (name, age) in [("new", 1), ("young", 60), ("old", 7200), ("pinned", 7200)] {
            history.complete(record(name, age), []).unwrap();
        }
        history.pin("pinned", true).unwrap();
        history.collect();
        let left = |n: &str| history.get(n).is_some();
        assert!(left("new") && left("young") && left("pinned") && !left("old"));
    }
}
