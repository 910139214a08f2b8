//! From a definition to a verified graph.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::definition::Definition;
use crate::error::LlbError;
use crate::graph::{Edge, Graph, Vertex, VertexDigest, vertex_digest};
use crate::op::{ExecOp, FileActionKind, FileOp, Op, UserOpt};
use crate::wire::{DecodedOp, decode_op};

/// No definition may have more operations: each takes memory before anything of it is looked at.
const MAX_OPS: usize = 1_000_000;

pub(crate) fn load(def: &Definition) -> Result<Graph, LlbError> {
    match def.ops.len() {
        0 => return Ok(Graph::from_parts(HashMap::new(), None, def.source_map.clone())),
        n if n > MAX_OPS => return Err(LlbError::TooLarge { limit: MAX_OPS }),
        _ => {}
    }
    let mut encoded: HashMap<VertexDigest, &Bytes> = HashMap::with_capacity(def.ops.len());
    for bytes in &def.ops {
        encoded.insert(vertex_digest(bytes), bytes);
    }
    if encoded.len() == 1 {
        return Err(LlbError::TooFewVertices(1));
    }
    let terminal = def.ops.last().map(|b| decode_op(b)).transpose()?;
    let root = match terminal.as_ref().map(|t| t.inputs.as_slice()) {
        Some([edge]) => *edge,
        Some(other) => return Err(LlbError::Terminal(other.len())),
        None => return Err(LlbError::TooFewVertices(0)),
    };
    let vertices = reachable(def, &encoded, root)?;
    check_outputs(&vertices, root)?;
    Ok(Graph::from_parts(vertices, Some(root), def.source_map.clone()))
}

/// Everything below `root`, each vertex once, with an explicit stack: chains may be as long as memory allows.
fn reachable(
    def: &Definition,
    encoded: &HashMap<VertexDigest, &Bytes>,
    root: Edge,
) -> Result<HashMap<VertexDigest, Arc<Vertex>>, LlbError> {
    let mut done: HashMap<VertexDigest, Arc<Vertex>> = HashMap::new();
    let mut stack = vec![root.vertex];
    while let Some(digest) = stack.pop() {
        if done.contains_key(&digest) {
            continue;
        }
        let bytes = encoded.get(&digest).ok_or_else(|| LlbError::MissingInput {
            vertex: digest.to_string(),
        })?;
        let DecodedOp {
            op,
            inputs,
            platform,
            constraints,
        } = decode_op(bytes)?;
        let op = op.ok_or_else(|| with_vertex(LlbError::invalid("llb", "op without a kind"), digest))?;
        check(&op, inputs.len()).map_err(|e| with_vertex(e, digest))?;
        stack.extend(inputs.iter().map(|e| e.vertex));
        let metadata = def.metadata.get(&digest).cloned().unwrap_or_default();
        let bytes = Bytes::clone(bytes);
        done.insert(
            digest,
            Arc::new(Vertex {
                digest,
                op,
                inputs,
                platform,
                constraints,
                metadata,
                bytes,
            }),
        );
    }
    // A vertex names its inputs by digest, so a cycle would need a hash collision: none is possible.
    Ok(done)
}

fn with_vertex(error: LlbError, digest: VertexDigest) -> LlbError {
    match error {
        LlbError::Invalid {
            kind,
            reason,
            vertex: None,
        } => LlbError::Invalid {
            kind,
            reason,
            vertex: Some(digest),
        },
        other => other,
    }
}

fn check_outputs(vertices: &HashMap<VertexDigest, Arc<Vertex>>, root: Edge) -> Result<(), LlbError> {
    let check = |edge: &Edge| match vertices.get(&edge.vertex) {
        Some(v) if edge.output < v.outputs() => Ok(()),
        Some(v) => Err(LlbError::Invalid {
            kind: "llb",
            reason: format!(
                "invalid output index {} of vertex {} with {} outputs",
                edge.output,
                v.digest,
                v.outputs()
            ),
            vertex: Some(v.digest),
        }),
        None => Err(LlbError::MissingInput {
            vertex: edge.vertex.to_string(),
        }),
    };
    check(&root)?;
    vertices.values().flat_map(|v| v.inputs.iter()).try_for_each(check)
}

fn check(op: &Op, inputs: usize) -> Result<(), LlbError> {
    match op {
        Op::Exec(e) => check_exec(e, inputs),
        Op::File(f) => check_file(f, inputs),
        Op::Source(s) if s.identifier.is_empty() => Err(LlbError::invalid("source", "no identifier")),
        Op::Source(s) if s.scheme().is_empty() => Err(LlbError::invalid(
            "source",
            format!("failed to parse identifier `{}`", s.identifier),
        )),
        Op::Source(_) => Ok(()),
        Op::Merge(m) => {
            if m.inputs.len() < 2 {
                return Err(LlbError::invalid("merge", "at least two inputs are required"));
            }
            m.inputs.iter().try_for_each(|i| in_range("merge", *i, inputs))
        }
        Op::Diff(d) => in_range("diff", d.lower, inputs).and_then(|()| in_range("diff", d.upper, inputs)),
        Op::Passthrough(p) => p.outputs.iter().try_for_each(|o| match u32::try_from(*o) {
            Ok(i) => in_range("passthrough", Some(i), inputs),
            Err(_) => Ok(()),
        }),
        Op::Build(b) => {
            if b.builder != -1 {
                return Err(LlbError::invalid("build", "only the daemon itself can build"));
            }
            b.inputs.values().try_for_each(|i| in_range("build", *i, inputs))
        }
    }
}

