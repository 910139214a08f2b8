//! A daemon that solves nothing: it serves literals, and remembers what it was asked.

use std::collections::BTreeMap;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use kiln_frontend::bridge::*;
use kiln_llb::op::Op;
use kiln_llb::{Definition, VertexDigest, wire};
use kiln_oci::{Digest, ImageRef, Platform};

/// What the daemon serves.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    /// Files of whatever was solved, by path.
    pub files: BTreeMap<String, Bytes>,
    /// Image configs by familiar reference; other images get a plain one. A null is an image that does not exist.
    pub images: BTreeMap<String, serde_json::Value>,
    /// Frontend inputs.
    pub inputs: BTreeMap<String, Definition>,
    /// Capabilities it lacks.
    pub without: Vec<String>,
    /// What it was asked, in order.
    pub log: Mutex<Vec<Asked>>,
}

/// One request to the daemon.
#[derive(Clone, Debug)]
pub(crate) enum Asked {
    /// Solve.
    Solve(Box<SolveRequest>),
    /// Resolve an image.
    Image(String, ResolveImageOptions),
    /// Warn.
    Warn(Warning),
}

const LLB_CAPS: &[&str] = &[
    "file.base",
    "mergeop",
    "exec.meta.setsdefaultpath",
    "exec.meta.ulimit",
    "exec.mount.tmpfs.size",
    "exec.meta.cgroup.parent",
    "exec.meta.linux.resources",
    "exec.mount.bind.readwrite-nooutput",
    "exec.meta.cdi",
];

impl Fake {
    fn note(&self, asked: Asked) {
        self.log.lock().unwrap().push(asked);
    }

    /// The requests so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.log.lock().unwrap().clone()
    }
}

/// A result; only its number matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ref(pub usize);

/// The config every image has unless a test says otherwise.
pub(crate) fn plain_config(platform: Option<&Platform>) -> serde_json::Value {
    let default = Platform::new("linux", "amd64", "");
    let p = platform.unwrap_or(&default);
    let mut config = serde_json::json!({
        "architecture": p.architecture,
        "os": p.os,
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["sh"],
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", "ab".repeat(32))]},
        "history": [{"created_by": "base"}],
    });
    if !p.variant.is_empty() {
        config["variant"] = p.variant.clone().into();
    }
    config
}

fn missing(path: &str) -> BridgeError {
    BridgeError::new(format!("open {path}: no such file or directory")).with_kind(BridgeErrorKind::NotFound)
}

#[async_trait]
impl Bridge for Fake {
    type Ref = Ref;

    async fn ping(&self) -> Result<BridgeInfo, BridgeError> {
        let has = |cap: &&&str| !self.without.iter().any(|w| w == *cap);
        Ok(BridgeInfo {
            frontend_caps: ["frontend.inputs".to_owned()].into(),
            llb_caps: LLB_CAPS.iter().filter(has).map(|c| (*c).to_owned()).collect(),
            workers: vec![WorkerInfo {
                id: "w".to_owned(),
                platforms: vec![Platform::new("linux", "amd64", "")],
            }],
            session_id: "session".to_owned(),
        })
    }

    async fn solve(&self, request: SolveRequest) -> Result<FrontendResult<Ref>, BridgeError> {
        self.note(Asked::Solve(Box::new(request)));
        let number = self.log.lock().unwrap().len();
        Ok(FrontendResult {
            refs: ResultRefs::Single(Some(Ref(number))),
            ..FrontendResult::default()
        })
    }

    async fn read_file(&self, _: Option<&Ref>, path: &str, range: Option<(u64, u64)>) -> Result<Bytes, BridgeError> {
        let file = self.files.get(path).cloned().ok_or_else(|| missing(path))?;
        Ok(match range {
            None => file,
            Some((offset, length)) => {
                let start = (offset as usize).min(file.len());
                let end = (start + length as usize).min(file.len());
                file.slice(start..end)
            }
        })
    }

    async fn read_dir(&self, _: Option<&Ref>, path: &str, _: Option<&str>) -> Result<Vec<FileStat>, BridgeError> {
        Err(missing(path))
    }

    async fn stat_file(&self, _: Option<&Ref>, path: &str) -> Result<FileStat, BridgeError> {
        Err(missing(path))
    }

    async fn resolve_image_config(
        &self,
        reference: &str,
        options: ResolveImageOptions,
    ) -> Result<ResolvedImage, BridgeError> {
        let platform = options.platform.clone();
        self.note(Asked::Image(reference.to_owned(), options));
        let familiar = ImageRef::parse(reference).unwrap().familiar();
        let familiar = familiar.split('@').next().unwrap().trim_end_matches(":latest");
        let config = match self.images.get(familiar) {
            Some(serde_json::Value::Null) => return Err(BridgeError::new(format!("{reference}: not found"))),
            Some(config) => config.clone(),
            None => plain_config(platform.as_ref()),
        };
        Ok(ResolvedImage {
            reference: reference.to_owned(),
            digest: Digest::of(reference).to_string(),
            config: config.to_string().into(),
        })
    }

    async fn resolve_source_meta(&self, _: SourceSpec, _: &str, _: bool) -> Result<SourceMeta, BridgeError> {
        Ok(SourceMeta {
            http_last_modified: Some(1_700_000_000),
            ..SourceMeta::default()
        })
    }

    async fn warn(&self, _: VertexDigest, warning: Warning) -> Result<(), BridgeError> {
        self.note(Asked::Warn(warning));
        Ok(())
    }

    async fn inputs(&self) -> Result<BTreeMap<String, Definition>, BridgeError> {
        Ok(self.inputs.clone())
    }
}

/// The operations of a definition, the terminal one left out.
pub(crate) fn operations(definition: &Definition) -> Vec<Op> {
    definition
        .ops
        .iter()
        .filter_map(|op| wire::decode_op(op).unwrap().op)
        .collect()
}
