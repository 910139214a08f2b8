//! Registry credentials as Docker's configuration file and its helper programs keep them.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::auth::auth_server::{Auth, AuthServer};
use kiln_proto::auth::{
    CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse, GetTokenAuthorityRequest,
    GetTokenAuthorityResponse, VerifyTokenAuthorityRequest, VerifyTokenAuthorityResponse,
};
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;
use tonic::{Request, Response, Status};

use crate::auth::Credentials;

/// Knows credentials by registry host.
#[async_trait::async_trait]
pub trait CredentialStore: Send + Sync {
    /// Credentials for a host (Docker Hub is `registry-1.docker.io`); empty ones mean anonymous.
    async fn credentials(&self, host: &str) -> io::Result<Credentials>;
}

/// Docker's `config.json`: stored credentials, and the helper programs it names.
#[derive(Debug, Default)]
pub struct DockerConfig {
    file: ConfigFile,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ConfigFile {
    auths: HashMap<String, Stored>,
    creds_store: String,
    cred_helpers: HashMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "lowercase")]
struct Stored {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

/// What a helper program answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// The name under which Docker files credentials of its own registry.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The user name by which a helper says that the secret is an identity token.
const TOKEN_USER: &str = "<token>";

impl DockerConfig {
    /// Reads the file; one that does not exist holds no credentials.
    ///
    /// # Errors
    /// A file that cannot be read or is not JSON of that shape.
    pub fn read(path: &Path) -> io::Result<Self> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        };
        let file = serde_json::from_slice(&text)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display())))?;
        Ok(DockerConfig { file })
    }

    fn stored(&self, server: &str) -> Option<Credentials> {
        let named = |key: &String| host_of(key) == host_of(server);
        let stored = self.file.auths.get(server).or_else(|| {
            self.file
                .auths
                .iter()
                .find(|(key, _)| named(key))
                .map(|(_, stored)| stored)
        })?;
        if !stored.identitytoken.is_empty() {
            return Some(Credentials {
                username: String::new(),
                secret: stored.identitytoken.clone(),
            });
        }
        let decoded = STANDARD.decode(stored.auth.trim_end_matches('\0')).unwrap_or_default();
        let decoded = String::from_utf8(decoded).unwrap_or_default();
        Some(match decoded.split_once(':') {
            Some((username, password)) => Credentials {
                username: username.to_owned(),
                secret: password.trim_end_matches('\0').to_owned(),
            },
            None => Credentials {
                username: stored.username.clone(),
                secret: stored.password.clone(),
            },
        })
    }
}

/// The host in a key of `auths`, which may be a URL.
fn host_of(key: &str) -> &str {
    let key = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    key.split('/').next().unwrap_or(key)
}

#[async_trait::async_trait]
impl CredentialStore for DockerConfig {
    async fn credentials(&self, host: &str) -> io::Result<Credentials> {
        let server = match host {
            "registry-1.docker.io" | "docker.io" | "index.docker.io" => DOCKER_HUB,
            host => host,
        };
        let helper = self
            .file
            .cred_helpers
            .get(server)
            .or_else(|| self.file.cred_helpers.get(host));
        let helper = helper.unwrap_or(&self.file.creds_store);
        if !helper.is_empty()
            && let Some(found) = ask_helper(helper, server).await?
        {
            return Ok(found);
        }
        Ok(self.stored(server).unwrap_or_default())
    }
}

/// Runs `docker-credential-<helper> get`; `None` when it has nothing for the server.
async fn ask_helper(helper: &str, server: &str) -> io::Result<Option<Credentials>> {
    let program = PathBuf::from(format!("docker-credential-{helper}"));
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", program.display()));
    let mut child = tokio::process::Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(named)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(server.as_bytes()).await.map_err(named)?;
    }
    let output = child.wait_with_output().await.map_err(named)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stdout);
        if said.contains("credentials not found") {
            return Ok(None);
        }
        return Err(named(io::Error::other(said.trim().to_owned())));
    }
    let answer: HelperAnswer = serde_json::from_slice(&output.stdout).map_err(|error| named(error.into()))?;
    let username = if answer.username == TOKEN_USER {
        String::new()
    } else {
        answer.username
    };
    Ok(Some(Credentials {
        username,
        secret: answer.secret,
    }))
}

struct Service(Arc<dyn CredentialStore>);

pub(super) fn service(store: Arc<dyn CredentialStore>) -> AuthServer<impl Auth> {
    AuthServer::new(Service(store))
}

#[tonic::async_trait]
impl Auth for Service {
    async fn credentials(&self, request: Request<CredentialsRequest>) -> Result<Response<CredentialsResponse>, Status> {
        let found = self.0.credentials(&request.get_ref().host).await;
        let found = found.map_err(|error| Status::unknown(error.to_string()))?;
        Ok(Response::new(CredentialsResponse {
            username: found.username,
            secret: found.secret,
        }))
    }

    // Tokens are fetched by the daemon, with the credentials; saying so here is how a client without this ability
    // answers.
    async fn fetch_token(&self, _: Request<FetchTokenRequest>) -> Result<Response<FetchTokenResponse>, Status> {
        Err(Status::unimplemented("tokens are fetched by the daemon"))
    }

    async fn get_token_authority(
        &self,
        _: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("tokens are fetched by the daemon"))
    }

    async fn verify_token_authority(
        &self,
        _: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("tokens are fetched by the daemon"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lookup(config: &str, host: &str) -> (String, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        let found = DockerConfig::read(&path).unwrap().credentials(host).await.unwrap();
        (found.username, found.secret)
    }

    #[tokio::test]
    async fn stored_credentials() {
        let auth = STANDARD.encode("me:pass:word");
        let config = format!(
            r#"{{"auths":{{"https://index.docker.io/v1/":{{"auth":"{auth}"}},
            "https://reg.example/v2/":{{"identitytoken":"tok"}},"plain.example":{{"username":"u","password":"p"}}}},"x":1}}"#
        );
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(lookup(&config, "registry-1.docker.io").await, pair("me", "pass:word"));
        assert_eq!(lookup(&config, "reg.example").await, pair("", "tok"));
        assert_eq!(lookup(&config, "plain.example").await, pair("u", "p"));
        assert_eq!(lookup(&config, "other.example").await, pair("", ""));
    }

    #[tokio::test]
    async fn a_missing_file_is_anonymous_and_a_broken_one_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let none = DockerConfig::read(&dir.path().join("config.json")).unwrap();
        assert_eq!(none.credentials("x").await.unwrap(), Credentials::default());
        std::fs::write(dir.path().join("broken"), "{").unwrap();
        assert!(DockerConfig::read(&dir.path().join("broken")).is_err());
    }
}
