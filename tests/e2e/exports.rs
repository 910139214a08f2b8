//! Exporters: OCI and docker archives, directories, plain tar, what the client is told, and equal bytes from equal input.

use harness::{Daemon, Fixture, Image};
use std::collections::BTreeMap;

const TREE: &str = r#"
=== Dockerfile
FROM busybox AS build
RUN mkdir -p /out/sub && echo 1 > /out/a && echo 2 > /out/sub/b && chmod 750 /out/sub && ln -s a /out/link && chown 9:9 /out/a
FROM scratch
COPY --from=build /out /
LABEL kind=tree
"#;

fn tar_entries(file: &std::path::Path) -> BTreeMap<String, u64> {
    let mut archive = tar::Archive::new(std::fs::File::open(file).unwrap());
    let entries = archive.entries().unwrap().map(Result::unwrap);
    entries
        .map(|entry| {
            (
                entry.path().unwrap().display().to_string().trim_matches('/').to_owned(),
                entry.size(),
            )
        })
        .collect()
}

#[test]
fn a_directory() {
    let daemon = Daemon::start();
    let (dir, _outcome) = daemon.buildx().build(&Fixture::new(TREE)).local();
    assert_eq!(std::fs::read_to_string(dir.join("a")).unwrap(), "1\n");
    assert_eq!(std::fs::read_to_string(dir.join("sub/b")).unwrap(), "2\n");
    assert_eq!(std::fs::read_link(dir.join("link")).unwrap().to_str(), Some("a"));
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(
        std::fs::metadata(dir.join("sub")).unwrap().permissions().mode() & 0o777,
        0o750
    );
}

#[test]
fn a_plain_tar() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(TREE);
    let build = buildx.build(&context);
    let file = build.result_path("tree.tar");
    let _outcome = build.arg(format!("--output=type=tar,dest={}", file.display())).ok();
    let entries = tar_entries(&file);
    assert_eq!(
        entries.keys().map(String::as_str).collect::<Vec<_>>(),
        ["a", "link", "sub", "sub/b"]
    );
}

#[test]
fn tar_on_standard_output() {
    let daemon = Daemon::start();
    let context = Fixture::new("=== Dockerfile\nFROM scratch\nCOPY f /f\n=== f\n1\n");
    let outcome = daemon
        .buildx()
        .build(&context)
        .args(&["--output", "type=tar,dest=-"])
        .ok();
    assert!(outcome.stdout.contains("ustar"));
}

#[test]
fn a_docker_archive() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(TREE);
    let build = buildx
        .build(&context)
        .args(&["-t", "example.org/app:1", "--provenance=false"]);
    let file = build.result_path("docker.tar");
    let outcome = build.arg(format!("--output=type=docker,dest={}", file.display())).ok();
    let image = Image::open(&file);
    assert_eq!(image.files_in(""), ["a", "link", "sub/b"]);
    let mut archive = tar::Archive::new(std::fs::File::open(&file).unwrap());
    let manifest = archive
        .entries()
        .unwrap()
        .map(Result::unwrap)
        .find(|entry| entry.path().unwrap().to_str() == Some("manifest.json"))
        .map(|entry| serde_json::from_reader::<_, serde_json::Value>(entry).unwrap())
        .expect("what `docker load` reads");
    assert_eq!(manifest[0]["RepoTags"][0], "example.org/app:1");
    assert_eq!(manifest[0]["Layers"].as_array().unwrap().len(), 1);
    assert_eq!(
        outcome.metadata["containerimage.config.digest"],
        image.manifest["config"]["digest"]
    );
}

