//! Exports of real layers through a real session, read back with other tools' eyes: archives with `oci-spec` and skopeo,
//! files from the client's disk, pushes from a real registry.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_exporter::{
    Attestation, AttestationContent, AttestationKind, BuildResult, ExportProgress, ExportRequest, Exported, Exporter,
    Refs, StatusUpdate,
};
use kiln_oci::{Descriptor, Digest, ImageConfig, ImageRef, Index, Manifest};
use kiln_registry::{Anonymous, Client, Registry, RegistryConfig};
use kiln_session::attach::{Attachments, ClientSession, ExportTarget};
use kiln_session::{Session, SessionInfo, SessionManager};
use kiln_store::{
    Entry, Kind, LayerMeta, LayerRef, RealizeCtx, SnapshotterChoice, Store, StoreConfig, Tenant, TreeBuilder,
};

/// A store with two layers: `/etc/conf` and `/bin/tool` (linked to `/bin/alias`) below, `/etc/conf` removed above.
struct Fixture {
    store: Arc<Store>,
    base: LayerRef,
    top: LayerRef,
    _dir: tempfile::TempDir,
}

fn put(builder: &TreeBuilder, entries: &mut Vec<Entry>, path: &str, content: &[u8], mode: u32) {
    builder
        .fs()
        .create_file(path, mode)
        .unwrap()
        .write_all(content)
        .unwrap();
    let mut entry = Entry::new(path.as_bytes().to_vec(), Kind::Regular);
    (entry.mode, entry.size) = (mode, content.len() as u64);
    entry.mtime.secs = 1_700_000_000;
    entries.push(entry);
}

fn directory(builder: &TreeBuilder, entries: &mut Vec<Entry>, path: &str) {
    builder.fs().create_dir(path, 0o755).unwrap();
    entries.push(Entry::dir(path.as_bytes().to_vec()));
}

async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let mut config = StoreConfig::new(dir.path().join("state"));
    config.snapshotter = SnapshotterChoice::Native;
    let (store, _) = Store::open(config).unwrap();
    let tenant = Tenant::default();
    let cx = RealizeCtx::default();

    let active = store.active_over(&tenant, None, &cx).await.unwrap();
    let builder = active.builder().unwrap();
    let mut entries = vec![Entry::dir(*b"")];
    directory(&builder, &mut entries, "bin");
    put(&builder, &mut entries, "bin/alias", b"#!tool", 0o755);
    builder.fs().hard_link("bin/alias", "bin/tool").unwrap();
    entries.last_mut().unwrap().link_group = 1;
    let mut again = entries.last().unwrap().clone();
    again.path = Box::from(*b"bin/tool");
    entries.push(again);
    directory(&builder, &mut entries, "etc");
    put(&builder, &mut entries, "etc/conf", &vec![b'x'; 300_000], 0o640);
    builder.finish(entries).unwrap();
    let meta = |d: &str| LayerMeta {
        description: d.into(),
        ..LayerMeta::default()
    };
    let base = active.commit(meta("base layer")).unwrap();

    let active = store.active_over(&tenant, Some(&base), &cx).await.unwrap();
    let builder = active.builder().unwrap();
    let mut entries = vec![Entry::dir(*b"")];
    directory(&builder, &mut entries, "etc");
    put(&builder, &mut entries, "etc/new", b"new\n", 0o600);
    builder.put_whiteout(b"etc/conf").unwrap();
    entries.push(Entry::whiteout(*b"etc/conf"));
    entries.sort_by(|a, b| kiln_store::manifest::compare(&a.path, &b.path));
    builder.finish(entries).unwrap();
    let top = active.commit(meta("[2/2] RUN change")).unwrap();
    Fixture {
        store,
        base,
        top,
        _dir: dir,
    }
}

#[derive(Default)]
struct Seen(Mutex<Vec<StatusUpdate>>);

impl ExportProgress for Seen {
    fn status(&self, update: StatusUpdate) {
        self.0.lock().unwrap().push(update);
    }
}

impl Seen {
    /// Ids in the order of their beginning; every one must have completed.
    fn ids(&self) -> Vec<String> {
        let all = self.0.lock().unwrap();
        let mut ids: Vec<String> = Vec::new();
        for update in all.iter() {
            if !ids.contains(&update.id) {
                ids.push(update.id.clone());
            }
        }
        for id in &ids {
            assert!(
                all.iter().rev().find(|u| u.id == *id).unwrap().completed.is_some(),
                "{id} is still open"
            );
        }
        ids
    }
}

