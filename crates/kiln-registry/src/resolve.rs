//! From a reference to a descriptor, and manifests by reference or digest.

use kiln_oci::media_type::{self, MANIFEST_ACCEPT};
use kiln_oci::{Descriptor, Digest, ImageRef};
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};

use crate::client::Client;
use crate::error::RegistryError;
use crate::host::Endpoint;
use crate::transport::{Answer, Call};

/// Largest manifest or index that is read, in bytes.
pub const MAX_MANIFEST: u64 = 8 << 20;

/// What a reference stands for at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Type, digest and size of the manifest or index.
    pub descriptor: Descriptor,
    /// Host that answered: a mirror or the origin.
    pub host: String,
    /// The bytes, if resolving had to fetch them.
    pub bytes: Option<Vec<u8>>,
}

impl Client {
    /// Asks mirrors in order, then the origin, what `reference` stands for. With a digest the tag is not looked at.
    ///
    /// # Errors
    /// If no host knows it; of several hosts' errors the most telling one.
    pub async fn resolve(&self, reference: &ImageRef) -> Result<Resolved, RegistryError> {
        let readers = self.readers(reference.domain(), reference.digest())?;
        let mut failures = Failures::default();
        for endpoint in &readers {
            match self.resolve_at(endpoint, reference).await {
                Ok(found) => return Ok(found),
                Err(error) => failures.add(endpoint, error),
            }
        }
        Err(failures.into_error())
    }

    async fn resolve_at(&self, endpoint: &Endpoint, reference: &ImageRef) -> Result<Resolved, RegistryError> {
        let call = manifest_call(Method::HEAD, endpoint, reference, &reference.object());
        let answer = self.send(endpoint, &call).await?;
        if answer.status() == StatusCode::OK {
            let digest = answer
                .header("docker-content-digest")
                .and_then(|d| d.parse::<Digest>().ok());
            let size = answer.response.headers().get(CONTENT_LENGTH);
            let size = size.and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
            let kind = content_type(&answer);
            if let (Some(digest), Some(size), true) = (reference.digest().or(digest), size, is_known(&kind)) {
                let descriptor = Descriptor::new(kind, digest, size);
                return Ok(Resolved {
                    descriptor,
                    host: endpoint.host.clone(),
                    bytes: None,
                });
            }
            drop(answer);
        } else if !matches!(
            answer.status(),
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST
        ) {
            let answer = self.expect(endpoint, &call, answer, &[]).await;
            return Err(answer.err().unwrap_or_else(|| not_found(endpoint, reference)));
        } else {
            drop(answer);
        }
        // Some registries refuse HEAD or leave half of the answer out; a GET gives the same and more. The first answer's
        // permit is back by now.
        self.get_at(endpoint, reference, reference.digest()).await
    }

    /// The manifest or index with this digest, checked against it.
    ///
    /// # Errors
    /// As [`Client::resolve`], and if a host sends other bytes than the digest names.
    pub async fn fetch_manifest(&self, repository: &ImageRef, digest: Digest) -> Result<Resolved, RegistryError> {
        let reference = repository.clone().with_digest(digest);
        let readers = self.readers(reference.domain(), Some(digest))?;
        let mut failures = Failures::default();
        for endpoint in &readers {
            match self.get_at(endpoint, &reference, Some(digest)).await {
                Ok(found) => return Ok(found),
                Err(error) => failures.add(endpoint, error),
            }
        }
        Err(failures.into_error())
    }

