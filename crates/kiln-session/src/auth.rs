//! Registry credentials and tokens, asked from the client.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use kiln_proto::auth::auth_client::AuthClient;
use kiln_proto::auth::{CredentialsRequest, FetchTokenRequest, GetTokenAuthorityRequest, VerifyTokenAuthorityRequest};
use ring::signature::{ED25519, UnparsedPublicKey};

use crate::channel::{Channel, origin};
use crate::error::{Result, SessionError};
use crate::session::{MAX_RECEIVED, Session};

/// Every question about credentials is answered within this time or not at all; a credential helper may ask a person.
const LIMIT: Duration = Duration::from_secs(60);

/// What the client knows for a registry host.
///
/// `host` in all calls is the host that is contacted; for Docker Hub `registry-1.docker.io`.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Credentials {
    /// Empty together with a secret: the secret is an OAuth refresh token.
    pub username: String,
    /// Password or token; empty means anonymous.
    pub secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// What a token is wanted for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRequest {
    /// The name the registry's token service sees; `buildkit-client`.
    pub client_id: String,
    /// The registry.
    pub host: String,
    /// The token service's URL.
    pub realm: String,
    /// The `service` parameter of the challenge.
    pub service: String,
    /// Such as `repository:library/alpine:pull`.
    pub scopes: Vec<String>,
}

/// A bearer token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The token itself.
    pub token: String,
    /// Seconds; 0 when the registry did not say, which means 60.
    pub expires_in: i64,
    /// Unix seconds; 0 when the registry did not say.
    pub issued_at: i64,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("expires_in", &self.expires_in)
            .finish_non_exhaustive()
    }
}

/// A client's public key for one registry: it can fetch tokens itself, and prove to be the one a token was made for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TokenAuthority([u8; 32]);

impl TokenAuthority {
    /// The ed25519 public key.
    pub fn public_key(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether `signed` is a signature by this key followed by `payload`.
    pub fn verifies(&self, payload: &[u8], signed: &[u8]) -> bool {
        let Some((signature, message)) = signed.split_at_checked(64) else {
            return false;
        };
        message == payload
            && UnparsedPublicKey::new(&ED25519, &self.0)
                .verify(message, signature)
                .is_ok()
    }
}

impl Session {
    fn auth(&self) -> AuthClient<Channel> {
        AuthClient::with_origin(self.channel(), origin()).max_decoding_message_size(MAX_RECEIVED)
    }

    /// The client's credentials for a registry host; empty ones mean anonymous.
    pub async fn credentials(&self, host: &str) -> Result<Credentials> {
        let mut client = self.auth();
        let request = CredentialsRequest { host: host.to_owned() };
        let answer = self
            .call_within(LIMIT, &format!("credentials for {host}"), client.credentials(request))
            .await;
        let answer = match answer {
            // A client without the service has no credentials to give.
            Err(SessionError::Unsupported(_)) => return Ok(Credentials::default()),
            other => other?.into_inner(),
        };
        Ok(Credentials {
            username: answer.username,
            secret: answer.secret,
        })
    }

    /// Has the client fetch a token. Only clients with a [`TokenAuthority`] do.
    pub async fn fetch_token(&self, request: &TokenRequest) -> Result<Token> {
        let mut client = self.auth();
        let what = format!("token for {}", request.host);
        let call = client.fetch_token(FetchTokenRequest {
            client_id: request.client_id.clone(),
            host: request.host.clone(),
            realm: request.realm.clone(),
            service: request.service.clone(),
            scopes: request.scopes.clone(),
        });
        let answer = self.call_within(LIMIT, &what, call).await?.into_inner();
        Ok(Token {
            token: answer.token,
            expires_in: answer.expires_in,
            issued_at: answer.issued_at,
        })
    }

    /// The client's key for `host`, made with the daemon's `salt`; `None` when the client does not fetch tokens itself,
    /// which is normal.
    ///
    /// # Errors
    /// A key that is not 32 bytes long is [`SessionError::Protocol`].
    pub async fn token_authority(&self, host: &str, salt: &[u8]) -> Result<Option<TokenAuthority>> {
        let mut client = self.auth();
        let what = format!("token authority of {host}");
        let request = GetTokenAuthorityRequest {
            host: host.to_owned(),
            salt: Bytes::copy_from_slice(salt),
        };
        let answer = match self
            .call_within(LIMIT, &what, client.get_token_authority(request))
            .await
        {
            Ok(answer) => answer.into_inner(),
            Err(SessionError::Unsupported(_)) => return Ok(None),
            Err(SessionError::Remote { status, .. }) if status.code == tonic::Code::Unavailable as i32 => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        match answer.public_key.as_ref().try_into() {
            Ok(key) => Ok(Some(TokenAuthority(key))),
            Err(_) => {
                let length = answer.public_key.len();
                Err(SessionError::protocol(
                    &what,
                    format!("public key of {length} bytes instead of 32"),
                ))
            }
        }
    }

    /// Whether this client holds the key of `authority`, so that a token fetched for that key may be used for it.
    /// `payload` is 32 random bytes.
    pub async fn verify_token_authority(
        &self,
        host: &str,
        authority: &TokenAuthority,
        salt: &[u8],
        payload: &[u8],
    ) -> Result<bool> {
        let mut client = self.auth();
        let what = format!("token authority of {host}");
        let call = client.verify_token_authority(VerifyTokenAuthorityRequest {
            host: host.to_owned(),
            payload: Bytes::copy_from_slice(payload),
            salt: Bytes::copy_from_slice(salt),
        });
        let answer = self.call_within(LIMIT, &what, call).await?.into_inner();
        Ok(authority.verifies(payload, &answer.signed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::signature::{Ed25519KeyPair, KeyPair as _};

    #[test]
    fn only_the_right_key_and_payload_verify() {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
        let authority = TokenAuthority(pair.public_key().as_ref().try_into().unwrap());
        let mut signed = pair.sign(b"payload").as_ref().to_vec();
        signed.extend_from_slice(b"payload");
        assert!(authority.verifies(b"payload", &signed));
        assert!(!authority.verifies(b"other", &signed));
        assert!(!authority.verifies(b"payload", &signed[..40]));
        assert!(!TokenAuthority([1; 32]).verifies(b"payload", &signed));
    }
}
