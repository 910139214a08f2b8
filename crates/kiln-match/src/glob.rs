//! Go's `filepath.Match`: `*` and `?` within one element, `[a-z]` and `[^a]` classes, `\` escapes.

use crate::Error;

/// Whether a pattern has a wildcard (`*`, `?` or `[`) that is not escaped by a backslash.
pub fn has_wildcard(pattern: &[u8]) -> bool {
    let mut escaped = false;
    for b in pattern {
        match b {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'*' | b'?' | b'[' => return true,
            _ => {}
        }
    }
    false
}

/// Whether `pattern` matches the whole of `name`.
///
/// # Errors
/// [`Error::BadPattern`] if the pattern is malformed anywhere, also where matching already failed before that place.
pub fn go_match(pattern: &[u8], name: &[u8]) -> Result<bool, Error> {
    let tokens = parse(pattern)?;
    Ok(run(&tokens, name))
}

/// One step of a pattern.
#[derive(Debug)]
enum Token {
    /// `*`: any number of characters except `/`.
    Star,
    /// `?`: one character except `/`.
    Any,
    /// A class: negated, and ranges of characters. May match `/`.
    Class(bool, Vec<(u32, u32)>),
    /// One literal byte.
    Byte(u8),
}

fn parse(pattern: &[u8]) -> Result<Vec<Token>, Error> {
    let mut out = Vec::with_capacity(pattern.len());
    let mut rest = pattern;
    while let Some((&b, tail)) = rest.split_first() {
        rest = tail;
        match b {
            b'*' => out.push(Token::Star),
            b'?' => out.push(Token::Any),
            b'\\' => {
                let (&c, tail) = rest.split_first().ok_or(Error::BadPattern)?;
                out.push(Token::Byte(c));
                rest = tail;
            }
            b'[' => {
                let negated = rest.first() == Some(&b'^');
                if negated {
                    rest = rest.get(1..).unwrap_or_default();
                }
                let mut ranges = Vec::new();
                loop {
                    if rest.first() == Some(&b']') && !ranges.is_empty() {
                        rest = rest.get(1..).unwrap_or_default();
                        break;
                    }
                    let low = class_char(&mut rest)?;
                    let mut high = low;
                    if rest.first() == Some(&b'-') {
                        rest = rest.get(1..).unwrap_or_default();
                        high = class_char(&mut rest)?;
                    }
                    ranges.push((low, high));
                }
                out.push(Token::Class(negated, ranges));
            }
            _ => out.push(Token::Byte(b)),
        }
    }
    Ok(out)
}

/// One possibly escaped character of a class; something must follow it (at least the closing bracket).
fn class_char(rest: &mut &[u8]) -> Result<u32, Error> {
    match rest.first() {
        None | Some(b'-' | b']') => return Err(Error::BadPattern),
        Some(b'\\') => *rest = rest.get(1..).unwrap_or_default(),
        Some(_) => {}
    }
    if rest.is_empty() {
        return Err(Error::BadPattern);
    }
    let (c, width) = decode(rest);
    if c == INVALID && width == 1 {
        return Err(Error::BadPattern);
    }
    *rest = rest.get(width..).unwrap_or_default();
    if rest.is_empty() { Err(Error::BadPattern) } else { Ok(c) }
}

fn run(tokens: &[Token], name: &[u8]) -> bool {
    let (mut t, mut n) = (0, 0);
    // Where to resume when what followed the last star did not fit: a star never needs more than one such place.
    let mut star: Option<(usize, usize)> = None;
    loop {
        let step = match tokens.get(t) {
            Some(Token::Star) => {
                star = Some((t + 1, n));
                t += 1;
                continue;
            }
            None if n == name.len() => return true,
            None => None,
            Some(token) => name
                .get(n..)
                .filter(|r| !r.is_empty())
                .and_then(|rest| one(token, rest)),
        };
        match (step, star) {
            (Some(width), _) => {
                t += 1;
                n += width;
            }
            (None, Some((after, at))) => match name.get(at) {
                Some(b) if *b != b'/' => {
                    star = Some((after, at + 1));
                    t = after;
                    n = at + 1;
                }
                _ => return false,
            },
            (None, None) => return false,
        }
    }
}

