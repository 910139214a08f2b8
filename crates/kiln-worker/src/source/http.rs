//! Files from web servers: `http://` and `https://` (semantics.md §4), and streams that a client offers once
//! (`http://buildkit-session/…`, wire.md §4.6).
//!
//! A file is downloaded while its key is computed, because its digest is part of the key, unless `http.checksum` tells the
//! digest beforehand. What was downloaded is kept as a blob, with the server's entity tag: the next build asks whether it
//! has changed and reads nothing if not.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use kiln_llb::Vertex;
use kiln_llb::op::SourceOp;
use kiln_oci::Digest;
use kiln_registry::error::innermost;
use kiln_solver::{OpContext, StatusHandle, WorkerError as _};
use kiln_store::{BlobHandle, ContentStore, LayerRef, RecordType};
use reqwest::header::{
    AUTHORIZATION, CONTENT_DISPOSITION, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH, LAST_MODIFIED,
};
use reqwest::{StatusCode, Url};
use tokio::sync::OnceCell;

use super::file_layer::{self, FileMeta};
use super::remote::HttpMeta;
use super::{Asker, Source, SourceInstance, SourceKey};
use crate::client::Pin;
use crate::error::{OpError, OpResult};
use crate::key::{HttpKey, http_key};
use crate::layers::blocking;
use crate::worker::{LlbWorker, store_tenant};

/// A server that sends nothing for this long is given up.
const STALL: Duration = Duration::from_secs(60);
/// Addresses whose entity tags are remembered.
const REMEMBERED: usize = 1000;
/// Host of streams that the client offers.
const SESSION_HOST: &str = "buildkit-session";

/// What is known of an address from an earlier download.
#[derive(Clone, Debug)]
struct Known {
    etag: String,
    digest: Digest,
    last_modified: Option<String>,
    disposition: Option<String>,
}

/// By state directory, tenant, address and the headers that were sent.
static KNOWN: LazyLock<Mutex<HashMap<String, Known>>> = LazyLock::new(Mutex::default);

/// `http://` and `https://`
#[derive(Debug)]
pub struct HttpSource;

impl Source for HttpSource {
    fn schemes(&self) -> &'static [&'static str] {
        &["http", "https"]
    }

    fn open(&self, worker: &LlbWorker, _: &Arc<Vertex>, op: &SourceOp) -> Result<Box<dyn SourceInstance>, OpError> {
        Ok(Box::new(HttpFile::new(worker, op)?))
    }
}

impl HttpFile {
    /// The file that an operation names. No I/O.
    pub(super) fn new(worker: &LlbWorker, op: &SourceOp) -> Result<Self, OpError> {
        let bad = |what: String| OpError::user(format!("{}: {what}", op.identifier));
        let url = Url::parse(&op.identifier).map_err(|e| bad(format!("invalid URL: {e}")))?;
        let checksum = match op.attr("http.checksum").filter(|c| !c.is_empty()) {
            None => None,
            Some(text) => Some(
                text.parse::<Digest>()
                    .map_err(|e| bad(format!("invalid checksum {text}: {e}")))?,
            ),
        };
        if op.attr("http.sig.pubkey").is_some_and(|s| !s.is_empty()) {
            return Err(bad("signatures are not supported by this daemon".to_owned()));
        }
        let mut headers = BTreeMap::new();
        for (key, value) in &op.attrs {
            if let Some(name) = key.strip_prefix("http.header.") {
                match name.to_ascii_lowercase().as_str() {
                    "accept" => headers.insert("Accept".to_owned(), value.clone()),
                    "user-agent" => headers.insert("User-Agent".to_owned(), value.clone()),
                    _ => return Err(bad(format!("header {name} is not allowed"))),
                };
            }
        }
        Ok(Self {
            worker: worker.clone(),
            named: op.attr("http.filename").is_some_and(|n| !n.is_empty()),
            meta: FileMeta::from_attrs(op, "")?,
            auth_header_secret: op.attr("http.authheadersecret").unwrap_or_default().to_owned(),
            identifier: op.identifier.clone(),
            url,
            checksum,
            headers,
            got: OnceCell::new(),
        })
    }
}

