//! `SOURCE_DATE_EPOCH`: the moment a build is dated to, given as a number or taken from a source.

use kiln_llb::op::SourceOp;
use kiln_llb::state::Constraints;
use kiln_llb::{Op, State};
use kiln_oci::Timestamp;

use super::table::SCRATCH;
use super::{Bridge, Conversion};
use crate::bridge::SourceSpec;
use crate::context::{BuildClient, source};
use crate::dockerfile::instruction::{Add, Argument, Kind};
use crate::dockerfile::stage::{Dockerfile, Stage};
use crate::error::{DockerfileError, Located};
use crate::git_ref::{self, Detected, GitRef};

const NAME: &str = "SOURCE_DATE_EPOCH";

impl<B: Bridge> Conversion<'_, B> {
    /// Finds the moment and puts its number in place of whatever the argument said.
    pub(super) async fn resolve_epoch(&mut self, file: &Dockerfile) -> Result<(), DockerfileError> {
        let Some(value) = self.global_value(NAME) else {
            return Ok(());
        };
        self.epoch = match value.parse::<i64>() {
            Ok(seconds) => Some(Timestamp::new(seconds, 0)),
            Err(_) if value.is_empty() => None,
            Err(_) => self
                .epoch_of_source(&value, file)
                .await?
                .map(|seconds| Timestamp::new(seconds, 0)),
        };
        let number = self.epoch.map(|t| t.seconds().to_string()).unwrap_or_default();
        self.replace_global(NAME, &number);
        Ok(())
    }

    async fn epoch_of_source(&self, value: &str, file: &Dockerfile) -> Result<Option<i64>, DockerfileError> {
        if value == "context" {
            let state = self.client.main_context(&[]).await?;
            return self
                .date_of(&state, "[internal] resolve main build context metadata")
                .await;
        }
        if let Some(context) = self.client.named_context(value, None)? {
            let loaded = context.load(self.client).await?;
            if let Some(pending) = &loaded.pending {
                pending.settle(&[]);
            }
            let name = format!("[internal] resolve SOURCE_DATE_EPOCH named context {value}");
            return self.date_of(&loaded.state, &name).await;
        }
        let stage = file
            .stages
            .iter()
            .find(|s| s.name.to_lowercase() == value.to_lowercase());
        let Some(stage) = stage else {
            return Err(DockerfileError::new(format!("invalid SOURCE_DATE_EPOCH: {value}")));
        };
        let state = self.only_source(stage).at_span(stage.span)?;
        let name = format!("[internal] resolve SOURCE_DATE_EPOCH source stage {}", stage.name);
        self.date_of(&state, &name).await
    }

    /// The source of a stage that consists of one remote ADD.
    fn only_source(&self, stage: &Stage) -> Result<State, DockerfileError> {
        let mut env = self.global_args.clone();
        env.remove(NAME);
        if self.expander().text(&stage.base, &env)? != SCRATCH {
            return Err(DockerfileError::new("SOURCE_DATE_EPOCH stage must use FROM scratch"));
        }
        let one = || DockerfileError::new("SOURCE_DATE_EPOCH stage must contain exactly one remote ADD");
        let mut found = None;
        for instruction in &stage.instructions {
            match &instruction.kind {
                Kind::Arg(arguments) => {
                    for Argument { name, value, .. } in arguments {
                        let value = match (self.build_args.get(name), value) {
                            (Some(given), _) => given.clone(),
                            (None, Some(default)) => self.expander().text(default, &env)?,
                            (None, None) => continue,
                        };
                        env.set(name.clone(), value);
                    }
                }
                Kind::Add(_) if found.is_some() => return Err(one()),
                Kind::Add(add) => found = Some(self.remote_add(add, &env)?),
                _ => {
                    let why = "does not meet source-only requirements: unsupported";
                    let keyword = &instruction.keyword;
                    return Err(DockerfileError::new(format!(
                        "SOURCE_DATE_EPOCH stage {why} {keyword} instruction"
                    )));
                }
            }
        }
        found.ok_or_else(one)
    }

    fn remote_add(&self, add: &Add, env: &kiln_llb::EnvList) -> Result<State, DockerfileError> {
        let ([path], true) = (add.paths.sources.as_slice(), add.paths.contents.is_empty()) else {
            return Err(DockerfileError::new(
                "SOURCE_DATE_EPOCH stage must contain exactly one remote ADD source",
            ));
        };
        let path = self.expander().text(path, env)?;
        let checksum = self.expander().text(&add.checksum, env)?;
        match git_ref::detect(&path) {
            Detected::Invalid(message) => Err(DockerfileError::new(message)),
            Detected::Git(git) if !git.looks_local => {
                let keep = add.keep_git_dir == Some(true) || git.keep_git_dir == Some(true);
                let checksum = if checksum.is_empty() {
                    git.checksum.clone()
                } else {
                    checksum
                };
                let git = GitRef {
                    checksum,
                    mtime: String::new(),
                    fetch_by_commit: false,
                    ..*git
                };
                Ok(source::git(&git, keep, Constraints::default()))
            }
            _ if path.starts_with("http://") || path.starts_with("https://") => {
                let name = git_ref::url_file_name(&path).unwrap_or_else(|| "__unnamed__".to_owned());
                Ok(source::http(&path, &name, &checksum, Constraints::default()))
            }
            _ => Err(DockerfileError::new(
                "SOURCE_DATE_EPOCH stage source must be a single HTTP(S) or Git ADD",
            )),
        }
    }

    /// When a source was made: committed, last modified, or the newest file of an archive.
    async fn date_of(&self, state: &State, log_name: &str) -> Result<Option<i64>, DockerfileError> {
        let Some(spec) = single_source(state)? else {
            return Ok(None);
        };
        let is_git = spec.identifier.starts_with("git://");
        let is_http = spec.identifier.starts_with("http://") || spec.identifier.starts_with("https://");
        if !is_git && !is_http {
            return Ok(None);
        }
        let meta = self
            .client
            .bridge
            .resolve_source_meta(spec.clone(), log_name, is_git)
            .await?;
        if let Some(commit) = meta.git_commit_object.filter(|c| !c.is_empty()) {
            return committed(&commit).map(Some);
        }
        if meta.http_last_modified.is_some() {
            return Ok(meta.http_last_modified);
        }
        let Some(file) = spec.attrs.get("http.filename").filter(|_| is_http) else {
            return Ok(None);
        };
        let op = SourceOp {
            identifier: spec.identifier.clone(),
            attrs: spec.attrs.clone(),
        };
        newest_file(self.client, &State::source(op, Constraints::default()), file).await
    }
}

