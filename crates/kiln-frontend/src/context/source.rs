//! Sources as states: images, client directories, git repositories, URLs.

use std::collections::BTreeMap;

use kiln_llb::State;
use kiln_llb::op::{CopyAction, SourceOp};
use kiln_llb::state::{Constraints, FileStep};
use kiln_oci::go_json;

use crate::git_ref::{GitRef, GitUrl};
use crate::image::{Image, split_env};
use crate::options::ResolveMode;

fn source(identifier: String, attrs: BTreeMap<String, String>, about: Constraints) -> State {
    State::source(SourceOp { identifier, attrs }, about)
}

/// Name of the file a URL context is downloaded to.
pub(crate) const CONTEXT_FILE: &str = "context";

/// An image by its full reference.
pub(crate) fn image(reference: &str, mode: ResolveMode, about: Constraints) -> State {
    let mut attrs = BTreeMap::new();
    if mode != ResolveMode::Default {
        attrs.insert("image.resolvemode".to_owned(), mode.name().to_owned());
    }
    source(format!("docker-image://{reference}"), attrs, about)
}

/// An image in a layout that the client serves.
pub(crate) fn oci_layout(reference: &str, session: &str, store: &str, about: Constraints) -> State {
    let mut attrs = BTreeMap::new();
    for (key, value) in [("oci.session", session), ("oci.store", store)] {
        if !value.is_empty() {
            attrs.insert(key.to_owned(), value.to_owned());
        }
    }
    source(format!("oci-layout://{reference}"), attrs, about)
}

/// A directory of the client.
#[derive(Clone, Debug, Default)]
pub(crate) struct Local<'a> {
    /// Its name.
    pub name: &'a str,
    /// The session that serves it.
    pub session: &'a str,
    /// Only these paths, and what they link to; empty for all.
    pub follow: &'a [String],
    /// Not these.
    pub exclude: &'a [String],
    /// Which earlier transfers may be built upon.
    pub shared_key: &'a str,
    /// Transfer everything again.
    pub no_diff: bool,
}

impl Local<'_> {
    /// As a state.
    pub(crate) fn state(&self, about: Constraints) -> State {
        let mut attrs = BTreeMap::new();
        let mut set = |key: &str, value: String| {
            if !value.is_empty() {
                attrs.insert(key.to_owned(), value);
            }
        };
        let list = |items: &[String]| {
            if items.is_empty() {
                String::new()
            } else {
                go_json::to_string(items).unwrap_or_default()
            }
        };
        set("local.session", self.session.to_owned());
        set("local.followpaths", list(self.follow));
        set("local.excludepatterns", list(self.exclude));
        set("local.sharedkeyhint", self.shared_key.to_owned());
        set(
            "local.differ",
            if self.no_diff { "none".to_owned() } else { String::new() },
        );
        source(format!("local://{}", self.name), attrs, about)
    }
}

/// A file by URL.
pub(crate) fn http(url: &str, filename: &str, checksum: &str, about: Constraints) -> State {
    let mut attrs = BTreeMap::from([("http.filename".to_owned(), filename.to_owned())]);
    if !checksum.is_empty() {
        attrs.insert("http.checksum".to_owned(), checksum.to_owned());
    }
    source(url.to_owned(), attrs, about)
}

/// A git repository. Equal repositories have one identifier whatever the scheme.
pub(crate) fn git(git: &GitRef, keep_git_dir: bool, about: Constraints) -> State {
    let (url, remote) = match GitUrl::parse(&git.remote) {
        Some(url) => (url.remote.clone(), Some(url)),
        None => {
            let url = format!("https://{}", git.remote);
            (url.clone(), GitUrl::parse(&url))
        }
    };
    let mut identifier = remote.as_ref().map_or_else(|| url.clone(), GitUrl::identity);
    if remote.is_some() && !(git.reference.is_empty() && git.subdir.is_empty()) {
        identifier.push('#');
        identifier.push_str(&git.reference);
        if !git.subdir.is_empty() {
            identifier.push(':');
            identifier.push_str(&git.subdir);
        }
    }
    let mut attrs = BTreeMap::new();
    let mut set = |key: &str, value: &str| {
        if !value.is_empty() {
            attrs.insert(key.to_owned(), value.to_owned());
        }
    };
    let flag = |on: bool| if on { "true" } else { "" };
    set("git.keepgitdir", flag(keep_git_dir));
    set("git.fullurl", &url);
    set("git.authtokensecret", "GIT_AUTH_TOKEN");
    set("git.authheadersecret", "GIT_AUTH_HEADER");
    if remote.is_some_and(|r| r.scheme == "ssh") {
        set("git.mountsshsock", "default");
    }
    set("git.checksum", &git.checksum);
    set("git.skipsubmodules", flag(git.submodules == Some(false)));
    set("git.mtime", &git.mtime);
    set("git.fetchbycommit", flag(git.fetch_by_commit));
    source(format!("git://{identifier}"), attrs, about)
}

/// The contents of `dir` alone.
pub(crate) fn sub_directory(state: &State, dir: &str) -> State {
    copied(
        state,
        CopyAction {
            src: dir.to_owned(),
            dir_copy_contents: true,
            ..CopyAction::default()
        },
    )
}

/// What the archive `file` holds.
pub(crate) fn unpacked(state: &State, file: &str) -> State {
    copied(
        state,
        CopyAction {
            src: format!("/{file}"),
            attempt_unpack: true,
            ..CopyAction::default()
        },
    )
}

fn copied(state: &State, copy: CopyAction) -> State {
    let copy = CopyAction {
        dest: "/".to_owned(),
        mode: -1,
        timestamp: -1,
        ..copy
    };
    let step = FileStep::Copy {
        from: state.clone(),
        copy: Box::new(copy),
        owner: None,
    };
    State::scratch().file(vec![step], Constraints::default())
}

/// Gives a state the environment, working directory and platform of an image.
pub(crate) fn apply_config(state: &mut State, image: &Image) {
    for entry in &image.config.env {
        let (name, value) = split_env(entry);
        if !name.is_empty() {
            state.around_mut().env.set(name, value);
        }
    }
    state.set_dir(&image.config.working_dir);
    if !image.architecture.is_empty() && !image.os.is_empty() {
        state.around_mut().platform = Some(image.platform().normalized());
    }
}

/// Whether bytes are the beginning of an archive that contexts may come in: bzip2, gzip, xz or tar.
pub(crate) fn is_archive(head: &[u8]) -> bool {
    let magics: [&[u8]; 3] = [b"BZh", b"\x1f\x8b\x08", b"\xfd7zXZ\0"];
    magics.iter().any(|magic| head.starts_with(magic)) || head.get(..512).is_some_and(is_tar_header)
}

/// Whether a block is a tar header: its checksum is right, counting its own field as blanks.
fn is_tar_header(block: &[u8]) -> bool {
    let Some(field) = block.get(148..156) else { return false };
    let text = String::from_utf8_lossy(field);
    let text = text.trim_matches(|c| c == ' ' || c == '\0');
    let Ok(stored) = i64::from_str_radix(text, 8) else {
        return false;
    };
    let byte = |(i, b): (usize, &u8)| if (148..156).contains(&i) { b' ' } else { *b };
    let unsigned: i64 = block.iter().enumerate().map(|x| i64::from(byte(x))).sum();
    let signed: i64 = block.iter().enumerate().map(|x| i64::from(byte(x).cast_signed())).sum();
    stored == unsigned || stored == signed
}
