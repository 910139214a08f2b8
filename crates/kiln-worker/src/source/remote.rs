//! What a frontend learns of a repository or a web server's file without making a layer of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use kiln_llb::op::SourceOp;
use kiln_oci::Digest;
use kiln_solver::{Reporter, Tenant};

use super::Asker;
use super::git::GitInstance;
use super::http::HttpFile;
use crate::client::Client;
use crate::error::OpError;
use crate::worker::LlbWorker;

/// What a reference of a repository stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GitMeta {
    /// The commit in hexadecimal; for an annotated tag the tag object.
    pub checksum: String,
    /// Full name of the reference (`refs/heads/main`), or the commit where the reference is one.
    pub reference: String,
    /// The commit that an annotated tag points to; empty for everything else, whose [`checksum`](Self::checksum) it is.
    pub commit_checksum: String,
    /// The commit object as its digest is taken over it, if it was asked for.
    pub commit_object: Option<Bytes>,
    /// The object of an annotated tag, if objects were asked for.
    pub tag_object: Option<Bytes>,
}

/// What is known of a web server's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpMeta {
    /// Digest of the content.
    pub checksum: Digest,
    /// The name that the file gets in the source's layer.
    pub filename: String,
    /// `Last-Modified` in seconds since 1970. Not known where a checksum was given, as nothing is asked then.
    pub last_modified: Option<i64>,
}

/// What a source stands for at the moment, by its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RemoteMeta {
    /// A source without metadata: a local directory, or a stream that the client offers once.
    None,
    /// `git://`
    Git(GitMeta),
    /// `http://` and `https://`
    Http(HttpMeta),
}

impl LlbWorker {
    /// Asks what a git or http source stands for, with the credentials of a client. `return_object` asks for the git
    /// objects as well, which have to be fetched; otherwise a repository is only asked for its references. A file is
    /// downloaded and kept, so that the source itself finds it in place.
    ///
    /// # Errors
    /// If identifier or attributes make no sense, the remote does not have it, refuses it or is out of reach.
    pub async fn resolve_remote(
        &self,
        client: &Client,
        identifier: &str,
        attrs: &BTreeMap<String, String>,
        return_object: bool,
        progress: &Reporter,
    ) -> Result<RemoteMeta, OpError> {
        let op = SourceOp {
            identifier: identifier.to_owned(),
            attrs: attrs.clone(),
        };
        let (client, tenant) = (Arc::new(client.clone()), Tenant::default());
        let asker = Asker::Frontend {
            client: &client,
            tenant: &tenant,
            progress,
        };
        match op.scheme() {
            "git" => Ok(RemoteMeta::Git(
                GitInstance::new(self, &op)?.meta(asker, return_object).await?,
            )),
            "http" | "https" => {
                let file = HttpFile::new(self, &op)?;
                if file.is_once() {
                    return Ok(RemoteMeta::None);
                }
                Ok(RemoteMeta::Http(file.meta(asker).await?))
            }
            _ => Ok(RemoteMeta::None),
        }
    }
}
