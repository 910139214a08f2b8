//! What a build exported, read back from the archive: documents, layers, and the file tree they make together.

use crate::daemon::contains;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What an entry of a layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to the given target.
    Symlink(String),
    /// A further name of the file at the given path.
    Hardlink(String),
    /// A device, pipe or anything else, by its type in the archive.
    Other(u8),
}

/// One entry of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its path without a leading slash.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Modification time in seconds.
    pub mtime: u64,
    /// Size of a file.
    pub size: u64,
    /// The bytes of a file.
    pub bytes: Vec<u8>,
    /// Extended attributes by name.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

impl Entry {
    /// The content as text.
    ///
    /// # Panics
    /// If it is no UTF-8.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.bytes).expect("a text file")
    }
}

/// One layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Digest of the bytes as stored.
    pub digest: String,
    /// Media type.
    pub media_type: String,
    /// Size as stored.
    pub size: u64,
    /// Digest of the uncompressed archive.
    pub diff_id: String,
    /// The entries in their order.
    pub entries: Vec<Entry>,
}

impl Layer {
    /// Paths of all entries.
    pub fn paths(&self) -> Vec<&str> {
        self.entries.iter().map(|entry| entry.path.as_str()).collect()
    }
}

/// An exported image: the one whose platform is not "unknown", and what is attached to it.
#[derive(Clone, Debug)]
pub struct Image {
    blobs: BTreeMap<String, Vec<u8>>,
    /// `index.json`.
    pub index: Value,
    /// Digest of the image's manifest.
    pub digest: String,
    /// The manifest.
    pub manifest: Value,
    /// The configuration.
    pub config: Value,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
    /// The file tree that the layers make together.
    pub tree: BTreeMap<String, Entry>,
    /// Statements attached to the image, by predicate type.
    pub attestations: BTreeMap<String, Value>,
}

impl Image {
    /// Reads an OCI archive (or a `docker` archive of BuildKit's, which has the same index inside).
    ///
    /// # Panics
    /// If anything in it is not as the specification says: a wrong digest or size, a missing blob, a wrong diff id.
    pub fn open(archive: &Path) -> Image {
        let mut blobs = BTreeMap::new();
        let mut index = None;
        let file =
            std::fs::File::open(archive).unwrap_or_else(|error| panic!("opening {}: {error}", archive.display()));
        for entry in tar::Archive::new(std::io::BufReader::new(file))
            .entries()
            .expect("an archive")
        {
            let mut entry = entry.expect("an entry");
            let path = entry.path().expect("a path").display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("the bytes of an entry");
            if let Some(hex) = path.strip_prefix("blobs/sha256/").filter(|hex| !hex.is_empty()) {
                assert_eq!(
                    hex::encode(Sha256::digest(&bytes)),
                    hex,
                    "a blob has another digest than its name"
                );
                blobs.insert(format!("sha256:{hex}"), bytes);
            } else if path == "index.json" {
                index = Some(serde_json::from_slice(&bytes).expect("index.json is JSON"));
            }
        }
        Image::assemble(blobs, index.expect("the archive has an index.json"))
    }

    /// Reads an OCI layout in a directory.
    ///
    /// # Panics
    /// As [`Image::open`].
    pub fn open_layout(dir: &Path) -> Image {
        let mut blobs = BTreeMap::new();
        for entry in std::fs::read_dir(dir.join("blobs/sha256"))
            .expect("a layout has blobs")
            .flatten()
        {
            let bytes = std::fs::read(entry.path()).expect("a blob");
            blobs.insert(format!("sha256:{}", entry.file_name().to_string_lossy()), bytes);
        }
        let index = std::fs::read(dir.join("index.json")).expect("a layout has an index");
        Image::assemble(blobs, serde_json::from_slice(&index).expect("index.json is JSON"))
    }

