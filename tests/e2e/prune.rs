//! What the cache holds, and how it is emptied: du, prune, limits.

use harness::{Daemon, Fixture};

const BIG: &str = "=== Dockerfile\nFROM busybox\nRUN dd if=/dev/urandom of=/big bs=1M count=20 2>/dev/null\nRUN --mount=type=cache,target=/c dd if=/dev/urandom of=/c/big bs=1M count=5 2>/dev/null\n";

fn total(text: &str) -> f64 {
    let line = text
        .lines()
        .find(|line| line.starts_with("Total:"))
        .unwrap_or_else(|| panic!("no total in {text}"));
    let amount = line.split_whitespace().last().unwrap();
    let number: f64 = amount
        .trim_end_matches(|c: char| c.is_ascii_alphabetic())
        .parse()
        .unwrap();
    number
        * if amount.ends_with("GB") {
            1e9
        } else if amount.ends_with("MB") {
            1e6
        } else if amount.ends_with("kB") {
            1e3
        } else {
            1.0
        }
}

#[test]
fn du_and_prune() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(BIG);
    let _outcome = buildx.build(&context).ok();
    let du = buildx.run(&["du"]).ok().stdout;
    assert!((26e6..40e6).contains(&total(&du)), "{du}");
    let verbose = buildx.run(&["du", "--verbose"]).ok().stdout;
    for part in ["exec.cachemount", "regular", "mount / from exec"] {
        assert!(verbose.contains(part), "no {part:?} in {verbose}");
    }
    // What nothing needs any more goes; images in use by nothing are in the cache only.
    let pruned = buildx
        .run(&["prune", "--force", "--filter", "type=exec.cachemount"])
        .ok()
        .stdout;
    assert!((5e6..6e6).contains(&total(&pruned)), "{pruned}");
    let pruned = buildx.run(&["prune", "--force", "--all"]).ok().stdout;
    assert!(total(&pruned) > 20e6, "{pruned}");
    let du = buildx.run(&["du"]).ok().stdout;
    assert!(total(&du) < 1e6, "{du}");
    let outcome = buildx.build(&context).ok();
    assert_eq!(outcome.progress().executed().len(), 2, "everything runs again");
}

#[test]
fn space_comes_back_to_the_disk() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let _outcome = buildx.build(&Fixture::new(BIG)).ok();
    let used = || {
        let out = std::process::Command::new("du")
            .args(["-sk"])
            .arg(daemon.state())
            .output()
            .unwrap();
        String::from_utf8_lossy(&out.stdout)
            .split_whitespace()
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let before = used();
    assert!(before > 25_000, "{before} KiB");
    let _outcome = buildx.run(&["prune", "--force", "--all"]).ok();
    let freed = harness::process::eventually(std::time::Duration::from_secs(20), || {
        (used() + 24_000 < before).then_some(())
    });
    assert!(freed.is_some(), "{before} KiB before, {} KiB after", used());
}

#[test]
fn keeping_some_storage() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    for number in 0..4 {
        let context = Fixture::new(&format!(
            "=== Dockerfile\nFROM busybox\nRUN : {number}; dd if=/dev/urandom of=/big bs=1M count=10 2>/dev/null\n"
        ));
        let _outcome = buildx.build(&context).ok();
    }
    let flag = if buildx.run(&["prune", "--help"]).ok().stdout.contains("max-used-space") {
        "--max-used-space"
    } else {
        "--keep-storage"
    };
    let _outcome = buildx.run(&["prune", "--force", "--all", flag, "25mb"]).ok();
    let du = buildx.run(&["du"]).ok().stdout;
    assert!((9e6..26e6).contains(&total(&du)), "{du}");
}
