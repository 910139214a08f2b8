//! Modes in the syntax of chmod(1), with an empty umask.

use crate::error::{Result, StoreError};

/// How a copy sets the mode of what it creates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ModeChange {
    /// The source's mode.
    #[default]
    Keep,
    /// This one (07777).
    Set(u32),
    /// The source's mode, changed clause by clause.
    Clauses(Vec<Clause>),
}

/// One `who`, operator and permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clause {
    /// Whose bits may change, as a mask over 07777.
    who: u32,
    op: u8,
    /// Permissions as if for everyone, masked by `who` when applied.
    bits: u32,
    /// `X`: execution for directories and for what somebody may execute already.
    special_x: bool,
    /// Shift of the class to copy permissions from.
    copy_from: Option<u32>,
}

impl ModeChange {
    /// Parses `u=rwX,go=rX`, `+x`, `755` and the like; empty text keeps the mode.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] with the text.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || StoreError::Invalid(format!("invalid mode {text:?}"));
        if text.is_empty() {
            return Ok(ModeChange::Keep);
        }
        if text.bytes().all(|b| (b'0'..=b'7').contains(&b)) {
            let mode = u32::from_str_radix(text, 8)
                .ok()
                .filter(|m| *m <= 0o7777)
                .ok_or_else(bad)?;
            return Ok(ModeChange::Set(mode));
        }
        let mut clauses = Vec::new();
        for part in text.split(',') {
            let mut rest = part.as_bytes();
            let mut who = 0;
            while let Some((c, tail)) = rest.split_first() {
                who |= match c {
                    b'u' => 0o4700,
                    b'g' => 0o2070,
                    b'o' => 0o1007,
                    b'a' => 0o7777,
                    _ => break,
                };
                rest = tail;
            }
            if who == 0 {
                who = 0o7777;
            }
            if rest.is_empty() {
                return Err(bad());
            }
            while let Some((op, tail)) = rest.split_first() {
                if !b"+-=".contains(op) {
                    return Err(bad());
                }
                rest = tail;
                let mut clause = Clause {
                    who,
                    op: *op,
                    bits: 0,
                    special_x: false,
                    copy_from: None,
                };
                while let Some((c, tail)) = rest.split_first() {
                    match c {
                        b'r' => clause.bits |= 0o444,
                        b'w' => clause.bits |= 0o222,
                        b'x' => clause.bits |= 0o111,
                        b'X' => clause.special_x = true,
                        b's' => clause.bits |= 0o6000,
                        b't' => clause.bits |= 0o1000,
                        b'u' => clause.copy_from = Some(6),
                        b'g' => clause.copy_from = Some(3),
                        b'o' => clause.copy_from = Some(0),
                        _ => break,
                    }
                    rest = tail;
                }
                clauses.push(clause);
            }
        }
        Ok(ModeChange::Clauses(clauses))
    }

    /// The mode that something with mode `mode` gets.
    pub fn apply(&self, mode: u32, is_dir: bool) -> u32 {
        match self {
            ModeChange::Keep => mode & 0o7777,
            ModeChange::Set(set) => set & 0o7777,
            ModeChange::Clauses(clauses) => clauses.iter().fold(mode & 0o7777, |mode, c| {
                let mut bits = c.bits;
                if c.special_x && (is_dir || mode & 0o111 != 0) {
                    bits |= 0o111;
                }
                if let Some(shift) = c.copy_from {
                    let class = (mode >> shift) & 7;
                    bits |= class << 6 | class << 3 | class;
                }
                // The sticky bit belongs to nobody in particular: it may be set for any `who` that names all or others.
                let bits = bits & c.who;
                match c.op {
                    b'+' => mode | bits,
                    b'-' => mode & !bits,
                    // Directories keep set-id bits that are not named, as chmod(1) of GNU has it.
                    _ => {
                        let keep = if is_dir { 0o6000 & !c.bits } else { 0 };
                        (mode & !(c.who & !keep)) | bits
                    }
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        for (text, mode, dir, want) in [
            ("", 0o644, false, 0o644),
            ("755", 0o600, false, 0o755),
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("u=rwX,go=rX", 0o700, false, 0o755),
            ("u=rwX,go=rX", 0o600, true, 0o755),
            ("+x", 0o644, false, 0o755),
            ("a-w", 0o777, false, 0o555),
            ("g=u", 0o640, false, 0o660),
            ("o=", 0o777, false, 0o770),
            ("u+s,g+s", 0o755, false, 0o6755),
            ("+t", 0o777, true, 0o1777),
            ("go-rwx,u+x", 0o644, false, 0o700),
            ("u=rw", 0o4755, false, 0o655),
            ("u=rw", 0o4755, true, 0o4655),
            ("u+r-w", 0o200, false, 0o400),
        ] {
            assert_eq!(
                ModeChange::parse(text).unwrap().apply(mode, dir),
                want,
                "{text} on {mode:o}"
            );
        }
        for bad in ["u", "z=r", "u~r", "888", "77777", "u=rq", ","] {
            assert!(ModeChange::parse(bad).is_err(), "{bad}");
        }
    }
}
