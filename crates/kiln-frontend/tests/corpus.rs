//! Dockerfiles in, operations and errors out.
//!
//! Each file of `tests/corpus` holds cases:
//!
//! ```text
//! === name of the case
//! attr build-arg:A=1
//! image busybox {"os":"linux",…}
//! file .dockerignore
//! *.log
//! file Dockerfile
//! FROM alpine
//! --- expected
//! …
//! ```
//!
//! Expected are: the operations of the result by digest (which decides on cache hits, so it is that of the original frontend to
//! the byte) with name and lines; the history; findings; or the error with its lines. `KILN_UPDATE_CORPUS=1` writes what the
//! frontend does now; what changes by it has to be confirmed on the original.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code, unreachable_pub)]
mod fake;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use fake::{Asked, Fake};
use kiln_frontend::bridge::Frontend as _;
use kiln_frontend::{DockerfileFrontend, FrontendError};
use kiln_llb::op::Op;
use kiln_llb::{Definition, vertex_digest, wire};

#[derive(Default)]
struct Case {
    name: String,
    input: String,
    attrs: BTreeMap<String, String>,
    images: BTreeMap<String, serde_json::Value>,
    files: BTreeMap<String, String>,
    expected: String,
}

fn cases(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut file = String::new();
    let mut expecting = false;
    for line in text.split_inclusive('\n') {
        let bare = line.trim_end_matches('\n');
        if let Some(name) = bare.strip_prefix("=== ") {
            cases.push(Case {
                name: name.to_owned(),
                ..Case::default()
            });
            (file, expecting) = (String::new(), false);
            continue;
        }
        let case = cases.last_mut().expect("a case begins with its name");
        if bare == "--- expected" {
            expecting = true;
        } else if expecting {
            case.expected.push_str(line);
        } else {
            case.input.push_str(line);
            if let Some(name) = bare.strip_prefix("file ") {
                name.clone_into(&mut file);
                case.files.insert(file.clone(), String::new());
            } else if !file.is_empty() {
                case.files.get_mut(&file).unwrap().push_str(line);
            } else if let Some((key, value)) = bare.strip_prefix("attr ").and_then(|a| a.split_once('=')) {
                case.attrs.insert(key.to_owned(), value.to_owned());
            } else if let Some((name, json)) = bare.strip_prefix("image ").and_then(|i| i.split_once(' ')) {
                case.images.insert(name.to_owned(), serde_json::from_str(json).unwrap());
            } else {
                panic!("{}: not understood: {bare}", case.name);
            }
        }
    }
    cases
}

fn show_definition(definition: &Definition, out: &mut String) {
    for bytes in &definition.ops {
        let digest = vertex_digest(bytes);
        let meta = definition.metadata.get(&digest).cloned().unwrap_or_default();
        let (kind, fallback) = match wire::decode_op(bytes).map(|decoded| decoded.op) {
            Ok(None) => continue,
            Ok(Some(Op::Exec(_))) => ("exec", String::new()),
            Ok(Some(Op::Source(source))) => ("source", source.identifier),
            Ok(Some(Op::File(_))) => ("file", String::new()),
            Ok(Some(Op::Merge(_))) => ("merge", String::new()),
            Ok(Some(_)) => ("other", String::new()),
            // Some instructions always made operations that the daemon refuses.
            Err(error) => ("refused", error.to_string()),
        };
        let _ = write!(out, "{} {kind}", digest.0.short());
        let name = meta.description.get("llb.customname").cloned();
        let _ = write!(out, " {}", name.unwrap_or(fallback));
        if meta.ignore_cache {
            out.push_str(" (no cache)");
        }
        let lines: Vec<String> = definition
            .source_map
            .locations
            .get(&digest)
            .into_iter()
            .flatten()
            .map(|l| {
                l.ranges
                    .iter()
                    .map(|r| r.start.line.to_string())
                    .collect::<Vec<_>>()
                    .join(",")
            })
            .collect();
        if !lines.is_empty() {
            let _ = write!(out, " @{}", lines.join(" @"));
        }
        out.push('\n');
    }
}

fn run(case: &Case) -> String {
    let files = case
        .files
        .iter()
        .map(|(name, text)| (name.clone(), text.clone().into()))
        .collect();
    let fake = Fake {
        files,
        images: case.images.clone(),
        ..Fake::default()
    };
    let frontend = DockerfileFrontend {
        serve_official_syntax: true,
    };
    let result = futures::executor::block_on(frontend.run(&fake, &case.attrs));
    let mut out = String::new();
    let mut warnings = Vec::new();
    for asked in fake.asked() {
        match asked {
            Asked::Solve(request) => match &request.definition {
                Some(definition) if definition.ops.len() == 2 && definition.metadata.values().any(is_preparation) => {}
                Some(definition) => {
                    out.push_str("solve\n");
                    show_definition(definition, &mut out);
                }
                None => {
                    let _ = writeln!(out, "forward to {} {:?}", request.frontend, request.frontend_attrs);
                }
            },
            Asked::Warn(warning) => warnings.push(warning.short),
            Asked::Image(..) => {}
        }
    }
    for warning in warnings {
        let _ = writeln!(out, "warning {warning}");
    }
    match result {
        Ok(result) => {
            for (key, value) in &result.metadata {
                let text = String::from_utf8_lossy(value);
                match key.as_str() {
                    "refs.platforms" | "containerimage.base.config" => {}
                    key if key.starts_with("containerimage.base.config/") => {}
                    key => {
                        let _ = writeln!(out, "{key}: {}", text.trim_end());
                    }
                }
            }
        }
        Err(error) => {
            let _ = write!(out, "error {error}");
            if let FrontendError::Dockerfile { error, file: Some(_) } = &error {
                for span in error.spans() {
                    let lines: Vec<String> = span.iter().map(|l| l.to_string()).collect();
                    let _ = write!(out, " @{}", lines.join(","));
                }
            }
            out.push('\n');
        }
    }
    out
}

/// Whether a vertex only loads the Dockerfile or an ignore file.
fn is_preparation(meta: &kiln_llb::OpMetadata) -> bool {
    let name = meta.description.get("llb.customname").map_or("", String::as_str);
    name.starts_with("[internal] load build definition") || name.contains("load .dockerignore")
}

#[test]
fn corpus() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let update = std::env::var_os("KILN_UPDATE_CORPUS").is_some();
    let mut failures = String::new();
    let mut count = 0;
    let mut files: Vec<PathBuf> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let mut written = String::new();
        for case in cases(&text) {
            count += 1;
            let actual = run(&case);
            let _ = write!(written, "=== {}\n{}--- expected\n{actual}\n", case.name, case.input);
            if actual.trim_end() != case.expected.trim_end() && !update {
                let expected = case.expected.trim_end();
                let _ = write!(
                    failures,
                    "{}\n--- expected\n{expected}\n--- actual\n{actual}\n",
                    case.name
                );
            }
        }
        if update {
            std::fs::write(&path, written).unwrap();
        }
    }
    assert!(count > 150, "only {count} cases were found");
    assert!(failures.is_empty(), "{failures}");
}
