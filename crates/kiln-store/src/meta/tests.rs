//! One suite for every index store.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn value(n: u32) -> Vec<u8> {
    record_file::encode(&n).unwrap()
}

fn all(index: &Index, table: Table) -> BTreeMap<Vec<u8>, u32> {
    let mut found = BTreeMap::new();
    index
        .scan(table, b"", |key, n: u32| {
            found.insert(key.to_vec(), n);
            ControlFlow::Continue(())
        })
        .unwrap();
    found
}

fn batch(changes: &[(Table, &str, Option<u32>)]) -> Batch {
    let mut batch = Batch::new();
    for (table, key, n) in changes {
        match n {
            Some(n) => batch.put(*table, *key, n).unwrap(),
            None => batch.remove(*table, *key),
        }
    }
    batch
}

#[test]
fn commits_survive_without_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    let (at, aside) = (dir.path().join("index"), dir.path().join("trash"));
    {
        let (index, opened) = Index::open(&at, &aside).unwrap();
        assert!(opened.rebuild.is_some());
        index
            .commit(&batch(&[(Table::Keys, "a", Some(1)), (Table::Layers, "l", Some(2))]))
            .unwrap();
        index.sync().unwrap();
        index
            .commit(&batch(&[(Table::Keys, "a", None), (Table::Keys, "b", Some(3))]))
            .unwrap();
        // The engine's own flush on drop must not be what saves this: what it wrote is thrown away below.
        std::fs::copy(at.join("journal.2"), dir.path().join("kept")).unwrap();
    }
    std::fs::copy(dir.path().join("kept"), at.join("journal.2")).unwrap();
    let (index, opened) = Index::open(&at, &aside).unwrap();
    assert!(opened.rebuild.is_none());
    assert_eq!(opened.replayed, 1);
    assert_eq!(all(&index, Table::Keys), BTreeMap::from([(b"b".to_vec(), 3)]));
    assert_eq!(index.get::<u32>(Table::Layers, b"l").unwrap(), Some(2));
    assert!(!index.is_dirty());
}

#[test]
fn torn_journal_ends_are_ignored_at_every_length() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _, _) = Journal::open(dir.path()).unwrap();
    journal
        .append(&batch(&[(Table::Keys, "a", Some(1))]).changes, 0)
        .unwrap();
    let first = std::fs::metadata(dir.path().join("journal.0")).unwrap().len() as usize;
    journal
        .append(
            &batch(&[(Table::Keys, "b", Some(2)), (Table::Usage, "c", None)]).changes,
            0,
        )
        .unwrap();
    let whole = std::fs::read(dir.path().join("journal.0")).unwrap();
    for cut in 0..whole.len() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("journal.0"), &whole[..cut]).unwrap();
        let (_, batches, torn) = Journal::open(dir.path()).unwrap();
        assert_eq!(batches.len(), usize::from(cut >= first), "cut at {cut}");
        assert_eq!(torn.is_some(), cut != 0 && cut != first, "cut at {cut}");
    }
}

#[test]
fn a_damaged_engine_is_reported_and_replaced() {
    for stride in [1usize, 7, 64] {
        let dir = tempfile::tempdir().unwrap();
        let (at, aside) = (dir.path().join("index"), dir.path().join("trash"));
        {
            let (index, _) = Index::open(&at, &aside).unwrap();
            for i in 0..500u32 {
                index
                    .commit(&batch(&[(Table::Keys, &format!("key{i}"), Some(i))]))
                    .unwrap();
            }
            index.sync().unwrap();
        }
        let log = at.join("sled/db");
        let mut raw = std::fs::read(&log).unwrap();
        let end = raw.len();
        for byte in raw[..end].iter_mut().step_by(stride * 97) {
            *byte ^= 0x10;
        }
        std::fs::write(&log, raw).unwrap();
        let (index, opened) = Index::open(&at, &aside).unwrap();
        let found = all(&index, Table::Keys);
        // Either it noticed, or everything that it still shows is right.
        for (key, n) in &found {
            assert_eq!(key, format!("key{n}").as_bytes());
        }
        assert!(
            opened.rebuild.is_some() || found.len() == 500 || index.damaged() > 0,
            "stride {stride}"
        );
        index.commit(&batch(&[(Table::Keys, "new", Some(1))])).unwrap();
        assert_eq!(index.get::<u32>(Table::Keys, b"new").unwrap(), Some(1));
    }
}

