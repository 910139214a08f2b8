//! Files as one tar (exporter `tar`).

use std::io::{self, Read as _, Write};

use kiln_store::layer::write::{Header, TarWriter};
use kiln_store::{Kind, Stop};

use crate::error::ExportError;
use crate::files::{Item, Listing, What};
use crate::local::{device, open};

const COPY: usize = 256 << 10;

/// Writes a listing as tar: numeric owners, permissions and attributes of the result, hard links as links.
pub(crate) fn write(listing: &Listing, out: impl Write, stop: &Stop) -> Result<(), ExportError> {
    let mut tar = TarWriter::new(out);
    for item in &listing.items {
        stop.check()
            .map_err(|_| ExportError::Store(kiln_store::StoreError::Canceled))?;
        write_item(&mut tar, listing, item).map_err(ExportError::io(format!("failed to write {}", item.path)))?;
    }
    let mut out = tar.finish().map_err(ExportError::io("failed to end the archive"))?;
    out.flush().map_err(ExportError::io("failed to end the archive"))
}

fn write_item(tar: &mut TarWriter<impl Write>, listing: &Listing, item: &Item) -> io::Result<()> {
    let mut name = item.path.clone();
    let seconds = item.mtime.map(|t| t.seconds());
    let node = match &item.what {
        What::PlatformDir => {
            name.push('/');
            let mtime = seconds.unwrap_or(0);
            return tar.header(&Header {
                name: name.as_bytes(),
                typeflag: b'5',
                mode: 0o755,
                mtime,
                ..Header::default()
            });
        }
        What::Bytes(bytes) => {
            let mtime = seconds.unwrap_or(0);
            tar.header(&Header {
                name: name.as_bytes(),
                typeflag: b'0',
                mode: 0o600,
                size: bytes.len() as u64,
                mtime,
                ..Header::default()
            })?;
            return tar.data(bytes);
        }
        What::Node { view, node } => listing.views.get(*view).map(|v| v.entry(node)),
    };
    let entry = node.ok_or(io::ErrorKind::NotFound)?;
    let typeflag = match entry.kind {
        _ if item.hard_link.is_some() && entry.kind != Kind::Symlink => b'1',
        Kind::Regular => b'0',
        Kind::Symlink => b'2',
        Kind::CharDevice => b'3',
        Kind::BlockDevice => b'4',
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
        Kind::Socket | Kind::Whiteout => return Ok(()),
    };
    if typeflag == b'5' {
        name.push('/');
    }
    let linkname = match (typeflag, &item.hard_link) {
        (b'1', Some(first)) => first.as_bytes(),
        (b'2', _) => &entry.target,
        _ => &[],
    };
    let xattrs: Vec<(&[u8], &[u8])> = entry.xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    let size = if typeflag == b'0' { entry.size } else { 0 };
    tar.header(&Header {
        name: name.as_bytes(),
        typeflag,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        size,
        // Whole seconds, the nearest.
        mtime: seconds.unwrap_or(entry.mtime.secs + i64::from(entry.mtime.nanos >= 500_000_000)),
        linkname,
        device: if matches!(typeflag, b'3' | b'4') {
            device(entry.rdev)
        } else {
            (0, 0)
        },
        xattrs: &xattrs,
    })?;
    if typeflag == b'0' {
        let mut reader = open(&listing.views, item)?;
        let mut buf = vec![0; COPY];
        loop {
            match reader.read(&mut buf)? {
                0 => break,
                n => tar.data(buf.get(..n).unwrap_or_default())?,
            }
        }
    }
    Ok(())
}
