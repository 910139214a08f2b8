//! Registry credentials of a build: asked from the client's session, never kept here.

use std::time::Duration;

use async_trait::async_trait;
use kiln_registry::auth::CredentialError;
use kiln_registry::{CredentialSource, Credentials, Token, TokenRequest};
use kiln_session::{Session, SessionErrorKind, SessionId, SessionManager};
use rand::RngCore as _;

/// The session of a build that runs is there, or about to be.
const WAIT_FOR_SESSION: Duration = Duration::from_secs(5);

/// Asks one session.
#[derive(Clone, Debug)]
pub struct SessionCredentials {
    sessions: SessionManager,
    id: SessionId,
}

impl SessionCredentials {
    /// Credentials of the client behind `id`.
    pub fn new(sessions: SessionManager, id: SessionId) -> Self {
        Self { sessions, id }
    }

    /// The session; `None` if there is none, which means anonymous.
    async fn session(&self) -> Option<Session> {
        if self.id.as_str().is_empty() {
            return None;
        }
        self.sessions.get_within(&self.id, WAIT_FOR_SESSION).await.ok()
    }
}

#[async_trait]
impl CredentialSource for SessionCredentials {
    fn identity(&self) -> &str {
        self.id.as_str()
    }

    async fn credentials(&self, host: &str) -> Result<Credentials, CredentialError> {
        let Some(session) = self.session().await else {
            return Ok(Credentials::default());
        };
        match session.credentials(host).await {
            Ok(found) => Ok(Credentials {
                username: found.username,
                secret: found.secret,
            }),
            // A client without the service has no credentials.
            Err(e) if e.kind() == SessionErrorKind::Unsupported => Ok(Credentials::default()),
            Err(e) => Err(Box::new(e)),
        }
    }

    async fn fetch_token(&self, request: &TokenRequest) -> Result<Option<Token>, CredentialError> {
        let Some(session) = self.session().await else {
            return Ok(None);
        };
        let mut salt = [0u8; 32];
        rand::rng().fill_bytes(&mut salt);
        match session.token_authority(&request.host, &salt).await {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(None),
            Err(e) if e.kind() == SessionErrorKind::Unsupported => return Ok(None),
            Err(e) => return Err(Box::new(e)),
        }
        let asked = kiln_session::TokenRequest {
            client_id: request.client_id.to_owned(),
            host: request.host.clone(),
            realm: request.realm.clone(),
            service: request.service.clone(),
            scopes: request.scopes.clone(),
        };
        let token = session.fetch_token(&asked).await?;
        Ok(Some(Token {
            token: token.token,
            expires_in: u64::try_from(token.expires_in).unwrap_or(0),
            issued_at: (token.issued_at != 0).then_some(token.issued_at),
        }))
    }
}