fn in_range(kind: &'static str, index: Option<u32>, inputs: usize) -> Result<(), LlbError> {
    match index {
        Some(i) if i as usize >= inputs => Err(LlbError::invalid(
            kind,
            format!("invalid input index {i}, there are {inputs} inputs"),
        )),
        _ => Ok(()),
    }
}

fn check_exec(e: &ExecOp, inputs: usize) -> Result<(), LlbError> {
    if e.meta.args.is_empty() {
        return Err(LlbError::invalid("exec", "no args"));
    }
    if e.mounts.is_empty() {
        return Err(LlbError::invalid("exec", "no mounts"));
    }
    if !e.mounts.iter().any(|m| m.dest == "/") {
        return Err(LlbError::invalid("exec", "no rootfs mount"));
    }
    e.mounts.iter().try_for_each(|m| in_range("exec", m.input, inputs))
}

fn check_file(f: &FileOp, inputs: usize) -> Result<(), LlbError> {
    if f.actions.is_empty() {
        return Err(LlbError::invalid("file", "no actions"));
    }
    for (k, a) in f.actions.iter().enumerate() {
        in_range("file", a.input, inputs + k)?;
        in_range("file", a.secondary_input, inputs + k)?;
        let owner = match &a.kind {
            FileActionKind::Copy(c) => c.owner.as_ref(),
            FileActionKind::MkFile(m) => m.owner.as_ref(),
            FileActionKind::MkDir(m) => m.owner.as_ref(),
            FileActionKind::Symlink(s) => s.owner.as_ref(),
            FileActionKind::Rm(_) => None,
        };
        for user in owner
            .into_iter()
            .flat_map(|o| [o.user.as_ref(), o.group.as_ref()])
            .flatten()
        {
            if let UserOpt::ByName { input, .. } = user {
                in_range("file", *input, inputs)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{CopyAction, FileAction, SourceOp};
    use crate::wire::{encode_op, encode_terminal};

    fn source(name: &str) -> (Bytes, Edge) {
        let op = Op::Source(SourceOp {
            identifier: name.into(),
            attrs: Default::default(),
        });
        let bytes = encode_op(&op, &[], None, &[]);
        let vertex = vertex_digest(&bytes);
        (bytes, Edge { vertex, output: 0 })
    }

    #[test]
    fn loads_what_the_root_reaches() {
        let (a, ea) = source("local://a");
        let (b, _) = source("local://unused");
        let def = Definition {
            ops: vec![a, b, encode_terminal(&ea)],
            ..Default::default()
        };
        let graph = Graph::load(&def).unwrap();
        assert_eq!(graph.root(), Some(ea));
        assert_eq!(graph.len(), 1);
        assert!(Graph::load(&Definition::default()).unwrap().root().is_none());
    }

    #[test]
    fn refuses_what_is_malformed() {
        let (a, ea) = source("local://a");
        let one = Definition {
            ops: vec![a.clone()],
            ..Default::default()
        };
        assert!(matches!(Graph::load(&one), Err(LlbError::TooFewVertices(1))));
        let missing = Definition {
            ops: vec![source("local://b").0, encode_terminal(&ea)],
            ..Default::default()
        };
        assert!(matches!(Graph::load(&missing), Err(LlbError::MissingInput { .. })));
        let bad_output = Definition {
            ops: vec![a.clone(), encode_terminal(&Edge { output: 3, ..ea })],
            ..Default::default()
        };
        assert!(matches!(Graph::load(&bad_output), Err(LlbError::Invalid { .. })));
        let garbage = Definition {
            ops: vec![a.clone(), Bytes::from_static(b"\xff\xff")],
            ..Default::default()
        };
        assert!(matches!(Graph::load(&garbage), Err(LlbError::Decode { .. })));
        let copy = Op::File(FileOp {
            actions: vec![FileAction {
                input: Some(0),
                secondary_input: Some(7),
                output: Some(0),
                kind: FileActionKind::Copy(CopyAction::default()),
            }],
        });
        let bytes = encode_op(&copy, &[ea], None, &[]);
        let edge = Edge {
            vertex: vertex_digest(&bytes),
            output: 0,
        };
        let def = Definition {
            ops: vec![a, bytes, encode_terminal(&edge)],
            ..Default::default()
        };
        assert!(matches!(Graph::load(&def), Err(LlbError::Invalid { kind: "file", .. })));
    }

    #[test]
    fn a_long_chain_needs_no_deep_stack() {
        let (first, mut edge) = source("local://a");
        let mut ops = vec![first];
        for i in 0..100_000u32 {
            let op = Op::Passthrough(crate::op::PassthroughOp {
                id: i.to_string(),
                outputs: vec![0],
            });
            let bytes = encode_op(&op, &[edge], None, &[]);
            edge = Edge {
                vertex: vertex_digest(&bytes),
                output: 0,
            };
            ops.push(bytes);
        }
        ops.push(encode_terminal(&edge));
        assert_eq!(
            Graph::load(&Definition {
                ops,
                ..Default::default()
            })
            .unwrap()
            .len(),
            100_001
        );
    }
}