/// How many bytes of `rest` the token takes, if it fits.
fn one(token: &Token, rest: &[u8]) -> Option<usize> {
    match token {
        Token::Byte(b) => (rest.first() == Some(b)).then_some(1),
        Token::Any => (rest.first() != Some(&b'/')).then(|| decode(rest).1),
        Token::Class(negated, ranges) => {
            let (c, width) = decode(rest);
            let inside = ranges.iter().any(|(low, high)| (*low..=*high).contains(&c));
            (inside != *negated).then_some(width)
        }
        Token::Star => None,
    }
}

/// What Go decodes a byte to that is not part of valid UTF-8.
const INVALID: u32 = 0xfffd;

/// The first character of non-empty bytes and its width; an invalid byte counts as U+FFFD of width one.
fn decode(bytes: &[u8]) -> (u32, usize) {
    let head = bytes.get(..4).unwrap_or(bytes);
    let valid = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(e) => std::str::from_utf8(head.get(..e.valid_up_to()).unwrap_or_default()).unwrap_or_default(),
    };
    match valid.chars().next() {
        Some(c) => (u32::from(c), c.len_utf8()),
        None => (INVALID, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn m(pattern: &str, name: &str) -> Result<bool, Error> {
        go_match(pattern.as_bytes(), name.as_bytes())
    }

    #[test]
    fn table() {
        for (pattern, name, want) in [
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*c", "abc", true),
            ("a*", "a", true),
            ("a*", "ab/c", false),
            ("a*/b", "abc/b", true),
            ("a*/b", "a/c/b", false),
            ("a*b*c*d*e*/f", "axbxcxdxe/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/fff", false),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[b-d]", "abc", true),
            ("ab[e-g]", "abc", false),
            ("ab[^c]", "abc", false),
            ("ab[^e-g]", "abc", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "ab", false),
            ("a?b", "a☺b", true),
            ("a[^a]b", "a☺b", true),
            ("a???b", "a☺b", false),
            ("[a-ζ]*", "α", true),
            ("*[a-ζ]", "A", false),
            ("a?b", "a/b", false),
            ("a*b", "a/b", false),
            ("a[^x]b", "a/b", true),
            ("[\\]a]", "]", true),
            ("[\\-x]", "-", true),
            ("*x", "xxx", true),
            ("", "", true),
            ("", "x", false),
            ("**", "ab", true),
            ("*", "", true),
        ] {
            assert_eq!(m(pattern, name), Ok(want), "{pattern} {name}");
        }
        for bad in [
            "[]a]", "[-]", "[x-]", "[-x]", "[", "[^", "[^bc", "a[", "\\", "[a-b-c]", "[a-",
        ] {
            assert_eq!(m(bad, "a"), Err(Error::BadPattern), "{bad}");
            assert_eq!(m(&format!("zz{bad}"), "a"), Err(Error::BadPattern), "zz{bad}");
        }
    }

    #[test]
    fn wildcards() {
        assert!(has_wildcard(b"a*") && has_wildcard(b"[") && has_wildcard(b"\\\\?"));
        assert!(!has_wildcard(b"a\\*") && !has_wildcard(b"plain/x"));
    }

    proptest::proptest! {
        #[test]
        fn equals_the_naive_one(pattern in "[ab/*?]{0,8}", name in "[ab/]{0,10}") {
            fn naive(p: &[u8], n: &[u8]) -> bool {
                match (p.split_first(), n.split_first()) {
                    (None, None) => true,
                    (Some((b'*', rest)), _) if naive(rest, n) => true,
                    (Some((b'*', _)), Some((c, tail))) => *c != b'/' && naive(p, tail),
                    (Some((b'?', rest)), Some((c, tail))) => *c != b'/' && naive(rest, tail),
                    (Some((x, rest)), Some((c, tail))) => x == c && naive(rest, tail),
                    _ => false,
                }
            }
            proptest::prop_assert_eq!(m(&pattern, &name), Ok(naive(pattern.as_bytes(), name.as_bytes())));
        }
    }
}
