//! Writes the JSON that op digests are taken over: members in the order given, zero values left out.

use kiln_oci::go_json;

/// A JSON value under construction, as bytes.
pub(crate) type Json = Vec<u8>;

/// A JSON string with Go's escapes.
pub(crate) fn string(text: &str) -> Json {
    // A string always serialises.
    go_json::to_vec(text).unwrap_or_default()
}

/// A JSON list.
pub(crate) fn list(items: impl IntoIterator<Item = Json>) -> Json {
    let mut out = vec![b'['];
    for (n, item) in items.into_iter().enumerate() {
        if n > 0 {
            out.push(b',');
        }
        out.extend(item);
    }
    out.push(b']');
    out
}

/// A JSON object whose members are written in the order of the calls.
#[derive(Debug)]
pub(crate) struct Object(Vec<u8>);

impl Object {
    pub(crate) fn new() -> Self {
        Self(vec![b'{'])
    }

    /// A member whatever its value.
    pub(crate) fn raw(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        if self.0.len() > 1 {
            self.0.push(b',');
        }
        self.0.extend(string(name));
        self.0.push(b':');
        self.0.extend_from_slice(value.as_ref());
        self
    }

    /// A member that is written if there is a value.
    pub(crate) fn opt(self, name: &str, value: Option<Json>) -> Self {
        match value {
            Some(value) => self.raw(name, value),
            None => self,
        }
    }

    /// A text; left out if empty.
    pub(crate) fn text(self, name: &str, value: &str) -> Self {
        if value.is_empty() {
            self
        } else {
            self.raw(name, string(value))
        }
    }

    /// A text, written even if empty.
    pub(crate) fn text_always(self, name: &str, value: &str) -> Self {
        self.raw(name, string(value))
    }

    /// A number; left out if 0.
    pub(crate) fn int(self, name: &str, value: impl Into<i128>) -> Self {
        let value: i128 = value.into();
        if value == 0 {
            self
        } else {
            self.raw(name, value.to_string())
        }
    }

    /// A number, written even if 0.
    pub(crate) fn int_always(self, name: &str, value: impl Into<i128>) -> Self {
        let value: i128 = value.into();
        self.raw(name, value.to_string())
    }

    /// An index where nothing is -1, which is written, unlike 0.
    pub(crate) fn index(self, name: &str, value: Option<u32>) -> Self {
        self.int(name, value.map_or(-1, i64::from))
    }

    /// A flag; left out if false.
    pub(crate) fn flag(self, name: &str, value: bool) -> Self {
        if value { self.raw(name, "true") } else { self }
    }

    /// Texts; left out if there are none.
    pub(crate) fn texts<'a>(self, name: &str, values: impl IntoIterator<Item = &'a String>) -> Self {
        self.list(name, values.into_iter().map(|v| string(v)))
    }

    /// A list; left out if empty.
    pub(crate) fn list(self, name: &str, values: impl IntoIterator<Item = Json>) -> Self {
        let mut values = values.into_iter().peekable();
        if values.peek().is_none() {
            self
        } else {
            self.raw(name, list(values))
        }
    }

    pub(crate) fn end(mut self) -> Json {
        self.0.push(b'}');
        self.0
    }
}
