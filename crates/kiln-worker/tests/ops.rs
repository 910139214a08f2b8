//! Operations over a real store and a real session: what a build sees of them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::future::BoxFuture;
use kiln_executor::{ExecError, Executor, Held, Process, ProcessIo, ProcessSpec};
use kiln_llb::op::{
    ChownOpt, CopyAction, DiffOp, FileAction, FileActionKind, FileOp, MergeOp, MkDirAction, MkFileAction, Op, RmAction,
    SourceOp, SymlinkAction, UserOpt,
};
use kiln_llb::wire::{encode_op, encode_terminal};
use kiln_llb::{Definition, Edge, Graph, OpMetadata, vertex_digest};
use kiln_oci::{Digest, Platform};
use kiln_registry::{Anonymous, Registry, RegistryConfig};
use kiln_session::attach::{Attachments, ClientSession};
use kiln_session::{SessionId, SessionInfo, SessionManager};
use kiln_solver::{Job, JobId, JobSpec, OpDigest, ProgressEvent, Solver, SolverOptions, Tenant, VertexProgress};
use kiln_store::{SnapshotterChoice, Store, StoreConfig};
use kiln_worker::{Client, LlbWorker, NetworkOptions, Ref, StoreCache, WorkerOptions};

/// Runs nothing: these tests have no processes.
struct NoExecutor;

impl Executor for NoExecutor {
    fn start(&self, _: ProcessSpec, _: ProcessIo, _: Held) -> BoxFuture<'_, Result<Process, ExecError>> {
        Box::pin(async { Err(ExecError::Invalid("no processes here".into())) })
    }
}

struct Lab {
    store: Arc<Store>,
    sessions: SessionManager,
    worker: LlbWorker,
    solver: Solver<LlbWorker>,
    count: AtomicUsize,
}

impl Lab {
    fn open(root: &Path) -> Self {
        let mut config = StoreConfig::new(root);
        config.snapshotter = SnapshotterChoice::Native;
        let (store, _) = Store::open(config).unwrap();
        let sessions = SessionManager::new();
        let worker = LlbWorker::new(WorkerOptions {
            store: Arc::clone(&store),
            executor: Arc::new(NoExecutor),
            sessions: sessions.clone(),
            platforms: vec![Platform::host()],
            network: NetworkOptions::default(),
            cgroup_parent: String::new(),
            rootless: false,
        });
        let cache = Arc::new(StoreCache::new(Arc::clone(&store)));
        let solver = Solver::new(worker.clone(), cache, SolverOptions::default());
        Self {
            store,
            sessions,
            worker,
            solver,
            count: AtomicUsize::new(0),
        }
    }

    /// A client that shares `dir` as `context`.
    async fn client(&self, dir: Option<&Path>) -> SessionId {
        let n = self.count.fetch_add(1, Ordering::SeqCst);
        let dirs: BTreeMap<_, _> = dir.map(|d| ("context".to_owned(), d.to_owned())).into_iter().collect();
        let attachments = Attachments {
            shared_key: "the-client".into(),
            dirs,
            ..Attachments::default()
        };
        let client = ClientSession::new(format!("session-{n}"), attachments);
        let info = SessionInfo::from_headers(&client.headers()).unwrap();
        let id = info.id.clone();
        let (ours, theirs) = tokio::io::duplex(256 << 10);
        tokio::spawn(async move { drop(client.serve(theirs).await) });
        let sessions = self.sessions.clone();
        tokio::spawn(async move { sessions.run(info, ours).await });
        self.sessions.get(&id).await.unwrap();
        id
    }

    fn job(&self, session: &SessionId) -> Job<LlbWorker> {
        let n = self.count.fetch_add(1, Ordering::SeqCst);
        let registry = Registry::new(RegistryConfig::default()).client(Arc::new(Anonymous));
        let client = Arc::new(Client::new(session.clone(), registry));
        self.solver.job(JobSpec {
            id: JobId::new(format!("job-{n}")),
            tenant: Tenant::default(),
            client,
        })
    }

    /// Builds, and returns the result and which vertices ran.
    async fn build(&self, dir: Option<&Path>, graph: impl FnOnce(&SessionId) -> Graph) -> (Ref, Vec<String>) {
        let session = self.client(dir).await;
        let job = self.job(&session);
        let graph = graph(&session);
        let solved = job.result(&graph, graph.root().unwrap()).await.unwrap();
        let mut ran: Vec<String> = states(&job)
            .await
            .into_iter()
            .filter(|v| v.started.is_some() && !v.cached)
            .map(|v| v.name)
            .collect();
        ran.sort();
        (solved.value, ran)
    }