async fn connect(exports: BTreeMap<usize, ExportTarget>, stores: BTreeMap<String, PathBuf>) -> Session {
    let client = ClientSession::new(
        "the-client",
        Attachments {
            exports,
            stores,
            ..Attachments::default()
        },
    );
    let info = SessionInfo::from_headers(&client.headers()).unwrap();
    let (ours, theirs) = tokio::io::duplex(256 << 10);
    tokio::spawn(async move { drop(client.serve(theirs).await) });
    let manager = SessionManager::new();
    let (id, running) = (info.id.clone(), manager.clone());
    tokio::spawn(async move { running.run(info, ours).await });
    manager.get(&id).await.unwrap()
}

fn attrs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn single(layer: &LayerRef) -> BuildResult {
    let config =
        br#"{"architecture":"amd64","os":"linux","config":{"Cmd":["/bin/tool"],"Healthcheck":{"Test":["NONE"]}}}"#;
    BuildResult {
        refs: Refs::Single(Some(layer.clone())),
        metadata: BTreeMap::from([("containerimage.config".to_owned(), config.to_vec())]),
        attestations: BTreeMap::new(),
        inline_cache: BTreeMap::new(),
    }
}

fn provenance(inline_only: bool) -> Attestation {
    Attestation {
        kind: AttestationKind::InToto,
        content: AttestationContent::Bytes(bytes::Bytes::from_static(br#"{"buildDefinition":{}}"#)),
        path: "provenance.json".into(),
        predicate_type: "https://slsa.dev/provenance/v1".into(),
        subjects: vec![],
        metadata: attrs(&[
            ("reason", "provenance"),
            ("inline-only", if inline_only { "true" } else { "false" }),
        ]),
    }
}

struct Run {
    exported: Exported,
    seen: Arc<Seen>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn request(f: &Fixture, session: Option<Session>, seen: &Arc<Seen>) -> ExportRequest {
    ExportRequest {
        index: 0,
        session,
        registry: anonymous(),
        content: f.store.content(&Tenant::default()),
        realize: RealizeCtx::default(),
        progress: seen.clone(),
    }
}

fn anonymous() -> Client {
    Registry::new(RegistryConfig::default()).client(Arc::new(Anonymous))
}

/// Exports to a file or a directory of a client.
async fn run(f: &Fixture, kind: &str, pairs: &[(&str, &str)], result: &BuildResult) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let delete = pairs.contains(&("mode", "delete"));
    let target = match kind {
        "local" => ExportTarget::Directory {
            path: path.clone(),
            delete,
        },
        _ => ExportTarget::File(path.clone()),
    };
    if delete {
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("stale"), "x").unwrap();
    }
    let session = connect(BTreeMap::from([(0, target)]), BTreeMap::new()).await;
    let seen = Arc::new(Seen::default());
    let exporter = Exporter::new(kind, &attrs(pairs)).unwrap();
    let exported = exporter
        .export(result, &request(f, Some(session), &seen))
        .await
        .unwrap();
    Run {
        exported,
        seen,
        path,
        _dir: dir,
    }
}

fn untar(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(std::fs::File::open(path).unwrap());
    let mut out = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        out.insert(name, bytes);
    }
    out
}

