//! Media types of manifests, configs and layers in the OCI and the Docker (schema 2) vocabularies.

/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI layer, not compressed.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// OCI layer, gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// OCI layer, zstd.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// OCI layer that may not be distributed, not compressed (deprecated, still met).
pub const OCI_FOREIGN_LAYER: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
/// The empty JSON object used as config of artifacts.
pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker image manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker image manifest, schema 1 (signed); refused with a clear message.
pub const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";
/// Docker image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker layer, not compressed.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// Docker layer, gzip.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// Docker layer, zstd.
pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
/// Docker layer that may not be distributed, gzip.
pub const DOCKER_FOREIGN_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

/// An in-toto statement as layer of an attestation manifest.
pub const IN_TOTO: &str = "application/vnd.in-toto+json";
/// Artifact type of attestation manifests.
pub const ATTESTATION_ARTIFACT: &str = "application/vnd.docker.attestation.manifest.v1+json";
/// Config of a build cache manifest.
pub const CACHE_CONFIG: &str = "application/vnd.buildkit.cacheconfig.v0";

/// Everything a manifest request accepts, most wanted first.
pub const MANIFEST_ACCEPT: &[&str] = &[DOCKER_MANIFEST, DOCKER_LIST, OCI_MANIFEST, OCI_INDEX];

/// How a layer's tar is packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerCompression {
    /// The tar itself.
    Uncompressed,
    /// gzip.
    #[default]
    Gzip,
    /// zstd.
    Zstd,
}

impl LayerCompression {
    /// The exporter attribute's word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uncompressed => "uncompressed",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// Whether `media_type` is an index or a manifest list.
pub fn is_index(media_type: &str) -> bool {
    media_type == OCI_INDEX || media_type == DOCKER_LIST
}

/// Whether `media_type` is an image manifest.
pub fn is_manifest(media_type: &str) -> bool {
    media_type == OCI_MANIFEST || media_type == DOCKER_MANIFEST
}

/// Whether `media_type` is an image config.
pub fn is_config(media_type: &str) -> bool {
    media_type == OCI_CONFIG || media_type == DOCKER_CONFIG
}

/// Whether a layer of this type may not be pushed to a registry other than its own.
pub fn is_foreign_layer(media_type: &str) -> bool {
    media_type.starts_with(OCI_FOREIGN_LAYER) || media_type.starts_with("application/vnd.docker.image.rootfs.foreign.")
}

/// The compression that a layer's media type names, or `None` for what is no file system layer.
pub fn layer_compression(media_type: &str) -> Option<LayerCompression> {
    let suffix = [
        OCI_FOREIGN_LAYER,
        OCI_LAYER,
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        DOCKER_LAYER,
    ]
    .iter()
    .find_map(|prefix| media_type.strip_prefix(prefix))?;
    match suffix {
        "" => Some(LayerCompression::Uncompressed),
        "+gzip" | ".gzip" => Some(LayerCompression::Gzip),
        "+zstd" | ".zstd" => Some(LayerCompression::Zstd),
        _ => None,
    }
}

/// The media type of a layer with this compression in the OCI or the Docker vocabulary.
pub const fn layer(compression: LayerCompression, oci: bool) -> &'static str {
    match (compression, oci) {
        (LayerCompression::Uncompressed, true) => OCI_LAYER,
        (LayerCompression::Gzip, true) => OCI_LAYER_GZIP,
        (LayerCompression::Zstd, true) => OCI_LAYER_ZSTD,
        (LayerCompression::Uncompressed, false) => DOCKER_LAYER,
        (LayerCompression::Gzip, false) => DOCKER_LAYER_GZIP,
        (LayerCompression::Zstd, false) => DOCKER_LAYER_ZSTD,
    }
}

/// `media_type` of a layer in the wanted vocabulary. Non-distributable layers keep that mark if `keep_foreign`, else
/// they become ordinary ones. Types that are no file system layers stay as they are.
pub fn convert_layer(media_type: &str, oci: bool, keep_foreign: bool) -> String {
    let Some(compression) = layer_compression(media_type) else {
        return media_type.to_owned();
    };
    if is_foreign_layer(media_type) && keep_foreign {
        let (base, dot) = if oci {
            (OCI_FOREIGN_LAYER, '+')
        } else {
            ("application/vnd.docker.image.rootfs.foreign.diff.tar", '.')
        };
        return match compression {
            LayerCompression::Uncompressed => base.to_owned(),
            other => format!("{base}{dot}{}", other.name()),
        };
    }
    layer(compression, oci).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_convert_between_the_vocabularies() {
        for (from, oci, keep, to) in [
            (DOCKER_LAYER_GZIP, true, false, OCI_LAYER_GZIP),
            (OCI_LAYER_ZSTD, false, false, DOCKER_LAYER_ZSTD),
            (OCI_LAYER, false, false, DOCKER_LAYER),
            (
                DOCKER_FOREIGN_LAYER_GZIP,
                true,
                true,
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            ),
            (DOCKER_FOREIGN_LAYER_GZIP, true, false, OCI_LAYER_GZIP),
            (DOCKER_FOREIGN_LAYER_GZIP, false, true, DOCKER_FOREIGN_LAYER_GZIP),
            (IN_TOTO, false, false, IN_TOTO),
        ] {
            assert_eq!(convert_layer(from, oci, keep), to, "{from}");
        }
        assert_eq!(layer_compression(OCI_CONFIG), None);
        assert_eq!(layer_compression(DOCKER_LAYER), Some(LayerCompression::Uncompressed));
        assert!(is_foreign_layer(DOCKER_FOREIGN_LAYER_GZIP) && !is_foreign_layer(OCI_LAYER_GZIP));
    }
}
