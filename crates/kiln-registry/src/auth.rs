//! Authentication: basic, and bearer tokens fetched by the user's client or by Kiln itself (wire.md §4.3).
//!
//! What a host asks for is remembered per host; tokens are kept per identity and scope set until a tenth before their
//! end, and fetched once however many requests wait for them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::StatusCode;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use serde::Deserialize;
use tokio::sync::OnceCell;

use crate::challenge::Challenge;
use crate::error::{RegistryError, innermost};
use crate::scope::ScopeSet;

/// Name under which Kiln asks token servers, the one clients of this protocol use.
pub const CLIENT_ID: &str = "buildkit-client";
/// Limit for everything that asks the user's client or a token server.
const AUTH_TIMEOUT: Duration = Duration::from_secs(60);
/// Life of a token whose server does not say.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);

/// Error of a [`CredentialSource`].
pub type CredentialError = Box<dyn std::error::Error + Send + Sync>;

/// A user name and its secret; both empty for none, an empty name with a secret for an identity (refresh) token.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password or refresh token.
    pub secret: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// What a token server is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRequest {
    /// Always [`CLIENT_ID`].
    pub client_id: &'static str,
    /// Registry host that wants the token.
    pub host: String,
    /// URL of the token server.
    pub realm: String,
    /// Service name, possibly empty.
    pub service: String,
    /// Scopes, sorted.
    pub scopes: Vec<String>,
}

/// A bearer token and its life.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The token.
    pub token: String,
    /// Life in seconds from its issue; 0 if unknown.
    pub expires_in: u64,
    /// Seconds after 1970 of its issue; `None` if unknown.
    pub issued_at: Option<i64>,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token")
            .field("expires_in", &self.expires_in)
            .finish_non_exhaustive()
    }
}

impl Token {
    /// When it is no longer used: after nine tenths of its life.
    fn deadline(&self) -> SystemTime {
        let life = match self.expires_in {
            0 => DEFAULT_LIFE,
            s => Duration::from_secs(s.min(86_400 * 365) * 9 / 10),
        };
        let issued = self.issued_at.and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
        let start = issued.map_or_else(SystemTime::now, |s| UNIX_EPOCH + Duration::from_secs(s.min(1 << 40)));
        start + life
    }
}

/// Where a user's credentials come from; the daemon implements it over the user's session.
#[async_trait]
pub trait CredentialSource: Send + Sync + 'static {
    /// Tokens are shared between sources with equal identities (a session id, or the key of a token authority).
    fn identity(&self) -> &str;

    /// Credentials for `host`; the default value for none.
    ///
    /// # Errors
    /// Only if the source cannot answer; "there are none" is no error.
    async fn credentials(&self, host: &str) -> Result<Credentials, CredentialError>;

    /// A token fetched by the source itself, or `None` if it cannot and Kiln shall ask the token server.
    ///
    /// # Errors
    /// If the source can fetch tokens but failed.
    async fn fetch_token(&self, request: &TokenRequest) -> Result<Option<Token>, CredentialError>;
}

/// No credentials at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Anonymous;

#[async_trait]
impl CredentialSource for Anonymous {
    fn identity(&self) -> &str {
        ""
    }

    async fn credentials(&self, _host: &str) -> Result<Credentials, CredentialError> {
        Ok(Credentials::default())
    }

    async fn fetch_token(&self, _request: &TokenRequest) -> Result<Option<Token>, CredentialError> {
        Ok(None)
    }
}

/// What a host asked for the last time it refused.
#[derive(Clone, Debug)]
enum Scheme {
    Basic,
    Bearer { realm: String, service: String },
}

#[derive(Debug)]
struct Cached {
    value: HeaderValue,
    deadline: Option<SystemTime>,
}

type Slot = Arc<OnceCell<Cached>>;

/// One host's authentication state.
#[derive(Debug, Default)]
pub(crate) struct AuthCache {
    scheme: Mutex<Option<Scheme>>,
    /// By identity; scope sets are few per host.
    slots: Mutex<HashMap<String, BTreeMap<ScopeSet, Slot>>>,
}

/// What a refusal means.
pub(crate) enum Refusal {
    /// Ask again, with these scopes.
    Again(ScopeSet),
    /// Give up, with the server's words.
    Final(String),
}

