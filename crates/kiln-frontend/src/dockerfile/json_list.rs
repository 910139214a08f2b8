//! The JSON form of arguments: one complete array, of which every element must be a string.

/// What a text that starts with `[` turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum JsonList {
    /// An array of strings.
    Strings(Vec<String>),
    /// An array with something else in it.
    Mixed,
    /// No JSON array; the text is meant literally.
    NotJson,
}

/// Reads `text` as a JSON array. Nesting does not recurse.
pub(crate) fn parse(text: &str) -> JsonList {
    let text = text.trim_start();
    if !text.starts_with('[') {
        return JsonList::NotJson;
    }
    let mut reader = Reader {
        bytes: text.as_bytes(),
        at: 0,
    };
    reader.list().unwrap_or(JsonList::NotJson)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// What may come next inside a container.
#[derive(Clone, Copy, PartialEq)]
enum Expect {
    Value,
    ValueOrEnd,
    KeyOrEnd,
    Key,
    CommaOrEnd,
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn skip_blanks(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn list(&mut self) -> Option<JsonList> {
        let mut strings = Vec::new();
        let mut mixed = false;
        let mut open: Vec<u8> = Vec::new();
        let mut expect = Expect::Value;
        loop {
            self.skip_blanks();
            let byte = self.peek()?;
            let in_object = open.last() == Some(&b'{');
            match (expect, byte) {
                (Expect::ValueOrEnd, b']') | (Expect::CommaOrEnd, b']') if !in_object => {
                    self.at += 1;
                    open.pop();
                    expect = Expect::CommaOrEnd;
                }
                (Expect::KeyOrEnd, b'}') | (Expect::CommaOrEnd, b'}') if in_object => {
                    self.at += 1;
                    open.pop();
                    expect = Expect::CommaOrEnd;
                }
                (Expect::CommaOrEnd, b',') => {
                    self.at += 1;
                    expect = if in_object { Expect::Key } else { Expect::Value };
                }
                (Expect::Key | Expect::KeyOrEnd, b'"') => {
                    self.string()?;
                    self.skip_blanks();
                    if self.peek()? != b':' {
                        return None;
                    }
                    self.at += 1;
                    expect = Expect::Value;
                }
                (Expect::Value | Expect::ValueOrEnd, byte) => {
                    mixed |= open.len() == 1 && byte != b'"';
                    expect = Expect::CommaOrEnd;
                    match byte {
                        b'[' | b'{' => {
                            self.at += 1;
                            open.push(byte);
                            expect = if byte == b'[' {
                                Expect::ValueOrEnd
                            } else {
                                Expect::KeyOrEnd
                            };
                        }
                        b'"' => {
                            let text = self.string()?;
                            if open.len() == 1 {
                                strings.push(text);
                            }
                        }
                        b't' => self.literal(b"true")?,
                        b'f' => self.literal(b"false")?,
                        b'n' => self.literal(b"null")?,
                        _ => self.number()?,
                    }
                }
                _ => return None,
            }
            if open.is_empty() {
                self.skip_blanks();
                return self.peek().is_none().then_some(if mixed {
                    JsonList::Mixed
                } else {
                    JsonList::Strings(strings)
                });
            }
        }
    }

    fn literal(&mut self, word: &[u8]) -> Option<()> {
        self.bytes.get(self.at..)?.starts_with(word).then_some(())?;
        self.at += word.len();
        Some(())
    }

    fn digits(&mut self) -> Option<()> {
        let start = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }

    fn number(&mut self) -> Option<()> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Some(())
    }

    fn hex4(&mut self) -> Option<u32> {
        let digits = std::str::from_utf8(self.bytes.get(self.at..self.at + 4)?).ok()?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        self.at += 4;
        u32::from_str_radix(digits, 16).ok()
    }

    fn string(&mut self) -> Option<String> {
        self.at += 1;
        let mut out = Vec::new();
        loop {
            let byte = self.peek()?;
            self.at += 1;
            match byte {
                b'"' => return String::from_utf8(out).ok(),
                0..0x20 => return None,
                b'\\' => {
                    let escaped = self.peek()?;
                    self.at += 1;
                    let c = match escaped {
                        b'"' | b'\\' | b'/' => escaped as char,
                        b'b' => '\u{8}',
                        b'f' => '\u{c}',
                        b'n' => '\n',
                        b'r' => '\r',
                        b't' => '\t',
                        b'u' => self.unicode_escape()?,
                        _ => return None,
                    };
                    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
                byte => out.push(byte),
            }
        }
    }

    /// The character of `\uXXXX`; two halves of a pair make one, a lone half is U+FFFD.
    fn unicode_escape(&mut self) -> Option<char> {
        let high = self.hex4()?;
        if (0xd800..0xdc00).contains(&high) && self.bytes.get(self.at..self.at + 2) == Some(b"\\u") {
            let before = self.at;
            self.at += 2;
            let low = self.hex4()?;
            if (0xdc00..0xe000).contains(&low) {
                return char::from_u32(0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00));
            }
            self.at = before;
        }
        Some(char::from_u32(high).unwrap_or('\u{fffd}'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_of_strings_and_nothing_else() {
        let strings = |v: &[&str]| JsonList::Strings(v.iter().map(|s| s.to_string()).collect());
        assert_eq!(parse(" [ \"a\" , \"b c\" ] "), strings(&["a", "b c"]));
        assert_eq!(parse("[]"), strings(&[]));
        assert_eq!(
            parse(r#"["\u0041\ud83d\ude00\ud800x\n\/"]"#),
            strings(&["A😀\u{fffd}x\n/"])
        );
        for mixed in [
            "[1]",
            "[\"a\", null]",
            "[[\"a\"]]",
            "[{\"a\":[1,2.5e3]}, true]",
            "[{}]",
            "[[]]",
        ] {
            assert_eq!(parse(mixed), JsonList::Mixed, "{mixed}");
        }
        for text in [
            "",
            "a",
            "[",
            "[\"a\"",
            "[\"a\",]",
            "['a']",
            "[\"a\"] x",
            "[a]",
            "[\"a\" \"b\"]",
            "[01]",
            "[\"\t\"]",
            "[}",
            "[{]}",
        ] {
            assert_eq!(parse(text), JsonList::NotJson, "{text}");
        }
        assert_eq!(parse(&"[".repeat(1_000_000)), JsonList::NotJson);
    }
}
