//! What the daemon asks of its client, and what it hands back.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use common::{connect, connect_routes, open};
use futures::TryStreamExt as _;
use kiln_proto::auth::auth_server::{Auth, AuthServer};
use kiln_proto::auth::*;
use kiln_proto::filesync::BytesMessage;
use kiln_proto::filesync::file_send_server::{FileSend, FileSendServer};
use kiln_session::attach::{Attachments, DockerConfig, ExportTarget, Secret};
use kiln_session::fsutil::{DirSource, Filter};
use kiln_session::{FileSent, SessionError, SessionErrorKind, TokenRequest};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

#[tokio::test]
async fn secrets() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("token"), "s3cret\n").unwrap();
    fs::write(dir.path().join("big"), vec![0u8; 600 << 10]).unwrap();
    let mut attachments = Attachments::default();
    attachments
        .secrets
        .insert("file".to_owned(), Secret::File(dir.path().join("token")));
    attachments
        .secrets
        .insert("big".to_owned(), Secret::File(dir.path().join("big")));
    attachments
        .secrets
        .insert("env".to_owned(), Secret::Value(Bytes::from("value")));
    let pair = connect(attachments).await;
    assert_eq!(pair.session.secret("file").await.unwrap().unwrap(), "s3cret\n");
    assert_eq!(pair.session.secret("env").await.unwrap().unwrap(), "value");
    assert_eq!(pair.session.secret("other").await.unwrap(), None);
    assert!(pair.session.secret("big").await.is_err());
    // A client without secrets has none.
    let none = connect(Attachments::default()).await;
    assert_eq!(none.session.secret("file").await.unwrap(), None);
}

#[tokio::test]
async fn credentials_of_a_client_that_fetches_no_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    fs::write(
        &config,
        r#"{"auths":{"reg.example":{"username":"me","password":"pw"}}}"#,
    )
    .unwrap();
    let store = Arc::new(DockerConfig::read(&config).unwrap());
    let pair = connect(Attachments {
        credentials: Some(store),
        ..Attachments::default()
    })
    .await;
    let found = pair.session.credentials("reg.example").await.unwrap();
    assert_eq!((found.username.as_str(), found.secret.as_str()), ("me", "pw"));
    assert_eq!(
        pair.session.token_authority("reg.example", &[1; 32]).await.unwrap(),
        None
    );
    // A client without the service is anonymous.
    let none = connect(Attachments::default()).await;
    assert!(none.session.credentials("reg.example").await.unwrap().secret.is_empty());
    assert_eq!(
        none.session.token_authority("reg.example", &[1; 32]).await.unwrap(),
        None
    );
}

/// A client that fetches tokens itself.
struct TokenClient(Ed25519KeyPair);

#[tonic::async_trait]
impl Auth for TokenClient {
    async fn credentials(&self, _: Request<CredentialsRequest>) -> Result<Response<CredentialsResponse>, Status> {
        Err(Status::internal("must not be asked"))
    }
    async fn fetch_token(&self, request: Request<FetchTokenRequest>) -> Result<Response<FetchTokenResponse>, Status> {
        let request = request.into_inner();
        let token = format!("{} {} {}", request.client_id, request.host, request.scopes.join(","));
        Ok(Response::new(FetchTokenResponse {
            token,
            expires_in: 300,
            issued_at: 7,
        }))
    }
    async fn get_token_authority(
        &self,
        request: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        let key = match request.get_ref().host.as_str() {
            "short.example" => &self.0.public_key().as_ref()[..31],
            _ => self.0.public_key().as_ref(),
        };
        Ok(Response::new(GetTokenAuthorityResponse {
            public_key: Bytes::copy_from_slice(key),
        }))
    }
    async fn verify_token_authority(
        &self,
        request: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        let payload = &request.get_ref().payload;
        let mut signed = self.0.sign(payload).as_ref().to_vec();
        signed.extend_from_slice(payload);
        Ok(Response::new(VerifyTokenAuthorityResponse { signed: signed.into() }))
    }
}

