//! ADD and COPY: files from the context, other stages, images, URLs, repositories, and from the Dockerfile itself.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use kiln_llb::op::CopyAction;
use kiln_llb::state::{Constraints, FileStep, Owner};
use kiln_llb::{ProgressGroup, State};

use super::chmod::{self, Mode};
use super::dispatch::Step;
use super::names::instruction_text;
use super::{Bridge, Conversion, files};
use crate::context::source;
use crate::dockerfile::expand::Expander;
use crate::dockerfile::instruction::{Add, Copy, Paths};
use crate::dockerfile::lint;
use crate::error::DockerfileError;
use crate::git_ref::{self, Detected, GitRef};
use crate::gotext::{clean_path, join_path, lossy, quote};

/// One of the two instructions, expanded.
struct Transfer<'a> {
    is_add: bool,
    paths: Paths,
    chown: String,
    chmod: String,
    checksum: String,
    exclude: &'a [String],
    link: bool,
    parents: bool,
    keep_git_dir: Option<bool>,
    unpack: Option<bool>,
    /// Where paths are found.
    from: State,
    /// Whether that is the main context.
    from_context: bool,
}

impl<B: Bridge> Conversion<'_, B> {
    pub(super) fn add(&mut self, step: &Step<'_>, add: &Add) -> Result<(), DockerfileError> {
        let (chown, chmod) = (self.expand(step, &add.chown)?, self.expand(step, &add.chmod)?);
        let checksum = self.expand(step, &add.checksum)?;
        let transfer = Transfer {
            is_add: true,
            paths: self.expand_paths(step, &add.paths)?,
            chown,
            chmod,
            checksum,
            exclude: &add.exclude,
            link: add.link,
            parents: false,
            keep_git_dir: add.keep_git_dir,
            unpack: add.unpack,
            from: self.context.state(),
            from_context: true,
        };
        self.transfer(step, &transfer)?;
        let local = |path: &&String| !path.starts_with("http://") && !path.starts_with("https://");
        let used: Vec<String> = transfer
            .paths
            .sources
            .iter()
            .filter(local)
            .map(|p| join_path("/", p))
            .collect();
        self.table.stages[step.stage].context_paths.extend(used);
        Ok(())
    }

    pub(super) fn copy(&mut self, step: &Step<'_>, copy: &Copy) -> Result<(), DockerfileError> {
        let (chown, chmod) = (self.expand(step, &copy.chown)?, self.expand(step, &copy.chmod)?);
        let paths = self.expand_paths(step, &copy.paths)?;
        let source = step.sources.first().copied();
        let from = match source {
            None => self.context.state(),
            Some(index) if !self.table.stages[index].dispatched => {
                return Err(DockerfileError::new(format!(
                    "cannot copy from stage {}, it needs to be defined before current stage {}",
                    quote(&copy.from),
                    quote(&self.table.stages[step.stage].label)
                )));
            }
            Some(index) => self.table.stages[index].state.clone(),
        };
        let transfer = Transfer {
            is_add: false,
            paths,
            chown,
            chmod,
            checksum: String::new(),
            exclude: &copy.exclude,
            link: copy.link,
            parents: copy.parents,
            keep_git_dir: None,
            unpack: None,
            from,
            from_context: source.is_none(),
        };
        self.transfer(step, &transfer)?;
        for path in &transfer.paths.sources {
            match source {
                None => {
                    self.table.stages[step.stage].context_paths.insert(join_path("/", path));
                }
                Some(index) => self.table.use_path(index, path),
            }
        }
        Ok(())
    }

    fn expand_paths(&self, step: &Step<'_>, paths: &Paths) -> Result<Paths, DockerfileError> {
        let mut out = Paths {
            sources: paths
                .sources
                .iter()
                .map(|p| self.expand(step, p))
                .collect::<Result<_, _>>()?,
            destination: self.expand(step, &paths.destination)?,
            contents: paths.contents.clone(),
        };
        // Quotes mean nothing inside a document, and the escape character is always the backslash.
        let expander = Expander {
            ignore_quotes: true,
            ..Expander::default()
        };
        for content in out.contents.iter_mut().filter(|c| c.expand) {
            let text = lossy(&content.data).into_owned();
            content.data = self.expand_with(step, expander, &text)?.text.into_bytes();
        }
        Ok(out)
    }

    fn transfer(&mut self, step: &Step<'_>, transfer: &Transfer<'_>) -> Result<(), DockerfileError> {
        let keyword = if transfer.is_add { "ADD" } else { "COPY" };
        let stage = &self.table.stages[step.stage];
        let platform = stage.platform.clone();
        let os = platform.as_ref().map_or("", |p| p.os.as_str());
        let dest = destination(&stage.state.around().dir, &transfer.paths.destination, os)?;
        let mut base = CopyAction {
            dest,
            mode: -1,
            timestamp: -1,
            create_dest_path: true,
            ..CopyAction::default()
        };
        base.exclude_patterns = transfer.exclude.to_vec();
        if !transfer.chmod.is_empty() {
            match chmod::parse(&transfer.chmod).map_err(DockerfileError::new)? {
                Mode::Bits(bits) => base.mode = bits.cast_signed(),
                Mode::Symbolic(text) => {
                    base.mode = 0;
                    base.mode_str = text;
                }
            }
        }
        check_checksum(transfer)?;
        let mut history = keyword.to_owned();
        if transfer.parents {
            history.push_str(" --parents");
        }
        for (flag, value) in [("chown", &transfer.chown), ("chmod", &transfer.chmod)] {
            if !value.is_empty() {
                history.push_str(&format!(" --{flag}={value}"));
            }
        }
        let text = instruction_text(&self.expander(), &step.instruction.text, self.env_of(step.stage));
        let name = self.step_name(step.stage, &text, platform.as_ref(), true);
        let owner = (!transfer.chown.is_empty()).then(|| Owner::parse(&transfer.chown));
        let mut steps = Vec::new();
        let mut checksum = transfer.checksum.clone();
        let mut keep_git_dir = transfer.keep_git_dir;
        for path in &transfer.paths.sources {
            history.push(' ');
            history.push_str(path);
            let (from, copy) = match git_ref::detect(path) {
                Detected::Invalid(message) => return Err(DockerfileError::new(message)),
                Detected::Git(git) if !git.looks_local => {
                    if !transfer.is_add {
                        return Err(DockerfileError::new("source can't be a git ref for COPY"));
                    }
                    let state = repository(*git, &mut keep_git_dir, &mut checksum, &name)?;
                    (
                        state,
                        CopyAction {
                            src: "/".to_owned(),
                            ..base.clone()
                        },
                    )
                }
                _ if path.starts_with("http://") || path.starts_with("https://") => {
                    if !transfer.is_add {
                        return Err(DockerfileError::new("source can't be a URL for COPY"));
                    }
                    let file = git_ref::url_file_name(path).unwrap_or_else(|| "__unnamed__".to_owned());
                    let about =
                        Constraints::named(name.clone()).described("com.docker.dockerfile.v1.command", String::new());
                    let state = source::http(path, &file, &digest(&checksum)?, about);
                    let attempt_unpack = transfer.unpack.unwrap_or(false);
                    (
                        state,
                        CopyAction {
                            src: file,
                            attempt_unpack,
                            ..base.clone()
                        },
                    )
                }
                _ => {
                    self.report_ignored(step, transfer, path);
                    (transfer.from.clone(), local_copy(transfer, path, os, &base)?)
                }
            };
            steps.push(FileStep::Copy {
                from,
                copy: Box::new(copy),
                owner: owner.clone(),
            });
        }
        for content in &transfer.paths.contents {
            history.push_str(" <<");
            history.push_str(&content.name);
            let file = files::without_drive(&content.name, os, false)
                .map_err(|e| DockerfileError::new(format!("removing drive letter: {e}")))?;
            let data = content.data.clone().into();
            let mkfile = FileStep::MkFile {
                path: file.clone(),
                mode: 0o644,
                data,
                owner: None,
                timestamp: -1,
            };
            let about = Constraints::named("[internal] preparing inline document");
            let from = State::scratch().file(vec![mkfile], about);
            let copy = Box::new(CopyAction {
                src: files::to_slash(&file, os),
                ..base.clone()
            });
            steps.push(FileStep::Copy {
                from,
                copy,
                owner: owner.clone(),
            });
        }
        history.push(' ');
        history.push_str(&transfer.paths.destination);
        history.push_str(" # buildkit");
        self.apply(step, transfer, steps, &name, &text);
        self.commit(step.stage, history, true)
    }

    /// Makes the operation: on the stage, or on its own and laid over the stage.
    fn apply(&mut self, step: &Step<'_>, transfer: &Transfer<'_>, steps: Vec<FileStep>, name: &str, text: &str) {
        let mut about = Constraints::named(name);
        about.locations.push(self.location(step.instruction.span));
        about.ignore_cache = self.table.stages[step.stage].ignore_cache;
        if !(transfer.link && transfer.chmod.is_empty() && self.client.has("mergeop")) {
            let stage = &mut self.table.stages[step.stage];
            stage.state = stage.state.file(steps, about);
            return;
        }
        // Both operations are the same step for the user, and both names are made with its number.
        self.table.stages[step.stage].step -= usize::from(self.table.stages[step.stage].step > 0);
        let platform = self.table.stages[step.stage].platform.clone();
        let merge_name = self.step_name(step.stage, &format!("LINK {text}"), platform.as_ref(), true);
        let group = ProgressGroup {
            id: random_id(),
            name: name.to_owned(),
            weak: true,
        };
        let mut merge_about = about.clone();
        merge_about.description.insert("llb.customname".to_owned(), merge_name);
        merge_about.progress_group = Some(ProgressGroup {
            weak: false,
            ..group.clone()
        });
        about.progress_group = Some(group);
        let stage = &mut self.table.stages[step.stage];
        let linked = State::scratch().file(steps, about);
        stage.state = stage.state.merge(&linked, merge_about);
    }

    fn report_ignored(&self, step: &Step<'_>, transfer: &Transfer<'_>, path: &str) {
        let Some(matcher) = self
            .ignored
            .as_ref()
            .filter(|m| transfer.from_context && !m.has_exclusions())
        else {
            return;
        };
        let clean = clean_path(path);
        if matches!(clean.as_str(), "." | "/") && !self.ignores_everything {
            return;
        }
        if matcher.matches(clean.as_bytes()) {
            step.lint.report(&lint::COPY_IGNORED_FILE, step.instruction.span, || {
                let verb = if transfer.is_add { "Add" } else { "Copy" };
                format!(
                    "Attempting to {verb} file {} that is excluded by .dockerignore",
                    quote(&clean)
                )
            });
        }
    }
}

