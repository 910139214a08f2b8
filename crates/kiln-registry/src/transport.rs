//! One request to one endpoint: permit, authentication, retries, timeouts, and the reading of refusals.

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use url::Url;

use crate::auth::Refusal;
use crate::challenge;
use crate::client::Client;
use crate::config::RetryPolicy;
use crate::error::{RegistryError, innermost};
use crate::host::{Endpoint, Lane};
use crate::scope::ScopeSet;

/// Attempts when no connection can be made at all: a mistyped host should not keep a user waiting.
const CONNECT_ATTEMPTS: u32 = 3;
/// A 401 is answered by new authentication this often: once for the challenge, once for a token that had run out.
const AUTH_ROUNDS: u32 = 3;

/// Where a request goes.
pub(crate) enum Target {
    /// Below `/v2` of the endpoint.
    Path(String),
    /// A `Location` that the endpoint named.
    Absolute(Url),
}

/// A request that can be sent any number of times.
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) scopes: ScopeSet,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Option<Bytes>,
    pub(crate) lane: Lane,
    /// What is attempted on what, for errors: "failed to fetch manifest docker.io/library/alpine:latest".
    pub(crate) what: String,
    /// The reference or `repository@digest` alone.
    pub(crate) name: String,
    /// Whether a refusal is one of a push.
    pub(crate) push: bool,
}

impl Call {
    pub(crate) fn read(method: Method, path: String, repository: &str, endpoint: &Endpoint) -> Self {
        Self {
            method,
            target: Target::Path(path),
            scopes: ScopeSet::pull(&endpoint.scope_name(repository)),
            headers: HeaderMap::new(),
            body: None,
            lane: Lane::Small,
            what: String::new(),
            name: String::new(),
            push: false,
        }
    }

    fn url(&self, endpoint: &Endpoint) -> Result<Url, RegistryError> {
        match &self.target {
            Target::Absolute(url) => Ok(url.clone()),
            Target::Path(path) => {
                let text = endpoint.url(path);
                Url::parse(&text).map_err(|e| RegistryError::Config {
                    host: endpoint.host.clone(),
                    what: format!("invalid URL {text}: {e}"),
                })
            }
        }
    }
}

/// An answer, holding its permit until the body has been read or dropped.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: reqwest::Response,
    /// Bytes of the body that were read ahead.
    pub(crate) leftover: Option<Bytes>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Answer {
    pub(crate) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }
}

impl Client {
    /// Sends `call` until it is answered with something other than a passing problem.
    pub(crate) async fn send(&self, endpoint: &Endpoint, call: &Call) -> Result<Answer, RegistryError> {
        let config = self.hosts.config();
        let mut failures = 0;
        let mut connect_failures = 0;
        loop {
            let body = call.body.clone().map(reqwest::Body::from);
            let limit = config.timeouts.headers;
            let (error, pause) = match self.send_once(endpoint, call, body, limit).await {
                Ok(answer) if !is_passing(answer.status()) => return Ok(answer),
                Ok(answer) => {
                    let wait = retry_after(&answer).map(|d| d.min(config.retry.cap * 4));
                    (self.status_error(endpoint, call, answer).await, wait)
                }
                Err(error @ RegistryError::Request { source: Some(_), .. }) => {
                    let RegistryError::Request {
                        source: Some(source), ..
                    } = &error
                    else {
                        return Err(error);
                    };
                    if is_tls(source) {
                        if endpoint.fall_back_to_plain() {
                            tracing::warn!(host = endpoint.host, "TLS failed, using plain HTTP as configured");
                            continue;
                        }
                        return Err(error);
                    }
                    if source.is_builder() || source.is_redirect() {
                        return Err(error);
                    }
                    if source.is_connect() {
                        if endpoint.fall_back_to_plain() {
                            continue;
                        }
                        connect_failures += 1;
                        if connect_failures >= CONNECT_ATTEMPTS || endpoint.is_mirror() {
                            return Err(error);
                        }
                    }
                    (error, None)
                }
                Err(error @ RegistryError::Request { .. }) => (error, None),
                Err(error) => return Err(error),
            };
            failures += 1;
            if failures >= config.retry.attempts {
                return Err(error);
            }
            tracing::debug!(host = endpoint.host, %error, failures, "registry request is tried again");
            tokio::time::sleep(pause.unwrap_or_else(|| backoff(&config.retry, failures))).await;
        }
    }

