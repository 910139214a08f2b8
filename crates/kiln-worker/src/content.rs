//! The content digest of an input: what the paths an operation looks at hold.

use kiln_fs::Stop;
use kiln_oci::Digest;
use kiln_store::checksum::{Origin, Selector, content_digest};
use kiln_store::{LayerRef, RecordType, StoreError, View};

use crate::error::{OpError, Result};
use crate::key::ContentSelector;

/// Where the files of an input come from.
pub(crate) fn origin(layer: Option<&LayerRef>) -> Origin {
    match layer {
        Some(layer) if layer.record_type() == RecordType::Local => Origin::Local,
        _ => Origin::Snapshot,
    }
}

/// Digest over the checksums of `selectors`, in their order (cache-keys.md §3).
pub(crate) fn digest(view: &View, selectors: &[ContentSelector], origin: Origin, stop: &Stop) -> Result<Digest> {
    let selectors: Vec<Selector> = selectors.iter().map(selector).collect();
    content_digest(view, &selectors, origin, stop).map_err(|error| match error {
        // A path that is not there is told in the field's words.
        StoreError::Invalid(text) if text.ends_with("not found") => {
            OpError::missing(format!("failed to calculate checksum: {text}"))
        }
        other => other.into(),
    })
}

fn selector(s: &ContentSelector) -> Selector {
    Selector {
        path: s.path.clone(),
        wildcard: s.wildcard,
        follow_links: s.follow_links,
        include: s.include.clone(),
        exclude: s.exclude.clone(),
        required: s.required.clone(),
    }
}