impl AuthCache {
    /// The `Authorization` value for a request with these scopes; `None` as long as the host never asked for one, or
    /// if there are no credentials for basic authentication.
    pub(crate) async fn authorization(
        &self,
        http: &reqwest::Client,
        host: &str,
        source: &dyn CredentialSource,
        scopes: &ScopeSet,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let Some(scheme) = lock(&self.scheme).clone() else {
            return Ok(None);
        };
        let (slot, scopes) = self.slot(source.identity(), scopes);
        let cached = slot
            .get_or_try_init(|| async {
                match &scheme {
                    Scheme::Basic => {
                        let c = credentials(source, host).await?;
                        Ok(Cached {
                            value: basic(&c),
                            deadline: Some(SystemTime::now() + DEFAULT_LIFE * 10),
                        })
                    }
                    Scheme::Bearer { realm, service } => {
                        let request = TokenRequest {
                            client_id: CLIENT_ID,
                            host: host.to_owned(),
                            realm: realm.clone(),
                            service: service.clone(),
                            scopes: scopes.to_strings(),
                        };
                        let token = token(http, source, &request).await?;
                        let value =
                            sensitive(&format!("Bearer {}", token.token)).ok_or_else(|| RegistryError::Token {
                                host: host.to_owned(),
                                what: "the token has invalid characters".into(),
                            })?;
                        Ok(Cached {
                            value,
                            deadline: Some(token.deadline()),
                        })
                    }
                }
            })
            .await?;
        Ok((!cached.value.is_empty()).then(|| cached.value.clone()))
    }

    /// The slot that serves `wanted`: one whose scopes cover it and that has not run out, or a new one.
    fn slot(&self, identity: &str, wanted: &ScopeSet) -> (Slot, ScopeSet) {
        let now = SystemTime::now();
        let mut slots = lock(&self.slots);
        let mine = slots.entry(identity.to_owned()).or_default();
        mine.retain(|_, slot| slot.get().is_none_or(|c| c.deadline.is_none_or(|d| d > now)));
        if let Some((scopes, slot)) = mine.iter().find(|(scopes, _)| scopes.covers(wanted)) {
            return (slot.clone(), scopes.clone());
        }
        let slot = Slot::default();
        mine.insert(wanted.clone(), slot.clone());
        (slot, wanted.clone())
    }

