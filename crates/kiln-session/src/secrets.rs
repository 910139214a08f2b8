//! Build secrets, asked from the client.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use kiln_proto::secrets::GetSecretRequest;
use kiln_proto::secrets::secrets_client::SecretsClient;

use crate::channel::origin;
use crate::error::{Result, SessionError, SessionErrorKind};
use crate::session::{MAX_RECEIVED, Session};

/// A client that takes longer for a secret is treated as gone.
const LIMIT: Duration = Duration::from_secs(60);

impl Session {
    /// The secret `id`; `None` when the client does not have it, or no secrets at all.
    pub async fn secret(&self, id: &str) -> Result<Option<Bytes>> {
        if !self.supports("/moby.buildkit.secrets.v1.Secrets/GetSecret") {
            return Ok(None);
        }
        let mut client = SecretsClient::with_origin(self.channel(), origin()).max_decoding_message_size(MAX_RECEIVED);
        let call = client.get_secret(GetSecretRequest {
            id: id.to_owned(),
            annotations: BTreeMap::new(),
        });
        match self.call_within(LIMIT, &format!("secret {id}"), call).await {
            Ok(answer) => Ok(Some(answer.into_inner().data)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn is_absent(error: &SessionError) -> bool {
    matches!(error.kind(), SessionErrorKind::NotFound | SessionErrorKind::Unsupported)
}
