//! `frontend.outline`: what a target takes from its user.

use serde::Serialize;

use super::{JsonLocation, Metadata, base64, metadata, table};
use crate::context::Entrypoint;
use crate::dockerfile::convert::{Converted, Requirement};

#[derive(Serialize)]
struct Arg<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    description: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    value: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    location: Option<JsonLocation>,
}

#[derive(Serialize)]
struct Needed<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    required: bool,
    location: JsonLocation,
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    description: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    args: Vec<Arg<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    secrets: Vec<Needed<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ssh: Vec<Needed<'a>>,
    sources: Vec<String>,
}

fn needed(list: &[Requirement]) -> Vec<Needed<'_>> {
    let one = |r: &'_ Requirement| -> JsonLocation { JsonLocation::of(r.span) };
    list.iter()
        .map(|r| Needed {
            name: &r.name,
            required: r.required,
            location: one(r),
        })
        .collect()
}

/// The outline.
pub(super) fn answer(converted: &Converted, entrypoint: &Entrypoint) -> Metadata {
    let outline = &converted.outline;
    let answer = Answer {
        name: &outline.name,
        description: &outline.description,
        args: outline
            .args
            .iter()
            .map(|arg| Arg {
                name: &arg.name,
                description: &arg.description,
                value: &arg.value,
                location: arg.span.map(JsonLocation::of),
            })
            .collect(),
        secrets: needed(&outline.secrets),
        ssh: needed(&outline.ssh),
        sources: vec![base64(&entrypoint.file.data)],
    };
    let text = text(&answer);
    metadata(&answer, Some(text), "1.0.0")
}

fn text(answer: &Answer<'_>) -> String {
    let mut out = String::new();
    let mut add = |rows: Vec<Vec<String>>, gap: usize| {
        out.push_str(&table::lay_out(&rows, gap));
        out.push('\n');
    };
    let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>();
    if !answer.name.is_empty() || !answer.description.is_empty() {
        let name = if answer.name.is_empty() {
            "(default)"
        } else {
            answer.name
        };
        let mut rows = vec![row(&["TARGET:", name])];
        if !answer.description.is_empty() {
            rows.push(row(&["DESCRIPTION:", answer.description]));
        }
        add(rows, 1);
    }
    if !answer.args.is_empty() {
        let mut rows = vec![row(&["BUILD ARG", "VALUE", "DESCRIPTION"])];
        rows.extend(answer.args.iter().map(|a| row(&[a.name, a.value, a.description])));
        add(rows, 3);
    }
    for (title, list) in [("SECRET", &answer.secrets), ("SSH", &answer.ssh)] {
        if !list.is_empty() {
            let mut rows = vec![row(&[title, "REQUIRED"])];
            rows.extend(
                list.iter()
                    .map(|n| row(&[n.name, if n.required { "true" } else { "" }])),
            );
            add(rows, 3);
        }
    }
    out
}
