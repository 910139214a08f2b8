//! Physical lines to nodes: continuations joined, comments attached, here-documents read, arguments split, nothing interpreted.

use super::directive::DirectiveReader;
use super::flags::split_flags;
use super::heredoc::{self, Heredoc};
use super::json_list::{self, JsonList};
use super::span::Span;
use super::words;
use crate::error::DockerfileError;
use crate::gotext::lossy;

/// Longest physical line, in bytes without its line feed.
const MAX_LINE: usize = 65_535;

/// A Dockerfile as nodes, one for each instruction.
#[derive(Clone, Debug)]
pub(crate) struct Parsed {
    /// The instructions in order.
    pub nodes: Vec<Node>,
    /// The escape character in force.
    pub escape: char,
    /// For each instruction with blank lines inside its continuation, its last line.
    pub empty_continuations: Vec<Span>,
}

/// One instruction, its arguments split by the rule for its keyword.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// The keyword as written.
    pub keyword: String,
    /// The logical line as written: continuations joined, here-document bodies absent.
    pub original: String,
    /// Flag words.
    pub flags: Vec<String>,
    /// The arguments.
    pub args: Args,
    /// Here-documents with their bodies.
    pub heredocs: Vec<Heredoc>,
    /// Comments right before it.
    pub comments: Vec<String>,
    /// Its lines, here-documents included.
    pub span: Span,
}

/// Arguments after splitting.
#[derive(Clone, Debug, Default)]
pub(crate) struct Args {
    /// The words; for ONBUILD the nested keyword and its words.
    pub words: Vec<String>,
    /// Key and value pairs of ENV and LABEL.
    pub pairs: Vec<Pair>,
    /// Whether the JSON form was used.
    pub json: bool,
    /// Whether the nested instruction of ONBUILD may carry here-documents.
    nested_heredocs: bool,
}

/// A key and a value, both before expansion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
    /// Written in the old form `KEY value`.
    pub legacy: bool,
}

struct Lines<'a> {
    rest: &'a [u8],
    /// Lines handed out so far.
    count: u32,
    too_long: bool,
}

impl<'a> Lines<'a> {
    /// The next line with its line end; nothing more once a line is too long.
    fn next(&mut self) -> Option<&'a [u8]> {
        if self.rest.is_empty() || self.too_long {
            return None;
        }
        let end = memchr_lf(self.rest);
        let (line, rest) = self.rest.split_at(end.map_or(self.rest.len(), |i| i + 1));
        if end.unwrap_or(line.len()) > MAX_LINE {
            self.too_long = true;
            return None;
        }
        self.rest = rest;
        self.count += 1;
        Some(line)
    }
}

fn memchr_lf(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|&b| b == b'\n')
}

