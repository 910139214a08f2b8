//! Content by digest: blobs that are complete and verified, and the drafts they grow from.
//!
//! A blob is `blobs/sha256/<hex>`; its record (media type, diff id, where it came from, whose it is) lies beside it as
//! `<hex>.record`. A draft under `ingest/` becomes a blob by one rename when its digest is known, so a blob that exists is
//! whole. Possession is by tenant: a blob that only another tenant has is not there.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use kiln_oci::{Descriptor, DiffId, Digest, Hasher};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use crate::error::{IoContext as _, Result, StoreError};
use crate::ids::{Tenant, Time};
use crate::ledger::{Area, Reservation};
use crate::meta::{Batch, Table};
use crate::record_file;
use crate::store::Store;

/// Writers reserve space in steps of this many bytes.
const RESERVE_STEP: u64 = 8 << 20;

/// What is known about a blob besides its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobInfo {
    /// Digest of its bytes.
    pub digest: Digest,
    /// Length in bytes.
    pub size: u64,
    /// Media type it was announced with, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// For a layer: digest of its uncompressed tar, once somebody unpacked or made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<DiffId>,
    /// Repositories that hold it (`host/name`): a push to the same host can mount it from there.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub sources: BTreeSet<String>,
    /// When it was completed here.
    pub created_at: Time,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BlobRecord {
    pub(crate) info: BlobInfo,
    pub(crate) tenants: BTreeSet<Tenant>,
    pub(crate) epoch: u64,
    /// Disk space of blob and record.
    pub(crate) disk: u64,
}

#[derive(Debug)]
pub(crate) struct BlobEntry {
    pub(crate) record: BlobRecord,
    /// Handles and named leases.
    pub(crate) leases: usize,
    /// Layer records that name it.
    pub(crate) layers: usize,
    pub(crate) last_used: Time,
    /// Garbage collection is removing it: it is not there any more for anybody.
    pub(crate) dying: bool,
}

/// The blobs of a state directory.
#[derive(Debug, Default)]
pub(crate) struct BlobTable {
    pub(crate) blobs: RwLock<HashMap<Digest, BlobEntry>>,
    /// Ingest references with a writer.
    writers: Mutex<HashSet<String>>,
}

impl BlobTable {
    /// Whether somebody writes the draft of this name.
    pub(crate) fn has_writer(&self, name: &str) -> bool {
        self.writers.lock().contains(name)
    }
}

/// The content of one tenant. Cheap to clone; all calls block on the file system and belong on a blocking thread unless
/// they say otherwise.
#[derive(Clone, Debug)]
pub struct ContentStore {
    store: Arc<Store>,
    tenant: Tenant,
}

impl ContentStore {
    pub(crate) fn new(store: Arc<Store>, tenant: Tenant) -> Self {
        Self { store, tenant }
    }

    /// The store it belongs to.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Whose content it is.
    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    /// Whether the blob is here. Does not block.
    pub fn has(&self, digest: &Digest) -> bool {
        self.info(digest).is_some()
    }

    /// What is known about a blob. Does not block.
    pub fn info(&self, digest: &Digest) -> Option<BlobInfo> {
        let blobs = self.store.blobs.blobs.read();
        let entry = blobs
            .get(digest)
            .filter(|e| !e.dying && e.record.tenants.contains(&self.tenant))?;
        Some(entry.record.info.clone())
    }

    /// All blobs of the tenant. Does not block.
    pub fn list(&self) -> Vec<BlobInfo> {
        let blobs = self.store.blobs.blobs.read();
        let own = blobs
            .values()
            .filter(|e| !e.dying && e.record.tenants.contains(&self.tenant));
        own.map(|e| e.record.info.clone()).collect()
    }

    /// Keeps a blob from being collected for as long as the handle lives. Does not block.
    pub fn lease(&self, digest: &Digest) -> Option<BlobHandle> {
        let mut blobs = self.store.blobs.blobs.write();
        let entry = blobs
            .get_mut(digest)
            .filter(|e| !e.dying && e.record.tenants.contains(&self.tenant))?;
        entry.leases += 1;
        entry.last_used = Time::now();
        let (size, media_type) = (entry.record.info.size, entry.record.info.media_type.clone());
        Some(BlobHandle {
            store: self.store.clone(),
            digest: *digest,
            size,
            media_type,
        })
    }

