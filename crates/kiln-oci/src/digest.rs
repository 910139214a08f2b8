//! Content digests and the distinct identifiers made of them.
//!
//! Kiln works with SHA-256 only: it is the one algorithm every registry and every BuildKit client uses, and a fixed
//! 32-byte value is `Copy`. Digests of other algorithms are refused when parsed, with the algorithm named.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest, shown and parsed as `sha256:` and 64 lower-case hex digits (OCI image spec, descriptor, "Digests").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// Why a text is not a digest Kiln can work with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// There is no `algorithm:` part, or the hex part has the wrong length or characters.
    #[error("invalid digest `{0}`")]
    Malformed(String),
    /// A registered algorithm that is not SHA-256.
    #[error("unsupported digest algorithm in `{0}`")]
    Algorithm(String),
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: impl AsRef<[u8]>) -> Self {
        Self(Sha256::digest(bytes.as_ref()).into())
    }

    /// Wraps 32 raw hash bytes.
    pub const fn from_bytes(raw: [u8; 32]) -> Self {
        Self(raw)
    }

    /// The 32 raw hash bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 lower-case hex digits without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first twelve hex digits, for log messages only.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((algorithm, hex_part)) = text.split_once(':') else {
            return Err(DigestError::Malformed(text.to_owned()));
        };
        if algorithm != "sha256" {
            return match algorithm {
                "sha384" | "sha512" | "blake3" => Err(DigestError::Algorithm(text.to_owned())),
                _ => Err(DigestError::Malformed(text.to_owned())),
            };
        }
        if hex_part.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(DigestError::Malformed(text.to_owned()));
        }
        let mut raw = [0u8; 32];
        hex::decode_to_slice(hex_part, &mut raw).map_err(|_| DigestError::Malformed(text.to_owned()))?;
        Ok(Self(raw))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Hashes bytes as they come, for streams that are never held whole.
#[derive(Clone, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.update(bytes.as_ref());
    }

    /// The digest of everything added.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

/// A writer that hashes and counts what passes through it.
#[derive(Debug)]
pub struct DigestWriter<W> {
    inner: W,
    hasher: Hasher,
    written: u64,
}

impl<W: io::Write> DigestWriter<W> {
    /// Wraps `inner`; every byte it accepts is hashed.
    pub fn new(inner: W) -> Self {
        Self {
            inner,
            hasher: Hasher::new(),
            written: 0,
        }
    }

    /// Bytes accepted so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// The inner writer, the digest of all bytes it accepted, and their count.
    pub fn finish(self) -> (W, Digest, u64) {
        (self.inner, self.hasher.finish(), self.written)
    }
}

impl<W: io::Write> io::Write for DigestWriter<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hasher.update(buf.get(..n).unwrap_or(buf));
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A reader that hashes and counts what passes through it.
#[derive(Debug)]
pub struct DigestReader<R> {
    inner: R,
    hasher: Hasher,
    read: u64,
}

impl<R: io::Read> DigestReader<R> {
    /// Wraps `inner`; every byte read from it is hashed.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            hasher: Hasher::new(),
            read: 0,
        }
    }

    /// The inner reader, the digest of all bytes read, and their count.
    pub fn finish(self) -> (R, Digest, u64) {
        (self.inner, self.hasher.finish(), self.read)
    }
}

impl<R: io::Read> io::Read for DigestReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hasher.update(buf.get(..n).unwrap_or_default());
        self.read += n as u64;
        Ok(n)
    }
}

/// Declares an identifier that is a digest of one particular kind, so that two kinds never mix.
#[macro_export]
macro_rules! digest_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive($crate::__serde::Serialize, $crate::__serde::Deserialize)]
        #[serde(crate = "::kiln_oci::__serde", transparent)]
        pub struct $name(pub $crate::Digest);

        impl $name {
            /// The digest this identifier is made of.
            pub const fn digest(&self) -> $crate::Digest {
                self.0
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                ::std::fmt::Display::fmt(&self.0, f)
            }
        }

        impl ::std::fmt::Debug for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                ::std::write!(f, ::std::concat!(::std::stringify!($name), "({})"), self.0.short())
            }
        }

        impl ::std::str::FromStr for $name {
            type Err = $crate::DigestError;
            fn from_str(text: &str) -> ::std::result::Result<Self, Self::Err> {
                text.parse().map($name)
            }
        }
    };
}

digest_id! {
    /// Digest of a layer's uncompressed tar (OCI image config, `rootfs.diff_ids`).
    DiffId
}

digest_id! {
    /// Digest of a chain of diff ids from the bottom up (OCI image config, "Layer ChainID").
    ChainId
}

impl ChainId {
    /// The chain id of `diff_ids`, bottom first; `None` for no layers.
    pub fn of(diff_ids: &[DiffId]) -> Option<Self> {
        let (first, rest) = diff_ids.split_first()?;
        Some(rest.iter().fold(Self(first.0), |chain, diff| chain.extend(*diff)))
    }

    /// The chain id of this chain with one more layer on top.
    pub fn extend(self, diff: DiffId) -> Self {
        Self(Digest::of(format!("{} {}", self.0, diff.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn digest_round_trips_and_refuses_other_texts() {
        let d = Digest::of("hello");
        assert_eq!(
            d.to_string(),
            "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        );
        assert_eq!(d.to_string().parse::<Digest>().unwrap(), d);
        assert!(matches!("sha512:00".parse::<Digest>(), Err(DigestError::Algorithm(_))));
        for bad in [
            "",
            "sha256",
            "sha256:",
            "sha256:zz",
            "sha256:AA",
            "md5:00",
            &d.to_string().to_uppercase(),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        let json = serde_json::to_string(&d).unwrap();
        assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), d);
    }

    #[test]
    fn writer_hashes_what_was_accepted() {
        let mut w = DigestWriter::new(Vec::new());
        w.write_all(b"hel").unwrap();
        w.write_all(b"lo").unwrap();
        let (bytes, digest, n) = w.finish();
        assert_eq!(
            (bytes.as_slice(), digest, n),
            (b"hello".as_slice(), Digest::of("hello"), 5)
        );
    }

    #[test]
    fn chain_id_of_one_layer_is_its_diff_id() {
        let a = DiffId(Digest::of("a"));
        let b = DiffId(Digest::of("b"));
        assert_eq!(ChainId::of(&[]), None);
        assert_eq!(ChainId::of(&[a]), Some(ChainId(a.0)));
        assert_eq!(
            ChainId::of(&[a, b]),
            Some(ChainId(Digest::of(format!("{} {}", a.0, b.0))))
        );
    }
}
