//! The two handles users hold: [`Registry`] for the daemon, [`Client`] for one user's work.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_oci::Digest;

use crate::auth::CredentialSource;
use crate::config::RegistryConfig;
use crate::error::RegistryError;
use crate::host::{Endpoint, Hosts};

/// All registries as one daemon reaches them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Registry {
    hosts: Arc<Hosts>,
}

impl Registry {
    /// Takes the configuration; hosts are opened when first needed, and their errors appear then.
    pub fn new(config: RegistryConfig) -> Self {
        Self {
            hosts: Arc::new(Hosts::new(config)),
        }
    }

    /// A client that authenticates with `credentials`.
    pub fn client(&self, credentials: Arc<dyn CredentialSource>) -> Client {
        Client {
            hosts: self.hosts.clone(),
            credentials,
            liars: Arc::default(),
            insecure: false,
        }
    }

    /// Checks the configuration of every host that has one, so that mistakes are reported at start.
    ///
    /// # Errors
    /// The first host's error.
    pub fn check(&self) -> Result<(), RegistryError> {
        for host in self.hosts.config().hosts.keys() {
            self.hosts.endpoints(host, false)?;
        }
        Ok(())
    }
}

/// Registries seen with one user's credentials. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    pub(crate) hosts: Arc<Hosts>,
    pub(crate) credentials: Arc<dyn CredentialSource>,
    /// Hosts that sent wrong bytes for a blob, asked for that blob only when nobody else is left.
    liars: Arc<Mutex<HashSet<(String, Digest)>>>,
    insecure: bool,
}

impl Client {
    /// A client for ordinary web servers, with the system's certificates and the same proxies; for files that builds
    /// download. Credentials are the caller's.
    ///
    /// # Errors
    /// If the proxies are unusable.
    pub fn web(&self) -> Result<reqwest::Client, RegistryError> {
        self.hosts.web()
    }

    /// The same client, for which every host is as if configured with `insecure` (`registry.insecure` of exporters).
    #[must_use]
    pub fn insecure(mut self) -> Self {
        self.insecure = true;
        self
    }

    /// The endpoints to read `digest` from, those that lied about it before last.
    pub(crate) fn readers(&self, domain: &str, digest: Option<Digest>) -> Result<Vec<Arc<Endpoint>>, RegistryError> {
        let mut list = self.hosts.endpoints(domain, self.insecure)?.to_vec();
        if let Some(digest) = digest {
            let liars = self.liars.lock().unwrap_or_else(PoisonError::into_inner);
            list.sort_by_key(|e| liars.contains(&(e.host.clone(), digest)));
        }
        Ok(list)
    }

    /// The endpoint to write to.
    pub(crate) fn origin(&self, domain: &str) -> Result<Arc<Endpoint>, RegistryError> {
        self.hosts
            .endpoints(domain, self.insecure)?
            .last()
            .cloned()
            .ok_or_else(|| RegistryError::Config {
                host: domain.to_owned(),
                what: "no endpoint".to_owned(),
            })
    }

    pub(crate) fn remember_liar(&self, host: &str, digest: Digest) {
        self.liars
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((host.to_owned(), digest));
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}
