//! Opening a state directory: what is whole is taken over, what is not is thrown away, and it is said which.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_fs::Dir;
use kiln_oci::Digest;
use parking_lot::Mutex;

use crate::content::{BlobEntry, BlobRecord};
use crate::epoch::Epochs;
use crate::error::{IoContext as _, Result, StoreError};
use crate::ids::{LayerId, TreeId};
use crate::layer_table::{LayerRecord, LayerTable, LayerUsage, TreeEntry, TreeRecord};
use crate::layout::StateDir;
use crate::ledger::{Area, Ledger};
use crate::meta::{Batch, Index, IndexOpened, Table};
use crate::record_file;
use crate::records::StoredRecord;
use crate::store::{SnapshotterChoice, Store, StoreConfig};
use crate::tree::{self, OverlayXattr};

/// What opening found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// The directory did not exist or was empty.
    pub new: bool,
    /// Why the index was rebuilt from the records beside trees and blobs; `None` if it was not.
    pub rebuilt: Option<String>,
    /// Commits taken from the index' journal.
    pub replayed: usize,
    /// The index was rewritten because it was mostly dead data.
    pub compacted: bool,
    /// The ballast file was given up, because the disk is full.
    pub ballast_freed: bool,
    /// Trees, blobs, layers and cache records in use after opening.
    pub trees: usize,
    /// See [`trees`](Self::trees).
    pub blobs: usize,
    /// See [`trees`](Self::trees).
    pub layers: usize,
    /// Trees and blobs dropped because they were written after the last seal, and the machine has been restarted.
    pub unsealed: usize,
    /// Trees, blobs and layers dropped because they, or what they stand on, are not whole.
    pub incomplete: usize,
}

/// Everything read from disk before it is believed.
#[derive(Default)]
struct Found {
    layers: HashMap<LayerId, LayerRecord>,
    usage: HashMap<LayerId, LayerUsage>,
    trees: HashMap<TreeId, TreeRecord>,
    blobs: HashMap<Digest, BlobRecord>,
    saves: Vec<StoredRecord>,
    /// What is found beside trees and blobs, and is not in the index.
    news: Batch,
}

pub(crate) fn open(config: StoreConfig) -> Result<(Arc<Store>, OpenReport)> {
    let overlay = detect_overlay(&config)?;
    let (dir, new) = StateDir::open(&config.root, overlay == OverlayXattr::User)?;
    let dir = Arc::new(dir);
    let mut report = OpenReport {
        new,
        ..OpenReport::default()
    };
    let (index, opened) = open_index(&dir, &mut report)?;
    report.replayed = opened.replayed;
    report.compacted = opened.compacted;
    if opened.forgot_notes {
        tracing::info!("the index held too many notes; they are made again when needed");
    }
    report.rebuilt = if new { None } else { opened.rebuild };
    let (epochs, trusted) = Epochs::open(dir.clone(), config.cookie_dir.clone())?;
    let ledger = Ledger::new(dir.clone(), config.limit);
    let native = match config.snapshotter {
        SnapshotterChoice::Native => true,
        choice => match probe_overlay(&dir, overlay) {
            Ok(()) => false,
            Err(error) if choice == SnapshotterChoice::Auto => {
                tracing::warn!(%error, "overlayfs cannot be used here: snapshots are full copies");
                true
            }
            Err(error) => return Err(StoreError::Unsupported(format!("overlay snapshots: {error}"))),
        },
    };
    let store = Arc::new(Store {
        dir,
        overlay,
        native,
        index,
        epochs,
        ledger,
        config,
        blobs: crate::content::BlobTable::default(),
        layers: Mutex::default(),
        saving: Mutex::new(()),
        record_use: crate::records::RecordUse::default(),
        in_flight: crate::in_flight::InFlight::default(),
        cache_mounts: crate::cache_mount::Table::default(),
        contexts: crate::context::Table::default(),
        histories: crate::history::Table::default(),
        trash: crate::trash::Trash::default(),
        keeper: crate::keeper::Keeper::default(),
        collecting: Mutex::default(),
    });
    store.trash.adopt(&store)?;
    let mut found = Found::default();
    store.read_index(&mut found)?;
    store.compare_with_disk(&mut found, report.rebuilt.is_some(), &mut report)?;
    let highest = store.drop_unsealed(&mut found, trusted, &mut report)?;
    store.drop_incomplete(&mut found, &mut report)?;
    store.take_over(found)?;
    for entry in entries(&store.dir.part("active"))? {
        store
            .trash
            .discard(&store, &store.dir.part("active").join(entry), Area::Active, 0)?;
    }
    store.open_cache_mounts(trusted)?;
    store.open_contexts(trusted)?;
    store.open_history()?;
    store.open_ingest()?;
    store.epochs.start(highest)?;
    store.index.sync()?;
    store.ledger.add(Area::Ballast, store.dir.keep_ballast());
    {
        let table = store.layers.lock();
        (report.trees, report.layers) = (table.trees.len(), table.layers.len());
    }
    report.blobs = store.blobs.blobs.read().len();
    store.keeper.start(&store);
    store.keeper.wake();
    if let Some(reason) = &report.rebuilt {
        tracing::warn!(
            reason,
            trees = report.trees,
            layers = report.layers,
            "the index was rebuilt from the records on disk"
        );
    }
    Ok((store, report))
}

