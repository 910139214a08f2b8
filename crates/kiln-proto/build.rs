//! Compiles the .proto files of this repository with protox, so a checkout builds without protoc.

use std::{env, error::Error, path::PathBuf};

const FILES: &[&str] = &[
    "auth.proto",
    "caps.proto",
    "content.proto",
    "control.proto",
    "exporter.proto",
    "filesync.proto",
    "fsutil.proto",
    "gateway.proto",
    "google/rpc/status.proto",
    "ops.proto",
    "policysession.proto",
    "secrets.proto",
    "sourcepolicy.proto",
    "ssh.proto",
    "trace.proto",
    "upload.proto",
    "worker.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(FILES, [&root])?;
    tonic_prost_build::configure()
        .bytes(".")
        // Maps in order: what is encoded twice gives the same bytes twice.
        .btree_map(".")
        .include_file("packages.rs")
        .compile_fds(descriptors)?;

    // The second shape of FileSend.DiffCopy: packets on the method path that carries bytes in file mode.
    let diff_copy = tonic_prost_build::manual::Method::builder()
        .name("diff_copy")
        .route_name("DiffCopy")
        .input_type("crate::fsutil::Packet")
        .output_type("crate::fsutil::Packet")
        .codec_path("tonic_prost::ProstCodec")
        .client_streaming()
        .server_streaming()
        .build();
    let file_send = tonic_prost_build::manual::Service::builder()
        .name("FileSend")
        .package("moby.filesync.v1")
        .method(diff_copy)
        .build();
    tonic_prost_build::manual::Builder::new().compile(&[file_send]);
    Ok(())
}
