//! In-toto statements: from what frontends and the daemon claim to documents about what is exported (semantics.md §7).

use std::collections::BTreeMap;

use kiln_oci::go_json;
use kiln_store::View;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::ExportError;
use crate::result::{Attestation, AttestationContent, AttestationKind, Subject};

/// Largest attestation document, in bytes.
pub const MAX_DOCUMENT: u64 = 40 << 20;
const PROVENANCE_PREFIX: &str = "https://slsa.dev/provenance/";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";

/// An attestation whose predicate has been read.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    /// File name for exporters that write files.
    pub(crate) path: String,
    pub(crate) predicate_type: String,
    /// JSON.
    pub(crate) predicate: Box<RawValue>,
    pub(crate) subjects: Vec<Subject>,
    sbom_core: Option<String>,
}

/// A subject of a statement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct StatementSubject {
    pub(crate) name: String,
    pub(crate) digest: BTreeMap<String, String>,
}

impl StatementSubject {
    pub(crate) fn sha256(name: impl Into<String>, digest: kiln_oci::Digest) -> Self {
        Self {
            name: name.into(),
            digest: BTreeMap::from([("sha256".to_owned(), digest.hex())]),
        }
    }
}

#[derive(Serialize)]
struct Statement<'a> {
    #[serde(rename = "_type")]
    kind: &'a str,
    #[serde(rename = "predicateType")]
    predicate_type: &'a str,
    subject: Vec<StatementSubject>,
    predicate: &'a RawValue,
}

