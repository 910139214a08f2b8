//! `rewrite-timestamp`: a layer once more, with the times of files no later than the epoch.

use std::io::{self, Read};

use kiln_oci::digest::DigestWriter;
use kiln_oci::{DiffId, media_type};
use kiln_store::compress::{Compressor, unpack};
use kiln_store::layer::read::{MemberKind, TarReader};
use kiln_store::layer::write::{Header, TarWriter};
use kiln_store::{Algorithm, BlobHandle, Compression, ContentStore, Stop, StoreError};

use crate::error::ExportError;

/// Repacks the blob with times clamped to `epoch` (seconds). `None` if nothing in it is later, or if it has members that
/// cannot be written again; then it is kept as it is.
pub(crate) fn clamp(
    content: &ContentStore,
    blob: &BlobHandle,
    compression: Compression,
    epoch: i64,
    stop: &Stop,
) -> Result<Option<(BlobHandle, DiffId)>, ExportError> {
    let failed = || ExportError::io(format!("failed to rewrite the times of layer {}", blob.digest()));
    let (_, input) = unpack(content.open(&blob.digest())?).map_err(failed())?;
    let mut writer = content.writer(None)?;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let compressor = Compressor::new(compression, threads, &mut writer).map_err(failed())?;
    let mut tar = TarWriter::new(DigestWriter::new(compressor));
    let changed = copy(input, &mut tar, epoch, stop)?;
    if changed != Some(true) {
        return Ok(None);
    }
    let (compressor, diff_id, _) = tar.finish().map_err(failed())?.finish();
    compressor.finish().map_err(failed())?;
    let diff_id = DiffId(diff_id);
    let kind = match compression.algorithm {
        Algorithm::Uncompressed => media_type::LayerCompression::Uncompressed,
        Algorithm::Gzip => media_type::LayerCompression::Gzip,
        Algorithm::Zstd => media_type::LayerCompression::Zstd,
    };
    writer.set_media_type(media_type::layer(kind, true));
    writer.set_diff_id(diff_id);
    Ok(Some((writer.commit(None)?, diff_id)))
}

/// Copies the archive; whether a time was changed, or `None` for members that cannot be copied.
fn copy(
    input: impl Read,
    tar: &mut TarWriter<impl io::Write>,
    epoch: i64,
    stop: &Stop,
) -> Result<Option<bool>, ExportError> {
    let failed = || ExportError::io("failed to rewrite the times of a layer");
    let mut reader = TarReader::new(input);
    let mut changed = false;
    let mut buf = vec![0; 1 << 20];
    while let Some(member) = reader.next_member().map_err(failed())? {
        stop.check().map_err(|_| ExportError::Store(StoreError::Canceled))?;
        if member.sparse.is_some() {
            return Ok(None);
        }
        let later = member.mtime.secs > epoch || (member.mtime.secs == epoch && member.mtime.nanos > 0);
        changed |= later;
        let typeflag = match member.kind {
            MemberKind::Regular => b'0',
            MemberKind::HardLink => b'1',
            MemberKind::Symlink => b'2',
            MemberKind::CharDevice => b'3',
            MemberKind::BlockDevice => b'4',
            MemberKind::Directory => b'5',
            MemberKind::Fifo => b'6',
        };
        let xattrs: Vec<(&[u8], &[u8])> = member.xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        let size = if typeflag == b'0' { member.size } else { 0 };
        tar.header(&Header {
            name: &member.name,
            typeflag,
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            size,
            mtime: if later { epoch } else { member.mtime.secs },
            linkname: &member.link,
            device: member.device,
            xattrs: &xattrs,
        })
        .map_err(failed())?;
        let mut left = size;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            let n = reader.read(buf.get_mut(..want).unwrap_or_default()).map_err(failed())?;
            if n == 0 {
                return Err(failed()(io::ErrorKind::UnexpectedEof.into()));
            }
            tar.data(buf.get(..n).unwrap_or_default()).map_err(failed())?;
            left -= n as u64;
        }
    }
    Ok(Some(changed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(mtime: i64) -> Vec<u8> {
        let mut tar = TarWriter::new(Vec::new());
        let file = Header {
            name: b"a/f",
            typeflag: b'0',
            mode: 0o644,
            size: 5,
            mtime,
            ..Header::default()
        };
        let dir = Header {
            name: b"a/",
            typeflag: b'5',
            mode: 0o755,
            mtime: 5,
            ..Header::default()
        };
        tar.header(&dir).unwrap();
        tar.header(&file).unwrap();
        tar.data(b"hello").unwrap();
        tar.finish().unwrap()
    }

    #[test]
    fn only_later_times_change() {
        let run = |input: &[u8]| {
            let mut out = TarWriter::new(Vec::new());
            let changed = copy(input, &mut out, 100, &Stop::new()).unwrap();
            (changed, out.finish().unwrap())
        };
        assert_eq!(run(&archive(200)), (Some(true), archive(100)));
        assert_eq!(run(&archive(100)), (Some(false), archive(100)));
        assert_eq!(run(&archive(50)), (Some(false), archive(50)));
    }
}
