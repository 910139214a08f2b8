//! Temporary.
#![allow(missing_docs)]
use std::collections::BTreeMap; use bytes::Bytes; use kiln_oci::Digest; use crate::{LlbWorker,Client,OpError};
#[derive(Clone,Debug)] pub struct GitMeta{pub checksum:String,pub reference:String,pub commit_checksum:String,pub commit_object:Option<Bytes>,pub tag_object:Option<Bytes>}
#[derive(Clone,Debug)] pub struct HttpMeta{pub checksum:Digest,pub filename:String,pub last_modified:Option<i64>}
#[derive(Clone,Debug)] pub enum RemoteMeta{None,Git(GitMeta),Http(HttpMeta)}
impl LlbWorker{
 pub async fn resolve_remote(&self,_c:&Client,_i:&str,_a:&BTreeMap<String,String>,_b:bool,_g:&kiln_solver::Reporter)->Result<RemoteMeta,OpError>{Err(OpError::user("x"))}
}
