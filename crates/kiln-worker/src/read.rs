//! Looking into results, for frontends: a file, a directory, one entry.

use std::io::{self, Read as _, Seek as _};

use bytes::Bytes;
use kiln_fs::mode;
use kiln_match::glob::go_match;
use kiln_store::{Entry, Kind, RealizeCtx, View};

use crate::client::Client;
use crate::error::{OpError, Result};
use crate::worker::{LlbWorker, Ref};

/// Frontends read small files; what is larger than this is refused rather than held in memory.
const MAX_FILE: u64 = 128 << 20;

/// One entry of a result; mode bits as Go's `os.FileMode` numbers them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileInfo {
    /// Name within the directory that was listed, or base name of the path that was asked for.
    pub path: String,
    /// Go mode bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: i64,
    /// Modification time in nanoseconds since 1970.
    pub mod_time: i64,
    /// Text of a symbolic link.
    pub linkname: String,
}

impl LlbWorker {
    /// The merged files of a result.
    pub async fn view(&self, client: &Client, value: &Ref) -> Result<View> {
        let ctx = RealizeCtx {
            providers: client.providers(),
            ..RealizeCtx::default()
        };
        Ok(self.store().realize(value.as_ref(), &ctx).await?)
    }

    /// A regular file, whole or a range of it (offset and length; short at the end).
    pub async fn read_file(
        &self,
        client: &Client,
        value: &Ref,
        path: &str,
        range: Option<(u64, u64)>,
    ) -> Result<Bytes> {
        let view = self.view(client, value).await?;
        let path = path.to_owned();
        blocking(move || {
            let node = view.find(path.as_bytes(), true)?.ok_or_else(|| no_such(&path))?;
            let entry = view.entry(&node);
            if entry.kind != Kind::Regular {
                return Err(OpError::user(format!("{path} is not a regular file")));
            }
            let (offset, length) = range.unwrap_or((0, entry.size));
            let length = length.min(entry.size.saturating_sub(offset));
            if length > MAX_FILE {
                return Err(OpError::user(format!("{path} is too large to be read: {length} bytes")));
            }
            let io = |e: io::Error| OpError::user(format!("failed to read {path}: {e}")).because(e);
            let mut file = view.open(&node)?;
            file.seek(io::SeekFrom::Start(offset)).map_err(io)?;
            let mut data = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
            file.take(length).read_to_end(&mut data).map_err(io)?;
            Ok(Bytes::from(data))
        })
        .await
    }

    /// The entries of a directory by name, those that match `include` if it is given (Go's `filepath.Match`).
    pub async fn read_dir(
        &self,
        client: &Client,
        value: &Ref,
        path: &str,
        include: Option<&str>,
    ) -> Result<Vec<FileInfo>> {
        let view = self.view(client, value).await?;
        let (path, include) = (path.to_owned(), include.map(str::to_owned));
        blocking(move || {
            let node = view.find(path.as_bytes(), true)?.ok_or_else(|| no_such(&path))?;
            if view.entry(&node).kind != Kind::Directory {
                return Err(OpError::user(format!("{path} is not a directory")));
            }
            let mut out = Vec::new();
            for child in view.children(&node) {
                let entry = view.entry(&child);
                let info = info(entry);
                let wanted = match &include {
                    None => true,
                    Some(pattern) => go_match(pattern.as_bytes(), entry.name())
                        .map_err(|e| OpError::user(format!("invalid pattern {pattern}: {e}")))?,
                };
                if wanted {
                    out.push(info);
                }
            }
            Ok(out)
        })
        .await
    }

    /// One entry; its last component is not followed.
    pub async fn stat_file(&self, client: &Client, value: &Ref, path: &str) -> Result<FileInfo> {
        let view = self.view(client, value).await?;
        let path = path.to_owned();
        blocking(move || {
            let node = view.find(path.as_bytes(), false)?.ok_or_else(|| no_such(&path))?;
            Ok(info(view.entry(&node)))
        })
        .await
    }
}

fn no_such(path: &str) -> OpError {
    // As the system call that opens it says: users know `failed to read dockerfile: open Dockerfile: no such file …`.
    OpError::missing(format!("open {path}: no such file or directory"))
}

fn info(entry: &Entry) -> FileInfo {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    FileInfo {
        path: text(entry.name()),
        mode: mode::to_go(entry.st_mode()),
        uid: entry.uid,
        gid: entry.gid,
        size: i64::try_from(entry.size).unwrap_or(i64::MAX),
        mod_time: entry.mtime.unix_nanos(),
        linkname: text(&entry.target),
    }
}

/// Runs blocking work on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    use kiln_solver::WorkerError as _;
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_cancelled() => Err(OpError::canceled()),
        Err(error) => Err(OpError::internal(format!("a task of the worker died: {error}"))),
    }
}
