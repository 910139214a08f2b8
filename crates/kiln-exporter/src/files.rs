//! The files of a result as one listing: what `local` sends and what `tar` packs (solve.md §5).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;

use bytes::Bytes;
use kiln_oci::{Hasher, Timestamp, go_json};
use kiln_session::fsutil::compare_paths;
use kiln_store::{Kind, Node, Stop, View};

use crate::attestation::{Claim, StatementSubject};
use crate::error::ExportError;

/// What an item is.
#[derive(Clone, Debug)]
pub(crate) enum What {
    /// A directory that only separates platforms.
    PlatformDir,
    /// An entry of the platform's view.
    Node { view: usize, node: Node },
    /// A file made here.
    Bytes(Bytes),
}

/// One entry of the listing.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    /// Path as sent, without leading or trailing slash.
    pub(crate) path: String,
    pub(crate) what: What,
    /// Earlier path that this one is a further name of.
    pub(crate) hard_link: Option<String>,
    /// Time that replaces the entry's own.
    pub(crate) mtime: Option<Timestamp>,
}

/// One platform's files.
pub(crate) struct PlatformFiles {
    /// Platform id.
    pub(crate) id: String,
    pub(crate) view: View,
    pub(crate) epoch: Option<Timestamp>,
    /// Attestations that are written as files.
    pub(crate) claims: Vec<Claim>,
}

/// A listing of one or several platforms in walk order.
pub(crate) struct Listing {
    pub(crate) views: Vec<View>,
    pub(crate) items: Vec<Item>,
}

/// How platforms are laid out.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// A directory for each platform.
    pub(crate) split: bool,
    /// Names of attestation files carry the platform.
    pub(crate) platform_in_names: bool,
    pub(crate) attestation_prefix: String,
    /// Time of files made here, without an epoch.
    pub(crate) now: Timestamp,
}

/// The directory of a platform.
pub(crate) fn platform_dir(id: &str) -> String {
    id.replace('/', "_")
}

/// Lists everything. Blocking: attestations make it read every regular file once, for their digests.
pub(crate) fn list(platforms: &[PlatformFiles], layout: &Layout, stop: &Stop) -> Result<Listing, ExportError> {
    let mut listing = Listing {
        views: Vec::new(),
        items: Vec::new(),
    };
    let mut owners: HashMap<String, &str> = HashMap::new();
    let mut dirs: HashSet<String> = HashSet::new();
    for platform in platforms {
        let prefix = if layout.split {
            platform_dir(&platform.id)
        } else {
            String::new()
        };
        if layout.split {
            listing.items.push(Item {
                path: prefix.clone(),
                what: What::PlatformDir,
                hard_link: None,
                mtime: Some(platform.epoch.unwrap_or(Timestamp::new(0, 0))),
            });
        }
        let index = listing.views.len();
        listing.views.push(platform.view.clone());
        let mut items = walk(platform, index, &prefix, stop)?;
        statements(platform, layout, &prefix, &mut items, stop)?;
        for item in items {
            let is_dir = match &item.what {
                What::Node { node, .. } => platform.view.entry(node).kind.is_dir(),
                What::PlatformDir => true,
                What::Bytes(_) => false,
            };
            if is_dir {
                if !dirs.insert(item.path.clone()) {
                    continue;
                }
            } else if let Some(first) = owners.insert(item.path.clone(), &platform.id) {
                return Err(ExportError::Result(format!(
                    "cannot overwrite {} from {first} with {} when split option is disabled",
                    item.path, platform.id
                )));
            }
            listing.items.push(item);
        }
    }
    listing.items.sort_by(|a, b| compare_paths(&a.path, &b.path));
    Ok(listing)
}

fn walk(platform: &PlatformFiles, index: usize, prefix: &str, stop: &Stop) -> Result<Vec<Item>, ExportError> {
    let mut items = Vec::new();
    let Some(root) = platform.view.root() else {
        return Ok(items);
    };
    let mut links: HashMap<(usize, u32), String> = HashMap::new();
    for node in platform.view.walk(&root) {
        stop.check()
            .map_err(|_| ExportError::Store(kiln_store::StoreError::Canceled))?;
        let entry = platform.view.entry(&node);
        if matches!(entry.kind, Kind::Whiteout | Kind::Socket) {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path);
        let path = if prefix.is_empty() {
            name.into_owned()
        } else {
            format!("{prefix}/{name}")
        };
        let mut hard_link = None;
        if entry.link_group != 0 && !entry.kind.is_dir() {
            let key = (node.tree(), entry.link_group);
            match links.get(&key) {
                Some(first) => hard_link = Some(first.clone()),
                None => {
                    links.insert(key, path.clone());
                }
            }
        }
        items.push(Item {
            path,
            what: What::Node { view: index, node },
            hard_link,
            mtime: platform.epoch,
        });
    }
    Ok(items)
}

/// Adds the attestation files; their subjects are all regular files of the platform.
fn statements(
    platform: &PlatformFiles,
    layout: &Layout,
    prefix: &str,
    items: &mut Vec<Item>,
    stop: &Stop,
) -> Result<(), ExportError> {
    if platform.claims.is_empty() {
        return Ok(());
    }
    let mut subjects = Vec::new();
    for item in items.iter() {
        let What::Node { node, .. } = &item.what else { continue };
        let entry = platform.view.entry(node);
        if entry.kind == Kind::Regular {
            let name = item.path.strip_prefix(&format!("{prefix}/")).unwrap_or(&item.path);
            subjects.push(StatementSubject::sha256(name, hash(&platform.view, node, stop)?));
        }
    }
    let mut made: BTreeMap<String, Bytes> = BTreeMap::new();
    for claim in &platform.claims {
        let statement = claim.statement(&subjects)?;
        let text = String::from_utf8_lossy(&statement);
        let base = claim.path.rsplit('/').next().unwrap_or_default();
        let mut name = format!("{}{base}", layout.attestation_prefix);
        if layout.platform_in_names {
            let (stem, extension) = match name.rfind('.') {
                Some(at) => name.split_at(at),
                None => (name.as_str(), ""),
            };
            name = format!("{stem}.{}{extension}", platform_dir(&platform.id));
        }
        if made.insert(name.clone(), go_json::indent(&text).into()).is_some() {
            return Err(ExportError::Result(format!("duplicate attestation path name {name}")));
        }
    }
    for (name, bytes) in made {
        let path = if prefix.is_empty() {
            name
        } else {
            format!("{prefix}/{name}")
        };
        // A file of the result with the same name gives way, as in a later layer.
        items.retain(|i| i.path != path);
        let mtime = Some(platform.epoch.unwrap_or(layout.now));
        items.push(Item {
            path,
            what: What::Bytes(bytes),
            hard_link: None,
            mtime,
        });
    }
    Ok(())
}

fn hash(view: &View, node: &Node, stop: &Stop) -> Result<kiln_oci::Digest, ExportError> {
    let mut file = view.open(node)?;
    let mut hasher = Hasher::new();
    let mut buf = vec![0; 1 << 20];
    loop {
        stop.check()
            .map_err(|_| ExportError::Store(kiln_store::StoreError::Canceled))?;
        let n = file
            .read(&mut buf)
            .map_err(ExportError::io("failed to read a file of the result"))?;
        if n == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(buf.get(..n).unwrap_or_default());
    }
}
