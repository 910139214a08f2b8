//! Identifiers of what the store keeps, each its own type, and the tenant they all belong to.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use rand::Rng as _;
use serde::{Deserialize, Serialize};

use crate::error::{Result, StoreError};

/// Length of a random id: 25 digits of base 36 are 129 bits.
const ID_LEN: usize = 25;

fn random_id() -> Box<str> {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut rng = rand::rng();
    (0..ID_LEN)
        .map(|_| char::from(DIGITS[rng.random_range(0..DIGITS.len())]))
        .collect::<String>()
        .into()
}

fn check_id(text: &str) -> Result<()> {
    if text.len() == ID_LEN && text.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase()) {
        Ok(())
    } else {
        Err(StoreError::Invalid(format!("`{text}` is not an id of the store")))
    }
}

macro_rules! random_id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "Cow<'_, str>")]
        pub struct $name(Box<str>);

        impl $name {
            /// A new random id.
            pub fn random() -> Self {
                Self(random_id())
            }

            /// The id as text: 25 digits of base 36.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), &self.0)
            }
        }

        impl FromStr for $name {
            type Err = StoreError;
            fn from_str(text: &str) -> Result<Self> {
                check_id(text)?;
                Ok(Self(text.into()))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }

        impl TryFrom<Cow<'_, str>> for $name {
            type Error = StoreError;
            fn try_from(text: Cow<'_, str>) -> Result<Self> {
                text.parse()
            }
        }
    };
}

random_id_type! {
    /// Id of a layer record: what `du` lists and what cache records point to.
    LayerId
}
random_id_type! {
    /// Id of a sealed tree: the name of its directory under `trees/`.
    TreeId
}
random_id_type! {
    /// Id of a cache record, the one that all equal keys meet in.
    RecordId
}
random_id_type! {
    /// Id of a persistent mutable directory: a cache mount or a local context.
    DirId
}

/// Whose data it is. Two tenants never share a hit; the tenant is a prefix of every table and never hashed into a key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "Cow<'_, str>")]
pub struct Tenant(std::sync::Arc<str>);

impl Tenant {
    /// A tenant by name: 1 to 64 characters of `a-z`, `0-9`, `-` and `_`.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for any other text.
    pub fn new(name: &str) -> Result<Self> {
        let fits = (1..=64).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_');
        if fits {
            Ok(Self(name.into()))
        } else {
            Err(StoreError::Invalid(format!("invalid tenant name `{name}`")))
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Tenant {
    fn default() -> Self {
        Self("default".into())
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tenant({})", &self.0)
    }
}

impl From<Tenant> for String {
    fn from(tenant: Tenant) -> String {
        tenant.as_str().to_owned()
    }
}

impl TryFrom<Cow<'_, str>> for Tenant {
    type Error = StoreError;
    fn try_from(text: Cow<'_, str>) -> Result<Self> {
        Self::new(&text)
    }
}

/// What a record is for: the types that `du` shows and that GC rules select (semantics.md §8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RecordType {
    /// A result of a build or a layer of an image.
    #[default]
    #[serde(rename = "regular")]
    Regular,
    /// Made by the daemon for its own purposes.
    #[serde(rename = "internal")]
    Internal,
    /// An image that serves as a frontend.
    #[serde(rename = "frontend")]
    Frontend,
    /// A directory received from a client.
    #[serde(rename = "source.local")]
    Local,
    /// A git repository or its checkout.
    #[serde(rename = "source.git.checkout")]
    Git,
    /// A cache mount.
    #[serde(rename = "exec.cachemount")]
    CacheMount,
}

impl RecordType {
    /// The name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Regular => "regular",
            Self::Internal => "internal",
            Self::Frontend => "frontend",
            Self::Local => "source.local",
            Self::Git => "source.git.checkout",
            Self::CacheMount => "exec.cachemount",
        }
    }
}

impl fmt::Display for RecordType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Nanoseconds since 1970, as the store keeps times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Time(pub i64);

impl Time {
    /// The present.
    pub fn now() -> Self {
        let nanos = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos());
        Self(i64::try_from(nanos).unwrap_or(i64::MAX))
    }

    /// Whole seconds and the nanoseconds beyond them.
    pub const fn parts(self) -> (i64, u32) {
        (
            self.0.div_euclid(1_000_000_000),
            self.0.rem_euclid(1_000_000_000) as u32,
        )
    }

    /// How long before `now` this was; zero if it lies ahead.
    pub fn age(self, now: Self) -> std::time::Duration {
        std::time::Duration::from_nanos(u64::try_from(now.0.saturating_sub(self.0)).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_refuse_paths() {
        let id = TreeId::random();
        assert_eq!(id.as_str().len(), 25);
        assert_eq!(id.as_str().parse::<TreeId>().unwrap(), id);
        for bad in [
            "",
            "../../etc",
            "A2345678901234567890123456",
            "123456789012345678901234/",
        ] {
            assert!(bad.parse::<TreeId>().is_err(), "{bad}");
        }
        assert!(Tenant::new("a/b").is_err());
        assert!(serde_json::from_str::<Tenant>("\"..\"").is_err());
    }
}
