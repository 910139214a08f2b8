//! The tables in sled. One of the two files that know the engine; the other opens it.
//!
//! sled panics on damage instead of returning errors, and its own flush does not reach the device: both are mended here
//! (every call is caught; [`SledTables::sync`] ends in our own `fdatasync` on the engine's log file).

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;

use sled::transaction::{ConflictableTransactionError, TransactionError, Transactional as _};

use super::{Change, Each, MetaStore, Table, caught};
use crate::error::{IoContext as _, Result, StoreError};

/// An open sled database with one tree per table.
pub(super) struct SledTables {
    db: sled::Db,
    tables: BTreeMap<Table, sled::Tree>,
    log: File,
}

fn failed(what: &str, error: &sled::Error) -> StoreError {
    StoreError::Index(format!("{what}: {error}"))
}

impl SledTables {
    /// Wraps an open database; `dir` is the engine's directory. Everything created by opening is made durable.
    pub(super) fn new(db: sled::Db, dir: &Path) -> Result<Self> {
        let mut tables = BTreeMap::new();
        for table in Table::ALL {
            let tree = db.open_tree([table.code()]).map_err(|e| failed("open table", &e))?;
            tables.insert(table, tree);
        }
        db.flush().map_err(|e| failed("flush", &e))?;
        for entry in std::fs::read_dir(dir).during("list", dir)? {
            let path = entry.during("list", dir)?.path();
            let file = File::open(&path).during("open", &path)?;
            file.sync_all().during("sync", &path)?;
        }
        for dir in [Some(dir), dir.parent()].into_iter().flatten() {
            File::open(dir).during("open", dir)?.sync_all().during("sync", dir)?;
        }
        let path = dir.join("db");
        let log = File::open(&path).during("open", &path)?;
        Ok(Self { db, tables, log })
    }

    fn tree(&self, table: Table) -> Result<&sled::Tree> {
        self.tables
            .get(&table)
            .ok_or_else(|| StoreError::Index(format!("no table {table:?}")))
    }

    /// Bytes of keys and values.
    pub(super) fn live_bytes(&self) -> Result<u64> {
        caught("measure", || {
            let mut total = 0;
            for tree in self.tables.values() {
                for pair in tree.iter() {
                    let (key, value) = pair.map_err(|e| failed("measure", &e))?;
                    total += (key.len() + value.len()) as u64;
                }
            }
            Ok(total)
        })
    }

    /// Copies every table into `other`.
    pub(super) fn copy_to(&self, other: &Self) -> Result<()> {
        caught("copy", || {
            for (table, tree) in &self.tables {
                let target = other.tree(*table)?;
                for pair in tree.iter() {
                    let (key, value) = pair.map_err(|e| failed("copy", &e))?;
                    target.insert(key, value).map_err(|e| failed("copy", &e))?;
                }
            }
            Ok(())
        })
    }
}

impl MetaStore for SledTables {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let tree = self.tree(table)?;
        caught("get", || {
            Ok(tree.get(key).map_err(|e| failed("get", &e))?.map(|v| v.to_vec()))
        })
    }

    fn apply(&self, changes: &[Change]) -> Result<()> {
        let mut batches: BTreeMap<Table, sled::Batch> = BTreeMap::new();
        for change in changes {
            let batch = batches.entry(change.table).or_default();
            match &change.value {
                Some(value) => batch.insert(change.key.as_slice(), value.as_slice()),
                None => batch.remove(change.key.as_slice()),
            }
        }
        caught("commit", || {
            if batches.len() == 1 {
                for (table, batch) in batches {
                    self.tree(table)?.apply_batch(batch).map_err(|e| failed("commit", &e))?;
                }
                return Ok(());
            }
            let mut trees = Vec::with_capacity(batches.len());
            let mut parts = Vec::with_capacity(batches.len());
            for (table, batch) in &batches {
                trees.push(self.tree(*table)?);
                parts.push(batch);
            }
            let done = trees.as_slice().transaction(|views| {
                for (view, batch) in views.iter().zip(&parts) {
                    view.apply_batch(batch)?;
                }
                Ok::<(), ConflictableTransactionError<()>>(())
            });
            done.map_err(|e| match e {
                TransactionError::Storage(e) => failed("commit", &e),
                TransactionError::Abort(()) => StoreError::Index("commit: aborted".into()),
            })
        })
    }

    fn scan(&self, table: Table, prefix: &[u8], each: &mut Each<'_>) -> Result<()> {
        let tree = self.tree(table)?;
        let mut pairs = tree.scan_prefix(prefix);
        loop {
            let next = caught("scan", || pairs.next().transpose().map_err(|e| failed("scan", &e)))?;
            let Some((key, value)) = next else { return Ok(()) };
            if let ControlFlow::Break(()) = each(&key, &value) {
                return Ok(());
            }
        }
    }

    fn sync(&self) -> Result<()> {
        caught("flush", || {
            self.db.flush().map_err(|e| failed("flush", &e))?;
            Ok(())
        })?;
        self.log
            .sync_data()
            .map_err(|e| StoreError::Index(format!("sync the log: {e}")))
    }
}