#[tokio::test]
async fn tokens_of_a_client_that_fetches_them() {
    let client = |seed| {
        let key = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
        connect_routes(Routes::new(AuthServer::new(TokenClient(key))), &[])
    };
    let (one, other) = (client(1).await.session, client(2).await.session);
    let authority = one.token_authority("reg.example", &[3; 32]).await.unwrap().unwrap();
    let request = TokenRequest {
        client_id: "buildkit-client".to_owned(),
        host: "reg.example".to_owned(),
        realm: "https://auth.example/token".to_owned(),
        service: "reg".to_owned(),
        scopes: vec!["repository:x:pull".to_owned()],
    };
    let token = one.fetch_token(&request).await.unwrap();
    assert_eq!(
        (token.token.as_str(), token.expires_in),
        ("buildkit-client reg.example repository:x:pull", 300)
    );
    assert!(
        one.verify_token_authority("reg.example", &authority, &[3; 32], &[9; 32])
            .await
            .unwrap()
    );
    assert!(
        !other
            .verify_token_authority("reg.example", &authority, &[3; 32], &[9; 32])
            .await
            .unwrap()
    );
    let error = one.token_authority("short.example", &[3; 32]).await.unwrap_err();
    assert!(error.to_string().contains("31 bytes"), "{error}");
}

#[tokio::test]
async fn ssh_agents() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    let listener = tokio::net::UnixListener::bind(&agent).unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut question = Vec::new();
                socket.read_to_end(&mut question).await.unwrap();
                question.reverse();
                socket.write_all(&question).await.unwrap();
            });
        }
    });
    let mut attachments = Attachments::default();
    attachments.ssh.insert("default".to_owned(), agent);
    let pair = connect(attachments).await;
    pair.session.check_agent("").await.unwrap();
    let error = pair.session.check_agent("deploy").await.unwrap_err();
    assert_eq!(error.kind(), SessionErrorKind::NotFound);

    let path = dir.path().join("forwarded");
    let forwarded = pair.session.forward_agent("default", &path).unwrap();
    let ask = |text: Vec<u8>| {
        let path = path.clone();
        async move {
            let mut socket = tokio::net::UnixStream::connect(path).await.unwrap();
            socket.write_all(&text).await.unwrap();
            socket.shutdown().await.unwrap();
            let mut answer = Vec::new();
            socket.read_to_end(&mut answer).await.unwrap();
            answer
        }
    };
    let long: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
    let mut reversed = long.clone();
    reversed.reverse();
    let (short, long) = tokio::join!(ask(b"abc".to_vec()), ask(long));
    assert_eq!((short.as_slice(), long == reversed), (b"cba".as_slice(), true));
    drop(forwarded);
    assert!(!path.exists());

    let none = connect(Attachments::default()).await;
    let error = none.session.check_agent("").await.unwrap_err();
    assert_eq!(error.to_string(), "no SSH key forwarded from the client");
}

#[tokio::test]
async fn an_upload_can_be_read_once() {
    let mut attachments = Attachments::default();
    let content = vec![5u8; 300_000];
    let source = std::io::Cursor::new(content.clone());
    attachments.uploads.insert("abc".to_owned(), Box::pin(source));
    let pair = connect(attachments).await;
    let body = pair.session.upload("buildkit-session", "/abc").await.unwrap();
    let all: Vec<Bytes> = body.try_collect().await.unwrap();
    assert_eq!(all.concat(), content);
    let again = pair.session.upload("buildkit-session", "/abc").await;
    assert_eq!(again.err().unwrap().kind(), SessionErrorKind::NotFound);
}

