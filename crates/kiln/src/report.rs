//! What is said at the end: the image, or the error with the place in the Dockerfile.

use std::collections::BTreeMap;
use std::io::{self, Write as _};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::Any;
use kiln_proto::content::ReadContentRequest;
use serde::Deserialize;

use crate::connect::Daemon;
use crate::error::CliError;
use crate::render::bytes;

/// Prints an error to standard error.
pub(crate) fn error(error: &CliError) {
    let mut text = String::new();
    if let CliError::Remote(status) = error {
        for detail in &status.details {
            if let Some(excerpt) = excerpt(detail) {
                text.push_str(&excerpt);
            }
        }
    }
    text.push_str(&format!("error: {error}\n"));
    if let CliError::Daemon { log, .. } = error
        && !log.is_empty()
    {
        text.push_str(&format!("the daemon's last words:\n{log}\n"));
    }
    if let Some(hint) = error.hint() {
        text.push_str(&format!("hint: {hint}\n"));
    }
    let _closed = io::stderr().write_all(text.as_bytes());
}

/// The detail by which the daemon points into a source file.
#[derive(Deserialize)]
struct SourceDetail {
    info: SourceFile,
    #[serde(default)]
    ranges: Vec<SourceRange>,
}

#[derive(Deserialize)]
struct SourceFile {
    #[serde(default)]
    filename: String,
    #[serde(default)]
    data: String,
}

#[derive(Deserialize)]
struct SourceRange {
    #[serde(default)]
    start: Position,
    #[serde(default)]
    end: Position,
}

#[derive(Default, Deserialize)]
struct Position {
    #[serde(default)]
    line: usize,
}

/// The marked lines of a source file with two lines around them.
fn excerpt(detail: &Any) -> Option<String> {
    if !detail.type_url.ends_with("/errdefs.Source+json") {
        return None;
    }
    let source: SourceDetail = serde_json::from_slice(&detail.value).ok()?;
    let text = String::from_utf8(STANDARD.decode(&source.info.data).ok()?).ok()?;
    let first = source.ranges.iter().map(|range| range.start.line).min()?;
    let last = source
        .ranges
        .iter()
        .map(|range| range.end.line.max(range.start.line))
        .max()?;
    let marked = |line: usize| {
        source
            .ranges
            .iter()
            .any(|range| (range.start.line..=range.end.line.max(range.start.line)).contains(&line))
    };
    let mut out = format!("{}:{first}\n", source.info.filename);
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        if (first.saturating_sub(2)..=last + 2).contains(&number) {
            let mark = if marked(number) { ">>>" } else { "   " };
            out.push_str(&format!(" {number:>4} | {mark} {line}\n"));
        }
    }
    Some(out)
}

/// An image's layers, as its manifest tells.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ImageSize {
    pub(crate) layers: usize,
    /// Bytes of layers and configuration as they are stored.
    pub(crate) bytes: i64,
}

/// Layers and size of the image `digest`, read from the daemon; `None` when the daemon does not have it at hand. Of an
/// index the first real platform counts.
pub(crate) async fn image_size(daemon: &Daemon, digest: &str) -> Option<ImageSize> {
    let mut manifest = read_json(daemon, digest).await?;
    if let Some(manifests) = manifest.get("manifests").and_then(|list| list.as_array()) {
        let os = |entry: &serde_json::Value| Some(entry.get("platform")?.get("os")?.as_str()? != "unknown");
        let first = manifests.iter().find(|entry| os(entry).unwrap_or(true))?;
        manifest = read_json(daemon, first.get("digest")?.as_str()?).await?;
    }
    let size = |value: &serde_json::Value| value.get("size").and_then(serde_json::Value::as_i64).unwrap_or(0);
    let layers = manifest.get("layers")?.as_array()?;
    let config = manifest.get("config").map_or(0, size);
    Some(ImageSize {
        layers: layers.len(),
        bytes: config + layers.iter().map(size).sum::<i64>(),
    })
}

