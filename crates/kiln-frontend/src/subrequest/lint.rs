//! `frontend.lint`: what the rules find in a Dockerfile, and the first error in it.

use serde::Serialize;

use super::llb_json::{self, Style};
use super::{JsonLocation, Metadata, excerpt, metadata};
use crate::bridge::Bridge;
use crate::context::{BuildClient, Entrypoint};
use crate::dockerfile::convert::{self, Request};
use crate::dockerfile::lint::{Finding, Linter};
use crate::error::DockerfileError;

#[derive(Serialize)]
struct Warning {
    #[serde(rename = "ruleName")]
    rule_name: &'static str,
    description: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    url: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
    location: JsonLocation,
}

#[derive(Serialize)]
struct BuildError {
    message: String,
    location: JsonLocation,
}

#[derive(Serialize)]
struct Answer {
    warnings: Option<Vec<Warning>>,
    sources: Vec<serde_json::Value>,
    #[serde(rename = "buildError", skip_serializing_if = "Option::is_none")]
    build_error: Option<BuildError>,
}

/// Lints all stages, or those that the target needs.
pub(super) async fn answer<B: Bridge>(
    client: &BuildClient<'_, B>,
    entrypoint: &Entrypoint,
    labs: bool,
) -> Result<Metadata, DockerfileError> {
    let file = &entrypoint.file;
    let (linter, error) = match crate::frontend::lint_options(&client.options, &file.data) {
        Ok(options) => {
            let linter = Linter::new(options);
            let all_stages = client.options.target.is_empty();
            let request = Request {
                file: file.clone(),
                platform: None,
                all_stages,
                linter: &linter,
                labs,
            };
            let error = convert::convert(client, &request).await.err();
            (linter, error)
        }
        Err(error) => (Linter::silent(), Some(error)),
    };
    let findings = linter.findings();
    let warnings: Vec<Warning> = findings.iter().map(warning).collect();
    let failed = error.is_some() || !warnings.is_empty();
    let answer = Answer {
        warnings: (!warnings.is_empty()).then_some(warnings),
        sources: vec![llb_json::source_info(file, Style::Plain)],
        build_error: error.map(|e| BuildError {
            location: merged(&e),
            message: e.message().to_owned(),
        }),
    };
    let mut out = metadata(&answer, Some(text(&findings, &file.filename, &file.data)), "1.0.0");
    out.insert("result.statuscode".to_owned(), if failed { "1" } else { "0" }.into());
    Ok(out)
}

fn warning(finding: &Finding) -> Warning {
    Warning {
        rule_name: finding.rule.name,
        description: finding.rule.description,
        url: finding.rule.url(),
        detail: finding.message.clone(),
        location: JsonLocation::of(finding.span),
    }
}

/// All lines an error points to, each once.
fn merged(error: &DockerfileError) -> JsonLocation {
    let lines: std::collections::BTreeSet<u32> = error.spans().iter().flat_map(|s| s.iter()).collect();
    JsonLocation::of_lines(lines)
}

fn text(findings: &[Finding], filename: &str, source: &[u8]) -> String {
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    sorted.sort_by_key(|f| f.span.first().unwrap_or(0));
    let mut out = String::new();
    for finding in sorted {
        out.push_str(&format!("\nWARNING: {}", finding.rule.name));
        let url = finding.rule.url();
        if !url.is_empty() {
            out.push_str(&format!(" - {url}"));
        }
        out.push_str(&format!("\n{}\n", finding.message));
        let lines: Vec<u32> = finding.span.iter().collect();
        out.push_str(&excerpt::print(filename, source, &lines));
    }
    out
}
