//! What travels on the wire, generated from `proto/`; nothing here is written by hand.
//!
//! The packages nest as protobuf names them; the modules below give each its short name, and that is how the other rooms
//! call them: [`control`] (the daemon's front door), [`gateway`] (the frontend's bridge), [`llb`] (build graphs),
//! [`worker`], [`caps`], [`sourcepolicy`], and what the daemon asks of its client over the session: [`filesync`],
//! [`filesend_packets`], [`fsutil`], [`auth`], [`secrets`], [`ssh`], [`upload`], [`content`], [`policysession`],
//! [`exporter`]. [`otlp`] is trace collection and [`rpc`] the error status.
//!
//! Every service has its client and its server. `bytes` fields are [`bytes::Bytes`] (no copy on decoding), maps are
//! ordered, so encoding is stable. Unknown fields are lost on re-encoding: hash and keep received bytes.
//!
//! Deliberately absent: conversions (each room has its own `wire.rs`), the health service (`tonic-health`).

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, rustdoc::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/packages.rs"));
}

/// `FileSend.DiffCopy` as it is when a directory is exported: [`fsutil::Packet`] in both directions, on the same method
/// path that carries [`filesync::BytesMessage`] for a file.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, rustdoc::all)]
pub mod filesend_packets {
    include!(concat!(env!("OUT_DIR"), "/moby.filesync.v1.FileSend.rs"));
}

#[doc(inline)]
pub use generated::{
    containerd::services::content::v1 as content,
    fsutil::types as fsutil,
    google::rpc,
    moby::{
        buildkit::secrets::v1 as secrets,
        buildkit::v1 as control,
        buildkit::v1::{
            apicaps as caps, frontend as gateway, sourcepolicy, sourcepolicy::policysession, types as worker,
        },
        exporter::v1 as exporter,
        filesync::v1 as filesync,
        sshforward::v1 as ssh,
        upload::v1 as upload,
    },
    opentelemetry::proto::collector::trace::v1 as otlp,
    pb as llb,
};

/// Registry credentials and tokens; on the wire the package of [`filesync`].
pub mod auth {
    #[doc(inline)]
    pub use super::generated::moby::filesync::v1::{
        CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse, GetTokenAuthorityRequest,
        GetTokenAuthorityResponse, VerifyTokenAuthorityRequest, VerifyTokenAuthorityResponse, auth_client, auth_server,
    };
}

pub use prost_types::{Any, Timestamp};
