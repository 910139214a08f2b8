//! `--chmod`: octal bits, or the symbolic form of `chmod(1)`.

/// A mode to set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Bits.
    Bits(u32),
    /// Symbolic, checked.
    Symbolic(String),
}

/// Reads a mode.
pub(super) fn parse(text: &str) -> Result<Mode, String> {
    let octal = || format!("invalid chmod parameter: '{text}'. it should be octal string and between 0 and 07777");
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return match u32::from_str_radix(text, 8) {
            Ok(bits) if bits <= 0o7777 => Ok(Mode::Bits(bits)),
            _ => Err(octal()),
        };
    }
    if is_symbolic(text) {
        Ok(Mode::Symbolic(text.to_owned()))
    } else {
        Err("invalid syntax".to_owned())
    }
}

/// Whether a text is a list of clauses `[ugoa…][+-=][rwxXstugo…]…`.
fn is_symbolic(text: &str) -> bool {
    text.split(',').all(|clause| {
        let mut rest = clause.trim_start_matches(['u', 'g', 'o', 'a']);
        if rest.is_empty() {
            return false;
        }
        while !rest.is_empty() {
            let Some(after) = rest.strip_prefix(['+', '-', '=']) else {
                return false;
            };
            rest = after.trim_start_matches(['r', 'w', 'x', 'X', 's', 't', 'u', 'g', 'o']);
        }
        true
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes() {
        assert_eq!(parse("755"), Ok(Mode::Bits(0o755)));
        assert_eq!(parse("07777"), Ok(Mode::Bits(0o7777)));
        for text in ["u+x", "go=u", "a=rX,u+w", "+x", "u=rwx-s+t", "u="] {
            assert_eq!(parse(text), Ok(Mode::Symbolic(text.into())), "{text}");
        }
        for text in ["9", "10000", "7a", "755 "] {
            let message =
                format!("invalid chmod parameter: '{text}'. it should be octal string and between 0 and 07777");
            assert_eq!(parse(text), Err(message));
        }
        for text in ["x", "u", "u+x,", "+7", "-1"] {
            assert_eq!(parse(text), Err("invalid syntax".into()), "{text}");
        }
    }
}
