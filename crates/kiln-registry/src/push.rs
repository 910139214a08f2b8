//! Pushing: nothing is sent that the registry already has; uploads go on after a break or start again.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use kiln_oci::{Descriptor, Digest, ImageRef};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, LOCATION, RANGE};
use reqwest::{Method, StatusCode};
use url::Url;

use crate::client::Client;
use crate::error::RegistryError;
use crate::host::{Endpoint, Lane};
use crate::scope::ScopeSet;
use crate::transport::{Answer, Call, Target, backoff};

/// The bytes of a blob from some offset on.
pub type ByteStream = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;

/// Where the bytes of pushed blobs come from.
#[async_trait]
pub trait BlobSource: Send + Sync {
    /// Opens `blob` at `offset`; called again, with another offset perhaps, when an upload has to be repeated.
    ///
    /// # Errors
    /// If the blob is not there or cannot be read.
    async fn open(&self, blob: &Descriptor, offset: u64) -> std::io::Result<ByteStream>;
}

/// How a blob came to be in the target repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushOutcome {
    /// It was there.
    Exists,
    /// It was mounted from another repository of the same registry.
    Mounted,
    /// It was uploaded.
    Uploaded,
}

/// An upload session at the registry.
struct Upload {
    location: Url,
    offset: u64,
}

impl Client {
    /// Makes sure that `target`'s repository has `blob`: looks for it, tries to mount it from `mount_from`
    /// (repositories of the same registry, without its name), and uploads it otherwise.
    ///
    /// # Errors
    /// When the registry refuses, cannot be reached, or `source` fails.
    pub async fn push_blob(
        &self,
        target: &ImageRef,
        blob: &Descriptor,
        mount_from: &[String],
        source: &dyn BlobSource,
    ) -> Result<PushOutcome, RegistryError> {
        let endpoint = self.origin(target.domain())?;
        let mut look = self.push_call(Method::HEAD, &endpoint, target, blob.digest);
        look.target = Target::Path(format!("/{}/blobs/{}", target.path(), blob.digest));
        let answer = self.send(&endpoint, &look).await?;
        match answer.status() {
            StatusCode::OK => return Ok(PushOutcome::Exists),
            // An answer holds its permit: it must be gone before the next request waits for one.
            StatusCode::NOT_FOUND => drop(answer),
            _ => return Err(self.status_error(&endpoint, &look, answer).await),
        }
        let retry = self.hosts.config().retry;
        let mut failures = 0;
        let mut chunked = false;
        let mut upload = None;
        loop {
            let current = match upload.take() {
                Some(u) => u,
                None => match self.start_upload(&endpoint, target, blob, mount_from).await? {
                    Some(u) => u,
                    None => return Ok(PushOutcome::Mounted),
                },
            };
            let location = current.location.clone();
            let result = if chunked {
                self.upload_chunks(&endpoint, target, blob, current, source).await
            } else {
                self.upload_whole(&endpoint, target, blob, current, source).await
            };
            let error = match result {
                Ok(()) => return Ok(PushOutcome::Uploaded),
                Err(error) => error,
            };
            // A body too large for a proxy on the way, or a connection that broke: smaller pieces.
            let too_large =
                matches!(&error, RegistryError::Status { status, .. } if *status == StatusCode::PAYLOAD_TOO_LARGE);
            let again = too_large
                || match &error {
                    RegistryError::Request { .. } => true,
                    RegistryError::PushDenied { .. } => failures == 0,
                    RegistryError::Status { status, .. } => {
                        status.is_server_error()
                            || matches!(
                                *status,
                                StatusCode::TOO_MANY_REQUESTS
                                    | StatusCode::NOT_FOUND
                                    | StatusCode::BAD_REQUEST
                                    | StatusCode::RANGE_NOT_SATISFIABLE
                            )
                    }
                    _ => false,
                };
            failures += 1;
            if !again || (chunked && too_large) || failures >= retry.attempts {
                return Err(error);
            }
            tracing::debug!(host = endpoint.host, digest = %blob.digest, %error, failures, "upload is tried again");
            tokio::time::sleep(backoff(&retry, failures)).await;
            chunked |= too_large || blob.size > self.hosts.config().upload_chunk;
            if too_large {
                continue;
            }
            if chunked {
                upload = self.upload_status(&endpoint, target, blob, location).await;
            } else if failures % 2 == 1 {
                // A registry that was too busy still has the upload, empty. Where that one is the trouble, every second
                // attempt opens another.
                upload = self
                    .upload_status(&endpoint, target, blob, location)
                    .await
                    .filter(|u| u.offset == 0);
            }
        }
    }

