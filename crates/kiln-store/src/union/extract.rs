//! Unpacking an archive into the destination of a copy (ADD of a local archive).

use std::io::Read;

use kiln_fs::Stop;
use kiln_fs::xattr::kept_from_layer;

use crate::compress::{Packing, unpack};
use crate::error::{Result, StoreError};
use crate::files::FileJob;
use crate::layer::read::{Member, MemberKind, TarReader};
use crate::manifest::{Entry, Kind, base, join, parent};
use crate::tree::os_path;
use crate::union::copy::CopySpec;
use crate::union::{FileWriter, path_error};
use crate::view::{View, clean_rooted};

impl FileWriter {
    /// Unpacks `source` into the destination of `spec` if it is a regular file that is an archive, packed or not; says
    /// whether it was. A packed file that holds no archive is none.
    pub(crate) fn try_unpack(&mut self, spec: &CopySpec, src: &View, source: &[u8], stop: &Stop) -> Result<bool> {
        let Some(node) = src.find(source, true)? else {
            return Ok(false);
        };
        if src.entry(&node).kind != Kind::Regular {
            return Ok(false);
        }
        if !is_archive(src.open(&node)?) {
            return Ok(false);
        }
        let dest = self.resolve(&clean_rooted(&spec.dest), true)?;
        let like = Entry {
            mode: 0o755,
            ..self.dest_dir(spec)
        };
        self.create_missing(&dest, &like, stop)?;
        let read_error = |e: std::io::Error| {
            let shown = String::from_utf8_lossy(source).into_owned();
            StoreError::Invalid(format!("unpack /{shown}: {e}"))
        };
        let (_, reader) = unpack(src.open(&node)?).map_err(read_error)?;
        let mut archive = TarReader::new(reader);
        let mut dirs = Vec::new();
        while let Some(member) = archive.next_member().map_err(read_error)? {
            stop.check()?;
            self.member(spec, &dest, &member, &mut archive, &mut dirs, stop)?;
        }
        // Directories get the times of the archive, whatever was created in them since.
        for (path, mtime) in dirs {
            if let Some(entry) = self.entry_mut(&path).filter(|e| e.kind.is_dir()) {
                entry.mtime = mtime;
            }
        }
        Ok(true)
    }

    fn member<R: Read>(
        &mut self,
        spec: &CopySpec,
        dest: &[u8],
        member: &Member,
        archive: &mut TarReader<R>,
        dirs: &mut Vec<(Vec<u8>, kiln_fs::Timestamp)>,
        stop: &Stop,
    ) -> Result<()> {
        if member.name.contains(&0) {
            return Err(StoreError::Invalid("archive: a name with a zero byte".into()));
        }
        let relative = clean_rooted(&member.name);
        let owner = spec.owner;
        let (uid, gid) = owner.map_or((member.uid, member.gid), |o| (o.uid, o.gid));
        let kind = match member.kind {
            MemberKind::Regular | MemberKind::HardLink => Kind::Regular,
            MemberKind::Symlink => Kind::Symlink,
            MemberKind::CharDevice => Kind::CharDevice,
            MemberKind::BlockDevice => Kind::BlockDevice,
            MemberKind::Directory => Kind::Directory,
            MemberKind::Fifo => Kind::Fifo,
        };
        let device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        let mut xattrs: kiln_fs::xattr::Xattrs = member
            .xattrs
            .iter()
            .filter(|(n, _)| kept_from_layer(n))
            .map(|(n, v)| (n.clone().into(), v.clone().into()))
            .collect();
        xattrs.sort();
        let entry = Entry {
            mode: if kind == Kind::Symlink { 0o777 } else { member.mode },
            uid,
            gid,
            size: if kind == Kind::Regular { member.size } else { 0 },
            mtime: spec.timestamp.unwrap_or(member.mtime),
            target: if kind == Kind::Symlink {
                member.link.clone().into()
            } else {
                Box::default()
            },
            rdev: if device {
                rustix::fs::makedev(member.device.0, member.device.1)
            } else {
                0
            },
            xattrs,
            ..Entry::new(Vec::new(), kind)
        };
        // The archive's own root is the destination: links in it may lead anywhere inside the image, never out of it.
        let above = self.resolve(&join(dest, parent(&relative)), true)?;
        let implied = Entry {
            mtime: self.now(),
            ..Entry::dir(*b"")
        };
        self.create_missing(&above, &implied, stop)?;
        let path = if relative.is_empty() {
            above.clone()
        } else {
            join(&above, base(&relative))
        };
        let seen = self.look(&path);
        if kind == Kind::Directory {
            dirs.push((path.clone(), entry.mtime));
            if let Some(seen) = seen {
                if seen.entry.kind.is_dir() {
                    self.enter(&path)?;
                    let opaque = self.entry_mut(&path).is_some_and(|e| e.opaque);
                    self.insert(Entry {
                        path: path.into(),
                        opaque,
                        ..entry
                    });
                    return Ok(());
                }
                self.remove(&path, stop)?;
            }
            let place = self.enter(&above)?;
            self.create_dir(&place, base(&path), entry, stop)?;
            return Ok(());
        }
        if relative.is_empty() {
            return Err(path_error("unpack", &path, "a member that is no directory has no name"));
        }
        if seen.is_some_and(|s| s.entry.kind.is_dir()) {
            self.remove(&path, stop)?;
        }
        let place = self.enter(&above)?;
        if member.kind == MemberKind::HardLink {
            return self.member_link(dest, member, path, stop);
        }
        self.clear(&path, stop)?;
        let entry = Entry {
            path: path.clone().into(),
            ..entry
        };
        let job = FileJob::new(place.handle, base(&path), &entry);
        if kind == Kind::Regular {
            job.write_stream(member.size, member.sparse.as_deref(), archive, stop)?;
        } else {
            match job.create_special(&entry) {
                Err(StoreError::Io { source, .. })
                    if device && source.kind() == std::io::ErrorKind::PermissionDenied =>
                {
                    return Ok(());
                }
                other => other?,
            }
        }
        self.insert(entry);
        Ok(())
    }

    fn member_link(&mut self, dest: &[u8], member: &Member, path: Vec<u8>, stop: &Stop) -> Result<()> {
        let target = self.resolve(&join(dest, &clean_rooted(&member.link)), false)?;
        let Some(known) = self
            .get(&target)
            .filter(|e| !e.kind.is_dir() && e.kind != Kind::Whiteout)
            .cloned()
        else {
            let shown = String::from_utf8_lossy(&member.link);
            return Err(path_error(
                "unpack",
                &path,
                &format!("hard link to {shown:?}, which is not in the archive"),
            ));
        };
        if target == path {
            return Ok(());
        }
        self.clear(&path, stop)?;
        self.out().fs().hard_link(os_path(&target), os_path(&path))?;
        let group = if known.link_group != 0 {
            known.link_group
        } else {
            self.next_group()
        };
        if let Some(entry) = self.entry_mut(&target) {
            entry.link_group = group;
        }
        self.insert(Entry {
            path: path.into(),
            link_group: group,
            ..known
        });
        Ok(())
    }
}

/// Whether a file is an archive: its first block (unpacked) is a header with a right checksum, or, when packed, the end
/// of an empty archive.
fn is_archive(file: std::fs::File) -> bool {
    let Ok((packing, reader)) = unpack(file) else {
        return false;
    };
    match TarReader::new(reader.take(1 << 20)).next_member() {
        Ok(Some(_)) => true,
        Ok(None) => packing != Packing::None,
        Err(_) => false,
    }
}