/// A downloaded file.
#[derive(Clone, Debug)]
struct Got {
    blob: BlobHandle,
    last_modified: Option<String>,
    disposition: Option<String>,
}

pub(super) struct HttpFile {
    worker: LlbWorker,
    identifier: String,
    url: Url,
    checksum: Option<Digest>,
    /// The file's name was given.
    named: bool,
    meta: FileMeta,
    auth_header_secret: String,
    headers: BTreeMap<String, String>,
    got: OnceCell<Got>,
}

#[async_trait]
impl SourceInstance for HttpFile {
    async fn key(&self, cx: &OpContext<LlbWorker>) -> Result<SourceKey, OpError> {
        let (digest, disposition, last_modified) = match self.checksum {
            Some(digest) => (digest, None, None),
            None => {
                let got = self.got(cx.into()).await?;
                (got.blob.digest(), got.disposition, got.last_modified)
            }
        };
        for client in cx.clients() {
            let pin = Pin {
                identifier: self.identifier.clone(),
                digest: digest.to_string(),
                platform: String::new(),
            };
            client.pin(cx.vertex().digest, pin);
        }
        let mut file = self.meta.file();
        file.filename = self.file_name(disposition.as_deref());
        let key = HttpKey {
            file,
            checksum: digest.to_string(),
            last_modified: last_modified.unwrap_or_default(),
            auth_header_secret: self.auth_header_secret.clone(),
            headers: self.headers.clone().into_iter().collect(),
        };
        Ok(SourceKey {
            keys: vec![http_key(&key)],
            transient: false,
        })
    }

    async fn fetch(&self, cx: &OpContext<LlbWorker>) -> OpResult<Option<LayerRef>> {
        let tenant = store_tenant(cx.tenant())?;
        let store = self.worker.store();
        let _permit = cx.permit().await;
        let kept = self
            .checksum
            .filter(|_| self.named)
            .and_then(|d| store.content(&tenant).lease(&d));
        let got = match kept {
            Some(blob) => Got {
                blob,
                last_modified: None,
                disposition: None,
            },
            None => self.got(cx.into()).await?,
        };
        let mut meta = self.meta.clone();
        // With a checksum the key says nothing about the server's answer, so the file's name must not depend on it.
        let disposition = got.disposition.as_deref().filter(|_| self.checksum.is_none());
        meta.name = self.file_name(disposition);
        meta.mtime = got.last_modified.as_deref().and_then(http_date).unwrap_or(0);
        let description = format!("http url {}", self.identifier);
        let layer = file_layer::make(store, &tenant, got.blob, &meta, RecordType::Regular, description).await?;
        Ok(Some(layer))
    }
}

impl HttpFile {
    /// What is known of the file. With a checksum that was given nothing is asked; without one the file is downloaded.
    pub(super) async fn meta(&self, asker: Asker<'_>) -> Result<HttpMeta, OpError> {
        if let Some(checksum) = self.checksum {
            return Ok(HttpMeta {
                checksum,
                filename: self.file_name(None),
                last_modified: None,
            });
        }
        let got = self.got(asker).await?;
        Ok(HttpMeta {
            checksum: got.blob.digest(),
            filename: self.file_name(got.disposition.as_deref()),
            last_modified: got.last_modified.as_deref().and_then(http_date),
        })
    }

    /// Whether it is a stream that the client offers once: asking about it would use it up.
    pub(super) fn is_once(&self) -> bool {
        self.url.host_str() == Some(SESSION_HOST)
    }

    fn file_name(&self, disposition: Option<&str>) -> String {
        if self.named {
            return self.meta.name.clone();
        }
        let of_url = || {
            let last = self.url.path().rsplit('/').next().unwrap_or_default().to_owned();
            (!last.is_empty()).then_some(last)
        };
        let name = disposition
            .and_then(disposition_name)
            .or_else(of_url)
            .unwrap_or_default();
        file_layer::safe_name(&name)
    }

