//! The one maker of gRPC statuses: code, text, and typed details in the form BuildKit's clients decode.
//!
//! A detail is an `Any` whose type URL ends in `+json` and whose value is the JSON of the message as Go's encoder
//! writes it: members in the order of the Go struct, zero values left out, bytes in base64.

use base64::Engine as _;
use bytes::Bytes;
use kiln_llb::{SourceInfo, SourceRange, VertexDigest};
use kiln_proto::{Any, rpc};
use prost::Message as _;
use serde_json::{Value, json};
use tonic::Code;

const TYPE_PREFIX: &str = "github.com/moby/buildkit/";

/// An error as a client gets it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// gRPC code.
    pub code: Code,
    /// The whole chain as one text.
    pub message: String,
    /// Typed details, outermost first. Those received from a client are kept as they are.
    pub details: Vec<Any>,
}

impl WireError {
    /// An error without details.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: Vec::new(),
        }
    }

    /// What a build that was given up ends with. Clients show an error that ends so as canceled.
    pub fn canceled() -> Self {
        Self::new(Code::Cancelled, "context canceled")
    }

    /// A request that makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// Adds a detail.
    #[must_use]
    pub fn with(mut self, detail: Any) -> Self {
        self.details.push(detail);
        self
    }

    /// Puts `context: ` before the text.
    #[must_use]
    pub fn context(mut self, context: &str) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// The message form, as it travels in `Return` and in records.
    pub fn to_proto(&self) -> rpc::Status {
        rpc::Status {
            code: self.code as i32,
            message: self.message.clone(),
            details: self.details.clone(),
        }
    }

    /// Takes an error over that a client sends, details untouched.
    pub fn from_proto(status: rpc::Status) -> Self {
        Self {
            code: Code::from_i32(status.code),
            message: status.message,
            details: status.details,
        }
    }

    /// Whether the error says that somebody gave up.
    pub fn is_canceled(&self) -> bool {
        self.code == Code::Cancelled
    }
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        if error.details.is_empty() {
            return Self::new(error.code, error.message);
        }
        let details = Bytes::from(error.to_proto().encode_to_vec());
        Self::with_details(error.code, error.message, details)
    }
}

fn detail(name: &str, value: &Value) -> Any {
    Any {
        type_url: format!("{TYPE_PREFIX}{name}+json"),
        value: value.to_string().into_bytes(),
    }
}

/// Which vertex failed.
pub fn vertex_detail(vertex: &VertexDigest) -> Any {
    detail("errdefs.Vertex", &json!({ "digest": vertex.to_string() }))
}

/// Where in the user's text it failed.
pub fn source_detail(info: &SourceInfo, ranges: &[SourceRange]) -> Any {
    let mut text = serde_json::Map::new();
    if !info.filename.is_empty() {
        text.insert("filename".into(), json!(info.filename));
    }
    if !info.data.is_empty() {
        text.insert(
            "data".into(),
            json!(base64::engine::general_purpose::STANDARD.encode(&info.data)),
        );
    }
    if !info.language.is_empty() {
        text.insert("language".into(), json!(info.language));
    }
    let position = |line: i32, character: i32| {
        let mut p = serde_json::Map::new();
        if line != 0 {
            p.insert("line".into(), json!(line));
        }
        if character != 0 {
            p.insert("character".into(), json!(character));
        }
        Value::Object(p)
    };
    let ranges: Vec<Value> = ranges
        .iter()
        .map(|r| json!({"start": position(r.start.line, r.start.character), "end": position(r.end.line, r.end.character)}))
        .collect();
    let mut source = serde_json::Map::new();
    source.insert("info".into(), Value::Object(text));
    if !ranges.is_empty() {
        source.insert("ranges".into(), Value::Array(ranges));
    }
    detail("errdefs.Source", &Value::Object(source))
}

/// The exit code of a process.
pub fn exit_detail(code: u32, error: &str) -> Any {
    detail(
        "gatewayapi.ExitMessage",
        &json!({ "Code": code, "Error": { "code": Code::Unknown as i32, "message": error } }),
    )
}

/// A subrequest that the frontend does not know.
pub fn subrequest_detail(name: &str) -> Any {
    detail("errdefs.Subrequest", &json!({ "name": name }))
}

/// A frontend capability that is missing.
pub fn frontend_cap_detail(name: &str) -> Any {
    detail("errdefs.FrontendCap", &json!({ "name": name }))
}

/// Which frontend an error comes from.
pub fn frontend_detail(name: &str, source: &str) -> Any {
    detail("errdefs.Frontend", &json!({ "name": name, "source": source }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_llb::SourcePosition;

    #[test]
    fn details_have_the_form_clients_decode() {
        let info = SourceInfo {
            filename: "Dockerfile".into(),
            data: "FROM x\n".into(),
            language: "Dockerfile".into(),
            definition: None,
        };
        let range = SourceRange {
            start: SourcePosition { line: 1, character: 0 },
            end: SourcePosition { line: 1, character: 0 },
        };
        let any = source_detail(&info, &[range]);
        assert_eq!(any.type_url, "github.com/moby/buildkit/errdefs.Source+json");
        assert_eq!(
            String::from_utf8(any.value).unwrap(),
            r#"{"info":{"filename":"Dockerfile","data":"RlJPTSB4Cg==","language":"Dockerfile"},"ranges":[{"start":{"line":1},"end":{"line":1}}]}"#
        );
    }

    #[test]
    fn an_error_survives_the_way_through_a_client() {
        let error = WireError::new(Code::Unknown, "boom").with(subrequest_detail("x"));
        let back = WireError::from_proto(error.to_proto());
        assert_eq!(
            (back.code, back.message.as_str(), back.details.len()),
            (Code::Unknown, "boom", 1)
        );
        let status = tonic::Status::from(back);
        let decoded = rpc::Status::decode(status.details()).unwrap();
        assert_eq!(decoded.details, error.details);
    }
}
