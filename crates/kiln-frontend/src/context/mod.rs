//! Where a build's files come from: the Dockerfile, the main context, its ignore file, and named contexts.

mod client;
mod named;
pub(crate) mod source;

pub(crate) use client::{BuildClient, Entrypoint};
pub(crate) use named::{Loaded, NamedContext, PendingLocal};