    /// Opens a blob for reading; it cannot be collected while open.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for a blob whose file has vanished.
    pub fn open(&self, digest: &Digest) -> Result<BlobReader> {
        let missing = || StoreError::NotFound {
            what: "blob",
            id: digest.to_string(),
        };
        let handle = self.lease(digest).ok_or_else(missing)?;
        let path = self.store.blob_path(digest);
        match File::open(&path) {
            Ok(file) => Ok(BlobReader { file, handle }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(%digest, "the file of a blob has vanished; its record is dropped");
                drop(handle);
                self.store.forget_blob(digest)?;
                Err(missing())
            }
            Err(error) => Err(error).during("open", &path),
        }
    }

    /// The whole of a small blob (a manifest, a config).
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it is larger than `limit` bytes, [`StoreError::DigestMismatch`] if the file was changed.
    pub fn read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let mut reader = self.open(digest)?;
        if reader.size() > limit {
            return Err(StoreError::Invalid(format!(
                "blob {digest} has {} bytes, more than {limit}",
                reader.size()
            )));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(reader.size()).unwrap_or(0));
        reader
            .read_to_end(&mut bytes)
            .during("read", self.store.blob_path(digest))?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            let what = format!("blob {digest}");
            return Err(StoreError::DigestMismatch {
                what,
                expected: *digest,
                actual,
            });
        }
        Ok(bytes)
    }

    /// Stores bytes that are at hand. They are there already if the tenant has a blob of this digest.
    ///
    /// # Errors
    /// As [`ContentWriter::commit`].
    pub fn put(&self, media_type: &str, bytes: &[u8]) -> Result<BlobHandle> {
        let digest = Digest::of(bytes);
        if let Some(handle) = self.lease(&digest) {
            return Ok(handle);
        }
        let mut writer = self.writer(None)?;
        writer.set_media_type(media_type);
        writer.write_bytes(bytes)?;
        writer.commit(Some(&Descriptor::new(media_type, digest, bytes.len() as u64)))
    }

    /// Starts or resumes a draft. With a reference, what an earlier writer of the same reference left is kept:
    /// [`ContentWriter::offset`] tells where to go on. Without one the draft is gone when the writer is dropped.
    ///
    /// # Errors
    /// [`StoreError::Busy`] if the reference has a writer already.
    pub fn writer(&self, reference: Option<&str>) -> Result<ContentWriter> {
        ContentWriter::open(self.clone(), reference)
    }

    /// Remembers that a repository (`host/name`) holds the blob.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the record could not be written.
    pub fn add_source(&self, digest: &Digest, repository: &str) -> Result<()> {
        self.update(digest, |info| info.sources.insert(repository.to_owned()))
    }

    /// Remembers the digest of a layer blob's uncompressed tar.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or the record could not be written.
    pub fn set_diff_id(&self, digest: &Digest, diff_id: DiffId) -> Result<()> {
        self.update(digest, |info| info.diff_id.replace(diff_id) != Some(diff_id))
    }

    fn update(&self, digest: &Digest, change: impl FnOnce(&mut BlobInfo) -> bool) -> Result<()> {
        let handle = self.lease(digest).ok_or_else(|| StoreError::NotFound {
            what: "blob",
            id: digest.to_string(),
        })?;
        let record = {
            let mut blobs = self.store.blobs.blobs.write();
            let Some(entry) = blobs.get_mut(digest) else {
                return Ok(());
            };
            if !change(&mut entry.record.info) {
                return Ok(());
            }
            entry.record.clone()
        };
        self.store.save_blob_record(&record)?;
        drop(handle);
        Ok(())
    }
}

/// A lease on one blob.
#[derive(Debug)]
pub struct BlobHandle {
    store: Arc<Store>,
    digest: Digest,
    size: u64,
    media_type: Option<String>,
}

