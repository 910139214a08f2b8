//! Lexical path work: no file system is asked.

/// The shortest path lexically equal to `path`, by the rules of Go's `path.Clean`: repeated slashes, `.` and inner `..`
/// go, `..` at the root goes, an empty result is `.`.
pub fn clean(path: &[u8]) -> Vec<u8> {
    let rooted = path.first() == Some(&b'/');
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => match parts.last() {
                Some(last) if *last != b".." => {
                    parts.pop();
                }
                _ if rooted => {}
                _ => parts.push(part),
            },
            _ => parts.push(part),
        }
    }
    let mut out = Vec::with_capacity(path.len() + 1);
    if rooted {
        out.push(b'/');
    }
    out.extend(parts.join(&b'/'));
    if out.is_empty() {
        out.push(b'.');
    }
    out
}

/// [`clean`] for text.
pub fn clean_str(path: &str) -> String {
    // Cleaning cuts at slashes only, so text stays text.
    String::from_utf8_lossy(&clean(path.as_bytes())).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_go_cleans() {
        for (from, to) in [
            ("", "."),
            ("/", "/"),
            (".", "."),
            ("./a/", "a"),
            ("a//b/./c", "a/b/c"),
            ("a/../b", "b"),
            ("../a", "../a"),
            ("a/../../b", "../b"),
            ("/../a", "/a"),
            ("/..", "/"),
            ("a/..", "."),
        ] {
            assert_eq!(clean_str(from), to, "{from}");
        }
    }
}
