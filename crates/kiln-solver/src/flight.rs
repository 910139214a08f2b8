//! Work in flight: started once, shared by everybody who asks for it meanwhile, given up with its last waiter.
//!
//! Two shapes. [`Lazy`] is a value of one owner (a job): started when it is first asked for, kept when it is there.
//! [`Flights`] is a table of work that several owners (jobs) share: an entry leaves it when its work is over, and an entry
//! whose last waiter left stays, dying, until the work has really stopped, so that the same work never runs twice at the
//! same time.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::future::Future;
use std::hash::Hash;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt as _;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

/// A value that is made when it is first asked for.
pub(crate) struct Lazy<T>(Mutex<LazyState<T>>);

enum LazyState<T> {
    Idle,
    Running {
        done: watch::Receiver<Option<T>>,
        waiters: usize,
        task: AbortHandle,
        id: u64,
    },
    Done(T),
}

impl<T: Clone + Send + Sync + 'static> Lazy<T> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(LazyState::Idle)))
    }

    fn lock(&self) -> MutexGuard<'_, LazyState<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value; made by `make`, in a task of its own, unless it is there or being made. `None` if making it panicked.
    pub(crate) async fn get<F>(self: &Arc<Self>, make: impl FnOnce() -> F) -> Option<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let (mut done, id) = {
            let mut state = self.lock();
            match &mut *state {
                LazyState::Done(value) => return Some(value.clone()),
                LazyState::Running { done, waiters, id, .. } => {
                    *waiters += 1;
                    (done.clone(), *id)
                }
                LazyState::Idle => {
                    let (tx, rx) = watch::channel(None);
                    let id = next_id();
                    let this = Arc::clone(self);
                    let work = make();
                    let task = tokio::spawn(async move {
                        let guard = Unfinished { lazy: this, id };
                        let value = work.await;
                        guard.finish(value.clone());
                        tx.send_replace(Some(value));
                    });
                    *state = LazyState::Running {
                        done: rx.clone(),
                        waiters: 1,
                        task: task.abort_handle(),
                        id,
                    };
                    (rx, id)
                }
            }
        };
        let _waiter = LazyWaiter { lazy: self, id };
        done.wait_for(Option::is_some).await.ok().and_then(|v| v.clone())
    }

    /// Forgets the value if `stale` says so; it is made again when it is next asked for.
    pub(crate) fn reset_if(&self, stale: impl FnOnce(&T) -> bool) {
        let mut state = self.lock();
        if matches!(&*state, LazyState::Done(value) if stale(value)) {
            *state = LazyState::Idle;
        }
    }
}

fn next_id() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Makes a value that was not finished, because its task panicked, possible to ask for again.
struct Unfinished<T: Clone + Send + Sync + 'static> {
    lazy: Arc<Lazy<T>>,
    id: u64,
}

impl<T: Clone + Send + Sync + 'static> Unfinished<T> {
    fn finish(&self, value: T) {
        let mut state = self.lazy.lock();
        if matches!(&*state, LazyState::Running { id, .. } if *id == self.id) {
            *state = LazyState::Done(value);
        }
    }
}

impl<T: Clone + Send + Sync + 'static> Drop for Unfinished<T> {
    fn drop(&mut self) {
        let mut state = self.lazy.lock();
        if matches!(&*state, LazyState::Running { id, .. } if *id == self.id) {
            *state = LazyState::Idle;
        }
    }
}

struct LazyWaiter<'a, T: Clone + Send + Sync + 'static> {
    lazy: &'a Lazy<T>,
    id: u64,
}

impl<T: Clone + Send + Sync + 'static> Drop for LazyWaiter<'_, T> {
    fn drop(&mut self) {
        let mut state = self.lazy.lock();
        if let LazyState::Running { waiters, task, id, .. } = &mut *state
            && *id == self.id
        {
            *waiters -= 1;
            if *waiters == 0 {
                task.abort();
                *state = LazyState::Idle;
            }
        }
    }
}

/// A table of shared work. `X` is what joiners may attach themselves to, `T` what the work results in.
pub(crate) struct Flights<K, X, T> {
    table: Mutex<HashMap<K, Entry<X, T>>>,
}

struct Entry<X, T> {
    flight: Arc<Flight<X, T>>,
    waiters: usize,
    dying: bool,
}

struct Flight<X, T> {
    shared: X,
    done: watch::Receiver<Option<T>>,
    cancel: CancellationToken,
}

