//! What a build brings along for its operations.

use kiln_session::SessionId;

/// The client of one build: its session, and registries seen through its credentials.
#[derive(Clone)]
pub struct Client {
    /// The session; an empty id if the client has none.
    pub session: SessionId,
    /// Registries, with the client's credentials.
    pub registry: kiln_registry::Client,
}

impl Client {
    /// A client by its session.
    pub fn new(session: SessionId, registry: kiln_registry::Client) -> Self {
        Self { session, registry }
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("session", &self.session).finish_non_exhaustive()
    }
}
