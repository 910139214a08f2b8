//! Nodes to typed instructions: flags and arguments are checked here.

use super::flags::{FlagKind, Flags};
use super::heredoc::{self, Heredoc};
use super::instruction::{
    Add, Argument, CommandLine, Content, Copy, Healthcheck, Instruction, Kind, Network, Parsed, Paths, Run,
};
use super::lint::{self, LintScope};
use super::mount::Mount;
use super::parser::{Node, Pair};
use super::suggest::nearest_any_case;
use crate::gotext::{lossy, parse_duration, parse_int, quote};

/// Keywords of all instructions.
const KEYWORDS: &[&str] = &[
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

use FlagKind::{Bool, List, Text};

/// Checks one node. The error is the bare sentence.
pub(crate) fn read(node: &Node, lint: &LintScope<'_>) -> Result<Parsed, String> {
    let lower = node.keyword.to_lowercase();
    let words = &node.args.words;
    let flags = |allowed: &[(&'static str, FlagKind)]| Flags::parse(&node.flags, allowed);
    let none: &[(&'static str, FlagKind)] = &[];
    let kind = match lower.as_str() {
        "from" => return super::stage::read(node, lint).map(Parsed::Stage),
        "add" => add(node)?,
        "copy" => copy(node)?,
        "run" => run(node)?,
        "healthcheck" => Kind::Healthcheck(healthcheck(node)?),
        "env" => {
            flags(none)?;
            Kind::Env(pairs(node, "ENV")?)
        }
        "label" => {
            flags(none)?;
            Kind::Label(pairs(node, "LABEL")?)
        }
        "maintainer" => {
            lint.report(&lint::MAINTAINER_DEPRECATED, node.span, || {
                "Maintainer instruction is deprecated in favor of using label".to_owned()
            });
            let text = one(words, "MAINTAINER")?;
            flags(none)?;
            Kind::Maintainer(text)
        }
        "user" => {
            let text = one(words, "USER")?;
            flags(none)?;
            Kind::User(text)
        }
        "workdir" => {
            let text = one(words, "WORKDIR")?;
            flags(none)?;
            Kind::Workdir(text)
        }
        // Flags of these two are never looked at.
        "stopsignal" => Kind::StopSignal(one(words, "STOPSIGNAL")?),
        "arg" => arg(node, lint)?,
        "onbuild" => {
            some(words, "ONBUILD")?;
            flags(none)?;
            Kind::Onbuild(trigger(node)?)
        }
        "cmd" => {
            flags(none)?;
            Kind::Cmd(command_line(node))
        }
        "entrypoint" => {
            flags(none)?;
            Kind::Entrypoint(command_line(node))
        }
        "expose" => {
            some(words, "EXPOSE")?;
            flags(none)?;
            let mut ports = words.clone();
            ports.sort();
            Kind::Expose(ports)
        }
        "volume" => {
            some(words, "VOLUME")?;
            flags(none)?;
            let volumes: Vec<String> = words.iter().map(|v| v.trim().to_owned()).collect();
            if volumes.iter().any(String::is_empty) {
                return Err("VOLUME specified can not be an empty string".to_owned());
            }
            Kind::Volume(volumes)
        }
        "shell" => {
            flags(none)?;
            some(words, "SHELL")?;
            if !node.args.json {
                return Err("SHELL requires the arguments to be in JSON form".to_owned());
            }
            Kind::Shell(words.clone())
        }
        _ => {
            let hint = nearest_any_case(&node.keyword, KEYWORDS.iter().copied());
            let hint = hint.map(|h| format!(" (did you mean {h}?)")).unwrap_or_default();
            return Err(format!("unknown instruction: {}{hint}", node.keyword));
        }
    };
    Ok(Parsed::Instruction(Instruction {
        keyword: node.keyword.clone(),
        text: node.original.trim().to_owned(),
        span: node.span,
        comments: node.comments.clone(),
        kind,
    }))
}

fn some(words: &[String], name: &str) -> Result<(), String> {
    if words.is_empty() {
        Err(format!("{name} requires at least one argument"))
    } else {
        Ok(())
    }
}

fn one(words: &[String], name: &str) -> Result<String, String> {
    match words {
        [word] => Ok(word.clone()),
        _ => Err(format!("{name} requires exactly one argument")),
    }
}

fn pairs(node: &Node, name: &str) -> Result<Vec<Pair>, String> {
    if node.args.pairs.is_empty() {
        return Err(format!("{name} requires at least one argument"));
    }
    if node.args.pairs.iter().any(|pair| pair.key.is_empty()) {
        return Err(format!("{name} names can not be blank"));
    }
    Ok(node.args.pairs.clone())
}

fn command_line(node: &Node) -> CommandLine {
    CommandLine {
        args: node.args.words.clone(),
        shell: !node.args.json,
    }
}

fn arg(node: &Node, lint: &LintScope<'_>) -> Result<Kind, String> {
    some(&node.args.words, "ARG")?;
    let mut arguments = Vec::with_capacity(node.args.words.len());
    for word in &node.args.words {
        let (name, value) = match word.split_once('=') {
            Some(("", _)) => return Err("ARG names can not be blank".to_owned()),
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        let description = description(&node.comments, name);
        arguments.push(Argument {
            name: name.to_owned(),
            value,
            description,
        });
    }
    let names: Vec<&str> = arguments.iter().map(|a| a.name.as_str()).collect();
    check_description("ARG", &names, node, lint);
    Ok(Kind::Arg(arguments))
}

/// What a comment of the form `# name text` says about `name`.
pub(super) fn description(comments: &[String], name: &str) -> String {
    if name.is_empty() {
        return String::new();
    }
    let text = comments.iter().find_map(|c| c.strip_prefix(name)?.strip_prefix(' '));
    text.unwrap_or_default().to_owned()
}

pub(super) fn check_description(keyword: &str, names: &[&str], node: &Node, lint: &LintScope<'_>) {
    let (Some(comment), Some(first)) = (node.comments.last(), names.first()) else {
        return;
    };
    let word = comment.split(' ').next().unwrap_or_default();
    if names.contains(&word) {
        return;
    }
    let example = if names.len() > 1 { "<arg_key>" } else { first };
    lint.report(&lint::INVALID_DEFINITION_DESCRIPTION, node.span, || {
        format!("Comment for {keyword} should follow the format: `# {example} <description>`")
    });
}

/// The text of a trigger: the line without its first word, and the here-documents behind it.
fn trigger(node: &Node) -> Result<String, String> {
    let nested = node
        .args
        .words
        .first()
        .map(|w| w.trim().to_uppercase())
        .unwrap_or_default();
    match nested.as_str() {
        "ONBUILD" => return Err("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed".to_owned()),
        "MAINTAINER" | "FROM" => return Err(format!("{nested} isn't allowed as an ONBUILD trigger")),
        _ => {}
    }
    let blank = |c: char| matches!(c, ' ' | '\t' | '\n' | '\r' | '\u{c}');
    let line = node.original.trim_start_matches(blank);
    let mut text = match line.get(..7) {
        Some(word) if word.eq_ignore_ascii_case("onbuild") => {
            line.get(7..).unwrap_or_default().trim_start_matches(blank)
        }
        _ => node.original.as_str(),
    }
    .to_owned();
    for document in &node.heredocs {
        text.push('\n');
        text.push_str(&lossy(&document.content));
        text.push_str(&document.name);
    }
    Ok(text)
}

fn paths(node: &Node, name: &str) -> Result<Paths, String> {
    let Some((destination, sources)) = node.args.words.split_last() else {
        return Ok(Paths::default());
    };
    if matches!(heredoc::operator(destination), Ok(Some(_))) {
        return Err(format!("{name} cannot accept a heredoc as a destination"));
    }
    let mut paths = Paths {
        destination: destination.clone(),
        ..Paths::default()
    };
    for source in sources {
        match heredoc::operator(source) {
            Ok(Some(operator)) => {
                // Of several documents with one name the last one counts.
                let found = node.heredocs.iter().rev().find(|d| d.name == operator.name);
                let content = found.map(|d| d.content.clone()).unwrap_or_default();
                let data = Heredoc {
                    content,
                    ..operator.clone()
                }
                .body();
                paths.contents.push(Content {
                    name: operator.name,
                    data,
                    expand: operator.expand,
                });
            }
            _ => paths.sources.push(source.clone()),
        }
    }
    Ok(paths)
}

fn destination_missing(name: &str) -> String {
    format!("{name} requires at least two arguments, but only one was provided. Destination could not be determined")
}

fn add(node: &Node) -> Result<Kind, String> {
    if node.args.words.len() < 2 {
        return Err(destination_missing("ADD"));
    }
    let flags = Flags::parse(
        &node.flags,
        &[
            ("chmod", Text),
            ("chown", Text),
            ("link", Bool),
            ("keep-git-dir", Bool),
            ("checksum", Text),
            ("unpack", Bool),
            ("exclude", List),
        ],
    )?;
    Ok(Kind::Add(Box::new(Add {
        paths: paths(node, "ADD")?,
        chown: flags.text("chown"),
        chmod: flags.text("chmod"),
        link: flags.bool("link") == Some(true),
        keep_git_dir: flags.bool("keep-git-dir"),
        checksum: flags.text("checksum"),
        unpack: flags.bool("unpack"),
        exclude: flags.list("exclude"),
    })))
}

fn copy(node: &Node) -> Result<Kind, String> {
    if node.args.words.len() < 2 {
        return Err(destination_missing("COPY"));
    }
    let flags = Flags::parse(
        &node.flags,
        &[
            ("chmod", Text),
            ("chown", Text),
            ("from", Text),
            ("link", Bool),
            ("exclude", List),
            ("parents", Bool),
        ],
    )?;
    Ok(Kind::Copy(Box::new(Copy {
        paths: paths(node, "COPY")?,
        from: flags.text("from"),
        chown: flags.text("chown"),
        chmod: flags.text("chmod"),
        link: flags.bool("link") == Some(true),
        parents: flags.bool("parents") == Some(true),
        exclude: flags.list("exclude"),
    })))
}

fn run(node: &Node) -> Result<Kind, String> {
    let allowed = &[("mount", List), ("device", List), ("network", Text), ("security", Text)];
    let flags = Flags::parse(&node.flags, allowed)?;
    let devices = flags
        .list("device")
        .iter()
        .map(|d| super::mount::parse_device(d))
        .collect::<Result<_, _>>()?;
    let mounts = flags.list("mount");
    let mount_from = mounts
        .iter()
        .map(|m| Mount::written_from(m))
        .collect::<Result<_, _>>()?;
    let network = match flags.given_text("network") {
        None | Some("default") => Network::Default,
        Some("none") => Network::None,
        Some("host") => Network::Host,
        Some(other) => return Err(format!("invalid network mode {}", quote(other))),
    };
    let insecure = match flags.given_text("security") {
        None | Some("sandbox") => false,
        Some("insecure") => true,
        Some(other) => return Err(format!("security {} is not valid", quote(other))),
    };
    let files = node.heredocs.clone();
    Ok(Kind::Run(Box::new(Run {
        command: command_line(node),
        files,
        mounts,
        mount_from,
        network,
        insecure,
        devices,
    })))
}

fn healthcheck(node: &Node) -> Result<Healthcheck, String> {
    some(&node.args.words, "HEALTHCHECK")?;
    let (kind, args) = node
        .args
        .words
        .split_first()
        .map(|(k, a)| (k.to_uppercase(), a))
        .unwrap_or_default();
    if kind == "NONE" {
        if !args.is_empty() {
            return Err("HEALTHCHECK NONE takes no arguments".to_owned());
        }
        return Ok(Healthcheck {
            test: vec![kind],
            ..Healthcheck::default()
        });
    }
    let names = [
        ("interval", Text),
        ("timeout", Text),
        ("start-period", Text),
        ("start-interval", Text),
        ("retries", Text),
    ];
    let flags = Flags::parse(&node.flags, &names)?;
    if kind != "CMD" {
        return Err(format!("Unknown type {} in HEALTHCHECK (try CMD)", quote(&kind)));
    }
    if args.is_empty() {
        return Err("Missing command after HEALTHCHECK CMD".to_owned());
    }
    let duration = |name: &str| match flags.text(name).as_str() {
        "" => Ok(0),
        text => match parse_duration(text)? {
            0 => Ok(0),
            n if n < 1_000_000 => Err(format!("Interval {} cannot be less than 1ms", quote(name))),
            n => Ok(n),
        },
    };
    let retries = match flags.text("retries").as_str() {
        "" => 0,
        text => parse_int(text, i64::from(i32::MIN), i64::from(i32::MAX))?,
    };
    let (interval, timeout) = (duration("interval")?, duration("timeout")?);
    let (start_period, start_interval) = (duration("start-period")?, duration("start-interval")?);
    if retries < 0 {
        return Err(format!("--retries cannot be negative ({retries})"));
    }
    let mut test = vec![if node.args.json { "CMD" } else { "CMD-SHELL" }.to_owned()];
    test.extend(args.iter().cloned());
    Ok(Healthcheck {
        test,
        interval,
        timeout,
        start_period,
        start_interval,
        retries,
    })
}
