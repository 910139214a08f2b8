//! `frontend.targets`: the stages of a Dockerfile. Nothing is resolved.

use serde::Serialize;

use super::{JsonLocation, Metadata, base64, metadata, table};
use crate::context::Entrypoint;
use crate::dockerfile::lint::Linter;
use crate::dockerfile::stage::Dockerfile;
use crate::error::DockerfileError;

#[derive(Serialize)]
struct Target {
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    default: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    description: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    base: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    platform: String,
    location: JsonLocation,
}

#[derive(Serialize)]
struct Targets {
    targets: Option<Vec<Target>>,
    sources: Vec<String>,
}

/// The list.
pub(super) fn answer(entrypoint: &Entrypoint) -> Result<Metadata, DockerfileError> {
    let text = &entrypoint.file.data;
    let file = Dockerfile::read(text, &Linter::silent())?;
    let count = file.stages.len();
    let target = |(i, stage): (usize, crate::dockerfile::stage::Stage)| Target {
        name: stage.name,
        default: i + 1 == count,
        description: stage.description,
        base: stage.base,
        platform: stage.platform,
        location: JsonLocation::of(stage.span),
    };
    let targets: Vec<Target> = file.stages.into_iter().enumerate().map(target).collect();
    let mut rows = vec![["TARGET", "DESCRIPTION"].map(str::to_owned).to_vec()];
    rows.extend(targets.iter().map(|t| {
        let name = match (t.name.as_str(), t.default) {
            ("", true) => "(default)".to_owned(),
            (name, true) => format!("{name} (default)"),
            (name, false) => name.to_owned(),
        };
        vec![name, t.description.clone()]
    }));
    let targets = (!targets.is_empty()).then_some(targets);
    let answer = Targets {
        targets,
        sources: vec![base64(text)],
    };
    Ok(metadata(&answer, Some(table::lay_out(&rows, 1)), "1.0.0"))
}