impl BlobHandle {
    /// Digest of the blob.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Length of the blob in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A descriptor of the blob.
    pub fn descriptor(&self) -> Descriptor {
        let media_type = self
            .media_type
            .clone()
            .unwrap_or_else(|| "application/octet-stream".into());
        Descriptor::new(media_type, self.digest, self.size)
    }
}

impl Clone for BlobHandle {
    fn clone(&self) -> Self {
        if let Some(entry) = self.store.blobs.blobs.write().get_mut(&self.digest) {
            entry.leases += 1;
        }
        Self {
            store: self.store.clone(),
            digest: self.digest,
            size: self.size,
            media_type: self.media_type.clone(),
        }
    }
}

impl Drop for BlobHandle {
    fn drop(&mut self) {
        if let Some(entry) = self.store.blobs.blobs.write().get_mut(&self.digest) {
            entry.leases = entry.leases.saturating_sub(1);
        }
    }
}

/// An open blob.
#[derive(Debug)]
pub struct BlobReader {
    file: File,
    handle: BlobHandle,
}

impl BlobReader {
    /// Length of the blob in bytes.
    pub fn size(&self) -> u64 {
        self.handle.size
    }

    /// Digest of the blob.
    pub fn digest(&self) -> Digest {
        self.handle.digest
    }

    /// Reads at an offset without moving the position.
    ///
    /// # Errors
    /// As `pread`.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    /// A limited reader over `length` bytes from `offset`.
    ///
    /// # Errors
    /// As `lseek`.
    pub fn range(mut self, offset: u64, length: u64) -> io::Result<io::Take<Self>> {
        self.file.seek(SeekFrom::Start(offset))?;
        Ok(self.take(length))
    }
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.file.read(buf)
    }
}

impl Seek for BlobReader {
    fn seek(&mut self, pos: SeekFrom) -> io::Result<u64> {
        self.file.seek(pos)
    }
}

/// A blob in the making. Its digest is known only at [`commit`](Self::commit).
#[derive(Debug)]
pub struct ContentWriter {
    content: ContentStore,
    reference: Option<String>,
    draft: PathBuf,
    file: File,
    hasher: Hasher,
    offset: u64,
    media_type: Option<String>,
    diff_id: Option<DiffId>,
    sources: BTreeSet<String>,
    space: Reservation,
    done: bool,
}

