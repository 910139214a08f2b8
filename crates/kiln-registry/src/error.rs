//! What can go wrong between Kiln and a registry; every message names the host and the thing asked for.

use kiln_oci::Digest;
use reqwest::StatusCode;

use crate::auth::CredentialError;

/// What an error means for the user of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The name, tag, manifest or blob does not exist.
    NotFound,
    /// Credentials are missing, wrong or not sufficient.
    Denied,
    /// The host cannot be reached, answers with an error of its own, or is too busy.
    Unavailable,
    /// The host sent something else than what was asked for.
    Corrupt,
    /// The configuration or the request makes no sense.
    Invalid,
}

/// A failed registry operation.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The configuration of a host cannot be used.
    #[error("invalid configuration of registry {host}: {what}")]
    Config {
        /// Host as configured.
        host: String,
        /// What is wrong.
        what: String,
    },
    /// No answer: name resolution, connection, TLS, or a connection that broke.
    #[error("failed to do request: {method} \"{url}\": {cause}")]
    Request {
        /// HTTP method.
        method: String,
        /// URL without credentials.
        url: String,
        /// Innermost cause.
        cause: String,
        /// The HTTP library's error.
        #[source]
        source: Option<reqwest::Error>,
    },
    /// An answer with a status that stops the operation.
    #[error("{what} from {host}: unexpected status {status}{}", suffix(.detail))]
    Status {
        /// What was attempted on what.
        what: String,
        /// Host that answered.
        host: String,
        /// Its status.
        status: StatusCode,
        /// The registry's own words, possibly empty.
        detail: String,
    },
    /// The thing does not exist there.
    #[error("{what}: not found")]
    NotFound {
        /// Reference or `repository@digest`.
        what: String,
        /// Host that said so.
        host: String,
    },
    /// The host refuses a pull.
    #[error(
        "pull access denied, repository does not exist or may require authorization: server message: {detail} ({what} on {host})"
    )]
    PullDenied {
        /// Reference or `repository@digest`.
        what: String,
        /// Host that refused.
        host: String,
        /// Its words.
        detail: String,
    },
    /// The host refuses a push.
    #[error(
        "push access denied, repository does not exist or may require authorization: server message: {detail} ({what} on {host})"
    )]
    PushDenied {
        /// Reference or `repository@digest`.
        what: String,
        /// Host that refused.
        host: String,
        /// Its words.
        detail: String,
    },
    /// No token could be had.
    #[error("failed to authorize to {host}: {what}")]
    Token {
        /// Registry host.
        host: String,
        /// What happened at the token server.
        what: String,
    },
    /// The client that holds the credentials failed to give them.
    #[error("failed to get credentials for {host}")]
    Credentials {
        /// Registry host.
        host: String,
        /// The session's error.
        #[source]
        source: CredentialError,
    },
    /// The bytes are not those that the digest names.
    #[error("{what} from {host}: digest mismatch: expected {expected}, got {actual}")]
    DigestMismatch {
        /// What was fetched.
        what: String,
        /// Host that sent it.
        host: String,
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },
    /// Too many or too few bytes.
    #[error("{what} from {host}: expected {expected} bytes, got {actual}")]
    SizeMismatch {
        /// What was fetched.
        what: String,
        /// Host that sent it.
        host: String,
        /// Bytes announced.
        expected: u64,
        /// Bytes that came.
        actual: u64,
    },
    /// An answer that does not follow the protocol.
    #[error("{what} from {host}: {problem}")]
    Protocol {
        /// What was attempted.
        what: String,
        /// Host that answered.
        host: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// What should be pushed could not be read.
    #[error("failed to read blob {digest} to push")]
    Source {
        /// The blob.
        digest: Digest,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn suffix(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

impl RegistryError {
    /// What the error means for the user.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } => ErrorKind::Invalid,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::PullDenied { .. } | Self::PushDenied { .. } | Self::Credentials { .. } | Self::Token { .. } => {
                ErrorKind::Denied
            }
            Self::Request { .. } | Self::Source { .. } => ErrorKind::Unavailable,
            Self::Status { status, .. } if status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS => {
                ErrorKind::Unavailable
            }
            Self::Status { .. } | Self::Protocol { .. } => ErrorKind::Invalid,
            Self::DigestMismatch { .. } | Self::SizeMismatch { .. } => ErrorKind::Corrupt,
        }
    }

    /// Of the errors of several hosts, the one with the highest rank tells the user most.
    pub(crate) fn rank(&self) -> u8 {
        match self.kind() {
            ErrorKind::Denied => 5,
            ErrorKind::Corrupt => 4,
            ErrorKind::NotFound => 3,
            ErrorKind::Invalid => 2,
            ErrorKind::Unavailable => 1,
        }
    }
}

/// The last message in a chain of causes: `connection refused` rather than "error sending request".
pub fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut current = error;
    while let Some(next) = current.source() {
        current = next;
    }
    match current.downcast_ref::<std::io::Error>() {
        // `Connection refused (os error 111)` is `connection refused` by its kind; kinds without a name of their own say
        // less than the system's text.
        Some(error) if error.raw_os_error().is_some() => match error.kind().to_string() {
            kind if kind == "uncategorized error" || kind == "other error" => error.to_string(),
            kind => kind,
        },
        _ => current.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::innermost;

    #[test]
    fn the_system_s_errors_are_named_by_their_kind() {
        // ECONNREFUSED
        assert_eq!(innermost(&std::io::Error::from_raw_os_error(111)), "connection refused");
        assert_eq!(innermost(&std::io::Error::other("odd")), "odd");
    }
}
