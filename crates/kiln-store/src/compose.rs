//! Layers from layers: lazy ones by description, several on top of each other, the difference of two.

use std::sync::Arc;

use kiln_oci::ChainId;

use crate::error::{Result, StoreError};
use crate::ids::{LayerId, Tenant, Time};
use crate::in_flight::blocking;
use crate::layer_ref::{LayerMeta, LayerRef, LazyLayer};
use crate::layer_table::LayerRecord;
use crate::provider::{BlobProvider, Providers};
use crate::realize::RealizeCtx;
use crate::store::Store;
use crate::view::View;

impl Store {
    /// A layer of which only the blob is known, over `parent`. An equal one (same blob over the same chain) is found
    /// again; one whose chain was unpacked before, from whatever blob, has its tree at once. Does not fetch anything.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the diff ids below are not all known.
    pub fn lazy_layer(
        self: &Arc<Self>,
        tenant: &Tenant,
        parent: Option<&LayerRef>,
        lazy: &LazyLayer,
        provider: Option<Arc<dyn BlobProvider>>,
    ) -> Result<LayerRef> {
        let chain = match parent {
            None => ChainId(lazy.diff_id.digest()),
            Some(parent) => {
                let below = parent.chain_id().ok_or_else(|| {
                    StoreError::Invalid(format!(
                        "layer {} lies over one whose diff id is not known",
                        lazy.blob.digest
                    ))
                })?;
                below.extend(lazy.diff_id)
            }
        };
        let providers = provider
            .map(|p| Providers::of([lazy.blob.digest], p))
            .unwrap_or_default();
        let providers = parent.map_or_else(|| providers.clone(), |p| p.providers().merged(&providers));
        let known = {
            let table = self.layers.lock();
            table.lazies.get(&(tenant.clone(), chain, lazy.blob.digest)).cloned()
        };
        if let Some(layer) = known.and_then(|id| self.layer(tenant, &id)) {
            return Ok(layer.with_providers(&providers));
        }
        let record = LayerRecord {
            id: LayerId::random(),
            tenant: tenant.clone(),
            parent: parent.map(|p| p.id().clone()),
            origin: None,
            tree: None,
            diff_id: Some(lazy.diff_id),
            chain: Some(chain),
            blobs: vec![lazy.blob.clone()],
            record_type: lazy.record_type,
            description: lazy.description.clone(),
            created_at: lazy.created_at.unwrap_or_else(Time::now),
        };
        let layer = self.enter_layer(record, false)?.with_providers(&providers);
        Ok(layer)
    }

    /// The layers of several inputs on top of each other: what later ones have covers earlier ones, and what they delete
    /// is deleted. Nothing is fetched or copied.
    ///
    /// # Errors
    /// If a record cannot be entered.
    pub fn merge(
        self: &Arc<Self>,
        tenant: &Tenant,
        inputs: &[Option<LayerRef>],
        description: &str,
    ) -> Result<Option<LayerRef>> {
        let mut merged: Option<LayerRef> = None;
        for input in inputs.iter().flatten() {
            merged = Some(match merged {
                None => input.clone(),
                Some(below) => self.repeat(tenant, Some(below), &input.layers(), input.providers(), description)?,
            });
        }
        Ok(merged)
    }

    /// What `upper` has over `lower`, as layers over nothing. Where `upper` is built on `lower` that is a matter of
    /// records; otherwise both are realised and compared.
    ///
    /// # Errors
    /// As [`realize`](Self::realize).
    pub async fn diff(
        self: &Arc<Self>,
        tenant: &Tenant,
        lower: Option<&LayerRef>,
        upper: Option<&LayerRef>,
        description: &str,
        ctx: &RealizeCtx,
    ) -> Result<Option<LayerRef>> {
        let below = lower.map(LayerRef::layers).unwrap_or_default();
        let above = upper.map(LayerRef::layers).unwrap_or_default();
        let equal = |a: &LayerRef, b: &LayerRef| {
            a == b || a.node.owner().id == b.node.owner().id || (a.chain_id().is_some() && a.chain_id() == b.chain_id())
        };
        let built_on = below.len() <= above.len() && below.iter().zip(&above).all(|(a, b)| equal(a, b));
        if built_on {
            let Some(upper) = upper else { return Ok(None) };
            let rest = above.get(below.len()..).unwrap_or_default();
            if below.is_empty() {
                return Ok(Some(upper.clone()));
            }
            if rest.is_empty() {
                return Ok(None);
            }
            return self
                .repeat(tenant, None, rest, upper.providers(), description)
                .map(Some);
        }
        let lower_view = self.realize(lower, ctx).await?;
        let upper_view = self.realize(upper, ctx).await?;
        let (store, tenant, description) = (self.clone(), tenant.clone(), description.to_owned());
        let layer = blocking("comparing layers", move |stop| {
            let active = store.new_active(&tenant, None, &View::scratch())?;
            crate::union::stack::diff_views(&lower_view, &upper_view, active.builder()?, stop)?;
            active.commit(LayerMeta {
                description,
                ..LayerMeta::default()
            })
        })
        .await?;
        Ok(Some(layer))
    }

    /// The same layers over another parent.
    fn repeat(
        self: &Arc<Self>,
        tenant: &Tenant,
        parent: Option<LayerRef>,
        layers: &[LayerRef],
        providers: &Providers,
        description: &str,
    ) -> Result<LayerRef> {
        let providers = parent
            .as_ref()
            .map_or_else(Providers::default, |p| p.providers().clone())
            .merged(providers);
        let mut top = parent;
        for layer in layers {
            let owner = layer.node.owner();
            let known = {
                let table = self.layers.lock();
                let key = (top.as_ref().map(|t| t.id().clone()), owner.id.clone());
                table.repeated.get(&key).cloned()
            };
            if let Some(found) = known.and_then(|id| self.layer(tenant, &id)) {
                top = Some(found);
                continue;
            }
            let diff_id = layer.diff_id();
            let chain = match (diff_id, &top) {
                (Some(diff), None) => ChainId::of(&[diff]),
                (Some(diff), Some(below)) => below.chain_id().map(|c| c.extend(diff)),
                (None, _) => None,
            };
            let record = LayerRecord {
                id: LayerId::random(),
                tenant: tenant.clone(),
                parent: top.as_ref().map(|t| t.id().clone()),
                origin: Some(owner.id.clone()),
                tree: None,
                diff_id,
                chain,
                blobs: Vec::new(),
                record_type: layer.record_type(),
                description: if description.is_empty() {
                    layer.description()
                } else {
                    description
                }
                .to_owned(),
                created_at: Time::now(),
            };
            top = Some(self.enter_layer(record, false)?);
        }
        let nothing = || StoreError::Invalid("no layers to put over another parent".into());
        Ok(top.ok_or_else(nothing)?.with_providers(&providers))
    }
}