impl ContentWriter {
    fn open(content: ContentStore, reference: Option<&str>) -> Result<Self> {
        let store = &content.store;
        let reference = reference.map(|r| Digest::of(format!("{}\0{r}", content.tenant)).hex());
        if let Some(name) = &reference
            && !store.blobs.writers.lock().insert(name.clone())
        {
            return Err(StoreError::Busy {
                what: "ingest",
                id: name.clone(),
            });
        }
        let name = reference
            .clone()
            .unwrap_or_else(|| format!("draft-{}", crate::ids::TreeId::random()));
        let draft = store.dir.part("ingest").join(name);
        let opened = (|| {
            let mut options = OpenOptions::new();
            let mut file = options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&draft)
                .during("open", &draft)?;
            let mut hasher = Hasher::new();
            let mut offset = 0;
            let mut buf = vec![0; 1 << 20];
            loop {
                let n = file.read(&mut buf).during("read", &draft)?;
                if n == 0 {
                    break;
                }
                hasher.update(buf.get(..n).unwrap_or_default());
                offset += n as u64;
            }
            // What is resumed was counted when it was left; from here on the writer's promise covers it.
            store
                .ledger
                .sub(Area::Ingest, blocks_of(&file).min(store.ledger.used(Area::Ingest)));
            let space = store.reserve(Area::Ingest, offset)?;
            Ok((file, hasher, offset, space))
        })();
        match opened {
            Ok((file, hasher, offset, space)) => Ok(Self {
                content,
                reference,
                draft,
                file,
                hasher,
                offset,
                media_type: None,
                diff_id: None,
                sources: BTreeSet::new(),
                space,
                done: false,
            }),
            Err(error) => {
                if let Some(name) = &reference {
                    content.store.blobs.writers.lock().remove(name);
                }
                Err(error)
            }
        }
    }

    /// Bytes written so far, those of earlier writers of the reference included.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Throws away what is there and starts anew.
    ///
    /// # Errors
    /// As `ftruncate`.
    pub fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).during("truncate", &self.draft)?;
        self.file.rewind().during("seek", &self.draft)?;
        self.hasher = Hasher::new();
        self.offset = 0;
        Ok(())
    }

    /// Media type to record.
    pub fn set_media_type(&mut self, media_type: &str) {
        self.media_type = Some(media_type.to_owned());
    }

    /// Diff id to record, for a layer.
    pub fn set_diff_id(&mut self, diff_id: DiffId) {
        self.diff_id = Some(diff_id);
    }

    /// A repository (`host/name`) to record as a place that holds the blob.
    pub fn add_source(&mut self, repository: &str) {
        self.sources.insert(repository.to_owned());
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] if limit or disk leave no room, or the write failed.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.offset + bytes.len() as u64;
        if end > self.space.bytes() {
            let needed = end - self.space.bytes();
            // Ahead of need while there is room, exactly what is needed otherwise.
            let ahead = RESERVE_STEP.min(bytes.len() as u64 * 4);
            if ahead <= needed || self.space.grow(ahead).is_err() {
                self.content.store.grow(&mut self.space, needed)?;
            }
        }
        self.file.write_all(bytes).during("write", &self.draft)?;
        self.hasher.update(bytes);
        self.offset = end;
        Ok(())
    }

    /// Completes the blob: its digest is what the bytes say. With `expected`, size and digest are compared first and on
    /// a mismatch the draft is thrown away.
    ///
    /// # Errors
    /// [`StoreError::SizeMismatch`], [`StoreError::DigestMismatch`], or the file system refused.
    pub fn commit(mut self, expected: Option<&Descriptor>) -> Result<BlobHandle> {
        let digest = std::mem::take(&mut self.hasher).finish();
        if let Some(expected) = expected {
            let what = format!("blob {}", expected.digest);
            let mismatch = if self.offset != expected.size {
                Some(StoreError::SizeMismatch {
                    what,
                    expected: expected.size,
                    actual: self.offset,
                })
            } else if digest != expected.digest {
                Some(StoreError::DigestMismatch {
                    what,
                    expected: expected.digest,
                    actual: digest,
                })
            } else {
                None
            };
            if let Some(error) = mismatch {
                self.reference = self.release();
                let _ = fs::remove_file(&self.draft);
                self.done = true;
                return Err(error);
            }
        }
        let content = self.content.clone();
        let handle = content.store.adopt_blob(&content.tenant, digest, &mut self)?;
        self.release();
        self.done = true;
        Ok(handle)
    }

    fn release(&mut self) -> Option<String> {
        let name = self.reference.take()?;
        self.content.store.blobs.writers.lock().remove(&name);
        None
    }
}

impl Write for ContentWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self.write_bytes(buf) {
            Ok(()) => Ok(buf.len()),
            Err(error) if error.is_no_space() => Err(io::Error::new(io::ErrorKind::StorageFull, error)),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ContentWriter {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if self.reference.is_some() {
            self.content.store.ledger.add(Area::Ingest, blocks_of(&self.file));
            self.release();
        } else {
            let _ = fs::remove_file(&self.draft);
        }
    }
}

/// Disk space of an open file in bytes.
pub(crate) fn blocks_of(file: &File) -> u64 {
    file.metadata().map_or(0, |m| m.blocks() * 512)
}

impl Store {
    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.part("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn blob_record_path(&self, digest: &Digest) -> PathBuf {
        self.dir.part("blobs/sha256").join(format!("{}.record", digest.hex()))
    }

    /// Leases a blob without a handle; whoever does it must let go of it by name. For holders inside the store.
    pub(crate) fn lease_by_name(&self, tenant: &Tenant, digest: &Digest) -> bool {
        let mut blobs = self.blobs.blobs.write();
        let entry = blobs
            .get_mut(digest)
            .filter(|e| !e.dying && e.record.tenants.contains(tenant));
        entry.map(|e| e.leases += 1).is_some()
    }

