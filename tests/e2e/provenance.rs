//! The attestation that buildx asks for by default, and how to do without.

use harness::{Daemon, Fixture, Image, Registry};

const CONTEXT: &str = "=== Dockerfile\nFROM busybox AS build\nARG SECRET_LOOKING=x\nRUN echo $SECRET_LOOKING > /x\nFROM alpine:3.19\nCOPY --from=build /x /x\n";

#[test]
fn the_default_names_every_base() {
    let registry = Registry::empty();
    let daemon = Daemon::with().plain_http(&registry).start();
    let reference = format!("{}/team/app:1", registry.host());
    let (buildx, context) = (daemon.buildx(), Fixture::new(CONTEXT));
    let build = buildx.build(&context).build_arg("SECRET_LOOKING", "hidden-value");
    let outcome = build.args(&["-t", &reference, "--push"]).ok();
    let image = Image::pull(&registry, "team/app", "1");
    let predicate = image.provenance().expect("an attestation in the image").clone();
    let text = predicate.to_string();
    for base in ["pkg:docker/busybox@latest", "pkg:docker/alpine@3.19"] {
        assert!(text.contains(base), "{base} is among the materials: {predicate:#}");
    }
    let descriptor = image.index.to_string();
    assert!(descriptor.contains("manifests"));
    assert!(!text.contains("hidden-value"), "mode=min keeps build arguments out");
    let metadata = &outcome.metadata["buildx.build.provenance"];
    assert!(
        metadata.is_object(),
        "the metadata file has it as well: {:#}",
        outcome.metadata
    );
    let materials = [
        &metadata["materials"],
        &metadata["buildDefinition"]["resolvedDependencies"],
    ];
    let materials = materials
        .into_iter()
        .find_map(|m| m.as_array())
        .expect("a list of materials");
    assert_eq!(materials.len(), 2, "{metadata:#}");
    assert!(materials.iter().all(|material| {
        material["digest"]["sha256"]
            .as_str()
            .is_some_and(|digest| digest.len() == 64)
    }));
    assert!(outcome.metadata["buildx.build.ref"].is_string());
}

#[test]
fn off_means_a_plain_image() {
    let daemon = Daemon::start();
    // Without a word about it, an archive has none either: the client asks for it "only where it can be attached in a registry".
    for option in [&["--provenance=false"][..], &[]] {
        let image = daemon.buildx().build(&Fixture::new(CONTEXT)).args(option).image();
        assert!(image.attestations.is_empty());
        assert_eq!(image.index["manifests"].as_array().unwrap().len(), 1);
        assert_eq!(
            image.index["manifests"][0]["mediaType"],
            "application/vnd.oci.image.manifest.v1+json"
        );
    }
}

#[test]
fn mode_max_has_the_arguments_of_the_build() {
    let daemon = Daemon::start();
    let image = daemon
        .buildx()
        .build(&Fixture::new(CONTEXT))
        .arg("--provenance=mode=max")
        .build_arg("SECRET_LOOKING", "shown")
        .image();
    let text = image.provenance().expect("an attestation").to_string();
    // `buildConfig` with the graph itself is not written yet: docs/status.md.
    assert!(text.contains("shown"), "{text}");
}

// caps: exporter.image.attestations
#[test]
fn the_attestation_points_to_its_image() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(CONTEXT);
    let build = buildx.build(&context).arg("--provenance=true");
    let dir = build.result_path("layout");
    let _outcome = build
        .arg(format!("--output=type=oci,tar=false,dest={}", dir.display()))
        .ok();
    let image = Image::open_layout(&dir);
    let index: serde_json::Value = {
        let digest = image.index["manifests"][0]["digest"]
            .as_str()
            .unwrap()
            .trim_start_matches("sha256:")
            .to_owned();
        serde_json::from_slice(&std::fs::read(dir.join("blobs/sha256").join(digest)).unwrap()).unwrap()
    };
    let manifests = index["manifests"].as_array().unwrap();
    assert_eq!(manifests.len(), 2);
    assert_eq!(manifests[1]["platform"]["os"], "unknown");
    assert_eq!(
        manifests[1]["annotations"]["vnd.docker.reference.type"],
        "attestation-manifest"
    );
    assert_eq!(
        manifests[1]["annotations"]["vnd.docker.reference.digest"],
        image.digest.as_str()
    );
}
