//! One client's session: who it is, what it offers, whether it still lives, and how calls to it are made.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use http::HeaderMap;
use tokio_util::sync::CancellationToken;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::channel::{Channel, origin};
use crate::error::{Result, SessionError, is_connection_error};

/// Metadata key of the session's id.
pub const KEY_ID: &str = "x-docker-expose-session-uuid";
/// Metadata key of its name.
pub const KEY_NAME: &str = "x-docker-expose-session-name";
/// Metadata key of the key under which the same client's directories meet again in a later build.
pub const KEY_SHARED_KEY: &str = "x-docker-expose-session-sharedkey";
/// Metadata key of a method the client serves; repeated.
pub const KEY_METHOD: &str = "x-docker-expose-session-grpc-method";
/// Metadata key by which a client asks for stricter health checks; milliseconds.
pub const KEY_HEALTH_TIMEOUT: &str = "x-buildkit-session-health-custom-timeout";

/// The largest message the daemon accepts from a client.
pub(crate) const MAX_RECEIVED: usize = 16 << 20;
/// The most payload put into one message to a client, whose own limit is 4 MiB for a whole message.
pub(crate) const MAX_SENT: usize = 3 << 20;

/// A session's id, chosen by the client.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(Arc<str>);

impl SessionId {
    /// The id as the client registered it.
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        SessionId(id.into())
    }

    /// The id in an attribute such as `local.session`, with the prefix it may carry: everything before the first `:`,
    /// if something follows. For local sources the prefix also becomes part of the directory's name.
    pub fn from_attribute(value: &str) -> (Option<&str>, Self) {
        match value.split_once(':') {
            Some((prefix, id)) if !id.is_empty() => (Some(prefix), SessionId::new(id)),
            _ => (None, SessionId::new(value)),
        }
    }

    /// The id's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a client says about itself when it opens a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionInfo {
    /// The id builds name.
    pub id: SessionId,
    /// A name for people; mostly empty.
    pub name: String,
    /// Makes directories of the same client meet again in a later build; may be empty.
    pub shared_key: String,
    /// The methods the client serves (`/package.Service/Method`), lower case.
    pub methods: HashSet<String>,
    /// How often to check that the client answers, and how patiently.
    pub health: HealthPolicy,
}

impl SessionInfo {
    /// Reads the request metadata of `Control.Session`.
    ///
    /// # Errors
    /// [`SessionError::Protocol`] when the id is missing.
    pub fn from_headers(headers: &HeaderMap) -> Result<Self> {
        let text = |key| {
            headers
                .get(key)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
        };
        let id = text(KEY_ID);
        if id.is_empty() {
            return Err(SessionError::protocol(
                "open session",
                format!("metadata {KEY_ID} is missing"),
            ));
        }
        let methods = headers.get_all(KEY_METHOD).iter();
        let methods = methods
            .filter_map(|value| value.to_str().ok())
            .map(str::to_lowercase)
            .collect();
        let custom = text(KEY_HEALTH_TIMEOUT).parse().ok().map(Duration::from_millis);
        Ok(SessionInfo {
            id: SessionId::new(id),
            name: text(KEY_NAME).to_owned(),
            shared_key: text(KEY_SHARED_KEY).to_owned(),
            methods,
            health: custom.map_or_else(HealthPolicy::default, HealthPolicy::strict),
        })
    }
}

/// When a client that does not answer is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthPolicy {
    /// Time between two checks.
    pub interval: Duration,
    /// The least time a check is waited for; a slow answer raises it for the next check to 1.5 times as long.
    pub timeout: Duration,
    /// Consecutive failures that end the session.
    pub threshold: u32,
}

impl Default for HealthPolicy {
    fn default() -> Self {
        HealthPolicy {
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(15),
            threshold: 2,
        }
    }
}

impl HealthPolicy {
    /// One missed check ends the session; at least a second.
    fn strict(timeout: Duration) -> Self {
        let timeout = timeout.max(Duration::from_secs(1));
        HealthPolicy {
            interval: timeout,
            timeout,
            threshold: 1,
        }
    }
}

/// A registered client. Cheap to clone; it lives as long as the client's connection, not as long as this value.
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    info: SessionInfo,
    channel: Channel,
    over: Over,
}

/// The end of a session: a token to wait for and the reason, set before the token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Over {
    token: CancellationToken,
    reason: Arc<OnceLock<String>>,
}

impl Over {
    pub(crate) fn end(&self, reason: impl Into<String>) {
        let _first_reason_counts = self.reason.set(reason.into());
        self.token.cancel();
    }

    pub(crate) async fn wait(&self) {
        self.token.cancelled().await;
    }

    fn reason(&self) -> String {
        self.reason
            .get()
            .cloned()
            .unwrap_or_else(|| "the client closed the connection".to_owned())
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.0.info.id)
            .field("over", &self.is_over())
            .finish()
    }
}

impl Session {
    pub(crate) fn new(info: SessionInfo, channel: Channel, over: Over) -> Self {
        Session(Arc::new(Inner { info, channel, over }))
    }

    /// The session's id.
    pub fn id(&self) -> &SessionId {
        &self.0.info.id
    }

