//! The keys of sources (cache-keys.md §2 "source").

use kiln_oci::{ChainId, DiffId, Digest, Platform};
use kiln_solver::OpDigest;

use super::json::Object;

/// The op digest of a source with this key, and the text it is taken over.
pub fn source_digest(key: &str) -> (OpDigest, String) {
    let subject = format!("buildkit.source.v0:{key}");
    (OpDigest(Digest::of(&subject)), subject)
}

/// The first key of an image: what its reference resolved to (the index, if there is one), the platform, and the limit on
/// layers if one is set.
pub fn image_key(resolved: &Digest, platform: &Platform, layer_limit: Option<u32>) -> String {
    let platform = platform.normalized();
    let json = Object::new()
        .text_always("Digest", &resolved.to_string())
        .text_always("OS", &platform.os)
        .text_always("Arch", &platform.architecture)
        .text("Variant", &platform.variant)
        .text("OSVersion", &platform.os_version)
        .texts("OSFeatures", &platform.os_features)
        .int("Limit", layer_limit.unwrap_or(0))
        .end();
    Digest::of(json).to_string()
}

/// The second key of an image: the chain of its layers. `None` for an image without layers, which has its first key only.
pub fn chain_key(layers: &[DiffId]) -> Option<String> {
    ChainId::of(layers).map(|chain| chain.to_string())
}

/// A single file made of a blob.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlobFile {
    /// Name of the file.
    pub filename: String,
    /// Permission bits.
    pub perm: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The key of a blob taken out of a repository.
pub fn blob_key(blob: &Digest, file: &BlobFile) -> String {
    let json = Object::new()
        .text_always("Digest", &blob.to_string())
        .text_always("Filename", &file.filename)
        .int_always("Perm", file.perm)
        .int_always("UID", file.uid)
        .int_always("GID", file.gid)
        .end();
    Digest::of(json).to_string()
}

/// What the key of a git source is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GitKey {
    /// The commit; with `keep_git_dir` the tag object of an annotated tag.
    pub commit: String,
    /// Whether `.git` is kept.
    pub keep_git_dir: bool,
    /// Full reference, or the commit if the reference is one; empty if not known. Counts with `keep_git_dir` only.
    pub reference: String,
    /// Directory that is taken, clean and without leading slash; empty for all.
    pub subdir: String,
    /// Whether submodules stay away.
    pub skip_submodules: bool,
    /// How times are set; empty and `checkout` mean as git does.
    pub mtime: String,
    /// Whether a bundle is made instead of a checkout.
    pub bundle: bool,
}

/// The key of a git source.
pub fn git_key(git: &GitKey) -> String {
    let mut key = git.commit.clone();
    if git.keep_git_dir {
        key.push_str(".git");
        if !git.reference.is_empty() {
            key.push('#');
            key.push_str(&git.reference);
        }
    }
    if !git.subdir.is_empty() {
        key.push(':');
        key.push_str(&git.subdir);
    }
    if git.skip_submodules {
        key.push_str("(skip-submodules)");
    }
    if !git.mtime.is_empty() && git.mtime != "checkout" {
        key.push_str(&format!("(mtime={})", git.mtime));
    }
    if git.bundle {
        key.push_str("(bundle)");
    }
    key
}

/// What the key of a downloaded file is made of. Its address is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpKey {
    /// Name and metadata of the file.
    pub file: BlobFile,
    /// Digest of its content, as text.
    pub checksum: String,
    /// `Last-Modified` as an HTTP date; empty if unknown or pinned by checksum.
    pub last_modified: String,
    /// Name of the secret that holds the authorization header.
    pub auth_header_secret: String,
    /// Headers the user sets, sorted by canonical name.
    pub headers: Vec<(String, String)>,
}

/// The key of a downloaded file.
pub fn http_key(http: &HttpKey) -> String {
    let json = Object::new()
        .text_always("Filename", &http.file.filename)
        .int_always("Perm", http.file.perm)
        .int_always("UID", http.file.uid)
        .int_always("GID", http.file.gid)
        .text_always("Checksum", &http.checksum)
        .text("LastModTime", &http.last_modified)
        .text("AuthHeaderSecret", &http.auth_header_secret)
        .list(
            "Header",
            http.headers
                .iter()
                .map(|(name, value)| Object::new().text("Name", name).text("Value", value).end()),
        )
        .end();
    Digest::of(json).to_string()
}
