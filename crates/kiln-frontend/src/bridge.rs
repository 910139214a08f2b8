//! What a frontend asks of the daemon: solve a graph, read a file of a result, resolve a name, warn the user.
//!
//! The daemon implements [`Bridge`] over a job; tests implement it over literals. A frontend performs no other I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use kiln_llb::{Definition, VertexDigest};
use kiln_oci::Platform;

use crate::dockerfile::span::Span;

/// An error of the daemon, kept whole so that its details (exit code, source excerpts, unknown ones) survive the trip through
/// a frontend. The message is what a Dockerfile author reads.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct BridgeError {
    /// What the error means to a frontend.
    pub kind: BridgeErrorKind,
    /// The sentence.
    pub message: String,
    /// Whether it already points into a text of the user.
    pub located: bool,
    /// The daemon's own error, for it to find again with `downcast_ref`.
    #[source]
    pub source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// The few differences between errors a frontend acts on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BridgeErrorKind {
    /// A file or image is not there.
    NotFound,
    /// A source policy turned an image reference into another kind of source; the text is the rewritten identifier.
    NotAnImage(String),
    /// The user's client went away or gave up.
    Canceled,
    /// Everything else.
    Other,
}

impl BridgeError {
    /// An error of kind [`BridgeErrorKind::Other`].
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            kind: BridgeErrorKind::Other,
            message: message.into(),
            located: false,
            source: None,
        }
    }

    /// The same error with another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: BridgeErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The same error with the daemon's own one underneath.
    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }
}

/// What the daemon can do and where (LLBBridge.Ping, wire.md §5 and §10).
#[derive(Clone, Debug, Default)]
pub struct BridgeInfo {
    /// Enabled capability ids of the bridge itself, for example `frontend.inputs`.
    pub frontend_caps: BTreeSet<String>,
    /// Enabled capability ids of LLB, for example `mergeop`.
    pub llb_caps: BTreeSet<String>,
    /// Workers, the default one first.
    pub workers: Vec<WorkerInfo>,
    /// The client's session; written into sources that the client's machine serves.
    pub session_id: String,
}

/// One worker of the daemon.
#[derive(Clone, Debug, Default)]
pub struct WorkerInfo {
    /// Its id.
    pub id: String,
    /// Platforms it runs, the native one first.
    pub platforms: Vec<Platform>,
}

/// A cache to import from (`cache-imports`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheImport {
    /// `registry`, `local`, `inline`…
    pub kind: String,
    /// Its attributes.
    pub attrs: BTreeMap<String, String>,
}

/// A request for a result (LLBBridge.Solve).
#[derive(Clone, Debug, Default)]
pub struct SolveRequest {
    /// The graph; an empty or missing one is an empty file system.
    pub definition: Option<Definition>,
    /// A frontend to run instead of a definition: `gateway.v0` with options `source` and `cmdline`.
    pub frontend: String,
    /// That frontend's attributes.
    pub frontend_attrs: BTreeMap<String, String>,
    /// That frontend's inputs.
    pub frontend_inputs: BTreeMap<String, Definition>,
    /// Caches to look into.
    pub cache_imports: Vec<CacheImport>,
    /// Compute the result before answering.
    pub evaluate: bool,
}

/// What a frontend, or a solve, ends in. `R` is [`Bridge::Ref`]; `None` in place of one is an empty file system.
#[derive(Clone, Debug)]
pub struct FrontendResult<R> {
    /// The file systems.
    pub refs: ResultRefs<R>,
    /// Result metadata by key (solve.md §7): image configs, `refs.platforms`, `result.json`…
    pub metadata: BTreeMap<String, Bytes>,
    /// Attestations by platform id.
    pub attestations: BTreeMap<String, Vec<Attestation<R>>>,
}

impl<R> Default for FrontendResult<R> {
    fn default() -> Self {
        Self {
            refs: ResultRefs::Single(None),
            metadata: BTreeMap::new(),
            attestations: BTreeMap::new(),
        }
    }
}

/// One file system, or one for each platform. Clients see the difference: a map of one is still an image index.
#[derive(Clone, Debug)]
pub enum ResultRefs<R> {
    /// A single result.
    Single(Option<R>),
    /// Results by platform id, in the order of the request.
    ByPlatform(Vec<(String, Option<R>)>),
}

impl<R> FrontendResult<R> {
    /// The only file system of a single result.
    pub fn into_single(self) -> Option<R> {
        match self.refs {
            ResultRefs::Single(r) => r,
            ResultRefs::ByPlatform(_) => None,
        }
    }
}

/// A statement about a result, here a directory full of them (kind Bundle of wire.md §5).
#[derive(Clone, Debug)]
pub struct Attestation<R> {
    /// Free-form properties, for example `reason`.
    pub metadata: BTreeMap<String, Bytes>,
    /// The file system that holds the statements.
    pub reference: Option<R>,
    /// The directory or file in it.
    pub path: String,
    /// Predicate type every statement of the bundle must have; empty for any.
    pub predicate_type: String,
    /// Whether `path` is a directory of statements rather than one predicate.
    pub bundle: bool,
}

