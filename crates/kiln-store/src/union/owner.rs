//! Owners by id or by name, from the passwd and group files of the image they are meant in.

use crate::error::Result;
use crate::view::View;

/// User and group of a file; 0:0 by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A user or group as a build states it.
#[derive(Clone, Debug)]
pub enum UserSpec {
    /// By number.
    Id(u32),
    /// By name, looked up in this view; `None` stands for an empty file system.
    Name(String, Option<View>),
}

/// An owner as a build states it.
#[derive(Clone, Debug, Default)]
pub struct OwnerSpec {
    /// The user.
    pub user: Option<UserSpec>,
    /// The group; without it the user decides.
    pub group: Option<UserSpec>,
}

/// Largest passwd or group file that is read.
const MAX_FILE: u64 = 16 << 20;

impl OwnerSpec {
    /// The ids. A user by name brings the primary group, a user by number the group of the same number; a missing file or
    /// name counts as 0.
    ///
    /// # Errors
    /// Only I/O errors of the files.
    pub fn resolve(&self) -> Result<Owner> {
        let mut owner = match &self.user {
            None => Owner::default(),
            Some(UserSpec::Id(id)) => Owner { uid: *id, gid: *id },
            Some(UserSpec::Name(name, view)) => match field(view.as_ref(), b"/etc/passwd", name)? {
                Some(line) => Owner {
                    uid: number(&line, 2),
                    gid: number(&line, 3),
                },
                None => Owner::default(),
            },
        };
        match &self.group {
            None => {}
            Some(UserSpec::Id(id)) => owner.gid = *id,
            Some(UserSpec::Name(name, view)) => {
                owner.gid = field(view.as_ref(), b"/etc/group", name)?.map_or(0, |line| number(&line, 2));
            }
        }
        Ok(owner)
    }
}

/// The line of a colon-separated file whose first field is `name`, split.
fn field(view: Option<&View>, path: &[u8], name: &str) -> Result<Option<Vec<String>>> {
    let Some(view) = view else { return Ok(None) };
    let Some(data) = view.read(path, MAX_FILE)? else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&data);
    let mut lines = text
        .lines()
        .map(|l| l.split(':').map(str::to_owned).collect::<Vec<_>>());
    Ok(lines.find(|fields| fields.first().is_some_and(|f| f == name)))
}

fn number(fields: &[String], index: usize) -> u32 {
    fields.get(index).and_then(|f| f.trim().parse().ok()).unwrap_or(0)
}
