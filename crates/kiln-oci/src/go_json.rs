//! JSON as Go's `encoding/json` writes it, so that digests over JSON equal those of other builders.
//!
//! The rules (cache-keys.md §1, semantics.md §7): `<`, `>`, `&`, U+2028 and U+2029 are escaped inside strings, all other
//! non-ASCII text stays literal; compact form has no spaces, indented form uses two spaces and leaves `{}` and `[]` alone.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

/// `value` in compact form with Go's escapes. Members come in the order the type declares them.
///
/// # Errors
/// Only what the type's own `Serialize` reports (for example a map whose keys are no strings).
pub fn to_vec<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut out = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut out, GoFormatter(CompactFormatter)))?;
    Ok(out)
}

/// As [`to_vec`], as text.
///
/// # Errors
/// As [`to_vec`].
pub fn to_string<T: Serialize + ?Sized>(value: &T) -> Result<String, serde_json::Error> {
    Ok(String::from_utf8_lossy(&to_vec(value)?).into_owned())
}

/// `value` indented by two spaces with Go's escapes, without a final newline: how manifests and indexes are written.
///
/// # Errors
/// As [`to_vec`].
pub fn to_vec_indent<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut out = Vec::new();
    let formatter = GoFormatter(PrettyFormatter::with_indent(b"  "));
    value.serialize(&mut Serializer::with_formatter(&mut out, formatter))?;
    Ok(out)
}

/// Appends `json`, which must be valid JSON, without its insignificant white space and with Go's escapes; numbers and
/// existing escapes stay as they are written.
pub fn compact(json: &str, out: &mut Vec<u8>) {
    let bytes = json.as_bytes();
    let mut in_string = false;
    let mut escaped = false;
    let mut i = 0;
    while let Some(&b) = bytes.get(i) {
        i += 1;
        if !in_string {
            match b {
                b' ' | b'\t' | b'\r' | b'\n' => {}
                _ => {
                    in_string = b == b'"';
                    out.push(b);
                }
            }
            continue;
        }
        match b {
            b'<' | b'>' | b'&' => out.extend_from_slice(escape_ascii(b)),
            0xe2 if matches!(bytes.get(i..i + 2), Some([0x80, 0xa8 | 0xa9])) => {
                out.extend_from_slice(if bytes.get(i + 1) == Some(&0xa8) {
                    b"\\u2028"
                } else {
                    b"\\u2029"
                });
                i += 2;
            }
            _ => out.push(b),
        }
        if escaped {
            escaped = false;
        } else if b == b'\\' {
            escaped = true;
        } else if b == b'"' {
            in_string = false;
        }
    }
}

/// `json`, which must be valid JSON, indented by two spaces and with Go's escapes; the raw form of [`to_vec_indent`].
pub fn indent(json: &str) -> Vec<u8> {
    let mut plain = Vec::new();
    compact(json, &mut plain);
    let mut out = Vec::with_capacity(plain.len() * 2);
    let mut depth = 0;
    let mut in_string = false;
    let mut escaped = false;
    let line = |out: &mut Vec<u8>, depth: usize| {
        out.push(b'\n');
        out.extend(std::iter::repeat_n(b' ', 2 * depth));
    };
    for (i, &b) in plain.iter().enumerate() {
        if in_string {
            out.push(b);
            if escaped {
                escaped = false;
            } else if b == b'\\' {
                escaped = true;
            } else if b == b'"' {
                in_string = false;
            }
            continue;
        }
        match b {
            b'{' | b'[' => {
                out.push(b);
                depth += 1;
                if !matches!(plain.get(i + 1), Some(b'}' | b']')) {
                    line(&mut out, depth);
                }
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                if !matches!(i.checked_sub(1).and_then(|p| plain.get(p)), Some(b'{' | b'[')) {
                    line(&mut out, depth);
                }
                out.push(b);
            }
            b',' => {
                out.push(b);
                line(&mut out, depth);
            }
            b':' => out.extend_from_slice(b": "),
            _ => {
                in_string = b == b'"';
                out.push(b);
            }
        }
    }
    out
}

fn escape_ascii(b: u8) -> &'static [u8] {
    match b {
        b'<' => b"\\u003c",
        b'>' => b"\\u003e",
        _ => b"\\u0026",
    }
}

/// Adds Go's string escapes to another layout.
struct GoFormatter<F>(F);

impl<F: Formatter> Formatter for GoFormatter<F> {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(['<', '>', '&', '\u{2028}', '\u{2029}']) {
            let (plain, tail) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut chars = tail.chars();
            if let Some(c) = chars.next() {
                write!(writer, "\\u{:04x}", u32::from(c))?;
            }
            rest = chars.as_str();
        }
        writer.write_all(rest.as_bytes())
    }

    fn begin_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_array(w)
    }
    fn end_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_array(w)
    }
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(w, first)
    }
    fn end_array_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_array_value(w)
    }
    fn begin_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object(w)
    }
    fn end_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object(w)
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(w, first)
    }
    fn end_object_key<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object_key(w)
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object_value(w)
    }
    fn end_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object_value(w)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_escaped_as_go_does() {
        let text = "a<b>&\"\\\u{8}\u{c}\n\r\t\u{1}\u{7f}/é\u{2028}\u{2029}";
        let want = r#""a\u003cb\u003e\u0026\"\\\b\f\n\r\t\u0001"#.to_owned() + "\u{7f}/é" + r#"\u2028\u2029""#;
        assert_eq!(to_string(text).unwrap(), want);
    }

    #[test]
    fn the_golden_exec_key_has_its_digest() {
        let exec = serde_json::json!({"Type":"buildkit.exec.v0","Exec":{"meta":{"args":["/bin/sh","-c","echo \"a\" > /x && cat < /x"],
            "env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","V=é"],"cwd":"/",
            "extraHosts":[{"Host":"db"}],"removeMountStubsRecursive":true}},"OS":"linux","Arch":"amd64"});
        assert_eq!(
            crate::Digest::of(to_vec(&exec).unwrap()).to_string(),
            "sha256:9d875753b49a61d8fd8804b8502cf771e62ef52271ec49cffe0d705427624d09"
        );
    }

    #[test]
    fn compacting_keeps_numbers_and_escapes() {
        let mut out = Vec::new();
        compact(
            "{ \"a\" : 1.0 , \"b\\\"<\": [ \"\\u00e9 & \u{2028}\", 1e3 ] }\n",
            &mut out,
        );
        assert_eq!(
            String::from_utf8(out).unwrap(),
            r#"{"a":1.0,"b\"\u003c":["\u00e9 \u0026 \u2028",1e3]}"#
        );
    }

    #[test]
    fn indented_form_is_gos() {
        let v = serde_json::json!({"a": [], "b": {}, "c": ["<"]});
        assert_eq!(indent(&v.to_string()), to_vec_indent(&v).unwrap());
        let nested = serde_json::json!([{"k": ["a,b:{\"", {"x": [[]]}], "n": 1.5}, null]);
        assert_eq!(indent(&nested.to_string()), to_vec_indent(&nested).unwrap());
        assert_eq!(
            String::from_utf8(to_vec_indent(&v).unwrap()).unwrap(),
            "{\n  \"a\": [],\n  \"b\": {},\n  \"c\": [\n    \"\\u003c\"\n  ]\n}"
        );
    }
}
