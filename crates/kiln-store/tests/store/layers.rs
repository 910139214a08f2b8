//! Layers: lazy ones, sharing, merging, comparing, packing.

use std::sync::Arc;

use kiln_store::{
    Algorithm, Compression, LayerRef, LazyLayer, RealizeCtx, RealizeEvent, RealizeObserver, RecordType, Store,
    StoreError,
};
use parking_lot::Mutex;

use crate::support::{Remote, archive, files, layer, open, owned, tenant, wait};

fn lazy(blob: &kiln_oci::Descriptor, diff_id: kiln_oci::DiffId) -> LazyLayer {
    LazyLayer {
        blob: blob.clone(),
        diff_id,
        description: "pulled from registry.test/base".into(),
        record_type: RecordType::Regular,
        created_at: None,
    }
}

struct Events(Mutex<Vec<RealizeEvent>>);

impl RealizeObserver for Events {
    fn event(&self, event: RealizeEvent) {
        self.0.lock().push(event);
    }
}

#[test]
fn a_lazy_chain_is_fetched_once_and_its_trees_are_shared() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (a, a_diff, a_bytes) = archive(&[("a", "1"), ("both", "lower")], Algorithm::Gzip.into());
    let (b, b_diff, b_bytes) = archive(&[("b", "2"), ("both", "upper")], Algorithm::Gzip.into());
    let remote = Remote::of(&[&a_bytes, &b_bytes]);
    let make = |store: &Arc<Store>| -> LayerRef {
        let lower = store
            .lazy_layer(&tenant(), None, &lazy(&a, a_diff), Some(remote.clone()))
            .unwrap();
        store
            .lazy_layer(&tenant(), Some(&lower), &lazy(&b, b_diff), Some(remote.clone()))
            .unwrap()
    };
    let top = make(&store);
    assert_eq!((remote.count(), top.has_tree()), (0, false));
    assert_eq!(make(&store), top, "equal layers are one record");
    let events = Arc::new(Events(Mutex::default()));
    let ctx = RealizeCtx {
        observer: Some(events.clone()),
        ..RealizeCtx::default()
    };
    let expected = owned(&[("a", "1"), ("b", "2"), ("both", "upper")]);
    assert_eq!(files(&store, Some(&top), &ctx), expected);
    assert_eq!(remote.count(), 2);
    let seen = events.0.lock().clone();
    for blob in [a.digest, b.digest] {
        let place = |event: &RealizeEvent| seen.iter().position(|e| e == event).unwrap();
        assert!(seen.contains(&RealizeEvent::Fetching {
            blob,
            current: if blob == a.digest { a.size } else { b.size },
            total: if blob == a.digest { a.size } else { b.size }
        }));
        assert!(place(&RealizeEvent::Fetched { blob }) < place(&RealizeEvent::Extracting { blob }));
        assert!(place(&RealizeEvent::Extracting { blob }) < place(&RealizeEvent::Extracted { blob }));
    }
    // The same content packed otherwise: another record, the same trees, nothing fetched.
    let (z, z_diff, _) = archive(&[("a", "1"), ("both", "lower")], Algorithm::Zstd.into());
    if z_diff == a_diff {
        let other = store.lazy_layer(&tenant(), None, &lazy(&z, z_diff), None).unwrap();
        assert_ne!(Some(other.id()), top.parent().as_ref().map(LayerRef::id));
        assert!(other.is_obtainable(&kiln_store::Providers::default()));
        assert_eq!(
            files(&store, Some(&other), &RealizeCtx::default()),
            owned(&[("a", "1"), ("both", "lower")])
        );
        assert_eq!(remote.count(), 2);
    }
    drop(top);
    store.close().unwrap();
    drop(store);
    let store = open(dir.path());
    assert_eq!(files(&store, Some(&make(&store)), &RealizeCtx::default()), expected);
    assert_eq!(remote.count(), 2, "nothing is fetched again after a restart");
    assert_eq!(store.content(&tenant()).info(&a.digest).unwrap().sources.len(), 1);
}