    /// One attempt, authentication rounds included. With a streaming `body` a 401 is returned as it is, because the
    /// body is gone then; its scopes are taken note of, so that the next attempt is authorised.
    pub(crate) async fn send_once(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        mut body: Option<reqwest::Body>,
        limit: Duration,
    ) -> Result<Answer, RegistryError> {
        let url = call.url(endpoint)?;
        let streaming = body.is_some() && call.body.is_none();
        let ours = same_origin(endpoint, &url);
        let mut scopes = call.scopes.clone();
        let mut round = 0;
        loop {
            round += 1;
            let authorization: Option<HeaderValue> = if ours {
                endpoint
                    .auth
                    .authorization(&endpoint.http, &endpoint.host, &*self.credentials, &scopes)
                    .await?
            } else {
                None
            };
            let permit = endpoint.permit(call.lane).await;
            let mut request = endpoint
                .http
                .request(call.method.clone(), url.clone())
                .headers(call.headers.clone());
            if let Some(value) = &authorization {
                request = request.header(AUTHORIZATION, value.clone());
            }
            if let Some(body) = body.take().or_else(|| call.body.clone().map(reqwest::Body::from)) {
                request = request.body(body);
            }
            let request_error = |cause: String, source| RegistryError::Request {
                method: call.method.to_string(),
                url: plain_url(&url),
                cause,
                source,
            };
            let response = match tokio::time::timeout(limit, request.send()).await {
                Ok(Ok(response)) => response,
                Ok(Err(e)) => {
                    let e = e.without_url();
                    return Err(request_error(innermost(&e), Some(e)));
                }
                Err(_) => return Err(request_error("no answer in time".to_owned(), None)),
            };
            if response.status() == StatusCode::UNAUTHORIZED && ours {
                let challenges: Vec<_> = response
                    .headers()
                    .get_all(WWW_AUTHENTICATE)
                    .iter()
                    .filter_map(|v| v.to_str().ok())
                    .flat_map(challenge::parse)
                    .collect();
                match endpoint
                    .auth
                    .refused(&challenges, &*self.credentials, &scopes, authorization.as_ref())
                {
                    Refusal::Again(wanted) if round < AUTH_ROUNDS && !streaming => {
                        scopes = wanted;
                        continue;
                    }
                    Refusal::Again(_) if streaming => {}
                    Refusal::Again(_) => return Err(denied(endpoint, call, response.status(), "authorization failed")),
                    Refusal::Final(detail) => return Err(denied(endpoint, call, response.status(), &detail)),
                }
            }
            return Ok(Answer {
                response,
                leftover: None,
                _permit: permit,
            });
        }
    }

    /// The answer if it has one of the `good` statuses, else the error that it means.
    pub(crate) async fn expect(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        answer: Answer,
        good: &[StatusCode],
    ) -> Result<Answer, RegistryError> {
        if good.contains(&answer.status()) {
            Ok(answer)
        } else {
            Err(self.status_error(endpoint, call, answer).await)
        }
    }

    /// What an answer that is no success means.
    pub(crate) async fn status_error(&self, endpoint: &Endpoint, call: &Call, answer: Answer) -> RegistryError {
        let status = answer.status();
        let detail = error_detail(answer.response, self.hosts.config().timeouts.stall).await;
        match status {
            StatusCode::NOT_FOUND if !call.push => RegistryError::NotFound {
                what: call.name.clone(),
                host: endpoint.host.clone(),
            },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => denied(endpoint, call, status, &detail),
            status => RegistryError::Status {
                what: call.what.clone(),
                host: endpoint.host.clone(),
                status,
                detail,
            },
        }
    }
}

/// A refusal, with the registry's words and the status, by which people look such errors up.
fn denied(endpoint: &Endpoint, call: &Call, status: StatusCode, detail: &str) -> RegistryError {
    let detail = match detail {
        "" => status.to_string(),
        detail => format!("{detail}: {status}"),
    };
    let (what, host) = (call.name.clone(), endpoint.host.clone());
    if call.push {
        RegistryError::PushDenied { what, host, detail }
    } else {
        RegistryError::PullDenied { what, host, detail }
    }
}

/// Whether `url` is on the endpoint itself, so that its credentials may be sent.
fn same_origin(endpoint: &Endpoint, url: &Url) -> bool {
    Url::parse(&endpoint.url("")).is_ok_and(|own| own.origin() == url.origin())
}

/// The URL for messages: no credentials, no query (upload states and signatures are secrets of a kind).
pub(crate) fn plain_url(url: &Url) -> String {
    let mut url = url.clone();
    let _ = url.set_password(None);
    let _ = url.set_username("");
    url.set_query(None);
    url.to_string()
}

fn is_passing(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::REQUEST_TIMEOUT
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::INTERNAL_SERVER_ERROR
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    )
}

fn retry_after(answer: &Answer) -> Option<Duration> {
    let text = answer.response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

/// The pause after the `n`-th failure.
pub(crate) fn backoff(policy: &RetryPolicy, n: u32) -> Duration {
    let full = policy
        .base
        .saturating_mul(1u32 << n.saturating_sub(1).min(16))
        .min(policy.cap);
    full.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

/// Whether the failure is one of TLS, which no second attempt will cure.
fn is_tls(error: &reqwest::Error) -> bool {
    let mut current: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = current {
        let inner = e.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if e.is::<rustls::Error>() || inner.is_some_and(|i| i.is::<rustls::Error>()) {
            return true;
        }
        current = e.source();
    }
    false
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    errors: Vec<ErrorItem>,
    #[serde(default)]
    details: String,
}

#[derive(Deserialize)]
struct ErrorItem {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The registry's words in an error answer (OCI distribution spec, "Error codes"), at most 4 KiB of them.
async fn error_detail(mut response: reqwest::Response, stall: Duration) -> String {
    let mut body = Vec::new();
    while body.len() < 64 << 10 {
        match tokio::time::timeout(stall, response.chunk()).await {
            Ok(Ok(Some(chunk))) => body.extend_from_slice(&chunk),
            _ => break,
        }
    }
    let Ok(parsed) = serde_json::from_slice::<ErrorBody>(&body) else {
        return String::new();
    };
    let mut out: Vec<String> = Vec::new();
    for item in parsed.errors {
        out.push(match (item.code.as_str(), item.message.as_str()) {
            ("", m) => m.to_owned(),
            (c, "") => c.to_lowercase(),
            (c, m) => format!("{}: {m}", c.to_lowercase()),
        });
    }
    if out.is_empty() {
        out.push(parsed.details);
    }
    let mut text = out.join("; ");
    let mut end = text.len().min(4096);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
