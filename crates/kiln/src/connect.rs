//! The connection to a daemon.

use std::time::Duration;

use kiln_proto::content::content_client::ContentClient;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::gateway::llb_bridge_client::LlbBridgeClient;
use tonic::transport::{Channel, Endpoint};

use crate::error::{CliError, Result};

/// The largest message either side sends.
const MAX_MESSAGE: usize = 16 << 20;

/// A connected daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Daemon(Channel);

impl Daemon {
    /// Connects to `unix://path` or `tcp://host:port`.
    pub(crate) async fn connect(address: &str) -> Result<Self> {
        let unreachable = |message: String| CliError::Unreachable {
            address: address.to_owned(),
            message,
        };
        let uri = match address.strip_prefix("tcp://") {
            Some(host) => format!("http://{host}"),
            None if address.starts_with("unix://") => address.to_owned(),
            None => {
                return Err(CliError::usage(format!(
                    "{address:?} is neither unix://path nor tcp://host:port"
                )));
            }
        };
        let endpoint = Endpoint::try_from(uri).map_err(|error| unreachable(text_of(&error)))?;
        let channel = endpoint
            .connect_timeout(Duration::from_secs(20))
            // The session is one stream that carries many.
            .initial_stream_window_size(8 << 20)
            .initial_connection_window_size(32 << 20)
            .connect()
            .await
            .map_err(|error| unreachable(text_of(&error)))?;
        Ok(Daemon(channel))
    }

    pub(crate) fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.0.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub(crate) fn bridge(&self) -> LlbBridgeClient<Channel> {
        LlbBridgeClient::new(self.0.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub(crate) fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.0.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
}

/// An error with its causes; the transport's own text says only "transport error".
fn text_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = inner.to_string();
        cause = inner.source();
    }
    text
}
