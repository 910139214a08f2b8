//! Descriptors, manifests and indexes as Kiln reads and writes them.
//!
//! Own structs instead of the `oci-spec` ones because their bytes are hashed: members have one fixed order and
//! annotations are sorted (docs/design/0003-oci-structs.md). What is read keeps its raw bytes beside the parsed value;
//! these types are never used to re-encode what somebody else wrote.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{Digest, Platform, go_json, media_type};

/// Points to a blob: what it is, its digest and its size in bytes (OCI image spec, "Content Descriptors").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the blob.
    #[serde(default)]
    pub media_type: String,
    /// Digest of the blob's bytes.
    pub digest: Digest,
    /// Length of the blob in bytes.
    pub size: u64,
    /// Other places to download it from (non-distributable layers).
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_as_default")]
    pub urls: Vec<String>,
    /// Free key-value pairs, sorted by key.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_as_default"
    )]
    pub annotations: BTreeMap<String, String>,
    /// The blob itself in base64, for tiny ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// What the manifest pointed to is for; in indexes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Kind of an artifact manifest; in indexes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

impl Descriptor {
    /// A descriptor with nothing but the three mandatory members.
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest,
            size,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            data: None,
            platform: None,
            artifact_type: None,
        }
    }

    /// The descriptor of `bytes`.
    pub fn of(media_type: impl Into<String>, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }

    /// The same descriptor with only type, digest and size left.
    pub fn bare(&self) -> Self {
        Self::new(self.media_type.clone(), self.digest, self.size)
    }
}

/// An image manifest (OCI image spec, "Image Manifest"; Docker schema 2 has the same members).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    #[serde(default)]
    pub schema_version: u32,
    /// Own media type.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// Kind of artifact, for manifests that are no images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// Layers, bottom first. `None` is written as `null`, the form of an image without layers.
    #[serde(default)]
    pub layers: Option<Vec<Descriptor>>,
    /// The manifest this one is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free key-value pairs, sorted by key.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_as_default"
    )]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// A manifest in the OCI or the Docker vocabulary.
    pub fn new(oci: bool, config: Descriptor, layers: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: if oci {
                media_type::OCI_MANIFEST
            } else {
                media_type::DOCKER_MANIFEST
            }
            .to_owned(),
            artifact_type: None,
            config,
            layers: (!layers.is_empty()).then_some(layers),
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> &[Descriptor] {
        self.layers.as_deref().unwrap_or_default()
    }

    /// The bytes to store and to hash: indented by two spaces (semantics.md §7).
    ///
    /// # Errors
    /// None in practice; the serialiser's error type is passed on.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        go_json::to_vec_indent(self)
    }
}

/// An image index or Docker manifest list (OCI image spec, "Image Index").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    #[serde(default)]
    pub schema_version: u32,
    /// Own media type.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// Kind of artifact, for indexes that are no images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The manifests, in order.
    #[serde(deserialize_with = "null_as_default")]
    pub manifests: Vec<Descriptor>,
    /// The manifest this one is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free key-value pairs, sorted by key.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_as_default"
    )]
    pub annotations: BTreeMap<String, String>,
}

impl Index {
    /// An index in the OCI or the Docker vocabulary.
    pub fn new(oci: bool, manifests: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: if oci {
                media_type::OCI_INDEX
            } else {
                media_type::DOCKER_LIST
            }
            .to_owned(),
            artifact_type: None,
            manifests,
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// The bytes to store and to hash: indented by two spaces (semantics.md §7).
    ///
    /// # Errors
    /// None in practice; the serialiser's error type is passed on.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        go_json::to_vec_indent(self)
    }

