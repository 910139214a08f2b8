//! The fields of archive headers: numbers in octal and base 256, extended records, times.

use std::io;

use kiln_fs::Timestamp;

use super::read::invalid;

pub(super) fn field(block: &[u8], at: usize, len: usize) -> &[u8] {
    block.get(at..at + len).unwrap_or_default()
}

pub(super) fn text(block: &[u8], at: usize, len: usize) -> &[u8] {
    field(block, at, len).split(|b| *b == 0).next().unwrap_or_default()
}

pub(super) fn size_of(block: &[u8]) -> io::Result<u64> {
    let size = number(field(block, 124, 12)).and_then(|n| u64::try_from(n).ok());
    size.ok_or_else(|| invalid("archive: bad size in a header"))
}

/// A number field: octal digits among blanks and NULs, or base 256 in two's complement. Empty is zero.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => {
            let negative = first & 0x40 != 0;
            let mut value: i128 = if negative { -1 } else { 0 };
            for (i, b) in field.iter().enumerate() {
                let b = if i == 0 {
                    if negative { b | 0x80 } else { b & 0x7f }
                } else {
                    *b
                };
                value = (value << 8) | i128::from(b);
                if value > i128::from(i64::MAX) || value < i128::from(i64::MIN) {
                    return None;
                }
            }
            value.try_into().ok()
        }
        _ => {
            let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
            let digits = field.get(..end).unwrap_or_default().trim_ascii();
            if digits.is_empty() {
                return Some(0);
            }
            i64::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
        }
    }
}

pub(super) fn parse_records(mut data: &[u8], out: &mut Vec<(Vec<u8>, Vec<u8>)>) -> io::Result<()> {
    let bad = || invalid("archive: malformed extended header");
    while !data.is_empty() {
        let space = data.iter().position(|b| *b == b' ').ok_or_else(bad)?;
        let digits = data.get(..space).unwrap_or_default();
        let length: usize = std::str::from_utf8(digits)
            .ok()
            .and_then(|t| t.parse().ok())
            .ok_or_else(bad)?;
        let (record, rest) = data.split_at_checked(length).ok_or_else(bad)?;
        let body = record
            .get(space + 1..)
            .and_then(|b| b.strip_suffix(b"\n"))
            .ok_or_else(bad)?;
        let equals = body
            .iter()
            .position(|b| *b == b'=')
            .filter(|i| *i > 0)
            .ok_or_else(bad)?;
        let (key, value) = body.split_at(equals);
        let value = value.get(1..).unwrap_or_default();
        let is_text = matches!(key, b"path" | b"linkpath" | b"uname" | b"gname");
        if key.contains(&0) || (is_text && value.contains(&0)) {
            return Err(bad());
        }
        out.push((key.to_vec(), value.to_vec()));
        data = rest;
    }
    Ok(())
}

/// Seconds with an optional fraction, as PAX writes times.
pub(super) fn pax_time(value: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let secs: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanos: i64 = digits.parse().ok()?;
    let total = i128::from(secs) * 1_000_000_000 + i128::from(if whole.starts_with('-') { -nanos } else { nanos });
    Some(Timestamp {
        secs: i64::try_from(total.div_euclid(1_000_000_000)).ok()?,
        nanos: total.rem_euclid(1_000_000_000) as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_times() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"    644 "), Some(0o644));
        assert_eq!(number(b"\0\0"), Some(0));
        assert_eq!(number(b"9"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]), Some(256));
        assert_eq!(number(&[0xff; 8]), Some(-1));
        assert_eq!(number(&[0xbf; 12]), None);
        assert_eq!(
            pax_time(b"1.5"),
            Some(Timestamp {
                secs: 1,
                nanos: 500_000_000
            })
        );
        assert_eq!(
            pax_time(b"-1.5"),
            Some(Timestamp {
                secs: -2,
                nanos: 500_000_000
            })
        );
        assert_eq!(pax_time(b"1.0000000019"), Some(Timestamp { secs: 1, nanos: 1 }));
        assert_eq!(pax_time(b"1.x"), None);
    }
}
