//! Cache mounts, contexts, history.

use std::sync::Arc;
use std::time::Duration;

use kiln_store::{
    CacheMount, CacheMountRequest, Entry, GcPolicy, HistoryRecord, RealizeCtx, Sharing, Stop, Store, Time,
};

use crate::support::{files, layer, open, owned, tenant, wait};

fn request(id: &str, sharing: Sharing) -> CacheMountRequest {
    CacheMountRequest {
        id: id.into(),
        sharing,
        base: None,
        description: format!("cached mount {id}"),
        fresh: false,
    }
}

async fn take(store: &Arc<Store>, id: &str, sharing: Sharing) -> CacheMount {
    store
        .cache_mounts(&tenant(), vec![request(id, sharing)])
        .await
        .unwrap()
        .pop()
        .unwrap()
}

#[test]
fn cache_mounts_are_shared_private_or_locked() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let own = tenant();
    wait(async {
        let a = take(&store, "m", Sharing::Shared).await;
        let b = take(&store, "m", Sharing::Shared).await;
        assert!(a.path() == b.path() && a.is_new() && !b.is_new());
        std::fs::write(a.path().join("f"), "kept").unwrap();
        let private = take(&store, "m", Sharing::Private).await;
        assert!(private.path() != a.path());
        drop((a, b));
        let again = take(&store, "m", Sharing::Private).await;
        assert_eq!(std::fs::read_to_string(again.path().join("f")).unwrap(), "kept");
        drop((again, private));
        let locked = take(&store, "l", Sharing::Locked).await;
        let mut waiting = Box::pin(store.cache_mounts(
            &own,
            vec![request("other", Sharing::Locked), request("l", Sharing::Locked)],
        ));
        for _ in 0..20 {
            assert!(futures::poll!(&mut waiting).is_pending());
            tokio::task::yield_now().await;
        }
        // Who waits holds nothing.
        let other = take(&store, "other", Sharing::Locked).await;
        drop(other);
        drop(locked);
        let both = waiting.await.unwrap();
        assert_eq!(both.len(), 2);
        // A waiter that goes away leaves no lock behind.
        let mut gone = Box::pin(store.cache_mounts(&own, vec![request("l", Sharing::Locked)]));
        assert!(futures::poll!(&mut gone).is_pending());
        drop(gone);
        drop(both);
        take(&store, "l", Sharing::Locked).await;
    });
    let other = kiln_store::Tenant::new("other").unwrap();
    let theirs = wait(store.cache_mounts(&other, vec![request("m", Sharing::Shared)])).unwrap();
    assert!(theirs[0].is_new());
    drop(theirs);
    store.close().unwrap();
    drop(store);
    let store = open(dir.path());
    wait(async {
        let m = take(&store, "m", Sharing::Shared).await;
        assert_eq!(std::fs::read_to_string(m.path().join("f")).unwrap(), "kept");
        let usage = store.usage(&tenant());
        let line = usage
            .iter()
            .find(|u| u.description == "cached mount m" && u.in_use)
            .unwrap();
        assert!(line.mutable && line.size == 0 && line.usage_count > 1);
        assert_eq!(line.record_type.as_str(), "exec.cachemount");
        let mut removed = 0;
        store
            .prune(&tenant(), &GcPolicy::default(), &|_| true, &Stop::new(), &mut |_| {
                removed += 1
            })
            .unwrap();
        assert!(removed > 0 && m.path().exists());
    });
}

/// Steps that start together: nobody gets a directory before it is there with what it starts with.
#[test]
fn users_at_once_share_one_cache_mount() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let names: Vec<String> = (0..200).map(|n| format!("f{n}")).collect();
    let entries: Vec<(&str, &str)> = names.iter().map(|n| (n.as_str(), "base")).collect();
    let base = layer(&store, None, &entries);
    let view = wait(store.realize(Some(&base), &RealizeCtx::default())).unwrap();
    for round in 0..20 {
        let id = format!("m{round}");
        let wanted = || CacheMountRequest {
            base: Some((base.id().clone(), view.clone())),
            ..request(&id, Sharing::Shared)
        };
        std::thread::scope(|scope| {
            let users: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        // Twice in one request: one step may mount it at two places.
                        let mounts = wait(store.cache_mounts(&tenant(), vec![wanted(), wanted()])).unwrap();
                        assert_eq!(mounts[0].path(), mounts[1].path());
                        let found = std::fs::read_dir(mounts[0].path()).unwrap().count();
                        assert_eq!(found, names.len(), "a directory before it was complete");
                        mounts
                    })
                })
                .collect();
            let taken: Vec<_> = users.into_iter().map(|user| user.join().unwrap()).collect();
            assert!(taken.iter().all(|mounts| mounts[0].path() == taken[0][0].path()));
            assert_eq!(taken.iter().flatten().filter(|mount| mount.is_new()).count(), 1);
        });
    }
}

