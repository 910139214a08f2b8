//! Logs of the daemon, and the trace service that clients hand their spans to.

use kiln_proto::otlp::trace_service_server::TraceService;
use kiln_proto::otlp::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use tonic::{Request, Response, Status};
use tracing_subscriber::EnvFilter;

/// Installs the one subscriber of the process; logs go to standard error.
pub fn install(level: &str, json: bool) {
    let filter = EnvFilter::builder().parse_lossy(match level {
        "trace" | "debug" | "info" | "warn" | "error" => format!("warn,kilnd={level},{}", rooms(level)),
        other => other.to_owned(),
    });
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    // A second installation in the same process (tests) changes nothing.
    let _ = if json {
        builder.json().try_init()
    } else {
        builder.with_ansi(false).try_init()
    };
}

fn rooms(level: &str) -> String {
    [
        "executor", "exporter", "frontend", "registry", "session", "solver", "store", "worker",
    ]
    .map(|room| format!("kiln_{room}={level}"))
    .join(",")
}

/// Accepts the spans that buildx exports over its connection and discards them: there is no collector.
#[derive(Debug, Default)]
pub struct Traces;

#[tonic::async_trait]
impl TraceService for Traces {
    async fn export(
        &self,
        _request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
