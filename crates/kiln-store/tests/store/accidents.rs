//! A lost or damaged index, a full disk, a power cut.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use kiln_oci::Digest;
use kiln_store::{NewRecord, RealizeCtx, Store, StoreConfig, StoreError, Time};

use crate::support::{files, layer, open, owned, tenant};

fn save(store: &Arc<Store>, n: u32) -> Result<kiln_store::LayerRef, StoreError> {
    let text = format!("text {n}");
    store.content(&tenant()).put("text/plain", text.as_bytes())?;
    let made = layer(store, None, &[("f", &text)]);
    store.records(&tenant()).save(NewRecord {
        keys: vec![Digest::of(&text)],
        parts: serde_json::json!([n]),
        outputs: vec![Some(made.clone())],
        aliases: Vec::new(),
        notes: Vec::new(),
        created_at: Time::now(),
    })?;
    Ok(made)
}

fn hits(store: &Arc<Store>, count: u32) -> u32 {
    let ctx = RealizeCtx::default();
    (0..count)
        .filter(|n| {
            let text = format!("text {n}");
            let hit = store.records(&tenant()).lookup(&Digest::of(&text)).unwrap();
            hit.is_some_and(|hit| files(store, hit.outputs[0].as_ref(), &ctx) == owned(&[("f", &text)]))
        })
        .count() as u32
}

#[test]
fn flipped_bytes_in_the_index_lose_no_tree_and_show_nothing_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for n in 0..30 {
        save(&store, n).unwrap();
    }
    store.close().unwrap();
    drop(store);
    let mut index: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    read_files(&dir.path().join("index"), &mut index);
    let sizes: Vec<(PathBuf, usize)> = index.iter().map(|(p, b)| (p.clone(), b.len())).collect();
    for round in 0..24usize {
        let (path, size) = &sizes[round % sizes.len()];
        if *size == 0 {
            continue;
        }
        // Put the index back as it was, with one byte changed.
        std::fs::remove_dir_all(dir.path().join("index")).unwrap();
        for (path, bytes) in &index {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let mut bytes = bytes.clone();
            if path == &sizes[round % sizes.len()].0 {
                let at = (round * 7919 + 13) % size;
                bytes[at] ^= 1 << (round % 8);
            }
            std::fs::write(path, bytes).unwrap();
        }
        let store = open(dir.path());
        assert_eq!(hits(&store, 30), 30, "round {round}, {}", path.display());
        store.close().unwrap();
    }
}

fn read_files(dir: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_files(&path, found);
        } else {
            found.insert(path.clone(), std::fs::read(&path).unwrap());
        }
    }
}

#[test]
fn half_written_things_are_thrown_away() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for n in 0..3 {
        save(&store, n).unwrap();
    }
    store.close().unwrap();
    drop(store);
    let trees: Vec<PathBuf> = std::fs::read_dir(dir.path().join("trees"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    std::fs::remove_dir_all(&trees[0]).unwrap();
    std::fs::create_dir_all(dir.path().join("trees/notatree/fs")).unwrap();
    std::fs::create_dir_all(dir.path().join("active/leftover/fs")).unwrap();
    std::fs::write(dir.path().join("blobs/sha256").join("00".repeat(32)), "no record").unwrap();
    let (store, report) = Store::open(StoreConfig::new(dir.path())).unwrap();
    assert_eq!(hits(&store, 3), 2);
    assert!(report.incomplete >= 3, "{report:?}");
    store.close().unwrap();
    for gone in ["trees/notatree", "active/leftover"] {
        assert!(!dir.path().join(gone).exists());
    }
    assert!(!dir.path().join("blobs/sha256").join("00".repeat(32)).exists());
}

#[test]
fn a_rebuild_takes_whole_records_only() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let layers: Vec<_> = (0..6).map(|n| save(&store, n).unwrap()).collect();
    let trees: Vec<PathBuf> = layers.iter().map(|l| l.tree().unwrap().dir().to_owned()).collect();
    drop(layers);
    store.close().unwrap();
    drop(store);
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let flip = |path: PathBuf, at: usize| {
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] ^= 4;
        std::fs::write(path, bytes).unwrap();
    };
    flip(trees[1].join("record"), 40);
    let saved = std::fs::read_dir(&trees[3]).unwrap().map(|e| e.unwrap().path());
    let saved = saved
        .into_iter()
        .find(|p| p.file_name().unwrap().to_string_lossy().starts_with("save."))
        .unwrap();
    flip(saved, 60);
    let blob = dir.path().join("blobs/sha256").join(Digest::of("text 5").hex());
    flip(blob.with_extension("record"), 30);
    let (store, report) = Store::open(StoreConfig::new(dir.path())).unwrap();
    assert!(report.rebuilt.is_some());
    assert_eq!(hits(&store, 6), 4, "1 has no tree, 3 no cache record: {report:?}");
    assert!(!store.content(&tenant()).has(&Digest::of("text 5")) && !blob.exists());
    assert!(store.content(&tenant()).has(&Digest::of("text 4")));
    assert_eq!((report.trees, report.layers), (5, 5));
}

