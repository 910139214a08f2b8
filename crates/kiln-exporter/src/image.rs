//! From layers and configs to manifests and an index: pure, so that the same input gives the same digests.

use std::collections::BTreeMap;

use bytes::Bytes;
use kiln_oci::history::{self, LayerNote};
use kiln_oci::{
    Descriptor, DiffId, Digest, ImageConfig, ImageRef, Index, Manifest, Platform, Timestamp, media_type, purl,
};

use crate::annotations::Annotations;
use crate::attestation::{Claim, StatementSubject};
use crate::error::ExportError;
use crate::result::key;

/// A layer as it goes into a manifest.
#[derive(Clone, Debug)]
pub(crate) struct ImageLayer {
    /// As stored; internal annotations are removed here.
    pub(crate) blob: Descriptor,
    pub(crate) diff_id: DiffId,
    pub(crate) note: LayerNote,
}

/// Everything about one platform's image.
pub(crate) struct PlatformImage {
    pub(crate) id: String,
    pub(crate) platform: Platform,
    pub(crate) layers: Vec<ImageLayer>,
    pub(crate) config: Option<Vec<u8>>,
    pub(crate) base_config: Option<Vec<u8>>,
    pub(crate) epoch: Option<Timestamp>,
    pub(crate) inline_cache: Option<Vec<u8>>,
    pub(crate) claims: Vec<Claim>,
}

/// How the image is written.
pub(crate) struct Form {
    pub(crate) oci: bool,
    /// Attestation manifests as artifacts with a subject.
    pub(crate) artifacts: bool,
    pub(crate) keep_foreign: bool,
    /// An index, even for one platform.
    pub(crate) index: bool,
    pub(crate) annotations: Annotations,
    /// For subjects of attestations.
    pub(crate) names: Vec<ImageRef>,
}

/// What a written document is, for progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DocumentKind {
    Config,
    Manifest,
    AttestationManifest,
    Index,
    /// Statements and configs of attestations, which are not reported.
    Attestation,
}

/// A small blob that was made here.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    pub(crate) kind: DocumentKind,
    pub(crate) descriptor: Descriptor,
    pub(crate) bytes: Bytes,
}

/// A finished image: its root and everything below it.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// Manifest or index, with platform and annotations.
    pub(crate) root: Descriptor,
    /// The config, if the root is a manifest.
    pub(crate) config: Option<Digest>,
    /// Documents, children before parents, the root last.
    pub(crate) documents: Vec<Document>,
    /// Layers of all platforms in order, each digest once.
    pub(crate) layers: Vec<Descriptor>,
}

impl Image {
    /// The bytes of a document by digest.
    pub(crate) fn document(&self, digest: Digest) -> Option<&Document> {
        self.documents.iter().find(|d| d.descriptor.digest == digest)
    }
}

/// Annotations that are the daemon's own affair and appear in no image manifest.
fn is_internal(key: &str) -> bool {
    key == "containerd.io/uncompressed"
        || key == "buildkit/createdat"
        || key.starts_with("containerd.io/distribution.source.")
}

impl Form {
    fn layer(&self, layer: &ImageLayer) -> Descriptor {
        let mut d = layer.blob.clone();
        d.media_type = media_type::convert_layer(&d.media_type, self.oci, self.keep_foreign);
        if !media_type::is_foreign_layer(&d.media_type) {
            d.urls.clear();
        }
        d.annotations.retain(|k, _| self.oci && !is_internal(k));
        d.platform = None;
        d
    }

    fn config_type(&self) -> &'static str {
        if self.oci {
            media_type::OCI_CONFIG
        } else {
            media_type::DOCKER_CONFIG
        }
    }
}