#[test]
fn mostly_dead_data_is_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let (at, aside) = (dir.path().join("index"), dir.path().join("trash"));
    let size = || -> u64 {
        std::fs::read_dir(at.join("sled"))
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum()
    };
    {
        let (index, _) = Index::open(&at, &aside).unwrap();
        for round in 0..12u64 {
            let mut batch = Batch::new();
            for i in 0..2000u64 {
                let text: String = (0..200)
                    .map(|n| char::from(b'a' + ((i * 31 + n * 7 + round) % 26) as u8))
                    .collect();
                batch.put(Table::Records, i.to_be_bytes(), &text).unwrap();
            }
            index.commit(&batch).unwrap();
            index.sync().unwrap();
        }
        let mut batch = Batch::new();
        for i in 10..2000u64 {
            batch.remove(Table::Records, i.to_be_bytes());
        }
        index.commit(&batch).unwrap();
        index.sync().unwrap();
    }
    let before = size();
    let (index, opened) = Index::open(&at, &aside).unwrap();
    let mut left = 0;
    index
        .scan(Table::Records, b"", |_, _: String| {
            left += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(left, 10);
    if before >= 32 << 20 {
        assert!(opened.compacted, "{before} bytes");
        assert!(size() < before / 2, "{} of {before}", size());
    }
}

#[test]
fn too_many_notes_are_forgotten_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (at, aside) = (dir.path().join("index"), dir.path().join("trash"));
    let (index, _) = Index::open(&at, &aside).unwrap();
    let mut many = Batch::new();
    many.put(Table::Keys, "kept", &7u32).unwrap();
    for n in 0..=MAX_NOTES as u32 {
        many.put(Table::Notes, n.to_be_bytes(), &n).unwrap();
    }
    index.commit(&many).unwrap();
    drop(index);
    for again in [true, false] {
        let (index, opened) = Index::open(&at, &aside).unwrap();
        assert_eq!((opened.forgot_notes, opened.rebuild), (again, None));
        assert_eq!(all(&index, Table::Notes).len(), 0);
        assert_eq!(all(&index, Table::Keys), BTreeMap::from([(b"kept".to_vec(), 7)]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn sled_and_memory_agree(steps in prop::collection::vec(
        prop::collection::vec((0usize..10, 0u8..20, prop::option::of(any::<u32>())), 1..6), 1..40)) {
        let dir = tempfile::tempdir().unwrap();
        let (at, aside) = (dir.path().join("index"), dir.path().join("trash"));
        let (mut index, _) = Index::open(&at, &aside).unwrap();
        let oracle = MemoryTables::default();
        for (n, step) in steps.iter().enumerate() {
            let changes: Vec<Change> = step.iter().map(|(t, k, v)| Change {
                table: Table::ALL[*t], key: vec![b'k', *k], value: v.map(value),
            }).collect();
            oracle.apply(&changes).unwrap();
            index.commit(&Batch { changes }).unwrap();
            if n % 13 == 12 {
                drop(index);
                let (reopened, opened) = Index::open(&at, &aside).unwrap();
                prop_assert_eq!(opened.rebuild, None);
                index = reopened;
            }
        }
        for table in Table::ALL {
            let mut expected = BTreeMap::new();
            oracle.scan(table, b"", &mut |k, v| {
                expected.insert(k.to_vec(), record_file::decode::<u32>(v).unwrap());
                ControlFlow::Continue(())
            }).unwrap();
            prop_assert_eq!(all(&index, table), expected);
        }
    }
}
