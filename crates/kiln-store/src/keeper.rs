//! The store's one background thread: group commits of the index, seals, emptying the trash, measuring directories.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kiln_fs::Stop;
use parking_lot::{Condvar, Mutex};

use crate::store::Store;

/// Commits are gathered this long before the index is synced.
const GROUP: Duration = Duration::from_millis(250);

#[derive(Debug, Default)]
struct Signal {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    wanted: bool,
    end: bool,
}

/// With this many bytes waiting in the trash a seal comes early,
const PRESSED: u64 = 64 << 20;
/// but not within this time of the last one.
const PRESSED_AFTER: Duration = Duration::from_secs(1);

/// Handle on the thread.
#[derive(Debug, Default)]
pub(crate) struct Keeper {
    signal: Arc<Signal>,
    thread: Mutex<Option<JoinHandle<()>>>,
    stop: Stop,
}

impl Keeper {
    /// Starts the thread. It holds the store only while it works, so it never keeps the directory locked for long.
    pub(crate) fn start(&self, store: &Arc<Store>) {
        let (signal, weak, stop) = (self.signal.clone(), Arc::downgrade(store), self.stop.clone());
        let spawned = std::thread::Builder::new()
            .name("store-keeper".into())
            .spawn(move || run(&signal, &weak, &stop));
        match spawned {
            Ok(thread) => *self.thread.lock() = Some(thread),
            Err(error) => tracing::warn!(%error, "no background thread: written data becomes durable at shutdown only"),
        }
    }

    /// There is something to do.
    pub(crate) fn wake(&self) {
        self.signal.state.lock().wanted = true;
        self.signal.changed.notify_one();
    }

    /// Ends the thread and waits for it.
    pub(crate) fn end(&self) {
        self.signal.state.lock().end = true;
        self.stop.stop();
        self.signal.changed.notify_one();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.signal.state.lock().end = true;
        self.signal.changed.notify_one();
    }
}

fn run(signal: &Signal, store: &Weak<Store>, stop: &Stop) {
    let mut sealed_at = Instant::now();
    loop {
        {
            let mut state = signal.state.lock();
            // Sleeps without a time limit when nothing was written: an idle daemon does not wake up.
            while !state.wanted && !state.end {
                signal.changed.wait(&mut state);
            }
            if !state.end {
                signal.changed.wait_for(&mut state, GROUP);
            }
            if state.end {
                return;
            }
            state.wanted = false;
        }
        let Some(store) = store.upgrade() else { return };
        let every = store.config.seal_every;
        store.flush_usage();
        if store.index.is_dirty()
            && let Err(error) = store.index.sync()
        {
            tracing::warn!(%error, "the index could not be synced");
        }
        store.measure_directories(stop);
        let since = sealed_at.elapsed();
        // A seal writes out the whole file system, also what others wrote: not more often than needed.
        let pressed = since >= PRESSED_AFTER && store.trash.waiting(store.epochs.sealed()) >= PRESSED;
        if since >= every || pressed {
            if let Err(error) = store.epochs.seal() {
                tracing::warn!(%error, "written data could not be made durable");
            }
            sealed_at = Instant::now();
        }
        if !store.trash.is_empty()
            && let Err(error) = store.trash.empty(&store, stop)
            && !error.is_canceled()
        {
            tracing::debug!(%error, "the trash is not empty");
        }
        if store.epochs.is_dirty() || store.index.is_dirty() || !store.trash.is_empty() {
            let rest = every.saturating_sub(sealed_at.elapsed());
            drop(store);
            let mut state = signal.state.lock();
            if !state.wanted && !state.end {
                signal.changed.wait_for(&mut state, rest.max(GROUP));
            }
            state.wanted = true;
        }
    }
}
