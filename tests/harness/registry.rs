//! Registries: Debian's docker-registry on a port of its own, open, with basic authentication, or with signed tokens.

use crate::lab;
use crate::process::{self, Process};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// A running registry on the loopback interface.
#[derive(Debug)]
pub struct Registry {
    process: Process,
    host: String,
    data: PathBuf,
    credentials: Option<(String, String)>,
    tokens: Option<TokenServer>,
    scheme: &'static str,
    dir: TempDir,
}

impl Registry {
    /// The lab's base images, read-only.
    pub fn of_lab() -> Registry {
        Registry::launch(Some(&lab::registry_data()), Guard::Open)
    }

    /// An empty registry that anyone may use.
    pub fn empty() -> Registry {
        Registry::launch(None, Guard::Open)
    }

    /// An empty registry that asks for a user and a password.
    pub fn basic(user: &str, password: &str) -> Registry {
        Registry::launch(None, Guard::Basic(user, password))
    }

    /// An empty registry that wants a token signed by its own token server, which gives one to `user` with `password` for the
    /// repositories whose name begins with `allowed`, and an empty one for others.
    pub fn token(user: &str, password: &str, allowed: &str) -> Registry {
        Registry::launch(None, Guard::Token(user, password, allowed))
    }

    /// An empty registry that speaks TLS with a certificate of its own authority, [`Registry::authority`].
    pub fn tls() -> Registry {
        Registry::launch(None, Guard::Tls)
    }

    /// The certificate of the authority that signed a TLS registry's.
    pub fn authority(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    fn launch(shared: Option<&Path>, guard: Guard<'_>) -> Registry {
        let dir = tempfile::Builder::new()
            .prefix("kiln-registry-")
            .tempdir()
            .expect("a directory for the registry");
        let data = shared.map_or_else(|| dir.path().join("data"), Path::to_owned);
        let mut config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\n",
            data.display()
        );
        if shared.is_some() {
            config.push_str("  maintenance:\n    readonly:\n      enabled: true\n");
        }
        config.push_str("http:\n  addr: 127.0.0.1:0\n");
        let mut credentials = None;
        let mut tokens = None;
        let mut scheme = "http";
        match guard {
            Guard::Open => {}
            Guard::Tls => {
                scheme = "https";
                certificates(dir.path(), "server", "IP:127.0.0.1,DNS:localhost");
                let (certificate, key) = (dir.path().join("server.crt"), dir.path().join("server.key"));
                config.push_str(&format!(
                    "  tls:\n    certificate: {}\n    key: {}\n",
                    certificate.display(),
                    key.display()
                ));
            }
            Guard::Basic(user, password) => {
                let line = output(Command::new("htpasswd").args(["-nbB", user, password]));
                std::fs::write(dir.path().join("htpasswd"), line).expect("writing the password file");
                config.push_str(&format!(
                    "auth:\n  htpasswd:\n    realm: kiln-lab\n    path: {}\n",
                    dir.path().join("htpasswd").display()
                ));
                credentials = Some((user.to_owned(), password.to_owned()));
            }
            Guard::Token(user, password, allowed) => {
                let server = TokenServer::start(dir.path(), user, password, allowed);
                config.push_str(&format!(
                    "auth:\n  token:\n    realm: {}\n    service: kiln-lab\n    issuer: kiln-lab\n    rootcertbundle: {}\n",
                    server.realm,
                    dir.path().join("token.crt").display()
                ));
                credentials = Some((user.to_owned(), password.to_owned()));
                tokens = Some(server);
            }
        }
        let file = dir.path().join("registry.yml");
        std::fs::write(&file, config).expect("writing the registry's configuration");
        let log = dir.path().join("registry.log");
        let program = find("docker-registry");
        let env = [("OTEL_TRACES_EXPORTER", "none")];
        let mut process = Process::start(&program, &["serve".into(), file.display().to_string()], &env, &log);
        let host = process::eventually(Duration::from_secs(20), || {
            let text = process.log();
            let host = text.split("listening on ").nth(1).map(|rest| {
                rest.chars()
                    .take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ':'))
                    .collect::<String>()
            });
            host.map(Some).or_else(|| (!process.running()).then_some(None))
        });
        let host = host
            .flatten()
            .unwrap_or_else(|| panic!("the registry does not listen; it said:\n{}", process.log()));
        Registry {
            process,
            host,
            data,
            credentials,
            tokens,
            scheme,
            dir,
        }
    }

    /// `127.0.0.1:port`, the registry's name in image references.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Where its files lie.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// What the registry logged, a line for each request among it.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// How many requests of the form `METHOD /v2/…part…` were made.
    pub fn requests(&self, method: &str, part: &str) -> usize {
        let start = format!("\"{method} /v2/");
        self.log()
            .lines()
            .filter(|line| line.contains(&start) && line.contains(part))
            .count()
    }

    /// What the token server was asked for, one scope list for each token.
    pub fn scopes(&self) -> Vec<String> {
        self.tokens
            .as_ref()
            .map(|server| server.asked.lock().expect("the list").clone())
            .unwrap_or_default()
    }

    /// A document of the registry, or none if there is no such thing.
    pub fn get(&self, path: &str) -> Option<Vec<u8>> {
        let mut command = Command::new("curl");
        command.args(["-sfL", "-H", "Accept: application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json, */*"]);
        if let Some((user, password)) = &self.credentials {
            if self.tokens.is_some() {
                let repository = path
                    .trim_start_matches("/v2/")
                    .split("/manifests/")
                    .next()
                    .and_then(|p| p.split("/blobs/").next());
                let token = self.mint(repository.unwrap_or_default());
                command.args(["-H", &format!("Authorization: Bearer {token}")]);
            } else {
                command.args(["-u", &format!("{user}:{password}")]);
            }
        }
        let result = command
            .arg("-k")
            .arg(format!("{}://{}{path}", self.scheme, self.host))
            .output()
            .expect("curl runs");
        result.status.success().then_some(result.stdout)
    }

    /// A JSON document of the registry.
    ///
    /// # Panics
    /// If there is no such thing.
    pub fn json(&self, path: &str) -> Value {
        let bytes = self
            .get(path)
            .unwrap_or_else(|| panic!("the registry has no {path}; its log:\n{}", self.log()));
        serde_json::from_slice(&bytes).expect("a JSON document")
    }

    fn mint(&self, repository: &str) -> String {
        let server = self.tokens.as_ref().expect("a token server");
        server
            .signer
            .token(&[json!({"type": "repository", "name": repository, "actions": ["pull", "push"]})])
    }

    /// The file that holds a blob.
    pub fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.data
            .join("docker/registry/v2/blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }

    /// Ends the registry now.
    pub fn stop(&mut self) {
        self.process.stop(Duration::from_secs(5));
    }
}