#[tokio::test]
async fn blobs_in_a_client_store() {
    use sha2::Digest as _;
    let dir = tempfile::tempdir().unwrap();
    let mut attachments = Attachments::default();
    attachments
        .stores
        .insert("local:cache".to_owned(), dir.path().to_owned());
    let pair = connect(attachments).await;
    let store = pair.session.content("local:cache");
    let content: Vec<u8> = (0..5_000_000u32).map(|n| (n % 251) as u8).collect();
    let hex: String = sha2::Sha256::digest(&content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let digest = format!("sha256:{hex}");
    assert_eq!(store.info(&digest).await.unwrap(), None);

    let mut writer = store
        .write("upload-1", content.len() as u64, &digest)
        .await
        .unwrap()
        .unwrap();
    for part in content.chunks(4 << 20) {
        writer.write(Bytes::copy_from_slice(part)).await.unwrap();
    }
    writer.commit().await.unwrap();
    assert_eq!(fs::read(dir.path().join("blobs/sha256").join(&hex)).unwrap(), content);
    assert_eq!(store.info(&digest).await.unwrap().unwrap().size, content.len() as u64);
    assert!(
        store
            .write("upload-2", content.len() as u64, &digest)
            .await
            .unwrap()
            .is_none(),
        "it is there"
    );

    let all: Vec<Bytes> = store.read(&digest, 0, 0).await.unwrap().try_collect().await.unwrap();
    assert_eq!(all.concat(), content);
    let part: Vec<Bytes> = store
        .read(&digest, 4_000_000, 100)
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(part.concat(), &content[4_000_000..4_000_100]);

    // Content that is not what it should be is refused, and leaves nothing.
    let wrong = format!("sha256:{}", "0".repeat(64));
    let mut writer = store.write("upload-3", 3, &wrong).await.unwrap().unwrap();
    writer.write(Bytes::from("abc")).await.unwrap();
    assert!(writer.commit().await.is_err());
    assert_eq!(store.info(&wrong).await.unwrap(), None);
    assert!(store.info("sha256:../../etc/passwd").await.is_err());
    assert_eq!(pair.session.content("local:other").info(&digest).await.unwrap(), None);
}

#[tokio::test]
async fn a_file_for_the_client() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    let mut attachments = Attachments::default();
    attachments.exports.insert(1, ExportTarget::File(path.clone()));
    let pair = connect(attachments).await;
    let response = BTreeMap::from([("containerimage.digest".to_owned(), "sha256:abc".to_owned())]);
    let mut writer = pair.session.send_file(1, &response).unwrap();
    let content: Vec<u8> = (0..7_000_000u32).map(|n| (n % 253) as u8).collect();
    let part = content.clone();
    // As an exporter does it: from a blocking thread, in odd pieces.
    let writer = tokio::task::spawn_blocking(move || {
        for piece in part.chunks(100_003) {
            writer.write_all(piece).unwrap();
        }
        writer
    });
    assert_eq!(writer.await.unwrap().finish().await.unwrap(), FileSent::Written);
    assert_eq!(fs::read(&path).unwrap(), content);

    let unknown = pair.session.send_file(0, &response).unwrap();
    let error = unknown.finish().await.unwrap_err();
    assert_eq!(error.kind(), SessionErrorKind::NotFound);
    assert!(error.to_string().contains("exporter 0 not found"), "{error}");
}

#[tokio::test]
async fn a_file_that_is_cut_off_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut attachments = Attachments::default();
    attachments
        .exports
        .insert(0, ExportTarget::File(dir.path().join("out.tar")));
    let pair = connect(attachments).await;
    let mut writer = pair.session.send_file(0, &BTreeMap::new()).unwrap();
    writer.send(Bytes::from(vec![1; 1 << 20])).await.unwrap();
    drop(writer);
    pair.session.close("test over");
    pair.client.await.unwrap();
    // The client's writer ends on its own thread.
    tokio::time::timeout(std::time::Duration::from_secs(10), async {
        while fs::read_dir(dir.path()).unwrap().next().is_some() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the partial file goes");
}

/// A client that says after the first bytes that it has the image already, or that its disk is full.
struct Refuser(tonic::Code);

#[tonic::async_trait]
impl FileSend for Refuser {
    type DiffCopyStream = futures::stream::Empty<Result<BytesMessage, Status>>;
    async fn diff_copy(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::DiffCopyStream>, Status> {
        request.into_inner().message().await?;
        Err(Status::new(self.0, "no more"))
    }
}

#[tokio::test]
async fn clients_that_want_no_more() {
    for (code, expected) in [
        (tonic::Code::AlreadyExists, true),
        (tonic::Code::ResourceExhausted, false),
    ] {
        let routes = Routes::new(FileSendServer::new(Refuser(code)));
        let pair = connect_routes(routes, &["/moby.filesync.v1.FileSend/DiffCopy"]).await;
        let mut writer = pair.session.send_file(0, &BTreeMap::new()).unwrap();
        let mut outcome = Ok(());
        for _ in 0..100 {
            outcome = outcome.and(writer.send(Bytes::from(vec![0; 1 << 20])).await);
        }
        if expected {
            outcome.unwrap();
            assert_eq!(writer.finish().await.unwrap(), FileSent::AlreadyThere);
        } else {
            let error = outcome.unwrap_err();
            assert_eq!(error.remote_status().unwrap().message, "no more", "{error}");
        }
    }
}

/// A result directory.
fn result() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("bin")).unwrap();
    fs::write(dir.path().join("bin/tool"), vec![3u8; 100_000]).unwrap();
    symlink("tool", dir.path().join("bin/alias")).unwrap();
    fs::write(dir.path().join("README"), "read me").unwrap();
    dir
}

