//! Blobs as streams: resumed by range after a break, checked against size and digest at their end.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kiln_oci::{Digest, Hasher, ImageRef};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};

use crate::client::Client;
use crate::error::{RegistryError, innermost};
use crate::host::{Endpoint, Lane};
use crate::resolve::Failures;
use crate::transport::{Answer, Call, backoff, plain_url};

/// Progress after which earlier breaks of a transfer are forgotten, in bytes.
const FORGIVE_AFTER: u64 = 256 << 10;

impl Client {
    /// Opens a blob for reading. Nothing is sent before the first [`BlobReader::chunk`].
    ///
    /// # Errors
    /// Only if the configuration of the registry is unusable.
    pub fn fetch_blob(
        &self,
        repository: &ImageRef,
        digest: Digest,
        size: Option<u64>,
    ) -> Result<BlobReader, RegistryError> {
        Ok(BlobReader {
            client: self.clone(),
            endpoints: self.readers(repository.domain(), Some(digest))?,
            at: 0,
            repository: repository.path().to_owned(),
            name: format!("{}@{digest}", repository.name()),
            digest,
            size,
            lane: Lane::Bulk,
            offset: 0,
            hasher: Some(Hasher::new()),
            ended: false,
            answer: None,
            failures: 0,
            failed_at: 0,
            best: None,
        })
    }

    /// Opens a blob at `offset` for a caller that checks size and digest by itself.
    ///
    /// # Errors
    /// Only if the configuration of the registry is unusable.
    pub fn fetch_blob_from(
        &self,
        repository: &ImageRef,
        digest: Digest,
        size: Option<u64>,
        offset: u64,
    ) -> Result<BlobReader, RegistryError> {
        let mut reader = self.fetch_blob(repository, digest, size)?;
        // With several hosts it matters which of them lied, so the digest is checked here too where that is possible.
        if offset > 0 || reader.endpoints.len() < 2 {
            reader.hasher = None;
        }
        reader.offset = offset;
        reader.failed_at = offset;
        Ok(reader)
    }

    /// A whole small blob (a config, an attestation), checked. Uses the permit kept for small documents if need be.
    ///
    /// # Errors
    /// As [`BlobReader::chunk`], and if it is larger than `limit` bytes.
    pub async fn fetch_small_blob(
        &self,
        repository: &ImageRef,
        digest: Digest,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let mut last = None;
        for _ in 0..self.readers(repository.domain(), Some(digest))?.len() {
            let mut reader = self.fetch_blob(repository, digest, None)?;
            reader.lane = Lane::Small;
            match reader.read_to_end(limit).await {
                Ok(bytes) => return Ok(bytes),
                Err(error @ RegistryError::DigestMismatch { .. }) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| RegistryError::Config {
            host: repository.domain().to_owned(),
            what: "no endpoint".to_owned(),
        }))
    }

    /// Whether the origin of `repository` has a blob.
    ///
    /// # Errors
    /// If the host cannot be asked.
    pub async fn has_blob(&self, repository: &ImageRef, digest: Digest) -> Result<bool, RegistryError> {
        Ok(self
            .blob_size_at(&*self.origin(repository.domain())?, repository, digest)
            .await?
            .is_some())
    }

    /// The length of a blob in bytes, asked from mirrors and origin; `None` if none of them has it.
    ///
    /// # Errors
    /// If no host can be asked.
    pub async fn blob_size(&self, repository: &ImageRef, digest: Digest) -> Result<Option<u64>, RegistryError> {
        let readers = self.readers(repository.domain(), Some(digest))?;
        let mut failures = Failures::default();
        let mut refused = false;
        for endpoint in &readers {
            match self.blob_size_at(endpoint, repository, digest).await {
                Ok(Some(size)) => return Ok(Some(size)),
                Ok(None) => refused = true,
                Err(error) => failures.add(endpoint, error),
            }
        }
        if refused { Ok(None) } else { Err(failures.into_error()) }
    }

