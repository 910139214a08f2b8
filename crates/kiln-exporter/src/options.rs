//! What a client asks of an exporter: its string attributes, parsed once (solve.md §5).

use std::collections::BTreeMap;

use kiln_oci::Timestamp;

use crate::annotations::Annotations;
use crate::error::ExportError;

/// The kinds of exporters that the daemon has. `registry` is `image` with `push`, and `cacheonly` is none at all; both
/// are resolved by clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExporterKind {
    /// Into the content store, and to registries with `push`.
    Image,
    /// OCI layout, as tar or into the client's content store.
    Oci,
    /// The same with Docker's `manifest.json`.
    Docker,
    /// Files into a directory of the client.
    Local,
    /// Files as one tar.
    Tar,
}

impl ExporterKind {
    /// The kind by its name in requests.
    ///
    /// # Errors
    /// [`ExportError::Invalid`] for any other name.
    pub fn parse(name: &str) -> Result<Self, ExportError> {
        Ok(match name {
            "image" => Self::Image,
            "oci" => Self::Oci,
            "docker" => Self::Docker,
            "local" => Self::Local,
            "tar" => Self::Tar,
            other => return Err(ExportError::Invalid(format!("exporter \"{other}\" could not be found"))),
        })
    }

    /// The name of the export's vertex.
    pub const fn vertex_name(self) -> &'static str {
        match self {
            Self::Image => "exporting to image",
            Self::Oci => "exporting to oci image format",
            Self::Docker => "exporting to docker image format",
            Self::Local => "exporting to client directory",
            Self::Tar => "exporting to client tarball",
        }
    }
}

/// How layers are packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerPacking {
    /// Compression of layers that have none yet.
    pub kind: CompressionKind,
    /// Repack layers that have another compression.
    pub force: bool,
    /// Level; `None` for the default.
    pub level: Option<i32>,
}

/// Values of `compression`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionKind {
    /// The tar itself.
    Uncompressed,
    /// gzip.
    #[default]
    Gzip,
    /// zstd.
    Zstd,
    /// gzip with a table of contents for lazy pulling.
    Estargz,
}

/// Attributes of `image`, `oci` and `docker`.
#[derive(Clone, Debug, Default)]
pub struct ImageOptions {
    /// Comma list of references, `*` for the result's own, or empty.
    pub name: String,
    /// OCI media types rather than Docker's.
    pub oci_types: bool,
    /// Attestation manifests as artifacts with a subject; `None` follows `oci_types`.
    pub oci_artifact: Option<bool>,
    /// How layers are packed.
    pub packing: LayerPacking,
    /// Keep the media types of non-distributable layers.
    pub prefer_nondist: bool,
    /// Attach attestations that are marked inline-only.
    pub inline_attestations: bool,
    /// `source-date-epoch`: absent, explicitly unset, or a time.
    pub epoch: Option<Option<Timestamp>>,
    /// Clamp the times of files too.
    pub rewrite_timestamp: bool,
    /// Annotations asked for by attributes.
    pub annotations: Annotations,
    /// Unknown attributes, which count as metadata of the result.
    pub metadata: BTreeMap<String, String>,
    /// image: push to the names' registries.
    pub push: bool,
    /// image: push without tags.
    pub push_by_digest: bool,
    /// image: registries may be plain HTTP or have any certificate.
    pub insecure: bool,
    /// image: unpack into the snapshotter.
    pub unpack: bool,
    /// image: keep in an image store; without one no effect.
    pub store: bool,
    /// image: name for results without a name, before `@<digest>`.
    pub dangling_prefix: String,
    /// image: that prefix only if there is no name.
    pub dangling_empty_only: bool,
    /// image: also name by `name@digest`.
    pub name_canonical: bool,
    /// oci, docker: one tar rather than the client's content store.
    pub tar: bool,
}

impl ImageOptions {
    /// Whether attestation manifests are artifacts.
    pub fn artifacts(&self) -> bool {
        self.oci_artifact.unwrap_or(self.oci_types)
    }
}

