//! Making layers and looking at them.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use kiln_oci::{Descriptor, DiffId, Digest};
use kiln_store::{
    BlobProvider, BlobStream, Compression, Entry, Kind, LayerMeta, LayerRef, ProviderError, RealizeCtx, Store,
    StoreConfig, Tenant, View,
};
use parking_lot::Mutex;

pub(crate) fn open(root: &Path) -> Arc<Store> {
    Store::open(StoreConfig::new(root)).unwrap().0
}

pub(crate) fn tenant() -> Tenant {
    Tenant::default()
}

/// Runs a future on a small runtime.
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// A layer with regular files in the root directory, over a realised parent.
pub(crate) fn layer(store: &Arc<Store>, parent: Option<&LayerRef>, files: &[(&str, &str)]) -> LayerRef {
    let base = wait(store.realize(parent, &RealizeCtx::default())).unwrap();
    layer_over(store, parent, &base, files)
}

pub(crate) fn layer_over(
    store: &Arc<Store>,
    parent: Option<&LayerRef>,
    base: &View,
    files: &[(&str, &str)],
) -> LayerRef {
    let active = store.new_active(&tenant(), parent, base).unwrap();
    let builder = active.builder().unwrap();
    let mut entries = vec![Entry::dir(*b"")];
    for (name, text) in files {
        builder
            .fs()
            .create_file(name, 0o644)
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        let md = builder.fs().symlink_metadata(name).unwrap();
        entries.push(Entry::from_metadata(name.as_bytes().to_vec(), &md));
    }
    builder.finish(entries).unwrap();
    active
        .commit(LayerMeta {
            description: "made by a test".into(),
            ..LayerMeta::default()
        })
        .unwrap()
}

/// Names and texts of the regular files in the root of a layer's view.
pub(crate) fn files(store: &Arc<Store>, layer: Option<&LayerRef>, ctx: &RealizeCtx) -> Vec<(String, String)> {
    let view = wait(store.realize(layer, ctx)).unwrap();
    let Some(root) = view.root() else { return Vec::new() };
    let mut found = Vec::new();
    for node in view.children(&root) {
        let entry = view.entry(&node);
        if entry.kind == Kind::Regular {
            let text = view.read(&entry.path, 1 << 20).unwrap().unwrap();
            found.push((
                String::from_utf8(entry.name().to_vec()).unwrap(),
                String::from_utf8(text).unwrap(),
            ));
        }
    }
    found
}

pub(crate) fn owned(files: &[(&str, &str)]) -> Vec<(String, String)> {
    files.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

/// A packed layer archive of files, made in a store of its own.
pub(crate) fn archive(files: &[(&str, &str)], compression: Compression) -> (Descriptor, DiffId, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let layer = layer(&store, None, files);
    let blob = wait(store.blob_for(&layer, compression, true, &RealizeCtx::default())).unwrap();
    let bytes = store.content(&tenant()).read(&blob.digest, 1 << 30).unwrap();
    let diff_id = layer.diff_id().unwrap();
    (blob, diff_id, bytes)
}

/// A registry in memory that counts what is asked of it and may break off.
#[derive(Default)]
pub(crate) struct Remote {
    pub(crate) blobs: Mutex<Vec<Vec<u8>>>,
    /// Offsets asked for, by digest.
    pub(crate) asked: Mutex<Vec<(Digest, u64)>>,
    /// The next streams end in an error after this many bytes.
    pub(crate) break_after: Mutex<Vec<usize>>,
    /// Streams wait for a permit before they yield.
    pub(crate) gate: Option<Arc<tokio::sync::Semaphore>>,
}

impl Remote {
    pub(crate) fn of(blobs: &[&[u8]]) -> Arc<Self> {
        Arc::new(Self {
            blobs: Mutex::new(blobs.iter().map(|b| b.to_vec()).collect()),
            ..Self::default()
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.asked.lock().len()
    }
}

#[async_trait::async_trait]
impl BlobProvider for Remote {
    async fn open(&self, blob: &Descriptor, offset: u64) -> Result<BlobStream, ProviderError> {
        self.asked.lock().push((blob.digest, offset));
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        let bytes = self
            .blobs
            .lock()
            .iter()
            .find(|b| Digest::of(b) == blob.digest)
            .cloned()
            .ok_or("unknown blob")?;
        let rest = bytes[usize::try_from(offset).unwrap()..].to_vec();
        let cut = self.break_after.lock().pop();
        let mut chunks: Vec<Result<bytes::Bytes, ProviderError>> = Vec::new();
        let end = cut.map_or(rest.len(), |n| n.min(rest.len()));
        for chunk in rest[..end].chunks(100) {
            chunks.push(Ok(bytes::Bytes::copy_from_slice(chunk)));
        }
        if cut.is_some() {
            chunks.push(Err("connection reset".into()));
        }
        Ok(Box::pin(futures::stream::iter(chunks)))
    }

    fn repository(&self) -> Option<String> {
        Some("registry.test/library/base".into())
    }
}