#[derive(Deserialize)]
struct ReadStatement {
    #[serde(rename = "predicateType", default)]
    predicate_type: String,
    #[serde(default)]
    subject: Option<Vec<ReadSubject>>,
    predicate: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct ReadSubject {
    #[serde(default)]
    name: String,
    #[serde(default)]
    digest: Option<BTreeMap<String, String>>,
}

impl Claim {
    /// The statement about a result that is known by `own` subjects.
    pub(crate) fn statement(&self, own: &[StatementSubject]) -> Result<Vec<u8>, ExportError> {
        let itself = [Subject::Itself { name: String::new() }];
        let subjects = if self.subjects.is_empty() {
            &itself[..]
        } else {
            &self.subjects
        };
        let mut subject = Vec::new();
        for s in subjects {
            match s {
                Subject::Itself { name } => {
                    for mine in own {
                        subject.push(mine.clone());
                        if !name.is_empty() && name != "_" {
                            subject.push(StatementSubject {
                                name: name.clone(),
                                digest: mine.digest.clone(),
                            });
                        }
                    }
                }
                Subject::Raw { name, digests } => {
                    let name = if name.is_empty() { "_".to_owned() } else { name.clone() };
                    let digest = digests.iter().filter_map(|d| d.split_once(':'));
                    let digest = digest.map(|(a, hex)| (a.to_owned(), hex.to_owned())).collect();
                    subject.push(StatementSubject { name, digest });
                }
            }
        }
        let statement = Statement {
            kind: STATEMENT_TYPE,
            predicate_type: &self.predicate_type,
            subject,
            predicate: &self.predicate,
        };
        let text = serde_json::to_string(&statement).map_err(ExportError::json("failed to marshal attestation"))?;
        let mut out = Vec::with_capacity(text.len());
        go_json::compact(&text, &mut out);
        Ok(out)
    }
}

/// Checks what can be checked without reading anything.
fn validate(attestation: &Attestation) -> Result<(), ExportError> {
    let bad = |text: &str| Err(ExportError::Result(text.to_owned()));
    if attestation.kind == AttestationKind::InToto && attestation.path.is_empty() {
        return bad("attestation does not have set path");
    }
    match (&attestation.content, attestation.kind) {
        (AttestationContent::Bytes(_), AttestationKind::Bundle) => bad("attestation bundle cannot have callback"),
        (AttestationContent::Layer(_), AttestationKind::InToto)
            if attestation.predicate_type.starts_with(PROVENANCE_PREFIX) =>
        {
            bad("frontend may not set provenance attestations")
        }
        _ => Ok(()),
    }
}

/// Reads attestations. `view` is what the layer of an attestation shows; bundles become one claim per file. SBOM core
/// documents come first, everything else keeps its order. Blocking.
pub(crate) fn load(
    attestations: &[Attestation],
    view: &dyn Fn(&Attestation) -> Result<View, ExportError>,
) -> Result<Vec<Claim>, ExportError> {
    let mut claims = Vec::new();
    for attestation in attestations {
        validate(attestation)?;
        let core = attestation.metadata.get("sbom-core").cloned();
        match (&attestation.content, attestation.kind) {
            (AttestationContent::Bytes(bytes), _) => claims.push(Claim {
                path: attestation.path.clone(),
                predicate_type: attestation.predicate_type.clone(),
                predicate: raw(bytes, &attestation.path)?,
                subjects: attestation.subjects.clone(),
                sbom_core: core,
            }),
            (AttestationContent::Layer(_), AttestationKind::InToto) => {
                let bytes = read_document(&view(attestation)?, attestation.path.as_bytes())?;
                claims.push(Claim {
                    path: attestation.path.clone(),
                    predicate_type: attestation.predicate_type.clone(),
                    predicate: raw(&bytes, &attestation.path)?,
                    subjects: attestation.subjects.clone(),
                    sbom_core: core,
                });
            }
            (AttestationContent::Layer(_), AttestationKind::Bundle) => {
                unbundle(attestation, &view(attestation)?, core.as_deref(), &mut claims)?;
            }
        }
    }
    claims.sort_by_key(|c| {
        let stem = c.path.split('.').next().unwrap_or_default();
        c.sbom_core.as_deref() != Some(stem)
    });
    Ok(claims)
}

fn raw(bytes: &[u8], path: &str) -> Result<Box<RawValue>, ExportError> {
    let bytes = if bytes.is_empty() { b"null" } else { bytes };
    serde_json::from_slice(bytes).map_err(ExportError::json(format!("attestation {path} is not a JSON document")))
}

fn read_document(view: &View, path: &[u8]) -> Result<Vec<u8>, ExportError> {
    view.read(path, MAX_DOCUMENT)?.ok_or_else(|| {
        ExportError::Result(format!(
            "attestation {} is not a regular file",
            String::from_utf8_lossy(path)
        ))
    })
}

fn unbundle(bundle: &Attestation, view: &View, core: Option<&str>, claims: &mut Vec<Claim>) -> Result<(), ExportError> {
    let Some(dir) = view.find(bundle.path.as_bytes(), true)? else {
        return Err(ExportError::Result(format!(
            "attestation bundle {} does not exist",
            bundle.path
        )));
    };
    for child in view.children(&dir) {
        let name = String::from_utf8_lossy(view.entry(&child).name()).into_owned();
        let path = format!("{}/{name}", bundle.path.trim_end_matches('/'));
        let bytes = read_document(view, path.as_bytes())?;
        let statement: ReadStatement =
            serde_json::from_slice(&bytes).map_err(ExportError::json("cannot decode in-toto statement"))?;
        if !bundle.predicate_type.is_empty() && statement.predicate_type != bundle.predicate_type {
            return Err(ExportError::Result(format!(
                "bundle entry {} does not match required predicate type {}",
                statement.predicate_type, bundle.predicate_type
            )));
        }
        if statement.predicate_type.starts_with(PROVENANCE_PREFIX) {
            return Err(ExportError::Result(
                "frontend may not bundle provenance attestations".to_owned(),
            ));
        }
        let subjects = statement.subject.unwrap_or_default().into_iter().map(|s| Subject::Raw {
            name: s.name,
            digests: s
                .digest
                .unwrap_or_default()
                .into_iter()
                .map(|(a, hex)| format!("{a}:{hex}"))
                .collect(),
        });
        claims.push(Claim {
            path,
            predicate_type: statement.predicate_type,
            predicate: match statement.predicate {
                Some(predicate) => predicate,
                None => raw(b"", &bundle.path)?,
            },
            subjects: subjects.collect(),
            sbom_core: core.map(str::to_owned),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_oci::Digest;

    fn made(path: &str, subjects: Vec<Subject>, core: Option<&str>) -> Attestation {
        Attestation {
            kind: AttestationKind::InToto,
            content: AttestationContent::Bytes(bytes::Bytes::from_static(br#"{ "b": "<1>", "a": 1.0 }"#)),
            path: path.into(),
            predicate_type: "https://slsa.dev/provenance/v1".into(),
            subjects,
            metadata: core
                .map(|c| ("sbom-core".to_owned(), c.to_owned()))
                .into_iter()
                .collect(),
        }
    }

    fn nothing(_: &Attestation) -> Result<View, ExportError> {
        Ok(View::scratch())
    }

    #[test]
    fn statements_are_compact_with_members_in_order() {
        let claims = load(
            &[
                made("provenance.json", vec![], None),
                made("sbom.spdx.json", vec![], Some("sbom")),
            ],
            &nothing,
        )
        .unwrap();
        assert_eq!(
            claims.iter().map(|c| c.path.as_str()).collect::<Vec<_>>(),
            ["sbom.spdx.json", "provenance.json"]
        );
        let digest = Digest::of("m");
        let own = [StatementSubject::sha256(
            "pkg:docker/a@1?platform=linux%2Famd64",
            digest,
        )];
        assert_eq!(
            String::from_utf8(claims[1].statement(&own).unwrap()).unwrap(),
            format!(
                r#"{{"_type":"https://in-toto.io/Statement/v1","predicateType":"https://slsa.dev/provenance/v1","subject":[{{"name":"pkg:docker/a@1?platform=linux%2Famd64","digest":{{"sha256":"{}"}}}}],"predicate":{{"b":"\u003c1\u003e","a":1.0}}}}"#,
                digest.hex()
            )
        );
        // no image name: an empty list
        assert!(
            String::from_utf8(claims[1].statement(&[]).unwrap())
                .unwrap()
                .contains(r#""subject":[],"#)
        );
    }

    #[test]
    fn subjects_are_itself_or_raw() {
        let subjects = vec![
            Subject::Itself { name: "extra".into() },
            Subject::Raw {
                name: String::new(),
                digests: vec!["sha1:ab".into(), "sha256:cd".into()],
            },
        ];
        let claim = &load(&[made("x", subjects, None)], &nothing).unwrap()[0];
        let own = [StatementSubject::sha256("a", Digest::of("m"))];
        let v: serde_json::Value = serde_json::from_slice(&claim.statement(&own).unwrap()).unwrap();
        let names: Vec<_> = v["subject"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["a", "extra", "_"]);
        assert_eq!(
            v["subject"][2]["digest"],
            serde_json::json!({"sha1": "ab", "sha256": "cd"})
        );
    }

    #[test]
    fn broken_documents_are_refused() {
        let mut bad = made("x", vec![], None);
        bad.content = AttestationContent::Bytes(bytes::Bytes::from_static(b"{"));
        assert!(load(&[bad], &nothing).is_err());
        assert!(load(&[made("", vec![], None)], &nothing).is_err());
    }
}
