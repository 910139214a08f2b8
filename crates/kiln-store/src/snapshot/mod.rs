//! Snapshots: a view as a root that a process can run over, and what it wrote as a new tree.
//!
//! - [`overlay`]: the kernel stacks the trees; the step mounts them itself, in its own mount namespace.
//! - [`native`]: the view is copied into a directory, for hosts without overlayfs; afterwards the directory is compared.
//! - [`scan`]: reading an upper directory into entries, the common end of both.
//!
//! Both give trees of the same form, so a state directory may be used with either. One conformance suite runs over both
//! (`tests/snapshot.rs`).

pub mod native;
pub mod overlay;
pub mod scan;

use std::path::{Path, PathBuf};

use kiln_fs::Stop;

use crate::error::Result;
use crate::tree::{Tree, TreeBuilder};
use crate::view::View;

pub use native::Native;
pub use overlay::OverlayFs;

/// What the executor mounts as a root or as a read-only directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mount {
    /// An overlay of directories, to be mounted with `index=off,metacopy=off,redirect_dir=nofollow,xino=off`.
    Overlay {
        /// Read-only directories, **top first**; may be empty only if `writable` is given.
        lowers: Vec<PathBuf>,
        /// Upper and work directory; `None` for a read-only mount.
        writable: Option<(PathBuf, PathBuf)>,
    },
    /// A directory as it is.
    Bind {
        /// The directory.
        path: PathBuf,
        /// Whether it may be written to.
        readonly: bool,
    },
}

/// Turns views into roots.
pub trait Snapshotter: Send + Sync + std::fmt::Debug {
    /// The name that configuration and worker labels use.
    fn name(&self) -> &'static str;

    /// A writable root over `base`, whose changes will become the tree in `out`.
    ///
    /// # Errors
    /// I/O errors, and [`crate::StoreError::Canceled`] where files are copied.
    fn prepare(&self, base: &View, out: TreeBuilder, stop: &Stop) -> Result<ActiveRoot>;

    /// A read-only root. `scratch` is an empty directory that must outlive the mount.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    fn read_only(&self, base: &View, scratch: &Path, stop: &Stop) -> Result<Mount>;
}

/// A root that is being written to.
#[derive(Debug)]
pub struct ActiveRoot {
    base: View,
    out: TreeBuilder,
    mount: Mount,
    state: State,
}

#[derive(Debug)]
enum State {
    Overlay,
    Native(native::Materialised),
}

impl ActiveRoot {
    /// What to mount.
    pub fn mount(&self) -> &Mount {
        &self.mount
    }

    /// What lies below.
    pub fn base(&self) -> &View {
        &self.base
    }

    /// The directory of the tree under construction (`fs` and scratch directories are in it).
    pub fn dir(&self) -> &Path {
        self.out.dir()
    }

    /// Reads what was written into a tree. Nothing may be mounted from, or written to, this snapshot any more. What is
    /// left in [`dir`](Self::dir) beside `fs` and `manifest` may be removed afterwards.
    ///
    /// # Errors
    /// I/O errors and [`crate::StoreError::Canceled`].
    pub fn seal(self, stop: &Stop) -> Result<Tree> {
        match self.state {
            State::Overlay => {}
            State::Native(work) => work.move_changes(&self.base, &self.out, stop)?,
        }
        let entries = scan::upper(&self.out, stop)?;
        crate::union::seal_entries(&self.base, self.out, entries, None, stop)
    }
}