#[tokio::test]
async fn a_directory_for_the_client() {
    let (source, target) = (result(), tempfile::tempdir().unwrap());
    let out = target.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "keep").unwrap();
    fs::write(out.join("README"), "old").unwrap();
    // A link of the user's where the result has a directory is replaced, not followed.
    symlink(target.path(), out.join("bin")).unwrap();
    let mut attachments = Attachments::default();
    attachments.exports.insert(
        0,
        ExportTarget::Directory {
            path: out.clone(),
            delete: false,
        },
    );
    let pair = connect(attachments).await;
    let tree = || DirSource::new(open(source.path()), &Filter::default(), None).unwrap();
    let sent = pair
        .session
        .send_directory(0, tree(), false, &BTreeMap::new())
        .await
        .unwrap();
    assert_eq!((sent.entries, sent.requested), (4, 2));
    assert_eq!(fs::read(out.join("bin/tool")).unwrap(), vec![3u8; 100_000]);
    assert_eq!(fs::read(out.join("README")).unwrap(), b"read me");
    assert_eq!(fs::read(out.join("mine")).unwrap(), b"keep");
    assert!(!target.path().join("tool").exists());
    // The second time nothing has to move.
    let sent = pair
        .session
        .send_directory(0, tree(), false, &BTreeMap::new())
        .await
        .unwrap();
    assert_eq!((sent.entries, sent.requested), (4, 0));
}

#[tokio::test]
async fn deleting_what_is_not_in_the_result() {
    let (source, target) = (result(), tempfile::tempdir().unwrap());
    fs::create_dir_all(target.path().join("old/deep")).unwrap();
    fs::write(target.path().join("old/deep/x"), "x").unwrap();
    let mut attachments = Attachments::default();
    let delete = ExportTarget::Directory {
        path: target.path().to_owned(),
        delete: true,
    };
    attachments.exports.insert(0, delete);
    let pair = connect(attachments).await;
    let tree = || DirSource::new(open(source.path()), &Filter::default(), None).unwrap();
    // A daemon that sends platforms one by one would delete the others'.
    let refused: SessionError = pair
        .session
        .send_directory(0, tree(), false, &BTreeMap::new())
        .await
        .unwrap_err();
    assert_eq!(
        refused.remote_status().unwrap().code,
        tonic::Code::FailedPrecondition as i32
    );
    assert!(target.path().join("old").exists());
    pair.session
        .send_directory(0, tree(), true, &BTreeMap::new())
        .await
        .unwrap();
    assert!(!target.path().join("old").exists());
    assert_eq!(fs::read(target.path().join("README")).unwrap(), b"read me");
}

#[tokio::test]
async fn a_stream_for_the_client() {
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Shared {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let shared = Shared::default();
    let mut attachments = Attachments::default();
    attachments
        .exports
        .insert(0, ExportTarget::Writer(Box::new(shared.clone())));
    let pair = connect(attachments).await;
    let mut writer = pair.session.send_file(0, &BTreeMap::new()).unwrap();
    writer.send(Bytes::from("tar bytes")).await.unwrap();
    writer.finish().await.unwrap();
    assert_eq!(*shared.0.lock().unwrap(), b"tar bytes");
}
