//! The HTTP/2 client on a session's byte pipe, as the service that generated gRPC clients call.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, Uri};
use hyper::body::{Body as HttpBody, Frame, Incoming};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

/// What one stream may have in flight towards the daemon. The files of a build context come through one stream.
const STREAM_WINDOW: u32 = 4 << 20;

/// What all streams together may have in flight: as much as the protocol allows. Were it smaller, a few streams that
/// nobody reads for a while would use it up and starve every other call, health checks' neighbours included; the bound
/// on memory is [`STREAM_WINDOW`] for each open stream.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Sends requests over the pipe. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Channel(http2::SendRequest<tonic::body::Body>);

/// The connection itself: does the work when polled, ends when the pipe ends.
pub(crate) type Connection<T> = http2::Connection<TokioIo<T>, tonic::body::Body, TokioExecutor>;

/// The authority clients expect.
pub(crate) fn origin() -> Uri {
    Uri::from_static("http://localhost")
}

/// Starts HTTP/2 as a client on `pipe`; the preface is written at once.
pub(crate) async fn connect<T>(pipe: T) -> Result<(Channel, Connection<T>), hyper::Error>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // Every call that is dropped while data flows counts as a reset by us; with a limit, a session dies after some
        // hundred cancelled transfers.
        .max_local_error_reset_streams(None)
        .max_concurrent_reset_streams(1024)
        .handshake(TokioIo::new(pipe))
        .await?;
    Ok((Channel(sender), connection))
}

impl tower::Service<Request<tonic::body::Body>> for Channel {
    type Response = Response<Answer>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let response = self.0.send_request(request);
        Box::pin(async move {
            let (mut parts, body) = response.await?.into_parts();
            drop_malformed_details(&mut parts.headers);
            Ok(Response::from_parts(parts, Answer(body)))
        })
    }
}

/// A response body whose trailers are safe to decode.
#[derive(Debug)]
pub(crate) struct Answer(Incoming);

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let mut frame = ready!(Pin::new(&mut self.0).poll_frame(cx));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            drop_malformed_details(trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.0.size_hint()
    }
}

/// The gRPC library panics on status details that are not base64, and the client writes this header.
fn drop_malformed_details(headers: &mut HeaderMap) {
    const DETAILS: &str = "grpc-status-details-bin";
    const BASE64: GeneralPurpose = GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        GeneralPurposeConfig::new()
            .with_encode_padding(false)
            .with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let malformed = headers
        .get(DETAILS)
        .is_some_and(|value| BASE64.decode(value.as_bytes()).is_err());
    if malformed {
        headers.remove(DETAILS);
    }
}