/// Parses a Dockerfile. `escape` is set by its directive; errors carry the lines of their instruction.
pub(crate) fn parse(text: &[u8]) -> Result<Parsed, DockerfileError> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let mut lines = Lines {
        rest: text,
        count: 0,
        too_long: false,
    };
    let mut directives = DirectiveReader::new("#", 0);
    let mut escape = '\\';
    let mut comments: Vec<String> = Vec::new();
    let mut parsed = Parsed {
        nodes: Vec::new(),
        escape,
        empty_continuations: Vec::new(),
    };

    while let Some(raw) = lines.next() {
        let line = trim_start(trim_line_end(raw));
        if !directives.ended() {
            // These errors are reported one line too early, as clients have always seen them.
            let at = Span::line(lines.count - 1);
            let directive = directives.read(line).map_err(|e| DockerfileError::at(e, at))?;
            if let Some(directive) = directive {
                if directive.name == "escape" {
                    escape = match directive.value.as_str() {
                        "\\" => '\\',
                        "`" => '`',
                        other => {
                            let message = format!("invalid escape token '{other}' does not match ` or \\");
                            return Err(DockerfileError::at(message, at));
                        }
                    };
                }
                continue;
            }
        }
        if line.first() == Some(&b'#') {
            // The comment starts behind the first byte of the physical line, so an indented one keeps its `#`.
            let comment = lossy(raw.get(1..).unwrap_or_default());
            match comment.trim() {
                "" => comments.clear(),
                comment => comments.push(comment.to_owned()),
            }
            continue;
        }
        let first = lines.count;
        let (part, mut ended) = without_continuation(line, escape as u8);
        if ended && part.is_empty() {
            continue;
        }
        let mut logical = part.to_vec();
        let mut blank_inside = false;
        while !ended {
            let Some(raw) = lines.next() else { break };
            let line = trim_line_end(raw);
            let start = trim_start(line);
            if start.first() == Some(&b'#') {
                continue;
            }
            if start.is_empty() {
                blank_inside = true;
                continue;
            }
            let (part, end) = without_continuation(line, escape as u8);
            logical.extend_from_slice(part);
            ended = end;
        }
        if blank_inside {
            parsed.empty_continuations.push(Span::line(lines.count));
        }
        let here = Span::lines(first, lines.count);
        let mut node = node_from_line(&logical, escape, 0).map_err(|e| DockerfileError::at(e, here))?;
        if may_have_heredocs(&node) {
            for announced in heredoc::announced(&node.original).map_err(|e| DockerfileError::at(e, here))? {
                let body = read_heredoc(&mut lines, announced)
                    .ok_or_else(|| DockerfileError::at("unterminated heredoc", Span::lines(first, lines.count)))?;
                node.heredocs.push(body);
            }
        }
        node.comments = std::mem::take(&mut comments);
        node.span = Span::lines(first, lines.count);
        parsed.nodes.push(node);
    }
    if parsed.nodes.is_empty() {
        return Err(DockerfileError::at(
            "file with no instructions",
            Span::line(lines.count),
        ));
    }
    if lines.too_long {
        let message = format!("dockerfile line greater than max allowed size of {MAX_LINE}");
        return Err(DockerfileError::at(message, Span::line(lines.count)));
    }
    parsed.escape = escape;
    Ok(parsed)
}

fn read_heredoc(lines: &mut Lines<'_>, mut heredoc: Heredoc) -> Option<Heredoc> {
    while let Some(line) = lines.next() {
        let mut end = trim_line_end(line);
        if heredoc.chomp {
            let tabs = end.iter().take_while(|&&b| b == b'\t').count();
            end = end.get(tabs..).unwrap_or_default();
        }
        if end == heredoc.name.as_bytes() {
            return Some(heredoc);
        }
        heredoc.content.extend_from_slice(line);
    }
    None
}

fn may_have_heredocs(node: &Node) -> bool {
    if node.keyword.eq_ignore_ascii_case("onbuild") {
        return node.args.nested_heredocs;
    }
    takes_heredocs(&node.keyword) && !node.args.json
}

fn takes_heredocs(keyword: &str) -> bool {
    ["add", "copy", "run"].iter().any(|k| keyword.eq_ignore_ascii_case(k))
}

fn trim_line_end(line: &[u8]) -> &[u8] {
    let end = line
        .iter()
        .rposition(|&b| b != b'\n' && b != b'\r')
        .map_or(0, |i| i + 1);
    line.get(..end).unwrap_or_default()
}

/// `line` without leading white space of any kind.
fn trim_start(line: &[u8]) -> &[u8] {
    match line.first() {
        Some(b) if b.is_ascii() && !b.is_ascii_whitespace() && *b != 0x0b => line,
        None => line,
        Some(_) => {
            let valid = match std::str::from_utf8(line) {
                Ok(text) => text,
                Err(e) => std::str::from_utf8(line.get(..e.valid_up_to()).unwrap_or_default()).unwrap_or_default(),
            };
            let blank = valid.len() - valid.trim_start().len();
            line.get(blank..).unwrap_or_default()
        }
    }
}

