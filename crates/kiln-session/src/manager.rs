//! The sessions that are open, found by id.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use crate::channel;
use crate::error::{Result, SessionError};
use crate::session::{Over, Session, SessionId, SessionInfo, watch_health};
use crate::tunnel::{Outbound, Tunnel};

/// How long one member of a group is waited for before the next is tried.
const GROUP_WAIT: Duration = Duration::from_secs(5);

/// The open sessions of one tenant. Cheap to clone; clones share the table.
///
/// A daemon has one for each tenant, so that no lookup can reach another tenant's client.
#[derive(Clone, Debug)]
pub struct SessionManager(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: Mutex<HashMap<SessionId, Session>>,
    /// Counts registrations; waiters look at the table again when it moves.
    registered: watch::Sender<u64>,
    shutdown: Over,
}

impl Default for SessionManager {
    fn default() -> Self {
        Self::new()
    }
}

impl SessionManager {
    /// An empty table.
    pub fn new() -> Self {
        SessionManager(Arc::new(Shared {
            table: Mutex::new(HashMap::new()),
            registered: watch::Sender::new(0),
            shutdown: Over::default(),
        }))
    }

    fn table(&self) -> MutexGuard<'_, HashMap<SessionId, Session>> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the stream of a `Control.Session` call: `inbound` are the payloads received, the result those to send.
    /// Returns at once, so the caller can send its response headers; the session is registered as soon as the HTTP/2
    /// connection on it has begun, and removed when either side ends.
    ///
    /// A second session with the id of a living one replaces it in the table; the first keeps running for those who
    /// hold it.
    pub fn accept<S>(&self, info: SessionInfo, inbound: S) -> Outbound
    where
        S: Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
    {
        let (tunnel, outbound) = Tunnel::new(inbound);
        let manager = self.clone();
        tokio::spawn(async move { manager.run(info, tunnel).await });
        outbound
    }

    /// Serves one session on a byte pipe until it ends.
    pub async fn run<T>(&self, info: SessionInfo, pipe: T)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let over = Over::default();
        let id = info.id.clone();
        let health = info.health;
        let (channel, connection) = match channel::connect(pipe).await {
            Ok(connected) => connected,
            Err(error) => {
                tracing::info!(session = %id, %error, "session could not be opened");
                return;
            }
        };
        let session = Session::new(info, channel.clone(), over.clone());
        self.table().insert(id.clone(), session.clone());
        self.0.registered.send_modify(|count| *count += 1);
        tracing::debug!(session = %id, "session opened");

        let reason = tokio::select! {
            ended = connection => match ended {
                Ok(()) => "the client closed the connection".to_owned(),
                Err(error) => format!("connection failed: {error}"),
            },
            reason = watch_health(channel, health) => reason,
            () = over.wait() => "closed by the daemon".to_owned(),
            () = self.0.shutdown.wait() => "the daemon is shutting down".to_owned(),
        };
        over.end(reason.as_str());
        let mut table = self.table();
        if table.get(&id).is_some_and(|current| current.is(&session)) {
            table.remove(&id);
        }
        drop(table);
        tracing::debug!(session = %id, reason, "session ended");
    }

    /// The session, if it is open now.
    pub fn try_get(&self, id: &SessionId) -> Option<Session> {
        self.table().get(id).cloned()
    }

    /// The session; waits for it to be opened. A build may be asked for before its session arrives, so there is no
    /// limit: drop the future to stop waiting.
    pub async fn get(&self, id: &SessionId) -> Result<Session> {
        let mut registered = self.0.registered.subscribe();
        loop {
            if let Some(session) = self.try_get(id) {
                return Ok(session);
            }
            tokio::select! {
                changed = registered.changed() => {
                    if changed.is_err() {
                        return Err(SessionError::UnknownSession(id.to_string()));
                    }
                }
                () = self.0.shutdown.wait() => return Err(SessionError::UnknownSession(id.to_string())),
            }
        }
    }

    /// The session; waits up to `limit` for it to be opened.
    pub async fn get_within(&self, id: &SessionId, limit: Duration) -> Result<Session> {
        match tokio::time::timeout(limit, self.get(id)).await {
            Ok(found) => found,
            Err(_) => Err(SessionError::UnknownSession(id.to_string())),
        }
    }

    /// Makes a call on any session of a group: those that are open first, then each of the others, waited for 5 s at
    /// most. The first that succeeds counts, and when none does, the last failure.
    ///
    /// # Errors
    /// [`SessionError::NoActiveSessions`] for an empty group, and when none of the group was ever there.
    pub async fn any<T, F, Fut>(&self, group: &[SessionId], mut call: F) -> Result<T>
    where
        F: FnMut(Session) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let mut failure = SessionError::NoActiveSessions;
        let (open, awaited): (Vec<_>, Vec<_>) = group.iter().partition(|id| self.try_get(id).is_some());
        for id in open.into_iter().chain(awaited) {
            let Ok(session) = self.get_within(id, GROUP_WAIT).await else {
                continue;
            };
            match call(session).await {
                Ok(answer) => return Ok(answer),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Ends all sessions, and every wait for one.
    pub fn shutdown(&self) {
        self.0.shutdown.end("the daemon is shutting down");
    }
}
