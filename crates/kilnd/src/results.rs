//! Results between the wire and the daemon: references have ids there and are graphs here.

use std::collections::BTreeMap;

use bytes::Bytes;
use kiln_frontend::bridge::{Attestation, FrontendResult, ResultRefs};
use kiln_llb::wire::definition_to_proto;
use kiln_proto::gateway as pb;
use tonic::Code;

use crate::builds::{Build, BuildRef, BuildResult};
use crate::status::WireError;

/// Puts a result on the wire; every reference gets an id of the build.
pub fn result_to_proto(build: &Build, result: &BuildResult) -> pb::Result {
    let reference = |r: &Option<BuildRef>| match r {
        // Not the default value: that would be left out of the map, and clients would dereference nothing.
        None => pb::Ref {
            id: String::new(),
            def: Some(Default::default()),
        },
        Some(r) => pb::Ref {
            id: build.register(r.clone()),
            def: Some(definition_to_proto(&r.definition)),
        },
    };
    let shape = match &result.refs {
        ResultRefs::Single(r) => pb::result::Result::Ref(reference(r)),
        ResultRefs::ByPlatform(refs) => pb::result::Result::Refs(pb::RefMap {
            refs: refs
                .iter()
                .map(|(platform, r)| (platform.clone(), reference(r)))
                .collect(),
        }),
    };
    let attestations = result
        .attestations
        .iter()
        .filter(|(_, list)| !list.is_empty())
        .map(|(platform, list)| {
            let attestation = list
                .iter()
                .map(|a| pb::Attestation {
                    kind: if a.bundle {
                        pb::AttestationKind::Bundle
                    } else {
                        pb::AttestationKind::InToto
                    } as i32,
                    metadata: a.metadata.clone(),
                    // Clients dereference it, so it is never left out.
                    r#ref: Some(reference(&a.reference)),
                    path: a.path.clone(),
                    in_toto_predicate_type: a.predicate_type.clone(),
                    in_toto_subjects: Vec::new(),
                })
                .collect();
            (platform.clone(), pb::Attestations { attestation })
        })
        .collect();
    pb::Result {
        metadata: result.metadata.clone(),
        attestations,
        result: Some(shape),
    }
}

/// Takes over what a client returns. An empty id is an empty file system.
pub fn result_from_proto(build: &Build, result: pb::Result) -> Result<BuildResult, WireError> {
    let lookup = |id: &str| -> Result<Option<BuildRef>, WireError> {
        if id.is_empty() {
            return Ok(None);
        }
        match build.lookup(id) {
            Some(found) => Ok(Some(found)),
            None => Err(WireError::new(Code::Unknown, format!("no such ref: {id}"))),
        }
    };
    let refs = match result.result {
        None => ResultRefs::Single(None),
        Some(pb::result::Result::RefDeprecated(id)) => ResultRefs::Single(lookup(&id)?),
        Some(pb::result::Result::Ref(r)) => ResultRefs::Single(lookup(&r.id)?),
        Some(pb::result::Result::RefsDeprecated(map)) => by_platform(
            &result.metadata,
            map.refs.iter().map(|(k, id)| (k, id.as_str())),
            &lookup,
        )?,
        Some(pb::result::Result::Refs(map)) => by_platform(
            &result.metadata,
            map.refs.iter().map(|(k, r)| (k, r.id.as_str())),
            &lookup,
        )?,
    };
    let mut attestations = BTreeMap::new();
    for (platform, list) in result.attestations {
        let mut out = Vec::with_capacity(list.attestation.len());
        for a in list.attestation {
            out.push(Attestation {
                reference: lookup(a.r#ref.as_ref().map_or("", |r| r.id.as_str()))?,
                metadata: a.metadata,
                path: a.path,
                predicate_type: a.in_toto_predicate_type,
                bundle: a.kind == pb::AttestationKind::Bundle as i32,
            });
        }
        attestations.insert(platform, out);
    }
    Ok(FrontendResult {
        refs,
        metadata: result.metadata,
        attestations,
    })
}

/// Platforms in the order that `refs.platforms` gives, since a map has none; what it does not name follows by name.
fn by_platform<'a>(
    metadata: &BTreeMap<String, Bytes>,
    refs: impl Iterator<Item = (&'a String, &'a str)>,
    lookup: &dyn Fn(&str) -> Result<Option<BuildRef>, WireError>,
) -> Result<ResultRefs<BuildRef>, WireError> {
    let order = platform_order(metadata);
    let mut list = refs
        .map(|(k, id)| Ok((k.clone(), lookup(id)?)))
        .collect::<Result<Vec<_>, WireError>>()?;
    list.sort_by_key(|(k, _)| order.iter().position(|o| o == k).unwrap_or(usize::MAX));
    Ok(ResultRefs::ByPlatform(list))
}

/// Platform ids in the order of the result key `refs.platforms`; empty if it is missing.
pub fn platform_order(metadata: &BTreeMap<String, Bytes>) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(rename = "ID")]
        id: String,
    }
    #[derive(serde::Deserialize)]
    struct Platforms {
        #[serde(rename = "Platforms", default)]
        platforms: Vec<Entry>,
    }
    metadata
        .get("refs.platforms")
        .and_then(|json| serde_json::from_slice::<Platforms>(json).ok())
        .map(|p| p.platforms.into_iter().map(|e| e.id).collect())
        .unwrap_or_default()
}
