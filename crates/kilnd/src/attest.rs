//! Which attestations a build gets, and what its record keeps of them.

use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;
use kiln_exporter::{Attestation, AttestationContent, AttestationKind, ResultPlatform};
use kiln_frontend::bridge::ResultRefs;
use kiln_llb::Graph;
use kiln_oci::Digest;
use kiln_proto::control::{BuildResultInfo, Descriptor, SolveRequest};

use crate::Daemon;
use crate::builds::{Build, BuildResult};
use crate::export::Exported;
use crate::history::{HistoryBlob, descriptor};
use crate::provenance::{self, Capture, Options, SLSA_V1};
use crate::status::WireError;

const IN_TOTO: &str = "application/vnd.in-toto+json";
const PREDICATE_TYPE: &str = "in-toto.io/predicate-type";

/// What is stated about each platform of a result.
#[derive(Debug, Default)]
pub struct Statements {
    /// For exporters, by platform id; empty if the client wants none.
    pub attached: BTreeMap<String, Attestation>,
    /// For the build record, by platform id: version 1 in full, whatever the client wants.
    pub recorded: Vec<(String, Vec<u8>)>,
    /// Whether the result has one file system per platform.
    pub is_map: bool,
}

/// Reads the client's wish and makes the statements.
pub fn statements(
    daemon: &Daemon,
    build: &Build,
    result: &BuildResult,
    platforms: &[ResultPlatform],
    request: &SolveRequest,
    started: SystemTime,
) -> Result<Statements, WireError> {
    let wanted = wanted(&request.frontend_attrs)?;
    let mut out = Statements {
        is_map: matches!(result.refs, ResultRefs::ByPlatform(_)),
        ..Default::default()
    };
    let (frontend, attrs) = build
        .trail
        .request()
        .unwrap_or((request.frontend.clone(), request.frontend_attrs.clone()));
    let (begun, ended) = (rfc3339(started), rfc3339(SystemTime::now()));
    let invocation = crate::random_id();
    let empty = Graph::default();
    for platform in platforms {
        let capture = Capture {
            graph: graph(result, &platform.id).unwrap_or(&empty),
            trail: &build.trail,
            frontend: &frontend,
            attrs: &attrs,
            builder_platform: daemon.platforms.first().unwrap_or(&platform.platform),
            platform: Some(&platform.platform),
            invocation: &invocation,
            times: (&begun, &ended),
        };
        out.recorded.push((
            platform.id.clone(),
            provenance::predicate(&capture, &Options::default()),
        ));
        if let Some(options) = &wanted {
            let metadata = [
                ("reason".to_owned(), "provenance".to_owned()),
                ("inline-only".to_owned(), options.inline_only.to_string()),
            ];
            let attestation = Attestation {
                kind: AttestationKind::InToto,
                content: AttestationContent::Bytes(Bytes::from(provenance::predicate(&capture, options))),
                path: options.filename.clone(),
                predicate_type: options.version.predicate_type().to_owned(),
                subjects: Vec::new(),
                metadata: metadata.into(),
            };
            out.attached.insert(platform.id.clone(), attestation);
        }
    }
    Ok(out)
}

fn graph<'a>(result: &'a BuildResult, platform: &str) -> Option<&'a Graph> {
    match &result.refs {
        ResultRefs::Single(r) => r.as_ref(),
        ResultRefs::ByPlatform(refs) => refs.iter().find(|(id, _)| id == platform).and_then(|(_, r)| r.as_ref()),
    }
    .map(|r| &r.graph)
}

fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time)
        .map(|t| t.to_string())
        .unwrap_or_default()
}

/// What the attributes ask for: `attest:<type>`, or the older build argument. A value that disables is not sent.
fn wanted(attrs: &BTreeMap<String, String>) -> Result<Option<Options>, WireError> {
    let mut out = None;
    for (key, value) in attrs {
        let kind = match key.strip_prefix("attest:") {
            Some(kind) => kind,
            None => match key.strip_prefix("build-arg:BUILDKIT_ATTEST_") {
                Some(kind) => kind,
                None => continue,
            },
        };
        match kind.to_ascii_lowercase().as_str() {
            "provenance" => out = Some(Options::parse(value).map_err(WireError::invalid)?),
            "sbom" => {
                return Err(WireError::new(
                    tonic::Code::Unimplemented,
                    "SBOM attestations need a scanner image, which this daemon does not run yet: build with --sbom=false",
                ));
            }
            other => return Err(WireError::invalid(format!("unknown attestation type {other:?}"))),
        }
    }
    Ok(out)
}

type Recorded = (
    Option<BuildResultInfo>,
    BTreeMap<String, BuildResultInfo>,
    Vec<(Descriptor, HistoryBlob)>,
);

/// What the build record says about results, and the blobs it keeps for that.
pub fn history(statements: &Statements, exported: &Exported) -> Recorded {
    let mut blobs: Vec<(Descriptor, HistoryBlob)> = Vec::new();
    let mut infos = Vec::new();
    for (platform, predicate) in &statements.recorded {
        let annotations = BTreeMap::from([(PREDICATE_TYPE.to_owned(), SLSA_V1.to_owned())]);
        let blob = descriptor(IN_TOTO, Digest::of(predicate), predicate.len() as u64, annotations);
        blobs.push((blob.clone(), HistoryBlob::Bytes(predicate.clone())));
        let info = BuildResultInfo {
            attestations: vec![blob],
            ..Default::default()
        };
        infos.push((platform.clone(), info));
    }
    for kept in &exported.kept {
        blobs.push((kept.clone(), HistoryBlob::Stored));
    }
    let results = exported.results.clone();
    if statements.is_map {
        let mut top = BuildResultInfo {
            results,
            ..Default::default()
        };
        top.result_deprecated = top.results.values().next().cloned();
        return (Some(top), infos.into_iter().collect(), blobs);
    }
    let mut info = infos.into_iter().next().map(|(_, info)| info).unwrap_or_default();
    info.result_deprecated = results.values().next().cloned();
    info.results = results;
    (Some(info), BTreeMap::new(), blobs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_name_known_attestations() {
        let attrs = |k: &str, v: &str| BTreeMap::from([(k.to_owned(), v.to_owned())]);
        assert!(wanted(&BTreeMap::new()).unwrap().is_none());
        assert!(wanted(&attrs("attest:provenance", "mode=min")).unwrap().is_some());
        assert!(
            wanted(&attrs("build-arg:BUILDKIT_ATTEST_PROVENANCE", ""))
                .unwrap()
                .is_some()
        );
        assert_eq!(
            wanted(&attrs("attest:foo", "")).unwrap_err().message,
            "unknown attestation type \"foo\""
        );
        assert!(wanted(&attrs("attest:provenance", "mode=x")).is_err());
    }
}
