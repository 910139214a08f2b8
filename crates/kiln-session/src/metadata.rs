//! Values in request metadata, which must be printable ASCII.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap};

/// What a query escape leaves as it is.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Adds all `values` under `key`. If one of them cannot stand in metadata as it is, all are escaped as in a URL query
/// and `<key>-encoded: 1` says so.
pub(crate) fn insert<'v>(map: &mut MetadataMap, key: &str, values: impl IntoIterator<Item = &'v str> + Clone) {
    let Ok(name) = AsciiMetadataKey::from_bytes(key.as_bytes()) else {
        return;
    };
    let plain = values
        .clone()
        .into_iter()
        .all(|value| value.bytes().all(|byte| (0x20..0x7f).contains(&byte)));
    for value in values {
        let text = if plain { value.to_owned() } else { escape(value) };
        if let Ok(text) = AsciiMetadataValue::try_from(text) {
            map.append(name.clone(), text);
        }
    }
    if !plain && let Ok(marker) = AsciiMetadataKey::from_bytes(format!("{key}-encoded").as_bytes()) {
        map.insert(marker, AsciiMetadataValue::from_static("1"));
    }
}

/// All values under `key`, unescaped if they were marked; `None` when the key is absent.
pub(crate) fn values(map: &MetadataMap, key: &str) -> Option<Vec<String>> {
    let encoded = map.contains_key(format!("{key}-encoded"));
    let mut found = map.get_all(key).iter().peekable();
    found.peek()?;
    Some(
        found
            .map(|value| {
                let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
                if encoded { unescape(&text) } else { text }
            })
            .collect(),
    )
}

/// The first value under `key`.
pub(crate) fn value(map: &MetadataMap, key: &str) -> Option<String> {
    values(map, key)?.into_iter().next()
}

fn escape(value: &str) -> String {
    utf8_percent_encode(value, QUERY).to_string().replace("%20", "+")
}

fn unescape(value: &str) -> String {
    percent_decode_str(&value.replace('+', " "))
        .decode_utf8_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_stays_as_it_is() {
        let mut map = MetadataMap::new();
        insert(&mut map, "followpaths", ["a+b %41", "c"]);
        assert!(map.get("followpaths-encoded").is_none());
        assert_eq!(values(&map, "followpaths").unwrap(), ["a+b %41", "c"]);
        assert_eq!(values(&map, "other"), None);
    }

    #[test]
    fn one_other_rune_escapes_all_values_of_the_key() {
        let mut map = MetadataMap::new();
        insert(&mut map, "include-patterns", ["a b+c", "ü*"]);
        let raw: Vec<_> = map
            .get_all("include-patterns")
            .iter()
            .map(|v| v.to_str().unwrap())
            .collect();
        assert_eq!(raw, ["a+b%2Bc", "%C3%BC%2A"]);
        assert_eq!(map.get("include-patterns-encoded").unwrap(), "1");
        assert_eq!(values(&map, "include-patterns").unwrap(), ["a b+c", "ü*"]);
    }
}
