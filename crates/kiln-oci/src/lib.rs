//! The vocabulary of the OCI specifications: digests, platforms, references, descriptors, manifests, image configs.
//!
//! Tour: [`digest`] is what everything is named by, [`platform`] what it is for.
//!
//! Absent on purpose: disks, networks, async. Nothing here performs I/O.

extern crate self as kiln_oci;

pub mod digest;
pub mod platform;

pub use digest::{ChainId, DiffId, Digest, DigestError, DigestReader, DigestWriter, Hasher};
pub use platform::{Platform, PlatformError};

#[doc(hidden)]
pub use serde as __serde;