    /// Reads an image from a registry.
    ///
    /// # Panics
    /// As [`Image::open`], or if the registry does not have it.
    pub fn pull(registry: &crate::Registry, repository: &str, reference: &str) -> Image {
        let mut blobs = BTreeMap::new();
        let first = registry
            .get(&format!("/v2/{repository}/manifests/{reference}"))
            .unwrap_or_else(|| {
                panic!(
                    "the registry has no {repository}:{reference}; its log:\n{}",
                    registry.log()
                )
            });
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&first)));
        let document: Value = serde_json::from_slice(&first).expect("a JSON manifest");
        let index = serde_json::json!({"manifests": [{
            "mediaType": document["mediaType"], "digest": digest, "size": first.len(),
        }]});
        let mut todo = vec![(digest, first)];
        while let Some((digest, bytes)) = todo.pop() {
            let document: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
            for child in document["manifests"].as_array().into_iter().flatten() {
                let digest = child["digest"].as_str().expect("a digest").to_owned();
                let bytes = registry
                    .get(&format!("/v2/{repository}/manifests/{digest}"))
                    .expect("a manifest the index names");
                todo.push((digest, bytes));
            }
            if document["config"].is_object() {
                for child in document["layers"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .chain([&document["config"]])
                {
                    let digest = child["digest"].as_str().expect("a digest").to_owned();
                    let bytes = registry
                        .get(&format!("/v2/{repository}/blobs/{digest}"))
                        .expect("a blob the manifest names");
                    blobs.insert(digest, bytes);
                }
            }
            blobs.insert(digest, bytes);
        }
        Image::assemble(blobs, index)
    }

    fn assemble(blobs: BTreeMap<String, Vec<u8>>, index: Value) -> Image {
        let json = |digest: &str| -> Value { serde_json::from_slice(blob(&blobs, digest)).expect("a JSON document") };
        let mut images = Vec::new();
        let mut attached = Vec::new();
        let mut open: Vec<Value> = array(&index["manifests"]).to_vec();
        while let Some(descriptor) = open.pop() {
            let digest = text(&descriptor["digest"]);
            assert_eq!(
                descriptor["size"].as_u64(),
                Some(blob(&blobs, &digest).len() as u64),
                "the size of {digest}"
            );
            let document = json(&digest);
            if document["manifests"].is_array() {
                open.extend(array(&document["manifests"]).iter().cloned());
            } else if descriptor["platform"]["os"] == "unknown" {
                attached.push(document);
            } else {
                images.push((digest, document));
            }
        }
        // The order of the index is the order of the platforms; the last one opened is the first one listed.
        let (digest, manifest) = images.pop().expect("an image in the index");
        let config = json(&text(&manifest["config"]["digest"]));
        let diff_ids = array(&config["rootfs"]["diff_ids"]);
        assert_eq!(
            diff_ids.len(),
            array(&manifest["layers"]).len(),
            "as many diff ids as layers"
        );
        let history = array(&config["history"])
            .iter()
            .filter(|step| step["empty_layer"] != true)
            .count();
        assert_eq!(
            history,
            diff_ids.len(),
            "as many steps with a layer in the history as layers: {config:#}"
        );
        let mut layers = Vec::new();
        for (descriptor, diff_id) in array(&manifest["layers"]).iter().zip(diff_ids) {
            let layer = read_layer(&blobs, descriptor);
            assert_eq!(
                diff_id,
                &Value::String(layer.diff_id.clone()),
                "the diff id of {}",
                layer.digest
            );
            layers.push(layer);
        }
        let tree = merge(&layers);
        let mut attestations = BTreeMap::new();
        for document in attached {
            for layer in array(&document["layers"]) {
                let statement = json(&text(&layer["digest"]));
                attestations.insert(text(&statement["predicateType"]), statement);
            }
        }
        Image {
            index,
            digest,
            manifest,
            config,
            layers,
            tree,
            attestations,
            blobs,
        }
    }

    /// A file of the tree.
    ///
    /// # Panics
    /// If there is nothing at the path.
    #[track_caller]
    pub fn file(&self, path: &str) -> &Entry {
        let entry = self
            .tree
            .get(path)
            .unwrap_or_else(|| panic!("the image has no {path}; it has {:?}", self.tree.keys()));
        match &entry.kind {
            Kind::Hardlink(target) => self.file(target),
            _ => entry,
        }
    }

    /// Whether there is anything at a path.
    pub fn has(&self, path: &str) -> bool {
        self.tree.contains_key(path)
    }

    /// Paths of all files and links (not directories) at or beneath `dir`, which has no trailing slash; empty means all.
    pub fn files_in(&self, dir: &str) -> Vec<&str> {
        let beneath = |path: &str| {
            dir.is_empty()
                || path
                    .strip_prefix(dir)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let files = self
            .tree
            .values()
            .filter(|entry| entry.kind != Kind::Directory && beneath(&entry.path));
        files.map(|entry| entry.path.as_str()).collect()
    }

    /// Bytes of all layers as stored.
    pub fn size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }

    /// Bytes of all files of the tree.
    pub fn tree_size(&self) -> u64 {
        self.tree.values().map(|entry| entry.size).sum()
    }

    /// A member of the configuration's `config` object.
    pub fn runtime(&self, member: &str) -> &Value {
        &self.config["config"][member]
    }

    /// The environment as pairs in their order.
    pub fn env(&self) -> Vec<&str> {
        self.runtime("Env")
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect()
    }

    /// Digests of the layers.
    pub fn layer_digests(&self) -> Vec<&str> {
        self.layers.iter().map(|layer| layer.digest.as_str()).collect()
    }

    /// Whether any document or any uncompressed file of any layer contains `needle`.
    pub fn mentions(&self, needle: &[u8]) -> bool {
        self.blobs.values().any(|bytes| contains(bytes, needle))
            || self
                .layers
                .iter()
                .flat_map(|layer| &layer.entries)
                .any(|entry| contains(&entry.bytes, needle))
    }

    /// The provenance predicate, if one is attached.
    pub fn provenance(&self) -> Option<&Value> {
        self.attestations
            .iter()
            .find(|(kind, _)| kind.contains("slsa.dev/provenance"))
            .map(|(_, statement)| &statement["predicate"])
    }

    /// Writes the tree to a directory, so that a program of it can be run. Needs root for owners.
    pub fn unpack(&self, dir: &Path) {
        for entry in self.tree.values() {
            let path = dir.join(&entry.path);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).expect("parent directories");
            }
            match &entry.kind {
                Kind::Directory => std::fs::create_dir_all(&path).expect("a directory"),
                Kind::File => std::fs::write(&path, &entry.bytes).expect("a file"),
                Kind::Symlink(target) => std::os::unix::fs::symlink(target, &path).expect("a symbolic link"),
                Kind::Hardlink(target) => std::fs::write(&path, &self.file(target).bytes).expect("a file"),
                Kind::Other(_) => continue,
            }
            if !matches!(entry.kind, Kind::Symlink(_)) {
                let mode = match &entry.kind {
                    Kind::Hardlink(target) => self.file(target).mode,
                    _ => entry.mode,
                };
                let owner = (
                    u32::try_from(entry.uid).expect("a uid"),
                    u32::try_from(entry.gid).expect("a gid"),
                );
                std::os::unix::fs::chown(&path, Some(owner.0), Some(owner.1)).expect("setting the owner");
                let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
                std::fs::set_permissions(&path, permissions).expect("setting a mode");
            }
        }
    }

    /// Runs a program of the image in its tree, as root, and returns what it prints.
    ///
    /// # Panics
    /// If it fails.
    pub fn run(&self, args: &[&str]) -> String {
        let dir = tempfile::Builder::new()
            .prefix("kiln-run-")
            .tempdir()
            .expect("a directory to run in");
        self.unpack(dir.path());
        for name in ["proc", "dev"] {
            std::fs::create_dir_all(dir.path().join(name)).expect("a directory for mounts");
        }
        for (name, minor) in [("null", "3"), ("zero", "5"), ("urandom", "9")] {
            let path = dir.path().join("dev").join(name);
            if !path.exists() {
                let made = std::process::Command::new("mknod")
                    .args(["-m", "666"])
                    .arg(path)
                    .args(["c", "1", minor])
                    .status();
                assert!(made.expect("mknod runs").success());
            }
        }
        for (name, number) in [("stdin", "0"), ("stdout", "1"), ("stderr", "2")] {
            let path = dir.path().join("dev").join(name);
            if !path.is_symlink() {
                std::os::unix::fs::symlink(format!("/proc/self/fd/{number}"), path).expect("a symbolic link");
            }
        }
        let workdir = self
            .runtime("WorkingDir")
            .as_str()
            .filter(|dir| !dir.is_empty())
            .unwrap_or("/")
            .to_owned();
        let mut command = std::process::Command::new("timeout");
        command.args([
            "60",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]);
        command
            .arg(format!("--root={}", dir.path().display()))
            .arg(format!("--wd={workdir}"))
            .arg("--")
            .args(args);
        command.env_clear();
        for pair in self.env() {
            if let Some((key, value)) = pair.split_once('=') {
                command.env(key, value);
            }
        }
        let result = command.output().expect("unshare runs");
        let said = String::from_utf8_lossy(&result.stdout).into_owned();
        assert!(
            result.status.success(),
            "{args:?} failed in the image: {said}{}",
            String::from_utf8_lossy(&result.stderr)
        );
        said
    }
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("a string where {value} is"))
        .to_owned()
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn blob<'a>(blobs: &'a BTreeMap<String, Vec<u8>>, digest: &str) -> &'a [u8] {
    blobs
        .get(digest)
        .unwrap_or_else(|| panic!("the archive has no blob {digest}; it has {:?}", blobs.keys()))
}