fn detect_overlay(config: &StoreConfig) -> Result<OverlayXattr> {
    fs::create_dir_all(&config.root).during("create", &config.root)?;
    Ok(OverlayXattr::detect(&Dir::open_ambient(&config.root)?))
}

/// Makes an overlay of this file system without mounting it anywhere.
fn probe_overlay(dir: &StateDir, overlay: OverlayXattr) -> Result<()> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    let probe = dir.part("active").join(format!("probe-{}", TreeId::random()));
    let tried = (|| {
        for part in ["lower", "upper", "work"] {
            fs::create_dir_all(probe.join(part)).during("create", probe.join(part))?;
        }
        let made = (|| {
            let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
            for (key, part) in [("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")] {
                rustix::mount::fsconfig_set_string(&context, key, probe.join(part))?;
            }
            if overlay == OverlayXattr::User {
                rustix::mount::fsconfig_set_flag(&context, "userxattr")?;
            }
            rustix::mount::fsconfig_create(&context)?;
            let flags = FsMountFlags::FSMOUNT_CLOEXEC;
            rustix::mount::fsmount(&context, flags, MountAttrFlags::empty()).map(drop)
        })();
        made.during("try an overlay in", &probe)
    })();
    if let Err(error) = kiln_fs::remove::remove_tree(
        &Dir::open_ambient(dir.part("active"))?,
        probe.file_name().unwrap_or_default(),
        &kiln_fs::Stop::new(),
    ) {
        tracing::debug!(%error, "the probe stays until the next start");
    }
    tried
}

fn open_index(dir: &StateDir, report: &mut OpenReport) -> Result<(Index, IndexOpened)> {
    let (at, aside) = (dir.part("index"), dir.part("trash"));
    match Index::open(&at, &aside) {
        Err(error) => {
            // The engine cannot open on a full disk: give it the space that was kept for this.
            if !dir.drop_ballast() {
                return Err(error);
            }
            report.ballast_freed = true;
            tracing::warn!(%error, "the index could not be opened; trying again with the ballast file freed");
            Index::open(&at, &aside)
        }
        opened => opened,
    }
}

fn entries(dir: &Path) -> Result<Vec<std::ffi::OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).during("list", dir)? {
        names.push(entry.during("list", dir)?.file_name());
    }
    Ok(names)
}

fn id_of<T: std::str::FromStr>(key: &[u8]) -> Option<T> {
    std::str::from_utf8(key).ok()?.parse().ok()
}

impl Store {
    fn read_index(&self, found: &mut Found) -> Result<()> {
        self.index.scan(Table::Layers, b"", |_, record: LayerRecord| {
            found.layers.insert(record.id.clone(), record);
            ControlFlow::Continue(())
        })?;
        self.index.scan(Table::Usage, b"", |key, usage: LayerUsage| {
            if let Some(id) = id_of(key) {
                found.usage.insert(id, usage);
            }
            ControlFlow::Continue(())
        })?;
        self.index.scan(Table::Trees, b"", |_, record: TreeRecord| {
            found.trees.insert(record.id.clone(), record);
            ControlFlow::Continue(())
        })?;
        self.index.scan(Table::Blobs, b"", |_, record: BlobRecord| {
            found.blobs.insert(record.info.digest, record);
            ControlFlow::Continue(())
        })
    }