/// The committer's date of a commit object.
fn committed(object: &[u8]) -> Result<i64, DockerfileError> {
    let text = String::from_utf8_lossy(object);
    let header = text.split("\n\n").next().unwrap_or_default();
    let line = header.lines().find_map(|line| line.strip_prefix("committer "));
    // `Name <mail> seconds zone`
    let seconds = line.and_then(|line| line.rsplit_once('>')?.1.split_whitespace().next()?.parse().ok());
    seconds.ok_or_else(|| DockerfileError::new("commit object has no committer date"))
}

/// The only source a state is made of; `None` if there are several or none.
fn single_source(state: &State) -> Result<Option<SourceSpec>, DockerfileError> {
    let wrap = |e: kiln_llb::LlbError| DockerfileError::new(e.to_string());
    let mut found = None;
    for op in &state.marshal(None).map_err(wrap)?.ops {
        let decoded = kiln_llb::wire::decode_op(op).map_err(wrap)?;
        if let Some(Op::Source(source)) = decoded.op {
            if found.is_some() {
                return Ok(None);
            }
            found = Some(SourceSpec {
                identifier: source.identifier,
                attrs: source.attrs,
            });
        }
    }
    Ok(found)
}

/// Most directories that are looked at in an unpacked archive.
const MAX_DIRECTORIES: usize = 100_000;

/// The modification time of the newest regular file of an archive; `None` if the file is no archive.
async fn newest_file<B: Bridge>(
    client: &BuildClient<'_, B>,
    state: &State,
    file: &str,
) -> Result<Option<i64>, DockerfileError> {
    let wrap = |e: kiln_llb::LlbError| DockerfileError::new(e.to_string());
    let reference = client.solve(state.marshal(None).map_err(wrap)?, false).await?;
    let head = client
        .bridge
        .read_file(reference.as_ref(), file, Some((0, 1024)))
        .await?;
    if !source::is_archive(&head) {
        return Ok(None);
    }
    let unpacked = source::unpacked(state, file).marshal(None).map_err(wrap)?;
    let reference = client.solve(unpacked, false).await?;
    let mut newest = None;
    let mut pending = vec!["/".to_owned()];
    let mut visited = 0;
    while let Some(dir) = pending.pop() {
        visited += 1;
        if visited > MAX_DIRECTORIES {
            return Err(DockerfileError::new("archive has too many directories to date it"));
        }
        for entry in client.bridge.read_dir(reference.as_ref(), &dir, None).await? {
            if entry.is_dir() {
                pending.push(crate::gotext::join_path(&dir, &entry.path));
            } else if entry.is_regular() {
                newest = newest.max(Some(entry.mod_time.div_euclid(1_000_000_000)));
            }
        }
    }
    Ok(newest)
}
