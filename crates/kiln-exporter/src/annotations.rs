//! Annotations that users ask for, and where in an image each of them goes (solve.md §5, `annotation…`).

use std::collections::BTreeMap;

use crate::error::ExportError;

type Map = BTreeMap<String, String>;

/// Annotations by place. Manifest-level ones may be for one platform only; those of indexes never are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Members of the index.
    pub index: Map,
    /// On the descriptor of the index.
    pub index_descriptor: Map,
    /// Members of manifests, by platform id; the empty id is for all.
    manifest: BTreeMap<String, Map>,
    /// On descriptors of manifests, by platform id.
    manifest_descriptor: BTreeMap<String, Map>,
}

impl Annotations {
    /// Takes `key` in if it is an annotation key: `annotation[-<place>][[<platform>]].<name>`.
    ///
    /// # Errors
    /// [`ExportError::Invalid`] for an unknown place.
    pub fn add(&mut self, key: &str, value: &str) -> Result<bool, ExportError> {
        let Some(rest) = key.strip_prefix("annotation") else {
            return Ok(false);
        };
        let (head, name) = match split_head(rest) {
            Some(parts) => parts,
            None => return Ok(false),
        };
        let (place, platform) = match head.split_once('[') {
            Some((place, platform)) => (place, platform.trim_end_matches(']')),
            None => (head, ""),
        };
        let platform = platform
            .parse::<kiln_oci::Platform>()
            .map_or_else(|_| platform.to_owned(), |p| p.id());
        let map = match place {
            "" | "-manifest" => self.manifest.entry(platform).or_default(),
            "-manifest-descriptor" => self.manifest_descriptor.entry(platform).or_default(),
            "-index" => &mut self.index,
            "-index-descriptor" => &mut self.index_descriptor,
            other => {
                return Err(ExportError::Invalid(format!(
                    "unrecognized annotation type {}",
                    &other[1..]
                )));
            }
        };
        map.insert(name.to_owned(), value.to_owned());
        Ok(true)
    }

    /// These and those of `other`, which win.
    pub fn merge(&mut self, other: &Self) {
        self.index.extend(other.index.clone());
        self.index_descriptor.extend(other.index_descriptor.clone());
        for (mine, theirs) in [
            (&mut self.manifest, &other.manifest),
            (&mut self.manifest_descriptor, &other.manifest_descriptor),
        ] {
            for (platform, map) in theirs {
                mine.entry(platform.clone()).or_default().extend(map.clone());
            }
        }
    }

    /// Annotations of the manifest for `platform`.
    pub fn for_manifest(&self, platform: &str) -> Map {
        collect(&self.manifest, platform)
    }

    /// Annotations of the descriptor of the manifest for `platform`.
    pub fn for_manifest_descriptor(&self, platform: &str) -> Map {
        collect(&self.manifest_descriptor, platform)
    }

    /// Platform ids that annotations are limited to.
    pub fn platforms(&self) -> impl Iterator<Item = &str> {
        self.manifest
            .keys()
            .chain(self.manifest_descriptor.keys())
            .map(String::as_str)
            .filter(|p| !p.is_empty())
    }

    /// Whether there are any beside members of manifests, the only place that Docker's media types have.
    pub fn need_oci(&self) -> bool {
        !self.index.is_empty() || !self.index_descriptor.is_empty() || !self.manifest_descriptor.is_empty()
    }
}

fn collect(by_platform: &BTreeMap<String, Map>, platform: &str) -> Map {
    let mut out = by_platform.get("").cloned().unwrap_or_default();
    if !platform.is_empty() {
        out.extend(by_platform.get(platform).cloned().unwrap_or_default());
    }
    out
}

/// `-place[platform]` and the name after the first dot that follows it.
fn split_head(rest: &str) -> Option<(&str, &str)> {
    let after_place = rest
        .find(|c: char| !(c == '-' || c.is_ascii_lowercase()))
        .unwrap_or(rest.len());
    let mut end = after_place;
    let tail = rest.get(after_place..)?;
    if tail.starts_with('[') {
        let close = tail.find(']')?;
        let platform = tail.get(1..close)?;
        if platform.is_empty() || !platform.chars().all(|c| c.is_ascii_alphanumeric() || "_/-".contains(c)) {
            return None;
        }
        end += close + 1;
    }
    let head = rest.get(..end)?;
    if !(head.is_empty() || head.starts_with('-') || head.starts_with('[')) || head == "-" {
        return None;
    }
    let name = rest.get(end..)?.strip_prefix('.')?;
    (!name.is_empty() && !name.contains(char::is_whitespace)).then_some((head, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_place_and_platform() {
        let mut a = Annotations::default();
        for (key, value) in [
            ("annotation.a.b", "1"),
            ("annotation-manifest[linux/amd64].a.b", "2"),
            ("annotation-manifest-descriptor.d", "3"),
            ("annotation-index.i", "4"),
            ("annotation-index-descriptor.j", "5"),
            ("annotation[linux/aarch64].x", "6"),
        ] {
            assert!(a.add(key, value).unwrap(), "{key}");
        }
        assert!(!a.add("annotations.x", "").unwrap());
        assert!(!a.add("annotation", "").unwrap());
        assert!(!a.add("name", "").unwrap());
        assert!(a.add("annotation-layer.x", "").is_err());
        assert_eq!(a.for_manifest("linux/amd64")["a.b"], "2");
        assert_eq!(a.for_manifest("")["a.b"], "1");
        assert_eq!(a.for_manifest("linux/arm64")["x"], "6");
        assert_eq!(a.index["i"], "4");
        assert!(a.need_oci());
        assert_eq!(a.platforms().collect::<Vec<_>>(), ["linux/amd64", "linux/arm64"]);
    }
}