    /// Directory names against the index: what only the disk has is read from its record, what only the index has is
    /// forgotten. With `thorough` the records saved beside trees are read as well.
    fn compare_with_disk(&self, found: &mut Found, thorough: bool, report: &mut OpenReport) -> Result<()> {
        let root = self.dir.part("trees");
        let mut there = HashSet::new();
        for name in entries(&root)? {
            let path = root.join(&name);
            let id: Option<TreeId> = name.to_str().and_then(|n| n.parse().ok());
            let known = id.as_ref().is_some_and(|id| found.trees.contains_key(id));
            if !known {
                match record_file::read::<TreeRecord>(&path.join("record")) {
                    Ok(record) if Some(&record.id) == id.as_ref() && path.join(tree::MANIFEST).exists() => {
                        found.news.put(Table::Trees, record.id.as_str(), &record)?;
                        for layer in record.below.iter().chain([&record.layer]) {
                            if !found.layers.contains_key(&layer.id) {
                                found.news.put(Table::Layers, layer.id.as_str(), layer)?;
                                found.layers.insert(layer.id.clone(), layer.clone());
                            }
                        }
                        found.trees.insert(record.id.clone(), record);
                    }
                    _ => {
                        report.incomplete += 1;
                        self.trash.discard(self, &path, Area::Trees, 0)?;
                        continue;
                    }
                }
            }
            let Some(id) = id else { continue };
            if thorough || !known {
                read_saves(&path, &mut found.saves);
            }
            there.insert(id);
        }
        let lost: Vec<_> = found.trees.keys().filter(|id| !there.contains(*id)).cloned().collect();
        for id in lost {
            tracing::info!(tree = %id, "a tree in the index is not on disk");
            found.trees.remove(&id);
            found.news.remove(Table::Trees, id.as_str());
            report.incomplete += 1;
        }
        self.compare_blobs(found, report)
    }

    fn compare_blobs(&self, found: &mut Found, report: &mut OpenReport) -> Result<()> {
        let root = self.dir.part("blobs/sha256");
        let names: HashSet<String> = entries(&root)?
            .into_iter()
            .filter_map(|n| n.into_string().ok())
            .collect();
        for name in &names {
            let path = root.join(name);
            let digest = name.strip_suffix(".record").unwrap_or(name);
            let digest: Option<Digest> = format!("sha256:{digest}").parse().ok();
            let whole = digest.is_some_and(|d| {
                names.contains(&d.hex())
                    && (found.blobs.contains_key(&d) || {
                        let record = record_file::read::<BlobRecord>(&self.blob_record_path(&d));
                        let size = fs::metadata(self.blob_path(&d)).map(|m| m.len()).ok();
                        record.is_ok_and(|record| {
                            let fits = record.info.digest == d && Some(record.info.size) == size;
                            if fits && found.news.put(Table::Blobs, d.as_bytes().to_vec(), &record).is_ok() {
                                found.blobs.insert(d, record);
                            }
                            fits
                        })
                    })
            });
            if !whole {
                report.incomplete += usize::from(!name.starts_with('.') && !name.ends_with(".record"));
                self.trash.discard(self, &path, Area::Blobs, 0)?;
            }
        }
        let lost: Vec<_> = found
            .blobs
            .keys()
            .filter(|d| !names.contains(&d.hex()))
            .copied()
            .collect();
        for digest in lost {
            found.blobs.remove(&digest);
            found.news.remove(Table::Blobs, digest.as_bytes().to_vec());
            report.incomplete += 1;
        }
        Ok(())
    }