enum Guard<'a> {
    Open,
    Tls,
    Basic(&'a str, &'a str),
    Token(&'a str, &'a str, &'a str),
}

/// Signs tokens in the form that the registry verifies: RS256, with the certificate in the header.
#[derive(Debug)]
struct Signer {
    dir: PathBuf,
    certificate: String,
}

impl Signer {
    fn new(dir: &Path) -> Signer {
        let (key, certificate) = (dir.join("token.key"), dir.join("token.crt"));
        output(
            Command::new("openssl")
                .args([
                    "req",
                    "-x509",
                    "-newkey",
                    "rsa:2048",
                    "-nodes",
                    "-days",
                    "2",
                    "-subj",
                    "/CN=kiln-lab",
                    "-keyout",
                ])
                .arg(&key)
                .arg("-out")
                .arg(&certificate)
                .stderr(Stdio::null()),
        );
        let der = output(
            Command::new("openssl")
                .args(["x509", "-outform", "DER", "-in"])
                .arg(&certificate),
        );
        Signer {
            dir: dir.to_owned(),
            certificate: STANDARD.encode(der),
        }
    }

    fn token(&self, access: &[Value]) -> String {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .expect("a time after 1970")
            .as_secs();
        let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [self.certificate]});
        let claims = json!({
            "iss": "kiln-lab", "sub": "tester", "aud": "kiln-lab", "exp": now + 300, "nbf": now - 10, "iat": now,
            "jti": format!("{now}-{}", access.len()), "access": access,
        });
        let text = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let file = tempfile::NamedTempFile::new_in(&self.dir).expect("a file to sign");
        std::fs::write(file.path(), &text).expect("writing what is to be signed");
        let signature = output(
            Command::new("openssl")
                .args(["dgst", "-sha256", "-sign"])
                .arg(self.dir.join("token.key"))
                .arg(file.path()),
        );
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// The server that hands out tokens: HTTP, one thread, one request for each connection.
#[derive(Debug)]
struct TokenServer {
    realm: String,
    signer: Arc<Signer>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl TokenServer {
    fn start(dir: &Path, user: &str, password: &str, allowed: &str) -> TokenServer {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port for the token server");
        let realm = format!("http://{}/token", listener.local_addr().expect("an address"));
        let signer = Arc::new(Signer::new(dir));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let expected = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        let allowed = allowed.to_owned();
        let (signer2, asked2) = (Arc::clone(&signer), Arc::clone(&asked));
        std::thread::Builder::new()
            .name("token-server".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    // A client that goes away in the middle is its own business.
                    let _ = answer(&stream, &signer2, &asked2, &expected, &allowed);
                }
            })
            .expect("a thread");
        TokenServer { realm, signer, asked }
    }
}

