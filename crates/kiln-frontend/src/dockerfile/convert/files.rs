//! Paths in instructions: absolute, relative, and those of Windows.

use crate::gotext::{clean_path, join_path, quote};

const WINDOWS: &str = "windows";

/// The path with forward slashes.
pub(super) fn to_slash(path: &str, os: &str) -> String {
    if os == WINDOWS {
        path.replace('\\', "/")
    } else {
        path.to_owned()
    }
}

/// The path with the separators of `os`.
pub(super) fn from_slash(path: &str, os: &str) -> String {
    if os == WINDOWS {
        path.replace('/', "\\")
    } else {
        path.to_owned()
    }
}

/// Checks that a Windows path is on the system drive and takes the drive off; on other systems nothing happens.
pub(super) fn without_drive(path: &str, os: &str, keep_slash: bool) -> Result<String, String> {
    if os != WINDOWS {
        return Ok(path.to_owned());
    }
    if path.len() == 2 && path.ends_with(':') {
        return Err(format!("No relative path specified in {}", quote(path)));
    }
    let slashed = path.replace('\\', "/");
    if slashed.starts_with("//") {
        return Err("UNC paths are not supported".to_owned());
    }
    let rest = match slashed.split_once(':') {
        None => slashed.as_str(),
        Some((drive, rest)) if drive.eq_ignore_ascii_case("c") => rest,
        Some(_) => return Err("The specified path is not on the system drive (C:)".to_owned()),
    };
    let mut clean = clean_path(rest);
    if keep_slash && clean.len() > 1 && rest.ends_with('/') {
        clean.push('/');
    }
    Ok(clean)
}

/// Whether a path is absolute on `os`.
pub(super) fn is_absolute(path: &str, os: &str) -> bool {
    without_drive(path, os, false).is_ok_and(|p| p.starts_with('/'))
}

/// An absolute path with forward slashes: relative ones are below `parent`. Absolute ones are not cleaned. `keep_slash`
/// preserves a trailing `/` or `/.`.
pub(super) fn normalize(parent: &str, path: &str, os: &str, keep_slash: bool) -> Result<String, String> {
    let wrap = |e: String| format!("removing drive letter: {e}");
    let path = to_slash(path, os);
    let parent = without_drive(if parent.is_empty() { "/" } else { parent }, os, keep_slash).map_err(wrap)?;
    let parent = if parent.starts_with('/') {
        parent
    } else {
        join_path("/", &parent)
    };
    let given = if path.is_empty() { &parent } else { &path };
    let mut result = without_drive(given, os, keep_slash).map_err(wrap)?;
    if !result.starts_with('/') {
        result = join_path(&parent, &result);
    }
    if keep_slash {
        if path.ends_with('/') && !result.ends_with('/') {
            result.push('/');
        } else if path.ends_with("/.") {
            if result != "/" {
                result.push('/');
            }
            result.push('.');
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_to_the_working_directory() {
        for (parent, path, want) in [
            ("/w", "a", "/w/a"),
            ("/w", "a/", "/w/a/"),
            ("/w", "./", "/w/"),
            ("/w", "/x/.", "/x/./."),
            ("", "a", "/a"),
            ("/w", "", "/w"),
            ("/w", "/a//b", "/a//b"),
        ] {
            assert_eq!(normalize(parent, path, "linux", true).unwrap(), want, "{parent} {path}");
        }
    }

    #[test]
    fn windows_paths() {
        assert_eq!(normalize("/w", "c:\\a\\..\\b", "windows", false).unwrap(), "/b");
        assert_eq!(normalize("\\w", "x\\", "windows", true).unwrap(), "/w/x/");
        for (path, message) in [
            ("C:", "No relative path specified in \"C:\""),
            ("d:\\x", "The specified path is not on the system drive (C:)"),
            ("\\\\h\\x", "UNC paths are not supported"),
        ] {
            assert_eq!(without_drive(path, "windows", false).unwrap_err(), message);
        }
        assert!(is_absolute("c:\\x", "windows") && !is_absolute("c:x", "windows"));
    }
}
