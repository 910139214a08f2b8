//! Image references: what a user writes after `FROM` and `-t`, in normal and in familiar form.
//!
//! The grammar and the error texts are those of the distribution project, because users and tests know them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Digest, DigestError};

/// Registry that names without one belong to.
pub const DEFAULT_DOMAIN: &str = "docker.io";
const LEGACY_DEFAULT_DOMAIN: &str = "index.docker.io";
const OFFICIAL_PREFIX: &str = "library/";
const DEFAULT_TAG: &str = "latest";
const NAME_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// A normalised image reference: registry, repository, and a tag, a digest, both or neither.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageRef {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is no image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// The text does not follow the grammar.
    #[error("invalid reference format")]
    Format,
    /// The repository has upper-case letters.
    #[error("invalid reference format: repository name ({0}) must be lowercase")]
    UpperCase(String),
    /// 64 hex digits would be mistaken for an image id.
    #[error("invalid repository name ({0}), cannot specify 64-byte hexadecimal strings")]
    HexOnly(String),
    /// Registry and repository together are longer than 255 characters.
    #[error("repository name must not be more than 255 characters")]
    TooLong,
    /// The part after `@` is no digest that Kiln works with.
    #[error("invalid reference format: {0}")]
    Digest(DigestError),
}

impl ImageRef {
    /// Parses a reference as users write it: `alpine` is `docker.io/library/alpine`, without adding a tag.
    ///
    /// # Errors
    /// See [`ReferenceError`].
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(ReferenceError::HexOnly(text.to_owned()));
        }
        let (domain, remainder) = split_domain(text);
        let path_part = match remainder.split_once('@') {
            Some((before, _)) => before,
            None => remainder.as_str(),
        };
        let path_part = path_part.split_once(':').map_or(path_part, |(path, _)| path);
        if path_part.chars().any(char::is_uppercase) {
            return Err(ReferenceError::UpperCase(path_part.to_owned()));
        }
        Self::from_parts(&domain, &remainder)
    }

    /// Parses a reference whose registry must be spelled out, as it is kept in indexes and on the wire.
    ///
    /// # Errors
    /// See [`ReferenceError`].
    pub fn parse_full(text: &str) -> Result<Self, ReferenceError> {
        let (domain, remainder) = text.split_once('/').ok_or(ReferenceError::Format)?;
        Self::from_parts(domain, remainder)
    }

    fn from_parts(domain: &str, remainder: &str) -> Result<Self, ReferenceError> {
        let (name, digest) = match remainder.split_once('@') {
            Some((name, digest)) => (name, Some(parse_digest(digest)?)),
            None => (remainder, None),
        };
        let (path, tag) = match name.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (name, None),
        };
        if !is_domain(domain) || path.is_empty() || !path.split('/').all(is_path_component) {
            return Err(ReferenceError::Format);
        }
        if tag.is_some_and(|t| !is_tag(t)) {
            return Err(ReferenceError::Format);
        }
        if domain.len() + 1 + path.len() > NAME_MAX {
            return Err(ReferenceError::TooLong);
        }
        Ok(Self {
            domain: domain.to_owned(),
            path: path.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
        })
    }

    /// The registry, for example `docker.io` or `localhost:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository within the registry, for example `library/alpine`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Registry and repository: `docker.io/library/alpine`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The tag, if one was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was given.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same reference with tag `latest` if it had neither tag nor digest.
    #[must_use]
    pub fn or_latest(mut self) -> Self {
        if self.tag.is_none() && self.digest.is_none() {
            self.tag = Some(DEFAULT_TAG.to_owned());
        }
        self
    }

    /// The same repository and tag with this digest.
    #[must_use]
    pub fn with_digest(mut self, digest: Digest) -> Self {
        self.digest = Some(digest);
        self
    }

    /// The same repository with this tag and without a digest.
    ///
    /// # Errors
    /// [`ReferenceError::Format`] if `tag` is no tag.
    pub fn with_tag(mut self, tag: &str) -> Result<Self, ReferenceError> {
        if !is_tag(tag) {
            return Err(ReferenceError::Format);
        }
        self.tag = Some(tag.to_owned());
        self.digest = None;
        Ok(self)
    }

    /// The repository alone, without tag and digest.
    #[must_use]
    pub fn repository(&self) -> Self {
        Self {
            tag: None,
            digest: None,
            ..self.clone()
        }
    }

    /// What to ask a registry for: the digest if there is one, else the tag, else `latest`.
    pub fn object(&self) -> String {
        match self.digest {
            Some(d) => d.to_string(),
            None => self.tag.clone().unwrap_or_else(|| DEFAULT_TAG.to_owned()),
        }
    }

    /// Registry and repository as users write them: `alpine`, `me/app`, `ghcr.io/me/app`.
    pub fn familiar_name(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return self.name();
        }
        match self.path.strip_prefix(OFFICIAL_PREFIX) {
            Some(rest) if !rest.contains('/') => rest.to_owned(),
            // A first part like `localhost` or `a.b` would be read as a registry.
            _ if split_domain(&self.path).0 != DEFAULT_DOMAIN => self.name(),
            _ => self.path.clone(),
        }
    }

    /// The reference as users write it: `alpine:3.20`.
    pub fn familiar(&self) -> String {
        self.with_suffix(self.familiar_name())
    }

    fn with_suffix(&self, mut out: String) -> String {
        if let Some(tag) = &self.tag {
            out.push(':');
            out.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            out.push('@');
            out.push_str(&digest.to_string());
        }
        out
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_suffix(self.name()))
    }
}