    fn push_call(&self, method: Method, endpoint: &Endpoint, target: &ImageRef, digest: Digest) -> Call {
        let mut call = Call::read(method, String::new(), target.path(), endpoint);
        call.scopes = ScopeSet::push(&endpoint.scope_name(target.path()));
        call.push = true;
        call.name = format!("{}@{digest}", target.name());
        call.what = format!("failed to push {}", call.name);
        call
    }

    /// Opens an upload, or returns `None` if the blob was mounted instead.
    async fn start_upload(
        &self,
        endpoint: &Endpoint,
        target: &ImageRef,
        blob: &Descriptor,
        mount_from: &[String],
    ) -> Result<Option<Upload>, RegistryError> {
        let base = format!("/{}/blobs/uploads/", target.path());
        let mut opened = None;
        for from in mount_from.iter().filter(|f| f.as_str() != target.path()) {
            let mut call = self.push_call(Method::POST, endpoint, target, blob.digest);
            let from_encoded: String = url::form_urlencoded::byte_serialize(from.as_bytes()).collect();
            let digest: String = url::form_urlencoded::byte_serialize(blob.digest.to_string().as_bytes()).collect();
            call.target = Target::Path(format!("{base}?mount={digest}&from={from_encoded}"));
            call.scopes = call.scopes.union(&ScopeSet::pull(&endpoint.scope_name(from)));
            call.body = Some(Bytes::new());
            match self.send(endpoint, &call).await {
                Ok(answer) if answer.status() == StatusCode::CREATED => return Ok(None),
                // Not mounted, an upload was opened instead; the next repository may still have it.
                Ok(answer) if answer.status() == StatusCode::ACCEPTED => {
                    opened = Some(self.upload_at(endpoint, &call, &answer)?);
                }
                // No right to read the other repository, or no mounts here: an upload always works.
                Ok(_) | Err(RegistryError::PushDenied { .. } | RegistryError::Token { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if opened.is_some() {
            return Ok(opened);
        }
        let mut call = self.push_call(Method::POST, endpoint, target, blob.digest);
        call.target = Target::Path(base);
        call.body = Some(Bytes::new());
        let answer = self.send(endpoint, &call).await?;
        let answer = self.expect(endpoint, &call, answer, &[StatusCode::ACCEPTED]).await?;
        self.upload_at(endpoint, &call, &answer).map(Some)
    }

    /// The upload that an answer's `Location` names.
    fn upload_at(&self, endpoint: &Endpoint, call: &Call, answer: &Answer) -> Result<Upload, RegistryError> {
        let location = answer
            .header(LOCATION.as_str())
            .and_then(|l| answer.response.url().join(l).ok());
        location
            .map(|location| Upload { location, offset: 0 })
            .ok_or_else(|| RegistryError::Protocol {
                what: call.what.clone(),
                host: endpoint.host.clone(),
                problem: "the answer names no upload location".to_owned(),
            })
    }

    /// How far an upload came, if the registry still knows it.
    async fn upload_status(
        &self,
        endpoint: &Endpoint,
        target: &ImageRef,
        blob: &Descriptor,
        location: Url,
    ) -> Option<Upload> {
        let mut call = self.push_call(Method::GET, endpoint, target, blob.digest);
        call.target = Target::Absolute(location);
        let limit = self.hosts.config().timeouts.headers;
        let answer = self.send_once(endpoint, &call, None, limit).await.ok()?;
        if answer.status() != StatusCode::NO_CONTENT {
            return None;
        }
        let mut upload = self.upload_at(endpoint, &call, &answer).ok()?;
        upload.offset = range_end(&answer)?;
        Some(upload)
    }

    /// The whole blob in one PUT.
    async fn upload_whole(
        &self,
        endpoint: &Endpoint,
        target: &ImageRef,
        blob: &Descriptor,
        upload: Upload,
        source: &dyn BlobSource,
    ) -> Result<(), RegistryError> {
        let mut call = self.push_call(Method::PUT, endpoint, target, blob.digest);
        call.target = Target::Absolute(finished_location(upload.location, blob.digest));
        let answer = self.send_stream(endpoint, call, blob, 0, blob.size, source).await?;
        let (call, answer) = answer;
        self.expect(endpoint, &call, answer, &[StatusCode::CREATED, StatusCode::NO_CONTENT])
            .await
            .map(|_| ())
    }

    /// The rest of the blob in pieces, and an empty PUT that ends the upload.
    async fn upload_chunks(
        &self,
        endpoint: &Endpoint,
        target: &ImageRef,
        blob: &Descriptor,
        mut upload: Upload,
        source: &dyn BlobSource,
    ) -> Result<(), RegistryError> {
        let size = self.hosts.config().upload_chunk.max(1);
        while upload.offset < blob.size {
            let length = size.min(blob.size - upload.offset);
            let mut call = self.push_call(Method::PATCH, endpoint, target, blob.digest);
            call.target = Target::Absolute(upload.location.clone());
            let range = format!("{}-{}", upload.offset, upload.offset + length - 1);
            if let Ok(value) = HeaderValue::from_str(&range) {
                call.headers.insert(CONTENT_RANGE, value);
            }
            let (call, answer) = self
                .send_stream(endpoint, call, blob, upload.offset, length, source)
                .await?;
            let answer = self
                .expect(endpoint, &call, answer, &[StatusCode::ACCEPTED, StatusCode::NO_CONTENT])
                .await?;
            let offset = range_end(&answer)
                .filter(|o| *o > upload.offset)
                .unwrap_or(upload.offset + length);
            upload = Upload {
                offset,
                ..self.upload_at(endpoint, &call, &answer)?
            };
        }
        let mut call = self.push_call(Method::PUT, endpoint, target, blob.digest);
        call.target = Target::Absolute(finished_location(upload.location, blob.digest));
        let commit = self.hosts.config().timeouts.commit;
        call.body = Some(Bytes::new());
        let answer = self.send_once(endpoint, &call, None, commit).await?;
        self.expect(endpoint, &call, answer, &[StatusCode::CREATED, StatusCode::NO_CONTENT])
            .await
            .map(|_| ())
    }

    /// Sends `length` bytes of the blob from `offset` on. Fails when no byte moves for the stall time, or when there is
    /// no answer within the commit time after the last byte.
    async fn send_stream(
        &self,
        endpoint: &Endpoint,
        mut call: Call,
        blob: &Descriptor,
        offset: u64,
        length: u64,
        source: &dyn BlobSource,
    ) -> Result<(Call, Answer), RegistryError> {
        let read_error = |source| RegistryError::Source {
            digest: blob.digest,
            source,
        };
        call.lane = Lane::Bulk;
        call.headers
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        call.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        let sent = Arc::new(AtomicU64::new(0));
        let broken = Arc::new(AtomicBool::new(false));
        let stream = source.open(blob, offset).await.map_err(read_error)?;
        let body = reqwest::Body::wrap_stream(cut(stream, length, sent.clone(), broken.clone()));
        let timeouts = self.hosts.config().timeouts;
        let mut request = Box::pin(self.send_once(endpoint, &call, Some(body), Duration::from_secs(86_400)));
        let mut seen = 0;
        let mut idle = Duration::ZERO;
        let step = (timeouts.stall / 4).max(Duration::from_millis(10));
        let result = loop {
            tokio::select! {
                result = &mut request => break result,
                () = tokio::time::sleep(step) => {}
            }
            let now = sent.load(Ordering::Relaxed);
            if now == seen {
                idle += step;
            } else {
                (seen, idle) = (now, Duration::ZERO);
            }
            let limit = if now >= length { timeouts.commit } else { timeouts.stall };
            if idle >= limit {
                break Err(RegistryError::Request {
                    method: call.method.to_string(),
                    url: match &call.target {
                        Target::Absolute(url) => crate::transport::plain_url(url),
                        Target::Path(path) => endpoint.url(path),
                    },
                    cause: format!("upload stood still for {} s", idle.as_secs_f32()),
                    source: None,
                });
            }
        };
        drop(request);
        if broken.load(Ordering::Relaxed) {
            let what = std::io::Error::other("the content store's reader failed or ended early");
            return Err(read_error(what));
        }
        Ok((call, result?))
    }

    /// Pushes a manifest or index: under its tag if `target` has one and no digest, else by digest. It is not sent if
    /// the registry already has exactly this under that name.
    ///
    /// # Errors
    /// When the registry refuses or cannot be reached.
    pub async fn push_manifest(
        &self,
        target: &ImageRef,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<PushOutcome, RegistryError> {
        let endpoint = self.origin(target.domain())?;
        let digest = Digest::of(bytes);
        let object = match (target.digest(), target.tag()) {
            (None, Some(tag)) => tag.to_owned(),
            _ => digest.to_string(),
        };
        let path = format!("/{}/manifests/{object}", target.path());
        let mut look = self.push_call(Method::HEAD, &endpoint, target, digest);
        look.target = Target::Path(path.clone());
        look.name = target.to_string();
        look.what = format!("failed to push manifest {}", look.name);
        if let Ok(value) = HeaderValue::from_str(media_type) {
            look.headers.insert(reqwest::header::ACCEPT, value);
        }
        let answer = self.send(&endpoint, &look).await?;
        match answer.status() {
            StatusCode::OK => {
                let there = answer
                    .header("docker-content-digest")
                    .and_then(|d| d.parse::<Digest>().ok());
                if there == Some(digest) {
                    return Ok(PushOutcome::Exists);
                }
                drop(answer);
            }
            StatusCode::NOT_FOUND => drop(answer),
            _ => return Err(self.status_error(&endpoint, &look, answer).await),
        }
        let mut call = look;
        call.method = Method::PUT;
        call.headers.clear();
        if let Ok(value) = HeaderValue::from_str(media_type) {
            call.headers.insert(CONTENT_TYPE, value);
        }
        call.body = Some(Bytes::copy_from_slice(bytes));
        let answer = self.send(&endpoint, &call).await?;
        self.expect(
            &endpoint,
            &call,
            answer,
            &[StatusCode::CREATED, StatusCode::OK, StatusCode::ACCEPTED],
        )
        .await
        .map(|_| PushOutcome::Uploaded)
    }
}

/// `location` with the digest that ends the upload.
fn finished_location(mut location: Url, digest: Digest) -> Url {
    location.query_pairs_mut().append_pair("digest", &digest.to_string());
    location
}

/// Bytes that the registry has, from its `Range: 0-<last>` header; `0-0` is read as nothing, as registries mean it.
fn range_end(answer: &Answer) -> Option<u64> {
    let last: u64 = answer.header(RANGE.as_str())?.rsplit('-').next()?.trim().parse().ok()?;
    Some(if last == 0 { 0 } else { last + 1 })
}

/// At most `length` bytes of `stream`, counted. A stream that fails or ends early sets `broken`.
fn cut(
    stream: ByteStream,
    length: u64,
    sent: Arc<AtomicU64>,
    broken: Arc<AtomicBool>,
) -> impl Stream<Item = std::io::Result<Bytes>> + Send {
    futures::stream::unfold((stream, length), move |(mut stream, left)| {
        let (sent, broken) = (sent.clone(), broken.clone());
        async move {
            if left == 0 {
                return None;
            }
            let fail = |e| {
                broken.store(true, Ordering::Relaxed);
                Err(e)
            };
            match stream.next().await {
                Some(Ok(mut bytes)) => {
                    bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                    let n = bytes.len() as u64;
                    sent.fetch_add(n, Ordering::Relaxed);
                    Some((Ok(bytes), (stream, left - n)))
                }
                Some(Err(e)) => Some((fail(e), (stream, 0))),
                None => Some((fail(std::io::ErrorKind::UnexpectedEof.into()), (stream, 0))),
            }
        }
    })
}