    async fn blob_size_at(
        &self,
        endpoint: &Endpoint,
        repository: &ImageRef,
        digest: Digest,
    ) -> Result<Option<u64>, RegistryError> {
        let path = format!("/{}/blobs/{digest}", repository.path());
        let mut call = Call::read(Method::HEAD, path, repository.path(), endpoint);
        call.name = format!("{}@{digest}", repository.name());
        call.what = format!("failed to look for blob {}", call.name);
        let answer = self.send(endpoint, &call).await?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer = self.expect(endpoint, &call, answer, &[StatusCode::OK]).await?;
        let size = answer.header(CONTENT_LENGTH.as_str()).and_then(|v| v.parse().ok());
        size.map(Some).ok_or_else(|| RegistryError::Protocol {
            what: call.what,
            host: endpoint.host.clone(),
            problem: "the answer does not tell the size".to_owned(),
        })
    }
}

/// A blob that is being read.
#[derive(Debug)]
pub struct BlobReader {
    client: Client,
    endpoints: Vec<Arc<Endpoint>>,
    /// Endpoint in use.
    at: usize,
    repository: String,
    name: String,
    digest: Digest,
    size: Option<u64>,
    lane: Lane,
    offset: u64,
    /// `None` if the caller checks the digest.
    hasher: Option<Hasher>,
    /// The end was seen and found right.
    ended: bool,
    answer: Option<Answer>,
    failures: u32,
    failed_at: u64,
    best: Option<RegistryError>,
}

