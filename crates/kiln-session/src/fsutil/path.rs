//! Which paths a listing may name, and in which order.

use std::cmp::Ordering;

/// The longest path and link text the kernel takes.
const MAX_PATH: usize = 4096;

/// The order of a walk: element by element, so that `/` sorts before every other byte and a directory comes directly
/// before what is in it (`a/b` before `a.txt`).
pub fn compare(a: &str, b: &str) -> Ordering {
    // On bytes, with `/` as the smallest: the same as comparing elements one by one.
    let (a, b) = (a.as_bytes(), b.as_bytes());
    for (x, y) in a.iter().zip(b) {
        if x != y {
            return match (*x, *y) {
                (b'/', _) => Ordering::Less,
                (_, b'/') => Ordering::Greater,
                (x, y) => x.cmp(&y),
            };
        }
    }
    a.len().cmp(&b.len())
}

/// Why a path is not acceptable: it must be relative, clean and within the kernel's limits.
pub(crate) fn refusal(path: &str) -> Option<&'static str> {
    if path.is_empty() {
        return Some("empty path");
    }
    if path.len() >= MAX_PATH {
        return Some("path too long");
    }
    if path.contains('\0') {
        return Some("path with a zero byte");
    }
    path.split('/').find_map(|element| match element {
        "" => Some("path is absolute or has an empty element"),
        "." | ".." => Some("path is not clean"),
        name if name.len() > 255 => Some("file name too long"),
        _ => None,
    })
}

/// Why the text of a symlink is not acceptable.
pub(crate) fn link_refusal(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        Some("symlink without a target")
    } else if text.len() >= MAX_PATH {
        Some("symlink target too long")
    } else if text.contains('\0') {
        Some("symlink target with a zero byte")
    } else {
        None
    }
}

/// The directory a path is in; empty for the root.
pub(crate) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// Whether `path` lies beneath `dir`.
pub(crate) fn is_beneath(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn slash_sorts_lowest() {
        let mut paths = ["a.txt", "a/b", "a", "a-b", "a/b/c", "b", "a/b.c"];
        paths.sort_by(|a, b| compare(a, b));
        assert_eq!(paths, ["a", "a/b", "a/b/c", "a/b.c", "a-b", "a.txt", "b"]);
    }

    #[test]
    fn refused() {
        for bad in ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", "a\0b"] {
            assert!(refusal(bad).is_some(), "{bad:?}");
        }
        for good in ["a", "a/b", "..a", "...", "a..b/ c"] {
            assert!(refusal(good).is_none(), "{good:?}");
        }
        assert!(refusal(&"x".repeat(256)).is_some());
    }

    proptest! {
        #[test]
        fn order_is_by_elements(a in "[ab./-]{0,8}", b in "[ab./-]{0,8}") {
            let elements = |path: &str| path.split('/').map(str::to_owned).collect::<Vec<_>>();
            prop_assert_eq!(compare(&a, &b), elements(&a).cmp(&elements(&b)));
        }
    }
}
