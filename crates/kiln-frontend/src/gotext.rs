//! Texts as Go programs read and write them: booleans, quoted strings, durations, number errors, path arithmetic, CSV.
//!
//! Images, histories, cache keys and messages are compared with those of the original frontend, so these conventions are part of
//! the format, not a matter of taste.

use std::borrow::Cow;
use std::sync::LazyLock;

use kiln_oci::Platform;
use regex::Regex;

/// The boolean a flag or option value stands for: `1 t T TRUE true True` and the same for false.
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// `strconv.ParseInt` and friends: the message of a failed conversion with function `func`.
pub(crate) fn number_error(func: &str, text: &str, overflow: bool) -> String {
    let why = if overflow {
        "value out of range"
    } else {
        "invalid syntax"
    };
    format!("strconv.{func}: parsing {}: {why}", quote(text))
}

/// A decimal integer between `min` and `max` with an optional sign; the error text of `strconv.ParseInt` otherwise.
pub(crate) fn parse_int(text: &str, min: i64, max: i64) -> Result<i64, String> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(number_error("ParseInt", text, false));
    }
    match text.parse::<i64>() {
        Ok(n) if n >= min && n <= max => Ok(n),
        _ => Err(number_error("ParseInt", text, true)),
    }
}

/// A decimal unsigned integer; the error text of `strconv.ParseUint` otherwise.
pub(crate) fn parse_uint(text: &str, radix: u32, max: u64) -> Result<u64, String> {
    if text.is_empty() || !text.chars().all(|c| c.is_digit(radix)) {
        return Err(number_error("ParseUint", text, false));
    }
    match u64::from_str_radix(text, radix) {
        Ok(n) if n <= max => Ok(n),
        _ => Err(number_error("ParseUint", text, true)),
    }
}

static UNPRINTABLE: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^[\p{C}\p{Z}]$").ok());

/// `text` in double quotes with Go's escapes (`%q`).
pub(crate) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    let mut buf = [0u8; 4];
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            c if c < ' ' || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_ascii() => out.push(c),
            c => {
                let printable = UNPRINTABLE
                    .as_ref()
                    .is_none_or(|re| !re.is_match(c.encode_utf8(&mut buf)));
                match (printable, c as u32) {
                    (true, _) => out.push(c),
                    (false, n) if n < 0x10000 => out.push_str(&format!("\\u{n:04x}")),
                    (false, n) => out.push_str(&format!("\\U{n:08x}")),
                }
            }
        }
    }
    out.push('"');
    out
}

/// A list of strings as `%q` prints it: `["a" "b"]`.
pub(crate) fn quote_list(items: &[String]) -> String {
    let quoted: Vec<String> = items.iter().map(|s| quote(s)).collect();
    format!("[{}]", quoted.join(" "))
}

/// A list of strings as `%v` prints it: `[a b]`.
pub(crate) fn plain_list(items: &[String]) -> String {
    format!("[{}]", items.join(" "))
}

/// `bytes` as text, each invalid byte replaced by U+FFFD.
pub(crate) fn lossy(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => {
            let mut out = String::with_capacity(bytes.len());
            let mut rest = bytes;
            loop {
                match std::str::from_utf8(rest) {
                    Ok(text) => {
                        out.push_str(text);
                        break;
                    }
                    Err(e) => {
                        let (good, bad) = rest.split_at(e.valid_up_to());
                        out.push_str(&String::from_utf8_lossy(good));
                        out.push('\u{fffd}');
                        rest = bad.get(1..).unwrap_or_default();
                    }
                }
            }
            Cow::Owned(out)
        }
    }
}

/// A platform, or what Go programs say about a text that is none.
pub(crate) fn parse_platform(text: &str) -> Result<Platform, String> {
    text.parse().map_err(|_| {
        let os = text.split('/').next().unwrap_or_default();
        let os_name = os.split('(').next().unwrap_or_default();
        let bad = |part: &str, extra: &str| {
            part.is_empty() || !part.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c))
        };
        let bad_part = text.split('/').skip(1).find(|part| bad(part, "_.-"));
        let why = if text.contains('*') {
            format!("{}: wildcards not yet supported", quote(text))
        } else if text.split('/').count() > 3 {
            format!("{}: cannot parse platform specifier", quote(text))
        } else if bad(os_name, "_-") {
            let rule = "OSAndVersion specifier component must match";
            let pattern = quote(r"^([A-Za-z0-9_-]+)(?:\(([A-Za-z0-9_.%-]*)((?:\+[A-Za-z0-9_.%-]+)*)\))?$");
            format!(
                "{} is an invalid OS component of {}: {rule} {pattern}",
                quote(os),
                quote(text)
            )
        } else if let Some(part) = bad_part {
            let rule = "platform specifier component must match";
            let pattern = quote("^[A-Za-z0-9_.-]+$");
            format!(
                "{} is an invalid component of {}: {rule} {pattern}",
                quote(part),
                quote(text)
            )
        } else {
            format!("{}: unknown operating system or architecture", quote(text))
        };
        format!("{why}: invalid argument")
    })
}

