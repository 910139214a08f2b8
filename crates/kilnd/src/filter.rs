//! Filters as `du`, `prune`, `ListWorkers` and history send them: containerd's filter language.
//!
//! A list of texts is a disjunction; a text is a conjunction of terms separated by commas. A term is `field` (present and
//! not empty), `field==value`, `field!=value` or `field~=regexp`; values may be quoted with `"` or `|`. An empty text matches
//! everything, and so does an empty list.

use regex::Regex;

/// Fields of the thing that is filtered.
pub trait Fields {
    /// The field's text; `None` if there is no such field.
    fn field(&self, path: &str) -> Option<String>;
}

impl<F: Fn(&str) -> Option<String>> Fields for F {
    fn field(&self, path: &str) -> Option<String> {
        self(path)
    }
}

/// A text that is no filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to parse filter `{text}`: {reason}")]
pub struct FilterError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A parsed list of filters.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    alternatives: Vec<Vec<Term>>,
}

#[derive(Debug, Clone)]
struct Term {
    field: String,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filter {
    /// Parses a list; every text must be a filter.
    pub fn parse<S: AsRef<str>>(texts: &[S]) -> Result<Self, FilterError> {
        let mut alternatives = Vec::with_capacity(texts.len());
        for text in texts {
            let text = text.as_ref();
            alternatives.push(parse_terms(text).map_err(|reason| FilterError {
                text: text.to_owned(),
                reason,
            })?);
        }
        Ok(Self { alternatives })
    }

    /// Whether `item` matches one of the filters.
    pub fn matches(&self, item: &impl Fields) -> bool {
        self.alternatives.is_empty()
            || self
                .alternatives
                .iter()
                .any(|terms| terms.iter().all(|t| t.matches(item)))
    }
}

impl Term {
    fn matches(&self, item: &impl Fields) -> bool {
        let value = item.field(&self.field);
        match &self.test {
            Test::Present => value.is_some_and(|v| !v.is_empty()),
            Test::Equal(want) => value.as_deref() == Some(want),
            Test::NotEqual(want) => value.as_deref() != Some(want),
            Test::Matches(regex) => value.is_some_and(|v| regex.is_match(&v)),
        }
    }
}

fn parse_terms(text: &str) -> Result<Vec<Term>, String> {
    let mut rest = text.trim();
    let mut terms = Vec::new();
    while !rest.is_empty() {
        let (field, after) = parse_field(rest)?;
        let operator = ["==", "!=", "~=", "="].into_iter().find(|op| after.starts_with(op));
        let (test, after) = match operator {
            None => (Test::Present, after),
            Some(op) => {
                let (value, tail) = parse_value(after.get(op.len()..).unwrap_or_default())?;
                let test = match op {
                    "!=" => Test::NotEqual(value),
                    "~=" => Test::Matches(Regex::new(&value).map_err(|e| e.to_string())?),
                    _ => Test::Equal(value),
                };
                (test, tail)
            }
        };
        terms.push(Term { field, test });
        rest = match after.trim_start() {
            "" => "",
            more => match more.strip_prefix(',') {
                Some(tail) => tail.trim_start(),
                None => return Err(format!("unexpected input `{more}`")),
            },
        };
    }
    Ok(terms)
}

/// A path of names separated by dots; a name may be quoted, as keys of labels have to be.
fn parse_field(text: &str) -> Result<(String, &str), String> {
    let mut field = String::new();
    let mut rest = text;
    loop {
        if rest.starts_with('"') {
            let (name, tail) = parse_quoted(rest, '"')?;
            field.push_str(&name);
            rest = tail;
        } else {
            let end = rest
                .find(|c: char| !(c.is_alphanumeric() || "_-/".contains(c)))
                .unwrap_or(rest.len());
            let (name, tail) = rest.split_at(end);
            field.push_str(name);
            rest = tail;
        }
        match rest.strip_prefix('.') {
            Some(tail) => {
                field.push('.');
                rest = tail;
            }
            None => break,
        }
    }
    if field.is_empty() {
        return Err(format!("expected a field name at `{text}`"));
    }
    Ok((field, rest))
}

fn parse_value(text: &str) -> Result<(String, &str), String> {
    match text.chars().next() {
        Some(quote @ ('"' | '|')) => parse_quoted(text, quote),
        _ => {
            let end = text.find(',').unwrap_or(text.len());
            let (value, rest) = text.split_at(end);
            Ok((value.trim_end().to_owned(), rest))
        }
    }
}

fn parse_quoted(text: &str, quote: char) -> Result<(String, &str), String> {
    let mut out = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' if quote == '"' => match chars.next() {
                Some((_, 'n')) => out.push('\n'),
                Some((_, 't')) => out.push('\t'),
                Some((_, other)) => out.push(other),
                None => break,
            },
            c if c == quote => return Ok((out, text.get(at + c.len_utf8()..).unwrap_or_default())),
            c => out.push(c),
        }
    }
    Err(format!("unterminated quote in `{text}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(filters: &[&str], expected: bool) {
        let item = |name: &str| match name {
            "id" => Some("abc".to_owned()),
            "type" => Some("exec.cachemount".to_owned()),
            "empty" => Some(String::new()),
            "labels.org.x/y" => Some("1,2".to_owned()),
            _ => None,
        };
        assert_eq!(Filter::parse(filters).unwrap().matches(&item), expected, "{filters:?}");
    }

    #[test]
    fn terms_and_lists() {
        check(&[], true);
        check(&[""], true);
        check(&["id==abc"], true);
        check(&["id=abc"], true);
        check(&["id~=^a"], true);
        check(&["id!=abc"], false);
        check(&["missing!=abc"], true);
        check(&["type==exec.cachemount,id~=b"], true);
        check(&["type==exec.cachemount,id==b"], false);
        check(&["id==x", "type"], true);
        check(&["empty"], false);
        check(&["missing"], false);
        check(&[r#"labels."org.x/y"=="1,2""#], true);
        check(&["id~=|^a.c$|"], true);
        for bad in ["==x", "id~=(", "id==\"x", "id==\"x\"y"] {
            assert!(Filter::parse(&[bad]).is_err(), "{bad}");
        }
    }
}
