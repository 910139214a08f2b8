//! Stages: a FROM and what follows it, and the whole file as a list of them.

use super::flags::{FlagKind, Flags};
use super::instruction::{Argument, Instruction, Kind, Parsed};
use super::lint::{self, LintScope, Linter};
use super::parser::{self, Node};
use super::read;
use super::span::Span;
use crate::error::{DockerfileError, Located};
use crate::gotext::quote;

/// One stage.
#[derive(Clone, Debug)]
pub struct Stage {
    /// The FROM keyword as written.
    pub keyword: String,
    /// What it is based on, before expansion.
    pub base: String,
    /// Its name in lower case, empty if it has none.
    pub name: String,
    /// `--platform` before expansion, empty if absent.
    pub platform: String,
    /// The FROM line.
    pub text: String,
    /// Lines of the FROM.
    pub span: Span,
    /// Comments before the FROM.
    pub comments: Vec<String>,
    /// What the comment above says about the stage.
    pub description: String,
    /// The instructions in it.
    pub instructions: Vec<Instruction>,
}

/// A Dockerfile after checking.
#[derive(Clone, Debug)]
pub struct Dockerfile {
    /// The escape character in force.
    pub escape: char,
    /// ARG instructions before the first FROM.
    pub global_args: Vec<GlobalArg>,
    /// The stages.
    pub stages: Vec<Stage>,
}

/// An ARG instruction before the first FROM.
#[derive(Clone, Debug)]
pub struct GlobalArg {
    /// Its variables.
    pub arguments: Vec<Argument>,
    /// Its lines.
    pub span: Span,
}

impl Dockerfile {
    /// Reads and checks a Dockerfile. Findings that need no build go to `linter`.
    pub fn read(text: &[u8], linter: &Linter) -> Result<Self, DockerfileError> {
        let parsed = parser::parse(text)?;
        for span in &parsed.empty_continuations {
            linter.report(&lint::NO_EMPTY_CONTINUATION, *span, || {
                "Empty continuation line".to_owned()
            });
        }
        let mut file = Self {
            escape: parsed.escape,
            global_args: Vec::new(),
            stages: Vec::new(),
        };
        for node in &parsed.nodes {
            let line = node.span.first().unwrap_or(0);
            let context = || format!("dockerfile parse error on line {line}");
            let read = read::read(node, &linter.scope(&node.comments))
                .map_err(DockerfileError::new)
                .at_span(node.span)
                .map_err(|e| e.context(context()))?;
            match (read, file.stages.last_mut()) {
                (Parsed::Stage(stage), _) => file.stages.push(stage),
                (
                    Parsed::Instruction(Instruction {
                        kind: Kind::Arg(arguments),
                        span,
                        ..
                    }),
                    None,
                ) => {
                    file.global_args.push(GlobalArg { arguments, span });
                }
                (Parsed::Instruction(instruction), Some(stage)) => stage.instructions.push(instruction),
                (Parsed::Instruction(_), None) => {
                    return Err(DockerfileError::at("no build stage in current context", node.span));
                }
            }
        }
        Ok(file)
    }

    /// Findings about names and letter case of the file as a whole.
    pub fn lint_names(&self, linter: &Linter) {
        let mut seen = std::collections::HashSet::new();
        for stage in self.stages.iter().filter(|s| !s.name.is_empty()) {
            if matches!(stage.name.as_str(), "context" | "scratch") {
                linter.report(&lint::RESERVED_STAGE_NAME, stage.span, || {
                    format!(
                        "Stage name should not use the same name as reserved stage {}",
                        quote(&stage.name)
                    )
                });
            }
            if !seen.insert(stage.name.as_str()) {
                linter.report(&lint::DUPLICATE_STAGE_NAME, stage.span, || {
                    format!(
                        "Duplicate stage name {}, stage names should be unique",
                        quote(&stage.name)
                    )
                });
            }
        }
        let keywords = || {
            self.stages.iter().flat_map(|stage| {
                let own = std::iter::once((stage.keyword.as_str(), stage.span));
                own.chain(stage.instructions.iter().map(|i| (i.keyword.as_str(), i.span)))
            })
        };
        let lower = keywords().filter(|(k, _)| *k == k.to_lowercase()).count();
        let upper = keywords()
            .filter(|(k, _)| *k != k.to_lowercase() && *k == k.to_uppercase())
            .count();
        let (wanted, is_wanted): (&str, fn(&str) -> bool) = if lower > upper {
            ("lowercase", |k| k == k.to_lowercase())
        } else {
            ("uppercase", |k| k == k.to_uppercase())
        };
        for (keyword, span) in keywords().filter(|(k, _)| !is_wanted(k)) {
            linter.report(&lint::CONSISTENT_INSTRUCTION_CASING, span, || {
                format!("Command '{keyword}' should match the case of the command majority ({wanted})")
            });
        }
    }
}

/// Checks a FROM.
pub(super) fn read(node: &Node, lint: &LintScope<'_>) -> Result<Stage, String> {
    let words = &node.args.words;
    if let [_, keyword, name] = words.as_slice() {
        if *name != name.to_lowercase() {
            lint.report(&lint::STAGE_NAME_CASING, node.span, || {
                format!("Stage name '{name}' should be lowercase")
            });
        }
        check_as_casing(node, keyword, lint);
    } else if words.len() > 3 {
        check_as_casing(node, words.get(1).map_or("", String::as_str), lint);
    }
    let name = match words.as_slice() {
        [_] => String::new(),
        [_, keyword, name] if keyword.eq_ignore_ascii_case("as") => stage_name(name)?,
        _ => return Err("FROM requires either one or three arguments".to_owned()),
    };
    let flags = Flags::parse(&node.flags, &[("platform", FlagKind::Text)])?;
    if !name.is_empty() {
        read::check_description("FROM", &[&name], node, lint);
    }
    Ok(Stage {
        keyword: node.keyword.clone(),
        base: words.first().cloned().unwrap_or_default(),
        description: read::description(&node.comments, &name),
        name,
        platform: flags.text("platform"),
        text: node.original.trim().to_owned(),
        span: node.span,
        comments: node.comments.clone(),
        instructions: Vec::new(),
    })
}

fn check_as_casing(node: &Node, keyword: &str, lint: &LintScope<'_>) {
    let from = &node.keyword;
    let matches = if *from == from.to_lowercase() {
        keyword == keyword.to_lowercase()
    } else if *from == from.to_uppercase() {
        keyword == keyword.to_uppercase()
    } else {
        true
    };
    if !matches {
        lint.report(&lint::FROM_AS_CASING, node.span, || {
            format!("'{keyword}' and '{from}' keywords' casing do not match")
        });
    }
}

fn stage_name(written: &str) -> Result<String, String> {
    let name = written.to_lowercase();
    let valid = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
    if valid {
        return Ok(name);
    }
    let why = "name can't start with a number or contain symbols";
    Err(format!("invalid name for build stage: {}, {why}", quote(written)))
}
