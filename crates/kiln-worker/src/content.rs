//! The content digest of an input: what the paths an operation looks at hold.

use kiln_fs::Stop;
use kiln_oci::Digest;
use kiln_store::View;

use crate::error::OpError;
use crate::key::ContentSelector;

/// Digest over the checksums of `selectors`, in their order (cache-keys.md §3).
pub(crate) fn digest(_view: &View, _selectors: &[ContentSelector], _stop: &Stop) -> Result<Digest, OpError> {
    Err(OpError::user("content digests are not available yet"))
}