#[test]
fn downloads_are_joined_resumed_and_verified() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let text: String = (0..200u32)
        .map(|i| kiln_oci::Digest::of(i.to_le_bytes()).hex())
        .collect();
    let (blob, diff_id, bytes) = archive(&[("big", &text)], Algorithm::Gzip.into());
    let remote = Remote::of(&[&bytes]);
    remote.break_after.lock().extend([1000, 700]);
    let layer = store
        .lazy_layer(&tenant(), None, &lazy(&blob, diff_id), Some(remote.clone()))
        .unwrap();
    let ctx = RealizeCtx::default();
    wait(async {
        let all = futures::future::join_all((0..8).map(|_| store.realize(Some(&layer), &ctx))).await;
        assert!(all.iter().all(Result::is_ok));
    });
    let asked: Vec<u64> = remote.asked.lock().iter().map(|(_, offset)| *offset).collect();
    assert_eq!(asked, [0, 700, 1700], "resumed where it broke off, by one download");
    // A wrong diff id is refused, and nothing is left behind that would be taken for the layer.
    let wrong = kiln_oci::DiffId(kiln_oci::Digest::of("something else"));
    let layer = store
        .lazy_layer(&tenant(), None, &lazy(&blob, wrong), Some(remote.clone()))
        .unwrap();
    let error = wait(store.realize(Some(&layer), &ctx)).unwrap_err();
    assert!(matches!(error.root(), StoreError::DiffIdMismatch { .. }), "{error}");
    assert!(!layer.has_tree());
    // Without provider a missing blob is named.
    let (gone, gone_diff, _) = archive(&[("gone", "")], Algorithm::Gzip.into());
    let layer = store
        .lazy_layer(&tenant(), None, &lazy(&gone, gone_diff), None)
        .unwrap();
    assert!(!layer.is_obtainable(&kiln_store::Providers::default()));
    let error = wait(store.realize(Some(&layer), &ctx)).unwrap_err();
    assert!(error.to_string().contains(&gone.digest.to_string()), "{error}");
}

#[test]
fn one_waiter_leaving_does_not_end_the_download_and_the_last_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (blob, diff_id, bytes) = archive(&[("f", "x")], Algorithm::Gzip.into());
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let remote = Arc::new(Remote {
        gate: Some(gate.clone()),
        ..Remote::default()
    });
    remote.blobs.lock().push(bytes);
    let layer = store
        .lazy_layer(&tenant(), None, &lazy(&blob, diff_id), Some(remote.clone()))
        .unwrap();
    wait(async {
        let ctx = RealizeCtx::default();
        let mut first = Box::pin(store.realize(Some(&layer), &ctx));
        let mut second = Box::pin(store.realize(Some(&layer), &ctx));
        while remote.count() == 0 {
            assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
            tokio::task::yield_now().await;
        }
        drop(first);
        gate.add_permits(1);
        second.await.unwrap();
        assert_eq!(remote.count(), 1);
    });
}

#[test]
fn merging_and_comparing_along_a_chain_copies_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let base = layer(&store, None, &[("base", "0")]);
    let one = layer(&store, Some(&base), &[("one", "1"), ("same", "one")]);
    let two = layer(&store, Some(&one), &[("two", "2"), ("same", "two")]);
    let ctx = RealizeCtx::default();
    let trees = || std::fs::read_dir(dir.path().join("trees")).unwrap().count();
    let before = trees();
    let rest = wait(store.diff(&tenant(), Some(&base), Some(&two), "diff", &ctx))
        .unwrap()
        .unwrap();
    assert_eq!(
        files(&store, Some(&rest), &ctx),
        owned(&[("one", "1"), ("same", "two"), ("two", "2")])
    );
    assert_eq!(rest.layers().len(), 2);
    assert_eq!(
        wait(store.diff(&tenant(), Some(&two), Some(&two), "", &ctx)).unwrap(),
        None
    );
    assert_eq!(
        wait(store.diff(&tenant(), None, Some(&one), "", &ctx))
            .unwrap()
            .as_ref(),
        Some(&one)
    );
    let other = layer(&store, None, &[("other", "x"), ("same", "other")]);
    let merged = store
        .merge(&tenant(), &[Some(other.clone()), None, Some(rest.clone())], "merge")
        .unwrap()
        .unwrap();
    let all = owned(&[("one", "1"), ("other", "x"), ("same", "two"), ("two", "2")]);
    assert_eq!(files(&store, Some(&merged), &ctx), all);
    assert_eq!(
        store
            .merge(&tenant(), &[Some(other.clone()), Some(rest.clone())], "")
            .unwrap(),
        Some(merged.clone())
    );
    assert_eq!(store.merge(&tenant(), &[None, None], "").unwrap(), None);
    assert_eq!(trees(), before + 1, "only `other` is new");
    // A layer over a merge finds everything again, also when the index is gone.
    let top = layer(&store, Some(&merged), &[("top", "t")]);
    let id = top.id().clone();
    drop((base, one, two, rest, other, merged, top));
    store.close().unwrap();
    drop(store);
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let store = open(dir.path());
    let top = store.layer(&tenant(), &id).unwrap();
    let mut all = all;
    all.insert(4, ("top".into(), "t".into()));
    all.sort();
    assert_eq!(files(&store, Some(&top), &ctx), all);
}

