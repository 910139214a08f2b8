//! Word expansion: quotes, escapes and `$` forms of a Dockerfile word, as a shell would treat them, without running anything.

use std::collections::BTreeSet;

use super::pattern;

/// Longest text one word may expand to, in bytes. Words that refer to each other could otherwise double without end.
pub(crate) const MAX_EXPANSION: usize = 16 << 20;

/// Deepest nesting of `${a:-${b:-…}}`.
const MAX_DEPTH: usize = 100;

/// Variables by name.
pub(crate) trait Variables {
    /// The value of a set variable.
    fn value(&self, name: &str) -> Option<&str>;
}

/// No variable is set.
pub(crate) struct NoVariables;

impl Variables for NoVariables {
    fn value(&self, _: &str) -> Option<&str> {
        None
    }
}

/// How words are read. The default is the ordinary reading with `\` as escape character.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expander {
    /// The character that takes away the meaning of the next one (directive `escape`).
    pub escape: char,
    /// Keep quotes in the result.
    pub keep_quotes: bool,
    /// Keep escape characters in the result.
    pub keep_escapes: bool,
    /// Quotes are ordinary characters.
    pub ignore_quotes: bool,
    /// Leave references to unset variables as they are.
    pub keep_unset: bool,
}

impl Default for Expander {
    fn default() -> Self {
        Self {
            escape: '\\',
            keep_quotes: false,
            keep_escapes: false,
            ignore_quotes: false,
            keep_unset: false,
        }
    }
}

/// A word after expansion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Expansion {
    /// The text.
    pub text: String,
    /// The text split at unquoted blanks; empty words vanish.
    pub words: Vec<String>,
    /// Names that were looked up and found.
    pub matched: BTreeSet<String>,
    /// Names that were looked up in vain.
    pub unmatched: BTreeSet<String>,
}

impl Expander {
    /// An expander with escape character `escape` and defaults otherwise.
    pub(super) fn with_escape(escape: char) -> Self {
        Self {
            escape,
            ..Self::default()
        }
    }

    /// Expands `source`. The error says what could not be understood and quotes `source`. What was looked up until then is in
    /// the second half of the error.
    pub(super) fn expand(&self, source: &str, variables: &dyn Variables) -> Result<Expansion, ExpandError> {
        let text = source.strip_prefix('\u{feff}').unwrap_or(source);
        // Most words contain nothing special at all.
        let special = |c: char| c == self.escape || matches!(c, '$' | '<' | '\'' | '"') || c.is_whitespace();
        if !text.contains(special) {
            let words = if text.is_empty() {
                Vec::new()
            } else {
                vec![text.to_owned()]
            };
            return Ok(Expansion {
                text: text.to_owned(),
                words,
                ..Expansion::default()
            });
        }
        let mut run = Run {
            options: *self,
            rest: text,
            words: Words::default(),
            variables,
            keep_escapes: self.keep_escapes,
            depth: 0,
            matched: BTreeSet::new(),
            unmatched: BTreeSet::new(),
        };
        match run.until(None, self.keep_escapes) {
            Ok((text, words)) => Ok(Expansion {
                text,
                words,
                matched: run.matched,
                unmatched: run.unmatched,
            }),
            Err(reason) => Err(ExpandError {
                message: format!("failed to process {}: {reason}", crate::gotext::quote(source)),
                matched: run.matched,
                unmatched: run.unmatched,
            }),
        }
    }

    /// Only the text of [`Expander::expand`].
    pub(super) fn text(&self, source: &str, variables: &dyn Variables) -> Result<String, ExpandError> {
        self.expand(source, variables).map(|e| e.text)
    }
}

/// Why a word cannot be expanded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExpandError {
    /// The sentence, with the word.
    pub message: String,
    /// Names found before the failure.
    pub matched: BTreeSet<String>,
    /// Names looked up in vain before the failure.
    pub unmatched: BTreeSet<String>,
}

impl From<ExpandError> for crate::error::DockerfileError {
    fn from(error: ExpandError) -> Self {
        Self::new(error.message)
    }
}

