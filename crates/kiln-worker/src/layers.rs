//! From a result to its bytes, for operations: realising with the sessions of those who wait, and the progress of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_fs::Stop;
use kiln_oci::Digest;
use kiln_solver::{ExecFailure, OpContext, Reopened, Reporter, StatusHandle};
use kiln_store::{LayerRef, RealizeCtx, RealizeEvent, RealizeObserver, View};

use crate::client::{Client, providers_of};
use crate::error::{OpError, OpResult, is_lost};
use crate::worker::LlbWorker;

/// What an operation brings along to realise a layer.
pub(crate) fn realize_ctx(cx: &OpContext<LlbWorker>) -> RealizeCtx {
    realize_ctx_of(&cx.clients(), cx.progress())
}

pub(crate) fn realize_ctx_of(clients: &[Arc<Client>], own: &Reporter) -> RealizeCtx {
    let observer = LayerProgress {
        own: own.clone(),
        clients: clients.to_vec(),
        open: Mutex::default(),
    };
    RealizeCtx {
        providers: providers_of(clients),
        observer: Some(Arc::new(observer)),
    }
}

/// The files of input `index`.
pub(crate) async fn realize_input(
    worker: &LlbWorker,
    cx: &OpContext<LlbWorker>,
    index: usize,
    layer: Option<&LayerRef>,
) -> OpResult<View> {
    match worker.store().realize(layer, &realize_ctx(cx)).await {
        Ok(view) => Ok(view),
        Err(error) if is_lost(&error) => {
            tracing::info!(%error, input = index, "an input is lost and will be made again");
            Err(ExecFailure::InputLost(index))
        }
        Err(error) => Err(ExecFailure::Failed(error.into())),
    }
}

/// Runs blocking work on a thread where that is allowed. Dropping the future tells it to stop.
pub(crate) async fn blocking<T: Send + 'static, E: Into<OpError> + Send + 'static>(
    work: impl FnOnce(&Stop) -> Result<T, E> + Send + 'static,
) -> Result<T, OpError> {
    let stop = Stop::new();
    let guard = stop.guard();
    let outcome = tokio::task::spawn_blocking(move || work(&stop)).await?;
    guard.disarm();
    outcome.map_err(Into::into)
}

/// Reports downloads and unpacking on the vertex that named the layer.
struct LayerProgress {
    own: Reporter,
    clients: Vec<Arc<Client>>,
    open: Mutex<HashMap<(Digest, bool), Part>>,
}

/// A part under way. Fields are dropped in order: the status completes before its vertex does.
struct Part {
    status: StatusHandle,
    _vertex: Option<Reopened>,
}

impl LayerProgress {
    fn update(&self, blob: Digest, extracting: bool, progress: Option<(u64, u64)>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let part = open.entry((blob, extracting)).or_insert_with(|| {
            let named = self.clients.iter().find_map(|c| c.reporter_of(&blob));
            let (reporter, vertex) = match named {
                Some(named) => {
                    let vertex = named.reopen();
                    (named, Some(vertex))
                }
                None => (self.own.clone(), None),
            };
            let id = if extracting {
                format!("extracting {blob}")
            } else {
                blob.to_string()
            };
            Part {
                status: reporter.status(id),
                _vertex: vertex,
            }
        });
        if let Some((current, total)) = progress {
            let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            part.status.set(number(current), number(total));
        }
    }

    fn done(&self, blob: Digest, extracting: bool) {
        let part = self
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&(blob, extracting));
        drop(part);
    }
}

impl RealizeObserver for LayerProgress {
    fn event(&self, event: RealizeEvent) {
        match event {
            RealizeEvent::Fetching { blob, current, total } => self.update(blob, false, Some((current, total))),
            RealizeEvent::Fetched { blob } => self.done(blob, false),
            RealizeEvent::Extracting { blob } => self.update(blob, true, None),
            RealizeEvent::Extracted { blob } => self.done(blob, true),
        }
    }
}