    async fn get_at(
        &self,
        endpoint: &Endpoint,
        reference: &ImageRef,
        wanted: Option<Digest>,
    ) -> Result<Resolved, RegistryError> {
        let object = wanted.map_or_else(|| reference.object(), |d| d.to_string());
        let call = manifest_call(Method::GET, endpoint, reference, &object);
        let retry = self.hosts.config().retry;
        let mut failures = 0;
        loop {
            let answer = self.send(endpoint, &call).await?;
            let answer = self.expect(endpoint, &call, answer, &[StatusCode::OK]).await?;
            let mut kind = content_type(&answer);
            let named = answer
                .header("docker-content-digest")
                .and_then(|d| d.parse::<Digest>().ok());
            let bytes = match self.read_small(endpoint, &call, answer, MAX_MANIFEST).await {
                Ok(bytes) => bytes,
                Err(error) if matches!(error, RegistryError::Request { .. }) && failures + 1 < retry.attempts => {
                    failures += 1;
                    tokio::time::sleep(crate::transport::backoff(&retry, failures)).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let actual = Digest::of(&bytes);
            if let Some(expected) = wanted.or(named)
                && expected != actual
            {
                return Err(RegistryError::DigestMismatch {
                    what: call.what,
                    host: endpoint.host.clone(),
                    expected,
                    actual,
                });
            }
            if !is_known(&kind) {
                kind = sniff(&bytes).unwrap_or(kind);
            }
            if kind == media_type::DOCKER_SCHEMA1 || !is_known(&kind) {
                return Err(RegistryError::Protocol {
                    what: call.what,
                    host: endpoint.host.clone(),
                    problem: format!("unsupported media type `{kind}`"),
                });
            }
            let descriptor = Descriptor::new(kind, actual, bytes.len() as u64);
            return Ok(Resolved {
                descriptor,
                host: endpoint.host.clone(),
                bytes: Some(bytes),
            });
        }
    }

    /// A body of at most `limit` bytes.
    pub(crate) async fn read_small(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        mut answer: Answer,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let stall = self.hosts.config().timeouts.stall;
        let mut out = Vec::new();
        loop {
            match crate::fetch::next_chunk(&mut answer, stall).await? {
                None => return Ok(out),
                Some(chunk) if out.len() as u64 + chunk.len() as u64 > limit => {
                    return Err(RegistryError::Protocol {
                        what: call.what.clone(),
                        host: endpoint.host.clone(),
                        problem: format!("more than {limit} bytes"),
                    });
                }
                Some(chunk) => out.extend_from_slice(&chunk),
            }
        }
    }
}

/// The errors of hosts that were tried in vain: the most telling one is kept.
#[derive(Default)]
pub(crate) struct Failures(Option<RegistryError>);

impl Failures {
    pub(crate) fn add(&mut self, endpoint: &Endpoint, error: RegistryError) {
        tracing::debug!(host = endpoint.host, %error, "registry host passed over");
        if self.0.as_ref().is_none_or(|best| error.rank() >= best.rank()) {
            self.0 = Some(error);
        }
    }

    pub(crate) fn into_error(self) -> RegistryError {
        self.0.unwrap_or_else(|| RegistryError::Config {
            host: String::new(),
            what: "no endpoint".to_owned(),
        })
    }
}

fn manifest_call(method: Method, endpoint: &Endpoint, reference: &ImageRef, object: &str) -> Call {
    let path = format!("/{}/manifests/{object}", reference.path());
    let mut call = Call::read(method, path, reference.path(), endpoint);
    let accept = format!("{}, */*", MANIFEST_ACCEPT.join(", "));
    if let Ok(value) = HeaderValue::from_str(&accept) {
        call.headers.insert(ACCEPT, value);
    }
    call.what = format!("failed to fetch manifest {reference}");
    call.name = reference.to_string();
    call
}

fn not_found(endpoint: &Endpoint, reference: &ImageRef) -> RegistryError {
    RegistryError::NotFound {
        what: reference.to_string(),
        host: endpoint.host.clone(),
    }
}

fn content_type(answer: &Answer) -> String {
    let text = answer.header(CONTENT_TYPE.as_str()).unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim().to_owned()
}

fn is_known(kind: &str) -> bool {
    media_type::is_index(kind) || media_type::is_manifest(kind) || kind == media_type::DOCKER_SCHEMA1
}

/// The media type that a manifest's own members tell.
fn sniff(bytes: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head {
        #[serde(default)]
        media_type: String,
        manifests: Option<serde::de::IgnoredAny>,
        config: Option<serde::de::IgnoredAny>,
    }
    let head: Head = serde_json::from_slice(bytes).ok()?;
    if is_known(&head.media_type) {
        return Some(head.media_type);
    }
    match (head.manifests, head.config) {
        (Some(_), None) => Some(media_type::OCI_INDEX.to_owned()),
        (None, Some(_)) => Some(media_type::OCI_MANIFEST.to_owned()),
        _ => None,
    }
}
