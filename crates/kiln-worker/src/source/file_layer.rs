//! A layer that is a single file: what `http` sources and single blobs become.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use kiln_fs::Timestamp;
use kiln_llb::op::SourceOp;
use kiln_store::{BlobHandle, Entry, Kind, LayerMeta, LayerRef, RecordType, Store, StoreError, Tenant, View};

use crate::error::OpError;
use crate::key::BlobFile;
use crate::layers::blocking;

/// Permission bits of files that were given none.
const DEFAULT_MODE: u32 = 0o600;

/// Name and metadata of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileMeta {
    /// Name, without any directory.
    pub(crate) name: String,
    /// Permission bits as given; 0 means 0600.
    pub(crate) perm: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Modification time in seconds.
    pub(crate) mtime: i64,
}

impl FileMeta {
    /// From the attributes `http.filename`, `http.perm`, `http.uid`, `http.gid`.
    pub(crate) fn from_attrs(op: &SourceOp, default_name: &str) -> Result<Self, OpError> {
        let number = |name: &str| match op.attr(name) {
            None | Some("") => Ok(0),
            Some(text) => text
                .parse::<u32>()
                .map_err(|_| OpError::user(format!("invalid value {text} of {name}"))),
        };
        let name = op
            .attr("http.filename")
            .filter(|n| !n.is_empty())
            .unwrap_or(default_name);
        Ok(Self {
            name: safe_name(name),
            perm: perm(op.attr("http.perm").unwrap_or_default())?,
            uid: number("http.uid")?,
            gid: number("http.gid")?,
            mtime: 0,
        })
    }

    /// The part that keys are made of.
    pub(crate) fn file(&self) -> BlobFile {
        BlobFile {
            filename: self.name.clone(),
            perm: self.perm,
            uid: self.uid,
            gid: self.gid,
        }
    }
}

/// A number in Go's syntax with base prefix: `0644`, `0o644`, `420`, `0x1a4`.
fn perm(text: &str) -> Result<u32, OpError> {
    let parsed = match text {
        "" => Ok(0),
        _ => match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => match text.strip_prefix("0o").or_else(|| text.strip_prefix("0O")) {
                Some(octal) => u32::from_str_radix(octal, 8),
                None if text.len() > 1 && text.starts_with('0') => u32::from_str_radix(text, 8),
                None => text.parse(),
            },
        },
    };
    parsed.map_err(|_| OpError::user(format!("invalid permissions {text}")))
}

/// A name without directories; what would be none becomes `download`.
pub(crate) fn safe_name(text: &str) -> String {
    let base: String = text.chars().filter(|c| !matches!(c, '/' | '\\' | '\0')).collect();
    match base.as_str() {
        "" | "." | ".." => "download".to_owned(),
        _ => base,
    }
}

/// Makes the layer from a blob of the content store.
pub(crate) async fn make(
    store: &Arc<Store>,
    tenant: &Tenant,
    blob: BlobHandle,
    meta: &FileMeta,
    record_type: RecordType,
    description: String,
) -> Result<LayerRef, OpError> {
    let (store, tenant, meta) = (store.clone(), tenant.clone(), meta.clone());
    blocking(move |stop| {
        let active = store.new_active(&tenant, None, &View::scratch())?;
        let builder = active.builder()?;
        let mode = if meta.perm == 0 {
            DEFAULT_MODE
        } else {
            meta.perm & 0o7777
        };
        let path = Path::new(&meta.name);
        let io = |action: &'static str| move |e| StoreError::io(action, "file of a source", e);
        let mut reader = store.content(&tenant).open(&blob.digest())?;
        let mut file = builder.fs().create_file(path, 0o600)?;
        let mut size = 0;
        loop {
            stop.check()?;
            let n = std::io::copy(&mut reader.by_ref().take(1 << 20), &mut file).map_err(io("write"))?;
            if n == 0 {
                break;
            }
            size += n;
        }
        builder.fs().set_owner(path, meta.uid, meta.gid)?;
        builder.fs().set_mode(path, mode)?;
        let mtime = Timestamp {
            secs: meta.mtime,
            nanos: 0,
        };
        builder.fs().set_mtime(path, mtime)?;
        let entry = Entry {
            mode,
            uid: meta.uid,
            gid: meta.gid,
            size,
            mtime,
            ..Entry::new(meta.name.clone().into_bytes(), Kind::Regular)
        };
        builder.finish(vec![Entry::dir(*b""), entry])?;
        active.commit(LayerMeta {
            description,
            record_type,
            diff_id: None,
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_have_gos_bases() {
        for (text, want) in [
            ("", 0),
            ("0644", 0o644),
            ("420", 420),
            ("0o600", 0o600),
            ("0x1ff", 0x1ff),
            ("0", 0),
        ] {
            assert_eq!(perm(text).unwrap(), want, "{text}");
        }
        assert!(perm("rw").is_err() && perm("0899").is_err());
    }

    #[test]
    fn names_lose_their_directories() {
        for (text, want) in [
            ("a/b", "ab"),
            ("..", "download"),
            ("", "download"),
            ("x.tgz", "x.tgz"),
            ("../etc", "..etc"),
        ] {
            assert_eq!(safe_name(text), want);
        }
    }
}