/// The config of an image: what the frontend gave, with layers, history and creation time made to fit.
fn image_config(image: &PlatformImage) -> Result<Vec<u8>, ExportError> {
    let mut config = match &image.config {
        Some(bytes) if !bytes.is_empty() => ImageConfig::parse(bytes)?,
        _ => {
            let mut config = ImageConfig::empty(&Platform::host())?;
            config.remove("created");
            config
        }
    };
    // Both members must be there.
    config.platform()?;
    let diff_ids: Vec<DiffId> = image.layers.iter().map(|l| l.diff_id).collect();
    let notes: Vec<LayerNote> = image.layers.iter().map(|l| l.note.clone()).collect();
    let mut entries = history::normalize(config.history()?, &notes);
    if let Some(epoch) = image.epoch {
        let base = match &image.base_config {
            Some(bytes) if !bytes.is_empty() => ImageConfig::parse(bytes)?.history()?,
            _ => Vec::new(),
        };
        history::clamp(&mut entries, &base, epoch);
        if config.created()?.is_some_and(|t| t > epoch) {
            config.set_created(Some(epoch))?;
        }
    }
    config.set_layers(&diff_ids, &entries)?;
    if !config.has("created") {
        config.set_created(entries.iter().rev().find_map(|e| e.created))?;
    }
    if let Some(cache) = &image.inline_cache {
        use base64::Engine as _;
        config.set(
            key::INLINE_CACHE,
            &base64::engine::general_purpose::STANDARD.encode(cache),
        )?;
    }
    Ok(config.to_bytes())
}

/// Builds the whole image.
pub(crate) fn assemble(images: &[PlatformImage], form: &Form) -> Result<Image, ExportError> {
    check(images, form)?;
    let mut documents = Vec::new();
    let mut layers: Vec<Descriptor> = Vec::new();
    let mut manifests = Vec::new();
    let mut attestations = Vec::new();
    let mut last_config = None;
    for image in images {
        let config = image_config(image)?;
        let config_descriptor = Descriptor::of(form.config_type(), &config);
        last_config = Some(config_descriptor.digest);
        let own: Vec<Descriptor> = image.layers.iter().map(|l| form.layer(l)).collect();
        let mut manifest = Manifest::new(form.oci, config_descriptor.clone(), own.clone());
        manifest.annotations = form.annotations.for_manifest(&image.platform.id());
        let bytes = manifest
            .to_bytes()
            .map_err(ExportError::json("failed to marshal manifest"))?;
        let mut descriptor = Descriptor::of(manifest.media_type.clone(), &bytes);
        push(&mut documents, DocumentKind::Config, config_descriptor, config);
        push(&mut documents, DocumentKind::Manifest, descriptor.clone(), bytes);
        for layer in own {
            if !layers.iter().any(|l| l.digest == layer.digest) {
                layers.push(layer);
            }
        }
        descriptor.annotations = form.annotations.for_manifest_descriptor(&image.platform.id());
        descriptor.platform = Some(image.platform.clone());
        if form.index && !image.claims.is_empty() {
            attestations.push(attestation_manifest(image, form, &descriptor, &mut documents)?);
        }
        manifests.push(descriptor);
    }
    if !form.index {
        let root = manifests
            .pop()
            .ok_or_else(|| ExportError::Result("nothing to export".to_owned()))?;
        return Ok(Image {
            root,
            config: last_config,
            documents,
            layers,
        });
    }
    manifests.append(&mut attestations);
    let mut index = Index::new(form.oci, manifests);
    index.annotations.clone_from(&form.annotations.index);
    let bytes = index.to_bytes().map_err(ExportError::json("failed to marshal index"))?;
    let mut root = Descriptor::of(index.media_type, &bytes);
    push(&mut documents, DocumentKind::Index, root.clone(), bytes);
    root.annotations.clone_from(&form.annotations.index_descriptor);
    Ok(Image {
        root,
        config: None,
        documents,
        layers,
    })
}

fn check(images: &[PlatformImage], form: &Form) -> Result<(), ExportError> {
    let bad = |text: String| Err(ExportError::Invalid(text));
    if let Some(p) = form
        .annotations
        .platforms()
        .find(|p| !images.iter().any(|i| i.platform.id() == *p || i.id == *p))
    {
        return bad(format!("invalid annotation: no platform {p} found in source"));
    }
    if !form.oci && form.annotations.need_oci() {
        return bad("cannot export annotations with \"oci-mediatypes=false\"".to_owned());
    }
    let on_index = !form.annotations.index.is_empty() || !form.annotations.index_descriptor.is_empty();
    if !form.index && on_index {
        return bad("index annotations not supported for single platform export".to_owned());
    }
    if form.index && !form.oci && images.iter().any(|i| !i.claims.is_empty()) {
        return bad("cannot export attestations with \"oci-mediatypes=false\"".to_owned());
    }
    Ok(())
}

fn push(documents: &mut Vec<Document>, kind: DocumentKind, descriptor: Descriptor, bytes: Vec<u8>) {
    if !documents.iter().any(|d| d.descriptor.digest == descriptor.digest) {
        documents.push(Document {
            kind,
            descriptor: descriptor.bare(),
            bytes: bytes.into(),
        });
    }
}

