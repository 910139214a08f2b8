//! A writer killed at random moments: what it had acknowledged is there afterwards, whole.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use kiln_oci::Digest;
use kiln_store::{LayerRef, NewRecord, RealizeCtx, Store, Time};

use crate::support::{files, layer, open, owned, tenant, wait};

/// Environment of the writer process: the state directory.
const WRITER: &str = "KILN_STORE_TEST_WRITER";

fn key(round: &str, n: u32) -> Digest {
    Digest::of(format!("{round}/{n}"))
}

/// The writer: only active in the child process that the tests below start.
#[test]
fn writer_process() {
    let Ok(dir) = std::env::var(WRITER) else { return };
    let round = std::env::var("KILN_STORE_TEST_ROUND").unwrap();
    write(Path::new(&dir), &round, |line| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush()).is_ok()
    });
}

/// Blobs, layers in short chains, records, aliases, cache mounts, removals, until `say` fails.
fn write(dir: &Path, round: &str, say: impl Fn(&str) -> bool) {
    let store = open(dir);
    let (content, records) = (store.content(&tenant()), store.records(&tenant()));
    say("started");
    let mut parent: Option<LayerRef> = None;
    for n in 0.. {
        let text = format!("{round} {n}");
        let blob = content.put("text/plain", text.as_bytes()).unwrap();
        if !say(&format!("blob {n}")) {
            return;
        }
        let made = layer(&store, parent.as_ref(), &[(&format!("f{n}"), &text), ("last", &text)]);
        let new = NewRecord {
            keys: vec![key(round, n), key(&format!("also {round}"), n)],
            parts: serde_json::json!({ "blob": blob.digest(), "n": n }),
            outputs: vec![Some(made.clone()), None],
            aliases: vec![("/".into(), blob.digest())],
            notes: vec![(n.to_le_bytes().to_vec(), text.clone().into_bytes())],
            created_at: Time::now(),
        };
        let record = records.save(new).unwrap();
        records
            .set_alias(&record.id, record.version, "/late", &blob.digest())
            .unwrap();
        if !say(&format!("record {n}")) {
            return;
        }
        if n % 5 == 4 {
            let again = NewRecord {
                keys: vec![key(round, n - 1)],
                parts: serde_json::json!({ "again": n }),
                outputs: vec![Some(made.clone())],
                aliases: Vec::new(),
                notes: Vec::new(),
                created_at: Time::now(),
            };
            records.save(again).unwrap();
            if !say(&format!("again {}", n - 1)) {
                return;
            }
        }
        if n % 3 == 2 {
            // Something nobody needs comes, is packed, and is collected again.
            let junk = layer(&store, None, &[("junk", &text)]);
            let ctx = RealizeCtx::default();
            wait(store.blob_for(&junk, kiln_store::Algorithm::Gzip.into(), false, &ctx)).unwrap();
            records
                .save(NewRecord {
                    keys: vec![key("junk", n)],
                    parts: serde_json::Value::Null,
                    outputs: vec![Some(junk.clone())],
                    aliases: Vec::new(),
                    notes: Vec::new(),
                    created_at: Time::now(),
                })
                .unwrap();
            let id = junk.id().to_string();
            drop(junk);
            let filter = |r: &kiln_store::UsageRecord| r.id == id;
            // With a limit, blobs in grace stay: those acknowledged above are not leased.
            let policy = kiln_store::GcPolicy {
                max_used_space: 1,
                ..Default::default()
            };
            let stop = kiln_store::Stop::new();
            store.prune(&tenant(), &policy, &filter, &stop, &mut |_| {}).unwrap();
            assert!(records.lookup(&key("junk", n)).unwrap().is_none());
        }
        parent = if n % 4 == 3 { None } else { Some(made) };
    }
}

