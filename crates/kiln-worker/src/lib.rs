//! How each operation is keyed and carried out on this machine.
//!
//! Tour: [`worker`] is what all operations share, [`client`] what a build brings along. [`key`] is the byte-exact part,
//! what makes two operations the same; `content` is the digest of what an input holds. [`op`] has the operations and
//! [`source`] the places where things come from, one file per kind; `mounts`, `cache_mounts` and
//! `surroundings` are what a process sees. [`cache_store`] keeps the solver's records in the store, `layers` leads from a
//! result to its bytes, [`read`] looks into results for frontends. [`error`] says why an operation failed.
//!
//! Absent on purpose: when and whether an operation runs (the solver decides), the layout of bytes on disk (the store's),
//! namespaces (the executor's), and anything about Dockerfiles.

mod cache_mounts;
pub mod cache_store;
pub mod client;
mod content;
pub mod error;
pub mod key;
mod layers;
mod mounts;
pub mod op;
pub mod read;
pub mod source;
mod surroundings;
pub mod worker;

pub use cache_store::StoreCache;
pub use client::{Client, Pin};
pub use error::{OpError, OpResult};
pub use read::FileInfo;
pub use source::image::ImageMeta;
pub use source::remote::{GitMeta, HttpMeta, RemoteMeta};
pub use source::{Source, SourceInstance, SourceKey};
pub use surroundings::DnsSettings;
pub use worker::{LlbWorker, NetworkOptions, Ref, WorkerOptions, store_tenant};