/// The word being collected. It is shared by nested runs: a `${…}` with a word in it throws away what was collected before it,
/// which is observable in EXPOSE.
#[derive(Default)]
struct Words {
    pending: String,
    in_word: bool,
}

impl Words {
    fn push(&mut self, c: char, done: &mut Vec<String>) {
        if !c.is_whitespace() {
            self.push_quoted(c);
        } else if self.in_word && !self.pending.is_empty() {
            done.push(std::mem::take(&mut self.pending));
            self.in_word = false;
        }
    }

    fn push_quoted(&mut self, c: char) {
        self.pending.push(c);
        self.in_word = true;
    }

    fn push_str_quoted(&mut self, text: &str) {
        self.pending.push_str(text);
        self.in_word = true;
    }

    fn finish(&mut self, done: &mut Vec<String>) {
        if !self.pending.is_empty() {
            done.push(std::mem::take(&mut self.pending));
            self.in_word = false;
        }
    }
}

struct Run<'a> {
    options: Expander,
    rest: &'a str,
    words: Words,
    variables: &'a dyn Variables,
    keep_escapes: bool,
    depth: usize,
    matched: BTreeSet<String>,
    unmatched: BTreeSet<String>,
}

type Step<T> = Result<T, String>;

impl Run<'_> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let c = chars.next();
        self.rest = chars.as_str();
        c
    }

    fn lookup(&mut self, name: &str) -> Option<String> {
        match self.variables.value(name) {
            Some(value) => {
                self.matched.insert(name.to_owned());
                Some(value.to_owned())
            }
            None => {
                self.unmatched.insert(name.to_owned());
                None
            }
        }
    }

    /// Reads to `stop`, which is consumed, or to the end of the text when `stop` is `None`.
    fn until(&mut self, stop: Option<char>, keep_escapes: bool) -> Step<(String, Vec<String>)> {
        if self.depth >= MAX_DEPTH {
            return Err("syntax error: substitutions are nested too deeply".to_owned());
        }
        self.depth += 1;
        let outer = std::mem::replace(&mut self.keep_escapes, keep_escapes);
        let result = self.until_inner(stop);
        self.keep_escapes = outer;
        self.depth -= 1;
        result
    }

    fn until_inner(&mut self, stop: Option<char>) -> Step<(String, Vec<String>)> {
        let mut out = String::new();
        let mut done = Vec::new();
        self.words = Words::default();
        while let Some(c) = self.peek() {
            if Some(c) == stop {
                self.next();
                self.words.finish(&mut done);
                return Ok((out, done));
            }
            let start = out.len();
            match c {
                '$' => {
                    let value = self.dollar()?;
                    for c in value.chars() {
                        self.words.push(c, &mut done);
                    }
                    out.push_str(&value);
                }
                '<' => {
                    let value = self.angle();
                    self.words.push_str_quoted(&value);
                    out.push_str(&value);
                }
                '\'' if !self.options.ignore_quotes => {
                    self.single_quoted(&mut out)?;
                    self.words.push_str_quoted(out.get(start..).unwrap_or_default());
                }
                '"' if !self.options.ignore_quotes => {
                    let value = self.double_quoted()?;
                    self.words.push_str_quoted(&value);
                    out.push_str(&value);
                }
                c if c == self.options.escape => {
                    self.next();
                    if self.keep_escapes {
                        self.words.push_quoted(c);
                        out.push(c);
                    }
                    let Some(c) = self.next() else { break };
                    self.words.push_quoted(c);
                    out.push(c);
                }
                c => {
                    self.next();
                    self.words.push(c, &mut done);
                    out.push(c);
                }
            }
            if out.len() > MAX_EXPANSION {
                return Err("the expanded text is too long".to_owned());
            }
        }
        if let Some(stop) = stop {
            return Err(format!("unexpected end of statement while looking for matching {stop}"));
        }
        self.words.finish(&mut done);
        Ok((out, done))
    }

    fn single_quoted(&mut self, out: &mut String) -> Step<()> {
        let Some((inside, after)) = self.rest.get(1..).and_then(|rest| rest.split_once('\'')) else {
            self.rest = "";
            return Err("unexpected end of statement while looking for matching single-quote".to_owned());
        };
        self.rest = after;
        if self.options.keep_quotes {
            out.push('\'');
        }
        out.push_str(inside);
        if self.options.keep_quotes {
            out.push('\'');
        }
        Ok(())
    }

    fn double_quoted(&mut self) -> Step<String> {
        let mut out = String::new();
        self.next();
        if self.options.keep_quotes {
            out.push('"');
        }
        loop {
            match self.peek() {
                None => return Err("unexpected end of statement while looking for matching double-quote".to_owned()),
                Some('"') => {
                    self.next();
                    if self.options.keep_quotes {
                        out.push('"');
                    }
                    return Ok(out);
                }
                Some('$') => {
                    let value = self.dollar()?;
                    out.push_str(&value);
                }
                Some(c) if c == self.options.escape => {
                    self.next();
                    if self.keep_escapes {
                        out.push(c);
                    }
                    match self.peek() {
                        None => {}
                        Some(next) if next == '"' || next == '$' || next == self.options.escape => {
                            self.next();
                            out.push(next);
                        }
                        Some(_) => out.push(c),
                    }
                }
                Some(c) => {
                    self.next();
                    out.push(c);
                }
            }
            if out.len() > MAX_EXPANSION {
                return Err("the expanded text is too long".to_owned());
            }
        }
    }

    /// `<`, or `<<` with the blanks behind it: a here-document operator and its name stay one word.
    fn angle(&mut self) -> String {
        self.next();
        if self.peek() != Some('<') {
            return "<".to_owned();
        }
        self.next();
        let mut out = "<<".to_owned();
        while let Some(c @ (' ' | '\t' | '\r')) = self.peek() {
            self.next();
            out.push(c);
        }
        out
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        match self.peek() {
            Some(c) if is_digit(c) => {
                while let Some(c) = self.peek().filter(|c| is_digit(*c)) {
                    self.next();
                    name.push(c);
                }
            }
            Some(c @ ('@' | '*' | '#' | '?' | '-' | '$' | '!')) => {
                self.next();
                name.push(c);
            }
            _ => {
                while let Some(c) = self.peek().filter(|&c| is_letter(c) || is_digit(c) || c == '_') {
                    self.next();
                    name.push(c);
                }
            }
        }
        name
    }

    fn dollar(&mut self) -> Step<String> {
        self.next();
        if self.peek() != Some('{') {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".to_owned());
            }
            return Ok(match self.lookup(&name) {
                None if self.options.keep_unset => format!("${name}"),
                value => value.unwrap_or_default(),
            });
        }
        self.next();
        match self.peek() {
            None => return Err("syntax error: missing '}'".to_owned()),
            Some('{' | '}' | ':') => return Err("syntax error: bad substitution".to_owned()),
            Some(_) => {}
        }
        let name = self.name();
        let first = self.next();
        match first {
            Some('}') => Ok(match self.lookup(&name) {
                None if self.options.keep_unset => format!("${{{name}}}"),
                value => value.unwrap_or_default(),
            }),
            Some('/') => self.replaced(&name),
            Some(':') => {
                let operator = self.next();
                self.conditional(&name, operator, true)
            }
            Some('+' | '-' | '?' | '#' | '%') => self.conditional(&name, first, false),
            other => Err(unsupported(&other.unwrap_or('\u{fffd}').to_string())),
        }
    }

    /// A nested word up to `}`; running out of text is reported as a missing brace.
    fn nested(&mut self, stop: char, keep_escapes: bool, missing: &str) -> Step<String> {
        match self.until(Some(stop), keep_escapes) {
            Ok((word, _)) => Ok(word),
            Err(_) if self.rest.is_empty() => Err(format!("syntax error: {missing}")),
            Err(reason) => Err(reason),
        }
    }

    /// `${name-word}` and its relatives; `colon` makes an empty value count as unset.
    fn conditional(&mut self, name: &str, operator: Option<char>, colon: bool) -> Step<String> {
        let shown = format!("{}{}", if colon { ":" } else { "" }, operator.unwrap_or('\u{fffd}'));
        let trims = matches!(operator, Some('#' | '%'));
        if colon && trims {
            return Err(unsupported(&shown));
        }
        let word = self.nested('}', trims, "missing '}'")?;
        let value = self.lookup(name);
        if value.is_none() && self.options.keep_unset {
            return Ok(format!("${{{name}{shown}{word}}}"));
        }
        let missing = value.is_none() || (colon && value.as_deref() == Some(""));
        match operator {
            Some('-') => Ok(if missing { word } else { value.unwrap_or_default() }),
            Some('+') => Ok(if missing { String::new() } else { word }),
            Some('?') if missing => {
                let state = if value.is_none() { "unset" } else { "empty" };
                let why = if word.is_empty() {
                    format!("is not allowed to be {state}")
                } else {
                    word
                };
                Err(format!("{name}: {why}"))
            }
            Some('?') => Ok(value.unwrap_or_default()),
            Some(side @ ('#' | '%')) => {
                let (word, longest) = match word.strip_prefix(side) {
                    Some(word) => (word, true),
                    None => (word.as_str(), false),
                };
                let value = value.unwrap_or_default();
                if side == '#' {
                    pattern::without_prefix(word, &value, longest)
                } else {
                    pattern::without_suffix(word, &value, longest)
                }
            }
            _ => Err(unsupported(&shown)),
        }
    }

    /// `${name/pattern/replacement}`, with a doubled first slash for all matches.
    fn replaced(&mut self, name: &str) -> Step<String> {
        let all = self.peek() == Some('/');
        if all {
            self.next();
        }
        let pattern = self.nested('/', true, "missing '/' in ${}")?;
        let replacement = self.nested('}', true, "missing '}'")?;
        let value = self.lookup(name);
        if value.is_none() && self.options.keep_unset {
            return Ok(format!("${{{name}/{pattern}/{replacement}}}"));
        }
        let value = pattern::replace(&pattern, &value.unwrap_or_default(), &replacement, all)?;
        if value.len() > MAX_EXPANSION {
            return Err("the expanded text is too long".to_owned());
        }
        Ok(value)
    }
}

