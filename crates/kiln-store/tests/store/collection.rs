//! Garbage collection: what stays, what goes, in which order, beside work that goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_oci::Digest;
use kiln_store::{
    Area, CacheMountRequest, GcPolicy, LayerRef, NewRecord, RealizeCtx, RecordType, Sharing, Stop, Store, Time,
};

use crate::support::{files, layer, open, owned, tenant, wait};

fn record(store: &Arc<Store>, name: &str, layer: &LayerRef) {
    store
        .records(&tenant())
        .save(NewRecord {
            keys: vec![Digest::of(name)],
            parts: serde_json::Value::Null,
            outputs: vec![Some(layer.clone())],
            aliases: Vec::new(),
            notes: Vec::new(),
            created_at: Time::now(),
        })
        .unwrap();
}

fn prune(store: &Arc<Store>, policy: &GcPolicy) -> Vec<String> {
    let mut removed = Vec::new();
    store
        .prune(&tenant(), policy, &|_| true, &Stop::new(), &mut |r| {
            removed.push(r.id.clone())
        })
        .unwrap();
    removed
}

#[test]
fn leaves_go_first_and_held_chains_stay() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let base = layer(&store, None, &[("a", "1")]);
    let kept = layer(&store, Some(&base), &[("b", "2")]);
    let gone = layer(&store, Some(&base), &[("c", "3")]);
    record(&store, "kept", &kept);
    record(&store, "gone", &gone);
    let (base_id, kept_id, gone_id) = (base.id().to_string(), kept.id().to_string(), gone.id().to_string());
    drop((base, gone));
    let usage = store.usage(&tenant());
    let line = |id: &str| usage.iter().find(|u| u.id == id).unwrap().clone();
    assert!(line(&base_id).in_use && line(&kept_id).in_use && !line(&gone_id).in_use);
    assert_eq!(line(&kept_id).parents, std::slice::from_ref(&base_id));
    assert!(line(&gone_id).size >= 3 * 4096 && line(&gone_id).usage_count == 1);
    assert_eq!(prune(&store, &GcPolicy::default()), [gone_id]);
    assert!(store.records(&tenant()).lookup(&Digest::of("gone")).unwrap().is_none());
    assert!(store.records(&tenant()).lookup(&Digest::of("kept")).unwrap().is_some());
    drop(kept);
    assert_eq!(prune(&store, &GcPolicy::default()), [kept_id, base_id]);
    assert!(store.usage(&tenant()).is_empty());
    store.close().unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("trees")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
}

#[test]
fn limits_ages_types_and_filters_choose() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut ids = Vec::new();
    for n in 0..6u32 {
        let made = layer(&store, None, &[("f", &"x".repeat(100_000 + n as usize))]);
        ids.push(made.id().to_string());
        drop(made);
    }
    // Used again: more valuable than its age says.
    for _ in 0..3 {
        drop(store.layer(&tenant(), &ids[0].parse().unwrap()).unwrap());
    }
    assert!(
        prune(
            &store,
            &GcPolicy {
                keep_duration: Duration::from_secs(60),
                ..GcPolicy::default()
            }
        )
        .is_empty()
    );
    assert!(
        prune(
            &store,
            &GcPolicy {
                types: vec![RecordType::Git],
                ..GcPolicy::default()
            }
        )
        .is_empty()
    );
    let only = ids[2].clone();
    let mut removed = Vec::new();
    store
        .prune(
            &tenant(),
            &GcPolicy::default(),
            &|r| r.id == only,
            &Stop::new(),
            &mut |r| removed.push(r.id.clone()),
        )
        .unwrap();
    assert_eq!(removed, [only]);
    let total: u64 = store.usage(&tenant()).iter().map(|u| u.size).sum();
    let one = total / 5;
    let removed = prune(
        &store,
        &GcPolicy {
            max_used_space: total - one,
            ..GcPolicy::default()
        },
    );
    assert_eq!(removed, [ids[1].clone()], "one is enough, the least valuable");
    let removed = prune(
        &store,
        &GcPolicy {
            max_used_space: 1,
            reserved_space: 2 * one,
            ..GcPolicy::default()
        },
    );
    assert!(removed.len() == 2 && !removed.contains(&ids[0]), "{removed:?}");
    let stopped = Stop::new();
    stopped.stop();
    assert!(
        store
            .prune(&tenant(), &GcPolicy::default(), &|_| true, &stopped, &mut |_| {})
            .unwrap_err()
            .is_canceled()
    );
}

