//! Where the lab's images, clients and programs are; every miss is a failure that says what to run.

use std::path::{Path, PathBuf};

/// The directory that `tests/lab/install` and `tests/lab/images` fill: `$KILN_LAB_CACHE`, else `kiln-lab` beneath the user's or
/// the machine's cache directory.
pub fn cache() -> PathBuf {
    if let Some(dir) = std::env::var_os("KILN_LAB_CACHE") {
        return dir.into();
    }
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(|| PathBuf::from("/var/cache"), PathBuf::from);
    base.join("kiln-lab")
}

/// The data directory of the lab's registry, filled with base images.
///
/// # Panics
/// If the images have not been made.
pub fn registry_data() -> PathBuf {
    let dir = cache().join("registry");
    assert!(
        dir.is_dir(),
        "the lab has no base images at {}: run `tests/lab/images` (make e2e does)",
        dir.display()
    );
    dir
}

/// Which of the two clients a test drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// Debian stable's docker-buildx, 0.13.
    Stable,
    /// The newest docker-buildx that Debian has.
    Newest,
}

/// The program of a client.
///
/// # Panics
/// If it has not been installed.
pub fn client(which: Client) -> PathBuf {
    if which == Client::Newest
        && let Some(path) = std::env::var_os("KILN_E2E_BUILDX")
    {
        return path.into();
    }
    let suite = match which {
        Client::Stable => "trixie",
        Client::Newest => "sid",
    };
    let stamp = cache().join(format!("buildx.{suite}"));
    let version = std::fs::read_to_string(&stamp).unwrap_or_else(|error| {
        panic!(
            "no docker-buildx in the lab ({}: {error}): run `tests/lab/install` (make e2e does)",
            stamp.display()
        )
    });
    let path = cache().join(format!("buildx-{}", version.trim())).join("docker-buildx");
    assert!(path.is_file(), "{} is missing: run `tests/lab/install`", path.display());
    path
}

/// The daemon under test: `KILN_E2E_DAEMON`, else `kilnd` of the target directory this test was built into.
///
/// # Panics
/// If there is none.
pub fn daemon() -> PathBuf {
    if let Some(path) = std::env::var_os("KILN_E2E_DAEMON") {
        let path = PathBuf::from(path);
        assert!(
            path.is_file(),
            "KILN_E2E_DAEMON names {}, which is no file",
            path.display()
        );
        return path;
    }
    program("kilnd")
}

/// Whether the daemon under test is another one than Kiln's; for the few expectations that are Kiln's own.
pub fn is_reference() -> bool {
    std::env::var_os("KILN_E2E_DAEMON").is_some_and(|path| !path.to_string_lossy().ends_with("kilnd"))
}

/// A program of this workspace, built into the target directory of the running test.
///
/// # Panics
/// If it has not been built.
pub fn program(name: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("the path of the running program");
    let profile = exe
        .ancestors()
        .find(|dir| dir.file_name().is_some_and(|name| name == "deps"))
        .and_then(Path::parent)
        .or_else(|| exe.parent())
        .expect("a directory above the running program");
    let path = profile.join(name);
    assert!(
        path.is_file(),
        "{} is not built: run `cargo build -p {name}` first (make e2e does)",
        path.display()
    );
    path
}

/// The root of the source tree.
pub fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the source tree")
        .to_owned()
}
