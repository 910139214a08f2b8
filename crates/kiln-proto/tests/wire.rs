//! Facts of the wire that clients depend on, checked on bytes and names.

use kiln_proto::{control, filesend_packets, filesync, fsutil, gateway, llb, worker};
use prost::Message as _;

#[test]
fn the_two_shapes_of_one_method_have_one_name() {
    assert_eq!(
        filesend_packets::file_send_server::SERVICE_NAME,
        "moby.filesync.v1.FileSend"
    );
    assert_eq!(filesync::file_send_server::SERVICE_NAME, "moby.filesync.v1.FileSend");
}

#[test]
fn names_of_services() {
    let names = [
        (control::control_server::SERVICE_NAME, "moby.buildkit.v1.Control"),
        (
            gateway::llb_bridge_server::SERVICE_NAME,
            "moby.buildkit.v1.frontend.LLBBridge",
        ),
        (filesync::file_sync_server::SERVICE_NAME, "moby.filesync.v1.FileSync"),
        (kiln_proto::auth::auth_server::SERVICE_NAME, "moby.filesync.v1.Auth"),
        (
            kiln_proto::secrets::secrets_server::SERVICE_NAME,
            "moby.buildkit.secrets.v1.Secrets",
        ),
        (kiln_proto::ssh::ssh_server::SERVICE_NAME, "moby.sshforward.v1.SSH"),
        (kiln_proto::upload::upload_server::SERVICE_NAME, "moby.upload.v1.Upload"),
        (
            kiln_proto::content::content_server::SERVICE_NAME,
            "containerd.services.content.v1.Content",
        ),
        (
            kiln_proto::otlp::trace_service_server::SERVICE_NAME,
            "opentelemetry.proto.collector.trace.v1.TraceService",
        ),
        (
            kiln_proto::policysession::policy_verifier_server::SERVICE_NAME,
            "moby.buildkit.v1.sourcepolicy.policysession.PolicyVerifier",
        ),
        (
            kiln_proto::exporter::exporter_server::SERVICE_NAME,
            "moby.exporter.v1.Exporter",
        ),
    ];
    for (ours, theirs) in names {
        assert_eq!(ours, theirs);
    }
}

#[test]
fn numbers_that_are_out_of_the_ordinary() {
    // Garbage collection and prune number the same members differently.
    let policy = worker::GcPolicy {
        reserved_space: 1,
        max_used_space: 2,
        min_free_space: 3,
        ..Default::default()
    };
    assert_eq!(policy.encode_to_vec(), [0x18, 1, 0x28, 2, 0x30, 3]);
    let prune = control::PruneRequest {
        reserved_space: 1,
        max_used_space: 2,
        min_free_space: 3,
        ..Default::default()
    };
    assert_eq!(prune.encode_to_vec(), [0x20, 1, 0x28, 2, 0x30, 3]);
    // A descriptor has no field 4.
    let descriptor = control::Descriptor {
        annotations: [("a".into(), "b".into())].into(),
        ..Default::default()
    };
    assert_eq!(descriptor.encode_to_vec().first(), Some(&(5 << 3 | 2)));
    // Results carry their metadata at 10 and attestations at 12.
    let result = gateway::Result {
        metadata: [("k".into(), "v".into())].into(),
        ..Default::default()
    };
    assert_eq!(result.encode_to_vec().first(), Some(&(10 << 3 | 2)));
    // Mount options begin at 19, file actions at 2.
    let mount = llb::Mount {
        tmpfs_opt: Some(llb::TmpfsOpt { size: 0 }),
        ..Default::default()
    };
    assert_eq!(mount.encode_to_vec(), [0x9a, 0x01, 0]);
    let op = llb::FileOp {
        actions: vec![llb::FileAction::default()],
    };
    assert_eq!(op.encode_to_vec(), [0x12, 0]);
}

#[test]
fn the_end_of_a_listing_is_a_packet_without_anything() {
    assert!(fsutil::Packet::default().encode_to_vec().is_empty());
}

#[test]
fn maps_are_encoded_in_order() {
    let attrs = ["z", "a", "m"].map(|key| (key.to_owned(), String::new()));
    let one = llb::SourceOp {
        identifier: String::new(),
        attrs: attrs.clone().into(),
    };
    let mut reversed = attrs;
    reversed.reverse();
    let other = llb::SourceOp {
        identifier: String::new(),
        attrs: reversed.into(),
    };
    assert_eq!(one.encode_to_vec(), other.encode_to_vec());
}