    async fn text(&self, value: &Ref, path: &str) -> String {
        let session = self.client(None).await;
        let job = self.job(&session);
        let bytes = self.worker.read_file(job.client(), value, path, None).await.unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    async fn names(&self, value: &Ref, path: &str) -> Vec<String> {
        let session = self.client(None).await;
        let job = self.job(&session);
        self.worker
            .read_dir(job.client(), value, path, None)
            .await
            .unwrap()
            .into_iter()
            .map(|f| f.path)
            .collect()
    }
}

async fn states(job: &Job<LlbWorker>) -> Vec<VertexProgress> {
    job.progress().finish();
    let mut reader = job.progress().subscribe();
    let mut states: Vec<VertexProgress> = Vec::new();
    while let Some(events) = reader.next().await {
        for event in events {
            if let ProgressEvent::Vertex(v) = event.as_ref() {
                states.retain(|s| s.digest != v.digest);
                states.push(v.clone());
            }
        }
    }
    states
}

#[derive(Default)]
struct Builder {
    ops: Vec<Bytes>,
    metadata: BTreeMap<kiln_llb::VertexDigest, OpMetadata>,
}

impl Builder {
    fn add(&mut self, name: &str, op: &Op, inputs: &[Edge]) -> Edge {
        let bytes = encode_op(op, inputs, None, &[]);
        let vertex = vertex_digest(&bytes);
        let description = [("llb.customname".to_owned(), name.to_owned())].into();
        self.metadata.insert(
            vertex,
            OpMetadata {
                description,
                ..OpMetadata::default()
            },
        );
        self.ops.push(bytes);
        Edge { vertex, output: 0 }
    }

    fn context(&mut self, session: &SessionId) -> Edge {
        let attrs = [
            ("local.session".to_owned(), session.to_string()),
            ("local.sharedkeyhint".to_owned(), "context".to_owned()),
            ("local.excludepatterns".to_owned(), "[\"ignored\"]".to_owned()),
        ];
        self.add(
            "context",
            &Op::Source(SourceOp {
                identifier: "local://context".into(),
                attrs: attrs.into(),
            }),
            &[],
        )
    }

    fn file(&mut self, name: &str, actions: Vec<FileAction>, inputs: &[Edge]) -> Edge {
        self.add(name, &Op::File(FileOp { actions }), inputs)
    }

