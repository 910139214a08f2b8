//! The index: small tables over what lies on disk, behind one commit call. Never the only copy of anything that has a
//! tree; everything else in it can be computed again.
//!
//! A commit is appended to a journal file (one `write`, so it survives the end of the process), applied to the tables
//! (visible at once), and made durable later by a background group sync, after which the journal starts anew. Opening
//! replays what the journal holds beyond the tables.

mod journal;
mod memory;
mod sled_open;
mod sled_tables;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Result, StoreError};
use crate::record_file;

use journal::Journal;
#[cfg(test)]
pub(crate) use memory::MemoryTables;

/// The tables. The byte is the table's name in the journal and, as text, in the engine; never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Table {
    /// Layer id -> layer record.
    Layers,
    /// Layer id -> last use and count.
    Usage,
    /// Tree id -> tree record.
    Trees,
    /// Digest -> blob record.
    Blobs,
    /// Record id -> cache record.
    Records,
    /// Key digest -> record id.
    Keys,
    /// Layer id, record id -> nothing; which records lose an output when a layer goes.
    Outputs,
    /// Record id, version, selector -> content digest.
    Aliases,
    /// Layer id of a snapshot, selector -> content digest, diff id of a tree and the like: facts about immutable things.
    Facts,
    /// Tenant, key -> bytes: what the solver remembers beside the records. Lost with the index.
    Notes,
}

impl Table {
    /// All tables.
    pub(crate) const ALL: [Self; 10] = [
        Self::Layers,
        Self::Usage,
        Self::Trees,
        Self::Blobs,
        Self::Records,
        Self::Keys,
        Self::Outputs,
        Self::Aliases,
        Self::Facts,
        Self::Notes,
    ];

    /// Name in the journal.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Layers => b'l',
            Self::Usage => b'u',
            Self::Trees => b't',
            Self::Blobs => b'b',
            Self::Records => b'r',
            Self::Keys => b'k',
            Self::Outputs => b'o',
            Self::Aliases => b'a',
            Self::Facts => b'f',
            Self::Notes => b'n',
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.code() == code)
    }
}

/// One change of one key; `None` removes it. Values are sealed (version and checksum).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) table: Table,
    pub(crate) key: Vec<u8>,
    pub(crate) value: Option<Vec<u8>>,
}

/// Changes that take effect together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Batch {
    pub(crate) changes: Vec<Change>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    pub(crate) fn put<T: Serialize>(&mut self, table: Table, key: impl Into<Vec<u8>>, value: &T) -> Result<()> {
        self.changes.push(Change {
            table,
            key: key.into(),
            value: Some(record_file::encode(value)?),
        });
        Ok(())
    }

    pub(crate) fn remove(&mut self, table: Table, key: impl Into<Vec<u8>>) {
        self.changes.push(Change {
            table,
            key: key.into(),
            value: None,
        });
    }
}

/// An ordered key-value engine with several tables. Two implementations: sled, and memory in tests (the oracle).
pub(crate) trait MetaStore: Send + Sync {
    /// The raw value of a key.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>>;
    /// Applies all changes or none, visible at once, durable only after [`MetaStore::sync`].
    fn apply(&self, changes: &[Change]) -> Result<()>;
    /// Calls `each` for every key with the prefix, in order, until told to stop.
    fn scan(&self, table: Table, prefix: &[u8], each: &mut Each<'_>) -> Result<()>;
    /// Returns when everything applied before is on the device.
    fn sync(&self) -> Result<()>;
}

/// Callback of [`MetaStore::scan`]: key and raw value.
pub(crate) type Each<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// More notes than this are cleared when the index is opened.
const MAX_NOTES: usize = if cfg!(test) { 1000 } else { 400_000 };

/// How opening the index went.
#[derive(Debug, Default)]
pub(crate) struct IndexOpened {
    /// There was no index, or it could not be used (why): it has to be rebuilt.
    pub(crate) rebuild: Option<String>,
    /// Commits taken from the journal.
    pub(crate) replayed: usize,
    /// Notes were cleared because there were too many.
    pub(crate) forgot_notes: bool,
    /// The tables were copied into a fresh store, because the old one was mostly dead data.
    pub(crate) compacted: bool,
}

/// The index of one state directory.
pub(crate) struct Index {
    dir: PathBuf,
    tables: Box<dyn MetaStore>,
    journal: Mutex<Writer>,
    damaged: AtomicU64,
    broken: AtomicBool,
    /// Number of the last group sync.
    sequence: AtomicU64,
}

/// The journal, and the sum over everything committed: hashes of table, key and value of every pair, added up. An engine
/// that silently forgot something (sled cuts its log at the first damaged page) is found out by it when it is opened.
struct Writer {
    journal: Journal,
    sum: u64,
}

/// What the tables held at the last group sync.
#[derive(Clone, Copy, Debug, Serialize, serde::Deserialize)]
struct Stamp {
    sequence: u64,
    sum: u64,
}

fn hash_of(table: Table, key: &[u8], value: &[u8]) -> u64 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    hasher.update(&[table.code()]);
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    hasher.digest()
}