fn unsupported(modifier: &str) -> String {
    format!("unsupported modifier ({modifier}) in substitution")
}

fn is_letter(c: char) -> bool {
    if c.is_ascii() {
        c.is_ascii_alphabetic()
    } else {
        pattern::in_class(c, r"^\p{L}$")
    }
}

fn is_digit(c: char) -> bool {
    if c.is_ascii() {
        c.is_ascii_digit()
    } else {
        pattern::in_class(c, r"^\p{Nd}$")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    impl Variables for HashMap<&str, &str> {
        fn value(&self, name: &str) -> Option<&str> {
            self.get(name).copied()
        }
    }

    fn env() -> HashMap<&'static str, &'static str> {
        HashMap::from([
            ("v", "value"),
            ("e", ""),
            ("p", "/usr/local/bin"),
            ("f", "a.tar.gz"),
            ("s", "x y"),
            ("d", "a$1b"),
        ])
    }

    #[track_caller]
    fn check(expander: Expander, cases: &[(&str, &str)]) {
        for (source, want) in cases {
            let got = expander
                .text(source, &env())
                .unwrap_or_else(|e| format!("! {}", e.message));
            assert_eq!(&got, want, "{source}");
        }
    }

    #[test]
    fn operators() {
        check(
            Expander::default(),
            &[
                ("$v ${v} $u ${u}", "value value  "),
                ("${u-w} ${u:-w} ${e-w} ${e:-w} ${v-w}", "w w  w value"),
                ("${u+w}|${u:+w}|${e+w}|${e:+w}|${v+w}", "||w||w"),
                ("${v?x}${e?x}", "value"),
                ("${u?}", "! failed to process \"${u?}\": u: is not allowed to be unset"),
                (
                    "${e:?}",
                    "! failed to process \"${e:?}\": e: is not allowed to be empty",
                ),
                ("${u:?no $v}", "! failed to process \"${u:?no $v}\": u: no value"),
                ("${p#*/} ${p##*/} ${p%/*} ${p%%/*}", "usr/local/bin bin /usr/local "),
                ("${f%.*} ${f%%.*} ${f#*.}", "a.tar a tar.gz"),
                (
                    "${p/\\//-} ${p//\\//-} ${p//l*l/L}",
                    "-usr/local/bin -usr-local-bin /usr/L/bin",
                ),
                (
                    "${d#a\\$}",
                    "! failed to process \"${d#a\\\\$}\": invalid pattern (a\\$) in substitution: invalid escape '\\$'",
                ),
                ("${v//a/[$d]}", "v[a]lue"),
                ("${v/a/[$d]}", "v[a$1b]lue"),
                ("$$ $(cmd) $1x $! $", " $(cmd) x  $"),
                ("${u:-${v:-w}}", "value"),
                ("${u:-'a b'\"c\"}", "a bc"),
            ],
        );
    }

    #[test]
    fn quotes_and_escapes() {
        check(
            Expander::default(),
            &[
                (r#"'$v' "$v" \$v \a"#, "$v value $v a"),
                (r#""\$v \" \a \\" 'a\b'"#, r#"$v " \a \ a\b"#),
                ("\\", ""),
                ("a\\", "a"),
                ("\u{feff}a $v", "a value"),
                (
                    "'a",
                    "! failed to process \"'a\": unexpected end of statement while looking for matching single-quote",
                ),
                (
                    "\"a",
                    "! failed to process \"\\\"a\": unexpected end of statement while looking for matching double-quote",
                ),
                (
                    "${u:-'a}",
                    "! failed to process \"${u:-'a}\": syntax error: missing '}'",
                ),
            ],
        );
        check(Expander::with_escape('`'), &[("`$v \\a", "$v \\a")]);
        check(
            Expander {
                ignore_quotes: true,
                ..Expander::default()
            },
            &[("'$v' \"a\\n", "'value' \"an")],
        );
        check(
            Expander {
                keep_quotes: true,
                keep_unset: true,
                ..Expander::default()
            },
            &[(
                "echo \"$v\" $u ${u} ${u:-x} 'q' \\\\n",
                "echo \"value\" $u ${u} ${u:-x} 'q' \\n",
            )],
        );
    }

    #[test]
    fn errors() {
        for (source, reason) in [
            ("${", "syntax error: missing '}'"),
            ("${v", "unsupported modifier (\u{fffd}) in substitution"),
            ("${v:-x", "syntax error: missing '}'"),
            ("${}", "syntax error: bad substitution"),
            ("${{v}", "syntax error: bad substitution"),
            ("${:-x}", "syntax error: bad substitution"),
            ("${v:=x}", "unsupported modifier (:=) in substitution"),
            ("${v=x}", "unsupported modifier (=) in substitution"),
            ("${v^}", "unsupported modifier (^) in substitution"),
            ("${v:0:1}", "unsupported modifier (:0) in substitution"),
            ("${v:#x}", "unsupported modifier (:#) in substitution"),
            ("${v/a}", "syntax error: missing '/' in ${}"),
            ("${v/a/b", "syntax error: missing '}'"),
        ] {
            let error = Expander::default().expand(source, &env()).unwrap_err();
            assert_eq!(
                error.message,
                format!("failed to process {}: {reason}", crate::gotext::quote(source))
            );
        }
    }

    #[test]
    fn words_split_at_unquoted_blanks() {
        for (source, words) in [
            ("80 443", vec!["80", "443"]),
            ("80${u:-81}", vec!["81"]),
            ("$s '$s'", vec!["x", "y", "$s"]),
            ("\"\" a", vec!["a"]),
            ("$u", vec![]),
            ("cat << EOF x", vec!["cat", "<< EOF", "x"]),
        ] {
            assert_eq!(
                Expander::default().expand(source, &env()).unwrap().words,
                words,
                "{source}"
            );
        }
    }

    #[test]
    fn hostile_words_end_in_an_answer() {
        let deep = "${a:-".repeat(100_000);
        assert!(Expander::default().expand(&deep, &NoVariables).is_err());
        let big = "x".repeat(MAX_EXPANSION / 2);
        let vars = HashMap::from([("b", big.as_str())]);
        assert!(Expander::default().expand("$b$b$b", &vars).is_err());
        let long = "'a' ".repeat(2_000_000);
        assert!(Expander::default().expand(&long, &NoVariables).is_ok());
    }
}