/// Where files go: below the working directory unless absolute, a trailing slash preserved.
fn destination(dir: &str, path: &str, os: &str) -> Result<String, DockerfileError> {
    let wrap = |e: String| DockerfileError::new(format!("removing drive letter: {e}"));
    let path = files::without_drive(path, os, true).map_err(wrap)?;
    if files::is_absolute(&path, os) {
        return files::normalize("/", &path, os, true).map_err(DockerfileError::new);
    }
    let path = if path.is_empty() || path == "." { "./" } else { &path };
    files::normalize(dir, path, os, true).map_err(DockerfileError::new)
}

fn check_checksum(transfer: &Transfer<'_>) -> Result<(), DockerfileError> {
    if transfer.checksum.is_empty() {
        return Ok(());
    }
    let [only] = transfer.paths.sources.as_slice() else {
        return Err(DockerfileError::new("checksum can't be specified for multiple sources"));
    };
    let is_url = only.starts_with("http://") || only.starts_with("https://");
    if is_url || matches!(git_ref::detect(only), Detected::Git(_)) {
        return Ok(());
    }
    Err(DockerfileError::new("checksum requires HTTP(S) or Git sources"))
}

/// A checksum of a file, checked for its form.
fn digest(text: &str) -> Result<String, DockerfileError> {
    if text.is_empty() {
        return Ok(String::new());
    }
    let bad = |what: &str| Err(DockerfileError::new(format!("invalid checksum digest {what}")));
    let Some((algorithm, hex)) = text.split_once(':') else {
        return bad("format");
    };
    let part = |p: &str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let encoded = |b: u8| b.is_ascii_alphanumeric() || b"=_-".contains(&b);
    if !algorithm.split(['+', '.', '_', '-']).all(part) || hex.is_empty() || !hex.bytes().all(encoded) {
        return bad("format");
    }
    let length = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return Err(DockerfileError::new("unsupported digest algorithm")),
    };
    if hex.len() != length {
        return bad("length");
    }
    if !hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return bad("format");
    }
    Ok(text.to_owned())
}