#[test]
fn collection_beside_lookups_never_takes_what_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let done = AtomicBool::new(false);
    let (mut hits, mut removed) = (0, 0);
    std::thread::scope(|scope| {
        let (store, done) = (&store, &done);
        let collector = scope.spawn(move || {
            let mut removed = 0;
            while !done.load(Ordering::Acquire) {
                removed += prune(store, &GcPolicy::default()).len();
            }
            removed
        });
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(move || {
                    let (mut hits, mut n) = (0, 0u32);
                    while !done.load(Ordering::Acquire) {
                        n = n.wrapping_add(7) % 20;
                        let Some(hit) = store.records(&tenant()).lookup(&Digest::of(format!("r{n}"))).unwrap() else {
                            continue;
                        };
                        let found = files(store, hit.outputs[0].as_ref(), &RealizeCtx::default());
                        assert_eq!(found, owned(&[("f", &format!("r{n}")), ("g", "over")]));
                        hits += 1;
                    }
                    hits
                })
            })
            .collect();
        for n in 0..200u32 {
            let name = format!("r{}", n % 20);
            let base = layer(store, None, &[("f", &name)]);
            let top = layer(store, Some(&base), &[("g", "over")]);
            record(store, &name, &top);
            drop(base);
            assert_eq!(files(store, Some(&top), &RealizeCtx::default()).len(), 2);
        }
        done.store(true, Ordering::Release);
        removed = collector.join().unwrap();
        hits = readers.into_iter().map(|r| r.join().unwrap()).sum::<u32>();
    });
    assert!(removed > 100, "collected {removed}, hit {hits}");
    prune(&store, &GcPolicy::default());
    store.close().unwrap();
    let report = store.ledger();
    let of = |area: Area| report.areas.iter().find(|(a, _)| *a == area).unwrap().1;
    assert_eq!((of(Area::Trees), of(Area::Trash)), (0, 0));
}

#[test]
fn the_ledger_says_what_the_disk_says() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut held = Vec::new();
    for n in 0..10 {
        let text = "y".repeat(n * 3000);
        held.push(layer(&store, held.last(), &[("f", &text)]));
        store.content(&tenant()).put("x", text.as_bytes()).unwrap();
    }
    wait(store.blob_for(
        &held[3],
        kiln_store::Algorithm::Gzip.into(),
        false,
        &RealizeCtx::default(),
    ))
    .unwrap();
    let mounts = wait(store.cache_mounts(
        &tenant(),
        vec![CacheMountRequest {
            id: "npm".into(),
            sharing: Sharing::Shared,
            base: None,
            description: String::new(),
            fresh: false,
        }],
    ))
    .unwrap();
    std::fs::write(mounts[0].path().join("big"), vec![1; 300_000]).unwrap();
    drop(mounts);
    held.truncate(5);
    prune(
        &store,
        &GcPolicy {
            types: vec![RecordType::Regular],
            ..GcPolicy::default()
        },
    );
    store.close().unwrap();
    for (area, ledger, disk) in store.audit().unwrap() {
        // The mount was measured before the thread that measures ended, or will be by the next start.
        if area != Area::CacheMounts {
            assert_eq!(ledger, disk, "{area:?}");
        }
    }
    drop(held);
    drop(store);
    let store = open(dir.path());
    store.close().unwrap();
    for (area, ledger, disk) in store.audit().unwrap() {
        assert_eq!(ledger, disk, "{area:?} after a restart");
    }
}
