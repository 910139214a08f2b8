//! Here-documents: which ones a line announces, and what becomes of their bodies.

use super::expand::{Expander, NoVariables};

/// A here-document of an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heredoc {
    /// Its name: the terminating line, and the file it becomes.
    pub name: String,
    /// Whether variables in the body are expanded: no part of the name was quoted.
    pub expand: bool,
    /// Whether leading tabs are taken off the body (`<<-`).
    pub chomp: bool,
    /// The body, byte for byte, line ends included.
    pub content: Vec<u8>,
}

impl Heredoc {
    /// The body with leading tabs removed if the operator asks for it.
    pub fn body(&self) -> Vec<u8> {
        if self.chomp {
            without_leading_tabs(&self.content)
        } else {
            self.content.clone()
        }
    }
}

/// The here-documents that a logical line announces, with empty bodies. A line whose quoting or `${…}` cannot be understood
/// announces none.
pub(crate) fn announced(line: &str) -> Result<Vec<Heredoc>, String> {
    if !line.contains("<<") {
        return Ok(Vec::new());
    }
    let reader = Expander {
        keep_quotes: true,
        keep_escapes: true,
        keep_unset: true,
        ..Expander::default()
    };
    let Ok(line) = reader.expand(line, &NoVariables) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for word in &line.words {
        found.extend(operator(word)?);
    }
    Ok(found)
}

/// The here-document that one word stands for: `[digits]<<[-][blanks]name`.
pub(crate) fn operator(word: &str) -> Result<Option<Heredoc>, String> {
    let digits = word.bytes().take_while(u8::is_ascii_digit).count();
    let Some(rest) = word.get(digits..).and_then(|w| w.strip_prefix("<<")) else {
        return Ok(None);
    };
    let (chomp, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let raw = rest.trim_start_matches([' ', '\t', '\n', '\r', '\u{c}']);
    if raw.is_empty() || raw.contains('<') {
        return Ok(None);
    }
    let reader = Expander {
        keep_unset: true,
        ..Expander::default()
    };
    let words = reader.expand(raw, &NoVariables).map_err(|e| e.message)?.words;
    let [name] = words.as_slice() else { return Ok(None) };
    let with_quotes = Expander {
        keep_quotes: true,
        ..reader
    };
    let kept = with_quotes.expand(raw, &NoVariables).map_err(|e| e.message)?.words;
    let [kept] = kept.as_slice() else {
        return Err(format!(
            "internal lexing of heredoc produced inconsistent results: {raw}"
        ));
    };
    let quotes = |s: &str| s.matches(['\'', '"']).count();
    Ok(Some(Heredoc {
        name: name.clone(),
        expand: quotes(name) == quotes(kept),
        chomp,
        content: Vec::new(),
    }))
}

/// Every line without the tabs at its start.
pub(crate) fn without_leading_tabs(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    for line in text.split_inclusive(|&b| b == b'\n') {
        let tabs = line.iter().take_while(|&&b| b == b'\t').count();
        out.extend_from_slice(line.get(tabs..).unwrap_or_default());
    }
    out
}

/// The first line of a body, with `...` when there are more, as shown in the name of a step.
pub(crate) fn summary(body: &str) -> String {
    let body = body.trim().replace("\r\n", "\n");
    match body.split_once('\n') {
        Some((first, _)) => format!("{first}..."),
        None => body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_in_a_line() {
        let names = |line: &str| {
            announced(line)
                .unwrap()
                .into_iter()
                .map(|h| {
                    format!(
                        "{}{}{}",
                        h.name,
                        if h.expand { "" } else { "!" },
                        if h.chomp { "-" } else { "" }
                    )
                })
                .collect::<Vec<_>>()
        };
        for (line, want) in [
            ("RUN <<EOF", vec!["EOF"]),
            ("RUN <<-'EOF' cat 3<<B", vec!["EOF!-", "B"]),
            ("COPY << EOF /x", vec!["EOF"]),
            ("RUN cat <<\"a b\"", vec!["a b!"]),
            ("RUN x <<<EOF", vec![]),
            ("RUN x \"<<EOF\"", vec![]),
            ("RUN x <<", vec![]),
            ("RUN echo it's <<EOF", vec![]),
            ("RUN ${x^} <<EOF", vec![]),
            ("RUN <<E\\OF", vec!["EOF"]),
            ("RUN <<$x", vec!["$x"]),
            ("RUN a<<EOF", vec![]),
        ] {
            assert_eq!(names(line), want, "{line}");
        }
    }

    #[test]
    fn bodies() {
        assert_eq!(without_leading_tabs(b"\t\ta\n\tb\tc\nd"), b"a\nb\tc\nd");
        assert_eq!(summary("\n echo hi\r\nx"), "echo hi...");
        assert_eq!(summary("echo hi\n"), "echo hi");
    }
}