fn spawn(dir: &Path, round: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::writer_process", "--nocapture", "--test-threads=1"])
        .env(WRITER, dir)
        .env("KILN_STORE_TEST_ROUND", round)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Reads acknowledgements until `count` came, kills, and returns all that were given.
fn run_and_kill(dir: &Path, round: &str, count: usize, spin: u32) -> Vec<String> {
    let mut child = spawn(dir, round);
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let mut acknowledged = Vec::new();
    let known = |line: &String| ["blob ", "record ", "again "].iter().any(|p| line.starts_with(p));
    for line in lines.by_ref() {
        acknowledged.extend(Some(line).filter(known));
        if acknowledged.len() >= count {
            break;
        }
    }
    // Somewhere inside the next operation.
    for _ in 0..spin {
        std::hint::spin_loop();
    }
    child.kill().unwrap();
    acknowledged.extend(lines.filter(known));
    assert_eq!(child.wait().unwrap().signal(), Some(9), "the writer failed by itself");
    acknowledged
}

fn check(store: &std::sync::Arc<Store>, round: &str, acknowledged: &[String]) {
    let (content, records) = (store.content(&tenant()), store.records(&tenant()));
    for line in acknowledged {
        let (what, n) = line.split_once(' ').unwrap();
        let n: u32 = n.parse().unwrap();
        let text = format!("{round} {n}");
        let rerun = acknowledged.contains(&format!("again {n}"));
        match what {
            "blob" => assert_eq!(
                content.read(&Digest::of(&text), 1000).unwrap(),
                text.as_bytes(),
                "{line}"
            ),
            "again" => {
                let hit = records
                    .lookup(&key(round, n))
                    .unwrap()
                    .unwrap_or_else(|| panic!("{round}: {line} is lost"));
                assert_eq!((hit.record.version, hit.outputs.len()), (2, 1), "{line}");
                assert_eq!(
                    records.alias(&hit.record.id, 1, "/").unwrap(),
                    None,
                    "an alias outlived its version"
                );
            }
            _ if rerun => {}
            _ => {
                let hit = records
                    .lookup(&key(round, n))
                    .unwrap()
                    .unwrap_or_else(|| panic!("{round}: {line} is lost"));
                if hit.record.version == 2 {
                    // The re-run was saved and not acknowledged any more.
                    continue;
                }
                assert_eq!(records.alias(&hit.record.id, 1, "/").unwrap(), Some(Digest::of(&text)));
                assert_eq!(
                    records.alias(&hit.record.id, 1, "/late").unwrap(),
                    Some(Digest::of(&text))
                );
                assert_eq!(hit.record.parts["n"], n);
                let mut expected = owned(&[("last", &text)]);
                for below in n - n % 4..=n {
                    expected.push((format!("f{below}"), format!("{round} {below}")));
                }
                expected.sort();
                let mut found = files(store, hit.outputs[0].as_ref(), &RealizeCtx::default());
                found.sort();
                assert_eq!(found, expected, "{line}");
            }
        }
    }
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn fifty_kills_lose_nothing_acknowledged() {
    // What a killed process leaves does not depend on the device; memory is faster where there is some.
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut rounds: Vec<(String, Vec<String>)> = Vec::new();
    let mut total = 0;
    for round in 0..50 {
        let name = format!("round {round}");
        let (count, spin) = (random(40) as usize, random(400_000) as u32);
        let acknowledged = run_and_kill(dir.path(), &name, count, spin);
        total += acknowledged.len();
        let store = open(dir.path());
        assert!(is_empty(&dir.path().join("active")), "something half made is left");
        check(&store, &name, &acknowledged);
        if let Some((name, acknowledged)) = rounds.get(random(rounds.len().max(1) as u64) as usize) {
            check(&store, name, acknowledged);
        }
        store.close().unwrap();
        rounds.push((name, acknowledged));
    }
    assert!(total > 500, "only {total} acknowledgements in 50 rounds");
    // All of it once more, and once more without the index.
    let store = open(dir.path());
    for (name, acknowledged) in &rounds {
        check(&store, name, acknowledged);
    }
    store.close().unwrap();
    drop(store);
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let (store, report) = Store::open(kiln_store::StoreConfig::new(dir.path())).unwrap();
    assert!(report.rebuilt.is_some());
    let records = store.records(&tenant());
    for (name, acknowledged) in &rounds {
        for line in acknowledged.iter().filter(|l| l.starts_with("record ")) {
            let n: u32 = line["record ".len()..].parse().unwrap();
            let hit = records.lookup(&key(name, n)).unwrap();
            assert!(hit.is_some(), "{name}: {line} is lost with the index");
        }
    }
}