fn read_layer(blobs: &BTreeMap<String, Vec<u8>>, descriptor: &Value) -> Layer {
    let digest = text(&descriptor["digest"]);
    let media_type = text(&descriptor["mediaType"]);
    let stored = blob(blobs, &digest);
    assert_eq!(
        descriptor["size"].as_u64(),
        Some(stored.len() as u64),
        "the size of layer {digest}"
    );
    let mut bytes = Vec::new();
    if stored.starts_with(&[0x1f, 0x8b]) {
        flate2::read::MultiGzDecoder::new(stored)
            .read_to_end(&mut bytes)
            .expect("a gzip layer");
    } else if stored.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        zstd::Decoder::new(stored)
            .expect("a zstd layer")
            .read_to_end(&mut bytes)
            .expect("a zstd layer");
    } else {
        bytes.extend_from_slice(stored);
    }
    let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
    let mut entries = Vec::new();
    for entry in tar::Archive::new(bytes.as_slice())
        .entries()
        .expect("a layer is an archive")
    {
        entries.push(read_entry(&mut entry.expect("an entry")));
    }
    Layer {
        digest,
        media_type,
        size: stored.len() as u64,
        diff_id,
        entries,
    }
}

fn read_entry(entry: &mut tar::Entry<'_, &[u8]>) -> Entry {
    let mut xattrs = BTreeMap::new();
    if let Ok(Some(extensions)) = entry.pax_extensions() {
        for extension in extensions.flatten() {
            if let Some(name) = extension.key().ok().and_then(|key| key.strip_prefix("SCHILY.xattr.")) {
                xattrs.insert(name.to_owned(), extension.value_bytes().to_vec());
            }
        }
    }
    let path = entry.path().expect("a path").display().to_string();
    let path = path.trim_start_matches("./").trim_matches('/').to_owned();
    let link = || -> String {
        let link: PathBuf = entry
            .link_name()
            .expect("a link name")
            .expect("a link has a target")
            .into_owned();
        link.display().to_string()
    };
    let kind = match entry.header().entry_type() {
        tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => Kind::File,
        tar::EntryType::Directory => Kind::Directory,
        tar::EntryType::Symlink => Kind::Symlink(link()),
        tar::EntryType::Link => Kind::Hardlink(link().trim_start_matches("./").trim_matches('/').to_owned()),
        other => Kind::Other(other.as_byte()),
    };
    let (mode, uid, gid, mtime) = {
        let header = entry.header();
        (
            header.mode().expect("a mode") & 0o7777,
            header.uid().expect("a uid"),
            header.gid().expect("a gid"),
            header.mtime().expect("a time"),
        )
    };
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).expect("the bytes of an entry");
    Entry {
        path,
        kind,
        mode,
        uid,
        gid,
        mtime,
        size: bytes.len() as u64,
        bytes,
        xattrs,
    }
}

