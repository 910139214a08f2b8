//! What a graph may ask for: checked when it is loaded, before anything of it is solved.

use std::collections::BTreeSet;

use kiln_llb::op::{NetMode, SecurityMode};
use kiln_llb::{Graph, Op, Vertex, caps};
use tonic::Code;

use crate::status::{WireError, vertex_detail};

/// Entitlements Kiln knows.
pub const NETWORK_HOST: &str = "network.host";
/// See [`NETWORK_HOST`].
pub const SECURITY_INSECURE: &str = "security.insecure";

/// What one build may ask for.
#[derive(Clone, Debug, Default)]
pub struct Entitlements(BTreeSet<String>);

impl Entitlements {
    /// What the client requests, all of which the daemon must allow.
    pub fn grant(requested: &[String], allowed: &[String]) -> Result<Self, WireError> {
        let mut granted = BTreeSet::new();
        for name in requested {
            let plain = name.split('=').next().unwrap_or(name);
            match plain {
                NETWORK_HOST | SECURITY_INSECURE => {}
                "device" => {
                    return Err(WireError::new(
                        Code::Unknown,
                        format!("granting entitlement {plain} is not allowed by build daemon configuration"),
                    ));
                }
                other => return Err(WireError::invalid(format!("invalid entitlement {other}"))),
            }
            if !allowed.iter().any(|a| a == plain) {
                return Err(WireError::new(
                    Code::Unknown,
                    format!("granting entitlement {plain} is not allowed by build daemon configuration"),
                ));
            }
            granted.insert(plain.to_owned());
        }
        Ok(Self(granted))
    }

    /// Checks every vertex of a graph.
    pub fn check(&self, graph: &Graph) -> Result<(), WireError> {
        graph.vertices().try_for_each(|v| self.check_vertex(v))
    }

    fn check_vertex(&self, vertex: &Vertex) -> Result<(), WireError> {
        for (id, needed) in &vertex.metadata.caps {
            if *needed && !caps::supported(id) {
                return Err(WireError::new(
                    Code::Unimplemented,
                    format!("unsupported llb capability {id}: unknown or disabled in this daemon"),
                )
                .with(vertex_detail(&vertex.digest)));
            }
        }
        let Op::Exec(exec) = &vertex.op else { return Ok(()) };
        if exec.network == NetMode::Host {
            self.need(NETWORK_HOST, vertex)?;
        }
        if exec.security == SecurityMode::Insecure {
            self.need(SECURITY_INSECURE, vertex)?;
        }
        if let Some(device) = exec.cdi_devices.iter().find(|d| !d.optional) {
            return Err(WireError::new(
                Code::PermissionDenied,
                format!("device {} is requested by the build but not allowed", device.name),
            )
            .with(vertex_detail(&vertex.digest)));
        }
        Ok(())
    }

    fn need(&self, name: &str, vertex: &Vertex) -> Result<(), WireError> {
        if self.0.contains(name) {
            return Ok(());
        }
        Err(WireError::new(Code::PermissionDenied, format!("{name} is not allowed"))
            .with(vertex_detail(&vertex.digest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_llb::op::{ExecMeta, ExecMount, ExecOp};
    use kiln_llb::wire::{encode_op, encode_terminal};
    use kiln_llb::{Definition, Edge, OpMetadata, vertex_digest};

    fn graph(exec: ExecOp, metadata: OpMetadata) -> Graph {
        let bytes = encode_op(&Op::Exec(exec), &[], None, &[]);
        let vertex = vertex_digest(&bytes);
        let def = Definition {
            ops: vec![bytes, encode_terminal(&Edge { vertex, output: 0 })],
            metadata: [(vertex, metadata)].into(),
            ..Default::default()
        };
        Graph::load(&def).unwrap()
    }

    fn exec() -> ExecOp {
        ExecOp {
            meta: ExecMeta {
                args: vec!["true".into()],
                ..Default::default()
            },
            mounts: vec![ExecMount {
                dest: "/".into(),
                output: Some(0),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn an_entitlement_needs_both_the_daemon_and_the_client() {
        let wants = |names: &[&str]| names.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        assert!(Entitlements::grant(&wants(&["network.host"]), &[]).is_err());
        assert!(Entitlements::grant(&wants(&["nonsense"]), &wants(&["nonsense"])).is_err());
        let host = graph(
            ExecOp {
                network: NetMode::Host,
                ..exec()
            },
            OpMetadata::default(),
        );
        let insecure = graph(
            ExecOp {
                security: SecurityMode::Insecure,
                ..exec()
            },
            OpMetadata::default(),
        );
        let none = Entitlements::default();
        assert_eq!(none.check(&host).unwrap_err().message, "network.host is not allowed");
        assert_eq!(
            none.check(&insecure).unwrap_err().message,
            "security.insecure is not allowed"
        );
        let granted = Entitlements::grant(&wants(&["network.host"]), &wants(&["network.host"])).unwrap();
        assert!(granted.check(&host).is_ok());
        assert!(granted.check(&insecure).is_err());
    }

    #[test]
    fn an_unknown_capability_is_refused() {
        let meta = OpMetadata {
            caps: [("exec.meta.base".into(), true), ("no.such.cap".into(), true)].into(),
            ..Default::default()
        };
        assert_eq!(
            Entitlements::default().check(&graph(exec(), meta)).unwrap_err().code,
            Code::Unimplemented
        );
    }
}