impl BlobReader {
    /// Bytes handed out so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next bytes, or `None` after the last one, when size and digest have been found right. Broken transfers are
    /// resumed where they broke, on the same host and then on the next one. Cancel-safe.
    ///
    /// # Errors
    /// When every host failed, or when the bytes are not those the digest names. After a mismatch the client asks other
    /// hosts first when the blob is opened again.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let stall = self.client.hosts.config().timeouts.stall;
        loop {
            if self.ended {
                return Ok(None);
            }
            let error = match &mut self.answer {
                None => match self.open().await {
                    Ok(answer) => {
                        self.answer = Some(answer);
                        continue;
                    }
                    Err(error) => {
                        self.next_host(error)?;
                        continue;
                    }
                },
                Some(answer) => match next_chunk(answer, stall).await {
                    Ok(Some(chunk)) if chunk.is_empty() => continue,
                    Ok(Some(chunk)) => return self.accept(chunk).map(Some),
                    Ok(None) if self.size.is_none_or(|s| self.offset >= s) => return self.finish().map(|()| None),
                    Ok(None) => RegistryError::SizeMismatch {
                        what: self.what(),
                        host: self.host(),
                        expected: self.size.unwrap_or_default(),
                        actual: self.offset,
                    },
                    Err(error) => error,
                },
            };
            self.answer = None;
            if self.offset >= self.failed_at + FORGIVE_AFTER {
                self.failures = 0;
            }
            self.failed_at = self.offset;
            self.failures += 1;
            let retry = self.client.hosts.config().retry;
            if self.failures >= retry.attempts {
                self.failures = 0;
                self.next_host(error)?;
            } else {
                tracing::debug!(%error, offset = self.offset, "blob transfer is resumed");
                tokio::time::sleep(backoff(&retry, self.failures)).await;
            }
        }
    }

    /// The whole blob.
    ///
    /// # Errors
    /// As [`Self::chunk`], and if it is larger than `limit` bytes.
    pub async fn read_to_end(&mut self, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let mut out = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            if out.len() as u64 + chunk.len() as u64 > limit {
                let problem = format!("more than {limit} bytes");
                return Err(RegistryError::Protocol {
                    what: self.what(),
                    host: self.host(),
                    problem,
                });
            }
            out.extend_from_slice(&chunk);
        }
        Ok(out)
    }

    fn what(&self) -> String {
        format!("failed to fetch blob {}", self.name)
    }

    fn host(&self) -> String {
        self.endpoints.get(self.at).map(|e| e.host.clone()).unwrap_or_default()
    }

    fn accept(&mut self, chunk: Bytes) -> Result<Bytes, RegistryError> {
        let end = self.offset + chunk.len() as u64;
        if let Some(expected) = self.size.filter(|s| end > *s) {
            self.client.remember_liar(&self.host(), self.digest);
            return Err(RegistryError::SizeMismatch {
                what: self.what(),
                host: self.host(),
                expected,
                actual: end,
            });
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&chunk);
        }
        self.offset = end;
        Ok(chunk)
    }

    fn finish(&mut self) -> Result<(), RegistryError> {
        self.answer = None;
        let Some(hasher) = self.hasher.take() else {
            return Ok(());
        };
        let actual = hasher.finish();
        if actual == self.digest {
            return Ok(());
        }
        self.client.remember_liar(&self.host(), self.digest);
        Err(RegistryError::DigestMismatch {
            what: self.what(),
            host: self.host(),
            expected: self.digest,
            actual,
        })
    }

    /// Goes on to the next host, or fails with the most telling error.
    fn next_host(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        self.at += 1;
        if self.best.as_ref().is_none_or(|b| error.rank() >= b.rank()) {
            self.best = Some(error);
        }
        if self.at < self.endpoints.len() {
            return Ok(());
        }
        self.at = 0;
        match self.best.take() {
            Some(best) => Err(best),
            None => Ok(()),
        }
    }

    /// Asks the current host for the rest.
    async fn open(&mut self) -> Result<Answer, RegistryError> {
        let Some(endpoint) = self.endpoints.get(self.at).cloned() else {
            return Err(RegistryError::Config {
                host: String::new(),
                what: "no endpoint".to_owned(),
            });
        };
        let path = format!("/{}/blobs/{}", self.repository, self.digest);
        let mut call = Call::read(Method::GET, path, &self.repository, &endpoint);
        call.lane = self.lane;
        call.name.clone_from(&self.name);
        call.what = self.what();
        if self.offset > 0
            && let Ok(value) = HeaderValue::from_str(&format!("bytes={}-", self.offset))
        {
            call.headers.insert(RANGE, value);
        }
        let answer = self.client.send(&endpoint, &call).await?;
        let good = [StatusCode::OK, StatusCode::PARTIAL_CONTENT];
        let mut answer = self.client.expect(&endpoint, &call, answer, &good).await?;
        let protocol = |problem: String| RegistryError::Protocol {
            what: call.what.clone(),
            host: endpoint.host.clone(),
            problem,
        };
        if answer.status() == StatusCode::PARTIAL_CONTENT {
            let text = answer.header(CONTENT_RANGE.as_str()).unwrap_or_default().to_owned();
            let start = text
                .strip_prefix("bytes ")
                .and_then(|r| r.split('-').next())
                .and_then(|s| s.parse().ok());
            if start != Some(self.offset) {
                return Err(protocol(format!(
                    "asked for bytes from {}, got range `{text}`",
                    self.offset
                )));
            }
            return Ok(answer);
        }
        // The host does not know ranges: what we have already is read again and dropped.
        let stall = self.client.hosts.config().timeouts.stall;
        let mut skip = self.offset;
        while skip > 0 {
            let Some(chunk) = next_chunk(&mut answer, stall).await? else {
                return Err(protocol(format!("ended before byte {}", self.offset)));
            };
            let n = chunk.len() as u64;
            if n > skip {
                answer.leftover = Some(chunk.slice(usize::try_from(skip).unwrap_or(chunk.len())..));
                return Ok(answer);
            }
            skip -= n;
        }
        Ok(answer)
    }
}

/// The next bytes of an answer; a peer silent for `stall` is an error of kind [`RegistryError::Request`].
pub(crate) async fn next_chunk(answer: &mut Answer, stall: Duration) -> Result<Option<Bytes>, RegistryError> {
    if let Some(bytes) = answer.leftover.take() {
        return Ok(Some(bytes));
    }
    let url = answer.response.url().clone();
    let fail = |cause: String, source| RegistryError::Request {
        method: "GET".to_owned(),
        url: plain_url(&url),
        cause,
        source,
    };
    match tokio::time::timeout(stall, answer.response.chunk()).await {
        Ok(Ok(chunk)) => Ok(chunk),
        Ok(Err(e)) => {
            let e = e.without_url();
            Err(fail(innermost(&e), Some(e)))
        }
        Err(_) => Err(fail(format!("no data for {} s", stall.as_secs_f32()), None)),
    }
}
