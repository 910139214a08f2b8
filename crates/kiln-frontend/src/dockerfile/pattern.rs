//! The wildcard patterns of `${v#p}`, `${v%p}` and `${v/p/r}`: `*`, `?` and escapes, nothing else.

use std::cell::RefCell;
use std::collections::HashMap;

use regex::Regex;

/// Longest pattern accepted, in bytes.
const MAX_PATTERN: usize = 4096;

thread_local! {
    /// Compiled classes and patterns of this thread; emptied when it grows.
    static COMPILED: RefCell<HashMap<String, Regex>> = RefCell::new(HashMap::new());
}

fn compiled(source: &str) -> Result<Regex, String> {
    COMPILED.with_borrow_mut(|cache| {
        if let Some(found) = cache.get(source) {
            return Ok(found.clone());
        }
        let regex = Regex::new(source).map_err(|_| "pattern is too large".to_owned())?;
        if cache.len() >= 64 {
            cache.clear();
        }
        cache.insert(source.to_owned(), regex.clone());
        Ok(regex)
    })
}

/// Whether `c` is in the character class `class`, an anchored expression for one character.
pub(super) fn in_class(c: char, class: &str) -> bool {
    compiled(class).is_ok_and(|re| re.is_match(c.encode_utf8(&mut [0; 4])))
}

/// `value` without its shortest or longest prefix that matches `pattern`.
pub(super) fn without_prefix(pattern: &str, value: &str, longest: bool) -> Result<String, String> {
    let regex = to_regex(pattern, longest, true).map_err(|e| invalid(pattern, &e))?;
    let end = regex.find(value).map_or(0, |m| m.end());
    Ok(value.get(end..).unwrap_or_default().to_owned())
}

/// `value` without its shortest or longest suffix that matches `pattern`: text and pattern are turned around, because the
/// leftmost match is the one an expression finds.
pub(super) fn without_suffix(pattern: &str, value: &str, longest: bool) -> Result<String, String> {
    let mut turned: Vec<String> = Vec::new();
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, chars.peek()) {
            ('\\', Some(&next)) => {
                chars.next();
                turned.push(format!("\\{next}"));
            }
            _ => turned.push(c.to_string()),
        }
    }
    turned.reverse();
    let value: String = value.chars().rev().collect();
    let kept = without_prefix(&turned.concat(), &value, longest)?;
    Ok(kept.chars().rev().collect())
}

/// `value` with the first match of `pattern` replaced, or all of them. Only the replacement of all matches gives `$name` in it
/// the meaning of a group of the match.
pub(super) fn replace(pattern: &str, value: &str, replacement: &str, all: bool) -> Result<String, String> {
    let regex = to_regex(pattern, true, false).map_err(|e| invalid(pattern, &e))?;
    if all {
        if value.len().saturating_mul(replacement.len()) > 64 * super::expand::MAX_EXPANSION {
            return Err("the expanded text is too long".to_owned());
        }
        return Ok(regex.replace_all(value, replacement).into_owned());
    }
    Ok(match regex.find(value) {
        Some(m) => {
            let (before, after) = (value.get(..m.start()), value.get(m.end()..));
            [before.unwrap_or_default(), replacement, after.unwrap_or_default()].concat()
        }
        None => value.to_owned(),
    })
}

fn invalid(pattern: &str, why: &str) -> String {
    format!("invalid pattern ({pattern}) in substitution: {why}")
}

fn to_regex(pattern: &str, longest: bool, anchored: bool) -> Result<Regex, String> {
    if pattern.len() > MAX_PATTERN {
        return Err("pattern is too large".to_owned());
    }
    let mut out = String::with_capacity(pattern.len() + 8);
    if anchored {
        out.push('^');
    }
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '*' => out.push_str(if longest { ".*" } else { ".*?" }),
            '?' => out.push('.'),
            '\\' => match chars.peek() {
                // These are escaped for the sake of the `${…}` around the pattern, and stand for themselves in it.
                Some('}' | '/') => {}
                Some(&next @ ('*' | '?' | '\\')) => {
                    chars.next();
                    out.push('\\');
                    out.push(next);
                }
                Some(next) => return Err(format!("invalid escape '\\{next}'")),
                None => return Err("invalid escape '\\\u{fffd}'".to_owned()),
            },
            c if regex_syntax_char(c) => {
                out.push('\\');
                out.push(c);
            }
            c => out.push(c),
        }
    }
    compiled(&out)
}

fn regex_syntax_char(c: char) -> bool {
    matches!(c, '[' | ']' | '{' | '}' | '.' | '+' | '(' | ')' | '|' | '^' | '$')
}
