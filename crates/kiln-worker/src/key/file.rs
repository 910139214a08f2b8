//! The key of file changes (cache-keys.md §2 "file", §3).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_llb::op::{ChownOpt, CopyAction, FileAction, FileActionKind, FileOp, UserOpt};
use kiln_solver::Dep;

use super::json::{Json, Object, list, string};
use super::select::{ContentSelector, ordered, selector_of};
use super::{KeyError, OpKey};

/// The key of `op` with `inputs` inputs.
pub fn file_key(op: &FileOp, inputs: usize) -> Result<OpKey, KeyError> {
    let mut encoded = Vec::with_capacity(op.actions.len());
    let mut indexes = Vec::with_capacity(op.actions.len());
    let mut selected: Vec<Vec<ContentSelector>> = vec![Vec::new(); inputs];
    let mut changed = vec![false; inputs];
    for action in &op.actions {
        if let Some(slot) = op_input(action.input, inputs).and_then(|i| changed.get_mut(i)) {
            *slot = true;
        }
        encoded.push(string(&STANDARD.encode(action_json(action, inputs))));
        indexes.push([index(action.input), index(action.secondary_input), index(action.output)]);
        select(action, &mut selected)?;
    }
    let subject = Object::new()
        .text_always("Type", "buildkit.file.v0")
        .raw("Actions", list(encoded))
        .opt(
            "indexes",
            (!is_usual(&indexes)).then(|| list(indexes.iter().map(|i| list(i.iter().map(number))))),
        )
        .end();
    let mut key = OpKey::new(subject, inputs);
    for (input, selectors) in selected.into_iter().enumerate() {
        // Who changes an input depends on all of it.
        if selectors.is_empty() || changed.get(input).copied().unwrap_or(true) {
            continue;
        }
        if let (Some(dep), Some(slot)) = (key.deps.get_mut(input), key.selectors.get_mut(input)) {
            let mut paths: Vec<&str> = selectors.iter().map(|s| s.path.as_str()).collect();
            paths.sort_unstable_by(|a, b| b.cmp(a));
            *dep = Dep {
                selector: Some(selector_of(&paths)),
                content: true,
            };
            *slot = ordered(selectors);
        }
    }
    Ok(key)
}

fn index(value: Option<u32>) -> i64 {
    value.map_or(-1, i64::from)
}

fn number(n: &i64) -> Json {
    n.to_string().into_bytes()
}

/// The position among the vertex's inputs, unless the index means an earlier action or nothing.
fn op_input(index: Option<u32>, inputs: usize) -> Option<usize> {
    index.map(|i| i as usize).filter(|i| *i < inputs)
}

/// Whether the actions are numbered as they are most of the time: each on top of the one before, the last is the output.
fn is_usual(indexes: &[[i64; 3]]) -> bool {
    let n = indexes.len() as i64;
    indexes.iter().zip(0i64..).all(|(&[input, secondary, output], k)| {
        input == if k == 0 { 0 } else { n + k - 1 }
            && (secondary == -1 || secondary == 1)
            && output == if k == n - 1 { 0 } else { -1 }
    })
}

fn action_json(action: &FileAction, inputs: usize) -> Json {
    match &action.kind {
        FileActionKind::Copy(c) => {
            let from_input = op_input(action.secondary_input, inputs).is_some();
            copy_json(c, if from_input { last_element(&c.src) } else { &c.src })
        }
        FileActionKind::MkFile(m) => Object::new()
            .text("path", &m.path)
            .int("mode", m.mode)
            .text("data", &STANDARD.encode(&m.data))
            .opt("owner", m.owner.as_ref().map(owner))
            .int("timestamp", m.timestamp)
            .end(),
        FileActionKind::MkDir(m) => Object::new()
            .text("path", &m.path)
            .int("mode", m.mode)
            .flag("makeParents", m.make_parents)
            .opt("owner", m.owner.as_ref().map(owner))
            .int("timestamp", m.timestamp)
            .end(),
        FileActionKind::Symlink(s) => Object::new()
            .text("oldpath", &s.oldpath)
            .text("newpath", &s.newpath)
            .opt("owner", s.owner.as_ref().map(owner))
            .int("timestamp", s.timestamp)
            .end(),
        FileActionKind::Rm(r) => Object::new()
            .text("path", &r.path)
            .flag("allowNotFound", r.allow_not_found)
            .flag("allowWildcard", r.allow_wildcard)
            .end(),
    }
}

