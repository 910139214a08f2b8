//! Git addresses as users write them for contexts and ADD: standard URLs, `user@host:path`, fragments and query keys.

use std::collections::BTreeMap;

use crate::gotext::{clean_path, parse_bool, quote};

/// A git repository and what of it is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GitRef {
    /// The address for git, without fragment and query.
    pub remote: String,
    /// Branch, tag or commit; empty for the default branch.
    pub reference: String,
    /// Commit that must be found there.
    pub checksum: String,
    /// Directory in the repository.
    pub subdir: String,
    /// Written without scheme (`github.com/…`), so that it could be a local path just as well.
    pub looks_local: bool,
    /// `keep-git-dir`.
    pub keep_git_dir: Option<bool>,
    /// `submodules`.
    pub submodules: Option<bool>,
    /// `mtime`: `checkout` or `commit`, empty when absent.
    pub mtime: String,
    /// `fetch-by-commit`.
    pub fetch_by_commit: bool,
}

/// A git address, split.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GitUrl {
    /// `http`, `https`, `ssh` or `git`.
    pub scheme: String,
    /// Host and port.
    pub host: String,
    /// Path, unescaped.
    pub path: String,
    /// The address for git.
    pub remote: String,
    query: Vec<(String, String)>,
    fragment: String,
}

/// What a text turned out to be.
pub(crate) enum Detected {
    /// No git address.
    Other,
    /// A git address with something wrong in its query.
    Invalid(String),
    /// A git address.
    Git(Box<GitRef>),
}

impl GitUrl {
    /// Splits an address. `None` if it is none.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let scheme_len = text.bytes().take_while(u8::is_ascii_alphanumeric).count();
        let (scheme, rest) = text.split_at(scheme_len);
        if let (false, Some(rest)) = (scheme.is_empty(), rest.strip_prefix("://")) {
            let scheme = scheme.to_ascii_lowercase();
            if !matches!(scheme.as_str(), "http" | "https" | "ssh" | "git") {
                return None;
            }
            return Self::from_parts(scheme, rest);
        }
        Self::scp_style(text)
    }

    /// Splits what follows `scheme://`.
    fn from_parts(scheme: String, rest: &str) -> Option<Self> {
        if rest.bytes().any(|b| b < 0x20 || b == 0x7f) {
            return None;
        }
        let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let port = host
            .rsplit_once(':')
            .filter(|_| !host.ends_with(']'))
            .map_or("", |(_, port)| port);
        if !port.bytes().all(|b| b.is_ascii_digit()) || host.contains(' ') {
            return None;
        }
        Some(Self {
            remote: format!("{scheme}://{rest}"),
            scheme,
            host: host.to_owned(),
            path: unescape(path, false)?,
            query: parse_query(query),
            fragment: unescape(fragment, false)?,
        })
    }

    /// `user@host:path[?query][#fragment]`.
    fn scp_style(text: &str) -> Option<Self> {
        if text.contains('\n') {
            return None;
        }
        let (user, rest) = text.split_once('@')?;
        let (host, rest) = rest.split_once(':')?;
        let word =
            |s: &str, extra: &[u8]| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || extra.contains(&b));
        if !word(user, b"-_") || !word(host, b"-.") {
            return None;
        }
        let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        Some(Self {
            scheme: "ssh".to_owned(),
            host: host.to_owned(),
            path: path.to_owned(),
            remote: format!("{user}@{host}:{path}"),
            query: parse_query(query),
            fragment: fragment.to_owned(),
        })
    }

    /// Host and path in the form identifiers have: the same for every scheme.
    pub(crate) fn identity(&self) -> String {
        format!("{}{}", self.host, clean_path(&format!("/{}", self.path)))
    }
}

/// Tells whether `text` is a git address, and reads it. HTTP addresses count only if their path ends in `.git`.
pub(crate) fn detect(text: &str) -> Detected {
    if text.starts_with("./") || text.starts_with("../") {
        return Detected::Other;
    }
    let looks_local = text.starts_with("github.com/");
    let url = if looks_local {
        GitUrl::from_parts("https".to_owned(), text)
    } else {
        GitUrl::parse(text)
    };
    let Some(url) = url else { return Detected::Other };
    if !looks_local && matches!(url.scheme.as_str(), "http" | "https") && !url.path.ends_with(".git") {
        return Detected::Other;
    }
    let (reference, subdir) = url.fragment.split_once(':').unwrap_or((&url.fragment, ""));
    let subdir = clean_path(&format!("/{subdir}")).trim_start_matches('/').to_owned();
    let remote = if looks_local {
        url.remote
            .split_once("://")
            .map_or(url.remote.as_str(), |(_, rest)| rest)
            .to_owned()
    } else {
        url.remote.clone()
    };
    let mut git = GitRef {
        remote,
        reference: reference.to_owned(),
        subdir,
        looks_local,
        ..GitRef::default()
    };
    match git.read_query(&url.query) {
        Ok(()) => Detected::Git(Box::new(git)),
        Err(message) => Detected::Invalid(message),
    }
}

