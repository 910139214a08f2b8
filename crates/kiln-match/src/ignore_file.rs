//! Reading a `.dockerignore`: one pattern a line, comments, negation.

use crate::Error;
use crate::path::clean_str;

/// Longest line that is accepted, in bytes.
const MAX_LINE: usize = 64 << 10;

/// The patterns of an ignore file, cleaned and without a leading slash, in order; exclusions keep their `!` in front.
///
/// A byte-order mark is dropped, `#` in the first column makes a comment, blank lines do not count.
///
/// # Errors
/// [`Error::LineTooLong`]. Patterns are not compiled here: [`crate::PatternMatcher`] tells bad ones.
pub fn parse_ignore_file(text: &[u8]) -> Result<Vec<String>, Error> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let mut out = Vec::new();
    for (index, line) in text.split(|b| *b == b'\n').enumerate() {
        if line.len() >= MAX_LINE {
            return Err(Error::LineTooLong { line: index + 1 });
        }
        if line.first() == Some(&b'#') {
            continue;
        }
        let line = String::from_utf8_lossy(line);
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let (mark, body) = match line.strip_prefix('!') {
            Some(rest) => ("!", rest.trim()),
            None => ("", line),
        };
        if body.is_empty() {
            out.push(mark.to_owned());
            continue;
        }
        let cleaned = clean_str(body);
        let plain = match cleaned.strip_prefix('/') {
            Some(rest) if !rest.is_empty() => rest,
            _ => &cleaned,
        };
        out.push(format!("{mark}{plain}"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let text = b"\xef\xbb\xbf# comment\nfoo/\n  ./bar \n #x\n\n/abs/x\n! keep/../kept\n!\n/\n.\n../up\r\n";
        let got = parse_ignore_file(text).unwrap();
        assert_eq!(got, ["foo", "bar", "#x", "abs/x", "!kept", "!", "/", ".", "../up"]);
    }

    #[test]
    fn too_long() {
        let mut text = b"a\n".to_vec();
        text.extend(vec![b'x'; MAX_LINE]);
        assert_eq!(parse_ignore_file(&text), Err(Error::LineTooLong { line: 2 }));
    }
}
