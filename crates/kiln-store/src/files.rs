//! Writing many files of a tree: a few threads create, fill and finish them, while the caller goes on reading.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use crossbeam_channel::{Receiver, Sender, bounded};
use kiln_fs::xattr::Xattrs;
use kiln_fs::{Copier, Dir, Stop, Timestamp};
use rustix::fs::{Gid, Mode, Uid};

use crate::error::{Result, StoreError};
use crate::manifest::{Entry, Kind};
use crate::tree::{TreeBuilder, os_path};

/// Files up to this size are read whole and handed to another thread.
const SMALL: u64 = 256 << 10;
/// How much of a large file is moved between two looks at the stop flag.
const CHUNK: usize = 1 << 20;

/// One file to be made in one directory, with its final metadata.
#[derive(Debug)]
pub(crate) struct FileJob {
    dir: Arc<Dir>,
    name: Box<OsStr>,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
    xattrs: Xattrs,
    shown: Box<Path>,
}

impl FileJob {
    pub(crate) fn new(dir: Arc<Dir>, name: &[u8], entry: &Entry) -> Self {
        FileJob {
            dir,
            name: OsStr::from_bytes(name).into(),
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: entry.xattrs.clone(),
            shown: os_path(&entry.path).into(),
        }
    }

    fn create(&self) -> Result<File> {
        use rustix::fs::OFlags;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.dir, &*self.name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| StoreError::io("create", &self.shown, e))?;
        Ok(fd.into())
    }

    /// Owner, attributes, mode and time, in the order in which none undoes another.
    fn finish(&self, file: &File) -> Result<()> {
        let err = |action, e: rustix::io::Errno| StoreError::io(action, &self.shown, e);
        let owner = (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)));
        match rustix::fs::fchown(file, owner.0, owner.1) {
            Err(e) if e != UNMAPPED => return Err(err("set owner of", e)),
            _ => {}
        }
        for (name, value) in &self.xattrs {
            let set = rustix::fs::fsetxattr(file, &name[..], value, rustix::fs::XattrFlags::empty());
            if let Err(e) = set {
                tracing::debug!(path = %self.shown.display(), attribute = %String::from_utf8_lossy(name), error = %e, "attribute not set");
            }
        }
        rustix::fs::fchmod(file, Mode::from_raw_mode(self.mode)).map_err(|e| err("set mode of", e))?;
        rustix::fs::futimens(file, &kiln_fs::dir::timestamps(self.mtime)).map_err(|e| err("set time of", e))
    }

    /// Makes the file with these bytes.
    pub(crate) fn write_bytes(&self, data: &[u8]) -> Result<()> {
        let mut file = self.create()?;
        file.write_all(data)
            .map_err(|e| StoreError::io("write", &self.shown, e))?;
        self.finish(&file)
    }

    /// Makes the file as a copy of an open one.
    pub(crate) fn copy_from(&self, source: &File, copier: &Copier, stop: &Stop) -> Result<u64> {
        let file = self.create()?;
        let n = copier.copy(source, &file, stop)?;
        self.finish(&file)?;
        Ok(n)
    }

    /// Makes a link, device or fifo.
    pub(crate) fn create_special(&self, entry: &Entry) -> Result<()> {
        let name = Path::new(&*self.name);
        match entry.kind {
            Kind::Symlink => self.dir.symlink(OsStr::from_bytes(&entry.target), name)?,
            kind => self.dir.create_node(name, kind.file_type(), 0o600, entry.rdev)?,
        }
        set_owner(&self.dir, name, self.uid, self.gid)?;
        for (attribute, value) in &self.xattrs {
            if let Err(e) = self.dir.set_xattr(name, attribute, value) {
                tracing::debug!(path = %self.shown.display(), error = %e, "attribute not set");
            }
        }
        if entry.kind != Kind::Symlink {
            self.dir.set_mode(name, self.mode)?;
        }
        Ok(self.dir.set_mtime(name, self.mtime)?)
    }

    /// Makes the file from the next bytes of `input`; `pieces` says where they go in a sparse file.
    pub(crate) fn write_stream(
        &self,
        size: u64,
        pieces: Option<&[(u64, u64)]>,
        input: &mut impl Read,
        stop: &Stop,
    ) -> Result<()> {
        let file = self.create()?;
        let whole = [(0, size)];
        if pieces.is_some() {
            file.set_len(size)
                .map_err(|e| StoreError::io("resize", &self.shown, e))?;
        }
        let mut buf = vec![0; CHUNK.min(usize::try_from(size).unwrap_or(CHUNK).max(1))];
        for (offset, length) in pieces.unwrap_or(&whole) {
            let (mut at, end) = (*offset, offset.saturating_add(*length));
            while at < end {
                stop.check()?;
                let want = buf.len().min(usize::try_from(end - at).unwrap_or(CHUNK));
                let part = buf.get_mut(..want).unwrap_or_default();
                input
                    .read_exact(part)
                    .map_err(|e| StoreError::io("read", &self.shown, e))?;
                file.write_all_at(part, at)
                    .map_err(|e| StoreError::io("write", &self.shown, e))?;
                at += want as u64;
            }
        }
        self.finish(&file)
    }
}

type Work = Box<dyn FnOnce() -> Result<()> + Send>;

/// A pool of threads that make files. Lives for one [`run`](Writers::run).
pub(crate) struct Writers {
    queue: Sender<Work>,
    state: Arc<State>,
    stop: Stop,
}

#[derive(Default)]
struct State {
    open: Mutex<Open>,
    idle: Condvar,
    copier: Arc<Copier>,
}

#[derive(Default)]
struct Open {
    count: usize,
    error: Option<StoreError>,
}