/// Lays the layers over each other: whiteouts remove, an opaque mark empties a directory, a later entry replaces.
fn merge(layers: &[Layer]) -> BTreeMap<String, Entry> {
    let mut tree: BTreeMap<String, Entry> = BTreeMap::new();
    for layer in layers {
        for entry in &layer.entries {
            let (dir, name) = entry.path.rsplit_once('/').unwrap_or(("", &entry.path));
            let hidden = if name == ".wh..wh..opq" {
                Some((dir.to_owned(), false))
            } else {
                name.strip_prefix(".wh.").map(|name| {
                    (
                        if dir.is_empty() {
                            name.to_owned()
                        } else {
                            format!("{dir}/{name}")
                        },
                        true,
                    )
                })
            };
            if let Some((path, itself)) = hidden {
                let inside = format!("{path}/");
                tree.retain(|key, _| {
                    !(key.starts_with(&inside) || (itself && *key == path) || (path.is_empty() && !itself))
                });
            }
        }
        for entry in &layer.entries {
            let name = entry.path.rsplit('/').next().unwrap_or_default();
            if name.starts_with(".wh.") || entry.path.is_empty() {
                continue;
            }
            if entry.kind != Kind::Directory {
                let inside = format!("{}/", entry.path);
                tree.retain(|key, _| !key.starts_with(&inside));
            }
            tree.insert(entry.path.clone(), entry.clone());
        }
    }
    tree
}
