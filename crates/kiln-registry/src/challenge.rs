//! `WWW-Authenticate` challenges (RFC 9110 §11.6.1), as far as registries use them.

use std::collections::BTreeMap;

/// One challenge: a scheme in lower case and its parameters with names in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Challenge {
    pub(crate) scheme: String,
    pub(crate) params: BTreeMap<String, String>,
}

impl Challenge {
    pub(crate) fn param(&self, name: &str) -> &str {
        self.params.get(name).map_or("", String::as_str)
    }
}

/// All challenges of one header value; what cannot be read is left out.
pub(crate) fn parse(header: &str) -> Vec<Challenge> {
    let mut rest = header.trim_start();
    let mut out: Vec<Challenge> = Vec::new();
    while !rest.is_empty() {
        rest = rest.trim_start_matches([',', ' ', '\t']);
        let (word, after) = token(rest);
        if word.is_empty() {
            break;
        }
        let after = after.trim_start();
        if let Some(value_part) = after.strip_prefix('=').filter(|_| !out.is_empty()) {
            let (value, tail) = value(value_part.trim_start());
            if let Some(last) = out.last_mut() {
                last.params.insert(word.to_ascii_lowercase(), value);
            }
            rest = tail;
        } else {
            out.push(Challenge {
                scheme: word.to_ascii_lowercase(),
                params: BTreeMap::new(),
            });
            rest = after.strip_prefix('=').unwrap_or(after);
        }
    }
    out
}

fn token(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !(c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/".contains(c)))
        .unwrap_or(text.len());
    text.split_at(end)
}

fn value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (word, rest) = token(text);
        return (word.to_owned(), rest);
    };
    let mut out = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => out.extend(chars.next().map(|(_, c)| c)),
            '"' => return (out, quoted.get(at + 1..).unwrap_or_default()),
            c => out.push(c),
        }
    }
    (out, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bearer_and_basic() {
        let all = parse(
            r#"Bearer realm="https://auth.example/token?x=1,2",service="reg \"x\"", scope="repository:a/b:pull,push", error=insufficient_scope"#,
        );
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].scheme, "bearer");
        assert_eq!(all[0].param("realm"), "https://auth.example/token?x=1,2");
        assert_eq!(all[0].param("service"), "reg \"x\"");
        assert_eq!(all[0].param("scope"), "repository:a/b:pull,push");
        assert_eq!(all[0].param("error"), "insufficient_scope");
        let two = parse("Negotiate, Basic realm=\"r\"");
        assert_eq!(
            two.iter().map(|c| c.scheme.as_str()).collect::<Vec<_>>(),
            ["negotiate", "basic"]
        );
    }

    proptest! {
        #[test]
        fn parsing_ends_and_never_panics(text in "\\PC{0,60}") {
            let _ = parse(&text);
        }
    }
}
