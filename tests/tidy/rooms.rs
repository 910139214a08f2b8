//! The dependency table of the rooms, as `docs/architecture.md` draws it, checked against what cargo sees.

use cargo_metadata::{CargoOpt, DependencyKind, MetadataCommand};
use std::collections::BTreeMap;

/// Each room with the rooms it may depend on.
const TABLE: &[(&str, &str)] = &[
    ("kiln-proto", ""),
    ("kiln-oci", ""),
    ("kiln-fs", ""),
    ("kiln-match", ""),
    ("kiln-llb", "proto oci"),
    ("kiln-frontend", "llb oci match"),
    ("kiln-solver", "llb oci"),
    ("kiln-store", "oci fs match"),
    ("kiln-executor", "fs"),
    ("kiln-session", "proto fs match"),
    ("kiln-registry", "oci"),
    ("kiln-worker", "solver llb store executor session registry oci fs match"),
    ("kiln-exporter", "store session registry oci"),
    (
        "kilnd",
        "proto oci fs match llb frontend solver store executor session registry worker exporter",
    ),
    ("kiln", "proto session"),
    ("kiln-e2e", ""),
];

/// Third-party crates that must stay out of certain rooms: crate, and the only rooms that may use it.
const HOMES: &[(&str, &[&str])] = &[
    ("tonic", &["kiln-proto", "kiln-session", "kilnd", "kiln"]),
    ("sled", &["kiln-store"]),
    ("nix", &["kiln-executor", "kiln-store", "kiln-fs", "kilnd", "kiln"]),
    ("seccompiler", &["kiln-executor"]),
    ("reqwest", &["kiln-registry", "kiln-worker"]),
    (
        "tokio",
        &[
            "kiln-proto",
            "kiln-solver",
            "kiln-store",
            "kiln-executor",
            "kiln-session",
            "kiln-registry",
            "kiln-worker",
            "kiln-exporter",
            "kilnd",
            "kiln",
        ],
    ),
];

/// Direct dependencies of each package of the workspace, those of tests left out.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let mut command = MetadataCommand::new();
    command
        .manifest_path(manifest)
        .no_deps()
        .features(CargoOpt::AllFeatures)
        .other_options(vec!["--offline".to_owned()]);
    let metadata = command.exec().expect("cargo metadata");
    let own = |package: &cargo_metadata::Package| {
        let direct = package
            .dependencies
            .iter()
            .filter(|dependency| dependency.kind == DependencyKind::Normal);
        direct.map(|dependency| dependency.name.clone()).collect::<Vec<_>>()
    };
    metadata
        .packages
        .iter()
        .map(|package| (package.name.to_string(), own(package)))
        .collect()
}

#[test]
fn rooms_know_only_whom_the_table_names() {
    let found = dependencies();
    let mut wrong = Vec::new();
    for (package, dependencies) in &found {
        let Some((_, allowed)) = TABLE.iter().find(|(name, _)| name == package) else {
            wrong.push(format!(
                "{package} is in no table: say in tests/tidy/rooms.rs whom it may know"
            ));
            continue;
        };
        for dependency in dependencies {
            let Some(room) = dependency.strip_prefix("kiln-") else {
                continue;
            };
            if !allowed.split(' ').any(|allowed| allowed == room) {
                wrong.push(format!("{package} depends on {dependency}"));
            }
        }
    }
    for (name, _) in TABLE {
        if !found.contains_key(*name) {
            wrong.push(format!("{name} is in the table and not in the workspace"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_table_has_no_cycle() {
    // Rooms are listed bottom first, so each may only name rooms above it in the list.
    for (index, (package, allowed)) in TABLE.iter().enumerate() {
        for room in allowed.split(' ').filter(|room| !room.is_empty()) {
            let name = format!("kiln-{room}");
            let below = TABLE
                .iter()
                .position(|(other, _)| *other == name)
                .expect("a known room");
            assert!(
                below < index || package == &"kilnd",
                "{package} and {name} are in the wrong order"
            );
        }
    }
}

#[test]
fn third_party_crates_stay_in_their_rooms() {
    let mut wrong = Vec::new();
    for (package, dependencies) in dependencies() {
        for dependency in dependencies {
            if let Some((_, homes)) = HOMES.iter().find(|(name, _)| *name == dependency)
                && !homes.contains(&package.as_str())
            {
                wrong.push(format!("{package} uses {dependency}, whose place is {homes:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
