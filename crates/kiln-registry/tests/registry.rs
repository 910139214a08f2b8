//! The client against Debian's docker-registry: plain, with TLS, basic and token authentication, and with a proxy in
//! between that breaks things.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use kiln_oci::{Descriptor, Digest, ImageRef, Manifest, media_type};
use kiln_registry::{
    Anonymous, Client, CredentialError, CredentialSource, Credentials, ErrorKind, HostConfig, PushOutcome, Registry,
    RegistryConfig, RegistryError, Token, TokenRequest,
};
use support::{Auth, Fault, Memory, Proxy, Rule, Server, TokenServer, config, noise};

fn anonymous(config: RegistryConfig) -> Client {
    Registry::new(config).client(Arc::new(Anonymous))
}

fn image(text: &str) -> ImageRef {
    ImageRef::parse(text).unwrap()
}

/// Pushes an image of one layer under `reference` and returns the layer, the manifest's digest and its bytes.
async fn push_image(client: &Client, reference: &ImageRef, layer: Vec<u8>) -> (Descriptor, Digest, Vec<u8>) {
    let config = br#"{"architecture":"amd64","os":"linux"}"#.to_vec();
    let layer_descriptor = Descriptor::of(media_type::OCI_LAYER_GZIP, &layer);
    let config_descriptor = Descriptor::of(media_type::OCI_CONFIG, &config);
    let source = Memory(vec![config, layer]);
    client
        .push_blob(reference, &config_descriptor, &[], &source)
        .await
        .unwrap();
    client
        .push_blob(reference, &layer_descriptor, &[], &source)
        .await
        .unwrap();
    let manifest = Manifest::new(true, config_descriptor, vec![layer_descriptor.clone()])
        .to_bytes()
        .unwrap();
    client
        .push_manifest(reference, media_type::OCI_MANIFEST, &manifest)
        .await
        .unwrap();
    (layer_descriptor, Digest::of(&manifest), manifest)
}