async fn read_json(daemon: &Daemon, digest: &str) -> Option<serde_json::Value> {
    let request = ReadContentRequest {
        digest: digest.to_owned(),
        offset: 0,
        size: 0,
    };
    let mut stream = daemon.content().read(request).await.ok()?.into_inner();
    let mut text = Vec::new();
    while let Ok(Some(part)) = stream.message().await {
        text.extend_from_slice(&part.data);
        if text.len() > 4 << 20 {
            return None;
        }
    }
    serde_json::from_slice(&text).ok()
}

/// The lines that close a build.
pub(crate) fn summary(
    response: &BTreeMap<String, String>,
    size: Option<&ImageSize>,
    stages: Option<i64>,
    counts: (usize, usize),
) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| out.push_str(&format!("{name:<9} {value}\n"));
    if let Some(name) = response.get("image.name") {
        line("image", name.clone());
    }
    if let Some(digest) = response.get("containerimage.digest") {
        line("digest", digest.clone());
    }
    if let Some(size) = size {
        let plural = if size.layers == 1 { "" } else { "s" };
        line(
            "size",
            format!("{} in {} layer{plural}", bytes(size.bytes), size.layers),
        );
    }
    if let Some(stages) = stages {
        line("left out", format!("{} stayed behind in build stages", bytes(stages)));
    }
    let (steps, cached) = counts;
    line("steps", format!("{steps}, of which {cached} cached"));
    out
}

/// The response for `--metadata-file`: values that are JSON objects in base64 become objects.
pub(crate) fn metadata(response: &BTreeMap<String, String>, reference: &str) -> String {
    let mut map = serde_json::Map::new();
    for (key, value) in response {
        let decoded = STANDARD
            .decode(value)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let value = match decoded {
            Some(serde_json::Value::Object(object)) => serde_json::Value::Object(object),
            _ => serde_json::Value::String(value.clone()),
        };
        map.insert(key.clone(), value);
    }
    map.insert(
        "kiln.build.ref".to_owned(),
        serde_json::Value::String(reference.to_owned()),
    );
    let mut text = serde_json::to_string_pretty(&map).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_points_to_its_line() {
        let data = STANDARD.encode("FROM a\nRUN one\nRUN two\nRUN three\nRUN four\nRUN five\n");
        let json = format!(
            r#"{{"info":{{"filename":"Dockerfile","data":"{data}"}},"ranges":[{{"start":{{"line":4}},"end":{{"line":4}}}}]}}"#
        );
        let type_url = "github.com/moby/buildkit/errdefs.Source+json".to_owned();
        let detail = Any {
            type_url,
            value: json.into(),
        };
        let expected = "Dockerfile:4\n    2 |     RUN one\n    3 |     RUN two\n    4 | >>> RUN three\n    5 |     RUN four\n    6 |     RUN five\n";
        assert_eq!(excerpt(&detail).unwrap(), expected);
        assert_eq!(
            excerpt(&Any {
                type_url: "other".to_owned(),
                value: detail.value
            }),
            None
        );
    }

    #[test]
    fn closing_lines() {
        let response = BTreeMap::from([
            ("containerimage.digest".to_owned(), "sha256:abc".to_owned()),
            ("image.name".to_owned(), "x:y".to_owned()),
        ]);
        let size = ImageSize {
            layers: 1,
            bytes: 1_500_000,
        };
        let text = summary(&response, Some(&size), Some(2_000_000_000), (7, 3));
        assert_eq!(
            text,
            "image     x:y\ndigest    sha256:abc\nsize      1.50MB in 1 layer\nleft out  2.00GB stayed behind in build stages\nsteps     7, of which 3 cached\n"
        );
    }

    #[test]
    fn metadata_expands_objects() {
        let descriptor = STANDARD.encode(r#"{"size":3}"#);
        let response = BTreeMap::from([("a".to_owned(), "plain".to_owned()), ("d".to_owned(), descriptor)]);
        let value: serde_json::Value = serde_json::from_str(&metadata(&response, "r")).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"a": "plain", "d": {"size": 3}, "kiln.build.ref": "r"})
        );
    }
}
