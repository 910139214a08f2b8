//! When what was written can be believed after a power cut.
//!
//! Every tree and blob record carries the epoch it was written in. Sealing an epoch waits for the writers inside it,
//! calls `syncfs`, and then records the seal. After the same boot everything written is there; after a reboot, on another
//! file system or on a rolled-back directory only sealed epochs are trusted.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use crate::error::{IoContext as _, Result};
use crate::layout::StateDir;
use crate::record_file;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Seal {
    sealed: u64,
    boot: String,
    file_system: u64,
    cookie: String,
}

#[derive(Debug, Default)]
struct State {
    current: u64,
    sealed: u64,
    writers: BTreeMap<u64, usize>,
    /// Whether anything was written in an epoch that is not sealed.
    dirty: bool,
}

/// The epochs of one state directory.
#[derive(Debug)]
pub(crate) struct Epochs {
    dir: Arc<StateDir>,
    identity: Seal,
    state: Mutex<State>,
    left: Condvar,
    sealing: Mutex<()>,
}

/// A writer inside an epoch: between placing bytes and having written the record that names them.
#[derive(Debug)]
pub(crate) struct Writing<'a> {
    epochs: &'a Epochs,
    epoch: u64,
}

impl Writing<'_> {
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut state = self.epochs.state.lock();
        if let Some(n) = state.writers.get_mut(&self.epoch) {
            *n -= 1;
            if *n == 0 {
                state.writers.remove(&self.epoch);
                self.epochs.left.notify_all();
            }
        }
    }
}

impl Epochs {
    /// Reads the seal. The second value is the last epoch that may be trusted.
    pub(crate) fn open(dir: Arc<StateDir>, cookie_dir: Option<PathBuf>) -> Result<(Self, u64)> {
        let path = dir.part("epoch");
        let was = match record_file::read::<Seal>(&path) {
            Ok(seal) => seal,
            Err(error) => {
                if !error.is_missing_file() {
                    tracing::warn!(%error, "no readable seal: nothing written since is trusted");
                }
                Seal::default()
            }
        };
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap_or_default()
            .trim()
            .to_owned();
        let file_system = dir.file_system()?;
        let cookie_file = cookie_dir.map(|d| d.join(format!("kiln-state-{}", cookie_name(&dir))));
        let cookie_was = cookie_file
            .as_ref()
            .and_then(|f| fs::read_to_string(f).ok())
            .unwrap_or_default();
        let same_boot = !boot.is_empty()
            && was.boot == boot
            && was.file_system == file_system
            && (cookie_file.is_none() || cookie_was == was.cookie);
        let trusted = if same_boot { u64::MAX } else { was.sealed };
        let mut identity = Seal {
            sealed: was.sealed,
            boot,
            file_system,
            cookie: String::new(),
        };
        if let Some(file) = cookie_file {
            let cookie = crate::ids::DirId::random().to_string();
            match fs::write(&file, &cookie) {
                Ok(()) => identity.cookie = cookie,
                Err(error) => {
                    // Without it the next start cannot tell this boot's directory from an older copy of it.
                    tracing::debug!(%error, file = %file.display(), "no cookie");
                }
            }
        }
        let state = State {
            current: was.sealed + 1,
            sealed: was.sealed,
            ..State::default()
        };
        let epochs = Self {
            dir,
            identity,
            state: Mutex::new(state),
            left: Condvar::new(),
            sealing: Mutex::new(()),
        };
        Ok((epochs, trusted))
    }

    /// Says which epochs were seen on disk, then records this boot: from here on its writes are told from older ones.
    pub(crate) fn start(&self, highest_seen: u64) -> Result<()> {
        let mut state = self.state.lock();
        state.current = state.current.max(highest_seen + 1);
        state.dirty |= highest_seen > state.sealed;
        let sealed = state.sealed;
        drop(state);
        self.record(sealed)
    }