/// The manifest that carries the statements about `target`.
fn attestation_manifest(
    image: &PlatformImage,
    form: &Form,
    target: &Descriptor,
    documents: &mut Vec<Document>,
) -> Result<Descriptor, ExportError> {
    let own: Vec<StatementSubject> = form
        .names
        .iter()
        .map(|n| StatementSubject::sha256(purl::image("docker", n, Some(&image.platform)), target.digest))
        .collect();
    let mut layers = Vec::new();
    for claim in &image.claims {
        let statement = claim.statement(&own)?;
        let mut descriptor = Descriptor::of(media_type::IN_TOTO, &statement);
        push(documents, DocumentKind::Attestation, descriptor.clone(), statement);
        descriptor
            .annotations
            .insert("in-toto.io/predicate-type".to_owned(), claim.predicate_type.clone());
        layers.push(descriptor);
    }
    let mut manifest = if form.artifacts {
        let mut config = Descriptor::of(media_type::OCI_EMPTY, b"{}");
        push(documents, DocumentKind::Attestation, config.clone(), b"{}".to_vec());
        config.data = Some("e30=".to_owned());
        Manifest::new(true, config, layers)
    } else {
        let diff_ids: Vec<DiffId> = layers.iter().map(|l| DiffId(l.digest)).collect();
        let config = legacy_config(&diff_ids)?;
        let descriptor = Descriptor::of(form.config_type(), &config);
        push(documents, DocumentKind::Attestation, descriptor.clone(), config);
        Manifest::new(form.oci, descriptor, layers)
    };
    if form.artifacts {
        manifest.artifact_type = Some(media_type::ATTESTATION_ARTIFACT.to_owned());
        manifest.subject = Some(target.bare());
    }
    let bytes = manifest
        .to_bytes()
        .map_err(ExportError::json("failed to marshal attestation manifest"))?;
    let mut descriptor = Descriptor::of(manifest.media_type, &bytes);
    push(documents, DocumentKind::AttestationManifest, descriptor.clone(), bytes);
    descriptor.annotations = BTreeMap::from([
        (
            "vnd.docker.reference.type".to_owned(),
            "attestation-manifest".to_owned(),
        ),
        ("vnd.docker.reference.digest".to_owned(), target.digest.to_string()),
    ]);
    descriptor.platform = Some(Platform {
        os: "unknown".into(),
        architecture: "unknown".into(),
        ..Platform::default()
    });
    Ok(descriptor)
}