fn copy_json(c: &CopyAction, src: &str) -> Json {
    Object::new()
        .text("src", src)
        .text("dest", &c.dest)
        .opt("owner", c.owner.as_ref().map(owner))
        .int("mode", c.mode)
        .flag("followSymlink", c.follow_symlink)
        .flag("dirCopyContents", c.dir_copy_contents)
        .flag("attemptUnpackDockerCompatibility", c.attempt_unpack)
        .flag("createDestPath", c.create_dest_path)
        .flag("allowWildcard", c.allow_wildcard)
        .flag("allowEmptyWildcard", c.allow_empty_wildcard)
        .int("timestamp", c.timestamp)
        .texts("include_patterns", &c.include_patterns)
        .texts("exclude_patterns", &c.exclude_patterns)
        .flag("alwaysReplaceExistingDestPaths", c.always_replace_existing_dest_paths)
        .text("modeStr", &c.mode_str)
        .texts("required_paths", &c.required_paths)
        .end()
}

fn owner(owner: &ChownOpt) -> Json {
    Object::new()
        .opt("user", owner.user.as_ref().map(user))
        .opt("group", owner.group.as_ref().map(user))
        .end()
}

fn user(user: &UserOpt) -> Json {
    let inner = match user {
        UserOpt::ByName { name, input } => {
            Object::new().raw("byName", Object::new().text("name", name).index("input", *input).end())
        }
        UserOpt::ById(id) => Object::new().int("byId", *id),
    };
    Object::new().raw("User", inner.end()).end()
}

/// Go's `path.Base`.
fn last_element(path: &str) -> &str {
    if path.is_empty() {
        return ".";
    }
    let trimmed = path.trim_end_matches('/');
    if trimmed.is_empty() {
        "/"
    } else {
        trimmed.rsplit('/').next().unwrap_or(trimmed)
    }
}

/// Adds what `action` looks at in the inputs: the source of a copy, and the files that give names their numbers.
fn select(action: &FileAction, selected: &mut [Vec<ContentSelector>]) -> Result<(), KeyError> {
    let inputs = selected.len();
    let (names, copy) = match &action.kind {
        FileActionKind::Copy(c) => (c.owner.as_ref(), Some(c)),
        FileActionKind::MkFile(m) => (m.owner.as_ref(), None),
        FileActionKind::MkDir(m) => (m.owner.as_ref(), None),
        FileActionKind::Symlink(_) | FileActionKind::Rm(_) => (None, None),
    };
    if let Some(names) = names {
        for (who, path) in [(&names.user, "/etc/passwd"), (&names.group, "/etc/group")] {
            if let Some(UserOpt::ByName { name, input }) = who {
                let slot = input
                    .and_then(|i| selected.get_mut(i as usize))
                    .ok_or_else(|| KeyError {
                        op: "file",
                        reason: format!("name {name} is looked up in input {} of {inputs}", index(*input)),
                    })?;
                slot.push(ContentSelector::plain(path, true));
            }
        }
    }
    if let Some(copy) = copy
        && let Some(slot) = op_input(action.secondary_input, inputs).and_then(|i| selected.get_mut(i))
    {
        slot.push(ContentSelector {
            path: copy.src.clone(),
            follow_links: copy.follow_symlink,
            wildcard: copy.allow_wildcard && has_wildcard(&copy.src),
            include: copy.include_patterns.clone(),
            exclude: copy.exclude_patterns.clone(),
            required: copy.required_paths.clone(),
        });
    }
    Ok(())
}

fn has_wildcard(path: &str) -> bool {
    kiln_match::glob::has_wildcard(path.as_bytes())
}
