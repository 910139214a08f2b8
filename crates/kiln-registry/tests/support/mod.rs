//! A real registry on loopback, a token server that signs, and a proxy that breaks things on command.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kiln_oci::{Descriptor, Digest};
use kiln_registry::{BlobSource, ByteStream, RegistryConfig, RetryPolicy, Timeouts};
use rustls_pki_types::pem::PemObject as _;

/// Quick retries and short patience.
pub fn config() -> RegistryConfig {
    RegistryConfig {
        retry: RetryPolicy {
            attempts: 4,
            base: Duration::from_millis(5),
            cap: Duration::from_millis(50),
        },
        timeouts: Timeouts {
            connect: Duration::from_secs(5),
            headers: Duration::from_secs(5),
            stall: Duration::from_millis(400),
            commit: Duration::from_secs(20),
        },
        ..RegistryConfig::default()
    }
}

pub fn run(program: &str, args: &[&str], dir: &Path) {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A self-signed CA and a server certificate for 127.0.0.1: `ca.pem`, `cert.pem`, `key.pem`.
pub fn certificates(dir: &Path) {
    run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
            "-days",
            "30",
            "-subj",
            "/CN=test ca",
        ],
        dir,
    );
    run(
        "openssl",
        &[
            "req", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "csr.pem", "-subj", "/CN=reg",
        ],
        dir,
    );
    std::fs::write(dir.join("ext"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
    run(
        "openssl",
        &[
            "x509",
            "-req",
            "-in",
            "csr.pem",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "30",
            "-extfile",
            "ext",
            "-out",
            "cert.pem",
        ],
        dir,
    );
}

pub enum Auth {
    None,
    /// `htpasswd` file content.
    Basic(String),
    Token {
        realm: String,
    },
}

/// Debian's docker-registry, killed on drop.
pub struct Server {
    pub address: String,
    pub dir: tempfile::TempDir,
    child: Child,
}

impl Server {
    pub fn start(auth: &Auth, tls: bool, key_dir: Option<&Path>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let root = dir.path().join("data");
        let mut text = format!(
            "version: 0.1\nlog:\n  accesslog:\n    disabled: true\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {address}\n",
            root.display()
        );
        if tls {
            certificates(dir.path());
            let d = dir.path().display();
            text += &format!("  tls:\n    certificate: {d}/cert.pem\n    key: {d}/key.pem\n");
        }
        match auth {
            Auth::None => {}
            Auth::Basic(content) => {
                let file = dir.path().join("htpasswd");
                std::fs::write(&file, content).unwrap();
                text += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", file.display());
            }
            Auth::Token { realm } => {
                let bundle = key_dir.unwrap().join("token.pem");
                text += &format!(
                    "auth:\n  token:\n    realm: {realm}\n    service: test-registry\n    issuer: test-issuer\n    rootcertbundle: {}\n",
                    bundle.display()
                );
            }
        }
        let file = dir.path().join("config.yml");
        std::fs::write(&file, text).unwrap();
        let child = Command::new("docker-registry")
            .args(["serve", file.to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry did not start");
            std::thread::yield_now();
        }
        Self { address, dir, child }
    }

    pub fn open() -> Self {
        Self::start(&Auth::None, false, None)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into())
        .map_err(|e: Infallible| match e {})
        .boxed_unsync()
}

/// What happens to one proxied request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Pass,
    Status(u16),
    /// The connection breaks after so many bytes of the answer.
    Break(usize),
    /// The answer stops, with the connection open, after so many bytes.
    Stall(usize),
    /// The answer ends properly, but too early.
    Truncate(usize),
    /// One byte of the answer is changed.
    Flip,
    /// The request's body breaks after so many bytes, towards the registry as well.
    BreakUpload(usize),
}

pub type Rule = Box<dyn FnMut(&Request<Incoming>) -> Fault + Send>;

/// A proxy in front of a registry, with a log of requests: `METHOD path range`.
#[derive(Clone)]
pub struct Proxy {
    pub address: String,
    pub log: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    pub async fn start(upstream: &str, rule: Rule) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let log = Arc::new(Mutex::new(Vec::new()));
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(no_tls())
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .unwrap();
        let rule = Arc::new(Mutex::new(rule));
        let (upstream, seen) = (upstream.to_owned(), log.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (http, rule, upstream, seen) = (http.clone(), rule.clone(), upstream.clone(), seen.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request: Request<Incoming>| {
                        let range = request.headers().get("range").map(|r| r.to_str().unwrap().to_owned());
                        seen.lock().unwrap().push(
                            format!(
                                "{} {} {}",
                                request.method(),
                                request.uri().path(),
                                range.unwrap_or_default()
                            )
                            .trim_end()
                            .to_owned(),
                        );
                        let fault = (rule.lock().unwrap())(&request);
                        forward(http.clone(), upstream.clone(), request, fault)
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
        Self { address, log }
    }

    pub fn count(&self, start: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|l| l.starts_with(start)).count()
    }
}

pub fn no_tls() -> rustls::ClientConfig {
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth()
}

async fn forward(
    http: reqwest::Client,
    upstream: String,
    request: Request<Incoming>,
    fault: Fault,
) -> Result<Response<Body>, std::io::Error> {
    if let Fault::Status(code) = fault {
        let status = StatusCode::from_u16(code).unwrap();
        let body = r#"{"errors":[{"code":"TEST","message":"made up"}]}"#;
        return Ok(Response::builder()
            .status(status)
            .header("retry-after", "0")
            .body(full(body))
            .unwrap());
    }
    let (parts, body) = request.into_parts();
    let url = format!("http://{upstream}{}", parts.uri.path_and_query().unwrap());
    let mut out = http.request(parts.method.clone(), url);
    for (name, value) in &parts.headers {
        if name != "connection" && name != "transfer-encoding" {
            out = out.header(name, value);
        }
    }
    if parts.headers.get("content-length").is_some_and(|v| v != "0") {
        let mut left = match fault {
            Fault::BreakUpload(n) => n,
            _ => usize::MAX,
        };
        let stream = body.into_data_stream().map(move |chunk| {
            let chunk = chunk.map_err(std::io::Error::other)?;
            if chunk.len() >= left {
                return Err(std::io::Error::other("broken on purpose"));
            }
            left -= chunk.len();
            Ok(chunk)
        });
        out = out.body(reqwest::Body::wrap_stream(stream));
    }
    let answer = out.send().await.map_err(std::io::Error::other)?;
    let mut response = Response::builder().status(answer.status());
    for (name, value) in answer.headers() {
        let keep_length = !matches!(fault, Fault::Truncate(_));
        if name != "connection" && name != "transfer-encoding" && (keep_length || name != "content-length") {
            response = response.header(name, value);
        }
    }
    if parts.method == "HEAD" {
        return Ok(response.body(full("")).unwrap());
    }
    let stream: Bodies = answer.bytes_stream().map(|c| c.map_err(std::io::Error::other)).boxed();
    Ok(response
        .body(StreamBody::new(damage(stream, fault).map(|c| c.map(Frame::data))).boxed_unsync())
        .unwrap())
}

type Bodies = futures::stream::BoxStream<'static, std::io::Result<Bytes>>;

fn damage(stream: Bodies, fault: Fault) -> Bodies {
    if fault == Fault::Flip {
        let mut first = true;
        return stream
            .map(move |chunk| {
                let mut bytes = chunk?.to_vec();
                if std::mem::take(&mut first) {
                    bytes[0] ^= 1;
                }
                Ok(bytes.into())
            })
            .boxed();
    }
    let (Fault::Break(limit) | Fault::Stall(limit) | Fault::Truncate(limit)) = fault else {
        return stream;
    };
    futures::stream::unfold((stream, limit), move |(mut stream, left)| async move {
        if left == 0 {
            return match fault {
                Fault::Break(_) => Some((Err(std::io::Error::other("broken on purpose")), (stream, 0))),
                Fault::Stall(_) => std::future::pending().await,
                _ => None,
            };
        }
        let mut chunk = stream.next().await?.ok()?;
        chunk.truncate(left);
        let left = left - chunk.len();
        Some((Ok(chunk), (stream, left)))
    })
    .boxed()
}

/// A token server: knows one user, grants pull to everybody on `public/*` and everything to that user, and signs with
/// the key in `dir` (made by [`TokenServer::start`]).
pub struct TokenServer {
    pub realm: String,
    pub dir: Arc<tempfile::TempDir>,
    /// Queries and forms seen: `GET <query>` or `POST <form>`.
    pub log: Arc<Mutex<Vec<String>>>,
}

impl TokenServer {
    /// `get` says whether the GET form is served; otherwise it answers 405 and only the OAuth form works.
    pub async fn start(get: bool) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        run(
            "openssl",
            &[
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-keyout",
                "token.key",
                "-out",
                "token.pem",
                "-days",
                "30",
                "-subj",
                "/CN=token signer",
            ],
            dir.path(),
        );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let realm = format!("http://{}/token", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (key_dir, seen) = (dir.clone(), log.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (key_dir, seen) = (key_dir.clone(), seen.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request: Request<Incoming>| {
                        answer_token(request, key_dir.clone(), seen.clone(), get)
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
        Self { realm, dir, log }
    }
}

pub const USER: &str = "alice";
pub const PASSWORD: &str = "s3cret";
pub const REFRESH: &str = "refresh-me";

async fn answer_token(
    request: Request<Incoming>,
    dir: Arc<tempfile::TempDir>,
    log: Arc<Mutex<Vec<String>>>,
    get: bool,
) -> Result<Response<Body>, std::io::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let text = if parts.method == "GET" {
        parts.uri.query().unwrap_or_default().to_owned()
    } else {
        String::from_utf8(body.to_vec()).unwrap()
    };
    log.lock().unwrap().push(format!("{} {text}", parts.method));
    let refuse = |code: u16| Ok(Response::builder().status(code).body(full("{}")).unwrap());
    if parts.method == "GET" && !get {
        return refuse(405);
    }
    let pairs: Vec<(String, String)> = url::form_urlencoded::parse(text.as_bytes()).into_owned().collect();
    let value = |name: &str| {
        pairs
            .iter()
            .find(|(k, _)| k == name)
            .map(|(_, v)| v.as_str())
            .unwrap_or_default()
    };
    let known = match parts.headers.get("authorization") {
        Some(header) => {
            let want = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
            if header.to_str().unwrap() != want {
                return refuse(401);
            }
            true
        }
        None if parts.method == "POST" => {
            let password =
                value("grant_type") == "password" && value("username") == USER && value("password") == PASSWORD;
            let refresh = value("grant_type") == "refresh_token" && value("refresh_token") == REFRESH;
            if !password && !refresh {
                return refuse(401);
            }
            true
        }
        None => false,
    };
    let scopes = pairs
        .iter()
        .filter(|(k, _)| k == "scope")
        .flat_map(|(_, v)| v.split(' '));
    let access: Vec<_> = scopes
        .filter(|s| !s.is_empty())
        .map(|scope| {
            let mut parts = scope.splitn(3, ':');
            let (kind, name, actions) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
            let granted: Vec<&str> = actions
                .split(',')
                .filter(|a| (known && !name.starts_with("forbidden/")) || (name.starts_with("public/") && *a == "pull"))
                .collect();
            serde_json::json!({"type": kind, "name": name, "actions": granted})
        })
        .collect();
    let token = sign(dir.path(), &serde_json::json!(access));
    let member = if parts.method == "GET" { "token" } else { "access_token" };
    let body = serde_json::json!({member: token, "expires_in": 300}).to_string();
    Ok(Response::builder()
        .header("content-type", "application/json")
        .body(full(body))
        .unwrap())
}

fn sign(dir: &Path, access: &serde_json::Value) -> String {
    let cert = rustls_pki_types::CertificateDer::from_pem_file(dir.join("token.pem")).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::from_pem_file(dir.join("token.key")).unwrap();
    let signer = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
    let signer = signer
        .choose_scheme(&[rustls::SignatureScheme::RSA_PKCS1_SHA256])
        .unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let header = serde_json::json!({"typ": "JWT", "alg": "RS256", "x5c": [STANDARD.encode(&cert)]});
    let claims = serde_json::json!({"iss": "test-issuer", "sub": "x", "aud": "test-registry", "exp": now + 300,
        "nbf": now - 10, "iat": now, "jti": "1", "access": access});
    let text = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(header.to_string()),
        URL_SAFE_NO_PAD.encode(claims.to_string())
    );
    let signature = signer.sign(text.as_bytes()).unwrap();
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// Blobs in memory.
pub struct Memory(pub Vec<Vec<u8>>);

#[async_trait::async_trait]
impl BlobSource for Memory {
    async fn open(&self, blob: &Descriptor, offset: u64) -> std::io::Result<ByteStream> {
        let bytes = self
            .0
            .iter()
            .find(|b| Digest::of(b) == blob.digest)
            .ok_or(std::io::ErrorKind::NotFound)?;
        let rest = Bytes::copy_from_slice(&bytes[offset as usize..]);
        let chunks: Vec<_> = rest.chunks(64 << 10).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
        Ok(Box::pin(futures::stream::iter(chunks)))
    }
}

/// Bytes that do not compress and differ by `seed`.
pub fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 32);
    let mut state = Digest::of([seed]);
    while out.len() < len {
        out.extend_from_slice(state.as_bytes());
        state = Digest::of(state.as_bytes());
    }
    out.truncate(len);
    out
}
