//! How an exporter says what it is doing.

use std::sync::Arc;
use std::time::SystemTime;

/// The state of one part of an export; later states replace earlier ones of the same id.
#[derive(Clone, Debug, PartialEq)]
pub struct StatusUpdate {
    /// The text that is shown, unique within the export.
    pub id: String,
    /// Units done, bytes in most cases.
    pub current: u64,
    /// Units in all, 0 if unknown.
    pub total: u64,
    /// When it started.
    pub started: SystemTime,
    /// When it completed, if it did.
    pub completed: Option<SystemTime>,
}

/// Where statuses go; the daemon shows them under the exporter's vertex.
pub trait ExportProgress: Send + Sync {
    /// A status began, moved on or completed. Must not block.
    fn status(&self, update: StatusUpdate);
}

/// Nobody listens.
impl ExportProgress for () {
    fn status(&self, _update: StatusUpdate) {}
}

/// A status that is open; completed when dropped, also on failure, because clients keep a step open until all its
/// statuses are complete.
pub(crate) struct Status {
    sink: Arc<dyn ExportProgress>,
    update: StatusUpdate,
}

impl Status {
    pub(crate) fn begin(sink: &Arc<dyn ExportProgress>, id: impl Into<String>) -> Self {
        let update = StatusUpdate {
            id: id.into(),
            current: 0,
            total: 0,
            started: SystemTime::now(),
            completed: None,
        };
        sink.status(update.clone());
        Self {
            sink: sink.clone(),
            update,
        }
    }

    /// Reports `current` units; callers limit how often.
    pub(crate) fn at(&mut self, current: u64) {
        self.update.current = current;
        self.sink.status(self.update.clone());
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        self.update.completed = Some(SystemTime::now());
        self.sink.status(self.update.clone());
    }
}
