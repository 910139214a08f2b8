//! Directories under `active/` in which a tree comes to be, and how one becomes a layer.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_oci::ChainId;

use crate::error::{IoContext as _, Result, StoreError};
use crate::ids::{DirId, LayerId, Tenant, Time, TreeId};
use crate::layer_ref::{LayerMeta, LayerRef};
use crate::layer_table::{LayerRecord, TreeEntry, TreeRecord};
use crate::ledger::Area;
use crate::record_file;
use crate::store::Store;
use crate::tree::{self, Tree, TreeBuilder};
use crate::view::View;

/// A directory in which a new layer over `parent` is made: by a process through a mount, or by a writer of this crate.
/// Dropping it without [`commit`](Self::commit) removes it.
#[derive(Debug)]
pub struct ActiveSnapshot {
    store: Arc<Store>,
    tenant: Tenant,
    parent: Option<LayerRef>,
    base: View,
    dir: PathBuf,
    done: bool,
}

impl Store {
    /// Starts a layer over `parent`, of which `base` is the realised view ([`Store::realize`]).
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn new_active(
        self: &Arc<Self>,
        tenant: &Tenant,
        parent: Option<&LayerRef>,
        base: &View,
    ) -> Result<ActiveSnapshot> {
        let dir = self.dir.part("active").join(DirId::random().as_str());
        fs::create_dir(&dir).during("create", &dir)?;
        Ok(ActiveSnapshot {
            store: self.clone(),
            tenant: tenant.clone(),
            parent: parent.cloned(),
            base: base.clone(),
            dir,
            done: false,
        })
    }
}

impl ActiveSnapshot {
    /// The directory; `fs` in it will be the new layer's files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the new layer lies on.
    pub fn base(&self) -> &View {
        &self.base
    }

    /// The layer below.
    pub fn parent(&self) -> Option<&LayerRef> {
        self.parent.as_ref()
    }

    /// The store it belongs to.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// A builder that writes the new tree in this directory.
    ///
    /// # Errors
    /// If `fs` cannot be made.
    pub fn builder(&self) -> Result<TreeBuilder> {
        TreeBuilder::create(&self.dir, self.store.overlay)
    }

    /// Turns the finished tree (its manifest is written in [`dir`](Self::dir)) into a layer over the parent.
    ///
    /// # Errors
    /// If there is no manifest, or the tree cannot be moved. That its record cannot be written is no error: the layer
    /// then lives until the daemon ends.
    pub fn commit(mut self, meta: LayerMeta) -> Result<LayerRef> {
        let parent_chain = self.parent.as_ref().map(LayerRef::chain_id);
        let chain = match (meta.diff_id, parent_chain) {
            (Some(diff), None) => ChainId::of(&[diff]),
            (Some(diff), Some(Some(below))) => Some(below.extend(diff)),
            _ => None,
        };
        let record = LayerRecord {
            id: LayerId::random(),
            tenant: self.tenant.clone(),
            parent: self.parent.as_ref().map(|p| p.id().clone()),
            origin: None,
            tree: Some(TreeId::random()),
            diff_id: meta.diff_id,
            chain,
            blobs: Vec::new(),
            record_type: meta.record_type,
            description: meta.description,
            created_at: Time::now(),
        };
        let placed = self.place(record)?;
        self.store.enter_layer(placed, false)
    }

    /// Moves the tree to its place and enters it in the tables, with the record of the layer that it is made for.
    pub(crate) fn place(&mut self, mut record: LayerRecord) -> Result<LayerRecord> {
        let store = self.store.clone();
        let usage = Tree::open(&self.dir).usage()?;
        self.strip()?;
        let id = record.tree.get_or_insert_with(TreeId::random).clone();
        let below = store.records_without_tree(self.parent.as_ref());
        let writing = store.epochs.enter();
        let extra = crate::ledger::disk_usage(&self.dir.join(tree::MANIFEST))? + 2 * 4096;
        let disk = usage.bytes + extra;
        let described = TreeRecord {
            id: id.clone(),
            epoch: writing.epoch(),
            disk,
            layer: record.clone(),
            below,
        };
        if let Err(error) = record_file::write(&self.dir.join("record"), &described) {
            if !error.is_no_space() {
                return Err(error);
            }
            tracing::warn!(%error, "result not cached: the record of a tree could not be written");
        }
        let path = store.dir.tree(&id);
        fs::rename(&self.dir, &path).during("rename", &self.dir)?;
        self.done = true;
        store.ledger.add(Area::Trees, disk);
        store.layers.lock().trees.insert(
            id.clone(),
            TreeEntry {
                record: described.clone(),
                layers: 0,
            },
        );
        let mut batch = crate::meta::Batch::new();
        batch.put(crate::meta::Table::Trees, id.as_str(), &described)?;
        store.commit_or_warn(&batch, "tree");
        drop(writing);
        store.settle_limit()?;
        Ok(record)
    }

    /// Removes what mounts left beside the tree (work directories).
    fn strip(&self) -> Result<()> {
        let keep = [tree::FS, tree::MANIFEST, tree::DIGESTS];
        for entry in fs::read_dir(&self.dir).during("list", &self.dir)? {
            let entry = entry.during("list", &self.dir)?;
            if !keep.iter().any(|k| entry.file_name() == *k) {
                self.store.trash.discard(&self.store, &entry.path(), Area::Active, 0)?;
            }
        }
        if !self.dir.join(tree::MANIFEST).exists() {
            return Err(StoreError::Invalid(format!(
                "commit {}: the tree has no manifest",
                self.dir.display()
            )));
        }
        Ok(())
    }
}

impl Drop for ActiveSnapshot {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = self.store.trash.discard(&self.store, &self.dir, Area::Active, 0)
        {
            tracing::warn!(%error, "an abandoned snapshot stays until the next start");
        }
    }
}

impl Store {
    /// Records of the layers from `parent` down that no tree record describes: those that repeat others, and those
    /// that share a tree made for another layer.
    pub(crate) fn records_without_tree(&self, parent: Option<&LayerRef>) -> Vec<LayerRecord> {
        let mut found = Vec::new();
        let Some(parent) = parent else { return found };
        let nodes = parent.node.chain();
        let table = self.layers.lock();
        for node in nodes {
            for id in [Some(&node.id), node.origin.as_ref().map(|o| &o.id)]
                .into_iter()
                .flatten()
            {
                let Some(entry) = table.layers.get(id) else { continue };
                let tree = entry.record.tree.as_ref().and_then(|tree| table.trees.get(tree));
                if tree.is_none_or(|t| t.record.layer.id != *id) {
                    found.push(entry.record.clone());
                }
            }
        }
        found
    }
}