#[test]
fn a_cache_mount_starts_with_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let base = layer(&store, None, &[("seed", "s")]);
    let view = wait(store.realize(Some(&base), &RealizeCtx::default())).unwrap();
    let with_base = || CacheMountRequest {
        base: Some((base.id().clone(), view.clone())),
        ..request("m", Sharing::Shared)
    };
    let mount = wait(store.cache_mounts(&tenant(), vec![with_base()]))
        .unwrap()
        .pop()
        .unwrap();
    assert_eq!(std::fs::read_to_string(mount.path().join("seed")).unwrap(), "s");
    std::fs::write(mount.path().join("seed"), "changed").unwrap();
    assert_eq!(
        files(&store, Some(&base), &RealizeCtx::default()),
        owned(&[("seed", "s")])
    );
    let plain = wait(store.cache_mounts(&tenant(), vec![request("m", Sharing::Shared)])).unwrap();
    assert!(plain[0].is_new(), "the base is part of the identity");
}

fn entries(files: &[&str], dir: &std::path::Path) -> Vec<Entry> {
    let root = kiln_fs::Dir::open_ambient(dir).unwrap();
    let mut entries = vec![Entry::dir(*b"")];
    for name in files {
        let md = root.symlink_metadata(name).unwrap();
        entries.push(Entry::from_metadata(name.as_bytes().to_vec(), &md));
    }
    entries
}

#[test]
fn a_frozen_context_does_not_change_under_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let take = || {
        store
            .context(&tenant(), "client:/src", "local source for context", &Stop::new())
            .unwrap()
    };
    let ctx = RealizeCtx::default();
    let first = take();
    assert!(first.is_new());
    std::fs::write(first.fs_path().join("a"), "1").unwrap();
    std::fs::create_dir(first.state_path()).unwrap();
    std::fs::write(first.state_path().join("s"), "state").unwrap();
    // A second transfer meanwhile has its own directory and does not become the current one.
    let second = take();
    assert!(second.is_new() && second.dir() != first.dir());
    drop(second);
    let path = first.dir().to_owned();
    let list = entries(&["a"], &first.fs_path());
    let frozen = first.freeze(list).unwrap();
    assert_eq!(files(&store, Some(&frozen), &ctx), owned(&[("a", "1")]));
    assert_eq!(frozen.record_type().as_str(), "source.local");
    // The next transfer while the layer is held: a copy, with what is remembered about it.
    let next = take();
    assert!(next.dir() != path && !next.is_new());
    assert_eq!(std::fs::read_to_string(next.state_path().join("s")).unwrap(), "state");
    std::fs::write(next.fs_path().join("a.new"), "2").unwrap();
    std::fs::rename(next.fs_path().join("a.new"), next.fs_path().join("a")).unwrap();
    assert_eq!(files(&store, Some(&frozen), &ctx), owned(&[("a", "1")]));
    let view = wait(store.realize(Some(&frozen), &ctx)).unwrap();
    let id = frozen.id().clone();
    drop(frozen);
    assert!(path.exists(), "the view holds it");
    drop(view);
    assert!(!path.exists(), "replaced and let go of");
    assert!(store.layer(&tenant(), &id).is_none());
    let current = next.dir().to_owned();
    drop(next);
    // Nobody holds it: the same directory is used again, also by the next process.
    let again = take();
    assert_eq!(again.dir(), current);
    drop(again);
    store.close().unwrap();
    drop(store);
    let store = open(dir.path());
    let again = store.context(&tenant(), "client:/src", "", &Stop::new()).unwrap();
    assert_eq!(std::fs::read_to_string(again.fs_path().join("a")).unwrap(), "2");
    assert_eq!(
        store
            .usage(&tenant())
            .iter()
            .filter(|u| u.record_type.as_str() == "source.local")
            .count(),
        1
    );
}

