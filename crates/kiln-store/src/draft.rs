//! Blobs in the making: drafts under `ingest/`, resumable by reference, verified when they are completed.

use std::collections::BTreeSet;
use std::collections::hash_map::Entry;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write};
use std::path::PathBuf;
use std::sync::Arc;

use kiln_oci::{Descriptor, DiffId, Digest, Hasher};

use crate::content::{BlobEntry, BlobHandle, BlobInfo, BlobRecord, ContentStore, blocks_of};
use crate::error::{IoContext as _, Result, StoreError};
use crate::ids::{Tenant, Time};
use crate::ledger::{Area, Reservation};
use crate::store::Store;

/// Writers reserve space in steps of this many bytes.
const RESERVE_STEP: u64 = 8 << 20;

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
    pub(crate) fn open(content: ContentStore, reference: Option<&str>) -> Result<Self> {
        let store = content.store();
        let reference = reference.map(|r| Digest::of(format!("{}\0{r}", content.tenant())).hex());
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
                    content.store().blobs.writers.lock().remove(name);
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
                self.content.store().grow(&mut self.space, needed)?;
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
        let handle = content.store().adopt_blob(content.tenant(), digest, &mut self)?;
        self.release();
        self.done = true;
        Ok(handle)
    }

    fn release(&mut self) -> Option<String> {
        let name = self.reference.take()?;
        self.content.store().blobs.writers.lock().remove(&name);
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
            self.content.store().ledger.add(Area::Ingest, blocks_of(&self.file));
            self.release();
        } else {
            let _ = fs::remove_file(&self.draft);
        }
    }
}

impl Store {
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
}