/// Takes the continuation mark off a line: an escape character, not doubled, with nothing but blanks and tabs behind it. The
/// second value says whether the instruction ends here.
fn without_continuation(line: &[u8], escape: u8) -> (&[u8], bool) {
    let end = line.iter().rposition(|&b| b != b' ' && b != b'\t').map_or(0, |i| i + 1);
    let text = line.get(..end).unwrap_or_default();
    match text.split_last() {
        Some((&last, before)) if last == escape && before.last() != Some(&escape) => (before, false),
        _ => (line, true),
    }
}

/// Splits one logical line. Instructions within instructions (ONBUILD) are followed one level down: deeper ones are refused
/// later anyway.
fn node_from_line(line: &[u8], escape: char, depth: usize) -> Result<Node, String> {
    let trimmed = line.trim_ascii();
    let text = lossy(trimmed);
    let text = text.trim();
    let (keyword, rest) = words::first(text);
    let (flags, rest) = match rest {
        Some(rest) => {
            let (flags, rest) = split_flags(rest.as_bytes(), escape as u8);
            (flags, lossy(rest).trim().to_owned())
        }
        None => (Vec::new(), String::new()),
    };
    let args = split_arguments(keyword, &rest, escape, depth)?;
    Ok(Node {
        keyword: keyword.to_owned(),
        original: lossy(line).into_owned(),
        flags,
        args,
        heredocs: Vec::new(),
        comments: Vec::new(),
        span: Span::EMPTY,
    })
}

fn split_arguments(keyword: &str, rest: &str, escape: char, depth: usize) -> Result<Args, String> {
    if rest.is_empty() {
        return Ok(Args::default());
    }
    let only = |words: Vec<String>| Args {
        words,
        ..Args::default()
    };
    Ok(match keyword.to_ascii_lowercase().as_str() {
        "add" | "copy" | "volume" => json_or(rest, words::plain)?,
        "run" | "cmd" | "entrypoint" | "shell" => json_or(rest, |rest| vec![rest.to_owned()])?,
        "from" | "expose" => only(words::plain(rest)),
        "arg" => only(words::quoted(rest, escape)),
        "user" | "workdir" | "stopsignal" | "maintainer" => only(vec![rest.to_owned()]),
        name @ ("env" | "label") => Args {
            pairs: pairs(name, rest, escape)?,
            ..Args::default()
        },
        "healthcheck" => healthcheck(rest)?,
        "onbuild" if depth == 0 => {
            let node = node_from_line(rest.as_bytes(), escape, depth + 1)?;
            let nested_heredocs = takes_heredocs(&node.keyword) && !node.args.json;
            let mut words = vec![node.keyword];
            words.extend(node.args.words);
            Args {
                words,
                nested_heredocs,
                ..Args::default()
            }
        }
        _ => Args::default(),
    })
}

fn json_or(rest: &str, split: impl Fn(&str) -> Vec<String>) -> Result<Args, String> {
    match json_list::parse(rest) {
        JsonList::Strings(words) => Ok(Args {
            words,
            json: true,
            ..Args::default()
        }),
        JsonList::Mixed => Err("when using JSON array syntax, arrays must be comprised of strings only".to_owned()),
        JsonList::NotJson => Ok(Args {
            words: split(rest),
            ..Args::default()
        }),
    }
}

fn healthcheck(rest: &str) -> Result<Args, String> {
    // The type ends at a blank byte, whatever character that byte belongs to.
    let is_blank = |b: &u8| matches!(b, b'\t'..=b'\r' | b' ' | 0x85 | 0xa0);
    let bytes = rest.as_bytes();
    let end = bytes.iter().position(&is_blank).unwrap_or(bytes.len());
    let (kind, tail) = bytes.split_at(end);
    let skip = tail.iter().take_while(|b| is_blank(b)).count();
    let command = lossy(tail.get(skip..).unwrap_or_default()).into_owned();
    let mut args = if command.is_empty() {
        Args::default()
    } else {
        json_or(&command, |c| vec![c.to_owned()])?
    };
    args.words.insert(0, lossy(kind).into_owned());
    Ok(args)
}