/// The sum over all tables, and the number of notes.
fn sum_of(tables: &dyn MetaStore) -> Result<(u64, usize)> {
    let (mut sum, mut notes) = (0u64, 0);
    for table in Table::ALL {
        tables.scan(table, b"", &mut |key, value| {
            sum = sum.wrapping_add(hash_of(table, key, value));
            notes += usize::from(table == Table::Notes);
            ControlFlow::Continue(())
        })?;
    }
    Ok((sum, notes))
}

/// Empties tables.
fn clear(tables: &dyn MetaStore, which: &[Table]) -> Result<()> {
    for table in which.iter().copied() {
        let mut changes = Vec::new();
        tables.scan(table, b"", &mut |key, _| {
            changes.push(Change {
                table,
                key: key.to_vec(),
                value: None,
            });
            ControlFlow::Continue(())
        })?;
        for part in changes.chunks(1000) {
            tables.apply(part)?;
        }
    }
    Ok(())
}

fn read_stamp(dir: &Path) -> Option<Stamp> {
    match record_file::read(&dir.join("stamp")) {
        Ok(stamp) => Some(stamp),
        Err(error) => {
            if !error.is_missing_file() {
                tracing::warn!(%error, "the index has no readable stamp; its completeness is not checked");
            }
            None
        }
    }
}

impl Index {
    /// Opens or creates the index in `dir`. An unusable one is moved to `aside` and replaced by an empty one, with the
    /// reason reported.
    pub(crate) fn open(dir: &Path, aside: &Path) -> Result<(Self, IndexOpened)> {
        let mut opened = IndexOpened::default();
        let tables = sled_open::open(dir, aside, &mut opened)?;
        Self::with_tables(dir, tables, opened)
    }

    /// The same over a given engine.
    pub(crate) fn with_tables(
        dir: &Path,
        tables: Box<dyn MetaStore>,
        mut opened: IndexOpened,
    ) -> Result<(Self, IndexOpened)> {
        let stamp = read_stamp(dir);
        let (journal, entries, torn) = Journal::open(dir)?;
        let mut sum = 0;
        let mut sequence = 0;
        if opened.rebuild.is_none() {
            for entry in &entries {
                tables.apply(&entry.changes)?;
            }
            opened.replayed = entries.len();
            let notes;
            (sum, notes) = sum_of(&*tables)?;
            let expected = entries.last().map(|e| e.sum).or(stamp.map(|s| s.sum));
            sequence = stamp.map_or(0, |s| s.sequence);
            if expected.is_some_and(|expected| expected != sum) {
                opened.rebuild = Some("the engine does not hold what was committed to it".into());
            } else if notes > MAX_NOTES {
                // Nobody removes single notes; what is still true is noted again.
                clear(&*tables, &[Table::Notes])?;
                (sum, _) = sum_of(&*tables)?;
                opened.forgot_notes = true;
            }
        }
        if let Some(at) = &torn {
            tracing::info!(file = %at.display(), "the last journal entry was not complete; ignored");
        }
        if opened.rebuild.is_some() {
            // Whatever is left of it would be taken for newer than what the records on disk say.
            clear(&*tables, &Table::ALL)?;
            sum = 0;
        }
        let index = Self {
            dir: dir.to_owned(),
            tables,
            journal: Mutex::new(Writer { journal, sum }),
            damaged: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            sequence: AtomicU64::new(sequence),
        };
        if opened.replayed > 0 || torn.is_some() || opened.rebuild.is_some() || opened.forgot_notes {
            index.sync()?;
        }
        Ok((index, opened))
    }

