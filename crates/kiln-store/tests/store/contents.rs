//! Blobs: drafts, resuming, digests, tenants.

use std::io::{Read as _, Seek as _, SeekFrom};

use kiln_oci::{Descriptor, Digest};
use kiln_store::{StoreError, Tenant};

use crate::support::{open, tenant};

#[test]
fn a_draft_is_resumed_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let body: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    {
        let store = open(dir.path());
        let mut writer = store.content(&tenant()).writer(Some("layer")).unwrap();
        writer.write_bytes(&body[..150_000]).unwrap();
        assert!(matches!(
            store.content(&tenant()).writer(Some("layer")),
            Err(StoreError::Busy { .. })
        ));
        drop(writer);
        store.close().unwrap();
    }
    let store = open(dir.path());
    let content = store.content(&tenant());
    let mut writer = content.writer(Some("layer")).unwrap();
    assert_eq!(writer.offset(), 150_000);
    writer.write_bytes(&body[150_000..]).unwrap();
    let wanted = Descriptor::new("text/plain", Digest::of(&body), body.len() as u64);
    let handle = writer.commit(Some(&wanted)).unwrap();
    assert_eq!(handle.digest(), wanted.digest);
    assert_eq!(content.read(&wanted.digest, 1 << 30).unwrap(), body);
    let mut range = content.open(&wanted.digest).unwrap().range(10, 20).unwrap();
    let mut part = Vec::new();
    range.read_to_end(&mut part).unwrap();
    assert_eq!(part, body[10..30]);
    let mut reader = content.open(&wanted.digest).unwrap();
    assert_eq!(reader.seek(SeekFrom::End(0)).unwrap(), body.len() as u64);
}

#[test]
fn wrong_bytes_never_become_a_blob() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = store.content(&tenant());
    let wanted = Descriptor::of("text/plain", b"right");
    let mut writer = content.writer(Some("x")).unwrap();
    writer.write_bytes(b"wrong").unwrap();
    assert!(matches!(
        writer.commit(Some(&wanted)),
        Err(StoreError::DigestMismatch { .. })
    ));
    let mut writer = content.writer(Some("x")).unwrap();
    assert_eq!(writer.offset(), 0, "a mismatch throws the draft away");
    writer.write_bytes(b"right and more").unwrap();
    assert!(matches!(
        writer.commit(Some(&wanted)),
        Err(StoreError::SizeMismatch { .. })
    ));
    assert!(!content.has(&wanted.digest));
    assert!(content.list().is_empty());
}

#[test]
fn tenants_do_not_see_each_others_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let other = Tenant::new("other").unwrap();
    let (mine, theirs) = (store.content(&tenant()), store.content(&other));
    let blob = mine.put("text/plain", b"secret sauce").unwrap();
    mine.add_source(&blob.digest(), "registry.test/a").unwrap();
    assert!(!theirs.has(&blob.digest()) && theirs.lease(&blob.digest()).is_none());
    assert!(matches!(theirs.open(&blob.digest()), Err(StoreError::NotFound { .. })));
    theirs.put("text/plain", b"secret sauce").unwrap();
    assert!(theirs.has(&blob.digest()));
    drop(blob);
    store.close().unwrap();
    drop((mine, theirs, store));
    let store = open(dir.path());
    let info = store.content(&other).info(&Digest::of("secret sauce")).unwrap();
    assert_eq!(info.sources.iter().collect::<Vec<_>>(), ["registry.test/a"]);
    assert_eq!(info.media_type.as_deref(), Some("text/plain"));
}

#[test]
fn a_vanished_file_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let content = store.content(&tenant());
    let digest = content.put("text/plain", b"here today").unwrap().digest();
    std::fs::remove_file(dir.path().join("blobs/sha256").join(digest.hex())).unwrap();
    assert!(content.open(&digest).unwrap_err().is_not_found());
    assert!(!content.has(&digest));
    content.put("text/plain", b"here today").unwrap();
    assert_eq!(content.read(&digest, 100).unwrap(), b"here today");
}