    fn graph(mut self, root: Edge) -> Graph {
        self.ops.push(encode_terminal(&root));
        let definition = Definition {
            ops: self.ops,
            metadata: self.metadata,
            ..Definition::default()
        };
        Graph::load(&definition).unwrap()
    }
}

fn action(input: Option<u32>, secondary: Option<u32>, output: Option<u32>, kind: FileActionKind) -> FileAction {
    FileAction {
        input,
        secondary_input: secondary,
        output,
        kind,
    }
}

fn mkfile(path: &str, text: &str) -> FileActionKind {
    FileActionKind::MkFile(MkFileAction {
        path: path.into(),
        mode: 0o644,
        data: Bytes::copy_from_slice(text.as_bytes()),
        owner: None,
        timestamp: 0,
    })
}

fn mkdir(path: &str) -> FileActionKind {
    FileActionKind::MkDir(MkDirAction {
        path: path.into(),
        mode: 0o755,
        make_parents: true,
        owner: None,
        timestamp: 0,
    })
}

fn copy(src: &str, dest: &str) -> CopyAction {
    CopyAction {
        src: src.into(),
        dest: dest.into(),
        mode: -1,
        follow_symlink: true,
        dir_copy_contents: true,
        create_dest_path: true,
        timestamp: -1,
        ..CopyAction::default()
    }
}

/// `FROM scratch`, `COPY <src> /app/`, `WORKDIR /work`.
fn copy_graph(session: &SessionId, src: &str) -> Graph {
    let mut b = Builder::default();
    let context = b.context(session);
    let copied = b.file(
        "copy",
        vec![action(None, Some(0), Some(0), FileActionKind::Copy(copy(src, "/app/")))],
        &[context],
    );
    let end = b.file(
        "workdir",
        vec![action(Some(0), None, Some(0), mkdir("/work"))],
        &[copied],
    );
    b.graph(end)
}

fn context() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |p: &str| dir.path().join(p);
    fs::write(at("app.txt"), "hello\n").unwrap();
    fs::set_permissions(at("app.txt"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::create_dir(at("bin")).unwrap();
    fs::set_permissions(at("bin"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(at("bin/run"), "x").unwrap();
    fs::set_permissions(at("bin/run"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::hard_link(at("app.txt"), at("hard")).unwrap();
    symlink("app.txt", at("link")).unwrap();
    fs::write(at("ignored"), "not sent").unwrap();
    dir
}

#[tokio::test]
async fn a_copy_from_the_context_is_keyed_by_what_it_copies() {
    let (root, dir) = (tempfile::tempdir().unwrap(), context());
    let lab = Lab::open(root.path());
    let (first, ran) = lab.build(Some(dir.path()), |s| copy_graph(s, "/app.txt")).await;
    assert_eq!(ran, ["context", "copy", "workdir"]);
    assert_eq!(lab.text(&first, "/app/app.txt").await, "hello\n");
    assert_eq!(lab.names(&first, "/").await, ["app", "work"]);
    // Another file, and another time of this one: the copy is the same.
    fs::write(dir.path().join("bin/run"), "changed").unwrap();
    let file = fs::File::options()
        .write(true)
        .open(dir.path().join("app.txt"))
        .unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let (_, ran) = lab.build(Some(dir.path()), |s| copy_graph(s, "/app.txt")).await;
    assert_eq!(ran, ["context"]);
    // Its content is another one.
    fs::write(dir.path().join("app.txt"), "other\n").unwrap();
    let (other, ran) = lab.build(Some(dir.path()), |s| copy_graph(s, "/app.txt")).await;
    assert_eq!(ran, ["context", "copy", "workdir"]);
    assert_eq!(lab.text(&other, "/app/app.txt").await, "other\n");
    assert_eq!(lab.text(&first, "/app/app.txt").await, "hello\n");
    // And back again.
    fs::write(dir.path().join("app.txt"), "hello\n").unwrap();
    let (_, ran) = lab.build(Some(dir.path()), |s| copy_graph(s, "/app.txt")).await;
    assert_eq!(ran, ["context"]);
}

#[tokio::test]
async fn keys_and_results_outlive_the_daemon() {
    let (root, dir) = (tempfile::tempdir().unwrap(), context());
    let lab = Lab::open(root.path());
    lab.build(Some(dir.path()), |s| copy_graph(s, "/")).await;
    lab.store.close().unwrap();
    drop(lab);
    let lab = Lab::open(root.path());
    let (value, ran) = lab.build(Some(dir.path()), |s| copy_graph(s, "/")).await;
    assert_eq!(ran, ["context"]);
    assert_eq!(lab.names(&value, "/app").await, ["app.txt", "bin", "hard", "link"]);
}

#[tokio::test]
async fn content_keys_of_a_context_are_those_of_other_daemons() {
    let (root, dir) = (tempfile::tempdir().unwrap(), context());
    let lab = Lab::open(root.path());
    // G9: op digest of the copy, content digests of one file and of the whole source.
    for (src, content) in [
        (
            "/app.txt",
            "sha256:286f4db492f491f7b3f357be9b60a4964ab5322915dda76c7810107aa9e116c3",
        ),
        (
            "/",
            "sha256:d48046c7c059392d7e5a28d90e092d7c797574f93c25c5d1381ac5c9cbc68f1b",
        ),
    ] {
        let session = lab.client(Some(dir.path())).await;
        let job = lab.job(&session);
        let graph = copy_graph(&session, src);
        job.result(&graph, graph.root().unwrap()).await.unwrap();
        let vertex = graph.vertices().find(|v| v.name() == "copy").unwrap();
        let Op::File(op) = &vertex.op else {
            panic!("not a file op")
        };
        let op = kiln_worker::key::file_key(op, 1).unwrap().digest;
        let parts = lab
            .solver
            .cache()
            .nearest(&Tenant::default(), OpDigest(op.0))
            .await
            .unwrap()
            .unwrap();
        let expected: Digest = content.parse().unwrap();
        assert_eq!(parts.inputs[0].content, Some(expected), "{src}");
        assert_eq!(parts.inputs[0].key, None, "a client's directory has no identity");
    }
}

#[tokio::test]
async fn a_missing_source_is_told_by_name() {
    let (root, dir) = (tempfile::tempdir().unwrap(), context());
    let lab = Lab::open(root.path());
    let session = lab.client(Some(dir.path())).await;
    let job = lab.job(&session);
    let graph = copy_graph(&session, "/missing");
    let error = job.result(&graph, graph.root().unwrap()).await.unwrap_err();
    assert!(error.to_string().ends_with("\"/missing\": not found"), "{error}");
    assert!(error.source.is_not_found());
    assert_eq!(
        error.vertex,
        graph.vertices().find(|v| v.name() == "copy").unwrap().digest
    );
}

#[tokio::test]
async fn a_client_without_the_directory_is_told_so() {
    let root = tempfile::tempdir().unwrap();
    let lab = Lab::open(root.path());
    let session = lab.client(None).await;
    let job = lab.job(&session);
    let graph = copy_graph(&session, "/");
    let error = job.result(&graph, graph.root().unwrap()).await.unwrap_err();
    assert_eq!(error.to_string(), "no local sources enabled");
}

#[tokio::test]
async fn actions_build_on_each_other_and_on_inputs() {
    let root = tempfile::tempdir().unwrap();
    let lab = Lab::open(root.path());
    let graph = |_: &SessionId| {
        let mut b = Builder::default();
        let base = b.file(
            "base",
            vec![
                action(None, None, None, mkdir("/etc")),
                action(
                    Some(0),
                    None,
                    None,
                    mkfile("/etc/passwd", "root:x:0:0::/:\napp:x:1000:2000::/:\n"),
                ),
                action(Some(1), None, Some(0), mkfile("/etc/group", "staff:x:50:\n")),
            ],
            &[],
        );
        let owner = ChownOpt {
            user: Some(UserOpt::ByName {
                name: "app".into(),
                input: Some(0),
            }),
            group: Some(UserOpt::ByName {
                name: "staff".into(),
                input: Some(0),
            }),
        };
        let owned = CopyAction {
            owner: Some(owner),
            ..copy("/new", "/owned")
        };
        let top = b.file(
            "top",
            vec![
                // Something made aside, to copy from.
                action(None, None, None, mkfile("/new", "made aside")),
                action(Some(0), Some(1), None, FileActionKind::Copy(owned)),
                action(
                    Some(2),
                    None,
                    None,
                    FileActionKind::Symlink(SymlinkAction {
                        oldpath: "owned".into(),
                        newpath: "/link".into(),
                        owner: None,
                        timestamp: 0,
                    }),
                ),
                action(
                    Some(3),
                    None,
                    Some(0),
                    FileActionKind::Rm(RmAction {
                        path: "/etc/gr*".into(),
                        allow_not_found: false,
                        allow_wildcard: true,
                    }),
                ),
            ],
            &[base],
        );
        b.graph(top)
    };
    let (value, _) = lab.build(None, graph).await;
    assert_eq!(lab.text(&value, "/link").await, "made aside");
    assert_eq!(lab.names(&value, "/etc").await, ["passwd"]);
    let session = lab.client(None).await;
    let job = lab.job(&session);
    let info = lab.worker.stat_file(job.client(), &value, "/owned").await.unwrap();
    assert_eq!((info.uid, info.gid), (1000, 50));
    assert_eq!(
        value.as_ref().unwrap().layers().len(),
        2,
        "one layer for each operation"
    );
}

#[tokio::test]
async fn merges_and_differences() {
    let root = tempfile::tempdir().unwrap();
    let lab = Lab::open(root.path());
    let graph = |_: &SessionId| {
        let mut b = Builder::default();
        let base = b.file("base", vec![action(None, None, Some(0), mkfile("/base", "1"))], &[]);
        let more = b.file(
            "more",
            vec![action(Some(0), None, Some(0), mkfile("/more", "2"))],
            &[base],
        );
        let other = b.file("other", vec![action(None, None, Some(0), mkfile("/other", "3"))], &[]);
        let diff = b.add(
            "diff",
            &Op::Diff(DiffOp {
                lower: Some(0),
                upper: Some(1),
            }),
            &[base, more],
        );
        let merge = b.add(
            "merge",
            &Op::Merge(MergeOp {
                inputs: vec![Some(0), Some(1)],
            }),
            &[other, diff],
        );
        b.graph(merge)
    };
    let (value, _) = lab.build(None, graph).await;
    assert_eq!(lab.names(&value, "/").await, ["more", "other"]);
    let (again, ran) = lab.build(None, graph).await;
    assert_eq!(lab.names(&again, "/").await, ["more", "other"]);
    // What has no inputs shows as working while it is keyed.
    assert_eq!(ran, ["base", "other"]);
}

#[tokio::test]
async fn a_pruned_result_is_made_again() {
    let (root, dir) = (tempfile::tempdir().unwrap(), context());
    let lab = Lab::open(root.path());
    let (value, _) = lab.build(Some(dir.path()), |s| copy_graph(s, "/bin")).await;
    drop(value);
    let mut removed = 0;
    let policy = kiln_store::GcPolicy {
        all: true,
        ..kiln_store::GcPolicy::default()
    };
    let tenant = kiln_store::Tenant::default();
    let (store, stop) = (Arc::clone(&lab.store), kiln_store::Stop::new());
    let removed = tokio::task::spawn_blocking(move || {
        store
            .prune(&tenant, &policy, &|_| true, &stop, &mut |_| removed += 1)
            .unwrap();
        removed
    })
    .await
    .unwrap();
    assert!(removed > 0);
    let (value, ran) = lab.build(Some(dir.path()), |s| copy_graph(s, "/bin")).await;
    assert_eq!(ran, ["context", "copy", "workdir"]);
    assert_eq!(lab.text(&value, "/app/run").await, "x");
}

/// A repository behind `git daemon`, on a port of its own; killed on drop.
struct GitServer {
    child: std::process::Child,
    port: u16,
}

impl Drop for GitServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl GitServer {
    fn start(base: &Path) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        // The program itself rather than `git daemon`: killing the wrapper would leave it behind.
        let path = std::process::Command::new("git")
            .arg("--exec-path")
            .output()
            .unwrap()
            .stdout;
        let program = format!("{}/git-daemon", String::from_utf8(path).unwrap().trim());
        let child = std::process::Command::new(program)
            .args(["--export-all", "--reuseaddr", "--listen=127.0.0.1"])
            .arg(format!("--port={port}"))
            .arg(format!("--base-path={}", base.display()))
            .arg(base)
            .spawn()
            .unwrap();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::yield_now();
        }
        Self { child, port }
    }
}

fn git(dir: &Path, args: &[&str]) -> String {
    let output = std::process::Command::new("git")
        .arg("-C")
        .arg(dir)
        .args([
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@example.com",
            "-c",
            "commit.gpgsign=false",
        ])
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn a_commit_of_a_repository() {
    let (root, repositories) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let repository = repositories.path().join("a.git");
    fs::create_dir_all(repository.join("sub")).unwrap();
    git(&repository, &["init", "--quiet", "--initial-branch=main"]);
    fs::write(repository.join("file"), "one").unwrap();
    fs::write(repository.join("sub/inner"), "inner").unwrap();
    git(&repository, &["add", "."]);
    git(&repository, &["commit", "--quiet", "-m", "one"]);
    let first = git(&repository, &["rev-parse", "HEAD"]);
    git(&repository, &["tag", "-a", "v1", "-m", "v1"]);
    let server = GitServer::start(repositories.path());
    let lab = Lab::open(root.path());
    let graph = |reference: &str, keep: bool| {
        let url = format!("git://127.0.0.1:{}/a.git", server.port);
        let identifier = format!("git://127.0.0.1/a.git#{reference}");
        let mut attrs: BTreeMap<String, String> = [("git.fullurl".to_owned(), url)].into();
        if keep {
            attrs.insert("git.keepgitdir".into(), "true".into());
        }
        let mut b = Builder::default();
        let source = b.add("git", &Op::Source(SourceOp { identifier, attrs }), &[]);
        b.graph(source)
    };
    let (value, _) = lab.build(None, |_| graph("main", false)).await;
    assert_eq!(lab.names(&value, "/").await, ["file", "sub"]);
    assert_eq!(lab.text(&value, "/file").await, "one");
    let (value, _) = lab.build(None, |_| graph("v1:sub", false)).await;
    assert_eq!(lab.names(&value, "/").await, ["inner"]);
    // A new commit is found; the old one is still there by its id.
    fs::write(repository.join("file"), "two").unwrap();
    git(&repository, &["commit", "--quiet", "-a", "-m", "two"]);
    let (value, _) = lab.build(None, |_| graph("main", false)).await;
    assert_eq!(lab.text(&value, "/file").await, "two");
    let (value, _) = lab.build(None, |_| graph(&first, true)).await;
    assert_eq!(lab.text(&value, "/file").await, "one");
    assert_eq!(lab.names(&value, "/").await, [".git", "file", "sub"]);
    assert!(lab.text(&value, "/.git/HEAD").await.starts_with(&first));
    for (reference, message) in [
        ("none", "does not contain ref none"),
        ("main:file", "invalid git subdir file"),
    ] {
        let session = lab.client(None).await;
        let job = lab.job(&session);
        let graph = graph(reference, false);
        let error = job.result(&graph, graph.root().unwrap()).await.unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
    }
}
