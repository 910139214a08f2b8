//! From a registry's name to the places that serve it: mirrors in order, then the origin, each with its TLS and limits.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustls::RootCertStore;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::auth::AuthCache;
use crate::config::{HostConfig, RegistryConfig};
use crate::error::RegistryError;

/// Docker Hub's name in references, and where its registry is.
const HUB: &str = "docker.io";
const HUB_REGISTRY: &str = "registry-1.docker.io";

/// Which permits a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Layers and other big bodies.
    Bulk,
    /// Small JSON: may also take the permit that is kept for it.
    Small,
}

/// One place that serves a registry's content.
#[derive(Debug)]
pub(crate) struct Endpoint {
    /// `host[:port]`, as used in URLs, error messages and when asking for credentials.
    pub(crate) host: String,
    /// What follows `/v2` (mirrors that proxy several registries), with a leading slash, or empty.
    prefix: String,
    /// For mirrors: the registry they stand for, sent as `ns`.
    namespace: Option<String>,
    pub(crate) http: reqwest::Client,
    plain: AtomicBool,
    /// TLS failures may be followed by an attempt over plain HTTP.
    fallback: bool,
    bulk: Arc<Semaphore>,
    small: Arc<Semaphore>,
    pub(crate) auth: AuthCache,
}

impl Endpoint {
    /// The URL of `path` (`/name/manifests/x`) here.
    pub(crate) fn url(&self, path: &str) -> String {
        let scheme = if self.plain.load(Ordering::Relaxed) {
            "http"
        } else {
            "https"
        };
        let query = match &self.namespace {
            Some(ns) => format!(
                "?ns={}",
                percent_encoding::utf8_percent_encode(ns, percent_encoding::NON_ALPHANUMERIC)
            ),
            None => String::new(),
        };
        format!("{scheme}://{}/v2{}{path}{query}", self.host, self.prefix)
    }

    /// Whether this place only copies another registry.
    pub(crate) fn is_mirror(&self) -> bool {
        self.namespace.is_some()
    }

    /// The name that `repository` has in scopes here.
    pub(crate) fn scope_name(&self, repository: &str) -> String {
        match self.prefix.strip_prefix('/') {
            Some(prefix) => format!("{prefix}/{repository}"),
            None => repository.to_owned(),
        }
    }

    /// Switches to plain HTTP if that is allowed and was not done before.
    pub(crate) fn fall_back_to_plain(&self) -> bool {
        self.fallback && !self.plain.swap(true, Ordering::Relaxed)
    }

    /// Waits for the right to have one more request running here.
    pub(crate) async fn permit(&self, lane: Lane) -> Option<OwnedSemaphorePermit> {
        let bulk = self.bulk.clone().acquire_owned();
        match lane {
            Lane::Bulk => bulk.await.ok(),
            Lane::Small => tokio::select! {
                biased;
                permit = bulk => permit.ok(),
                permit = self.small.clone().acquire_owned() => permit.ok(),
            },
        }
    }
}

/// Mirrors in order, then the origin.
pub(crate) type Endpoints = Arc<[Arc<Endpoint>]>;

/// Permits of the bulk and of the small lane.
type Limits = (Arc<Semaphore>, Arc<Semaphore>);

/// All endpoints that were ever needed, by registry name.
#[derive(Debug)]
pub(crate) struct Hosts {
    config: RegistryConfig,
    roots: Vec<CertificateDer<'static>>,
    web: OnceLock<reqwest::Client>,
    /// Limits belong to a host, however many names it is reached by.
    limits: Mutex<HashMap<String, Limits>>,
    /// By registry name and whether insecure access was asked for.
    known: Mutex<HashMap<(String, bool), Endpoints>>,
}

impl Hosts {
    pub(crate) fn new(config: RegistryConfig) -> Self {
        let native = rustls_native_certs::load_native_certs();
        for error in &native.errors {
            tracing::debug!(%error, "system certificate left out");
        }
        Self {
            config,
            roots: native.certs,
            web: OnceLock::new(),
            limits: Mutex::default(),
            known: Mutex::default(),
        }
    }

    pub(crate) fn config(&self) -> &RegistryConfig {
        &self.config
    }

    /// A client for hosts that are no registries; made once.
    pub(crate) fn web(&self) -> Result<reqwest::Client, RegistryError> {
        if let Some(client) = self.web.get() {
            return Ok(client.clone());
        }
        let client = self.http_client("the web", &HostConfig::default())?;
        Ok(self.web.get_or_init(|| client).clone())
    }