    /// What the client said about itself.
    pub fn info(&self) -> &SessionInfo {
        &self.0.info
    }

    /// Makes directories of the same client meet again in a later build; may be empty.
    pub fn shared_key(&self) -> &str {
        &self.0.info.shared_key
    }

    /// Whether the client serves a method (`/package.Service/Method`, in any case).
    pub fn supports(&self, method: &str) -> bool {
        self.0.info.methods.contains(&method.to_lowercase())
    }

    /// Whether the connection has ended.
    pub fn is_over(&self) -> bool {
        self.0.over.token.is_cancelled()
    }

    /// Waits until the connection has ended. Work that only makes sense with this client is raced against it.
    pub async fn closed(&self) {
        self.0.over.wait().await;
    }

    /// Ends the session: its calls fail and the client sees its stream end.
    pub fn close(&self, reason: &str) {
        self.0.over.end(reason);
    }

    /// Whether both are the same registration (an id can be registered again).
    pub(crate) fn is(&self, other: &Session) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn channel(&self) -> Channel {
        self.0.channel.clone()
    }

    pub(crate) fn gone(&self) -> SessionError {
        SessionError::Gone {
            session: self.id().to_string(),
            reason: self.0.over.reason(),
        }
    }

    /// An error of a call on this session; a broken connection is told apart from an answer of the client.
    pub(crate) fn error(&self, what: &str, status: &tonic::Status) -> SessionError {
        if self.is_over() || is_connection_error(status) {
            return self.gone();
        }
        SessionError::from_status(what, status)
    }

    /// Runs a call; it ends when the session ends.
    pub(crate) async fn call<T>(
        &self,
        what: &str,
        call: impl Future<Output = std::result::Result<T, tonic::Status>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            answer = call => answer.map_err(|status| self.error(what, &status)),
            () = self.closed() => Err(self.gone()),
        }
    }

    /// Runs a call that must be answered within `limit`.
    pub(crate) async fn call_within<T>(
        &self,
        limit: Duration,
        what: &str,
        call: impl Future<Output = std::result::Result<T, tonic::Status>>,
    ) -> Result<T> {
        match tokio::time::timeout(limit, self.call(what, call)).await {
            Ok(answer) => answer,
            Err(_) => Err(SessionError::Timeout {
                what: what.to_owned(),
                seconds: limit.as_secs(),
            }),
        }
    }

    /// Fails unless the client serves `method`.
    pub(crate) fn require(&self, method: &str, otherwise: &str) -> Result<()> {
        if self.supports(method) {
            Ok(())
        } else {
            Err(SessionError::Unsupported(otherwise.to_owned()))
        }
    }
}

/// Asks the client for signs of life until it fails to give them; returns the reason to end the session.
///
/// An answer of any kind is a sign of life. The checks have a stream of their own, so no transfer can delay them beyond
/// the bytes that are already on their way.
pub(crate) async fn watch_health(channel: Channel, policy: HealthPolicy) -> String {
    let mut client = HealthClient::with_origin(channel, origin());
    let mut failures = 0;
    let mut last = Duration::ZERO;
    loop {
        tokio::time::sleep(policy.interval).await;
        let timeout = policy.timeout.max(last.mul_f64(1.5));
        let started = Instant::now();
        let check = client.check(HealthCheckRequest { service: String::new() });
        let alive = match tokio::time::timeout(timeout, check).await {
            Ok(Ok(_)) => true,
            Ok(Err(status)) => !is_connection_error(&status),
            Err(_) => false,
        };
        last = started.elapsed();
        if alive {
            failures = 0;
            continue;
        }
        failures += 1;
        tracing::debug!(failures, ?timeout, "session health check failed");
        if failures >= policy.threshold {
            return "session healthcheck failed fatally".to_owned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn attribute_prefix() {
        let parsed = |value| {
            let (prefix, id) = SessionId::from_attribute(value);
            (prefix.map(str::to_owned), id.as_str().to_owned())
        };
        assert_eq!(parsed("abc"), (None, "abc".to_owned()));
        assert_eq!(parsed("p:abc:d"), (Some("p".to_owned()), "abc:d".to_owned()));
        assert_eq!(parsed("abc:"), (None, "abc:".to_owned()));
    }

    #[test]
    fn metadata() {
        let mut headers = HeaderMap::new();
        assert!(SessionInfo::from_headers(&headers).is_err());
        headers.insert(KEY_ID, HeaderValue::from_static("s1"));
        headers.append(KEY_METHOD, HeaderValue::from_static("/a.B/C"));
        headers.append(KEY_METHOD, HeaderValue::from_static("/A.b/D"));
        headers.insert(KEY_HEALTH_TIMEOUT, HeaderValue::from_static("200"));
        let info = SessionInfo::from_headers(&headers).unwrap();
        assert_eq!(info.methods, HashSet::from(["/a.b/c".to_owned(), "/a.b/d".to_owned()]));
        assert_eq!(
            info.health,
            HealthPolicy {
                interval: Duration::from_secs(1),
                timeout: Duration::from_secs(1),
                threshold: 1
            }
        );
    }
}
