//! Work under way that several callers wait for: done once, ended when the last of them goes away.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Weak};

use futures::future::{BoxFuture, FutureExt as _, Shared, WeakShared};
use kiln_fs::Stop;
use kiln_oci::{Descriptor, Digest};
use parking_lot::Mutex;

use crate::compress::Compression;
use crate::content::BlobHandle;
use crate::error::{Result, StoreError};
use crate::ids::{LayerId, Tenant};
use crate::realize::{RealizeEvent, RealizeObserver};
use crate::tree::Tree;

/// What work yields, for whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Fetch(Tenant, Digest),
    Apply(LayerId),
    Pack(LayerId, Compression),
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    Blob(BlobHandle),
    Tree(Tree),
    Packed(Box<Descriptor>),
}

pub(crate) type Outcome = std::result::Result<Value, Arc<StoreError>>;
pub(crate) type Work = BoxFuture<'static, Outcome>;

/// Observers of one piece of work.
#[derive(Clone, Default)]
pub(crate) struct Watchers(Arc<Mutex<Vec<Weak<dyn RealizeObserver>>>>);

impl Watchers {
    pub(crate) fn add(&self, observer: Option<&Arc<dyn RealizeObserver>>) {
        if let Some(observer) = observer {
            self.0.lock().push(Arc::downgrade(observer));
        }
    }

    pub(crate) fn tell(&self, event: &RealizeEvent) {
        let watchers: Vec<_> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        for watcher in watchers {
            watcher.event(event.clone());
        }
    }
}

/// Work under way, by what it yields. The table holds it weakly: without waiters it ends.
#[derive(Default)]
pub(crate) struct InFlight(Mutex<HashMap<Key, (WeakShared<Work>, Watchers)>>);

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InFlight").field(&self.0.lock().len()).finish()
    }
}

impl InFlight {
    /// Joins work under way or starts it; tells whether it was started.
    pub(crate) fn join(
        &self,
        key: &Key,
        observer: Option<&Arc<dyn RealizeObserver>>,
        start: impl FnOnce(Watchers) -> Work,
    ) -> (Shared<Work>, bool) {
        let mut table = self.0.lock();
        if let Some((work, watchers)) = table.get(key)
            && let Some(work) = work.upgrade()
        {
            watchers.add(observer);
            return (work, false);
        }
        table.retain(|_, (work, _)| work.upgrade().is_some());
        let watchers = Watchers::default();
        watchers.add(observer);
        let work = start(watchers.clone()).shared();
        if let Some(weak) = work.downgrade() {
            table.insert(key.clone(), (weak, watchers));
        }
        (work, true)
    }

    pub(crate) fn done(&self, key: &Key) {
        self.0.lock().remove(key);
    }
}

/// The error of shared work, for one of its waiters.
pub(crate) fn shared(error: Arc<StoreError>) -> StoreError {
    Arc::try_unwrap(error).unwrap_or_else(StoreError::Shared)
}

/// Runs blocking work that stops when the future is dropped.
pub(crate) async fn blocking<T: Send + 'static>(
    task: &'static str,
    work: impl FnOnce(&Stop) -> Result<T> + Send + 'static,
) -> Result<T> {
    let stop = Stop::new();
    let guard = stop.guard();
    let outcome = tokio::task::spawn_blocking(move || work(&stop)).await;
    guard.disarm();
    outcome.map_err(|_| StoreError::Panicked { task })?
}