/// What a starter makes: what joiners attach to, and the work.
pub(crate) struct Launch<X, F> {
    pub(crate) shared: X,
    pub(crate) work: F,
}

/// Held by whatever must be over before the same work may start again. Dropping it says so.
#[derive(Clone, Debug)]
pub struct TeardownGuard {
    alive: mpsc::Sender<()>,
}

impl TeardownGuard {
    /// A guard, and the end that learns when all clones of it are gone.
    pub(crate) fn new() -> (Self, mpsc::Receiver<()>) {
        let (alive, gone) = mpsc::channel(1);
        (Self { alive }, gone)
    }

    /// A handle that keeps nothing from starting again.
    pub(crate) fn downgrade(&self) -> WeakTeardown {
        WeakTeardown(self.alive.downgrade())
    }
}

/// Gives out guards as long as the work runs.
#[derive(Clone, Debug)]
pub(crate) struct WeakTeardown(mpsc::WeakSender<()>);

impl WeakTeardown {
    pub(crate) fn upgrade(&self) -> Option<TeardownGuard> {
        self.0.upgrade().map(|alive| TeardownGuard { alive })
    }
}

/// A place among the waiters of some work. Dropping it leaves.
pub(crate) struct Ticket<K: Eq + Hash + Clone, X, T> {
    flights: Arc<Flights<K, X, T>>,
    key: K,
    flight: Arc<Flight<X, T>>,
    /// Whether this ticket's owner started the work.
    pub(crate) starter: bool,
}

impl<K, X, T> Flights<K, X, T>
where
    K: Eq + Hash + Clone + Send + Sync + 'static,
    X: Clone + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
{
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            table: Mutex::new(HashMap::new()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Entry<X, T>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of entries, dying ones included.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// A place at work that runs under `key`, if there is any with waiters.
    pub(crate) fn join_running(self: &Arc<Self>, key: &K) -> Option<Ticket<K, X, T>> {
        let mut table = self.lock();
        let entry = table.get_mut(key).filter(|e| !e.dying)?;
        entry.waiters += 1;
        Some(Ticket {
            flights: Arc::clone(self),
            key: key.clone(),
            flight: Arc::clone(&entry.flight),
            starter: false,
        })
    }

    /// A place at the work under `key`: joined if it runs, else started with what `launch` makes. Waits for work of the
    /// same key that is being given up.
    pub(crate) async fn join<F>(
        self: &Arc<Self>,
        key: &K,
        mut launch: impl FnMut(TeardownGuard, CancellationToken) -> Launch<X, F>,
    ) -> Ticket<K, X, T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        loop {
            let mut over = {
                let mut table = self.lock();
                match table.entry(key.clone()) {
                    Slot::Occupied(mut occupied) => {
                        let entry = occupied.get_mut();
                        if !entry.dying {
                            entry.waiters += 1;
                            return Ticket {
                                flights: Arc::clone(self),
                                key: key.clone(),
                                flight: Arc::clone(&entry.flight),
                                starter: false,
                            };
                        }
                        entry.flight.done.clone()
                    }
                    Slot::Vacant(vacant) => {
                        let (teardown, gone) = TeardownGuard::new();
                        let cancel = CancellationToken::new();
                        let (tx, rx) = watch::channel(None);
                        let Launch { shared, work } = launch(teardown, cancel.clone());
                        let flight = Arc::new(Flight {
                            shared,
                            done: rx,
                            cancel: cancel.clone(),
                        });
                        vacant.insert(Entry {
                            flight: Arc::clone(&flight),
                            waiters: 1,
                            dying: false,
                        });
                        tokio::spawn(Arc::clone(self).drive(key.clone(), work, cancel, gone, tx));
                        return Ticket {
                            flights: Arc::clone(self),
                            key: key.clone(),
                            flight,
                            starter: true,
                        };
                    }
                }
            };
            // The sender goes when the entry has left the table.
            while over.changed().await.is_ok() {}
        }
    }

    async fn drive<F>(
        self: Arc<Self>,
        key: K,
        work: F,
        cancel: CancellationToken,
        mut gone: mpsc::Receiver<()>,
        done: watch::Sender<Option<T>>,
    ) where
        F: Future<Output = T> + Send + 'static,
    {
        let outcome = {
            let work = AssertUnwindSafe(work).catch_unwind();
            tokio::select! {
                biased;
                () = cancel.cancelled() => None,
                outcome = work => outcome.ok(),
            }
        };
        if outcome.is_none() {
            // Given up, or panicked: wait until nothing of it is left.
            while gone.recv().await.is_some() {}
        }
        // Newcomers must find the entry gone before the value is told: they look at what was saved.
        self.lock().remove(&key);
        done.send_replace(outcome);
    }
}

