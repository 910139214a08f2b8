//! Tables in memory: the oracle of the engine tests.
#![cfg(test)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use parking_lot::RwLock;

use super::{Change, Each, MetaStore, Table};
use crate::error::Result;

type Pairs = BTreeMap<(Table, Vec<u8>), Vec<u8>>;

/// Ordered maps; `sync` has nothing to do.
#[derive(Default)]
pub(crate) struct MemoryTables(RwLock<Pairs>);

impl MetaStore for MemoryTables {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.0.read().get(&(table, key.to_vec())).cloned())
    }

    fn apply(&self, changes: &[Change]) -> Result<()> {
        let mut map = self.0.write();
        for change in changes {
            let key = (change.table, change.key.clone());
            match &change.value {
                Some(value) => drop(map.insert(key, value.clone())),
                None => drop(map.remove(&key)),
            }
        }
        Ok(())
    }

    fn scan(&self, table: Table, prefix: &[u8], each: &mut Each<'_>) -> Result<()> {
        let found: Vec<_> = self
            .0
            .read()
            .range((table, prefix.to_vec())..)
            .take_while(|((t, k), _)| *t == table && k.starts_with(prefix))
            .map(|((_, k), v)| (k.clone(), v.clone()))
            .collect();
        for (key, value) in found {
            if let ControlFlow::Break(()) = each(&key, &value) {
                break;
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