/// Attributes of `local` and `tar`.
#[derive(Clone, Debug, Default)]
pub struct FilesOptions {
    /// local: remove what is not in the result.
    pub delete: bool,
    /// One directory per platform; `None` follows the shape of the result.
    pub platform_split: Option<bool>,
    /// Put before the names of attestation files.
    pub attestation_prefix: String,
    /// `source-date-epoch`: absent, explicitly unset, or a time.
    pub epoch: Option<Option<Timestamp>>,
}

/// Go's `strconv.ParseBool`.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

fn boolean(key: &str, value: &str, empty_is_true: bool) -> Result<bool, ExportError> {
    if empty_is_true && value.is_empty() {
        return Ok(true);
    }
    parse_bool(value).ok_or_else(|| {
        ExportError::Invalid(format!(
            "non-bool value specified for {key}: strconv.ParseBool: parsing \"{value}\": invalid syntax"
        ))
    })
}

fn epoch(value: &str) -> Result<Option<Timestamp>, ExportError> {
    if value.is_empty() {
        return Ok(None);
    }
    match value.parse::<i64>() {
        Ok(seconds) => Ok(Some(Timestamp::new(seconds, 0))),
        Err(_) => Err(ExportError::Invalid(format!("invalid SOURCE_DATE_EPOCH: {value}"))),
    }
}

impl ImageOptions {
    /// Parses the attributes of an `image`, `oci` or `docker` exporter.
    ///
    /// # Errors
    /// [`ExportError::Invalid`] for values that do not fit their attribute or one another.
    pub fn parse(kind: ExporterKind, attrs: &BTreeMap<String, String>) -> Result<Self, ExportError> {
        let image = kind == ExporterKind::Image;
        let mut o = Self {
            oci_types: true,
            inline_attestations: image,
            store: true,
            tar: true,
            ..Self::default()
        };
        let mut level = None;
        for (key, value) in attrs {
            let strict = || boolean(key, value, false);
            let lenient = || boolean(key, value, true);
            match key.as_str() {
                "name" => o.name.clone_from(value),
                "oci-mediatypes" => o.oci_types = strict()?,
                "oci-artifact" => o.oci_artifact = Some(strict()?),
                "compression" => o.packing.kind = compression(value)?,
                "force-compression" => o.packing.force = lenient()?,
                "compression-level" => level = Some(value),
                "prefer-nondist-layers" => o.prefer_nondist = strict()?,
                "attestation-inline" => o.inline_attestations = strict()?,
                "source-date-epoch" => o.epoch = Some(epoch(value)?),
                "rewrite-timestamp" => o.rewrite_timestamp = strict()?,
                "buildinfo" | "buildinfo-attrs" | "prefer-image-digest" => {}
                "push" if image => o.push = lenient()?,
                "push-by-digest" if image => o.push_by_digest = lenient()?,
                "registry.insecure" if image => o.insecure = lenient()?,
                "unpack" if image => o.unpack = lenient()?,
                "store" if image => o.store = lenient()?,
                "dangling-name-prefix" if image => o.dangling_prefix.clone_from(value),
                "danging-name-empty-only" if image => o.dangling_empty_only = lenient()?,
                "name-canonical" if image => o.name_canonical = lenient()?,
                "tar" if !image => o.tar = lenient()?,
                _ => {
                    if !o.annotations.add(key, value)? {
                        o.metadata.insert(key.clone(), value.clone());
                    }
                }
            }
        }
        if let Some(value) = level {
            let n: i32 = value.parse().map_err(|_| {
                ExportError::Invalid(format!("non-integer value {value} specified for compression-level"))
            })?;
            let most = if o.packing.kind == CompressionKind::Zstd { 22 } else { 9 };
            if !(0..=most).contains(&n) {
                return Err(ExportError::Invalid(format!(
                    "compression-level {n} is not between 0 and {most}"
                )));
            }
            o.packing.level = Some(n);
        }
        o.validate()?;
        Ok(o)
    }