#[test]
fn an_oci_directory_and_names() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(TREE);
    let build = buildx.build(&context).args(&["-t", "example.org/app:1"]);
    let dir = build.result_path("layout");
    let outcome = build
        .arg(format!("--output=type=oci,tar=false,dest={}", dir.display()))
        .ok();
    let image = Image::open_layout(&dir);
    assert_eq!(
        image.index["manifests"][0]["annotations"]["io.containerd.image.name"],
        "example.org/app:1"
    );
    assert_eq!(
        image.index["manifests"][0]["digest"],
        outcome.metadata["containerimage.digest"]
    );
    assert_eq!(outcome.metadata["image.name"], "example.org/app:1");
    assert!(outcome.metadata["containerimage.descriptor"]["size"].is_u64());
}

#[test]
fn an_image_id_file() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(TREE);
    let build = buildx.build(&context).arg("--provenance=false");
    let (id, file) = (build.result_path("id"), build.result_path("i.tar"));
    let _outcome = build
        .args(&[
            "--iidfile",
            &id.display().to_string(),
            "--output",
            &format!("type=docker,dest={}", file.display()),
        ])
        .ok();
    assert_eq!(
        std::fs::read_to_string(id).unwrap(),
        Image::open(&file).manifest["config"]["digest"].as_str().unwrap()
    );
}

#[test]
fn compressions() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(TREE);
    for (compression, ending) in [("uncompressed", "tar"), ("gzip", "tar+gzip"), ("zstd", "tar+zstd")] {
        let build = buildx.build(&context);
        let file = build.result_path("i.tar");
        let _outcome = build
            .arg(format!(
                "--output=type=oci,dest={},compression={compression},force-compression=true,oci-mediatypes=true",
                file.display()
            ))
            .ok();
        let image = Image::open(&file);
        assert!(
            image.layers[0].media_type.ends_with(ending),
            "{} for {compression}",
            image.layers[0].media_type
        );
        assert_eq!(image.files_in(""), ["a", "link", "sub/b"]);
    }
}

// caps: exporter.multiple
#[test]
fn several_outputs_at_once() {
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::new(TREE);
    let build = buildx.build(&context);
    let (dir, file) = (build.result_path("dir"), build.result_path("oci.tar"));
    let outputs = [
        format!("type=local,dest={}", dir.display()),
        format!("type=oci,dest={}", file.display()),
    ];
    let _outcome = build.args(&["--output", &outputs[0], "--output", &outputs[1]]).ok();
    assert!(dir.join("sub/b").is_file());
    assert!(Image::open(&file).has("sub/b"));
}

// caps: exporter.sourcedateepoch
#[test]
fn equal_input_gives_equal_bytes_from_two_daemons() {
    let context = Fixture::new(TREE);
    // SOURCE_DATE_EPOCH and rewritten times take the clock out; state paths and start times differ anyway.
    let build = || {
        let daemon = Daemon::start();
        let buildx = daemon.buildx();
        let build = buildx
            .build(&context)
            .arg("--provenance=false")
            .env("SOURCE_DATE_EPOCH", "1700000000");
        let file = build.result_path("i.tar");
        let outcome = build
            .arg(format!(
                "--output=type=oci,rewrite-timestamp=true,dest={}",
                file.display()
            ))
            .ok();
        let image = Image::open(&file);
        assert_eq!(image.config["created"], "2023-11-14T22:13:20Z");
        assert!(image.tree.values().all(|entry| entry.mtime <= 1_700_000_000));
        (image, outcome.results().to_owned())
    };
    assert_eq!(build().0.digest, build().0.digest);
}

#[test]
fn without_an_output_the_result_stays_in_the_cache() {
    let daemon = Daemon::start();
    let outcome = daemon.buildx().build(&Fixture::new(TREE)).ok();
    assert!(outcome.stderr.contains("No output specified"), "{}", outcome.stderr);
}

#[test]
fn scratch_alone_is_an_empty_image() {
    let daemon = Daemon::start();
    let image = daemon
        .buildx()
        .build(&Fixture::new("=== Dockerfile\nFROM scratch\nENV A=1\n"))
        .image();
    assert_eq!(image.layers.len(), 0);
    assert_eq!(
        image.env(),
        [
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "A=1"
        ]
    );
}
