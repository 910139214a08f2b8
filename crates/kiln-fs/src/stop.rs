//! How blocking work learns that nobody waits for it any more.
//!
//! A future is cancelled by dropping it; a thread is not. A blocking job therefore owns everything it needs and asks its
//! [`Stop`] for every file and every MiB.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag shared by a job and whoever may end it. Cloning shares the flag.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

/// The answer of a job that was told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped")]
pub struct Stopped;

impl Stop {
    /// A flag that is not raised.
    pub fn new() -> Self {
        Self::default()
    }

    /// Raises the flag. It is never lowered again.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the flag is raised.
    pub fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// `Err(Stopped)` once the flag is raised; for use with `?` inside loops.
    pub fn check(&self) -> Result<(), Stopped> {
        if self.is_stopped() { Err(Stopped) } else { Ok(()) }
    }

    /// A guard that raises the flag when dropped, for the future that waits for the job.
    pub fn guard(&self) -> StopGuard {
        StopGuard(Some(self.clone()))
    }
}

/// Raises its [`Stop`] when dropped, unless disarmed.
#[derive(Debug)]
pub struct StopGuard(Option<Stop>);

impl StopGuard {
    /// Forgets the flag: the job ended by itself.
    pub fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for StopGuard {
    fn drop(&mut self) {
        if let Some(stop) = &self.0 {
            stop.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guard_raises_unless_disarmed() {
        let stop = Stop::new();
        stop.guard().disarm();
        assert!(stop.check().is_ok());
        drop(stop.clone().guard());
        assert_eq!(stop.check(), Err(Stopped));
    }
}
