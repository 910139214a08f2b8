//! `LLBBridge`: the calls of a frontend that runs on the client's side, as buildx and buildctl have it.
//!
//! A call finds its build by the metadata key `buildkit-controlapi-buildid`.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures::Stream;
use kiln_frontend::bridge::{
    Bridge as _, BridgeError, BridgeErrorKind, CacheImport, OciStore, ResolveImageOptions, SolveRequest, SourceSpec,
};
use kiln_llb::wire::{definition_from_proto, definition_to_proto, platform_from_proto};
use kiln_proto::gateway as pb;
use kiln_proto::gateway::llb_bridge_server::LlbBridge;
use kiln_proto::{caps, fsutil};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::Daemon;
use crate::bridge::BuildBridge;
use crate::builds::{Build, BuildRef, WAIT_FOR_BUILD};
use crate::results::{result_from_proto, result_to_proto};
use crate::status::WireError;

const BUILD_ID: &str = "buildkit-controlapi-buildid";

/// Serves `LLBBridge` on the daemon's own socket.
#[derive(Clone)]
pub struct Gateway(pub Arc<Daemon>);

impl Gateway {
    async fn bridge<T>(&self, request: &Request<T>) -> Result<BuildBridge, Status> {
        let mut ids = request.metadata().get_all(BUILD_ID).iter();
        let id = match (ids.next(), ids.next()) {
            (Some(id), None) => id
                .to_str()
                .map_err(|_| Status::invalid_argument("build id is not text"))?,
            _ => return Err(Status::invalid_argument(format!("exactly one {BUILD_ID} is needed"))),
        };
        let build = self.0.builds.wait(id, WAIT_FOR_BUILD).await?;
        Ok(BuildBridge::new(Arc::clone(&self.0), build))
    }
}

fn lookup(build: &Build, id: &str) -> Result<BuildRef, WireError> {
    build
        .lookup(id)
        .ok_or_else(|| WireError::new(Code::Unknown, format!("no such ref: {id}")))
}

/// The daemon's own error that a bridge error carries, or one made from its text.
pub fn wire_error(error: &BridgeError) -> WireError {
    if let Some(wire) = error.source.as_ref().and_then(|s| s.downcast_ref::<WireError>()) {
        return WireError {
            message: error.message.clone(),
            ..wire.clone()
        };
    }
    let code = match error.kind {
        BridgeErrorKind::NotFound => Code::NotFound,
        BridgeErrorKind::Canceled => Code::Cancelled,
        BridgeErrorKind::NotAnImage(_) | BridgeErrorKind::Other => Code::Unknown,
    };
    WireError::new(code, error.message.clone())
}

fn status(error: BridgeError) -> Status {
    wire_error(&error).into()
}

fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

fn api_caps(ids: &[&str]) -> Vec<caps::ApiCap> {
    ids.iter()
        .map(|id| caps::ApiCap {
            id: (*id).to_owned(),
            enabled: true,
            ..Default::default()
        })
        .collect()
}

type ExecStream = Pin<Box<dyn Stream<Item = Result<pb::ExecMessage, Status>> + Send>>;

#[tonic::async_trait]
impl LlbBridge for Gateway {
    async fn ping(&self, request: Request<pb::PingRequest>) -> Result<Response<pb::PongResponse>, Status> {
        self.bridge(&request).await?;
        Ok(Response::new(pb::PongResponse {
            frontend_api_caps: api_caps(kiln_llb::caps::FRONTEND_CAPS),
            llb_caps: api_caps(kiln_llb::caps::LLB_CAPS),
            workers: vec![self.0.worker_record()],
        }))
    }

