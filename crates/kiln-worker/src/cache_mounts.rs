//! Cache mounts of a step: what it asks the store for, all at once and in a fixed order.

use std::sync::Arc;

use kiln_llb::op::{CacheSharing, ExecMount, ExecOp, MountType};
use kiln_store::{CacheMount, CacheMountRequest, LayerRef, Sharing, Store, Tenant, View};

use crate::error::OpError;

/// A step's cache mount and the position of the mount it is for.
#[derive(Debug)]
pub(crate) struct TakenCache {
    pub(crate) index: usize,
    pub(crate) mount: CacheMount,
}

/// Takes every cache mount of `op`, waiting for locked ones that others use. `base` gives a mount's input, realised.
///
/// With `fresh` (the step ignores the cache) they start empty. All are asked for in one call, ordered by id: two steps that want the same locked ones cannot wait for each other.
pub(crate) async fn take(
    store: &Arc<Store>,
    tenant: &Tenant,
    op: &ExecOp,
    fresh: bool,
    base: impl Fn(&ExecMount) -> Option<(LayerRef, View)>,
) -> Result<Vec<TakenCache>, OpError> {
    let mut wanted: Vec<(usize, CacheMountRequest)> = Vec::new();
    for (index, mount) in op
        .mounts
        .iter()
        .enumerate()
        .filter(|(_, m)| m.mount_type == MountType::Cache)
    {
        let options = mount.cache.clone().unwrap_or_default();
        if options.id.is_empty() {
            return Err(OpError::user(format!("cache mount {} has no id", mount.dest)));
        }
        let description = format!(
            "cached mount {} from exec {} with id {:?}",
            mount.dest,
            op.meta.args.join(" "),
            options.id
        );
        let sharing = match options.sharing {
            CacheSharing::Shared => Sharing::Shared,
            CacheSharing::Private => Sharing::Private,
            CacheSharing::Locked => Sharing::Locked,
        };
        let base = base(mount).map(|(layer, view)| (layer.id().clone(), view));
        wanted.push((
            index,
            CacheMountRequest {
                id: options.id,
                sharing,
                base,
                description,
                fresh,
            },
        ));
    }
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    wanted
        .sort_by(|(_, a), (_, b)| (&a.id, a.base.as_ref().map(|b| &b.0)).cmp(&(&b.id, b.base.as_ref().map(|b| &b.0))));
    let (indexes, requests): (Vec<usize>, Vec<CacheMountRequest>) = wanted.into_iter().unzip();
    let taken = store.cache_mounts(tenant, requests).await?;
    Ok(indexes
        .into_iter()
        .zip(taken)
        .map(|(index, mount)| TakenCache { index, mount })
        .collect())
}
