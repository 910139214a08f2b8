//! A finished result leaves the daemon in the form asked for: image, OCI or Docker archive, directory, tar.
//!
//! Tour: [`exporter`] is the entry: an [`Exporter`] made from a request's attributes ([`options`], [`annotations`]) takes a
//! [`BuildResult`] ([`mod@result`]) and gives an [`Exported`]. `image` builds configs, manifests and indexes from layers,
//! `attestation` the in-toto statements that go with them; `archive` and `registry` are the ways out for images,
//! `files`, `local` and `tar` those for plain files, `rewrite` clamps times in layers. `layers` is the only place that asks the store for blobs and trees;
//! [`progress`] is how an export is watched.
//!
//! Absent on purpose: what attestations say (the daemon writes provenance), an image store (an image that is not pushed
//! stays in the content store), compression and tar of layers (the store's, each layer packed once).

pub mod annotations;
mod archive;
mod attestation;
pub mod error;
pub mod exporter;
mod files;
mod image;
mod layers;
mod local;
pub mod options;
pub mod progress;
mod registry;
pub mod result;
mod rewrite;
mod tar;

pub use attestation::MAX_DOCUMENT;
pub use error::ExportError;
pub use exporter::{ExportRequest, Exported, Exporter};
pub use options::{CompressionKind, ExporterKind, FilesOptions, ImageOptions, LayerPacking};
pub use progress::{ExportProgress, StatusUpdate};
pub use result::{Attestation, AttestationContent, AttestationKind, BuildResult, Refs, ResultPlatform, Subject};

/// Runs blocking work that stops when the future is dropped.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&kiln_store::Stop) -> Result<T, ExportError> + Send + 'static,
) -> Result<T, ExportError> {
    let stop = kiln_store::Stop::new();
    let guard = stop.guard();
    let outcome = tokio::task::spawn_blocking(move || work(&stop)).await;
    guard.disarm();
    outcome.map_err(|e| ExportError::Io {
        what: "an export's thread failed".to_owned(),
        source: std::io::Error::other(e),
    })?
}