#[test]
fn a_damaged_tree_is_a_miss_and_an_image_layer_is_unpacked_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let ctx = RealizeCtx::default();
    let (blob, diff_id, bytes) = crate::support::archive(&[("f", "image")], kiln_store::Algorithm::Gzip.into());
    let remote = crate::support::Remote::of(&[&bytes]);
    let lazy = kiln_store::LazyLayer {
        blob,
        diff_id,
        description: String::new(),
        record_type: kiln_store::RecordType::Regular,
        created_at: None,
    };
    let pull = |store: &Arc<Store>| store.lazy_layer(&tenant(), None, &lazy, Some(remote.clone())).unwrap();
    assert_eq!(files(&store, Some(&pull(&store)), &ctx), owned(&[("f", "image")]));
    drop(save(&store, 1).unwrap());
    drop(save(&store, 2).unwrap());
    let hit = store.records(&tenant()).lookup(&Digest::of("text 1")).unwrap().unwrap();
    let damaged = [
        pull(&store).tree().unwrap(),
        hit.outputs[0].as_ref().unwrap().tree().unwrap(),
    ];
    drop(hit);
    store.close().unwrap();
    drop(store);
    for tree in &damaged {
        std::fs::write(tree.dir().join("manifest"), "not a manifest").unwrap();
    }
    let store = open(dir.path());
    assert_eq!(files(&store, Some(&pull(&store)), &ctx), owned(&[("f", "image")]));
    assert_eq!(remote.count(), 1, "the blob was still here");
    let hit = store.records(&tenant()).lookup(&Digest::of("text 1")).unwrap().unwrap();
    let error = crate::support::wait(store.realize(hit.outputs[0].as_ref(), &ctx)).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert!(
        store
            .records(&tenant())
            .lookup(&Digest::of("text 1"))
            .unwrap()
            .is_none()
    );
    drop(hit);
    assert_eq!(hits(&store, 3), 1);
    store.close().unwrap();
    drop(store);
    let store = open(dir.path());
    assert!(!damaged[0].dir().exists() && !damaged[1].dir().exists());
    assert_eq!(files(&store, Some(&pull(&store)), &ctx), owned(&[("f", "image")]));
    assert_eq!(hits(&store, 3), 1);
}

/// A small file system mounted for one test; `None` without the privilege to mount.
struct Mounted(PathBuf);