fn pairs(keyword: &str, rest: &str, escape: char) -> Result<Vec<Pair>, String> {
    let words = words::quoted(rest, escape);
    let Some(first) = words.first() else {
        return Ok(Vec::new());
    };
    if !first.contains('=') {
        return match words::first(rest) {
            (key, Some(value)) => Ok(vec![Pair {
                key: key.to_owned(),
                value: value.to_owned(),
                legacy: true,
            }]),
            _ => Err(format!("{} must have two arguments", keyword.to_ascii_uppercase())),
        };
    }
    words
        .iter()
        .map(|word| match word.split_once('=') {
            Some((key, value)) => Ok(Pair {
                key: key.to_owned(),
                value: value.to_owned(),
                legacy: false,
            }),
            None => Err(format!(
                "Syntax error - can't find = in {}. Must be of the form: name=value",
                crate::gotext::quote(word)
            )),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One line per node: `first-last KEYWORD {flags} [words] #comments <heredocs>`.
    fn show(text: &str) -> String {
        match parse(text.as_bytes()) {
            Ok(parsed) => parsed.nodes.iter().map(show_node).collect::<Vec<_>>().join("\n"),
            Err(e) => format!(
                "! {e} at {:?}",
                e.spans().iter().map(|s| (s.first(), s.last())).collect::<Vec<_>>()
            ),
        }
    }

    fn show_node(node: &Node) -> String {
        let mut out = format!(
            "{}-{} {}",
            node.span.first().unwrap_or(0),
            node.span.last().unwrap_or(0),
            node.keyword
        );
        if !node.flags.is_empty() {
            out += &format!(" {:?}", node.flags);
        }
        for pair in &node.args.pairs {
            out += &format!(" {}{}{}", pair.key, if pair.legacy { "~" } else { "=" }, pair.value);
        }
        out += &format!(" {}{:?}", if node.args.json { "json" } else { "" }, node.args.words);
        for c in &node.comments {
            out += &format!(" #{c}");
        }
        for h in &node.heredocs {
            out += &format!(" <{}:{}>", h.name, String::from_utf8_lossy(&h.content).escape_debug());
        }
        out
    }

    #[track_caller]
    fn check(text: &str, want: &str) {
        assert_eq!(show(text), want, "{text}");
    }

    #[test]
    fn lines_and_continuations() {
        check(
            "FROM a\nRUN b \\\n  c\\ \t\n# no\nd\n",
            "1-1 FROM [\"a\"]\n2-5 RUN [\"b   cd\"]",
        );
        check("from a\\\\\nrun b", "1-1 from [\"a\\\\\\\\\"]\n2-2 run [\"b\"]");
        check("FROM a \\", "1-1 FROM [\"a\"]");
        check("\\\nFROM a\n", "1-2 FROM [\"a\"]");
        check(
            "# escape=`\nFROM a`\n b\nRUN \\x\n",
            "2-3 FROM [\"a\", \"b\"]\n4-4 RUN [\"\\\\x\"]",
        );
        check("FROM a\r\nRUN b\\\r\n  c\r\n", "1-1 FROM [\"a\"]\n2-3 RUN [\"b  c\"]");
        check("\u{feff}FROM a", "1-1 FROM [\"a\"]");
        check("\u{a0}\tFROM a", "1-1 FROM [\"a\"]");
        assert_eq!(
            parse(b"RUN a \\\n\n\n  b\nRUN c").unwrap().empty_continuations,
            [Span::line(4)]
        );
    }

    #[test]
    fn comments_stick_to_the_next_instruction() {
        check(
            "# one\n\n  # two\nFROM a\n# three\n#\n# four\nRUN b",
            "4-4 FROM [\"a\"] #one ## two\n8-8 RUN [\"b\"] #four",
        );
        check("# syntax=x\n# check=y\nFROM a", "3-3 FROM [\"a\"]");
        check(
            "#!/bin/sh\n# escape=`\nFROM a\\\n b",
            "3-4 FROM [\"a\", \"b\"] #!/bin/sh #escape=`",
        );
    }

    #[test]
    fn arguments_by_keyword() {
        check(
            "COPY --from=a [\"b c\", \"d\"]",
            "1-1 COPY [\"--from=a\"] json[\"b c\", \"d\"]",
        );
        check("COPY a  b\tc", "1-1 COPY [\"a\", \"b\", \"c\"]");
        check("RUN [\"a\", 'b']", "1-1 RUN [\"[\\\"a\\\", 'b']\"]");
        check(
            "RUN [\"a\", 1]",
            "! when using JSON array syntax, arrays must be comprised of strings only at [(Some(1), Some(1))]",
        );
        check("ENV a=b c=\"d e\"", "1-1 ENV a=b c=\"d e\" []");
        check("ENV a b  c", "1-1 ENV a~b  c []");
        check("ENV a", "! ENV must have two arguments at [(Some(1), Some(1))]");
        check(
            "LABEL a=b c",
            "! Syntax error - can't find = in \"c\". Must be of the form: name=value at [(Some(1), Some(1))]",
        );
        check("WORKDIR a b", "1-1 WORKDIR [\"a b\"]");
        check(
            "HEALTHCHECK --interval=5s CMD [\"a\"]",
            "1-1 HEALTHCHECK [\"--interval=5s\"] json[\"CMD\", \"a\"]",
        );
        check("ONBUILD RUN a b", "1-1 ONBUILD [\"RUN\", \"a b\"]");
        check("RUN[\"x\"]", "1-1 RUN[\"x\"] []");
        check("NOPE a", "1-1 NOPE []");
        check("RUN", "1-1 RUN []");
    }

    #[test]
    fn heredocs() {
        check(
            "RUN <<EOF\na\n b\nEOF\nRUN c",
            "1-4 RUN [\"<<EOF\"] <EOF:a\\n b\\n>\n5-5 RUN [\"c\"]",
        );
        check(
            "COPY <<A <<-B /x\n1\r\nA\n\t2\n\tB\n",
            "1-5 COPY [\"<<A\", \"<<-B\", \"/x\"] <A:1\\r\\n> <B:\\t2\\n>",
        );
        check("RUN <<EOF\na", "! unterminated heredoc at [(Some(1), Some(2))]");
        check("ENV a=<<EOF\nRUN b", "1-1 ENV a=<<EOF []\n2-2 RUN [\"b\"]");
        check(
            "ONBUILD COPY <<E /\nx\nE\nRUN b",
            "1-3 ONBUILD [\"COPY\", \"<<E\", \"/\"] <E:x\\n>\n4-4 RUN [\"b\"]",
        );
        check("RUN [\"<<EOF\"]", "1-1 RUN json[\"<<EOF\"]");
    }

    #[test]
    fn refused_files() {
        check("", "! file with no instructions at [(Some(0), Some(0))]");
        check("# a\n\n", "! file with no instructions at [(Some(2), Some(2))]");
        check(
            "# escape=x\nFROM a",
            "! invalid escape token 'x' does not match ` or \\ at [(Some(0), Some(0))]",
        );
        check(
            "# syntax=x\n# Syntax=y\n",
            "! only one syntax parser directive can be used at [(Some(1), Some(1))]",
        );
        let long = format!("FROM a\nRUN {}\n", "x".repeat(MAX_LINE));
        check(
            &long,
            "! dockerfile line greater than max allowed size of 65535 at [(Some(1), Some(1))]",
        );
        let exact = format!("FROM a\nRUN {}\n", "x".repeat(MAX_LINE - 4));
        assert_eq!(parse(exact.as_bytes()).unwrap().nodes.len(), 2);
    }

    #[test]
    fn large_files_take_linear_time() {
        let line = "ONBUILD ".repeat(8000) + "\\\n";
        assert!(parse(line.repeat(150).as_bytes()).is_ok());
        let many = "RUN a \\\n".repeat(1_000_000);
        assert_eq!(parse(many.as_bytes()).unwrap().nodes.len(), 1);
    }
}
