//! The overlay snapshotter: nothing is copied, nothing is mounted here; the step's own mount namespace does that.

use std::path::{Path, PathBuf};

use kiln_fs::Stop;

use super::{ActiveRoot, Mount, Snapshotter, State};
use crate::error::{IoContext, Result};
use crate::tree::{Tree, TreeBuilder};
use crate::view::View;

/// Name of the kernel's scratch directory beside `fs`.
const WORK: &str = "work";

/// Stacks trees with overlayfs.
#[derive(Clone, Copy, Debug, Default)]
pub struct OverlayFs;

fn lowers(base: &View) -> Vec<PathBuf> {
    base.trees()
        .iter()
        .rev()
        .map(Tree::fs_path)
        .map(Path::to_owned)
        .collect()
}

impl Snapshotter for OverlayFs {
    fn name(&self) -> &'static str {
        "overlayfs"
    }

    fn prepare(&self, base: &View, out: TreeBuilder, _stop: &Stop) -> Result<ActiveRoot> {
        // The upper's root is what the step sees as `/`, so it looks as the root did before.
        if let Some(root) = base.root() {
            let entry = base.entry(&root);
            crate::files::set_owner(out.fs(), Path::new(""), entry.uid, entry.gid)?;
            out.fs().set_mode("", entry.mode)?;
            out.fs().set_mtime("", entry.mtime)?;
        }
        let work = out.dir().join(WORK);
        std::fs::create_dir(&work).during("create directory", &work)?;
        let mount = Mount::Overlay {
            lowers: lowers(base),
            writable: Some((out.fs_path(), work)),
        };
        Ok(ActiveRoot {
            base: base.clone(),
            out,
            mount,
            state: State::Overlay,
        })
    }

    fn read_only(&self, base: &View, scratch: &Path, _stop: &Stop) -> Result<Mount> {
        Ok(match &lowers(base)[..] {
            [] => Mount::Bind {
                path: scratch.to_owned(),
                readonly: true,
            },
            // A single tree is itself what would be shown, but for whiteouts that hide nothing.
            [only] if !base.trees().first().is_some_and(has_whiteouts) => Mount::Bind {
                path: only.clone(),
                readonly: true,
            },
            [only] => Mount::Overlay {
                lowers: vec![only.clone(), scratch.to_owned()],
                writable: None,
            },
            many => Mount::Overlay {
                lowers: many.to_vec(),
                writable: None,
            },
        })
    }
}

fn has_whiteouts(tree: &Tree) -> bool {
    let whiteout = |e: &crate::manifest::Entry| e.kind == crate::manifest::Kind::Whiteout;
    tree.manifest().is_ok_and(|m| m.entries().iter().any(whiteout))
}
