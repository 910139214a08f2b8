//! The namespaces back end against the real kernel. Needs root, a C compiler and a static busybox; without them it fails.
//!
//! Has its own `main`, because the executor's launcher is a copy of this program (`maybe_init` must come first).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs)]

mod behaviour;
mod confinement;
mod lab;
mod leaks;
mod mounting;
mod rootless;

use std::panic::{AssertUnwindSafe, catch_unwind};

type Case = (&'static str, fn());

fn main() {
    kiln_executor::maybe_init();
    if let Some(role) = std::env::var_os("KILN_TEST_ROLE") {
        match role.to_string_lossy().as_ref() {
            "rootless" => rootless::act(false),
            "single" => rootless::act(true),
            "compare" => confinement::print_for_comparison(),
            role => leaks::act(role),
        }
        return;
    }
    let filter: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let cases: Vec<Case> = [
        behaviour::CASES,
        confinement::CASES,
        mounting::CASES,
        leaks::CASES,
        rootless::CASES,
    ]
    .into_iter()
    .flatten()
    .copied()
    .collect();
    if std::env::args().any(|a| a == "--list") {
        for (name, _) in &cases {
            println!("{name}: test");
        }
        return;
    }
    let mut failed = Vec::new();
    for (name, case) in cases
        .iter()
        .filter(|(n, _)| filter.is_empty() || filter.iter().any(|f| n.contains(f.as_str())))
    {
        let begun = std::time::Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(case));
        println!(
            "test {name} ... {} ({:.0?})",
            if outcome.is_ok() { "ok" } else { "FAILED" },
            begun.elapsed()
        );
        if outcome.is_err() {
            failed.push(*name);
        }
    }
    if !failed.is_empty() {
        println!("failed: {failed:?}");
        std::process::exit(1);
    }
}