/// A duration in nanoseconds from Go's syntax (`1h2m3.5s`), with Go's message otherwise.
pub(crate) fn parse_duration(text: &str) -> Result<i64, String> {
    let invalid = || format!("time: invalid duration {}", quote(text));
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let int_len = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (int, after) = rest.split_at(int_len);
        let (frac, after) = match after.strip_prefix('.') {
            Some(after) => after.split_at(after.bytes().take_while(u8::is_ascii_digit).count()),
            None => ("", after),
        };
        if int.is_empty() && frac.is_empty() {
            return Err(invalid());
        }
        let unit_len = after
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(after.len());
        let (unit, next) = after.split_at(unit_len);
        if unit.is_empty() {
            return Err(format!("time: missing unit in duration {}", quote(text)));
        }
        let scale: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => {
                return Err(format!(
                    "time: unknown unit {} in duration {}",
                    quote(unit),
                    quote(text)
                ));
            }
        };
        let whole = if int.is_empty() {
            0
        } else {
            int.parse::<u64>().map_err(|_| invalid())?
        };
        let fraction = if frac.is_empty() { 0 } else { fraction_of(frac, scale) };
        total += u128::from(whole) * scale + fraction;
        if total > i64::MAX as u128 + u128::from(negative) {
            return Err(invalid());
        }
        rest = next;
    }
    Ok(if negative {
        (total as i128).wrapping_neg() as i64
    } else {
        total as i64
    })
}

/// `0.frac` of `scale`, cut towards zero.
fn fraction_of(frac: &str, scale: u128) -> u128 {
    let mut value: u128 = 0;
    let mut divisor: u128 = 1;
    for digit in frac.bytes().take(18) {
        value = value * 10 + u128::from(digit - b'0');
        divisor *= 10;
    }
    value * scale / divisor
}

/// Nanoseconds in Go's notation, for example `1m30s` or `1.5ms`.
pub(crate) fn format_duration(nanos: i64) -> String {
    if nanos == 0 {
        return "0s".to_owned();
    }
    let sign = if nanos < 0 { "-" } else { "" };
    let n = nanos.unsigned_abs();
    let with_fraction = |value: u64, unit: u64, digits: usize| {
        let (whole, fraction) = (value / unit, value % unit);
        if fraction == 0 {
            whole.to_string()
        } else {
            let text = format!("{fraction:0digits$}");
            format!("{whole}.{}", text.trim_end_matches('0'))
        }
    };
    if n < 1_000 {
        return format!("{sign}{n}ns");
    }
    if n < 1_000_000 {
        return format!("{sign}{}µs", with_fraction(n, 1_000, 3));
    }
    if n < 1_000_000_000 {
        return format!("{sign}{}ms", with_fraction(n, 1_000_000, 6));
    }
    let seconds = n / 1_000_000_000;
    let tail = format!("{}s", with_fraction(n % 60_000_000_000, 1_000_000_000, 9));
    match (seconds / 3600, seconds / 60 % 60) {
        (0, 0) => format!("{sign}{tail}"),
        (0, m) => format!("{sign}{m}m{tail}"),
        (h, m) => format!("{sign}{h}h{m}m{tail}"),
    }
}

/// The shortest path with the same meaning, by text alone (`path.Clean`).
pub(crate) fn clean_path(path: &str) -> String {
    kiln_match::path::clean_str(path)
}

/// `a/b`, cleaned; empty parts vanish (`path.Join`).
pub(crate) fn join_path(a: &str, b: &str) -> String {
    match (a.is_empty(), b.is_empty()) {
        (true, true) => String::new(),
        (true, false) => clean_path(b),
        (false, true) => clean_path(a),
        (false, false) => clean_path(&format!("{a}/{b}")),
    }
}

/// The last element of a path (`path.Base`): `.` for an empty path, `/` for the root.
pub(crate) fn base_name(path: &str) -> &str {
    if path.is_empty() {
        return ".";
    }
    let trimmed = path.trim_end_matches('/');
    if trimmed.is_empty() {
        return "/";
    }
    trimmed.rsplit('/').next().unwrap_or(trimmed)
}

/// All but the last element of a path (`path.Dir`).
pub(crate) fn dir_name(path: &str) -> String {
    match path.rfind('/') {
        Some(i) => clean_path(path.get(..=i).unwrap_or_default()),
        None => ".".to_owned(),
    }
}