    /// Takes note of a 401: what the host wants, and that `used` was not good enough.
    pub(crate) fn refused(
        &self,
        challenges: &[Challenge],
        source: &dyn CredentialSource,
        asked: &ScopeSet,
        used: Option<&HeaderValue>,
    ) -> Refusal {
        let pick = |scheme: &str| challenges.iter().find(|c| c.scheme == scheme);
        if used.is_some() {
            // The token may have run out on the server; a fresh one is worth one more attempt by the caller.
            if let Some(mine) = lock(&self.slots).get_mut(source.identity()) {
                mine.retain(|_, slot| slot.get().is_none_or(|c| Some(&c.value) != used));
            }
        }
        if let Some(bearer) = pick("bearer") {
            let mut wanted = ScopeSet::default();
            wanted.add_list(bearer.param("scope"));
            if bearer.param("error") == "insufficient_scope" && used.is_some() && asked.covers(&wanted) {
                return Refusal::Final("insufficient_scope: authorization failed".to_owned());
            }
            *lock(&self.scheme) = Some(Scheme::Bearer {
                realm: bearer.param("realm").to_owned(),
                service: bearer.param("service").to_owned(),
            });
            return Refusal::Again(asked.union(&wanted));
        }
        if pick("basic").is_some() {
            *lock(&self.scheme) = Some(Scheme::Basic);
            return Refusal::Again(asked.clone());
        }
        Refusal::Final("authorization failed".to_owned())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The basic header, or an empty value for no credentials.
fn basic(c: &Credentials) -> HeaderValue {
    if c.username.is_empty() && c.secret.is_empty() {
        return HeaderValue::from_static("");
    }
    sensitive(&format!(
        "Basic {}",
        STANDARD.encode(format!("{}:{}", c.username, c.secret))
    ))
    .unwrap_or_else(|| HeaderValue::from_static(""))
}

async fn credentials(source: &dyn CredentialSource, host: &str) -> Result<Credentials, RegistryError> {
    match tokio::time::timeout(AUTH_TIMEOUT, source.credentials(host)).await {
        Ok(Ok(c)) => Ok(c),
        Ok(Err(source)) => Err(RegistryError::Credentials {
            host: host.to_owned(),
            source,
        }),
        Err(_) => Err(RegistryError::Token {
            host: host.to_owned(),
            what: "the client did not answer in time".into(),
        }),
    }
}

async fn token(
    http: &reqwest::Client,
    source: &dyn CredentialSource,
    request: &TokenRequest,
) -> Result<Token, RegistryError> {
    let host = request.host.clone();
    match tokio::time::timeout(AUTH_TIMEOUT, source.fetch_token(request)).await {
        Ok(Ok(Some(token))) => return Ok(token),
        Ok(Ok(None)) => {}
        Ok(Err(source)) => return Err(RegistryError::Credentials { host, source }),
        Err(_) => {
            return Err(RegistryError::Token {
                host,
                what: "the client did not answer in time".into(),
            });
        }
    }
    let c = credentials(source, &request.host).await?;
    match tokio::time::timeout(AUTH_TIMEOUT, exchange(http, &c, request)).await {
        Ok(result) => result,
        Err(_) => Err(RegistryError::Token {
            host,
            what: format!("{} did not answer in time", request.realm),
        }),
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
    #[serde(default)]
    issued_at: Option<kiln_oci::Timestamp>,
}

/// Kiln's own exchange: GET with basic authentication where there is a secret, then the OAuth form where the server
/// does not know or does not want that.
async fn exchange(http: &reqwest::Client, c: &Credentials, r: &TokenRequest) -> Result<Token, RegistryError> {
    let fail = |what: String| RegistryError::Token {
        host: r.host.clone(),
        what,
    };
    let mut url = url::Url::parse(&r.realm).map_err(|e| fail(format!("invalid token realm `{}`: {e}", r.realm)))?;
    if !r.service.is_empty() {
        url.query_pairs_mut().append_pair("service", &r.service);
    }
    for scope in &r.scopes {
        url.query_pairs_mut().append_pair("scope", scope);
    }
    let mut get = http.get(url);
    if !c.secret.is_empty() {
        get = get.header(AUTHORIZATION, basic(c));
    }
    let mut answer = get
        .send()
        .await
        .map_err(|e| fail(format!("failed to fetch token: {}", innermost(&e))))?;
    let status = answer.status();
    let form = !c.secret.is_empty()
        && ((status == StatusCode::METHOD_NOT_ALLOWED && !c.username.is_empty())
            || status == StatusCode::NOT_FOUND
            || status == StatusCode::UNAUTHORIZED);
    if form {
        answer = oauth(http, c, r)
            .await
            .map_err(|e| fail(format!("failed to fetch oauth token: {}", innermost(&e))))?;
    }
    let status = answer.status();
    if !status.is_success() {
        return Err(fail(format!(
            "failed to fetch token: unexpected status {status} from {}",
            r.realm
        )));
    }
    let bytes = limited(answer, 1 << 20).await.map_err(&fail)?;
    let answer: TokenAnswer = serde_json::from_slice(&bytes).map_err(|e| fail(format!("failed to read token: {e}")))?;
    let token = answer
        .token
        .filter(|t| !t.is_empty())
        .or(answer.access_token)
        .filter(|t| !t.is_empty())
        .ok_or_else(|| fail("authorization server did not include a token in the response".into()))?;
    Ok(Token {
        token,
        expires_in: answer.expires_in.unwrap_or(0),
        issued_at: answer.issued_at.map(|t| t.seconds()),
    })
}

/// The OAuth form: a password, or a refresh token where there is no user name.
fn oauth_form(c: &Credentials, r: &TokenRequest) -> String {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.append_pair("client_id", r.client_id);
    if !r.scopes.is_empty() {
        form.append_pair("scope", &r.scopes.join(" "));
    }
    form.append_pair("service", &r.service);
    if c.username.is_empty() {
        form.append_pair("grant_type", "refresh_token")
            .append_pair("refresh_token", &c.secret);
    } else {
        form.append_pair("grant_type", "password")
            .append_pair("username", &c.username)
            .append_pair("password", &c.secret);
    }
    form.finish()
}

async fn oauth(http: &reqwest::Client, c: &Credentials, r: &TokenRequest) -> Result<reqwest::Response, reqwest::Error> {
    http.post(&r.realm)
        .header(reqwest::header::CONTENT_TYPE, "application/x-www-form-urlencoded")
        .body(oauth_form(c, r))
        .send()
        .await
}

async fn limited(mut answer: reqwest::Response, limit: usize) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|e| innermost(&e))? {
        if out.len() + chunk.len() > limit {
            return Err("the answer of the token server is too large".to_owned());
        }
        out.extend_from_slice(&chunk);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_end_early() {
        let t = Token {
            token: "x".into(),
            expires_in: 100,
            issued_at: Some(1000),
        };
        assert_eq!(t.deadline(), UNIX_EPOCH + Duration::from_secs(1090));
        let t = Token {
            token: "x".into(),
            expires_in: 0,
            issued_at: None,
        };
        let left = t.deadline().duration_since(SystemTime::now()).unwrap();
        assert!(left > Duration::from_secs(58) && left <= Duration::from_secs(60));
    }

    #[test]
    fn secrets_are_not_printed() {
        let c = Credentials {
            username: "u".into(),
            secret: "hunter2".into(),
        };
        let t = Token {
            token: "hunter2".into(),
            expires_in: 1,
            issued_at: None,
        };
        assert!(!format!("{c:?}{t:?}{:?}", basic(&c)).contains("hunter2"));
    }
}