#[test]
fn unrelated_layers_are_compared_by_their_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let lower = layer(&store, None, &[("gone", "x"), ("changed", "old")]);
    let upper = layer(&store, None, &[("changed", "new"), ("new", "y")]);
    let ctx = RealizeCtx::default();
    let diff = wait(store.diff(&tenant(), Some(&lower), Some(&upper), "diff", &ctx))
        .unwrap()
        .unwrap();
    assert_eq!(
        files(&store, Some(&diff), &ctx),
        owned(&[("changed", "new"), ("new", "y")])
    );
    let applied = store.merge(&tenant(), &[Some(lower), Some(diff)], "").unwrap();
    assert_eq!(
        files(&store, applied.as_ref(), &ctx),
        owned(&[("changed", "new"), ("new", "y")])
    );
}

#[test]
fn a_layer_is_packed_once_and_repacked_without_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let ctx = RealizeCtx::default();
    let base = layer(&store, None, &[("a", "1")]);
    let top = layer(&store, Some(&base), &[("b", "2")]);
    assert_eq!((top.diff_id(), top.chain_id()), (None, None));
    let gzip: Compression = Algorithm::Gzip.into();
    let blobs =
        wait(async { futures::future::join_all((0..4).map(|_| store.blob_for(&top, gzip, false, &ctx))).await });
    let first = blobs[0].as_ref().unwrap().clone();
    assert!(blobs.iter().all(|b| b.as_ref().unwrap() == &first));
    assert_eq!(top.blobs(), std::slice::from_ref(&first));
    wait(store.blob_for(&base, gzip, false, &ctx)).unwrap();
    let zstd = wait(store.blob_for(&top, Algorithm::Zstd.into(), true, &ctx)).unwrap();
    assert_ne!(zstd.digest, first.digest);
    assert_eq!(
        wait(store.blob_for(&top, Algorithm::Zstd.into(), false, &ctx)).unwrap(),
        zstd
    );
    let content = store.content(&tenant());
    assert_eq!(content.info(&zstd.digest).unwrap().diff_id, top.diff_id());
    // A lazy layer is repacked from its blob without being unpacked.
    let (blob, diff_id, bytes) = archive(&[("lazy", "l")], Algorithm::Gzip.into());
    let remote = Remote::of(&[&bytes]);
    let lazy = store
        .lazy_layer(&tenant(), None, &lazy(&blob, diff_id), Some(remote))
        .unwrap();
    let repacked = wait(store.blob_for(&lazy, Algorithm::Zstd.into(), true, &ctx)).unwrap();
    assert!(!lazy.has_tree() && content.has(&repacked.digest));
    // What was learned is still known after a restart.
    let id = top.id().clone();
    drop((base, top, lazy, content));
    store.close().unwrap();
    drop(store);
    let store = open(dir.path());
    let top = store.layer(&tenant(), &id).unwrap();
    assert_eq!(top.blobs().len(), 2);
    assert!(top.diff_id().is_some());
}

#[test]
fn chains_of_ten_thousand_layers_overflow_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut top: Option<LayerRef> = None;
    for n in 0..10_000u32 {
        let digest = kiln_oci::Digest::of(n.to_le_bytes());
        let blob = kiln_oci::Descriptor::new(kiln_oci::media_type::OCI_LAYER_GZIP, digest, 1);
        top = Some(
            store
                .lazy_layer(&tenant(), top.as_ref(), &lazy(&blob, kiln_oci::DiffId(digest)), None)
                .unwrap(),
        );
    }
    let id = top.as_ref().unwrap().id().clone();
    assert_eq!(top.unwrap().layers().len(), 10_000);
    store.close().unwrap();
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.layer(&tenant(), &id).unwrap().layers().len(), 10_000);
}
