//! The `--name=value` words between an instruction's keyword and its arguments.

use super::suggest::nearest;

/// Splits leading flag words off `line` and returns them with the rest of the line.
///
/// Reading is byte by byte: bytes from 0x80 on turn into the Latin-1 characters of the same number, and two of them count as
/// blanks. A word that is exactly `--` ends the flags and vanishes.
pub(crate) fn split_flags(line: &[u8], escape: u8) -> (Vec<String>, &[u8]) {
    let mut flags = Vec::new();
    let mut at = 0;
    loop {
        while line.get(at).is_some_and(|&b| is_blank(b)) {
            at += 1;
        }
        if line.get(at..at + 2) != Some(b"--") {
            return (flags, line.get(at..).unwrap_or_default());
        }
        let mut word = String::new();
        let mut quote = None;
        let mut quoted = false;
        loop {
            let Some(&byte) = line.get(at) else {
                if word != "--" && (quoted || !word.is_empty()) {
                    flags.push(word);
                }
                return (flags, &[]);
            };
            at += 1;
            match quote {
                None if is_blank(byte) => break,
                None if byte == b'\'' || byte == b'"' => {
                    quote = Some(byte);
                    quoted = true;
                }
                Some(q) if byte == q => quote = None,
                _ if byte == escape => match line.get(at) {
                    Some(&next) => {
                        word.push(next as char);
                        at += 1;
                    }
                    None => quote = None,
                },
                _ => word.push(byte as char),
            }
        }
        if word == "--" {
            return (flags, line.get(at - 1..).unwrap_or_default());
        }
        if quoted || !word.is_empty() {
            flags.push(word);
        }
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ' | 0x85 | 0xa0)
}

/// What values a flag takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FlagKind {
    /// `--x`, `--x=true`, `--x=false`.
    Bool,
    /// `--x=text`, once.
    Text,
    /// `--x=text`, any number of times.
    List,
}

/// The flags of one instruction, checked against what it allows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flags {
    given: Vec<(&'static str, String)>,
}

impl Flags {
    /// Checks `words` against `allowed`.
    pub(super) fn parse(words: &[String], allowed: &[(&'static str, FlagKind)]) -> Result<Self, String> {
        let mut flags = Self::default();
        for word in words {
            if word == "--" {
                break;
            }
            let Some(body) = word.strip_prefix("--") else {
                return Err(format!("arg should start with -- : {word}"));
            };
            let (name, value) = match body.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (body, None),
            };
            let Some(&(known, kind)) = allowed.iter().find(|(known, _)| *known == name) else {
                let hint = nearest(name, allowed.iter().map(|(known, _)| *known));
                let hint = hint.map(|h| format!(" (did you mean {h}?)")).unwrap_or_default();
                return Err(format!("unknown flag: --{name}{hint}"));
            };
            if kind != FlagKind::List && flags.given(known) {
                return Err(format!("duplicate flag specified: --{name}"));
            }
            let missing = || format!("missing a value on flag: --{name}");
            let value = match (kind, value) {
                (FlagKind::Bool, None) => "true".to_owned(),
                (FlagKind::Bool, Some("")) | (FlagKind::Text | FlagKind::List, None) => return Err(missing()),
                (FlagKind::Bool, Some(value)) => match value.to_lowercase().as_str() {
                    lower @ ("true" | "false") => lower.to_owned(),
                    _ => return Err(format!("expecting boolean value for flag --{name}, not: {value}")),
                },
                (_, Some(value)) => value.to_owned(),
            };
            flags.given.push((known, value));
        }
        Ok(flags)
    }

    fn given(&self, name: &str) -> bool {
        self.given.iter().any(|(known, _)| *known == name)
    }

    /// The value of a text flag, empty when absent.
    pub(super) fn text(&self, name: &str) -> String {
        self.given
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| value.clone())
            .unwrap_or_default()
    }

    /// The value of a text flag, `None` when absent.
    pub(super) fn given_text(&self, name: &str) -> Option<&str> {
        self.given
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| value.as_str())
    }

    /// The value of a boolean flag, `None` when absent.
    pub(super) fn bool(&self, name: &str) -> Option<bool> {
        self.given
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| value == "true")
    }

    /// All values of a list flag, in order.
    pub(super) fn list(&self, name: &str) -> Vec<String> {
        self.given
            .iter()
            .filter(|(known, _)| *known == name)
            .map(|(_, value)| value.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_words_end_at_the_first_other_word() {
        for (line, flags, rest) in [
            ("--a --b=c d --e", vec!["--a", "--b=c"], "d --e"),
            ("  x --a", vec![], "x --a"),
            ("--a=\"b c\" '--x' y", vec!["--a=b c"], "'--x' y"),
            ("--a=b\\ c d", vec!["--a=b c"], "d"),
            ("-- --x", vec![], " --x"),
            ("--a -- --x", vec!["--a"], " --x"),
            ("--a", vec!["--a"], ""),
            ("--", vec![], ""),
            ("--from=é x", vec!["--from=Ã©"], "x"),
            ("--a='b", vec!["--a=b"], ""),
            ("-x", vec![], "-x"),
        ] {
            let (got, got_rest) = split_flags(line.as_bytes(), b'\\');
            assert_eq!(
                (got.iter().map(String::as_str).collect::<Vec<_>>(), got_rest),
                (flags, rest.as_bytes()),
                "{line}"
            );
        }
    }

    #[test]
    fn flags_are_checked() {
        let allowed = &[
            ("link", FlagKind::Bool),
            ("from", FlagKind::Text),
            ("exclude", FlagKind::List),
        ];
        let parse = |words: &[&str]| Flags::parse(&words.iter().map(|s| s.to_string()).collect::<Vec<_>>(), allowed);
        let flags = parse(&["--link=FALSE", "--from=", "--exclude=a", "--exclude=b"]).unwrap();
        assert_eq!(
            (flags.bool("link"), flags.text("from"), flags.list("exclude")),
            (Some(false), "".into(), vec!["a".into(), "b".into()])
        );
        for (word, message) in [
            ("--form=x", "unknown flag: --form (did you mean from?)"),
            ("--platform=x", "unknown flag: --platform"),
            ("--from", "missing a value on flag: --from"),
            ("--link=", "missing a value on flag: --link"),
            ("--link=1", "expecting boolean value for flag --link, not: 1"),
        ] {
            assert_eq!(parse(&[word]).unwrap_err(), message);
        }
        assert_eq!(
            parse(&["--link", "--link"]).unwrap_err(),
            "duplicate flag specified: --link"
        );
    }
}
