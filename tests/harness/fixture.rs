//! A build context in one literal: many files, each under a line `=== path [mode]`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A directory of files that lives as long as the value.
#[derive(Debug)]
pub struct Fixture {
    dir: TempDir,
}

impl Fixture {
    /// Writes the files of `text`. A file starts with a line `=== path` or `=== path 755` (its mode, octal; 644 else) and goes to
    /// the next such line; lines before the first one must be empty. Indentation common to all lines is kept as it is.
    ///
    /// # Panics
    /// If the text is not of that form.
    pub fn new(text: &str) -> Fixture {
        let fixture = Fixture::empty();
        let mut current: Option<(PathBuf, u32, String)> = None;
        for line in text.split_inclusive('\n') {
            if let Some(header) = line.strip_prefix("=== ") {
                fixture.finish(current.take());
                let mut words = header.split_whitespace();
                let path = words.next().expect("a path after ===");
                let mode = words
                    .next()
                    .map_or(0o644, |word| u32::from_str_radix(word, 8).expect("an octal mode"));
                current = Some((path.into(), mode, String::new()));
            } else if let Some((_, _, content)) = &mut current {
                content.push_str(line);
            } else {
                assert!(line.trim().is_empty(), "text before the first `=== path`: {line:?}");
            }
        }
        fixture.finish(current);
        fixture
    }

    /// An empty directory.
    pub fn empty() -> Fixture {
        let dir = tempfile::Builder::new()
            .prefix("kiln-context-")
            .tempdir()
            .expect("a directory for the fixture");
        Fixture { dir }
    }

    /// A copy of a directory of the source tree, for example `examples/go-scratch`; links stay links.
    pub fn copy_of(path: &str) -> Fixture {
        let fixture = Fixture::empty();
        let from = crate::lab::source_root().join(path);
        let status = std::process::Command::new("cp")
            .args(["-a", "--"])
            .arg(from.join("."))
            .arg(fixture.path())
            .status()
            .expect("cp runs");
        assert!(status.success(), "{} cannot be copied", from.display());
        fixture
    }

    fn finish(&self, file: Option<(PathBuf, u32, String)>) {
        if let Some((path, mode, content)) = file {
            self.write(&path, content);
            std::fs::set_permissions(self.path().join(&path), std::fs::Permissions::from_mode(mode))
                .expect("setting a mode");
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes one file, with its parent directories.
    pub fn write(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> &Fixture {
        let full = self.path().join(path.as_ref());
        if let Some(parent) = full.parent() {
            std::fs::create_dir_all(parent).expect("parent directories");
        }
        std::fs::write(&full, content).unwrap_or_else(|error| panic!("writing {}: {error}", full.display()));
        self
    }

    /// Makes a symbolic link.
    pub fn symlink(&self, target: &str, path: &str) -> &Fixture {
        let full = self.path().join(path);
        if let Some(parent) = full.parent() {
            std::fs::create_dir_all(parent).expect("parent directories");
        }
        std::os::unix::fs::symlink(target, full).expect("a symbolic link");
        self
    }

    /// Removes a file or a directory with all in it.
    pub fn remove(&self, path: &str) -> &Fixture {
        let full = self.path().join(path);
        if full.is_dir() {
            std::fs::remove_dir_all(&full)
        } else {
            std::fs::remove_file(&full)
        }
        .expect("removing a file");
        self
    }

    /// Reads a file.
    pub fn read(&self, path: &str) -> String {
        let full = self.path().join(path);
        std::fs::read_to_string(&full).unwrap_or_else(|error| panic!("reading {}: {error}", full.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_literal_becomes_files() {
        let fixture = Fixture::new("\n=== a.txt\none\ntwo\n=== bin/run 755\n#!/bin/sh\n=== empty\n");
        assert_eq!(fixture.read("a.txt"), "one\ntwo\n");
        assert_eq!(fixture.read("bin/run"), "#!/bin/sh\n");
        assert_eq!(fixture.read("empty"), "");
        let mode = std::fs::metadata(fixture.path().join("bin/run"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o755);
    }
}