    /// The file, downloaded once by this instance.
    async fn got(&self, asker: Asker<'_>) -> Result<Got, OpError> {
        self.got
            .get_or_try_init(|| async {
                let got = self.download(asker).await?;
                let digest = got.blob.digest();
                // Also what an earlier build downloaded and the server calls unchanged may be another file.
                match self.checksum.filter(|wanted| *wanted != digest) {
                    None => Ok(got),
                    Some(wanted) => {
                        let what = plain(&self.url);
                        Err(OpError::user(format!(
                            "digest mismatch for {what}: {digest} (expected: {wanted})"
                        )))
                    }
                }
            })
            .await
            .cloned()
    }

    async fn download(&self, asker: Asker<'_>) -> Result<Got, OpError> {
        let content = self.worker.store().content(&store_tenant(asker.tenant())?);
        if self.is_once() {
            let path = self.url.path().to_owned();
            let stream = self
                .worker
                .any_session(asker, |session| {
                    let path = path.clone();
                    async move { session.upload(SESSION_HOST, &path).await }
                })
                .await?;
            let stream = stream.map(|bytes| bytes.map_err(OpError::from));
            let blob = self.store(asker, &content, Box::pin(stream), 0).await?;
            return Ok(Got {
                blob,
                last_modified: None,
                disposition: None,
            });
        }
        let client = asker.clients().into_iter().next().ok_or_else(OpError::canceled)?;
        let fail = |what: String| OpError::unavailable(format!("failed to load {}: {what}", plain(&self.url)));
        let headers = self.request_headers(asker).await?;
        let memory = self.memory(&content, &headers);
        let known = KNOWN
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&memory)
            .cloned();
        let known = known.filter(|k| content.has(&k.digest));
        let mut request = client.registry.web()?.get(self.url.clone()).headers(headers);
        if let Some(known) = &known {
            request = request.header(IF_NONE_MATCH, known.etag.clone());
        }
        let answer = tokio::time::timeout(STALL, request.send()).await;
        let answer = answer.map_err(|_| fail("no answer in time".to_owned()))?;
        let answer = answer.map_err(|e| fail(innermost(&e)))?;
        if let (StatusCode::NOT_MODIFIED, Some(known)) = (answer.status(), known) {
            let blob = content
                .lease(&known.digest)
                .ok_or_else(|| fail("the kept file is gone".to_owned()))?;
            return Ok(Got {
                blob,
                last_modified: known.last_modified,
                disposition: known.disposition,
            });
        }
        if !answer.status().is_success() {
            let text = format!(
                "invalid response status {} from {}",
                answer.status().as_u16(),
                plain(&self.url)
            );
            let error = if answer.status().is_server_error() {
                OpError::unavailable(text)
            } else {
                OpError::user(text)
            };
            return Err(error);
        }
        let header = |name: HeaderName| answer.headers().get(name)?.to_str().ok().map(str::to_owned);
        let (etag, last_modified, disposition) = (header(ETAG), header(LAST_MODIFIED), header(CONTENT_DISPOSITION));
        let total = answer.content_length().unwrap_or(0);
        let what = plain(&self.url);
        let stream = answer.bytes_stream().map(move |bytes| {
            bytes.map_err(|e| OpError::unavailable(format!("failed to load {what}: {}", innermost(&e))))
        });
        let blob = self.store(asker, &content, Box::pin(stream), total).await?;
        if let Some(etag) = etag {
            let known = Known {
                etag,
                digest: blob.digest(),
                last_modified: last_modified.clone(),
                disposition: disposition.clone(),
            };
            let mut table = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
            if table.len() >= REMEMBERED {
                table.clear();
            }
            table.insert(memory, known);
        }
        Ok(Got {
            blob,
            last_modified,
            disposition,
        })
    }

    /// Writes a stream into the content store.
    async fn store(
        &self,
        asker: Asker<'_>,
        content: &ContentStore,
        mut stream: std::pin::Pin<Box<dyn Stream<Item = Result<Bytes, OpError>> + Send>>,
        total: u64,
    ) -> Result<BlobHandle, OpError> {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let mut status: StatusHandle = asker.progress().status(self.file_name(None));
        let mut writer = {
            let content = content.clone();
            blocking(move |_| content.writer(None)).await?
        };
        let mut done = 0;
        loop {
            let next = tokio::time::timeout(STALL, stream.next()).await;
            let next = next.map_err(|_| OpError::unavailable(format!("{} stopped sending", plain(&self.url))))?;
            let Some(bytes) = next else { break };
            let bytes = bytes?;
            done += bytes.len() as u64;
            writer = blocking(move |_| {
                writer.write_bytes(&bytes)?;
                Ok::<_, OpError>(writer)
            })
            .await?;
            status.set(number(done), number(total));
        }
        let blob = blocking(move |_| writer.commit(None)).await?;
        Ok(blob)
    }

    /// The headers of the request: the user's, and the authorization that a secret holds for this host.
    async fn request_headers(&self, asker: Asker<'_>) -> Result<HeaderMap, OpError> {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            let name: Result<HeaderName, _> = name.parse();
            if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(value)) {
                headers.insert(name, value);
            }
        }
        let host = self.url.host_str().unwrap_or_default();
        let (named, header, token);
        let names: &[(&str, bool)] = if self.auth_header_secret.is_empty() {
            header = format!("HTTP_AUTH_HEADER_{host}");
            token = format!("HTTP_AUTH_TOKEN_{host}");
            &[(&header, false), (&token, true)]
        } else {
            named = self.auth_header_secret.clone();
            &[(&named, false)]
        };
        for (name, bearer) in names {
            let id = (*name).to_owned();
            let secret = self
                .worker
                .any_session(asker, |session| {
                    let id = id.clone();
                    async move { session.secret(&id).await }
                })
                .await;
            // A build without a session has no secrets.
            let Ok(Some(secret)) = secret else { continue };
            let text = String::from_utf8_lossy(&secret).trim().to_owned();
            let text = if *bearer { format!("Bearer {text}") } else { text };
            let mut value = HeaderValue::from_str(&text)
                .map_err(|_| OpError::user(format!("secret {name} is no valid header value")).personal())?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
            break;
        }
        Ok(headers)
    }

    fn memory(&self, content: &ContentStore, headers: &HeaderMap) -> String {
        let mut text = format!(
            "{}\0{}\0{}",
            content.store().root().display(),
            content.tenant(),
            self.url
        );
        for (name, value) in headers {
            text.push_str(&format!("\0{name}:{}", Digest::of(value.as_bytes())));
        }
        text
    }
}

