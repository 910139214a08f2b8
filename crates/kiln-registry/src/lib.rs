//! The distribution protocol: resolve names, fetch and push blobs and manifests, authenticate.
//!
//! A [`Registry`] is made once from the daemon's configuration; it holds the connections, their limits and the token
//! cache. A [`Client`] is a `Registry` seen through one user's credentials ([`CredentialSource`]) and does the work.
//!
//! Tour: [`config`] says how each host is reached, `host` turns a registry name into mirrors and origin with their TLS,
//! `transport` sends one request with permits, authentication, retries and timeouts; [`auth`] knows challenges and tokens;
//! [`resolve`], [`fetch`] and [`push`] are the three things users do; [`error`] says what went wrong, where and on what.
//!
//! Absent on purpose: storage (bytes go to and come from streams), media type decisions, environment variables (the
//! binary passes proxies in) and everything about sessions.

pub mod auth;
mod challenge;
pub mod client;
pub mod config;
pub mod error;
pub mod fetch;
mod host;
pub mod push;
pub mod resolve;
mod scope;
mod transport;

pub use auth::{Anonymous, CredentialError, CredentialSource, Credentials, Token, TokenRequest};
pub use client::{Client, Registry};
pub use config::{HostConfig, Proxies, RegistryConfig, RetryPolicy, Timeouts};
pub use error::{ErrorKind, RegistryError};
pub use fetch::BlobReader;
pub use push::{BlobSource, ByteStream, PushOutcome};
pub use resolve::Resolved;