fn blob<'a>(files: &'a BTreeMap<String, Vec<u8>>, digest: &Digest) -> &'a [u8] {
    let bytes = &files[&format!("blobs/sha256/{}", digest.hex())];
    assert_eq!(Digest::of(bytes), *digest);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_oci_archive_is_complete_and_the_same_every_time() {
    let f = fixture().await;
    let pairs = [("name", "alpine:3,me/app"), ("source-date-epoch", "1700000500")];
    let first = run(&f, "oci", &pairs, &single(&f.top)).await;
    let files = untar(&first.path);
    let index: Index = serde_json::from_slice(&files["index.json"]).unwrap();
    assert_eq!(index.manifests.len(), 2);
    assert_eq!(
        index.manifests[0].annotations["org.opencontainers.image.created"],
        "2023-11-14T22:21:40Z"
    );
    let manifest = blob(&files, &index.manifests[0].digest);
    kiln_oci::spec::image::ImageManifest::from_reader(manifest).unwrap();
    let manifest: Manifest = serde_json::from_slice(manifest).unwrap();
    let config_bytes = blob(&files, &manifest.config.digest);
    kiln_oci::spec::image::ImageConfiguration::from_reader(config_bytes).unwrap();
    let config = ImageConfig::parse(config_bytes).unwrap();
    assert_eq!(config.history().unwrap()[1].created_by, "[2/2] RUN change");
    assert_eq!(config.diff_ids().unwrap().len(), 2);
    assert!(config.run_config().unwrap().healthcheck.is_some());
    for layer in manifest.layers() {
        assert_eq!(blob(&files, &layer.digest).len() as u64, layer.size);
    }
    let response = &first.exported.response;
    assert_eq!(response["containerimage.digest"], index.manifests[0].digest.to_string());
    assert_eq!(
        response["containerimage.config.digest"],
        manifest.config.digest.to_string()
    );
    assert_eq!(
        response["image.name"],
        "docker.io/library/alpine:3,docker.io/me/app:latest"
    );
    use base64::Engine as _;
    let descriptor = base64::engine::general_purpose::STANDARD
        .decode(&response["containerimage.descriptor"])
        .unwrap();
    let descriptor: Descriptor = serde_json::from_slice(&descriptor).unwrap();
    assert_eq!(descriptor.platform.unwrap().id(), "linux/amd64");
    assert_eq!(
        first.seen.ids(),
        [
            "exporting layers".to_owned(),
            format!("exporting config {}", manifest.config.digest),
            format!("exporting manifest {}", index.manifests[0].digest),
            "sending tarball".to_owned()
        ]
    );
    // the same bytes from the same store, and from another one
    let second = run(&f, "oci", &pairs, &single(&f.top)).await;
    assert!(std::fs::read(&first.path).unwrap() == std::fs::read(&second.path).unwrap());
    let other = fixture().await;
    let third = run(&other, "oci", &pairs, &single(&other.top)).await;
    assert!(std::fs::read(&first.path).unwrap() == std::fs::read(&third.path).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_tools_read_the_archives() {
    let f = fixture().await;
    let oci = run(&f, "oci", &[("name", "me/app:1")], &single(&f.top)).await;
    let docker = run(&f, "docker", &[("name", "me/app:1")], &single(&f.top)).await;
    for source in [
        format!("oci-archive:{}", oci.path.display()),
        format!("docker-archive:{}:docker.io/me/app:1", docker.path.display()),
    ] {
        let output = Command::new("skopeo")
            .args(["inspect", "--config", &source])
            .output()
            .expect("skopeo");
        assert!(
            output.status.success(),
            "{source}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let config = ImageConfig::parse(&output.stdout).unwrap();
        assert_eq!(config.diff_ids().unwrap().len(), 2);
        // a copy checks all digests
        let dir = tempfile::tempdir().unwrap();
        let target = format!("dir:{}", dir.path().display());
        let output = Command::new("skopeo")
            .args(["copy", "--insecure-policy", &source, &target])
            .output()
            .expect("skopeo");
        assert!(
            output.status.success(),
            "{source}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let files = untar(&docker.path);
    let manifest: serde_json::Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
    assert_eq!(manifest[0]["RepoTags"], serde_json::json!(["me/app:1"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attestations_force_an_index_unless_they_are_inline_only() {
    let f = fixture().await;
    let mut result = single(&f.top);
    result.attestations.insert("linux/amd64".into(), vec![provenance(true)]);
    let plain = run(&f, "oci", &[], &result).await;
    assert!(plain.exported.response.contains_key("containerimage.config.digest"));
    let attached = run(&f, "oci", &[("attestation-inline", "true")], &result).await;
    assert!(!attached.exported.response.contains_key("containerimage.config.digest"));
    let files = untar(&attached.path);
    let top: Index = serde_json::from_slice(&files["index.json"]).unwrap();
    let index: Index = serde_json::from_slice(blob(&files, &top.manifests[0].digest)).unwrap();
    assert_eq!(index.manifests.len(), 2);
    assert_eq!(
        index.manifests[1].annotations["vnd.docker.reference.type"],
        "attestation-manifest"
    );
    let manifest: Manifest = serde_json::from_slice(blob(&files, &index.manifests[1].digest)).unwrap();
    blob(&files, &manifest.layers()[0].digest);
    blob(&files, &manifest.config.digest);
    assert!(
        attached
            .seen
            .ids()
            .iter()
            .any(|i| i.starts_with("exporting attestation manifest sha256:"))
    );
    assert!(
        attached
            .seen
            .ids()
            .iter()
            .any(|i| i.starts_with("exporting manifest list sha256:"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn docker_refuses_maps_and_platforms_must_be_named() {
    let f = fixture().await;
    let mut result = single(&f.top);
    result.refs = Refs::ByPlatform(BTreeMap::from([("linux/amd64".to_owned(), Some(f.top.clone()))]));
    let seen = Arc::new(Seen::default());
    let export = async |kind: &str, result: &BuildResult| {
        Exporter::new(kind, &BTreeMap::new())
            .unwrap()
            .export(result, &request(&f, None, &seen))
            .await
            .err()
            .unwrap()
    };
    assert_eq!(
        export("docker", &result).await.to_string(),
        "docker exporter does not currently support exporting manifest lists"
    );
    assert_eq!(
        export("oci", &result).await.to_string(),
        "unable to export multiple refs, missing platforms mapping"
    );
    let unknown = Exporter::new("moby", &BTreeMap::new()).err().unwrap();
    assert!(unknown.to_string().contains("moby"));
}

fn two_platforms(f: &Fixture) -> BuildResult {
    let mut result = single(&f.top);
    result.refs = Refs::ByPlatform(BTreeMap::from([
        ("linux/amd64".to_owned(), Some(f.top.clone())),
        ("linux/arm64".to_owned(), Some(f.base.clone())),
    ]));
    let platforms = br#"{"Platforms":[{"ID":"linux/arm64","Platform":{"architecture":"arm64","os":"linux"}},{"ID":"linux/amd64","Platform":{"architecture":"amd64","os":"linux"}}]}"#;
    result.metadata.insert("refs.platforms".into(), platforms.to_vec());
    result.metadata.insert(
        "containerimage.config/linux/arm64".into(),
        br#"{"architecture":"arm64","os":"linux"}"#.to_vec(),
    );
    result
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn platforms_keep_the_frontends_order() {
    let f = fixture().await;
    let exported = run(&f, "oci", &[("annotation-index.k", "v")], &two_platforms(&f)).await;
    let files = untar(&exported.path);
    let top: Index = serde_json::from_slice(&files["index.json"]).unwrap();
    let index: Index = serde_json::from_slice(blob(&files, &top.manifests[0].digest)).unwrap();
    let ids: Vec<_> = index
        .manifests
        .iter()
        .map(|m| m.platform.as_ref().unwrap().id())
        .collect();
    assert_eq!(ids, ["linux/arm64", "linux/amd64"]);
    assert_eq!(index.annotations["k"], "v");
    let arm: Manifest = serde_json::from_slice(blob(&files, &index.manifests[0].digest)).unwrap();
    assert_eq!(arm.layers().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compression_and_clamped_times() {
    let f = fixture().await;
    let layers = async |pairs: &[(&str, &str)]| {
        let exported = run(&f, "oci", pairs, &single(&f.top)).await;
        let files = untar(&exported.path);
        let top: Index = serde_json::from_slice(&files["index.json"]).unwrap();
        let manifest: Manifest = serde_json::from_slice(blob(&files, &top.manifests[0].digest)).unwrap();
        let config = ImageConfig::parse(blob(&files, &manifest.config.digest)).unwrap();
        let first = blob(&files, &manifest.layers()[0].digest).to_vec();
        (
            manifest.layers()[0].media_type.clone(),
            config.diff_ids().unwrap(),
            first,
        )
    };
    let (kind, plain, bytes) = layers(&[("compression", "uncompressed")]).await;
    assert_eq!(kind, "application/vnd.oci.image.layer.v1.tar");
    assert_eq!(Digest::of(&bytes), plain[0].0);
    // an existing compression is kept unless another one is forced
    let (kind, _, _) = layers(&[("compression", "zstd")]).await;
    assert_eq!(kind, "application/vnd.oci.image.layer.v1.tar");
    let (kind, zstd, _) = layers(&[("compression", "zstd"), ("force-compression", "true")]).await;
    assert_eq!(kind, "application/vnd.oci.image.layer.v1.tar+zstd");
    assert_eq!(zstd, plain);
    let (_, clamped, bytes) = layers(&[
        ("compression", "uncompressed"),
        ("source-date-epoch", "1000"),
        ("rewrite-timestamp", "true"),
    ])
    .await;
    assert_ne!(clamped, plain);
    let mut archive = tar::Archive::new(bytes.as_slice());
    for entry in archive.entries().unwrap() {
        assert!(entry.unwrap().header().mtime().unwrap() <= 1000);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_into_a_directory() {
    let f = fixture().await;
    let local = run(&f, "local", &[], &single(&f.top)).await;
    assert_eq!(std::fs::read_to_string(local.path.join("etc/new")).unwrap(), "new\n");
    assert!(!local.path.join("etc/conf").exists());
    let (a, b) = (local.path.join("bin/alias"), local.path.join("bin/tool"));
    assert_eq!(
        std::fs::metadata(&a).unwrap().ino(),
        std::fs::metadata(&b).unwrap().ino()
    );
    assert_eq!(std::fs::metadata(&a).unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(std::fs::metadata(&a).unwrap().mtime(), 1_700_000_000);
    assert_eq!(local.seen.ids(), ["copying files"]);
    assert!(local.exported.response.is_empty());

    let deleted = run(
        &f,
        "local",
        &[("mode", "delete"), ("source-date-epoch", "77")],
        &single(&f.top),
    )
    .await;
    assert!(!deleted.path.join("stale").exists());
    assert_eq!(std::fs::metadata(deleted.path.join("etc/new")).unwrap().mtime(), 77);

    let mut result = two_platforms(&f);
    result
        .attestations
        .insert("linux/amd64".into(), vec![provenance(false)]);
    result.attestations.insert("linux/arm64".into(), vec![provenance(true)]);
    let split = run(&f, "local", &[("attestation-prefix", "build-")], &result).await;
    assert!(split.path.join("linux_arm64/etc/conf").exists());
    assert!(!split.path.join("linux_amd64/etc/conf").exists());
    assert!(
        !split.path.join("linux_arm64/build-provenance.json").exists(),
        "inline-only ones are dropped"
    );
    let file = split.path.join("linux_amd64/build-provenance.json");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(
        text.starts_with("{\n  \"_type\": \"https://in-toto.io/Statement/v1\",\n"),
        "{text}"
    );
    let statement: serde_json::Value = serde_json::from_str(&text).unwrap();
    let names: Vec<_> = statement["subject"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["bin/alias", "bin/tool", "etc/new"]);
    assert_eq!(statement["subject"][2]["digest"]["sha256"], Digest::of("new\n").hex());
    let mut ids = split.seen.ids();
    ids.sort();
    assert_eq!(ids, ["copying files linux/amd64", "copying files linux/arm64"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_paths_of_two_platforms_need_a_split() {
    let f = fixture().await;
    let dir = tempfile::tempdir().unwrap();
    let target = ExportTarget::Directory {
        path: dir.path().join("out"),
        delete: false,
    };
    let session = connect(BTreeMap::from([(0, target)]), BTreeMap::new()).await;
    let seen = Arc::new(Seen::default());
    let exporter = Exporter::new("local", &attrs(&[("platform-split", "false")])).unwrap();
    let error = exporter
        .export(&two_platforms(&f), &request(&f, Some(session), &seen))
        .await
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        "cannot overwrite bin/alias from linux/arm64 with linux/amd64 when split option is disabled"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_as_tar() {
    let f = fixture().await;
    let made = run(&f, "tar", &[], &single(&f.top)).await;
    let mut archive = tar::Archive::new(std::fs::File::open(&made.path).unwrap());
    let mut seen = Vec::new();
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let link = entry.link_name().unwrap().map(|l| l.to_str().unwrap().to_owned());
        seen.push((
            entry.path().unwrap().to_str().unwrap().to_owned(),
            entry.header().entry_type().as_byte(),
            link,
        ));
    }
    let want = [
        ("bin/", b'5', None),
        ("bin/alias", b'0', None),
        ("bin/tool", b'1', Some("bin/alias")),
        ("etc/", b'5', None),
        ("etc/new", b'0', None),
    ];
    assert_eq!(seen, want.map(|(p, t, l)| (p.to_owned(), t, l.map(str::to_owned))));
    assert_eq!(made.seen.ids(), ["sending tarball"]);
    let split = run(&f, "tar", &[("platform-split", "false")], &two_platforms(&f)).await;
    assert!(untar(&split.path).contains_key("linux_arm64/etc/conf"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blobs_into_the_clients_store() {
    let f = fixture().await;
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    let stores = BTreeMap::from([("export".to_owned(), layout.clone())]);
    let session = connect(BTreeMap::new(), stores).await;
    let seen = Arc::new(Seen::default());
    let exporter = Exporter::new("oci", &attrs(&[("tar", "false")])).unwrap();
    for _ in 0..2 {
        let exported = exporter
            .export(&single(&f.top), &request(&f, Some(session.clone()), &seen))
            .await
            .unwrap();
        let digest: Digest = exported.response["containerimage.digest"].parse().unwrap();
        let read = |d: Digest| std::fs::read(layout.join("blobs/sha256").join(d.hex())).unwrap();
        let manifest: Manifest = serde_json::from_slice(&read(digest)).unwrap();
        for d in manifest.layers().iter().chain([&manifest.config]) {
            assert_eq!(Digest::of(read(d.digest)), d.digest);
        }
    }
}

/// Debian's docker-registry, killed on drop.
struct Server {
    address: String,
    child: Child,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let text = format!(
            "version: 0.1\nlog:\n  accesslog:\n    disabled: true\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
            dir.path().join("data").display()
        );
        std::fs::write(dir.path().join("config.yml"), text).unwrap();
        let child = Command::new("docker-registry")
            .args(["serve", dir.path().join("config.yml").to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry did not start");
            std::thread::yield_now();
        }
        Self {
            address,
            child,
            _dir: dir,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_are_pushed_after_the_export() {
    let f = fixture().await;
    let server = Server::start();
    let (first, second) = (
        format!("{}/a/app:1", server.address),
        format!("{}/b/app", server.address),
    );
    let mut result = single(&f.top);
    result.attestations.insert("linux/amd64".into(), vec![provenance(true)]);
    let seen = Arc::new(Seen::default());
    let exporter = Exporter::new(
        "image",
        &attrs(&[("push", "true"), ("name", &format!("{first},{second}"))]),
    )
    .unwrap();
    let exported = exporter.export(&result, &request(&f, None, &seen)).await.unwrap();
    assert!(exported.is_pending());
    assert!(!seen.ids().contains(&"pushing layers".to_owned()));
    let client = anonymous();
    assert!(
        client.resolve(&ImageRef::parse(&first).unwrap()).await.is_err(),
        "nothing is pushed before"
    );
    exported.finalize().await.unwrap();
    let digest = &exported.response["containerimage.digest"];
    assert_eq!(exported.response["image.name"], format!("{first},{second}"));
    for name in [&first, &second] {
        let name = ImageRef::parse(name).unwrap();
        let resolved = client.resolve(&name).await.unwrap();
        assert_eq!(resolved.descriptor.digest.to_string(), *digest);
        let index = client
            .fetch_manifest(&name, resolved.descriptor.digest)
            .await
            .unwrap()
            .bytes
            .unwrap();
        let index: Index = serde_json::from_slice(&index).unwrap();
        assert_eq!(index.manifests.len(), 2, "image and provenance");
        for m in &index.manifests {
            let manifest = client.fetch_manifest(&name, m.digest).await.unwrap().bytes.unwrap();
            let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
            for d in manifest.layers().iter().chain([&manifest.config]) {
                client.fetch_small_blob(&name, d.digest, 1 << 20).await.unwrap();
            }
        }
    }
    let ids = seen.ids();
    assert!(
        ids.contains(&format!("pushing manifest for {first}@{digest}")),
        "{ids:?}"
    );
    assert!(
        ids.contains(&format!("pushing manifest for {second}:latest@{digest}")),
        "{ids:?}"
    );

    // without a tag, by digest alone
    let bare = format!("{}/c/app", server.address);
    let exporter = Exporter::new(
        "image",
        &attrs(&[("push", ""), ("push-by-digest", "true"), ("name", &bare)]),
    )
    .unwrap();
    let exported = exporter
        .export(&single(&f.top), &request(&f, None, &seen))
        .await
        .unwrap();
    exported.finalize().await.unwrap();
    let digest: Digest = exported.response["containerimage.digest"].parse().unwrap();
    client
        .resolve(&ImageRef::parse(&bare).unwrap().with_digest(digest))
        .await
        .unwrap();
    assert!(client.resolve(&ImageRef::parse(&bare).unwrap()).await.is_err());
    let exporter = Exporter::new(
        "image",
        &attrs(&[("push", ""), ("push-by-digest", ""), ("name", &first)]),
    )
    .unwrap();
    let error = exporter
        .export(&single(&f.top), &request(&f, None, &seen))
        .await
        .err()
        .unwrap();
    assert_eq!(error.to_string(), format!("can't push tagged ref {first} by digest"));
}
