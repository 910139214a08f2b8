//! Messages between daemon, launcher and init. All three are the same program, so there is no versioning.

/// Bytes in JSON as a string with one character per byte: compact, and free of a second encoding layer.
pub(crate) mod bytes_as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&bytes.iter().map(|b| char::from(*b)).collect::<String>())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(d)?;
        text.chars()
            .map(|c| u8::try_from(u32::from(c)).map_err(|_| D::Error::custom("not a byte")))
            .collect()
    }
}