impl State {
    fn lock(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(|p| p.into_inner())
    }
}

impl Writers {
    /// Runs `body` with a pool of `threads` threads; returns when all that was handed over is done.
    ///
    /// # Errors
    /// Of `body`, or the first one of the pool.
    pub(crate) fn run<T>(threads: usize, stop: &Stop, body: impl FnOnce(&Writers) -> Result<T>) -> Result<T> {
        let state = Arc::new(State::default());
        std::thread::scope(|scope| {
            let (queue, jobs) = bounded::<Work>(threads * 16);
            for _ in 0..threads.max(1) {
                let jobs: Receiver<Work> = jobs.clone();
                let state = &state;
                scope.spawn(move || {
                    while let Ok(work) = jobs.recv() {
                        let failed = state.lock().error.is_some();
                        // A panic must not leave the others waiting for a count that never falls.
                        let guarded = std::panic::AssertUnwindSafe(work);
                        let panicked = StoreError::Panicked { task: "file writer" };
                        let result = match failed {
                            true => Ok(()),
                            false => std::panic::catch_unwind(guarded).unwrap_or(Err(panicked)),
                        };
                        let mut open = state.lock();
                        open.count -= 1;
                        if let Err(e) = result {
                            open.error.get_or_insert(e);
                        }
                        if open.count == 0 {
                            state.idle.notify_all();
                        }
                    }
                });
            }
            drop(jobs);
            let writers = Writers {
                queue,
                state: state.clone(),
                stop: stop.clone(),
            };
            let result = body(&writers);
            let ended = writers.wait();
            drop(writers);
            match (result, ended) {
                (Ok(value), Ok(())) => Ok(value),
                (Err(e), _) | (_, Err(e)) => Err(e),
            }
        })
    }

    /// The copy ladder shared by all.
    pub(crate) fn copier(&self) -> &Arc<Copier> {
        &self.state.copier
    }

    /// The first error so far, if any.
    pub(crate) fn check(&self) -> Result<()> {
        match self.state.lock().error.take() {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    /// Waits until everything handed over is done.
    pub(crate) fn wait(&self) -> Result<()> {
        let mut open = self.state.lock();
        while open.count > 0 {
            open = self.state.idle.wait(open).unwrap_or_else(|p| p.into_inner());
        }
        open.error.take().map_or(Ok(()), Err)
    }

    /// Hands work over; waits while the queue is full.
    pub(crate) fn submit(&self, work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        self.state.lock().count += 1;
        let gone = |_| StoreError::Panicked { task: "file writer" };
        self.queue.send(Box::new(work)).map_err(gone)
    }

    /// Makes a file from the next bytes of `input`: small ones by the pool, large and sparse ones here.
    pub(crate) fn write(
        &self,
        job: FileJob,
        size: u64,
        pieces: Option<&[(u64, u64)]>,
        input: &mut impl Read,
    ) -> Result<()> {
        if size > SMALL || pieces.is_some() {
            return job.write_stream(size, pieces, input, &self.stop);
        }
        let mut data = vec![0; size as usize];
        input
            .read_exact(&mut data)
            .map_err(|e: io::Error| StoreError::io("read", &job.shown, e))?;
        self.submit(move || job.write_bytes(&data))
    }
}

/// Gives directories their final owner, mode, attributes and times, once nothing is created in them any more. Their
/// opaque marks are written as well.
pub(crate) fn finish_dirs(out: &TreeBuilder, dirs: &[&Entry], threads: usize, stop: &Stop) -> Result<()> {
    kiln_fs::parallel::for_each(dirs, if dirs.len() > 64 { threads } else { 1 }, |entry| {
        stop.check()?;
        if entry.opaque {
            out.put_opaque(&entry.path)?;
        }
        finish_dir(out.fs(), entry)
    })
}

/// Gives one directory below `fs` the owner, attributes, mode and time of its entry.
pub(crate) fn finish_dir(fs: &Dir, entry: &Entry) -> Result<()> {
    let path = os_path(&entry.path);
    set_owner(fs, path, entry.uid, entry.gid)?;
    for (name, value) in &entry.xattrs {
        if let Err(e) = fs.set_xattr(path, name, value) {
            tracing::debug!(path = %path.display(), error = %e, "attribute not set");
        }
    }
    fs.set_mode(path, entry.mode)?;
    Ok(fs.set_mtime(path, entry.mtime)?)
}

/// What the kernel answers to an owner that the user namespace does not map.
const UNMAPPED: rustix::io::Errno = rustix::io::Errno::INVAL;

/// Sets the owner of `path` itself. In a user namespace with few ids the file may have to stay with the daemon's user;
/// the manifest knows the right owner, and layers are written from that.
pub(crate) fn set_owner(fs: &Dir, path: &Path, uid: u32, gid: u32) -> Result<()> {
    match fs.set_owner(path, uid, gid) {
        Err(e) if e.raw_os_error() == Some(UNMAPPED.raw_os_error()) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_and_panics_of_the_pool_come_back() {
        let stop = Stop::new();
        let failed = Writers::run(2, &stop, |w| {
            for i in 0..100 {
                w.submit(move || {
                    if i == 50 {
                        Err(StoreError::Invalid("fifty".into()))
                    } else {
                        Ok(())
                    }
                })?;
            }
            Ok(())
        });
        assert!(matches!(failed, Err(StoreError::Invalid(t)) if t == "fifty"));
        let panicked = Writers::run(2, &stop, |w| {
            w.submit(|| panic!("in a job"))?;
            w.wait()
        });
        assert!(matches!(panicked, Err(StoreError::Panicked { .. })));
    }
}
