//! Splitting arguments into words.

/// Splits at runs of ASCII blanks, without any quoting. `text` has no blanks at its ends; an empty one has no words.
pub(crate) fn plain(text: &str) -> Vec<String> {
    text.split([' ', '\t', '\u{b}', '\u{c}', '\r'])
        .filter(|w| !w.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Splits off the first word at a run of ASCII blanks: the word and what follows the run, if there is one.
pub(crate) fn first(text: &str) -> (&str, Option<&str>) {
    match text.find(is_ascii_blank) {
        Some(i) => {
            let (word, rest) = text.split_at(i);
            (word, Some(rest.trim_start_matches(is_ascii_blank)))
        }
        None => (text, None),
    }
}

fn is_ascii_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\u{b}' | '\u{c}' | '\r')
}

/// Splits at blanks outside quotes. Quotes and escapes stay in the words: expansion removes them later. In double quotes the
/// escape character protects the next one, in single quotes it does not; at the end of the text it is dropped.
pub(crate) fn quoted(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return words;
        }
        let mut word = String::new();
        let mut quote = None;
        let mut quoted = false;
        while let Some(c) = chars.next() {
            match quote {
                None if c.is_whitespace() => break,
                None if c == '\'' || c == '"' => {
                    quote = Some(c);
                    quoted = true;
                }
                Some(q) if c == q => quote = None,
                _ => {}
            }
            if c == escape && quote != Some('\'') {
                match chars.next() {
                    Some(next) => word.extend([c, next]),
                    None => break,
                }
            } else {
                word.push(c);
            }
        }
        if quoted || !word.is_empty() {
            words.push(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_keep_their_quotes() {
        for (text, words) in [
            ("a=b c", vec!["a=b", "c"]),
            ("a=\"b c\" d='e f'", vec!["a=\"b c\"", "d='e f'"]),
            ("a=b\\ c d", vec!["a=b\\ c", "d"]),
            ("a=\"\\\" x\" b", vec!["a=\"\\\" x\"", "b"]),
            ("a='\\' b", vec!["a='\\'", "b"]),
            ("\"\" x\\", vec!["\"\"", "x"]),
            ("  ", vec![]),
        ] {
            assert_eq!(quoted(text, '\\'), words, "{text}");
        }
        assert_eq!(quoted("a=b` c \\", '`'), ["a=b` c", "\\"]);
    }

    #[test]
    fn first_word() {
        assert_eq!(first("ENV a b"), ("ENV", Some("a b")));
        assert_eq!(first("ENV"), ("ENV", None));
        assert_eq!(first("a \t b  c"), ("a", Some("b  c")));
    }
}
