//! The vocabulary of the OCI specifications: digests, platforms, references, descriptors, manifests, image configs.
//!
//! Tour: [`digest`] is what everything is named by, [`platform`] what it is for, [`reference`] what users call it.
//! [`descriptor`] has descriptors, manifests and indexes, [`media_type`] their types, [`image_config`] the config as a
//! patched JSON object with the [`history`] rules, [`timestamp`] the times in it, [`go_json`] the JSON form that digests
//! over JSON (configs, manifests, cache keys) depend on, [`purl`] how attestations name images.
//!
//! Absent on purpose: disks, networks, async. Nothing here performs I/O. `oci-spec` is re-exported for readers that
//! want its types; what Kiln writes comes from its own structs, whose bytes are the same every time.

extern crate self as kiln_oci;

pub mod descriptor;
pub mod digest;
pub mod go_json;
pub mod history;
pub mod image_config;
pub mod media_type;
pub mod platform;
pub mod purl;
pub mod reference;
pub mod timestamp;

pub use descriptor::{Descriptor, Index, Manifest};
pub use digest::{ChainId, DiffId, Digest, DigestError, DigestReader, DigestWriter, Hasher};
pub use history::{HistoryEntry, LayerNote};
pub use image_config::{ConfigError, DEFAULT_PATH, ImageConfig, RunConfig};
pub use media_type::LayerCompression;
pub use oci_spec as spec;
pub use platform::{Platform, PlatformError};
pub use reference::{ImageRef, ReferenceError};
pub use timestamp::{Timestamp, TimestampError};

#[doc(hidden)]
pub use serde as __serde;
