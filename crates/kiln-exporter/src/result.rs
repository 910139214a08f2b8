//! What an exporter gets: the finished result of a build, in the daemon's own types.

use std::collections::BTreeMap;

use bytes::Bytes;
use kiln_oci::{ImageConfig, Platform, Timestamp};
use kiln_store::LayerRef;
use serde::Deserialize;

use crate::error::ExportError;

/// Metadata keys of results (solve.md §7).
pub mod key {
    /// Image config, also with `/<platform>`.
    pub const CONFIG: &str = "containerimage.config";
    /// Config of the base image, also with `/<platform>`.
    pub const BASE_CONFIG: &str = "containerimage.base.config";
    /// Platforms in order.
    pub const PLATFORMS: &str = "refs.platforms";
    /// Decimal seconds, also with `/<platform>`.
    pub const EPOCH: &str = "source.date.epoch";
    /// Names for `name=*`.
    pub const NAME: &str = "image.name";
    /// Config member with inline cache records.
    pub const INLINE_CACHE: &str = "moby.buildkit.cache.v0";
}

/// One result or one per platform. A scratch result has no layer.
#[derive(Clone, Debug)]
pub enum Refs {
    /// A single result; becomes a plain manifest unless attestations force an index.
    Single(Option<LayerRef>),
    /// By platform id; always an index, even with one entry.
    ByPlatform(BTreeMap<String, Option<LayerRef>>),
}

/// A finished result.
#[derive(Clone, Debug)]
pub struct BuildResult {
    /// The file systems.
    pub refs: Refs,
    /// The frontend's metadata by key.
    pub metadata: BTreeMap<String, Vec<u8>>,
    /// Attestations by platform id, the daemon's own (provenance) last.
    pub attestations: BTreeMap<String, Vec<Attestation>>,
    /// Inline cache by platform id, a JSON array each; empty if none was asked for. A single result without platforms
    /// uses the id of its platform as well.
    pub inline_cache: BTreeMap<String, Vec<u8>>,
}

/// The form an attestation arrives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttestationKind {
    /// One predicate.
    InToto,
    /// A directory of in-toto statements, each a JSON file.
    Bundle,
}

/// Where an attestation's bytes are.
#[derive(Clone, Debug)]
pub enum AttestationContent {
    /// At hand; made by the daemon.
    Bytes(Bytes),
    /// In a layer, at the attestation's path.
    Layer(LayerRef),
}

/// What an attestation is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The result itself, under its names and under this one too, if it is not empty.
    Itself {
        /// Additional name.
        name: String,
    },
    /// Anything else, as given.
    Raw {
        /// Name; empty becomes `_`.
        name: String,
        /// Digests as `algorithm:hex`.
        digests: Vec<String>,
    },
}

/// Something that is claimed about a result (in-toto attestation).
#[derive(Clone, Debug)]
pub struct Attestation {
    /// Its form.
    pub kind: AttestationKind,
    /// Its bytes: a predicate, or the layer that holds predicate or bundle.
    pub content: AttestationContent,
    /// Path in the layer, and name of the file that `local` and `tar` write.
    pub path: String,
    /// Predicate type; for bundles the one that all entries must have, or empty.
    pub predicate_type: String,
    /// Subjects; none counts as the result itself.
    pub subjects: Vec<Subject>,
    /// `reason`, `inline-only`, `sbom-core`.
    pub metadata: BTreeMap<String, String>,
}

impl Attestation {
    /// Whether only exporters that inline attestations take it.
    pub fn is_inline_only(&self) -> bool {
        self.metadata.get("inline-only").map(String::as_str) == Some("true")
    }
}

/// A platform of a result: the id it is known by, and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ResultPlatform {
    /// Key of maps.
    #[serde(rename = "ID")]
    pub id: String,
    /// The platform itself, as the frontend wrote it.
    #[serde(rename = "Platform")]
    pub platform: Platform,
}

impl BuildResult {
    /// The platforms in export order, at least one. Without the frontend's list it is the image config's platform, or
    /// else the daemon's own.
    ///
    /// # Errors
    /// [`ExportError::Result`] if several results come without that list, or it does not fit them.
    pub fn platforms(&self) -> Result<Vec<ResultPlatform>, ExportError> {
        #[derive(Deserialize)]
        struct List {
            #[serde(rename = "Platforms")]
            platforms: Option<Vec<ResultPlatform>>,
        }
        let map = matches!(self.refs, Refs::ByPlatform(_));
        let Some(bytes) = self.metadata.get(key::PLATFORMS) else {
            if map {
                let text = "unable to export multiple refs, missing platforms mapping";
                return Err(ExportError::Result(text.to_owned()));
            }
            let platform = match self.metadata.get(key::CONFIG) {
                Some(config) => ImageConfig::parse(config)?.platform()?.normalized(),
                None => Platform::host(),
            };
            return Ok(vec![ResultPlatform {
                id: platform.id(),
                platform,
            }]);
        };
        let list: List =
            serde_json::from_slice(bytes).map_err(ExportError::json("failed to parse platforms passed to exporter"))?;
        let platforms = list.platforms.unwrap_or_default();
        if platforms.is_empty() {
            return Err(ExportError::Result(
                "invalid empty platforms index for exporter".to_owned(),
            ));
        }
        if !map && platforms.len() > 1 {
            let text = "cannot export multiple platforms without multi-platform enabled";
            return Err(ExportError::Result(text.to_owned()));
        }
        if let Refs::ByPlatform(refs) = &self.refs
            && let Some(missing) = platforms.iter().find(|p| !refs.contains_key(&p.id))
        {
            return Err(ExportError::Result(format!("failed to find ref for ID {}", missing.id)));
        }
        Ok(platforms)
    }

    /// The file system for a platform.
    pub fn layer(&self, platform: &str) -> Option<&LayerRef> {
        match &self.refs {
            Refs::Single(layer) => layer.as_ref(),
            Refs::ByPlatform(map) => map.get(platform)?.as_ref(),
        }
    }

    /// Whether the result is a map, which always becomes an index.
    pub fn is_map(&self) -> bool {
        matches!(self.refs, Refs::ByPlatform(_))
    }

    /// Metadata for a platform: `<name>/<platform>` if there is one, else `<name>`.
    pub fn meta(&self, name: &str, platform: &str) -> Option<&[u8]> {
        let own = self.metadata.get(&format!("{name}/{platform}"));
        own.or_else(|| self.metadata.get(name)).map(Vec::as_slice)
    }

    /// The epoch that the frontend found for a platform.
    ///
    /// # Errors
    /// [`ExportError::Result`] if it is no number.
    pub fn epoch(&self, platform: &str) -> Result<Option<Timestamp>, ExportError> {
        let Some(bytes) = self.meta(key::EPOCH, platform).filter(|b| !b.is_empty()) else {
            return Ok(None);
        };
        let seconds = std::str::from_utf8(bytes).ok().and_then(|t| t.parse().ok());
        match seconds {
            Some(s) => Ok(Some(Timestamp::new(s, 0))),
            None => Err(ExportError::Result(format!(
                "invalid SOURCE_DATE_EPOCH: {}",
                String::from_utf8_lossy(bytes)
            ))),
        }
    }
}