    fn validate(&self) -> Result<(), ExportError> {
        let bad = |text: &str| Err(ExportError::Invalid(text.to_owned()));
        if self.oci_artifact == Some(true) && !self.oci_types {
            return bad("cannot export OCI artifacts with \"oci-mediatypes=false\"");
        }
        if self.packing.kind == CompressionKind::Estargz && !self.oci_types {
            return bad("cannot use estargz compression with \"oci-mediatypes=false\"");
        }
        if self.rewrite_timestamp && self.unpack {
            return bad("exporter option \"rewrite-timestamp\" conflicts with \"unpack\"");
        }
        Ok(())
    }
}

fn compression(value: &str) -> Result<CompressionKind, ExportError> {
    Ok(match value {
        "uncompressed" => CompressionKind::Uncompressed,
        "gzip" | "" => CompressionKind::Gzip,
        "zstd" => CompressionKind::Zstd,
        "estargz" => CompressionKind::Estargz,
        other => {
            return Err(ExportError::Invalid(format!(
                "unsupported layer compression type {other}"
            )));
        }
    })
}

impl FilesOptions {
    /// Parses the attributes of a `local` or `tar` exporter; unknown ones are ignored.
    ///
    /// # Errors
    /// [`ExportError::Invalid`] for values that do not fit their attribute.
    pub fn parse(kind: ExporterKind, attrs: &BTreeMap<String, String>) -> Result<Self, ExportError> {
        let mut o = Self::default();
        for (key, value) in attrs {
            match key.as_str() {
                "mode" if kind == ExporterKind::Local => {
                    o.delete = match value.as_str() {
                        "" | "copy" => false,
                        "delete" => true,
                        other => return Err(ExportError::Invalid(format!("invalid local exporter mode \"{other}\""))),
                    };
                }
                "platform-split" => o.platform_split = Some(boolean(key, value, false)?),
                "attestation-prefix" => o.attestation_prefix.clone_from(value),
                "source-date-epoch" => o.epoch = Some(epoch(value)?),
                _ => {}
            }
        }
        Ok(o)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attrs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn empty_is_true_only_where_the_protocol_says_so() {
        let o = ImageOptions::parse(
            ExporterKind::Image,
            &attrs(&[
                ("push", ""),
                ("name-canonical", ""),
                ("force-compression", ""),
                ("foo", "bar"),
                ("tar", "x"),
            ]),
        )
        .unwrap();
        assert!(o.push && o.name_canonical && o.packing.force && o.oci_types && o.artifacts() && o.inline_attestations);
        assert_eq!(o.metadata, attrs(&[("foo", "bar"), ("tar", "x")]));
        for key in [
            "oci-mediatypes",
            "rewrite-timestamp",
            "attestation-inline",
            "prefer-nondist-layers",
        ] {
            assert!(
                ImageOptions::parse(ExporterKind::Image, &attrs(&[(key, "")])).is_err(),
                "{key}"
            );
        }
        assert!(ImageOptions::parse(ExporterKind::Image, &attrs(&[("push", "yes")])).is_err());
        let o = ImageOptions::parse(ExporterKind::Docker, &attrs(&[("tar", "F"), ("push", "x")])).unwrap();
        assert!(!o.tar && !o.inline_attestations && o.metadata.contains_key("push"));
    }

    #[test]
    fn contradictions_are_refused() {
        for pairs in [
            &[("oci-mediatypes", "false"), ("oci-artifact", "true")][..],
            &[("oci-mediatypes", "false"), ("compression", "estargz")],
            &[("unpack", "true"), ("rewrite-timestamp", "true")],
            &[("compression", "lzma")],
            &[("compression", "gzip"), ("compression-level", "22")],
            &[("source-date-epoch", "soon")],
        ] {
            assert!(
                ImageOptions::parse(ExporterKind::Image, &attrs(pairs)).is_err(),
                "{pairs:?}"
            );
        }
        let o = ImageOptions::parse(ExporterKind::Oci, &attrs(&[("source-date-epoch", "")])).unwrap();
        assert_eq!(o.epoch, Some(None));
        assert!(ExporterKind::parse("moby").is_err());
    }
}