    pub(crate) fn release_by_name(&self, digest: &Digest) {
        if let Some(entry) = self.blobs.blobs.write().get_mut(digest) {
            entry.leases = entry.leases.saturating_sub(1);
            entry.last_used = Time::now();
        }
    }

    /// Turns a complete draft into a blob, or adds the tenant to a blob that is there.
    fn adopt_blob(self: &Arc<Self>, tenant: &Tenant, digest: Digest, draft: &mut ContentWriter) -> Result<BlobHandle> {
        // The record beside it is one block.
        let disk = blocks_of(&draft.file) + 4096;
        let info = BlobInfo {
            digest,
            size: draft.offset,
            media_type: draft.media_type.take(),
            diff_id: draft.diff_id.take(),
            sources: std::mem::take(&mut draft.sources),
            created_at: Time::now(),
        };
        let writing = self.epochs.enter();
        let path = self.blob_path(&digest);
        // The entry is made, with a lease, before the file has its final name; so two writers of the same blob agree
        // on one record, and collection cannot take the file in between.
        let (record, new) = {
            let mut blobs = self.blobs.blobs.write();
            match blobs.entry(digest) {
                Entry::Occupied(slot) if slot.get().dying => {
                    return Err(StoreError::Busy {
                        what: "blob",
                        id: digest.to_string(),
                    });
                }
                Entry::Occupied(mut slot) => {
                    let entry = slot.get_mut();
                    entry.leases += 1;
                    entry.last_used = Time::now();
                    let known = &mut entry.record;
                    known.tenants.insert(tenant.clone());
                    known.info.sources.extend(info.sources.iter().cloned());
                    known.info.media_type = known.info.media_type.take().or(info.media_type.clone());
                    known.info.diff_id = known.info.diff_id.take().or(info.diff_id);
                    (known.clone(), false)
                }
                Entry::Vacant(slot) => {
                    let tenants = BTreeSet::from([tenant.clone()]);
                    let record = BlobRecord {
                        info,
                        tenants,
                        epoch: writing.epoch(),
                        disk,
                    };
                    slot.insert(BlobEntry {
                        record: record.clone(),
                        leases: 1,
                        layers: 0,
                        last_used: Time::now(),
                        dying: false,
                    });
                    (record, true)
                }
            }
        };
        let handle = BlobHandle {
            store: self.clone(),
            digest,
            size: record.info.size,
            media_type: record.info.media_type.clone(),
        };
        if new || !path.exists() {
            if let Err(error) = fs::rename(&draft.draft, &path).during("rename", &draft.draft) {
                if new {
                    self.blobs.blobs.write().remove(&digest);
                }
                return Err(error);
            }
            if new {
                self.ledger.add(Area::Blobs, disk);
            }
        } else {
            fs::remove_file(&draft.draft).during("remove", &draft.draft)?;
        }
        self.save_blob_record(&record)?;
        drop(writing);
        Ok(handle)
    }

    pub(crate) fn save_blob_record(&self, record: &BlobRecord) -> Result<()> {
        let digest = record.info.digest;
        record_file::write(&self.blob_record_path(&digest), record)?;
        let mut batch = Batch::new();
        batch.put(Table::Blobs, digest.as_bytes().to_vec(), record)?;
        self.commit_or_warn(&batch, "blob record");
        Ok(())
    }

    /// Drops a blob from the tables; its files, if any, go to the trash.
    pub(crate) fn forget_blob(&self, digest: &Digest) -> Result<u64> {
        let Some(entry) = self.blobs.blobs.write().get_mut(digest).map(|e| {
            e.dying = true;
            e.record.clone()
        }) else {
            return Ok(0);
        };
        let mut batch = Batch::new();
        batch.remove(Table::Blobs, digest.as_bytes().to_vec());
        self.commit_or_warn(&batch, "removal of a blob");
        self.trash
            .discard(self, &self.blob_record_path(digest), Area::Blobs, 0)?;
        self.trash
            .discard(self, &self.blob_path(digest), Area::Blobs, entry.disk)?;
        self.blobs.blobs.write().remove(digest);
        Ok(entry.disk)
    }
}