    /// Mirrors of `domain` in order, then its origin, which is always there and last.
    pub(crate) fn endpoints(&self, domain: &str, insecure: bool) -> Result<Endpoints, RegistryError> {
        let key = (domain.to_owned(), insecure);
        if let Some(found) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(found.clone());
        }
        let mut list = Vec::new();
        let origin = self.config.hosts.get(domain);
        for mirror in origin.map(|c| c.mirrors.as_slice()).unwrap_or_default() {
            list.push(Arc::new(self.mirror(mirror, domain)?));
        }
        let host = if domain == HUB { HUB_REGISTRY } else { domain };
        let config = origin
            .or_else(|| self.config.hosts.get(host))
            .cloned()
            .unwrap_or_default();
        list.push(Arc::new(self.endpoint(host, String::new(), None, &config)?));
        let list: Endpoints = list.into();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(known.entry(key).or_insert(list).clone())
    }

    fn mirror(&self, text: &str, domain: &str) -> Result<Endpoint, RegistryError> {
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) => (Some(scheme), rest),
            None => (None, text),
        };
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        if host.is_empty() {
            return Err(RegistryError::Config {
                host: domain.to_owned(),
                what: format!("invalid mirror `{text}`"),
            });
        }
        let mut config = self.config.hosts.get(host).cloned().unwrap_or_default();
        match scheme {
            None => {}
            Some("http") => config.http = Some(true),
            Some("https") => config.http = Some(false),
            Some(_) => {
                return Err(RegistryError::Config {
                    host: domain.to_owned(),
                    what: format!("invalid mirror `{text}`"),
                });
            }
        }
        let path = path.trim_matches('/');
        let path = path.strip_prefix("v2/").unwrap_or(path);
        let prefix = if path.is_empty() || path == "v2" {
            String::new()
        } else {
            format!("/{path}")
        };
        self.endpoint(host, prefix, Some(domain.to_owned()), &config)
    }

    fn endpoint(
        &self,
        host: &str,
        prefix: String,
        namespace: Option<String>,
        config: &HostConfig,
    ) -> Result<Endpoint, RegistryError> {
        let insecure = config.insecure.unwrap_or(false);
        let plain = config.http.unwrap_or(!insecure && is_loopback(host));
        let (bulk, small) = self
            .limits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(host.to_owned())
            .or_insert_with(|| {
                (
                    Arc::new(Semaphore::new(self.config.max_concurrency.max(1))),
                    Arc::new(Semaphore::new(1)),
                )
            })
            .clone();
        Ok(Endpoint {
            host: host.to_owned(),
            prefix,
            namespace,
            http: self.http_client(host, config)?,
            plain: AtomicBool::new(plain),
            fallback: insecure && config.http.is_none(),
            bulk,
            small,
            auth: AuthCache::default(),
        })
    }

    fn http_client(&self, host: &str, config: &HostConfig) -> Result<reqwest::Client, RegistryError> {
        let bad = |what: String| RegistryError::Config {
            host: host.to_owned(),
            what,
        };
        let tls = self.tls(host, config)?;
        // HTTP/1.1 on purpose: the limit on requests is then a limit on connections, and parallel layers do not share
        // one flow-control window.
        let mut builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .http1_only()
            .no_proxy()
            .connect_timeout(self.config.timeouts.connect)
            .user_agent(self.config.user_agent.clone());
        let proxies = &self.config.proxies;
        let direct = format!(
            "localhost,127.0.0.0/8,::1,{}",
            proxies.no_proxy.as_deref().unwrap_or_default()
        );
        for (url, https) in [(&proxies.http, false), (&proxies.https, true)] {
            if let Some(url) = url.as_deref().filter(|u| !u.is_empty()) {
                let proxy = if https {
                    reqwest::Proxy::https(url)
                } else {
                    reqwest::Proxy::http(url)
                };
                let proxy = proxy.map_err(|e| bad(format!("invalid proxy: {e}")))?;
                builder = builder.proxy(proxy.no_proxy(reqwest::NoProxy::from_string(&direct)));
            }
        }
        builder.build().map_err(|e| bad(crate::error::innermost(&e)))
    }

    fn tls(&self, host: &str, config: &HostConfig) -> Result<rustls::ClientConfig, RegistryError> {
        let bad = |what: String| RegistryError::Config {
            host: host.to_owned(),
            what,
        };
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.roots.iter().cloned());
        let mut files = config.ca.clone();
        let mut pairs = config.keypair.clone();
        for dir in &config.tlsconfigdir {
            collect_tls_dir(dir, &mut files, &mut pairs)
                .map_err(|e| bad(format!("failed to read {}: {e}", dir.display())))?;
        }
        for file in &files {
            for cert in read_certs(file).map_err(bad)? {
                roots
                    .add(cert)
                    .map_err(|e| bad(format!("invalid certificate in {}: {e}", file.display())))?;
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| bad(e.to_string()))?;
        let builder = if config.insecure.unwrap_or(false) {
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AcceptAny(provider)))
        } else {
            builder.with_root_certificates(roots)
        };
        match pairs.first() {
            None => Ok(builder.with_no_client_auth()),
            Some((key, cert)) => {
                let certs = read_certs(cert).map_err(bad)?;
                let key = PrivateKeyDer::from_pem_file(key)
                    .map_err(|e| bad(format!("failed to read key {}: {e}", key.display())))?;
                builder
                    .with_client_auth_cert(certs, key)
                    .map_err(|e| bad(e.to_string()))
            }
        }
    }
}

