//! Temporary.
#![allow(missing_docs)]
use std::collections::BTreeMap; use std::sync::Arc; use bytes::Bytes; use kiln_oci::{Digest,Platform}; use crate::{LlbWorker,Client,OpError,Ref};
#[derive(Clone,Debug)] pub struct ImageMeta{pub reference:String,pub digest:Digest,pub config:Bytes}
#[derive(Clone,Debug)] pub struct GitMeta{pub checksum:String,pub reference:String,pub commit_checksum:String,pub commit_object:Option<Bytes>,pub tag_object:Option<Bytes>}
#[derive(Clone,Debug)] pub struct HttpMeta{pub checksum:Digest,pub filename:String,pub last_modified:Option<i64>}
#[derive(Clone,Debug)] pub enum RemoteMeta{None,Git(GitMeta),Http(HttpMeta)}
impl LlbWorker{
 pub async fn resolve_image(&self,_c:&Client,_r:&str,_p:Option<&Platform>,_m:&str,_s:Option<(&str,&str)>,_g:&kiln_solver::Reporter)->Result<ImageMeta,OpError>{Err(OpError::user("x"))}
 pub async fn resolve_remote(&self,_c:&Client,_i:&str,_a:&BTreeMap<String,String>,_b:bool,_g:&kiln_solver::Reporter)->Result<RemoteMeta,OpError>{Err(OpError::user("x"))}
}