impl Mounted {
    fn new(at: &Path, args: &[&str]) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let done = Command::new("mount")
            .args(args)
            .arg(at)
            .stderr(std::process::Stdio::null())
            .status();
        done.is_ok_and(|s| s.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn may_mount() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

#[test]
fn a_full_disk_is_an_error_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("disk");
    let Some(_disk) = Mounted::new(&at, &["-t", "tmpfs", "-o", "size=24m", "tmpfs"]) else {
        assert!(!may_mount(), "root cannot mount a tmpfs");
        return;
    };
    let root = at.join("state");
    let store = open(&root);
    let mut saved = 0;
    let filler = vec![7u8; 256 << 10];
    // Held, so that making room for the next one by collecting these is no way out.
    let (mut held, mut layers) = (Vec::new(), Vec::new());
    let full = loop {
        let mut body = filler.clone();
        body.extend_from_slice(&(held.len() as u32).to_le_bytes());
        match store.content(&tenant()).put("text/plain", &body) {
            Ok(handle) => held.push(handle),
            Err(error) => break error,
        }
        if held.len() <= 20 {
            layers.push(save(&store, saved).unwrap());
            saved += 1;
        }
    };
    assert!(full.is_no_space(), "{full}");
    // To the last byte.
    let mut n = 0u32;
    while std::fs::write(at.join(format!("fill{n}")), vec![1u8; 64 << 10]).is_ok() {
        n += 1;
    }
    let hit = store.records(&tenant()).lookup(&Digest::of("text 3")).unwrap();
    assert!(hit.is_some(), "reading goes on");
    drop((hit, held, layers));
    let _ = store.close();
    drop(store);
    let (store, report) = Store::open(StoreConfig::new(&root)).unwrap();
    assert_eq!(hits(&store, saved), saved, "{report:?}");
    let _ = store.close();
    drop(store);
    for n in 0..=n {
        let _ = std::fs::remove_file(at.join(format!("fill{n}")));
    }
    let store = open(&root);
    assert_eq!(hits(&store, saved), saved);
    store
        .prune(
            &tenant(),
            &kiln_store::GcPolicy {
                keep_duration: std::time::Duration::from_secs(3600),
                ..Default::default()
            },
            &|_| true,
            &kiln_store::Stop::new(),
            &mut |_| {},
        )
        .unwrap();
    save(&store, saved).unwrap();
    store.close().unwrap();
}

#[test]
fn the_limit_makes_room_from_what_is_unused_and_then_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(StoreConfig {
        limit: 40 << 20,
        ..StoreConfig::new(dir.path())
    })
    .unwrap()
    .0;
    let body = |n: u8| vec![n; 1 << 20];
    for n in 0..100 {
        let made = layer(
            &store,
            None,
            &[("f", &String::from_utf8(vec![b'a' + n % 26; 1 << 20]).unwrap())],
        );
        drop(made);
        assert!(store.ledger().used <= (41 << 20), "after {n}: {:?}", store.ledger());
    }
    let mut held = Vec::new();
    let refused = (0..100).find_map(|n| {
        let handle = store.content(&tenant()).put("y", &[body(n), vec![1]].concat());
        handle.map(|h| held.push(h)).err()
    });
    assert!(refused.is_some_and(|e| e.is_no_space()));
    assert!(held.len() >= 20, "only {} MiB of 40 could be held", held.len());
}

#[test]
fn after_a_power_cut_what_was_sealed_is_there_and_the_rest_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (image, copy) = (dir.path().join("image"), dir.path().join("copy"));
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(192 << 20).unwrap();
    // Without the tools or the privilege there is nothing to cut.
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).status();
    if !made.is_ok_and(|s| s.success()) {
        return;
    }
    let image_arg = image.to_string_lossy().into_owned();
    let Some(disk) = Mounted::new(&dir.path().join("disk"), &["-o", "loop", &image_arg]) else {
        return;
    };
    let cookies = tempfile::tempdir().unwrap();
    let root = disk.0.join("state");
    let config = |root: &Path| StoreConfig {
        cookie_dir: Some(cookies.path().to_owned()),
        seal_every: std::time::Duration::from_secs(3600),
        ..StoreConfig::new(root)
    };
    let store = Store::open(config(&root)).unwrap().0;
    for n in 0..20 {
        save(&store, n).unwrap();
    }
    store.sync().unwrap();
    for n in 20..40 {
        save(&store, n).unwrap();
    }
    // The plug is pulled: what the file system has not written to its device by now is gone.
    std::fs::copy(&image, &copy).unwrap();
    store.close().unwrap();
    drop(store);
    let copy_arg = copy.to_string_lossy().into_owned();
    let cut = Mounted::new(&dir.path().join("cut"), &["-o", "loop", &copy_arg]).unwrap();
    // Another boot: its cookies are not there.
    for entry in std::fs::read_dir(cookies.path()).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let (store, report) = Store::open(config(&cut.0.join("state"))).unwrap();
    assert_eq!(hits(&store, 20), 20, "{report:?}");
    // Beyond the seal everything is a miss or right, never half.
    let right = hits(&store, 40);
    let found = (0..40).filter(|n| {
        store
            .records(&tenant())
            .id_of(&Digest::of(format!("text {n}")))
            .unwrap()
            .is_some()
    });
    assert_eq!(found.count() as u32, right, "{report:?}");
    for n in 40..45 {
        save(&store, n).unwrap();
    }
    store.close().unwrap();
}
