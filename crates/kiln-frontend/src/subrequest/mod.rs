//! Questions about a Dockerfile that build nothing (`requestid`): outline, targets, lint, the LLB itself.

mod describe;
mod excerpt;
mod lint;
mod llb_json;
mod outline;
mod table;
mod targets;

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Serialize;

use crate::bridge::Bridge;
use crate::context::{BuildClient, Entrypoint};
use crate::dockerfile::convert::{self, Converted, Request};
use crate::dockerfile::lint::Linter;
use crate::dockerfile::span::Span;
use crate::error::{DockerfileError, FrontendError};

type Metadata = BTreeMap<String, Bytes>;

/// Answers the request with this id.
pub(crate) async fn answer<B: Bridge>(
    client: &BuildClient<'_, B>,
    entrypoint: &Entrypoint,
    id: &str,
    labs: bool,
) -> Result<Metadata, FrontendError> {
    Ok(match id {
        "frontend.subrequests.describe" => describe::answer(),
        "frontend.outline" => outline::answer(&convert(client, entrypoint, labs).await?, entrypoint),
        "frontend.targets" => targets::answer(entrypoint)?,
        "frontend.lint" => lint::answer(client, entrypoint, labs).await?,
        "frontend.convertllb" => llb_json::answer(&convert(client, entrypoint, labs).await?)?,
        other => return Err(FrontendError::UnsupportedRequest(other.to_owned())),
    })
}

/// Converts for the build platform, whatever platform was asked for. Findings are shown as in a build.
async fn convert<B: Bridge>(
    client: &BuildClient<'_, B>,
    entrypoint: &Entrypoint,
    labs: bool,
) -> Result<Converted, DockerfileError> {
    let linter = Linter::new(crate::frontend::lint_options(&client.options, &entrypoint.file.data)?);
    let file = entrypoint.file.clone();
    let request = Request {
        file,
        platform: None,
        all_stages: false,
        linter: &linter,
        labs,
    };
    let converted = convert::convert(client, &request).await;
    crate::frontend::warn(client, entrypoint, &linter).await;
    converted
}

/// The usual metadata of an answer.
fn metadata(json: &impl Serialize, text: Option<String>, version: &'static str) -> Metadata {
    let json = kiln_oci::go_json::to_vec_indent(json).unwrap_or_default();
    let mut out = Metadata::from([
        ("result.json".to_owned(), Bytes::from(json)),
        ("version".to_owned(), Bytes::from_static(version.as_bytes())),
    ]);
    if let Some(text) = text {
        out.insert("result.txt".to_owned(), text.into());
    }
    out
}

/// Lines as JSON has them: zero values left out.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct JsonLocation {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ranges: Vec<JsonRange>,
}

#[derive(Clone, Debug, Serialize)]
struct JsonRange {
    start: JsonPosition,
    end: JsonPosition,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct JsonPosition {
    #[serde(skip_serializing_if = "is_zero")]
    line: u32,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl JsonLocation {
    fn of_lines(lines: impl IntoIterator<Item = u32>) -> Self {
        let position = |line| JsonPosition { line };
        let range = |line| JsonRange {
            start: position(line),
            end: position(line),
        };
        Self {
            ranges: lines.into_iter().map(range).collect(),
        }
    }

    fn of(span: Span) -> Self {
        Self::of_lines(span.iter())
    }
}

/// Bytes in base64, as JSON has them.
fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