/// The image config of attestation manifests that are no artifacts.
fn legacy_config(diff_ids: &[DiffId]) -> Result<Vec<u8>, ExportError> {
    let value = serde_json::json!({
        "architecture": "unknown", "os": "unknown", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    kiln_oci::go_json::to_vec(&value).map_err(ExportError::json("failed to create attestations image config"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attestation;
    use crate::result::{Attestation, AttestationContent, AttestationKind};
    use kiln_oci::spec;

    fn layer(n: u8, media_type: &str) -> ImageLayer {
        let mut blob = Descriptor::of(media_type, &[n]);
        blob.annotations.insert("containerd.io/uncompressed".into(), "x".into());
        blob.annotations.insert(
            "containerd.io/distribution.source.docker.io".into(),
            "library/alpine".into(),
        );
        blob.annotations.insert("kept".into(), "yes".into());
        ImageLayer {
            blob,
            diff_id: DiffId(Digest::of([n, n])),
            note: LayerNote {
                description: format!("step {n}"),
                created: Some(Timestamp::new(1000 + i64::from(n), 0)),
            },
        }
    }

    fn image(id: &str, claims: Vec<Claim>) -> PlatformImage {
        let platform: Platform = id.parse().unwrap();
        PlatformImage {
            id: id.into(),
            config: Some(
                format!(
                    r#"{{"architecture":"{}","os":"linux","OnBuild":["RUN x"],"created":"2020-01-01T00:00:00Z"}}"#,
                    platform.architecture
                )
                .into_bytes(),
            ),
            platform,
            layers: vec![
                layer(1, media_type::DOCKER_LAYER_GZIP),
                layer(2, media_type::OCI_LAYER_ZSTD),
            ],
            base_config: None,
            epoch: None,
            inline_cache: None,
            claims,
        }
    }

    fn form(index: bool) -> Form {
        Form {
            oci: true,
            artifacts: true,
            keep_foreign: false,
            index,
            annotations: Annotations::default(),
            names: vec![ImageRef::parse("me/app:1").unwrap()],
        }
    }

    fn claims() -> Vec<Claim> {
        let a = Attestation {
            kind: AttestationKind::InToto,
            content: AttestationContent::Bytes(Bytes::from_static(b"{}")),
            path: "provenance.json".into(),
            predicate_type: "https://slsa.dev/provenance/v1".into(),
            subjects: vec![],
            metadata: BTreeMap::new(),
        };
        attestation::load(&[a], &|_| unreachable!()).unwrap()
    }

    #[test]
    fn a_single_result_is_a_plain_manifest() {
        let built = assemble(&[image("linux/amd64", vec![])], &form(false)).unwrap();
        assert_eq!(built.root.media_type, media_type::OCI_MANIFEST);
        assert_eq!(built.root.platform.as_ref().unwrap().id(), "linux/amd64");
        let bytes = &built.document(built.root.digest).unwrap().bytes;
        let manifest = spec::image::ImageManifest::from_reader(bytes.as_ref()).unwrap();
        assert_eq!(
            manifest.config().digest().to_string(),
            built.config.unwrap().to_string()
        );
        let types: Vec<_> = manifest.layers().iter().map(|l| l.media_type().to_string()).collect();
        assert_eq!(types, [media_type::OCI_LAYER_GZIP, media_type::OCI_LAYER_ZSTD]);
        let kept = manifest.layers()[0].annotations().clone().unwrap();
        assert_eq!(kept.keys().map(String::as_str).collect::<Vec<_>>(), ["kept"]);
        let config = ImageConfig::parse(&built.document(built.config.unwrap()).unwrap().bytes).unwrap();
        assert_eq!(config.diff_ids().unwrap().len(), 2);
        let history = config.history().unwrap();
        assert_eq!(history[1].created_by, "step 2");
        assert!(config.get::<Vec<String>>("OnBuild").unwrap().is_some());
        // the same again: the same digests
        assert_eq!(
            assemble(&[image("linux/amd64", vec![])], &form(false)).unwrap().root,
            built.root
        );
    }

    #[test]
    fn docker_types_have_no_layer_annotations() {
        let docker = Form {
            oci: false,
            artifacts: false,
            ..form(false)
        };
        let built = assemble(&[image("linux/amd64", vec![])], &docker).unwrap();
        let m: Manifest = serde_json::from_slice(&built.document(built.root.digest).unwrap().bytes).unwrap();
        assert_eq!(m.media_type, media_type::DOCKER_MANIFEST);
        assert_eq!(m.config.media_type, media_type::DOCKER_CONFIG);
        assert_eq!(m.layers()[1].media_type, media_type::DOCKER_LAYER_ZSTD);
        assert!(m.layers().iter().all(|l| l.annotations.is_empty()));
        let with = Form { index: true, ..docker };
        let error = assemble(&[image("linux/amd64", claims())], &with).err().unwrap();
        assert_eq!(
            error.to_string(),
            "cannot export attestations with \"oci-mediatypes=false\""
        );
    }

    #[test]
    fn attestations_come_after_all_platforms() {
        let images = [image("linux/amd64", claims()), image("linux/arm64", claims())];
        let built = assemble(&images, &form(true)).unwrap();
        let index: Index = serde_json::from_slice(&built.document(built.root.digest).unwrap().bytes).unwrap();
        let ids: Vec<_> = index
            .manifests
            .iter()
            .map(|m| m.platform.as_ref().unwrap().id())
            .collect();
        assert_eq!(
            ids,
            ["linux/amd64", "linux/arm64", "unknown/unknown", "unknown/unknown"]
        );
        let annotations = &index.manifests[2].annotations;
        assert_eq!(
            annotations["vnd.docker.reference.digest"],
            index.manifests[0].digest.to_string()
        );
        let m: Manifest = serde_json::from_slice(&built.document(index.manifests[2].digest).unwrap().bytes).unwrap();
        assert_eq!(m.artifact_type.as_deref(), Some(media_type::ATTESTATION_ARTIFACT));
        assert_eq!(m.subject, Some(index.manifests[0].bare()));
        assert_eq!((m.config.data.as_deref(), m.config.size), (Some("e30="), 2));
        assert_eq!(
            m.layers()[0].annotations["in-toto.io/predicate-type"],
            "https://slsa.dev/provenance/v1"
        );
        let statement = &built.document(m.layers()[0].digest).unwrap().bytes;
        let v: serde_json::Value = serde_json::from_slice(statement).unwrap();
        assert_eq!(v["subject"][0]["name"], "pkg:docker/me/app@1?platform=linux%2Famd64");
        assert_eq!(v["subject"][0]["digest"]["sha256"], index.manifests[0].digest.hex());
        // parents come after their children
        assert_eq!(built.documents.last().unwrap().descriptor.digest, built.root.digest);
        spec::image::ImageIndex::from_reader(built.document(built.root.digest).unwrap().bytes.as_ref()).unwrap();
        // the older form
        let legacy = Form {
            artifacts: false,
            ..form(true)
        };
        let built = assemble(&images, &legacy).unwrap();
        let index: Index = serde_json::from_slice(&built.document(built.root.digest).unwrap().bytes).unwrap();
        let m: Manifest = serde_json::from_slice(&built.document(index.manifests[2].digest).unwrap().bytes).unwrap();
        assert!(m.subject.is_none() && m.artifact_type.is_none());
        let config = &built.document(m.config.digest).unwrap().bytes;
        assert_eq!(
            std::str::from_utf8(config).unwrap(),
            format!(
                r#"{{"architecture":"unknown","os":"unknown","config":{{}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
                m.layers()[0].digest
            )
        );
    }

    #[test]
    fn annotations_go_where_they_belong() {
        let mut f = form(true);
        for (k, v) in [
            ("annotation.m", "1"),
            ("annotation[linux/arm64].only", "2"),
            ("annotation-manifest-descriptor.d", "3"),
            ("annotation-index.i", "4"),
            ("annotation-index-descriptor.j", "5"),
        ] {
            f.annotations.add(k, v).unwrap();
        }
        let built = assemble(&[image("linux/amd64", vec![]), image("linux/arm64", vec![])], &f).unwrap();
        assert_eq!(built.root.annotations["j"], "5");
        let index: Index = serde_json::from_slice(&built.document(built.root.digest).unwrap().bytes).unwrap();
        assert_eq!(index.annotations["i"], "4");
        assert_eq!(index.manifests[0].annotations["d"], "3");
        let m = |n: usize| -> Manifest {
            serde_json::from_slice(&built.document(index.manifests[n].digest).unwrap().bytes).unwrap()
        };
        assert_eq!(m(0).annotations.len(), 1);
        assert_eq!(m(1).annotations["only"], "2");
        f.index = false;
        assert_eq!(
            assemble(&[image("linux/arm64", vec![])], &f).err().unwrap().to_string(),
            "index annotations not supported for single platform export"
        );
        let mut f = form(false);
        f.annotations.add("annotation[linux/s390x].x", "1").unwrap();
        assert_eq!(
            assemble(&[image("linux/arm64", vec![])], &f).err().unwrap().to_string(),
            "invalid annotation: no platform linux/s390x found in source"
        );
    }

    #[test]
    fn the_epoch_lowers_times_and_scratch_is_legal() {
        let mut i = image("linux/amd64", vec![]);
        i.epoch = Some(Timestamp::new(500, 0));
        let built = assemble(&[i], &form(false)).unwrap();
        let config = ImageConfig::parse(&built.document(built.config.unwrap()).unwrap().bytes).unwrap();
        assert_eq!(config.created().unwrap(), Some(Timestamp::new(500, 0)));
        assert!(
            config
                .history()
                .unwrap()
                .iter()
                .all(|h| h.created == Some(Timestamp::new(500, 0)))
        );
        let mut i = image("linux/amd64", vec![]);
        (i.layers, i.config) = (vec![], None);
        i.inline_cache = Some(b"[]".to_vec());
        let built = assemble(&[i], &form(false)).unwrap();
        let text = String::from_utf8(built.document(built.root.digest).unwrap().bytes.to_vec()).unwrap();
        assert!(text.contains("\"layers\": null"));
        let config = String::from_utf8(built.document(built.config.unwrap()).unwrap().bytes.to_vec()).unwrap();
        assert!(
            config.contains(r#""created":null,"history":null,"moby.buildkit.cache.v0":"W10=","#),
            "{config}"
        );
    }
}
