//! `local://`: one of the client's directories, received over its session.
//!
//! What was received before under the same key is kept, with its listing, so that a transfer moves only what changed. The
//! files become a layer where they are; content digests of files are made while they are written and never again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use kiln_fs::Dir;
use kiln_llb::Vertex;
use kiln_llb::op::SourceOp;
use kiln_oci::Digest;
use kiln_session::{Existing, LocalDir, ReceiveOptions, Received, SessionId};
use kiln_solver::{OpContext, StatusHandle, WorkerError as _};
use kiln_store::LayerRef;

use super::local_listing::{self, entry_prefix, store_entries};
use super::{Source, SourceInstance, SourceKey};
use crate::client::Pin;
use crate::error::{OpError, OpResult};
use crate::layers::blocking;
use crate::worker::{LlbWorker, store_tenant};

/// How often the number of bytes is reported.
const TICK: Duration = Duration::from_millis(100);

/// Directories of clients.
#[derive(Debug)]
pub struct LocalSource;

struct LocalInstance {
    worker: LlbWorker,
    vertex: Arc<Vertex>,
    dir: LocalDir,
    /// The session that has it; `None` is any of the build's.
    session: Option<SessionId>,
    shared_key_hint: String,
    differ: bool,
    metadata_only: Option<Vec<String>>,
}

impl Source for LocalSource {
    fn schemes(&self) -> &'static [&'static str] {
        &["local"]
    }

    fn open(
        &self,
        worker: &LlbWorker,
        vertex: &Arc<Vertex>,
        op: &SourceOp,
    ) -> Result<Box<dyn SourceInstance>, OpError> {
        let (prefix, session) = match op.attr("local.session").filter(|s| !s.is_empty()) {
            Some(value) => {
                let (prefix, id) = SessionId::from_attribute(value);
                (prefix, Some(id))
            }
            None => (None, None),
        };
        let name = match prefix {
            Some(prefix) if !prefix.is_empty() => format!("{prefix}-{}", op.reference()),
            _ => op.reference().to_owned(),
        };
        let differ = match op.attr("local.differ") {
            None | Some("" | "metadata") => true,
            Some("none") => false,
            Some(other) => return Err(OpError::user(format!("invalid local.differ value `{other}`"))),
        };
        let metadata_only = if op.flag("local.metadatatransfer") {
            Some(list(op, "local.metadatatransferexclude")?.unwrap_or_default())
        } else {
            None
        };
        Ok(Box::new(LocalInstance {
            worker: worker.clone(),
            vertex: Arc::clone(vertex),
            dir: LocalDir {
                name,
                include: list(op, "local.includepattern")?,
                exclude: list(op, "local.excludepatterns")?,
                follow_paths: list(op, "local.followpaths")?,
            },
            session,
            shared_key_hint: op.attr("local.sharedkeyhint").unwrap_or_default().to_owned(),
            differ,
            metadata_only,
        }))
    }
}

/// A list in JSON; absent and empty texts are no list.
fn list(op: &SourceOp, attr: &str) -> Result<Option<Vec<String>>, OpError> {
    match op.attr(attr) {
        None | Some("") => Ok(None),
        Some(text) => serde_json::from_str(text)
            .map(Some)
            .map_err(|e| OpError::user(format!("invalid {attr} `{text}`: {e}")).because(e)),
    }
}

impl LocalInstance {
    fn session_of(&self, cx: &OpContext<LlbWorker>) -> Result<SessionId, OpError> {
        match &self.session {
            Some(id) => Ok(id.clone()),
            None => cx
                .clients()
                .first()
                .map(|c| c.session.clone())
                .ok_or_else(|| OpError::unavailable("no active sessions").personal()),
        }
    }

    /// What must be equal for a transfer to build upon an earlier one.
    fn shared_key(&self, of_session: &str) -> String {
        let metadata = match &self.metadata_only {
            Some(patterns) => format!(":metadata:{patterns:?}"),
            None => String::new(),
        };
        format!("{}:{}:{of_session}{metadata}", self.dir.name, self.shared_key_hint)
    }
}