/// One line of comma separated values, with `"…"` around values that contain commas and `""` for a quote in them.
pub(crate) fn csv_fields(line: &str) -> Result<Vec<String>, String> {
    let mut fields = Vec::new();
    let mut rest = line;
    loop {
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut value = String::new();
            let mut tail = quoted;
            loop {
                let Some(i) = tail.find('"') else {
                    return Err(csv_error(line, line.len(), "extraneous or missing \" in quoted-field"));
                };
                value.push_str(tail.get(..i).unwrap_or_default());
                tail = tail.get(i + 1..).unwrap_or_default();
                match tail.strip_prefix('"') {
                    Some(more) => {
                        value.push('"');
                        tail = more;
                    }
                    None => break,
                }
            }
            fields.push(value);
            match tail.strip_prefix(',') {
                Some(next) => rest = next,
                None if tail.is_empty() => return Ok(fields),
                None => {
                    let column = line.len() - tail.len();
                    return Err(csv_error(line, column, "extraneous or missing \" in quoted-field"));
                }
            }
        } else {
            let (field, next) = match rest.split_once(',') {
                Some((field, next)) => (field, Some(next)),
                None => (rest, None),
            };
            if let Some(i) = field.find('"') {
                return Err(csv_error(
                    line,
                    line.len() - rest.len() + i + 1,
                    "bare \" in non-quoted-field",
                ));
            }
            fields.push(field.to_owned());
            match next {
                Some(next) => rest = next,
                None => return Ok(fields),
            }
        }
    }
}

fn csv_error(_line: &str, column: usize, what: &str) -> String {
    format!("parse error on line 1, column {column}: {what}")
}

/// Bytes from a size such as `64m` or `1.5GiB`, in powers of 1024.
pub(crate) fn parse_ram_size(text: &str) -> Option<i64> {
    let split = text.rfind(|c: char| c.is_ascii_digit() || c == '.' || c == ' ')? + 1;
    let (number, unit) = text.split_at(split);
    let number = number.strip_suffix(' ').unwrap_or(number);
    let value: f64 = number.parse().ok()?;
    if value < 0.0 || !value.is_finite() || number.starts_with('+') {
        return None;
    }
    let unit = unit.to_ascii_lowercase();
    let mut letters = unit.chars();
    let scale: f64 = match letters.next() {
        None => 1.0,
        Some('b') => {
            return if unit == "b" { Some(value as i64) } else { None };
        }
        Some('k') => 1024.0,
        Some('m') => 1024.0f64.powi(2),
        Some('g') => 1024.0f64.powi(3),
        Some('t') => 1024.0f64.powi(4),
        Some('p') => 1024.0f64.powi(5),
        Some(_) => return None,
    };
    if !matches!(letters.as_str(), "" | "b" | "ib") {
        return None;
    }
    Some((value * scale) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_both_ways() {
        for (text, nanos, back) in [
            ("5m", 300_000_000_000, "5m0s"),
            ("1h", 3_600_000_000_000, "1h0m0s"),
            ("1.5s", 1_500_000_000, "1.5s"),
            ("90s", 90_000_000_000, "1m30s"),
            ("1ms", 1_000_000, "1ms"),
            ("1500us", 1_500_000, "1.5ms"),
            ("0", 0, "0s"),
            ("-2s", -2_000_000_000, "-2s"),
            (".5s", 500_000_000, "500ms"),
        ] {
            assert_eq!(parse_duration(text), Ok(nanos), "{text}");
            assert_eq!(format_duration(nanos), back, "{text}");
        }
        for (text, message) in [
            ("", "time: invalid duration \"\""),
            ("5", "time: missing unit in duration \"5\""),
            ("5x", "time: unknown unit \"x\" in duration \"5x\""),
            ("abc", "time: invalid duration \"abc\""),
            ("99999999999h", "time: invalid duration \"99999999999h\""),
        ] {
            assert_eq!(parse_duration(text), Err(message.to_owned()));
        }
    }

    #[test]
    fn paths_are_cleaned_by_text() {
        for (path, clean) in [
            ("", "."),
            ("/", "/"),
            ("a//b/./c/..", "a/b"),
            ("../a/../..", "../.."),
            ("/../a", "/a"),
            ("a/", "a"),
        ] {
            assert_eq!(clean_path(path), clean, "{path}");
        }
        assert_eq!((base_name("a/b/"), base_name("/"), base_name("")), ("b", "/", "."));
        assert_eq!(
            (
                dir_name("a/b").as_str(),
                dir_name("a").as_str(),
                dir_name("/a").as_str()
            ),
            ("a", ".", "/")
        );
    }

    #[test]
    fn quotes_like_go() {
        assert_eq!(quote("a\"\\\n\u{1}\u{a0}é"), r#""a\"\\\n\x01\u00a0é""#);
    }

    #[test]
    fn sizes_in_powers_of_1024() {
        for (text, bytes) in [
            ("64m", Some(64 << 20)),
            ("1.5k", Some(1536)),
            ("10", Some(10)),
            ("2GiB", Some(2 << 30)),
        ] {
            assert_eq!(parse_ram_size(text), bytes, "{text}");
        }
        for bad in ["zz", "", "5x", "1kk", "-1"] {
            assert_eq!(parse_ram_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn csv_quotes() {
        assert_eq!(
            csv_fields("a=b,\"c=d,e\",\"f\"\"g\"").unwrap(),
            ["a=b", "c=d,e", "f\"g"]
        );
        assert_eq!(csv_fields("").unwrap(), [""]);
        assert!(csv_fields("a,b\"c").is_err());
        assert!(csv_fields("\"a").is_err());
        assert!(csv_fields("\"a\"b").is_err());
    }
}