impl GitRef {
    fn read_query(&mut self, query: &[(String, String)]) -> Result<(), String> {
        let mut values: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (key, value) in query {
            values.entry(key).or_default().push(value);
        }
        let (mut tag, mut branch) = (String::new(), String::new());
        for (key, values) in values {
            let value = match values.as_slice() {
                [value] => *value,
                _ => return Err(format!("query {} has multiple values", quote(key))),
            };
            let flag = || match value {
                "" => Ok(true),
                value => parse_bool(value).ok_or_else(|| format!("invalid {key} value: {}", quote(value))),
            };
            match key {
                "keep-git-dir" => self.keep_git_dir = Some(flag()?),
                "submodules" => self.submodules = Some(flag()?),
                "fetch-by-commit" => self.fetch_by_commit = flag()?,
                key if value.is_empty() => return Err(format!("query {} has no value", quote(key))),
                "ref" => agree("ref", &mut self.reference, value)?,
                "subdir" => agree("subdir", &mut self.subdir, value)?,
                "tag" => tag = prefixed("refs/tags/", value),
                "branch" => branch = prefixed("refs/heads/", value),
                "checksum" | "commit" => self.checksum = value.to_owned(),
                "mtime" if matches!(value, "checkout" | "commit") => self.mtime = value.to_owned(),
                "mtime" => {
                    let options = "(must be \"checkout\" or \"commit\")";
                    return Err(format!("invalid mtime value: {} {options}", quote(value)));
                }
                key => return Err(format!("unexpected query {}", quote(key))),
            }
        }
        if !tag.is_empty() {
            agree("ref", &mut self.reference, &tag)?;
        }
        if !branch.is_empty() {
            if !tag.is_empty() {
                return Err("branch conflicts with tag".to_owned());
            }
            agree("ref", &mut self.reference, &branch)?;
        }
        Ok(())
    }
}

fn agree(what: &str, known: &mut String, value: &str) -> Result<(), String> {
    if !known.is_empty() && known != value {
        return Err(format!("{what} conflicts: {} vs {}", quote(known), quote(value)));
    }
    value.clone_into(known);
    Ok(())
}

fn prefixed(prefix: &str, value: &str) -> String {
    if value.starts_with(prefix) {
        value.to_owned()
    } else {
        format!("{prefix}{value}")
    }
}

/// Keys and values of a query; malformed pairs are left out.
fn parse_query(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty() && !pair.contains(';'))
        .filter_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((unescape(key, true)?, unescape(value, true)?))
        })
        .collect()
}

/// Resolves `%XX`, and `+` in queries. `None` for a malformed escape.
fn unescape(text: &str, plus: bool) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let digit = |b: Option<u8>| char::from(b?).to_digit(16);
                let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
                out.push(u8::try_from(high * 16 + low).ok()?);
            }
            b'+' if plus => out.push(b' '),
            byte => out.push(byte),
        }
    }
    Some(String::from_utf8_lossy(&out).into_owned())
}

/// The file name that the last element of a URL's path gives, `None` without one.
pub(crate) fn url_file_name(url: &str) -> Option<String> {
    let (_, rest) = url.split_once("://")?;
    let rest = rest.split(['#', '?']).next().unwrap_or_default();
    let path = rest.get(rest.find('/')?..)?;
    let path = unescape(path, false)?;
    match crate::gotext::base_name(&path) {
        "." | "/" => None,
        name => Some(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(text: &str) -> String {
        match detect(text) {
            Detected::Other => "other".into(),
            Detected::Invalid(e) => format!("! {e}"),
            Detected::Git(g) => {
                let mut out = format!("{} {}:{}", g.remote, g.reference, g.subdir);
                if g.looks_local {
                    out += " local?";
                }
                if !g.checksum.is_empty() {
                    out += &format!(" ={}", g.checksum);
                }
                if let Some(k) = g.keep_git_dir {
                    out += &format!(" keep={k}");
                }
                out
            }
        }
    }

    #[test]
    fn addresses() {
        for (text, want) in [
            ("https://h/a/b.git", "https://h/a/b.git :"),
            ("https://h/a/b.git#v1:sub/../x", "https://h/a/b.git v1:x"),
            (
                "https://u:p@h:8443/b.git?ref=x&subdir=d",
                "https://u:p@h:8443/b.git x:d",
            ),
            ("git://h/b", "git://h/b :"),
            ("ssh://git@h/b", "ssh://git@h/b :"),
            ("git@h.com:a/b.git#x", "git@h.com:a/b.git x:"),
            ("git@h.com:a?tag=v1", "git@h.com:a refs/tags/v1:"),
            ("github.com/a/b#x", "github.com/a/b x: local?"),
            (
                "https://h/a.git?keep-git-dir&commit=abc",
                "https://h/a.git : =abc keep=true",
            ),
            ("https://h/a", "other"),
            ("https://h/a.tar.gz#x.git", "other"),
            ("./git@h:a", "other"),
            ("a/b", "other"),
            ("ftp://h/a.git", "other"),
            ("https://h/%zz.git", "other"),
            ("https://h/a.git?foo=1", "! unexpected query \"foo\""),
            ("https://h/a.git?ref=", "! query \"ref\" has no value"),
            ("https://h/a.git?ref=a&ref=b", "! query \"ref\" has multiple values"),
            ("https://h/a.git?ref=a#b", "! ref conflicts: \"b\" vs \"a\""),
            ("https://h/a.git?branch=a&tag=b", "! branch conflicts with tag"),
            (
                "https://h/a.git?mtime=x",
                "! invalid mtime value: \"x\" (must be \"checkout\" or \"commit\")",
            ),
        ] {
            assert_eq!(show(text), want, "{text}");
        }
        assert_eq!(
            GitUrl::parse("git@h.com:a/b.git").map(|u| u.identity()),
            Some("h.com/a/b.git".into())
        );
        assert_eq!(url_file_name("https://h/a/b%20c.tgz?x=/y"), Some("b c.tgz".into()));
        assert_eq!(url_file_name("https://h/"), None);
        assert_eq!(url_file_name("https://h"), None);
    }
}
