//! Talks to the client that started a build, over the client's own connection.
//!
//! A client opens a byte pipe to the daemon (`Control.Session`) and serves gRPC inside it; the daemon is the caller. Through
//! it the daemon reads build contexts, asks for registry credentials and secrets, reaches ssh agents, and hands results
//! back. This crate is that pipe and those calls, with plain types on its face: gRPC stays inside.
//!
//! Tour:
//! - [`manager`]: [`SessionManager`], the open sessions by id; [`session`]: [`Session`], one of them, and its health.
//! - [`tunnel`]: the pipe, from a stream of messages to a byte stream; `channel`: the HTTP/2 client on it.
//! - What is asked of the client: [`filesync`] (directories), [`auth`], [`secrets`], [`ssh`], [`upload`], [`content`]
//!   (its content stores), and [`send`] (results on their way to it).
//! - [`fsutil`]: the packet protocol by which directories travel in both directions.
//! - [`attach`]: the client's half, which the command line uses and the tests talk to.
//!
//! Every call names its session. A call ends when the session ends ([`SessionErrorKind::Gone`]) and is cancelled by
//! dropping its future. Deliberately absent: the control API (the daemon owns it), caches of credentials or contexts
//! (their users own them), and a store of any kind.

pub mod attach;
pub mod auth;
mod channel;
pub mod content;
pub mod error;
pub mod filesync;
pub mod fsutil;
pub mod manager;
mod metadata;
pub mod secrets;
pub mod send;
pub mod session;
pub mod ssh;
pub mod tunnel;
pub mod upload;

pub use auth::{Credentials, Token, TokenAuthority, TokenRequest};
pub use error::{RemoteStatus, SessionError, SessionErrorKind};
pub use filesync::LocalDir;
pub use fsutil::{Entry, Existing, ReceiveOptions, Received, TransferStats};
pub use manager::SessionManager;
pub use send::{FileSent, FileWriter};
pub use session::{Session, SessionId, SessionInfo};
