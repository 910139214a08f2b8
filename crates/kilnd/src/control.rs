//! `Control`: the daemon's front door.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::SystemTime;

use futures::{Stream, StreamExt as _};
use kiln_proto::control::control_server::Control;
use kiln_proto::control::{
    BuildHistoryEvent, BuildHistoryRequest, BytesMessage, DiskUsageRequest, DiskUsageResponse, InfoRequest,
    InfoResponse, ListWorkersRequest, ListWorkersResponse, PruneRequest, SolveRequest, SolveResponse, StatusRequest,
    StatusResponse, UpdateBuildHistoryRequest, UpdateBuildHistoryResponse, UsageRecord,
};
use kiln_proto::worker::WorkerRecord;
use kiln_session::session::SessionInfo;
use kiln_store::Tenant;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status, Streaming};

use crate::Daemon;
use crate::builds::WAIT_FOR_STATUS;
use crate::filter::Filter;
use crate::solve;
use crate::spool;
use crate::status::WireError;

/// Serves `Control`.
#[derive(Clone)]
pub struct Front(pub Arc<Daemon>);

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Response headers that clients read before the first message: our clock, by which they tell how long a build runs.
fn with_clock<T>(stream: BoxStream<T>) -> Response<BoxStream<T>> {
    let mut response = Response::new(stream);
    let now = jiff::Timestamp::try_from(SystemTime::now())
        .map(|t| t.to_string())
        .unwrap_or_default();
    if let Ok(value) = MetadataValue::try_from(now) {
        response.metadata_mut().insert("buildkit-current-timestamp", value);
    }
    response
}

fn io_status(error: &io::Error) -> Status {
    Status::internal(format!("failed to read build progress: {error}"))
}

#[tonic::async_trait]
impl Control for Front {
    async fn disk_usage(&self, request: Request<DiskUsageRequest>) -> Result<Response<DiskUsageResponse>, Status> {
        let request = request.into_inner();
        let record = crate::usage::list(&self.0, &request.filter, request.age_limit).await?;
        Ok(Response::new(DiskUsageResponse { record }))
    }

    type PruneStream = BoxStream<UsageRecord>;

    async fn prune(&self, request: Request<PruneRequest>) -> Result<Response<Self::PruneStream>, Status> {
        let removed = crate::usage::prune(&self.0, request.into_inner()).await?;
        Ok(Response::new(Box::pin(removed.map(|r| r.map_err(Status::from)))))
    }

    async fn solve(&self, request: Request<SolveRequest>) -> Result<Response<SolveResponse>, Status> {
        Ok(Response::new(solve::solve(&self.0, request.into_inner()).await?))
    }

    type StatusStream = BoxStream<StatusResponse>;

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<Self::StatusStream>, Status> {
        let reference = request.into_inner().r#ref;
        if let Some(build) = self.0.builds.get(&reference) {
            return Ok(with_clock(Box::pin(
                build.spool.follow().map(|m| m.map_err(|e| io_status(&e))),
            )));
        }
        if let Some(logs) = self.0.history.get(&reference).and_then(|r| r.logs) {
            let content = self.0.store().content(&Tenant::default());
            let log = logs.digest.parse().ok().and_then(|d| content.open(&d).ok());
            let log = log.ok_or_else(|| Status::not_found(format!("the log of {reference} is gone")))?;
            let frames = futures::stream::iter(spool::replay(log));
            return Ok(with_clock(Box::pin(frames.map(|m| m.map_err(|e| io_status(&e))))));
        }
        // The header goes out at once even when the build is yet to come: the client waits for it.
        let builds = self.0.builds.clone();
        Ok(with_clock(Box::pin(async_stream::try_stream! {
            let build = builds.wait(&reference, WAIT_FOR_STATUS).await?;
            let mut messages = Box::pin(build.spool.follow());
            drop(build);
            while let Some(message) = messages.next().await {
                yield message.map_err(|e| io_status(&e))?;
            }
        })))
    }

    type SessionStream = BoxStream<BytesMessage>;

    async fn session(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let headers = request.metadata().clone().into_headers();
        let info = SessionInfo::from_headers(&headers).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let inbound = request
            .into_inner()
            .map(|m| m.map(|m| m.data).map_err(io::Error::other));
        let outbound = self.0.sessions.accept(info, inbound);
        Ok(Response::new(Box::pin(outbound.map(|data| Ok(BytesMessage { data })))))
    }

    async fn list_workers(
        &self,
        request: Request<ListWorkersRequest>,
    ) -> Result<Response<ListWorkersResponse>, Status> {
        let filter =
            Filter::parse(&request.into_inner().filter).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let record = self.0.worker_record();
        let fields = |path: &str| worker_field(&record, path);
        let record = if filter.matches(&fields) {
            vec![record]
        } else {
            Vec::new()
        };
        Ok(Response::new(ListWorkersResponse { record }))
    }

    async fn info(&self, _request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse {
            buildkit_version: Some(crate::version()),
        }))
    }

    type ListenBuildHistoryStream = BoxStream<BuildHistoryEvent>;

    async fn listen_build_history(
        &self,
        request: Request<BuildHistoryRequest>,
    ) -> Result<Response<Self::ListenBuildHistoryStream>, Status> {
        let events = self.0.history.listen(request.into_inner())?;
        Ok(with_clock(Box::pin(events.map(|e| e.map_err(Status::from)))))
    }

    async fn update_build_history(
        &self,
        request: Request<UpdateBuildHistoryRequest>,
    ) -> Result<Response<UpdateBuildHistoryResponse>, Status> {
        let request = request.into_inner();
        let history = self.0.history.clone();
        blocking(move || {
            if request.delete {
                history.delete(&request.r#ref)
            } else if request.finalize {
                // Everything a record has is written before the build ends.
                Ok(())
            } else {
                history.pin(&request.r#ref, request.pinned)
            }
        })
        .await?;
        Ok(Response::new(UpdateBuildHistoryResponse {}))
    }
}

fn worker_field(record: &WorkerRecord, path: &str) -> Option<String> {
    match path {
        "id" => Some(record.id.clone()),
        _ => path
            .strip_prefix("labels.")
            .and_then(|label| record.labels.get(label).cloned()),
    }
}

/// Runs blocking work on a thread of its own.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WireError> + Send + 'static,
) -> Result<T, WireError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(WireError::new(
            tonic::Code::Internal,
            format!("a task of the daemon died: {error}"),
        )),
    }
}