impl<K: Eq + Hash + Clone, X, T: Clone> Ticket<K, X, T> {
    /// What joiners attach to.
    pub(crate) fn shared(&self) -> &X {
        &self.flight.shared
    }

    /// The outcome; `None` if the work panicked.
    pub(crate) async fn wait(&self) -> Option<T> {
        let mut done = self.flight.done.clone();
        done.wait_for(Option::is_some).await.ok().and_then(|v| v.clone())
    }
}

impl<K: Eq + Hash + Clone, X, T> Drop for Ticket<K, X, T> {
    fn drop(&mut self) {
        let mut table = self.flights.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = table.get_mut(&self.key)
            && Arc::ptr_eq(&entry.flight, &self.flight)
        {
            entry.waiters -= 1;
            if entry.waiters == 0 {
                entry.dying = true;
                self.flight.cancel.cancel();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Notify;

    #[tokio::test]
    async fn lazy_runs_once_and_dies_with_its_last_waiter() {
        let lazy = Lazy::<u32>::new();
        let runs = Arc::new(AtomicUsize::new(0));
        let dropped = Arc::new(Notify::new());
        struct OnDrop(Arc<Notify>);
        impl Drop for OnDrop {
            fn drop(&mut self) {
                self.0.notify_one();
            }
        }
        let endless = {
            let (runs, dropped) = (Arc::clone(&runs), OnDrop(Arc::clone(&dropped)));
            move || async move {
                let _dropped = dropped;
                runs.fetch_add(1, Ordering::SeqCst);
                std::future::pending::<u32>().await
            }
        };
        let waiting = Arc::clone(&lazy);
        let task = tokio::spawn(async move { waiting.get(endless).await });
        while runs.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        task.abort();
        dropped.notified().await;
        assert_eq!(lazy.get(|| async { 7 }).await, Some(7));
        assert_eq!(lazy.get(|| async { 8 }).await, Some(7));
        lazy.reset_if(|v| *v == 7);
        assert_eq!(lazy.get(|| async { 9 }).await, Some(9));
    }

    #[tokio::test]
    async fn lazy_that_panics_can_be_asked_again() {
        let lazy = Lazy::<u32>::new();
        assert_eq!(lazy.get(|| async { panic!("on purpose") }).await, None);
        assert_eq!(lazy.get(|| async { 1 }).await, Some(1));
    }

    #[tokio::test]
    async fn newcomers_wait_until_dying_work_is_really_over() {
        let flights: Arc<Flights<u8, (), u32>> = Flights::new();
        let (guards, mut teardown) = mpsc::unbounded_channel();
        let first = flights
            .join(&1, |guard, _| {
                guards.send(guard).unwrap();
                Launch {
                    shared: (),
                    work: std::future::pending::<u32>(),
                }
            })
            .await;
        let guard = teardown.recv().await.unwrap();
        assert!(first.starter);
        let second = flights
            .join(&1, |_, _| Launch {
                shared: (),
                work: std::future::pending(),
            })
            .await;
        assert!(!second.starter);
        drop(first);
        assert!(flights.join_running(&1).is_some());
        drop(second);
        assert!(flights.join_running(&1).is_none(), "dying work takes nobody in");
        let again = Arc::clone(&flights);
        let mut third = tokio::spawn(async move {
            let ticket = again
                .join(&1, |_, _| Launch {
                    shared: (),
                    work: async { 5 },
                })
                .await;
            (ticket.starter, ticket.wait().await)
        });
        for _ in 0..50 {
            tokio::task::yield_now().await;
            assert!((&mut third).now_or_never().is_none(), "the guard is still held");
        }
        drop(guard);
        assert_eq!(third.await.unwrap(), (true, Some(5)));
        assert_eq!(flights.len(), 0);
    }

    #[tokio::test]
    async fn work_that_panics_tells_its_waiters() {
        let flights: Arc<Flights<u8, (), u32>> = Flights::new();
        let ticket = flights
            .join(&1, |_, _| Launch {
                shared: (),
                work: async { panic!("on purpose") },
            })
            .await;
        assert_eq!(ticket.wait().await, None);
        drop(ticket);
        assert_eq!(flights.len(), 0);
    }
}
