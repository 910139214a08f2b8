//! Addresses of repositories and what their remotes advertise.

use kiln_llb::op::SourceOp;

use crate::error::OpError;

/// A repository, and what of it is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Remote {
    /// What git is told.
    pub(super) url: String,
    /// Branch, tag, full reference or commit; empty for the remote's `HEAD`.
    pub(super) reference: String,
    /// Directory, clean and without leading slash; empty for all.
    pub(super) subdir: String,
}

/// What a reference stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// The commit.
    pub(super) commit: String,
    /// The commit, or the tag object of an annotated tag.
    pub(super) object: String,
    /// Full name of the reference, or the commit.
    pub(super) reference: String,
}

impl Remote {
    /// From `git://<host>/<path>#<ref>:<subdir>` and the full address, if it is given.
    pub(super) fn parse(op: &SourceOp) -> Result<Self, OpError> {
        let (address, fragment) = op.reference().split_once('#').unwrap_or((op.reference(), ""));
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        let full = op.attr("git.fullurl").unwrap_or_default();
        let full = full.split_once('#').map_or(full, |(address, _)| address);
        let url = match full {
            "" if address.contains("://") => address.to_owned(),
            "" => format!("https://{address}"),
            full => full.to_owned(),
        };
        if url.starts_with('-') || reference.starts_with('-') || url.contains('\0') || url.contains('\n') {
            return Err(OpError::user(format!("invalid git address {}", scrub(&url))));
        }
        let known = ["https://", "http://", "git://", "ssh://"]
            .iter()
            .any(|s| url.starts_with(s));
        if !known && !(url.contains('@') && url.contains(':')) {
            return Err(OpError::user(format!("invalid git address {}", scrub(&url))));
        }
        let subdir = kiln_match::path::clean_str(&format!("/{subdir}"))
            .trim_start_matches('/')
            .to_owned();
        Ok(Self {
            url,
            reference: reference.to_owned(),
            subdir,
        })
    }

    /// The reference, if it is a whole commit id.
    pub(super) fn commit(&self) -> Option<String> {
        let hex = self
            .reference
            .bytes()
            .all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase());
        (hex && matches!(self.reference.len(), 40 | 64)).then(|| self.reference.clone())
    }

    /// The host, without port and user.
    pub(super) fn host(&self) -> String {
        let rest = self.url.split_once("://").map_or(self.url.as_str(), |(_, rest)| rest);
        let authority = rest.split(['/', '?']).next().unwrap_or_default();
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        host.split(':').next().unwrap_or_default().to_owned()
    }

    /// Scheme and host with a slash: where credentials may be sent.
    pub(super) fn origin(&self) -> String {
        let (scheme, rest) = self.url.split_once("://").unwrap_or(("https", &self.url));
        let authority = rest.split('/').next().unwrap_or_default();
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        format!("{scheme}://{host}/")
    }

    /// Address and reference for people, without user and password.
    pub(super) fn display(&self) -> String {
        let mut text = scrub(&self.url);
        if !self.reference.is_empty() || !self.subdir.is_empty() {
            text.push('#');
            text.push_str(&self.reference);
        }
        if !self.subdir.is_empty() {
            text.push(':');
            text.push_str(&self.subdir);
        }
        text
    }
}

/// The text with users and passwords of addresses replaced.
pub(super) fn scrub(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        let end = after.find(['/', ' ', '\'', '"', '\n']).unwrap_or(after.len());
        let (authority, tail) = after.split_at(end);
        match authority.rsplit_once('@') {
            Some((user, host)) => {
                out.push_str(if user.contains(':') { "xxxxx:xxxxx@" } else { "xxxxx@" });
                out.push_str(host);
            }
            None => out.push_str(authority),
        }
        rest = tail;
    }
    out.push_str(rest);
    out
}