    /// After a restart of the machine only sealed epochs are believed. Returns the highest epoch seen.
    fn drop_unsealed(&self, found: &mut Found, trusted: u64, report: &mut OpenReport) -> Result<u64> {
        let epochs = found
            .trees
            .values()
            .map(|t| t.epoch)
            .chain(found.blobs.values().map(|b| b.epoch));
        let highest = epochs.max().unwrap_or(0);
        let trees: Vec<_> = found
            .trees
            .values()
            .filter(|t| t.epoch > trusted)
            .map(|t| t.id.clone())
            .collect();
        for id in trees {
            found.trees.remove(&id);
            found.news.remove(Table::Trees, id.as_str());
            self.trash.discard(self, &self.dir.tree(&id), Area::Trees, 0)?;
            report.unsealed += 1;
        }
        let blobs: Vec<_> = found
            .blobs
            .values()
            .filter(|b| b.epoch > trusted)
            .map(|b| b.info.digest)
            .collect();
        for digest in blobs {
            found.blobs.remove(&digest);
            found.news.remove(Table::Blobs, digest.as_bytes().to_vec());
            self.trash
                .discard(self, &self.blob_record_path(&digest), Area::Blobs, 0)?;
            self.trash.discard(self, &self.blob_path(&digest), Area::Blobs, 0)?;
            report.unsealed += 1;
        }
        Ok(highest)
    }

    /// Layers whose tree or parents are gone go too; so do trees that no layer is left for.
    fn drop_incomplete(&self, found: &mut Found, report: &mut OpenReport) -> Result<()> {
        let mut sound: HashMap<LayerId, bool> = HashMap::new();
        let ids: Vec<LayerId> = found.layers.keys().cloned().collect();
        for id in ids {
            judge(&found.layers, &found.trees, &mut sound, id);
        }
        for (id, _) in sound.iter().filter(|(_, sound)| !**sound) {
            if found.layers.remove(id).is_some() {
                found.news.remove(Table::Layers, id.as_str());
                found.news.remove(Table::Usage, id.as_str());
                report.incomplete += 1;
            }
        }
        let used: HashSet<&TreeId> = found.layers.values().filter_map(|l| l.tree.as_ref()).collect();
        let loose: Vec<_> = found.trees.keys().filter(|id| !used.contains(id)).cloned().collect();
        for id in loose {
            found.trees.remove(&id);
            found.news.remove(Table::Trees, id.as_str());
            self.trash.discard(self, &self.dir.tree(&id), Area::Trees, 0)?;
            report.incomplete += 1;
        }
        Ok(())
    }

    /// Enters everything in the tables.
    fn take_over(self: &Arc<Self>, mut found: Found) -> Result<()> {
        let mut table = LayerTable::default();
        for (id, record) in found.trees {
            self.ledger.add(Area::Trees, record.disk);
            table.trees.insert(id, TreeEntry { record, layers: 0 });
        }
        {
            let mut blobs = self.blobs.blobs.write();
            for (digest, record) in found.blobs {
                self.ledger.add(Area::Blobs, record.disk);
                let last_used = record.info.created_at;
                blobs.insert(
                    digest,
                    BlobEntry {
                        record,
                        leases: 0,
                        last_used,
                        dying: false,
                    },
                );
            }
        }
        // Children are counted with their parents, so parents come first.
        let mut order: Vec<LayerId> = Vec::new();
        let mut entered = HashSet::new();
        for id in found.layers.keys() {
            let mut path = vec![id];
            while let Some(id) = path.last().copied() {
                let record = found.layers.get(id);
                let below = record
                    .into_iter()
                    .flat_map(|r| [&r.parent, &r.origin].into_iter().flatten());
                let missing: Vec<_> = below.filter(|b| !entered.contains(*b)).collect();
                if missing.is_empty() || path.len() > found.layers.len() {
                    path.pop();
                    if entered.insert(id.clone()) {
                        order.push(id.clone());
                    }
                } else {
                    path.extend(missing);
                }
            }
        }
        for id in order {
            let Some(record) = found.layers.remove(&id) else {
                continue;
            };
            let usage = found.usage.get(&id).copied();
            let usage = usage.unwrap_or(LayerUsage {
                last_used: record.created_at,
                count: 0,
            });
            table.insert(record, usage);
        }
        *self.layers.lock() = table;
        // The newest version of a record wins; one whose outputs are not all here is lost.
        found.saves.sort_by_key(|s| s.record.version);
        let mut newest: HashMap<crate::ids::RecordId, StoredRecord> = HashMap::new();
        for save in found.saves {
            newest.insert(save.record.id.clone(), save);
        }
        for save in newest.into_values() {
            let known = self.stored_record(&save.tenant, &save.record.id)?;
            if known.is_some_and(|k| k.record.version >= save.record.version) {
                continue;
            }
            let whole = {
                let mut table = self.layers.lock();
                for layer in &save.layers {
                    let below = [&layer.parent, &layer.origin];
                    let stands = below.into_iter().flatten().all(|id| table.layers.contains_key(id))
                        && layer.tree.as_ref().is_none_or(|t| table.trees.contains_key(t));
                    if stands && !table.layers.contains_key(&layer.id) {
                        found.news.put(Table::Layers, layer.id.as_str(), layer)?;
                        table.insert(
                            layer.clone(),
                            LayerUsage {
                                last_used: layer.created_at,
                                count: 0,
                            },
                        );
                    }
                }
                save.record
                    .outputs
                    .iter()
                    .flatten()
                    .all(|id| table.layers.contains_key(id))
            };
            if whole {
                self.link_record(&mut found.news, &save)?;
            }
        }
        self.index.commit(&found.news)
    }