async fn read(client: &Client, reference: &ImageRef, blob: &Descriptor) -> Result<Vec<u8>, RegistryError> {
    client
        .fetch_blob(reference, blob.digest, Some(blob.size))?
        .read_to_end(1 << 30)
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn push_resolve_and_fetch() {
    let server = Server::open();
    let client = anonymous(config());
    let name = image(&format!("{}/a/b:v1", server.address));
    let bytes = noise(1, 700_000);
    let (layer, digest, manifest) = push_image(&client, &name, bytes.clone()).await;

    let resolved = client.resolve(&name).await.unwrap();
    assert_eq!(resolved.descriptor.digest, digest);
    assert_eq!(resolved.descriptor.media_type, media_type::OCI_MANIFEST);
    assert_eq!(resolved.descriptor.size, manifest.len() as u64);
    assert_eq!(
        client.fetch_manifest(&name, digest).await.unwrap().bytes.unwrap(),
        manifest
    );
    assert_eq!(
        client
            .resolve(&name.clone().with_digest(digest))
            .await
            .unwrap()
            .descriptor
            .digest,
        digest
    );
    assert_eq!(read(&client, &name, &layer).await.unwrap(), bytes);
    assert!(client.has_blob(&name, layer.digest).await.unwrap());
    assert!(!client.has_blob(&name, Digest::of("other")).await.unwrap());

    assert_eq!(client.blob_size(&name, layer.digest).await.unwrap(), Some(layer.size));
    assert_eq!(client.blob_size(&name, Digest::of("other")).await.unwrap(), None);

    // again: nothing is sent; another repository: mounted
    let source = Memory(vec![]);
    assert_eq!(
        client.push_blob(&name, &layer, &[], &source).await.unwrap(),
        PushOutcome::Exists
    );
    let other = image(&format!("{}/c:v1", server.address));
    assert_eq!(
        client
            .push_blob(&other, &layer, &["nope/nope".into(), "a/b".into()], &source)
            .await
            .unwrap(),
        PushOutcome::Mounted
    );
    assert_eq!(
        client
            .push_manifest(&name, media_type::OCI_MANIFEST, &manifest)
            .await
            .unwrap(),
        PushOutcome::Exists
    );

    let missing = client
        .resolve(&image(&format!("{}/a/b:v2", server.address)))
        .await
        .unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert_eq!(missing.to_string(), format!("{}/a/b:v2: not found", server.address));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_host_is_named() {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let error = anonymous(config())
        .resolve(&image(&format!("127.0.0.1:{port}/x")))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(
        error.to_string().starts_with(&format!(
            "failed to do request: HEAD \"http://127.0.0.1:{port}/v2/x/manifests/latest\": connection refused"
        )),
        "{error}"
    );
}

/// Serves `rule` in front of a server with one pushed image.
async fn behind(rule: Rule) -> (Server, Proxy, Client, ImageRef, Descriptor, Vec<u8>) {
    let server = Server::open();
    let bytes = noise(7, 1_500_000);
    let direct = image(&format!("{}/img:1", server.address));
    let (layer, _, _) = push_image(&anonymous(config()), &direct, bytes.clone()).await;
    let proxy = Proxy::start(&server.address, rule).await;
    let name = image(&format!("{}/img:1", proxy.address));
    (server, proxy, anonymous(config()), name, layer, bytes)
}

fn on_blobs(mut faults: Vec<Fault>) -> Rule {
    faults.reverse();
    Box::new(move |request| {
        if request.method() == "GET" && request.uri().path().contains("/blobs/") {
            faults.pop().unwrap_or(Fault::Pass)
        } else {
            Fault::Pass
        }
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_stalled_and_short_transfers_are_resumed() {
    for fault in [Fault::Break(400_000), Fault::Stall(400_000), Fault::Truncate(400_000)] {
        let (_server, proxy, client, name, layer, bytes) = behind(on_blobs(vec![fault, fault])).await;
        assert!(read(&client, &name, &layer).await.unwrap() == bytes, "{fault:?}");
        let log = proxy.log.lock().unwrap().clone();
        let ranges: Vec<_> = log.iter().filter(|l| l.contains("bytes=")).collect();
        assert_eq!(ranges.len(), 2, "{fault:?}: {log:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn busy_and_failing_answers_are_tried_again() {
    let (_server, proxy, client, name, layer, bytes) = behind(on_blobs(vec![
        Fault::Status(429),
        Fault::Status(500),
        Fault::Status(503),
    ]))
    .await;
    assert!(read(&client, &name, &layer).await.unwrap() == bytes);
    assert_eq!(proxy.count("GET /v2/img/blobs/"), 4);
    // but not forever
    let (_server, proxy, client, name, layer, _) = behind(on_blobs(vec![Fault::Status(500); 50])).await;
    let error = read(&client, &name, &layer).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(
        error.to_string(),
        format!(
            "failed to fetch blob {}@{} from {}: unexpected status 500 Internal Server Error: test: made up",
            name.name(),
            layer.digest,
            proxy.address
        )
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_are_found_out() {
    let (_server, proxy, client, name, layer, _) = behind(on_blobs(vec![Fault::Flip; 9])).await;
    let error = read(&client, &name, &layer).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let text = error.to_string();
    assert!(
        text.contains(&proxy.address) && text.contains("digest mismatch"),
        "{text}"
    );
    let manifests: Rule = Box::new(|r| {
        if r.method() == "GET" && r.uri().path().contains("/manifests/") {
            Fault::Flip
        } else {
            Fault::Pass
        }
    });
    let (_server, _proxy, client, name, _, _) = behind(manifests).await;
    let digest = client.resolve(&name).await.unwrap().descriptor.digest;
    assert_eq!(
        client.fetch_manifest(&name, digest).await.unwrap_err().kind(),
        ErrorKind::Corrupt
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mirrors_come_first_and_the_origin_helps_out() {
    let (server, mirror, _, _, layer, bytes) = behind(Box::new(|r| {
        if r.uri().path().contains("/blobs/") {
            Fault::Flip
        } else {
            Fault::Pass
        }
    }))
    .await;
    let origin = Proxy::start(&server.address, Box::new(|_| Fault::Pass)).await;
    let mut c = config();
    let dead = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mirrors = vec![dead.to_string(), mirror.address.clone()];
    c.hosts.insert(
        origin.address.clone(),
        HostConfig {
            mirrors,
            ..HostConfig::default()
        },
    );
    let client = anonymous(c);
    let name = image(&format!("{}/img:1", origin.address));
    assert_eq!(client.resolve(&name).await.unwrap().host, mirror.address);
    assert_eq!(origin.log.lock().unwrap().len(), 0);
    // the mirror lies about the blob; the next attempt asks the origin
    assert_eq!(
        read(&client, &name, &layer).await.unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    assert!(read(&client, &name, &layer).await.unwrap() == bytes);
    assert_eq!(origin.count("GET /v2/img/blobs/"), 1);
    // writing never goes to a mirror
    let before = mirror.log.lock().unwrap().len();
    push_image(&client, &image(&format!("{}/new:1", origin.address)), noise(3, 1000)).await;
    assert_eq!(mirror.log.lock().unwrap().len(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_survive_broken_connections_and_size_limits() {
    for fault in [Fault::BreakUpload(300_000), Fault::Status(500), Fault::Status(413)] {
        let server = Server::open();
        let left = Arc::new(AtomicUsize::new(2));
        let rule: Rule = Box::new(move |r| {
            let whole = r.method() == "PUT" && r.uri().path().contains("/uploads/");
            let again = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| {
                n.checked_sub(usize::from(whole))
            });
            // 413 is the answer to every body that is too large, as a proxy would give it
            let long = r
                .headers()
                .get("content-length")
                .is_some_and(|l| l.to_str().unwrap().len() > 6);
            match fault {
                Fault::Status(413) if long => fault,
                Fault::Status(413) => Fault::Pass,
                _ if whole && again.is_ok() => fault,
                _ => Fault::Pass,
            }
        });
        let proxy = Proxy::start(&server.address, rule).await;
        let mut c = config();
        c.upload_chunk = 500_000;
        let client = anonymous(c);
        let name = image(&format!("{}/up:1", proxy.address));
        let bytes = noise(9, 2_000_000);
        let (layer, _, _) = push_image(&client, &name, bytes.clone()).await;
        let direct = image(&format!("{}/up:1", server.address));
        assert!(
            read(&anonymous(config()), &direct, &layer).await.unwrap() == bytes,
            "{fault:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_pushes_at_once_do_not_starve_one_another() {
    let server = Server::open();
    let mut c = config();
    c.max_concurrency = 1;
    let client = anonymous(c);
    let name = image(&format!("{}/many:1", server.address));
    let blobs: Vec<Vec<u8>> = (0..12).map(|n| noise(n, 50_000)).collect();
    let source = Memory(blobs.clone());
    let descriptors: Vec<_> = blobs.iter().map(|b| Descriptor::of(media_type::OCI_LAYER, b)).collect();
    let pushes = descriptors.iter().map(|d| client.push_blob(&name, d, &[], &source));
    let outcomes = futures::future::try_join_all(pushes).await.unwrap();
    assert!(outcomes.iter().all(|o| *o == PushOutcome::Uploaded));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_source_is_no_network_error() {
    let server = Server::open();
    let client = anonymous(config());
    let blob = Descriptor::of(media_type::OCI_LAYER, b"not in the source");
    let name = image(&format!("{}/x:1", server.address));
    let error = client.push_blob(&name, &blob, &[], &Memory(vec![])).await.unwrap_err();
    assert!(
        matches!(error, RegistryError::Source { digest, .. } if digest == blob.digest),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_ca_insecure_and_refusal() {
    let server = Server::start(&Auth::None, true, None);
    let with = |host: HostConfig| {
        let mut c = config();
        c.hosts.insert(server.address.clone(), host);
        anonymous(c)
    };
    let name = image(&format!("{}/tls:1", server.address));
    let ca = server.dir.path().join("ca.pem");
    let trusted = with(HostConfig {
        http: Some(false),
        ca: vec![ca.clone()],
        ..HostConfig::default()
    });
    push_image(&trusted, &name, noise(1, 10_000)).await;
    let insecure = with(HostConfig {
        insecure: Some(true),
        ..HostConfig::default()
    });
    insecure.resolve(&name).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(&ca, dir.path().join("ca.crt")).unwrap();
    let by_dir = with(HostConfig {
        http: Some(false),
        tlsconfigdir: vec![dir.path().to_owned()],
        ..HostConfig::default()
    });
    by_dir.resolve(&name).await.unwrap();
    let error = with(HostConfig {
        http: Some(false),
        ..HostConfig::default()
    })
    .resolve(&name)
    .await
    .unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    // a plain host marked insecure: TLS fails, HTTP is used
    let plain = Server::open();
    let mut c = config();
    c.hosts.insert(
        plain.address.clone(),
        HostConfig {
            insecure: Some(true),
            ..HostConfig::default()
        },
    );
    push_image(&anonymous(c), &image(&format!("{}/x:1", plain.address)), noise(1, 10)).await;
}

/// Credentials from memory, with a log of what was asked.
struct Given {
    credentials: Credentials,
    own_token: Option<String>,
    asked: Mutex<Vec<String>>,
}

impl Given {
    fn new(username: &str, secret: &str) -> Arc<Self> {
        let credentials = Credentials {
            username: username.into(),
            secret: secret.into(),
        };
        Arc::new(Self {
            credentials,
            own_token: None,
            asked: Mutex::default(),
        })
    }
}

#[async_trait]
impl CredentialSource for Given {
    fn identity(&self) -> &str {
        "session-1"
    }

    async fn credentials(&self, host: &str) -> Result<Credentials, CredentialError> {
        self.asked.lock().unwrap().push(host.to_owned());
        Ok(self.credentials.clone())
    }

    async fn fetch_token(&self, request: &TokenRequest) -> Result<Option<Token>, CredentialError> {
        let Some(token) = &self.own_token else { return Ok(None) };
        self.asked
            .lock()
            .unwrap()
            .push(format!("{} {}", request.service, request.scopes.join(" ")));
        Ok(Some(Token {
            token: token.clone(),
            expires_in: 100,
            issued_at: None,
        }))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn basic_authentication() {
    let server = Server::start(&Auth::Basic(htpasswd()), false, None);
    let name = image(&format!("{}/b:1", server.address));
    let given = Given::new(support::USER, support::PASSWORD);
    let client = Registry::new(config()).client(given.clone());
    push_image(&client, &name, noise(2, 100_000)).await;
    assert_eq!(*given.asked.lock().unwrap(), [server.address.clone()], "asked once");

    for (user, secret) in [("", ""), (support::USER, "wrong")] {
        let error = Registry::new(config())
            .client(Given::new(user, secret))
            .resolve(&name)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        assert!(
            error
                .to_string()
                .starts_with("pull access denied, repository does not exist or may require authorization"),
            "{error}"
        );
        assert!(error.to_string().contains(&server.address), "{error}");
    }
}

fn htpasswd() -> String {
    let output = std::process::Command::new("htpasswd")
        .args(["-nbB", support::USER, support::PASSWORD])
        .output()
        .expect("htpasswd (apache2-utils) is installed");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn token_authentication() {
    for get in [true, false] {
        let tokens = TokenServer::start(get).await;
        let server = Server::start(
            &Auth::Token {
                realm: tokens.realm.clone(),
            },
            false,
            Some(tokens.dir.path()),
        );
        let registry = Registry::new(config());
        let client = registry.client(Given::new(support::USER, support::PASSWORD));
        let name = image(&format!("{}/public/app:1", server.address));
        let (layer, _, _) = push_image(&client, &name, noise(2, 300_000)).await;
        let asked = tokens.log.lock().unwrap().len();
        // tokens are kept: reading with the token for pushing asks nobody
        read(&client, &name, &layer).await.unwrap();
        client.resolve(&name).await.unwrap();
        assert_eq!(tokens.log.lock().unwrap().len(), asked);
        let log = tokens.log.lock().unwrap().clone();
        let wanted = format!("scope={}", "repository%3Apublic%2Fapp%3Apull%2Cpush");
        assert!(
            log.iter()
                .any(|l| l.contains(&wanted) && l.contains("service=test-registry")),
            "{log:?}"
        );
        if get {
            // everybody may pull from public/, with a token for nobody
            let nobody = registry.client(Arc::new(Anonymous));
            nobody.resolve(&name).await.unwrap();
            // a refresh token: the GET is answered with 401, the form works
            registry.client(Arc::new(Refresh)).resolve(&name).await.unwrap();
        }

        // no right to push: refused, and the repository is named
        let stranger = registry.client(Arc::new(Stranger));
        let blob = Descriptor::of(media_type::OCI_LAYER, b"x");
        let forbidden = image(&format!("{}/forbidden/app:1", server.address));
        let error = client
            .push_blob(&forbidden, &blob, &[], &Memory(vec![b"x".to_vec()]))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        assert!(error.to_string().contains("forbidden/app"), "{error}");
        let error = stranger.resolve(&name).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    }
}

struct Refresh;

#[async_trait]
impl CredentialSource for Refresh {
    fn identity(&self) -> &str {
        "refresh"
    }
    async fn credentials(&self, _host: &str) -> Result<Credentials, CredentialError> {
        Ok(Credentials {
            username: String::new(),
            secret: support::REFRESH.into(),
        })
    }
    async fn fetch_token(&self, _request: &TokenRequest) -> Result<Option<Token>, CredentialError> {
        Ok(None)
    }
}

/// Has a password that nobody knows.
struct Stranger;

#[async_trait]
impl CredentialSource for Stranger {
    fn identity(&self) -> &str {
        "stranger"
    }
    async fn credentials(&self, _host: &str) -> Result<Credentials, CredentialError> {
        Ok(Credentials {
            username: "mallory".into(),
            secret: "guess".into(),
        })
    }
    async fn fetch_token(&self, _request: &TokenRequest) -> Result<Option<Token>, CredentialError> {
        Ok(None)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_may_fetch_tokens_itself() {
    let tokens = TokenServer::start(true).await;
    let server = Server::start(
        &Auth::Token {
            realm: tokens.realm.clone(),
        },
        false,
        Some(tokens.dir.path()),
    );
    let given = Arc::new(Given {
        credentials: Credentials::default(),
        own_token: Some("forged".into()),
        asked: Mutex::default(),
    });
    let client = Registry::new(config()).client(given.clone());
    let error = client
        .resolve(&image(&format!("{}/public/app:1", server.address)))
        .await
        .unwrap_err();
    // the registry verifies signatures: a made-up token is refused, and nobody asked the token server
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(tokens.log.lock().unwrap().is_empty());
    assert_eq!(
        given.asked.lock().unwrap()[0],
        "test-registry repository:public/app:pull"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_connections_than_allowed() {
    let running = Arc::new(AtomicUsize::new(0));
    let server = Server::open();
    let direct = anonymous(config());
    let name = image(&format!("{}/many:1", server.address));
    let mut layers = Vec::new();
    for n in 0..8 {
        layers.push(push_image(&direct, &name, noise(n, 200_000)).await.0);
    }
    let mut c = config();
    c.max_concurrency = 2;
    let client = anonymous(c);
    // readers that hold their answer count as running
    let mut tasks = Vec::new();
    let most = Arc::new(AtomicUsize::new(0));
    for layer in layers {
        let (client, name, running, most) = (client.clone(), name.clone(), running.clone(), most.clone());
        tasks.push(tokio::spawn(async move {
            let mut reader = client.fetch_blob(&name, layer.digest, Some(layer.size)).unwrap();
            let first = reader.chunk().await.unwrap();
            assert!(first.is_some());
            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::task::yield_now().await;
            while reader.chunk().await.unwrap().is_some() {
                running.load(Ordering::SeqCst);
            }
            running.fetch_sub(1, Ordering::SeqCst);
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let most = most.load(Ordering::SeqCst);
    // the count goes down only after the permit is free again, hence one more per reader may be seen ending
    assert!(most <= 4, "{most} at once");
}