    /// Enters the current epoch.
    pub(crate) fn enter(&self) -> Writing<'_> {
        let mut state = self.state.lock();
        let epoch = state.current;
        *state.writers.entry(epoch).or_default() += 1;
        state.dirty = true;
        Writing { epochs: self, epoch }
    }

    /// The epoch that is written in.
    #[cfg(test)]
    pub(crate) fn current(&self) -> u64 {
        self.state.lock().current
    }

    pub(crate) fn sealed(&self) -> u64 {
        self.state.lock().sealed
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.state.lock().dirty
    }

    /// Makes everything written before durable and records it. Returns the last sealed epoch.
    pub(crate) fn seal(&self) -> Result<u64> {
        let _one = self.sealing.lock();
        let ending = {
            let mut state = self.state.lock();
            if !state.dirty {
                return Ok(state.sealed);
            }
            let ending = state.current;
            state.current += 1;
            state.dirty = false;
            while state.writers.range(..=ending).next().is_some() {
                self.left.wait(&mut state);
            }
            ending
        };
        let done = self.dir.sync_fs().and_then(|()| self.record(ending));
        let mut state = self.state.lock();
        match done {
            Ok(()) => state.sealed = ending,
            Err(_) => state.dirty = true,
        }
        done.map(|()| ending)
    }

    fn record(&self, sealed: u64) -> Result<()> {
        let path = self.dir.part("epoch");
        let draft = self.dir.part(".epoch.next");
        record_file::write(
            &draft,
            &Seal {
                sealed,
                ..self.identity.clone()
            },
        )?;
        File::open(&draft).and_then(|f| f.sync_all()).during("sync", &draft)?;
        fs::rename(&draft, &path).during("rename", &draft)?;
        self.dir.handle().sync_all().during("sync", self.dir.root())
    }
}

fn cookie_name(dir: &StateDir) -> String {
    kiln_oci::Digest::of(dir.root().as_os_str().as_encoded_bytes()).short()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(root: &std::path::Path, cookies: Option<PathBuf>) -> (Epochs, u64) {
        let (dir, _) = StateDir::open(root, false).unwrap();
        Epochs::open(Arc::new(dir), cookies).unwrap()
    }

    #[test]
    fn a_rolled_back_directory_is_trusted_up_to_its_seal() {
        let (root, cookies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = Some(cookies.path().to_owned());
        let (epochs, _) = open(root.path(), at.clone());
        epochs.start(0).unwrap();
        let first = epochs.enter().epoch();
        assert_eq!(epochs.seal().unwrap(), first);
        let old = fs::read(root.path().join("epoch")).unwrap();
        assert!(epochs.enter().epoch() > first);
        drop(epochs);
        let (epochs, trusted) = open(root.path(), at.clone());
        assert_eq!(trusted, u64::MAX);
        epochs.start(7).unwrap();
        assert!(epochs.enter().epoch() > 7);
        drop(epochs);
        fs::write(root.path().join("epoch"), old).unwrap();
        let (_, trusted) = open(root.path(), at);
        assert_eq!(trusted, first);
    }

    #[test]
    fn a_seal_waits_for_writers_inside() {
        let root = tempfile::tempdir().unwrap();
        let (epochs, _) = open(root.path(), None);
        epochs.start(0).unwrap();
        let writing = epochs.enter();
        std::thread::scope(|scope| {
            let (said, heard) = std::sync::mpsc::channel();
            let epochs = &epochs;
            scope.spawn(move || said.send(epochs.seal().unwrap()).unwrap());
            while epochs.current() == writing.epoch() {
                std::thread::yield_now();
            }
            assert!(heard.try_recv().is_err());
            assert_eq!(epochs.sealed(), writing.epoch() - 1);
            let epoch = writing.epoch();
            drop(writing);
            assert_eq!(heard.recv().unwrap(), epoch);
        });
        assert_eq!(epochs.seal().unwrap(), epochs.sealed());
    }
}