fn read_certs(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let fail = |e: rustls_pki_types::pem::Error| format!("failed to read certificates {}: {e}", file.display());
    CertificateDer::pem_file_iter(file)
        .map_err(fail)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(fail)
}

fn collect_tls_dir(
    dir: &Path,
    ca: &mut Vec<std::path::PathBuf>,
    pairs: &mut Vec<(std::path::PathBuf, std::path::PathBuf)>,
) -> std::io::Result<()> {
    let mut paths = std::fs::read_dir(dir)?
        .map(|e| e.map(|e| e.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        match path.extension().and_then(|e| e.to_str()) {
            Some("crt") => ca.push(path),
            Some("cert") => pairs.push((path.with_extension("key"), path)),
            _ => {}
        }
    }
    Ok(())
}

/// Whether `host[:port]` names this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Accepts every certificate; for hosts that the administrator marked as insecure.
#[derive(Debug)]
struct AcceptAny(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(domain: &str, config: HostConfig) -> Hosts {
        let mut c = RegistryConfig::default();
        c.hosts.insert(domain.to_owned(), config);
        Hosts::new(c)
    }

    fn urls(h: &Hosts, domain: &str) -> Vec<String> {
        h.endpoints(domain, false)
            .unwrap()
            .iter()
            .map(|e| e.url("/a/manifests/1"))
            .collect()
    }

    #[test]
    fn mirrors_come_before_the_origin() {
        let config = HostConfig {
            mirrors: vec!["localhost:5000".into(), "https://m.example/proxy/hub/".into()],
            ..HostConfig::default()
        };
        assert_eq!(
            urls(&hosts("docker.io", config), "docker.io"),
            [
                "http://localhost:5000/v2/a/manifests/1?ns=docker%2Eio",
                "https://m.example/v2/proxy/hub/a/manifests/1?ns=docker%2Eio",
                "https://registry-1.docker.io/v2/a/manifests/1",
            ]
        );
    }

    #[test]
    fn plain_http_is_for_loopback_or_by_choice() {
        let none = hosts("x", HostConfig::default());
        assert_eq!(
            urls(&none, "127.0.0.1:5000"),
            ["http://127.0.0.1:5000/v2/a/manifests/1"]
        );
        assert_eq!(urls(&none, "[::1]:5000"), ["http://[::1]:5000/v2/a/manifests/1"]);
        assert_eq!(urls(&none, "example.com"), ["https://example.com/v2/a/manifests/1"]);
        let tls = hosts(
            "localhost:5000",
            HostConfig {
                http: Some(false),
                ..HostConfig::default()
            },
        );
        assert_eq!(
            urls(&tls, "localhost:5000"),
            ["https://localhost:5000/v2/a/manifests/1"]
        );
        let plain = hosts(
            "r.example",
            HostConfig {
                http: Some(true),
                ..HostConfig::default()
            },
        );
        assert_eq!(urls(&plain, "r.example"), ["http://r.example/v2/a/manifests/1"]);
    }

    #[test]
    fn bad_files_are_named() {
        let h = hosts(
            "r.example",
            HostConfig {
                ca: vec!["/nonexistent/ca.pem".into()],
                ..HostConfig::default()
            },
        );
        let text = h.endpoints("r.example", false).unwrap_err().to_string();
        assert!(
            text.contains("r.example") && text.contains("/nonexistent/ca.pem"),
            "{text}"
        );
    }
}