/// The URL for messages, without credentials.
fn plain(url: &Url) -> String {
    let mut url = url.clone();
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url.to_string()
}

/// The file name in a `Content-Disposition` header (RFC 6266, plain form).
fn disposition_name(header: &str) -> Option<String> {
    for part in header.split(';').skip(1) {
        let (key, value) = part.split_once('=')?;
        if key.trim().eq_ignore_ascii_case("filename") {
            let name = value.trim().trim_matches('"');
            return (!name.is_empty()).then(|| name.to_owned());
        }
    }
    None
}

/// Seconds since 1970 of an HTTP date in its preferred form (RFC 9110 §5.6.7).
fn http_date(text: &str) -> Option<i64> {
    let parts: Vec<&str> = text.split_ascii_whitespace().collect();
    let [_, day, month, year, time, "GMT"] = parts.as_slice() else {
        return None;
    };
    let months = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let month = months.iter().position(|m| m == month)? + 1;
    let time: kiln_oci::Timestamp = format!("{year}-{month:02}-{day:0>2}T{time}Z").parse().ok()?;
    Some(time.seconds())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_and_names_of_answers() {
        assert_eq!(http_date("Fri, 02 Jan 2026 03:04:05 GMT"), Some(1_767_323_045));
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(http_date("yesterday"), None);
        assert_eq!(
            disposition_name("attachment; filename=\"a b.tgz\"").as_deref(),
            Some("a b.tgz")
        );
        assert_eq!(disposition_name("attachment; size=3; FileName=x").as_deref(), Some("x"));
        assert_eq!(disposition_name("inline"), None);
    }
}