#[test]
fn a_layer_over_a_context_ends_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let context = store.context(&tenant(), "k", "", &Stop::new()).unwrap();
    std::fs::write(context.fs_path().join("a"), "1").unwrap();
    let list = entries(&["a"], &context.fs_path());
    let frozen = context.freeze(list).unwrap();
    let top = layer(&store, Some(&frozen), &[("b", "2")]);
    assert_eq!(
        files(&store, Some(&top), &RealizeCtx::default()),
        owned(&[("a", "1"), ("b", "2")])
    );
    drop(frozen);
    assert_eq!(files(&store, Some(&top), &RealizeCtx::default()).len(), 2);
    let id = top.id().clone();
    drop(top);
    assert!(store.layer(&tenant(), &id).is_none());
    store.close().unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("trees")).unwrap().count(), 0);
}

#[test]
fn history_is_kept_pinned_and_limited() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let history = store.history(&tenant());
    let log = store.content(&tenant()).put("logs", b"all the lines").unwrap();
    let day = 24 * 3600 * 1_000_000_000i64;
    for n in 0..10 {
        history
            .put(HistoryRecord {
                reference: format!("../{n}"),
                created_at: Time(Time::now().0 - n * day),
                pinned: n == 9,
                blobs: vec![log.digest()],
                payload: (0..=255).collect(),
            })
            .unwrap();
    }
    let digest = log.digest();
    drop(log);
    assert_eq!(
        history
            .collect(Duration::from_secs(2 * 24 * 3600 + 60), 1)
            .unwrap()
            .len(),
        6
    );
    store.close().unwrap();
    drop((history, store));
    let store = open(dir.path());
    let history = store.history(&tenant());
    let left: Vec<_> = history.list().into_iter().map(|r| r.reference).collect();
    assert_eq!(left, ["../0", "../1", "../2", "../9"]);
    assert_eq!(history.get("../0").unwrap().payload, (0..=255).collect::<Vec<u8>>());
    store
        .prune(&tenant(), &GcPolicy::default(), &|_| true, &Stop::new(), &mut |_| {})
        .unwrap();
    assert!(store.content(&tenant()).has(&digest), "history keeps its blobs");
    for reference in left {
        assert!(history.delete(&reference).unwrap());
    }
    assert!(!history.delete("../0").unwrap());
    store
        .prune(&tenant(), &GcPolicy::default(), &|_| true, &Stop::new(), &mut |_| {})
        .unwrap();
    assert!(!store.content(&tenant()).has(&digest));
}

#[test]
fn after_a_reboot_directories_in_use_are_not_believed() {
    let (dir, cookies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = || kiln_store::StoreConfig {
        cookie_dir: Some(cookies.path().to_owned()),
        ..kiln_store::StoreConfig::new(dir.path())
    };
    let store = Store::open(config()).unwrap().0;
    drop(wait(store.cache_mounts(&tenant(), vec![request("rest", Sharing::Shared)])).unwrap());
    drop(store.context(&tenant(), "rest", "", &Stop::new()).unwrap());
    store.close().unwrap();
    drop(store);
    let store = Store::open(config()).unwrap().0;
    let busy = wait(store.cache_mounts(&tenant(), vec![request("busy", Sharing::Shared)])).unwrap();
    let context = store.context(&tenant(), "busy", "", &Stop::new()).unwrap();
    store.close().unwrap();
    drop((busy, context, store));
    for entry in std::fs::read_dir(cookies.path()).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let store = Store::open(config()).unwrap().0;
    let mounts = wait(store.cache_mounts(
        &tenant(),
        vec![request("rest", Sharing::Shared), request("busy", Sharing::Shared)],
    ));
    let mounts = mounts.unwrap();
    assert_eq!(mounts.iter().map(CacheMount::is_new).collect::<Vec<_>>(), [false, true]);
    assert!(!store.context(&tenant(), "rest", "", &Stop::new()).unwrap().is_new());
    assert!(store.context(&tenant(), "busy", "", &Stop::new()).unwrap().is_new());
}
