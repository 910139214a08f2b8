//! Files into a directory of the client (exporter `local`).

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use kiln_oci::Timestamp;
use kiln_session::fsutil::{Entry, TreeFiles, TreeSource, go_mode};
use kiln_session::{Session, SessionError};
use kiln_store::{Kind, Node, View};
use parking_lot::Mutex;

use crate::error::ExportError;
use crate::files::{Item, Listing, What};
use crate::progress::{ExportProgress, Status};

/// Progress is reported at most this often.
const REPORT_EVERY: Duration = Duration::from_millis(100);
const DIR_MODE: u32 = 0o40_755;
const STATEMENT_MODE: u32 = 0o100_600;

/// Sends a listing. `id` is the status that counts the bytes.
pub(crate) async fn send(
    session: &Session,
    exporter: usize,
    listing: Listing,
    multi_platform: bool,
    id: String,
    progress: &Arc<dyn ExportProgress>,
) -> Result<(), ExportError> {
    let meter = Arc::new(Meter {
        state: Mutex::new((0, Instant::now(), Status::begin(progress, id))),
    });
    let source = Source {
        listing: Arc::new(listing),
        at: 0,
        meter,
    };
    session
        .send_directory(exporter, source, multi_platform, &BTreeMap::new())
        .await
        .map_err(|e| match e {
            SessionError::Canceled(_) => ExportError::Store(kiln_store::StoreError::Canceled),
            other => other.into(),
        })?;
    Ok(())
}

/// Counts bytes as they are read.
struct Meter {
    state: Mutex<(u64, Instant, Status)>,
}

impl Meter {
    fn add(&self, bytes: usize) {
        let mut state = self.state.lock();
        let (total, last, status) = &mut *state;
        *total += bytes as u64;
        if last.elapsed() >= REPORT_EVERY {
            *last = Instant::now();
            status.at(*total);
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let (total, _, status) = self.state.get_mut();
        status.at(*total);
    }
}

struct Source {
    listing: Arc<Listing>,
    at: usize,
    meter: Arc<Meter>,
}

impl TreeSource for Source {
    fn next(&mut self) -> io::Result<Option<Entry>> {
        let Some(item) = self.listing.items.get(self.at) else {
            return Ok(None);
        };
        self.at += 1;
        Ok(Some(entry(&self.listing, item)))
    }

    fn files(&self) -> Arc<dyn TreeFiles> {
        let by_path = self
            .listing
            .items
            .iter()
            .enumerate()
            .map(|(i, item)| (item.path.clone(), i));
        Arc::new(Files {
            by_path: by_path.collect(),
            listing: self.listing.clone(),
            meter: self.meter.clone(),
        })
    }
}

fn nanos(t: Timestamp) -> i64 {
    t.seconds()
        .saturating_mul(1_000_000_000)
        .saturating_add(i64::from(t.nanos()))
}

/// An item as it is listed.
fn entry(listing: &Listing, item: &Item) -> Entry {
    let mut out = Entry {
        path: item.path.clone(),
        ..Entry::default()
    };
    match &item.what {
        What::PlatformDir => out.mode = go_mode(DIR_MODE),
        What::Bytes(bytes) => {
            out.mode = go_mode(STATEMENT_MODE);
            out.size = bytes.len() as u64;
        }
        What::Node { view, node } => {
            let Some(view) = listing.views.get(*view) else {
                return out;
            };
            let e = view.entry(node);
            out.mode = go_mode(e.st_mode());
            (out.uid, out.gid) = (e.uid, e.gid);
            out.mtime = nanos(Timestamp::new(e.mtime.secs, e.mtime.nanos));
            match e.kind {
                Kind::Regular => out.size = e.size,
                Kind::Symlink => out.linkname = String::from_utf8_lossy(&e.target).into_owned(),
                Kind::CharDevice | Kind::BlockDevice => out.device = device(e.rdev),
                _ => {}
            }
            if let Some(first) = &item.hard_link {
                out.size = 0;
                if e.kind != Kind::Symlink {
                    out.linkname.clone_from(first);
                }
            }
            for (name, value) in &e.xattrs {
                out.xattrs.insert(
                    String::from_utf8_lossy(name).into_owned(),
                    Bytes::copy_from_slice(value),
                );
            }
        }
    }
    if let Some(mtime) = item.mtime {
        out.mtime = nanos(mtime);
    }
    out
}

/// Major and minor number of a raw device number, as Linux packs them.
pub(crate) fn device(rdev: u64) -> (u32, u32) {
    let major = ((rdev >> 8) & 0xfff) | ((rdev >> 32) & !0xfff);
    let minor = (rdev & 0xff) | ((rdev >> 12) & !0xff);
    (
        u32::try_from(major & 0xffff_ffff).unwrap_or(0),
        u32::try_from(minor & 0xffff_ffff).unwrap_or(0),
    )
}

struct Files {
    by_path: HashMap<String, usize>,
    listing: Arc<Listing>,
    meter: Arc<Meter>,
}

impl TreeFiles for Files {
    fn open(&self, path: &str) -> io::Result<Box<dyn Read + Send>> {
        let item = self
            .by_path
            .get(path)
            .and_then(|i| self.listing.items.get(*i))
            .ok_or(io::ErrorKind::NotFound)?;
        let inner = open(&self.listing.views, item)?;
        Ok(Box::new(Counted {
            inner,
            meter: self.meter.clone(),
        }))
    }
}

/// The content of a regular item.
pub(crate) fn open(views: &[View], item: &Item) -> io::Result<Box<dyn Read + Send>> {
    match &item.what {
        What::Bytes(bytes) => Ok(Box::new(bytes.clone().reader())),
        What::Node { view, node } => {
            let view = views.get(*view).ok_or(io::ErrorKind::NotFound)?;
            open_node(view, node)
        }
        What::PlatformDir => Err(io::ErrorKind::IsADirectory.into()),
    }
}

fn open_node(view: &View, node: &Node) -> io::Result<Box<dyn Read + Send>> {
    Ok(Box::new(view.open(node).map_err(io::Error::other)?))
}

struct Counted {
    inner: Box<dyn Read + Send>,
    meter: Arc<Meter>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.meter.add(n);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_unpacked_as_linux_packs_them() {
        // makedev(8, 1), makedev(0x123, 0x45678)
        assert_eq!(device(0x801), (8, 1));
        assert_eq!(device(0x1_2378 | (0x456 << 20)), (0x123, 0x45678));
    }
}