/// References of a remote by full name, as `ls-remote` prints them.
pub(super) struct Advertised<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Advertised<'a> {
    pub(super) fn parse(text: &'a str) -> Self {
        Self(
            text.lines()
                .filter_map(|line| line.split_once('\t'))
                .map(|(id, name)| (name, id))
                .collect(),
        )
    }

    fn id(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, id)| *id)
    }

    /// What a branch, a tag or a full reference stands for; nothing at all stands for `HEAD`.
    pub(super) fn find(&self, reference: &str) -> Option<Found> {
        let names = match reference {
            "" => vec!["HEAD".to_owned()],
            full if full.starts_with("refs/") => vec![full.to_owned()],
            name => vec![
                format!("refs/heads/{name}"),
                format!("refs/tags/{name}"),
                name.to_owned(),
            ],
        };
        for name in names {
            if let Some(object) = self.id(&name) {
                let commit = self.id(&format!("{name}^{{}}")).unwrap_or(object);
                let branch = |(n, id): &&(&str, &str)| n.starts_with("refs/heads/") && *id == object;
                let full = if name == "HEAD" {
                    self.0.iter().find(branch).map_or(name, |(n, _)| (*n).to_owned())
                } else {
                    name
                };
                return Some(Found {
                    commit: commit.to_owned(),
                    object: object.to_owned(),
                    reference: full,
                });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(identifier: &str, full: &str) -> SourceOp {
        let attrs = if full.is_empty() {
            Default::default()
        } else {
            [("git.fullurl".to_owned(), full.to_owned())].into()
        };
        SourceOp {
            identifier: identifier.into(),
            attrs,
        }
    }

    #[test]
    fn addresses() {
        let r = Remote::parse(&op("git://example.com/a/b.git#main:sub//dir/../x", "")).unwrap();
        assert_eq!(
            (r.url.as_str(), r.reference.as_str(), r.subdir.as_str()),
            ("https://example.com/a/b.git", "main", "sub/x")
        );
        assert_eq!(
            (r.host().as_str(), r.origin().as_str()),
            ("example.com", "https://example.com/")
        );
        let r = Remote::parse(&op("git://example.com/a.git", "https://u:p@example.com:8443/a.git")).unwrap();
        assert_eq!(
            (r.host().as_str(), r.origin().as_str()),
            ("example.com", "https://example.com:8443/")
        );
        assert_eq!(r.display(), "https://xxxxx:xxxxx@example.com:8443/a.git");
        let r = Remote::parse(&op("git://example.com/a.git#v1", "git@example.com:a.git")).unwrap();
        assert_eq!(
            (r.url.as_str(), r.host().as_str()),
            ("git@example.com:a.git", "example.com")
        );
        for bad in ["--upload-pack=x", "ext::sh -c x", "file:///etc", "/etc"] {
            assert!(Remote::parse(&op("git://x", bad)).is_err(), "{bad}");
        }
        assert!(Remote::parse(&op("git://example.com/a#--x", "")).is_err());
    }

    #[test]
    fn only_whole_ids_are_commits() {
        let commit = "42".repeat(20);
        assert_eq!(
            Remote {
                reference: commit.clone(),
                ..Remote::default()
            }
            .commit(),
            Some(commit.clone())
        );
        assert_eq!(
            Remote {
                reference: commit[..8].into(),
                ..Remote::default()
            }
            .commit(),
            None
        );
    }

    #[test]
    fn branches_come_before_tags_and_tags_are_peeled() {
        let text = "aa\tHEAD\naa\trefs/heads/main\nbb\trefs/heads/v1\ncc\trefs/tags/v1\ndd\trefs/tags/v1^{}\nee\trefs/tags/v2\nff\trefs/tags/v2^{}\n";
        let all = Advertised::parse(text);
        let find = |r: &str| all.find(r).map(|f| (f.commit, f.object, f.reference));
        let found = |c: &str, o: &str, r: &str| Some((c.to_owned(), o.to_owned(), r.to_owned()));
        assert_eq!(find(""), found("aa", "aa", "refs/heads/main"));
        assert_eq!(find("v1"), found("bb", "bb", "refs/heads/v1"));
        assert_eq!(find("refs/tags/v1"), found("dd", "cc", "refs/tags/v1"));
        assert_eq!(find("v2"), found("ff", "ee", "refs/tags/v2"));
        assert_eq!(find("none"), None);
    }
}