    /// Drafts that an earlier process left, for resuming.
    fn open_ingest(&self) -> Result<()> {
        let root = self.dir.part("ingest");
        for name in entries(&root)? {
            let path = root.join(&name);
            if name.to_str().is_none_or(|n| n.starts_with("draft-")) {
                fs::remove_file(&path).during("remove", &path)?;
                continue;
            }
            self.ledger.add(Area::Ingest, crate::ledger::disk_usage(&path)?);
        }
        Ok(())
    }

    /// Removes drafts that nobody touched for long.
    pub(crate) fn sweep_ingest(&self, grace: Duration) -> Result<()> {
        let root = self.dir.part("ingest");
        for name in entries(&root)? {
            let path = root.join(&name);
            let Ok(meta) = fs::metadata(&path) else { continue };
            let old = meta
                .modified()
                .ok()
                .and_then(|m| m.elapsed().ok())
                .is_some_and(|age| age > grace);
            let busy = name.to_str().is_some_and(|n| self.blobs.has_writer(n));
            if old && !busy && !name.to_string_lossy().starts_with("draft-") {
                use std::os::unix::fs::MetadataExt as _;
                self.trash.discard(self, &path, Area::Ingest, meta.blocks() * 512)?;
            }
        }
        Ok(())
    }
}

fn read_saves(tree: &Path, saves: &mut Vec<StoredRecord>) {
    let Ok(names) = entries(tree) else { return };
    for name in names {
        if name.to_str().is_some_and(|n| n.starts_with("save.")) {
            match record_file::read::<StoredRecord>(&tree.join(&name)) {
                Ok(save) => saves.push(save),
                Err(error) => tracing::info!(%error, "a cache record beside a tree is lost"),
            }
        }
    }
}

/// Decides for a layer and what is below it whether all of it is there. Without recursion: chains are long.
fn judge(
    layers: &HashMap<LayerId, LayerRecord>,
    trees: &HashMap<TreeId, TreeRecord>,
    sound: &mut HashMap<LayerId, bool>,
    id: LayerId,
) {
    let mut path = vec![id];
    let mut on_path: HashSet<LayerId> = HashSet::new();
    while let Some(id) = path.last().cloned() {
        if sound.contains_key(&id) {
            on_path.remove(&id);
            path.pop();
            continue;
        }
        let Some(record) = layers.get(&id) else {
            sound.insert(id, false);
            continue;
        };
        let below = [&record.parent, &record.origin].into_iter().flatten();
        let open: Vec<_> = below.clone().filter(|b| !sound.contains_key(*b)).cloned().collect();
        if open.is_empty() {
            let stands = below.into_iter().all(|b| sound.get(b).copied().unwrap_or(false))
                && record.tree.as_ref().is_none_or(|t| trees.contains_key(t));
            sound.insert(id, stands);
        } else if open.iter().any(|b| on_path.contains(b)) || !on_path.insert(id.clone()) {
            // A cycle: no record of this code makes one.
            sound.insert(id, false);
        } else {
            path.extend(open);
        }
    }
}
