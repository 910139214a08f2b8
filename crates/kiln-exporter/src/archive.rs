//! OCI layouts: as one tar for the client (`oci`, `docker`), or blob by blob into its content store (`tar=false`).

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use bytes::Bytes;
use kiln_oci::{Descriptor, Digest, ImageRef, Index, Manifest, go_json, media_type};
use kiln_session::content::ClientContent;
use kiln_store::layer::write::{Header, TarWriter};
use serde::Serialize;

use crate::error::ExportError;
use crate::image::{Document, DocumentKind, Image};

/// Bytes that are copied at once.
const COPY: usize = 256 << 10;

enum Content<'a> {
    Directory,
    Bytes(Bytes),
    Blob(&'a Descriptor),
}

/// Opens a layer's blob, which must be in the content store.
pub(crate) type Open<'a> = &'a mut dyn FnMut(&Descriptor) -> io::Result<Box<dyn Read>>;

/// Writes the layout to `out`: entries in byte order of their names, all times 1970, so that the same image gives the
/// same bytes. `root` is the image's root as `index.json` shows it, `names` are full references.
pub(crate) fn write(
    image: &Image,
    root: &Descriptor,
    names: &[ImageRef],
    docker: bool,
    open: Open<'_>,
    out: impl Write,
) -> Result<(), ExportError> {
    let json = |e| ExportError::Json {
        what: "failed to write image layout".to_owned(),
        source: e,
    };
    let mut entries: BTreeMap<String, (u32, Content<'_>)> = BTreeMap::new();
    entries.insert("blobs/".to_owned(), (0o755, Content::Directory));
    entries.insert("blobs/sha256/".to_owned(), (0o755, Content::Directory));
    for layer in &image.layers {
        entries.insert(blob_path(layer.digest), (0o444, Content::Blob(layer)));
    }
    for document in &image.documents {
        let name = blob_path(document.descriptor.digest);
        entries.insert(name, (0o444, Content::Bytes(document.bytes.clone())));
    }
    let layout = Bytes::from_static(br#"{"imageLayoutVersion":"1.0.0"}"#);
    entries.insert("oci-layout".to_owned(), (0o444, Content::Bytes(layout)));
    let index = go_json::to_vec(&layout_index(root, names)).map_err(json)?;
    entries.insert("index.json".to_owned(), (0o644, Content::Bytes(index.into())));
    if docker && !media_type::is_index(&root.media_type) {
        let manifest = docker_manifest(image, names)?;
        let bytes = go_json::to_vec(&manifest).map_err(json)?;
        entries.insert("manifest.json".to_owned(), (0o644, Content::Bytes(bytes.into())));
    }
    let mut tar = TarWriter::new(out);
    for (name, (mode, content)) in &entries {
        write_entry(&mut tar, name, *mode, content, open)
            .map_err(ExportError::io(format!("failed to write {name}")))?;
    }
    let mut out = tar.finish().map_err(ExportError::io("failed to end the archive"))?;
    out.flush().map_err(ExportError::io("failed to end the archive"))
}

fn write_entry(
    tar: &mut TarWriter<impl Write>,
    name: &str,
    mode: u32,
    content: &Content<'_>,
    open: Open<'_>,
) -> io::Result<()> {
    let (typeflag, size) = match content {
        Content::Directory => (b'5', 0),
        Content::Bytes(bytes) => (b'0', bytes.len() as u64),
        Content::Blob(blob) => (b'0', blob.size),
    };
    tar.header(&Header {
        name: name.as_bytes(),
        typeflag,
        mode,
        size,
        ..Header::default()
    })?;
    match content {
        Content::Directory => Ok(()),
        Content::Bytes(bytes) => tar.data(bytes),
        Content::Blob(blob) => {
            let mut reader = open(blob)?;
            let mut buf = vec![0; COPY];
            loop {
                match reader.read(&mut buf)? {
                    0 => return Ok(()),
                    n => tar.data(buf.get(..n).unwrap_or_default())?,
                }
            }
        }
    }
}

fn blob_path(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// `index.json`: one descriptor for each name, or one without.
fn layout_index(root: &Descriptor, names: &[ImageRef]) -> Index {
    let named = names.iter().map(|name| {
        let mut d = root.clone();
        d.annotations
            .insert("io.containerd.image.name".to_owned(), name.to_string());
        d.annotations
            .insert("org.opencontainers.image.ref.name".to_owned(), name.object());
        d
    });
    let mut manifests: Vec<Descriptor> = named.collect();
    if manifests.is_empty() {
        manifests.push(root.clone());
    }
    Index::new(true, manifests)
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

fn docker_manifest(image: &Image, names: &[ImageRef]) -> Result<[DockerManifest; 1], ExportError> {
    let document = image
        .document(image.root.digest)
        .ok_or_else(|| ExportError::Result("no manifest".to_owned()))?;
    let manifest: Manifest =
        serde_json::from_slice(&document.bytes).map_err(ExportError::json("failed to read manifest"))?;
    let layers: Vec<String> = manifest.layers().iter().map(|l| blob_path(l.digest)).collect();
    let tags: Vec<String> = names.iter().map(ImageRef::familiar).collect();
    Ok([DockerManifest {
        config: blob_path(manifest.config.digest),
        repo_tags: (!tags.is_empty()).then_some(tags),
        layers: (!layers.is_empty()).then_some(layers),
    }])
}

/// Writes everything into the client's content store that it lacks, children before parents.
pub(crate) async fn send_blobs(
    image: &Image,
    store: &ClientContent,
    source: &dyn kiln_registry::BlobSource,
) -> Result<(), ExportError> {
    use futures::StreamExt as _;
    for layer in &image.layers {
        let digest = layer.digest.to_string();
        if store.info(&digest).await?.is_some() {
            continue;
        }
        let Some(mut writer) = store.write(&reference(&digest), layer.size, &digest).await? else {
            continue;
        };
        let failed = || ExportError::io(format!("failed to read blob {digest}"));
        let mut stream = source.open(layer, 0).await.map_err(failed())?;
        while let Some(bytes) = stream.next().await {
            writer.write(bytes.map_err(failed())?).await?;
        }
        writer.commit().await?;
    }
    for Document { descriptor, bytes, .. } in &image.documents {
        let digest = descriptor.digest.to_string();
        if store.info(&digest).await?.is_some() {
            continue;
        }
        let Some(mut writer) = store.write(&reference(&digest), descriptor.size, &digest).await? else {
            continue;
        };
        writer.write(bytes.clone()).await?;
        writer.commit().await?;
    }
    Ok(())
}

/// The name of an upload; a new one each time, because what an older one left behind is unknown.
fn reference(digest: &str) -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos());
    format!("{digest}-{now}")
}

/// How a document's status reads, for those that are shown.
pub(crate) fn status_name(document: &Document) -> Option<String> {
    let digest = document.descriptor.digest;
    Some(match document.kind {
        DocumentKind::Config => format!("exporting config {digest}"),
        DocumentKind::Manifest => format!("exporting manifest {digest}"),
        DocumentKind::AttestationManifest => format!("exporting attestation manifest {digest}"),
        DocumentKind::Index => format!("exporting manifest list {digest}"),
        DocumentKind::Attestation => return None,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::annotations::Annotations;
    use crate::image::{Form, ImageLayer, PlatformImage, assemble};
    use kiln_oci::{DiffId, LayerNote, Platform};

    pub(crate) fn sample(index: bool) -> (Image, Vec<Vec<u8>>) {
        let blobs = vec![b"layer one".to_vec(), vec![7; 700_000]];
        let layers = blobs.iter().map(|b| ImageLayer {
            blob: Descriptor::of(media_type::OCI_LAYER_GZIP, b),
            diff_id: DiffId(Digest::of([b.as_slice(), b"x"].concat())),
            note: LayerNote::default(),
        });
        let platform: Platform = "linux/amd64".parse().unwrap();
        let image = PlatformImage {
            id: platform.id(),
            platform,
            layers: layers.collect(),
            config: Some(br#"{"architecture":"amd64","os":"linux"}"#.to_vec()),
            base_config: None,
            epoch: None,
            inline_cache: None,
            claims: vec![],
        };
        let form = Form {
            oci: true,
            artifacts: true,
            keep_foreign: false,
            index,
            annotations: Annotations::default(),
            names: vec![],
        };
        (assemble(&[image], &form).unwrap(), blobs)
    }

    fn tar(index: bool, names: &[ImageRef], docker: bool) -> Vec<u8> {
        let (image, blobs) = sample(index);
        let mut out = Vec::new();
        let mut open = |d: &Descriptor| -> io::Result<Box<dyn Read>> {
            let blob = blobs.iter().find(|b| Digest::of(b) == d.digest).unwrap().clone();
            Ok(Box::new(io::Cursor::new(blob)))
        };
        write(&image, &image.root, names, docker, &mut open, &mut out).unwrap();
        out
    }

    #[test]
    fn the_layout_is_sorted_timeless_and_complete() {
        let names = [
            ImageRef::parse("alpine:3").unwrap(),
            ImageRef::parse("ghcr.io/a/b:c").unwrap(),
        ];
        let bytes = tar(false, &names, true);
        assert_eq!(bytes, tar(false, &names, true));
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut seen = Vec::new();
        let mut files = BTreeMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().to_str().unwrap().to_owned();
            assert_eq!((entry.header().mtime().unwrap(), entry.header().uid().unwrap()), (0, 0));
            seen.push((path.clone(), entry.header().mode().unwrap()));
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            if let Some(hex) = path.strip_prefix("blobs/sha256/").filter(|h| !h.is_empty()) {
                assert_eq!(Digest::of(&content).hex(), hex);
            }
            files.insert(path, content);
        }
        let mut sorted = seen.clone();
        sorted.sort();
        assert_eq!(seen, sorted);
        assert_eq!(seen[0], ("blobs/".to_owned(), 0o755));
        assert!(seen.contains(&("oci-layout".to_owned(), 0o444)) && seen.contains(&("index.json".to_owned(), 0o644)));
        assert_eq!(files["oci-layout"], br#"{"imageLayoutVersion":"1.0.0"}"#);
        let index: Index = serde_json::from_slice(&files["index.json"]).unwrap();
        let named: Vec<_> = index
            .manifests
            .iter()
            .map(|m| m.annotations["io.containerd.image.name"].as_str())
            .collect();
        assert_eq!(named, ["docker.io/library/alpine:3", "ghcr.io/a/b:c"]);
        assert_eq!(index.manifests[1].annotations["org.opencontainers.image.ref.name"], "c");
        let docker: serde_json::Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
        assert_eq!(docker[0]["RepoTags"], serde_json::json!(["alpine:3", "ghcr.io/a/b:c"]));
        assert_eq!(docker[0]["Layers"].as_array().unwrap().len(), 2);
        assert!(files.contains_key(docker[0]["Config"].as_str().unwrap()));
    }

    #[test]
    fn without_names_and_with_an_index() {
        let text = |bytes: &[u8], name: &str| -> Option<String> {
            let mut archive = tar::Archive::new(bytes);
            let mut entry = archive
                .entries()
                .unwrap()
                .map(Result::unwrap)
                .find(|e| e.path().unwrap().to_str() == Some(name))?;
            let mut out = String::new();
            entry.read_to_string(&mut out).unwrap();
            Some(out)
        };
        assert!(
            text(&tar(false, &[], true), "manifest.json")
                .unwrap()
                .contains(r#""RepoTags":null"#)
        );
        assert!(text(&tar(true, &[], true), "manifest.json").is_none());
        assert!(text(&tar(false, &[], false), "manifest.json").is_none());
        assert!(
            !text(&tar(false, &[], false), "index.json")
                .unwrap()
                .contains("annotations")
        );
    }
}