    /// The manifest for `wanted`: equal platform first, then the best lesser variant that the same machine runs
    /// (`arm/v7` also runs `v6` and `v5`, `amd64/v3` also `v2` and plain), in index order among equals. Attestation
    /// manifests (platform `unknown/unknown`) are never chosen; entries without a platform only if nothing else fits.
    pub fn select(&self, wanted: &Platform) -> Option<&Descriptor> {
        let mut best: Option<(u32, &Descriptor)> = None;
        for manifest in &self.manifests {
            if !is_image_like(manifest) {
                continue;
            }
            let score = match &manifest.platform {
                Some(p) => p.runs_on(wanted),
                None => Some(u32::MAX),
            };
            if let Some(score) = score
                && best.is_none_or(|(b, _)| score < b)
            {
                best = Some((score, manifest));
            }
        }
        best.map(|(_, d)| d)
    }
}

fn is_image_like(manifest: &Descriptor) -> bool {
    let attestation = manifest
        .annotations
        .get("vnd.docker.reference.type")
        .map(String::as_str)
        == Some("attestation-manifest");
    let unknown = manifest
        .platform
        .as_ref()
        .is_some_and(|p| p.os == "unknown" && p.architecture == "unknown");
    let known_type = manifest.media_type.is_empty()
        || media_type::is_manifest(&manifest.media_type)
        || media_type::is_index(&manifest.media_type);
    !attestation && !unknown && known_type
}

pub(crate) fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_has_gos_bytes_and_oci_spec_reads_it() {
        let mut config = Descriptor::of(media_type::OCI_CONFIG, b"{}");
        config.annotations.insert("b".into(), "<2>".into());
        config.annotations.insert("a".into(), "1".into());
        let manifest = Manifest::new(true, config, Vec::new());
        let bytes = manifest.to_bytes().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert_eq!(
            text,
            "{\n  \"schemaVersion\": 2,\n  \"mediaType\": \"application/vnd.oci.image.manifest.v1+json\",\n  \
             \"config\": {\n    \"mediaType\": \"application/vnd.oci.image.config.v1+json\",\n    \
             \"digest\": \"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a\",\n    \
             \"size\": 2,\n    \"annotations\": {\n      \"a\": \"1\",\n      \"b\": \"\\u003c2\\u003e\"\n    }\n  },\n  \
             \"layers\": null\n}"
        );
        assert_eq!(serde_json::from_slice::<Manifest>(&bytes).unwrap(), manifest);
        let with_layer = Manifest::new(
            true,
            manifest.config.clone(),
            vec![Descriptor::of(media_type::OCI_LAYER_GZIP, b"x")],
        );
        let read = oci_spec::image::ImageManifest::from_reader(with_layer.to_bytes().unwrap().as_slice()).unwrap();
        assert_eq!(read.layers().len(), 1);
        assert_eq!(read.config().size(), 2);
    }

    #[test]
    fn an_index_serves_the_best_platform() {
        let entry = |text: &str, n: u8| {
            let mut d = Descriptor::of(media_type::OCI_MANIFEST, &[n]);
            d.platform = Some(text.parse().unwrap());
            d
        };
        let mut attestation = entry("unknown/unknown", 9);
        attestation
            .annotations
            .insert("vnd.docker.reference.type".into(), "attestation-manifest".into());
        let index = Index::new(
            true,
            vec![
                attestation,
                entry("linux/arm/v6", 1),
                entry("linux/arm/v7", 2),
                entry("linux/amd64", 3),
                entry("linux/arm64/v8", 4),
            ],
        );
        let pick = |text: &str| index.select(&text.parse().unwrap()).map(|d| d.digest);
        assert_eq!(pick("linux/arm/v7"), Some(Digest::of([2])));
        assert_eq!(pick("linux/arm/v6"), Some(Digest::of([1])));
        assert_eq!(pick("linux/arm/v5"), None);
        assert_eq!(pick("linux/amd64"), Some(Digest::of([3])));
        assert_eq!(pick("linux/amd64/v3"), Some(Digest::of([3])));
        assert_eq!(pick("linux/arm64"), Some(Digest::of([4])));
        assert_eq!(pick("linux/riscv64"), None);
    }
}