fn answer(
    stream: &TcpStream,
    signer: &Signer,
    asked: &Mutex<Vec<String>>,
    expected: &str,
    allowed: &str,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut authorization = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("authorization")
        {
            authorization = value.trim().to_owned();
        }
    }
    let mut words = request.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let reply = |status: &str, body: String| {
        let text = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        (&*stream).write_all(text.as_bytes())
    };
    // Only the classic form exists here; clients that try the OAuth form first fall back on "not found".
    if method != "GET" {
        return reply("404 Not Found", "{}".into());
    }
    let query = target.split_once('?').map_or("", |(_, query)| query);
    let scopes: Vec<String> = query
        .split('&')
        .filter_map(|pair| pair.strip_prefix("scope="))
        .flat_map(|value| decode(value).split(' ').map(str::to_owned).collect::<Vec<_>>())
        .collect();
    asked.lock().expect("the list").push(scopes.join(" "));
    if !authorization.is_empty() && authorization != expected {
        return reply(
            "401 Unauthorized",
            r#"{"details":"incorrect username or password"}"#.into(),
        );
    }
    let mut access = Vec::new();
    for scope in &scopes {
        let mut parts = scope.splitn(3, ':');
        let (kind, name, actions) = (
            parts.next(),
            parts.next().unwrap_or_default(),
            parts.next().unwrap_or_default(),
        );
        if authorization == expected && kind == Some("repository") && name.starts_with(allowed) {
            access.push(json!({"type": "repository", "name": name, "actions": actions.split(',').collect::<Vec<_>>()}));
        }
    }
    let token = signer.token(&access);
    reply(
        "200 OK",
        json!({"token": token, "access_token": token, "expires_in": 300}).to_string(),
    )
}

/// Undoes the escapes of a query value.
fn decode(value: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = value.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        match first {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits = rest.get(..2).and_then(|pair| std::str::from_utf8(pair).ok());
                if let Some(byte) = digits.and_then(|pair| u8::from_str_radix(pair, 16).ok()) {
                    bytes.push(byte);
                    rest = rest.get(2..).unwrap_or_default();
                }
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Makes an authority (`ca.crt`) in `dir`, unless it is there, and a certificate and key signed by it, `name.crt` and `name.key`.
///
/// # Panics
/// If openssl is missing or fails.
pub fn certificates(dir: &Path, name: &str, alternative_names: &str) {
    let file = |name: &str| dir.join(name).display().to_string();
    let openssl = |args: &[&str]| {
        output(Command::new("openssl").args(args).stderr(Stdio::null()));
    };
    if !dir.join("ca.crt").exists() {
        let (key, certificate) = (file("ca.key"), file("ca.crt"));
        openssl(&[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=kiln lab authority",
            "-keyout",
            &key,
            "-out",
            &certificate,
        ]);
    }
    let (key, request, certificate) = (
        file(&format!("{name}.key")),
        file(&format!("{name}.csr")),
        file(&format!("{name}.crt")),
    );
    let subject = format!("/CN={name}");
    openssl(&[
        "req", "-newkey", "rsa:2048", "-nodes", "-subj", &subject, "-keyout", &key, "-out", &request,
    ]);
    std::fs::write(dir.join("ext"), format!("subjectAltName={alternative_names}\n")).expect("writing extensions");
    let (ca, ca_key, ext) = (file("ca.crt"), file("ca.key"), file("ext"));
    openssl(&[
        "x509",
        "-req",
        "-in",
        &request,
        "-CA",
        &ca,
        "-CAkey",
        &ca_key,
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        &ext,
        "-out",
        &certificate,
    ]);
}

fn find(name: &str) -> PathBuf {
    ["/usr/bin", "/usr/local/bin", "/usr/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed: run `tests/lab/install`"))
}

fn output(command: &mut Command) -> Vec<u8> {
    let result = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        result.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&result.stderr)
    );
    result.stdout
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_decoded() {
        assert_eq!(decode("repository%3Aa%2Fb%3Apull+x"), "repository:a/b:pull x");
    }
}
