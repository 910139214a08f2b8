//! The keys of operations that only arrange their inputs (cache-keys.md §2 "others").

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_llb::op::{BuildOp, DiffOp, MergeOp, PassthroughOp};

use super::OpKey;
use super::json::{Json, Object, string};

fn wrapped(kind: &str, member: &str, op: Json, inputs: usize) -> OpKey {
    OpKey::new(Object::new().text_always("Type", kind).raw(member, op).end(), inputs)
}

fn input(index: Option<u32>) -> Json {
    Object::new().index("input", index).end()
}

/// The key of a merge.
pub fn merge_key(op: &MergeOp, inputs: usize) -> OpKey {
    let merge = Object::new().list("inputs", op.inputs.iter().map(|i| input(*i))).end();
    wrapped("buildkit.merge.v0", "Merge", merge, inputs)
}

/// The key of a diff.
pub fn diff_key(op: &DiffOp, inputs: usize) -> OpKey {
    let diff = Object::new()
        .raw("lower", input(op.lower))
        .raw("upper", input(op.upper))
        .end();
    wrapped("buildkit.diff.v0", "Diff", diff, inputs)
}

/// The key of a passthrough.
pub fn passthrough_key(op: &PassthroughOp, inputs: usize) -> OpKey {
    let outputs = op.outputs.iter().map(|o| o.to_string().into_bytes());
    let passthrough = Object::new().text("id", &op.id).list("outputs", outputs).end();
    wrapped("buildkit.passthrough.v0", "Passthrough", passthrough, inputs)
}

/// The key of a nested build.
pub fn build_key(op: &BuildOp, inputs: usize) -> OpKey {
    let by_name = (!op.inputs.is_empty()).then(|| {
        op.inputs
            .iter()
            .fold(Object::new(), |o, (name, index)| o.raw(name, input(*index)))
            .end()
    });
    let def = op.definition.as_ref().map(|d| {
        Object::new()
            .list("def", d.ops.iter().map(|bytes| string(&STANDARD.encode(bytes))))
            .end()
    });
    let attrs = (!op.attrs.is_empty()).then(|| texts(&op.attrs));
    let build = Object::new()
        .int("builder", op.builder)
        .opt("inputs", by_name)
        .opt("def", def)
        .opt("attrs", attrs)
        .end();
    wrapped("buildkit.build.v0", "Exec", build, inputs)
}

fn texts(map: &BTreeMap<String, String>) -> Json {
    map.iter()
        .fold(Object::new(), |o, (name, value)| o.text_always(name, value))
        .end()
}