#[async_trait]
impl SourceInstance for LocalInstance {
    async fn key(&self, cx: &OpContext<LlbWorker>) -> Result<SourceKey, OpError> {
        let identity = format!(
            "{} {:?} {:?} {} {:?}",
            self.session_of(cx)?,
            self.dir,
            self.vertex.digest.0,
            self.differ,
            self.metadata_only
        );
        for client in cx.clients() {
            let identifier = format!("local://{}", self.dir.name);
            client.pin(
                self.vertex.digest,
                Pin {
                    identifier,
                    digest: String::new(),
                    platform: String::new(),
                },
            );
        }
        Ok(SourceKey {
            keys: vec![format!("session:{}:{}", self.dir.name, Digest::of(identity))],
            transient: true,
        })
    }

    async fn fetch(&self, cx: &OpContext<LlbWorker>) -> OpResult<Option<LayerRef>> {
        let session = self
            .worker
            .sessions()
            .get(&self.session_of(cx)?)
            .await
            .map_err(OpError::from)?;
        let _permit = cx.permit().await;
        let tenant = store_tenant(cx.tenant())?;
        let shared_key = self.shared_key(session.shared_key());
        let description = format!("local source for {}", self.dir.name);
        let store = Arc::clone(self.worker.store());
        let (context, root, existing) = blocking(move |stop| {
            let context = store.context(&tenant, &shared_key, &description, stop)?;
            let root =
                Dir::open_ambient(context.fs_path()).map_err(|e| OpError::internal(format!("open context: {e}")))?;
            let existing = if context.is_new() {
                Existing::Empty
            } else {
                // The listing is taken away first: should the transfer not end, the disk is looked at next time.
                match local_listing::take(&context.state_path()) {
                    Some(listing) => Existing::Listing(listing),
                    None => Existing::Disk { delete: true },
                }
            };
            Ok::<_, OpError>((context, root, existing))
        })
        .await?;
        let bytes = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&bytes);
        // The context stays taken until the last write to it is over, also if this future is dropped.
        let context = Arc::new(Mutex::new(Some(context)));
        let options = ReceiveOptions {
            existing,
            differ: self.differ,
            metadata_only: self.metadata_only.clone(),
            digest: Some(Arc::new(entry_prefix)),
            progress: Some(Arc::new(move |n| counter.store(n, Ordering::Relaxed))),
            keep: Some(Arc::clone(&context) as Arc<_>),
            ..ReceiveOptions::default()
        };
        let status = cx.progress().status(format!("transferring {}:", self.dir.name));
        let received = session.receive_dir(&self.dir, root, options);
        let received = with_progress(status, &bytes, received).await.map_err(OpError::from)?;
        tracing::debug!(dir = %self.dir.name, stats = ?received.stats, "received");
        let layer = blocking(move |_| {
            let context = context.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(context) = context else {
                return Err(OpError::internal("the context is gone".into()));
            };
            if let Err(error) = local_listing::keep(&context.state_path(), &received.listing) {
                tracing::warn!(%error, "the listing of a context is not kept: the next transfer looks at the disk");
            }
            let (entries, digests) = store_entries(&received.listing);
            let layer = context.freeze(entries)?;
            if let Some(tree) = layer.tree() {
                let manifest = tree.manifest()?;
                for (path, digest) in digests {
                    if let Some(index) = manifest.find(&path) {
                        tree.remember_digest(index, digest);
                    }
                }
            }
            Ok(layer)
        })
        .await?;
        Ok(Some(layer))
    }
}

/// Reports the bytes received, now and then, until the transfer is over.
async fn with_progress<E>(
    mut status: StatusHandle,
    bytes: &AtomicU64,
    transfer: impl Future<Output = Result<Received, E>>,
) -> Result<Received, E> {
    let show = |status: &mut StatusHandle, n: u64| status.set(i64::try_from(n).unwrap_or(i64::MAX), 0);
    tokio::pin!(transfer);
    loop {
        tokio::select! {
            biased;
            outcome = &mut transfer => {
                let bytes = outcome.as_ref().map_or(bytes.load(Ordering::Relaxed), |r| r.stats.bytes);
                show(&mut status, bytes);
                return outcome;
            }
            () = tokio::time::sleep(TICK) => show(&mut status, bytes.load(Ordering::Relaxed)),
        }
    }
}
