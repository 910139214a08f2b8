//! Content by digest: blobs that are complete and verified, and the drafts they grow from.
//!
//! A blob is `blobs/sha256/<hex>`; its record (media type, diff id, where it came from, whose it is) lies beside it as
//! `<hex>.record`. A draft under `ingest/` becomes a blob by one rename when its digest is known, so a blob that exists is
//! whole. Possession is by tenant: a blob that only another tenant has is not there.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use kiln_oci::{Descriptor, DiffId, Digest};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use crate::draft::ContentWriter;
use crate::error::{IoContext as _, Result, StoreError};
use crate::ids::{Tenant, Time};
use crate::ledger::Area;
use crate::meta::{Batch, Table};
use crate::record_file;
use crate::store::Store;

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
    pub(crate) last_used: Time,
    /// Garbage collection is removing it: it is not there any more for anybody.
    pub(crate) dying: bool,
}

/// The blobs of a state directory.
#[derive(Debug, Default)]
pub(crate) struct BlobTable {
    pub(crate) blobs: RwLock<HashMap<Digest, BlobEntry>>,
    /// Ingest references with a writer.
    pub(crate) writers: Mutex<HashSet<String>>,
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
    pub(crate) store: Arc<Store>,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) media_type: Option<String>,
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