    async fn solve(&self, request: Request<pb::SolveRequest>) -> Result<Response<pb::SolveResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        let request = request.into_inner();
        let solve = SolveRequest {
            definition: request
                .definition
                .as_ref()
                .map(definition_from_proto)
                .transpose()
                .map_err(invalid)?,
            frontend: request.frontend,
            frontend_attrs: request.frontend_opt,
            frontend_inputs: request
                .frontend_inputs
                .iter()
                .map(|(name, def)| Ok((name.clone(), definition_from_proto(def).map_err(invalid)?)))
                .collect::<Result<_, Status>>()?,
            cache_imports: request
                .cache_imports
                .into_iter()
                .map(|c| CacheImport {
                    kind: c.r#type,
                    attrs: c.attrs,
                })
                .collect(),
            evaluate: request.evaluate,
        };
        let result = bridge.solve(solve).await.map_err(status)?;
        Ok(Response::new(pb::SolveResponse {
            result: Some(result_to_proto(bridge.build(), &result)),
            ..Default::default()
        }))
    }

    async fn resolve_image_config(
        &self,
        request: Request<pb::ResolveImageConfigRequest>,
    ) -> Result<Response<pb::ResolveImageConfigResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        let request = request.into_inner();
        let store = (request.resolver_type == 1).then(|| OciStore {
            session_id: request.session_id.clone(),
            store_id: request.store_id.clone(),
        });
        let options = ResolveImageOptions {
            log_name: request.log_name,
            platform: request.platform.as_ref().map(platform_from_proto),
            resolve_mode: request.resolve_mode,
            store,
        };
        let image = bridge
            .resolve_image_config(&request.r#ref, options)
            .await
            .map_err(status)?;
        Ok(Response::new(pb::ResolveImageConfigResponse {
            digest: image.digest,
            config: image.config,
            r#ref: image.reference,
        }))
    }

    async fn resolve_source_meta(
        &self,
        request: Request<pb::ResolveSourceMetaRequest>,
    ) -> Result<Response<pb::ResolveSourceMetaResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        let request = request.into_inner();
        let source = request.source.ok_or_else(|| invalid("source is missing"))?;
        let spec = SourceSpec {
            identifier: source.identifier,
            attrs: source.attrs,
        };
        if let Some(reference) = spec.identifier.strip_prefix("docker-image://") {
            let options = ResolveImageOptions {
                log_name: request.log_name,
                platform: request.platform.as_ref().map(platform_from_proto),
                resolve_mode: request.resolve_mode,
                store: None,
            };
            let image = bridge.resolve_image_config(reference, options).await.map_err(status)?;
            let no_config = request.image.is_some_and(|i| i.no_config);
            return Ok(Response::new(pb::ResolveSourceMetaResponse {
                source: Some(kiln_proto::llb::SourceOp {
                    identifier: format!("docker-image://{}", image.reference),
                    attrs: spec.attrs,
                }),
                image: Some(pb::ResolveSourceImageResponse {
                    digest: image.digest,
                    config: if no_config { Bytes::new() } else { image.config },
                    attestation_chain: None,
                }),
                ..Default::default()
            }));
        }
        if let Some(reference) = spec.identifier.strip_prefix("oci-layout://") {
            let store = OciStore {
                session_id: spec.attrs.get("oci.session").cloned().unwrap_or_default(),
                store_id: spec.attrs.get("oci.store").cloned().unwrap_or_default(),
            };
            let options = ResolveImageOptions {
                log_name: request.log_name,
                platform: request.platform.as_ref().map(platform_from_proto),
                resolve_mode: request.resolve_mode,
                store: Some(store),
            };
            let image = bridge.resolve_image_config(reference, options).await.map_err(status)?;
            return Ok(Response::new(pb::ResolveSourceMetaResponse {
                source: Some(kiln_proto::llb::SourceOp {
                    identifier: spec.identifier,
                    attrs: spec.attrs,
                }),
                image: Some(pb::ResolveSourceImageResponse {
                    digest: image.digest,
                    config: image.config,
                    attestation_chain: None,
                }),
                ..Default::default()
            }));
        }
        let return_object = request.git.is_some_and(|g| g.return_object);
        let response = bridge
            .resolve_remote(spec, &request.log_name, return_object)
            .await
            .map_err(status)?;
        Ok(Response::new(response))
    }

    async fn read_file(&self, request: Request<pb::ReadFileRequest>) -> Result<Response<pb::ReadFileResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        let request = request.into_inner();
        let reference = lookup(bridge.build(), &request.r#ref)?;
        let range = match request.range {
            None => None,
            Some(r) => Some((
                u64::try_from(r.offset).map_err(|_| invalid("negative offset"))?,
                u64::try_from(r.length).map_err(|_| invalid("negative length"))?,
            )),
        };
        let data = bridge
            .read_file(Some(&reference), &request.file_path, range)
            .await
            .map_err(status)?;
        Ok(Response::new(pb::ReadFileResponse { data }))
    }

    async fn read_dir(&self, request: Request<pb::ReadDirRequest>) -> Result<Response<pb::ReadDirResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        let request = request.into_inner();
        let reference = lookup(bridge.build(), &request.r#ref)?;
        let include = (!request.include_pattern.is_empty()).then_some(request.include_pattern.as_str());
        let entries = bridge
            .read_dir(Some(&reference), &request.dir_path, include)
            .await
            .map_err(status)?;
        Ok(Response::new(pb::ReadDirResponse {
            entries: entries.into_iter().map(stat).collect(),
        }))
    }

    async fn stat_file(&self, request: Request<pb::StatFileRequest>) -> Result<Response<pb::StatFileResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        let request = request.into_inner();
        let reference = lookup(bridge.build(), &request.r#ref)?;
        let found = bridge
            .stat_file(Some(&reference), &request.path)
            .await
            .map_err(status)?;
        Ok(Response::new(pb::StatFileResponse {
            stat: Some(stat(found)),
        }))
    }

    async fn evaluate(&self, request: Request<pb::EvaluateRequest>) -> Result<Response<pb::EvaluateResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        let reference = lookup(bridge.build(), &request.into_inner().r#ref)?;
        bridge.evaluate(&reference).await?;
        Ok(Response::new(pb::EvaluateResponse {}))
    }

    async fn r#return(&self, request: Request<pb::ReturnRequest>) -> Result<Response<pb::ReturnResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        let request = request.into_inner();
        let outcome = match (request.result, request.error) {
            (Some(result), None) => Ok(result_from_proto(bridge.build(), result)?),
            (None, Some(error)) => Err(WireError::from_proto(error)),
            _ => return Err(invalid("exactly one of result and error is needed")),
        };
        bridge.build().set_returned(outcome)?;
        Ok(Response::new(pb::ReturnResponse {}))
    }

    async fn inputs(&self, request: Request<pb::InputsRequest>) -> Result<Response<pb::InputsResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        let definitions: BTreeMap<_, _> = bridge
            .build()
            .inputs
            .iter()
            .map(|(name, def)| (name.clone(), definition_to_proto(def)))
            .collect();
        Ok(Response::new(pb::InputsResponse { definitions }))
    }

    async fn warn(&self, request: Request<pb::WarnRequest>) -> Result<Response<pb::WarnResponse>, Status> {
        let bridge = self.bridge(&request).await?;
        bridge.warn_from_client(request.into_inner())?;
        Ok(Response::new(pb::WarnResponse {}))
    }

    async fn new_container(
        &self,
        _request: Request<pb::NewContainerRequest>,
    ) -> Result<Response<pb::NewContainerResponse>, Status> {
        Err(no_containers())
    }

    async fn release_container(
        &self,
        _request: Request<pb::ReleaseContainerRequest>,
    ) -> Result<Response<pb::ReleaseContainerResponse>, Status> {
        Err(no_containers())
    }

    type ExecProcessStream = ExecStream;

    async fn exec_process(
        &self,
        _request: Request<Streaming<pb::ExecMessage>>,
    ) -> Result<Response<Self::ExecProcessStream>, Status> {
        Err(no_containers())
    }

    async fn read_file_container(
        &self,
        _request: Request<pb::ReadFileRequest>,
    ) -> Result<Response<pb::ReadFileResponse>, Status> {
        Err(no_containers())
    }

    async fn read_dir_container(
        &self,
        _request: Request<pb::ReadDirRequest>,
    ) -> Result<Response<pb::ReadDirResponse>, Status> {
        Err(no_containers())
    }

    async fn stat_file_container(
        &self,
        _request: Request<pb::StatFileRequest>,
    ) -> Result<Response<pb::StatFileResponse>, Status> {
        Err(no_containers())
    }
}

/// `gateway.exec` is not advertised, so only a client that does not ask gets here.
fn no_containers() -> Status {
    Status::unimplemented("this daemon does not run containers for frontends (capability gateway.exec)")
}

fn stat(s: kiln_frontend::bridge::FileStat) -> fsutil::Stat {
    fsutil::Stat {
        path: s.path,
        mode: s.mode,
        uid: s.uid,
        gid: s.gid,
        size: s.size,
        mod_time: s.mod_time,
        linkname: s.linkname,
        ..Default::default()
    }
}
