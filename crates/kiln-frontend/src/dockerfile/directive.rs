//! Parser directives: the `# name=value` lines at the very top of a Dockerfile.

use super::span::Span;
use crate::gotext::lossy;

/// One directive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directive {
    /// `syntax`, `escape` or `check`, in lower case.
    pub name: String,
    /// The value as written, without blanks around it.
    pub value: String,
    /// Its line.
    pub span: Span,
}

impl Directive {
    /// The value up to its first blank: all that counts for `syntax` (an image reference) and `check`.
    pub fn first_word(&self) -> &str {
        self.value.split(' ').next().unwrap_or_default()
    }
}

/// Reads directives line by line until the first line that is none.
#[derive(Debug)]
pub(crate) struct DirectiveReader {
    prefix: &'static str,
    line: u32,
    seen: Vec<String>,
    done: bool,
}

impl DirectiveReader {
    /// A reader of lines that start with `prefix`; `line` lines were skipped before the first one.
    pub(crate) fn new(prefix: &'static str, line: u32) -> Self {
        Self {
            prefix,
            line,
            seen: Vec::new(),
            done: false,
        }
    }

    /// The directive on the next line, given without its line end. Once a line is no directive, no later one is.
    pub(crate) fn read(&mut self, line: &[u8]) -> Result<Option<Directive>, String> {
        self.line += 1;
        if self.done {
            return Ok(None);
        }
        let Some((name, value)) = line.strip_prefix(self.prefix.as_bytes()).and_then(name_and_value) else {
            self.done = true;
            return Ok(None);
        };
        if self.seen.contains(&name) {
            return Err(format!("only one {name} parser directive can be used"));
        }
        self.seen.push(name.clone());
        Ok(Some(Directive {
            name,
            value,
            span: Span::line(self.line),
        }))
    }

    /// Whether the area of directives has ended.
    pub(crate) fn ended(&self) -> bool {
        self.done
    }
}

/// Name and value of a text of the form `name=value` whose name is that of a directive.
pub(crate) fn name_and_value(text: &[u8]) -> Option<(String, String)> {
    let text = lossy(text);
    let text = text.trim_start();
    let name_len = text.bytes().take_while(u8::is_ascii_alphanumeric).count();
    let (name, rest) = text.split_at(name_len);
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return None;
    }
    let name = name.to_ascii_lowercase();
    if !matches!(name.as_str(), "syntax" | "escape" | "check") {
        return None;
    }
    let raw = rest.trim_start_matches(is_blank).strip_prefix('=')?;
    let value = raw.trim_start_matches(is_blank).trim_end_matches(is_blank);
    if value.is_empty() {
        // Blanks alone: the value is the last of them, because it must have one character.
        return raw.chars().next_back().map(|c| (name, c.to_string()));
    }
    Some((name, value.to_owned()))
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\u{c}')
}

/// The directive `name` of a Dockerfile as the client and the frontend look for it before parsing: a shebang line is skipped,
/// errors are none of its business.
pub fn detect(name: &str, text: &[u8]) -> Option<Directive> {
    let (body, skipped) = without_preamble(text);
    find(name, body, "#", skipped)
}

/// The `syntax` directive in any of its notations: `# syntax=`, `// syntax=`, or a JSON object with the key `syntax`.
pub fn detect_syntax(text: &[u8]) -> Option<Directive> {
    let (body, skipped) = without_preamble(text);
    find("syntax", body, "#", skipped)
        .or_else(|| find("syntax", body, "//", skipped))
        .or_else(|| {
            // Only an object is worth the trouble; a Dockerfile is none.
            if !body.trim_ascii_start().starts_with(b"{") {
                return None;
            }
            let object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(body).ok()?;
            let value = object.get("syntax")?.as_str()?.to_owned();
            Some(Directive {
                name: "syntax".to_owned(),
                value,
                span: Span::line(skipped),
            })
        })
}

fn without_preamble(text: &[u8]) -> (&[u8], u32) {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    if !text.starts_with(b"#!") {
        return (text, 0);
    }
    let end = text.iter().position(|&b| b == b'\n').map_or(text.len(), |i| i + 1);
    (text.get(end..).unwrap_or_default(), 1)
}

fn find(name: &str, text: &[u8], prefix: &'static str, skipped: u32) -> Option<Directive> {
    let mut reader = DirectiveReader::new(prefix, skipped);
    let mut found = Vec::new();
    for line in text.split(|&b| b == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match reader.read(line) {
            Ok(Some(directive)) => found.push(directive),
            Ok(None) => {}
            Err(_) => break,
        }
        if reader.ended() {
            break;
        }
    }
    found.into_iter().find(|d| d.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_syntax_in_every_notation() {
        for (text, value, word) in [
            (
                "# syntax=docker/dockerfile:1\nFROM x",
                "docker/dockerfile:1",
                "docker/dockerfile:1",
            ),
            ("#!/bin/sh\n# SYNTAX = a/b cmd x \nFROM x", "a/b cmd x", "a/b"),
            ("\u{feff}#escape=`\n#syntax=a\r\nFROM x", "a", "a"),
            ("// syntax=a\n{}", "a", "a"),
            ("{\"syntax\": \"a b\"}", "a b", "a"),
        ] {
            let found = detect_syntax(text.as_bytes()).unwrap();
            assert_eq!((found.value.as_str(), found.first_word()), (value, word), "{text}");
        }
        for text in [
            "FROM x\n# syntax=a",
            "\n# syntax=a",
            "# x\n# syntax=a",
            "# unknown=1\n# syntax=a",
            " # syntax=a",
            "# syntax=",
            "",
        ] {
            assert_eq!(detect_syntax(text.as_bytes()), None, "{text}");
        }
        assert_eq!(
            detect("check", b"#!x\n# check=skip=A, B\n").unwrap().first_word(),
            "skip=A,"
        );
    }
}