impl FromStr for ImageRef {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl Serialize for ImageRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ImageRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

fn parse_digest(text: &str) -> Result<Digest, ReferenceError> {
    text.parse().map_err(|e| match e {
        DigestError::Algorithm(_) => ReferenceError::Digest(e),
        DigestError::Malformed(_) => ReferenceError::Format,
    })
}

/// The registry and what follows it. The first part is a registry only if it looks like one: it has a dot or a colon,
/// is `localhost`, or has upper-case letters, which a repository may not have.
fn split_domain(text: &str) -> (String, String) {
    let (mut domain, mut rest) = match text.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':']) || first == "localhost" || first.chars().any(char::is_uppercase) =>
        {
            (first, rest.to_owned())
        }
        _ => (DEFAULT_DOMAIN, text.to_owned()),
    };
    if domain == LEGACY_DEFAULT_DOMAIN {
        domain = DEFAULT_DOMAIN;
    }
    if domain == DEFAULT_DOMAIN && !rest.contains('/') {
        rest.insert_str(0, OFFICIAL_PREFIX);
    }
    (domain.to_owned(), rest)
}

fn is_domain(text: &str) -> bool {
    let (host, port) = if let Some(inner) = text.strip_prefix('[') {
        let Some((address, after)) = inner.split_once(']') else {
            return false;
        };
        if address.is_empty() || !address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':') {
            return false;
        }
        return after.is_empty() || after.strip_prefix(':').is_some_and(is_port);
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = text.bytes();
    text.len() <= TAG_MAX && bytes.next().is_some_and(word) && bytes.all(|b| word(b) || b == b'.' || b == b'-')
}

/// Lower-case letters and digits, separated by one `.`, one or two `_`, or any number of `-`.
fn is_path_component(text: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends = |b: Option<&u8>| b.is_some_and(|b| alnum(*b));
    let bytes = text.as_bytes();
    if !ends(bytes.first()) || !ends(bytes.last()) {
        return false;
    }
    bytes
        .split(|b| alnum(*b))
        .filter(|separator| !separator.is_empty())
        .all(|separator| matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    #[test]
    fn familiar_and_full_forms() {
        let by_digest = format!("alpine:3@sha256:{HEX}");
        let full_digest = format!("docker.io/library/alpine:3@sha256:{HEX}");
        for (text, full, familiar) in [
            ("alpine", "docker.io/library/alpine", "alpine"),
            ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
            ("docker.io/alpine", "docker.io/library/alpine", "alpine"),
            ("index.docker.io/me/app", "docker.io/me/app", "me/app"),
            ("localhost/app", "localhost/app", "localhost/app"),
            ("localhost:5000/a/b:t", "localhost:5000/a/b:t", "localhost:5000/a/b:t"),
            ("ghcr.io/me/app", "ghcr.io/me/app", "ghcr.io/me/app"),
            ("Reg/app", "Reg/app", "Reg/app"),
            ("[::1]:5000/app", "[::1]:5000/app", "[::1]:5000/app"),
            ("a__b/c--d/e.f", "docker.io/a__b/c--d/e.f", "a__b/c--d/e.f"),
            ("library/x/y", "docker.io/library/x/y", "library/x/y"),
            ("docker.io/a.b/c", "docker.io/a.b/c", "docker.io/a.b/c"),
            (by_digest.as_str(), full_digest.as_str(), by_digest.as_str()),
        ] {
            let r = ImageRef::parse(text).unwrap();
            assert_eq!(
                (r.to_string().as_str(), r.familiar().as_str()),
                (full, familiar),
                "{text}"
            );
            assert_eq!(ImageRef::parse(&r.to_string()).unwrap(), r);
            assert_eq!(ImageRef::parse_full(&r.to_string()).unwrap(), r);
        }
        assert_eq!(
            ImageRef::parse("alpine").unwrap().or_latest().to_string(),
            "docker.io/library/alpine:latest"
        );
        assert_eq!(ImageRef::parse(&by_digest).unwrap().object(), format!("sha256:{HEX}"));
    }

    #[test]
    fn errors_have_the_known_texts() {
        let long = "a/".repeat(130) + "a";
        for (text, want) in [
            ("", "invalid reference format"),
            ("a b", "invalid reference format"),
            ("a:", "invalid reference format"),
            (":a", "invalid reference format"),
            ("a//b", "invalid reference format"),
            ("a_-b", "invalid reference format"),
            ("-a", "invalid reference format"),
            ("a@sha256:12", "invalid reference format"),
            ("https://example.com/a", "invalid reference format"),
            (
                "Alpine",
                "invalid reference format: repository name (library/Alpine) must be lowercase",
            ),
            (
                HEX,
                &format!("invalid repository name ({HEX}), cannot specify 64-byte hexadecimal strings"),
            ),
            (&long, "repository name must not be more than 255 characters"),
        ] {
            assert_eq!(ImageRef::parse(text).unwrap_err().to_string(), want, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_parses_reads_back(text in "[a-zA-Z0-9._:/@-]{0,30}") {
            if let Ok(r) = ImageRef::parse(&text) {
                prop_assert_eq!(ImageRef::parse(&r.to_string()).unwrap(), r.clone());
                prop_assert_eq!(ImageRef::parse(&r.familiar()).unwrap(), r);
            }
        }
    }
}
