//! End-to-end tests: a daemon, the real `docker buildx`, and the image that comes out. One theme per file.
//!
//! `KILN_E2E=0` leaves this level out; it is the only way to, and the closing line says so. Missing programs, images or
//! privileges fail. `KILN_E2E_OFFLINE=1` leaves out the two tests that reach package registries, and they say so as well.

// A test fails by panicking, and says on standard output what it left out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::panic)]

mod hello;

mod args;
mod bake;
mod cache;
mod cancel;
mod clients;
mod copy;
mod crash;
mod daemon;
mod errors;
mod examples;
mod exports;
mod git_source;
mod heredoc;
mod local_source;
mod mounts;
mod multistage;
mod parallel;
mod provenance;
mod prune;
mod registries;
mod rootless;
mod run;
mod sandbox;
mod secrets;
mod ssh;

#[test]
fn every_file_is_a_module() {
    let list = include_str!("main.rs");
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/e2e"))
        .unwrap()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let module = name.trim_end_matches(".rs");
        assert!(
            module == "main" || list.contains(&format!("mod {module};")),
            "tests/e2e/{name} is in no module list"
        );
    }
}