/// A repository to add. What flags and address say about it must agree.
fn repository(
    git: GitRef,
    keep_git_dir: &mut Option<bool>,
    checksum: &mut String,
    name: &str,
) -> Result<State, DockerfileError> {
    if let (Some(flag), Some(query)) = (*keep_git_dir, git.keep_git_dir)
        && flag != query
    {
        return Err(DockerfileError::new("inconsistent keep-git-dir configuration"));
    }
    *keep_git_dir = git.keep_git_dir.or(*keep_git_dir);
    if !checksum.is_empty() && !git.checksum.is_empty() && *checksum != git.checksum {
        let (flag, query) = (quote(checksum), quote(&git.checksum));
        return Err(DockerfileError::new(format!("checksum mismatch {flag} != {query}")));
    }
    if !git.checksum.is_empty() {
        checksum.clone_from(&git.checksum);
    }
    let keep = *keep_git_dir == Some(true);
    let git = GitRef {
        checksum: checksum.clone(),
        mtime: String::new(),
        ..git
    };
    Ok(source::git(&git, keep, Constraints::named(name)))
}

fn local_copy(transfer: &Transfer<'_>, path: &str, os: &str, base: &CopyAction) -> Result<CopyAction, DockerfileError> {
    let wrap = |e: String| DockerfileError::new(format!("removing drive letter: {e}"));
    let mut copy = CopyAction {
        follow_symlink: true,
        dir_copy_contents: true,
        allow_wildcard: true,
        allow_empty_wildcard: true,
        attempt_unpack: transfer.unpack.unwrap_or(transfer.is_add),
        ..base.clone()
    };
    let mut from = path;
    if transfer.parents {
        // What stands before the pivot is where the kept part of the path begins.
        let (root, pattern) = path.split_once("/./").unwrap_or(("/", path));
        from = root;
        let pattern = files::normalize("/", pattern, os, false).map_err(wrap)?;
        copy.include_patterns = vec![pattern.strip_prefix('/').unwrap_or(&pattern).to_owned()];
        if !has_wildcard(root) && !has_wildcard(&pattern) {
            let required = join_path(root, &pattern);
            copy.required_paths = vec![files::normalize("/", &required, os, false).map_err(wrap)?];
        }
    }
    copy.src = files::normalize("/", from, os, false).map_err(wrap)?;
    Ok(copy)
}

fn has_wildcard(path: &str) -> bool {
    kiln_match::has_wildcard(path.as_bytes())
}

/// An id nobody else has: groups are told apart by it, and nothing is derived from it.
fn random_id() -> String {
    let part = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", part(), part())
}