    /// Applies all changes or none. When this returns the changes survive the end of the process.
    pub(crate) fn commit(&self, batch: &Batch) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        // The journal's order must be the order of application, so this one lock spans one short write.
        let mut writer = self.journal.lock();
        self.commit_in(&mut writer, &batch.changes)
    }

    fn commit_in(&self, writer: &mut Writer, changes: &[Change]) -> Result<()> {
        let mut sum = writer.sum;
        let mut fresh: std::collections::HashMap<(Table, &[u8]), Option<&[u8]>> = std::collections::HashMap::new();
        for change in changes {
            let key = (change.table, change.key.as_slice());
            let old = match fresh.get(&key) {
                Some(value) => value.map(<[u8]>::to_vec),
                None => self.note(self.tables.get(change.table, &change.key))?,
            };
            if let Some(old) = old {
                sum = sum.wrapping_sub(hash_of(change.table, &change.key, &old));
            }
            if let Some(new) = &change.value {
                sum = sum.wrapping_add(hash_of(change.table, &change.key, new));
            }
            fresh.insert(key, change.value.as_deref());
        }
        writer.journal.append(changes, sum)?;
        self.note(self.tables.apply(changes))?;
        writer.sum = sum;
        Ok(())
    }

    /// The value of a key. A damaged value counts as missing and is counted.
    pub(crate) fn get<T: DeserializeOwned>(&self, table: Table, key: &[u8]) -> Result<Option<T>> {
        let Some(raw) = self.note(self.tables.get(table, key))? else {
            return Ok(None);
        };
        match record_file::decode(&raw) {
            Ok(value) => Ok(Some(value)),
            Err(reason) => {
                self.damaged.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(?table, reason, "a value in the index is damaged; treated as missing");
                Ok(None)
            }
        }
    }

    /// Every key with a prefix and its value; damaged ones are skipped and counted.
    pub(crate) fn scan<T: DeserializeOwned>(
        &self,
        table: Table,
        prefix: &[u8],
        mut each: impl FnMut(&[u8], T) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut damaged = 0;
        let outcome = self
            .tables
            .scan(table, prefix, &mut |key, raw| match record_file::decode(raw) {
                Ok(value) => each(key, value),
                Err(_) => {
                    damaged += 1;
                    ControlFlow::Continue(())
                }
            });
        self.damaged.fetch_add(damaged, Ordering::Relaxed);
        self.note(outcome)
    }

    /// Values found damaged since opening.
    #[cfg(test)]
    pub(crate) fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }

    /// Whether there are commits that only the journal holds.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.journal.lock().journal.is_empty()
    }

    /// Group commit: everything committed before is on the device when this returns.
    pub(crate) fn sync(&self) -> Result<()> {
        let (sealed, stamp) = {
            let mut writer = self.journal.lock();
            let sealed = writer.journal.rotate()?;
            let sequence = self.sequence.fetch_add(1, Ordering::AcqRel) + 1;
            (
                sealed,
                Stamp {
                    sequence,
                    sum: writer.sum,
                },
            )
        };
        self.note(self.tables.sync())?;
        record_file::write(&self.dir.join("stamp"), &stamp)?;
        Journal::forget(&self.dir, sealed)
    }

    /// An engine that failed once is not believed on the next start.
    fn note<T>(&self, outcome: Result<T>) -> Result<T> {
        if outcome.is_err() && !self.broken.swap(true, Ordering::AcqRel) {
            let marker = self.dir.join(sled_open::BROKEN);
            if let Err(error) = std::fs::write(&marker, b"") {
                tracing::warn!(%error, "could not mark the index as broken");
            }
        }
        outcome
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// Turns a panic of the engine into an error.
pub(crate) fn caught<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(outcome) => outcome,
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("unknown panic");
            Err(StoreError::Index(format!("{what}: the engine panicked: {text}")))
        }
    }
}

#[cfg(test)]
mod tests;
