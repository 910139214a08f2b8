//! The token by which blocking work learns that nobody waits for it any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Result, StoreError};

/// Shared flag that blocking jobs check for every file and every MiB. Clones share the flag.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// A token that is not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the job to end. It cannot be taken back.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether the job was asked to end.
    pub fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// [`StoreError::Canceled`] once the job was asked to end.
    pub fn check(&self) -> Result<()> {
        if self.is_stopped() { Err(StoreError::Canceled) } else { Ok(()) }
    }

    /// A guard that sets the token when dropped: the async side holds it, so that dropping the future stops the work.
    pub fn guard(&self) -> StopGuard {
        StopGuard { stop: self.clone(), armed: true }
    }
}

/// Sets its [`Stop`] on drop unless disarmed.
#[derive(Debug)]
pub struct StopGuard {
    stop: Stop,
    armed: bool,
}

impl StopGuard {
    /// The work ended by itself: dropping the guard no longer stops anything.
    pub fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for StopGuard {
    fn drop(&mut self) {
        if self.armed {
            self.stop.stop();
        }
    }
}