/// How to resolve an image's configuration.
#[derive(Clone, Debug, Default)]
pub struct ResolveImageOptions {
    /// Name of the vertex shown meanwhile.
    pub log_name: String,
    /// The platform wanted.
    pub platform: Option<Platform>,
    /// `default`, `pull` or `local`; empty for default.
    pub resolve_mode: String,
    /// Where to look instead of a registry.
    pub store: Option<OciStore>,
}

/// An OCI layout that the client serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OciStore {
    /// The serving session.
    pub session_id: String,
    /// The store's name there.
    pub store_id: String,
}

/// An image's configuration and where it is.
#[derive(Clone, Debug)]
pub struct ResolvedImage {
    /// The reference after source policies; equals the one asked for otherwise.
    pub reference: String,
    /// Digest of the manifest or index the reference stands for; empty if unknown.
    pub digest: String,
    /// The image config JSON.
    pub config: Bytes,
}

/// A source by identifier and attributes, as in a SourceOp.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSpec {
    /// For example `git://…` or `https://…`.
    pub identifier: String,
    /// Attributes by key.
    pub attrs: BTreeMap<String, String>,
}

/// What is known of a source without fetching all of it.
#[derive(Clone, Debug, Default)]
pub struct SourceMeta {
    /// The source after source policies.
    pub source: Option<SourceSpec>,
    /// The raw commit object of a git source.
    pub git_commit_object: Option<Bytes>,
    /// `Last-Modified` of an HTTP source, in seconds since 1970.
    pub http_last_modified: Option<i64>,
}

/// One entry of a directory, with mode bits as Go's `os.FileMode` numbers them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileStat {
    /// Path relative to the directory read.
    pub path: String,
    /// Go mode bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: i64,
    /// Modification time in nanoseconds since 1970.
    pub mod_time: i64,
    /// Target of a symbolic link.
    pub linkname: String,
}

impl FileStat {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & (1 << 31) != 0
    }

    /// Whether it is a regular file: none of the bits for other types is set.
    pub fn is_regular(&self) -> bool {
        const TYPES: u32 = 1 << 31 | 1 << 27 | 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19;
        self.mode & TYPES == 0
    }
}

/// A finding to show to the user, usually a lint rule (LLBBridge.Warn).
#[derive(Clone, Debug)]
pub struct Warning {
    /// 1 for lint rules.
    pub level: i64,
    /// One line.
    pub short: String,
    /// More lines.
    pub detail: Vec<String>,
    /// Where to read on; may be empty.
    pub url: String,
    /// The lines in `file`.
    pub span: Span,
    /// The file.
    pub file: Option<Arc<kiln_llb::SourceInfo>>,
}

/// The daemon, as a frontend sees it. Calls may overlap; dropping a call's future cancels it.
#[async_trait]
pub trait Bridge: Send + Sync {
    /// A handle on a result, valid as long as the build.
    type Ref: Clone + Send + Sync + std::fmt::Debug;

    /// Capabilities, workers, session.
    async fn ping(&self) -> Result<BridgeInfo, BridgeError>;

    /// A result for a definition or of another frontend. The result is lazy unless `evaluate` is set.
    async fn solve(&self, request: SolveRequest) -> Result<FrontendResult<Self::Ref>, BridgeError>;

    /// A regular file of a result, whole or `length` bytes from `offset` (short at the end of the file). `None` is the empty
    /// file system, in which everything is [`BridgeErrorKind::NotFound`].
    async fn read_file(
        &self,
        reference: Option<&Self::Ref>,
        path: &str,
        range: Option<(u64, u64)>,
    ) -> Result<Bytes, BridgeError>;

    /// The entries of a directory of a result, those matching `include` if given.
    async fn read_dir(
        &self,
        reference: Option<&Self::Ref>,
        path: &str,
        include: Option<&str>,
    ) -> Result<Vec<FileStat>, BridgeError>;

    /// One entry of a result.
    async fn stat_file(&self, reference: Option<&Self::Ref>, path: &str) -> Result<FileStat, BridgeError>;

    /// The configuration of an image, with a vertex named `log_name` shown meanwhile.
    async fn resolve_image_config(
        &self,
        reference: &str,
        options: ResolveImageOptions,
    ) -> Result<ResolvedImage, BridgeError>;

    /// What is known of a git or HTTP source; `return_object` asks for the commit object.
    async fn resolve_source_meta(
        &self,
        source: SourceSpec,
        log_name: &str,
        return_object: bool,
    ) -> Result<SourceMeta, BridgeError>;

    /// Shows a warning at a vertex.
    async fn warn(&self, vertex: VertexDigest, warning: Warning) -> Result<(), BridgeError>;

    /// Inputs handed to this frontend by name.
    async fn inputs(&self) -> Result<BTreeMap<String, Definition>, BridgeError>;
}

/// What turns attributes into a result.
#[async_trait]
pub trait Frontend<B: Bridge>: Send + Sync {
    /// Runs to the end. `attrs` are the attributes of the request, untouched.
    async fn run(
        &self,
        bridge: &B,
        attrs: &BTreeMap<String, String>,
    ) -> Result<FrontendResult<B::Ref>, crate::error::FrontendError>;
}
