//! Steps through solver, worker, store and executor together, with overlay and with copied snapshots. Needs root and a static
//! busybox; without them it fails.
//!
//! Has its own `main`, because the executor's launcher is a copy of this program (`maybe_init` must come first).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kiln_executor::{NamespaceConfig, NamespaceExecutor};
use kiln_llb::op::{CacheMountOpt, CacheSharing};
use kiln_llb::state::{Constraints, ExecSpec, FileStep, MountSpec, SecretMountTarget, SecretSpec};
use kiln_llb::{Graph, State};
use kiln_oci::Platform;
use kiln_registry::{Anonymous, Registry, RegistryConfig};
use kiln_session::{SessionId, SessionManager};
use kiln_solver::{
    Job, JobId, JobSpec, LogStream, MemoryCache, ProgressEvent, SolveError, Solver, SolverOptions, Tenant,
};
use kiln_store::{LayerRef, SnapshotterChoice, Store, StoreConfig, View};
use kiln_worker::{Client, LlbWorker, NetworkOptions, OpError, WorkerOptions};

struct Lab {
    solver: Solver<LlbWorker>,
    store: Arc<Store>,
    client: Arc<Client>,
    _dir: tempfile::TempDir,
}

static JOBS: AtomicUsize = AtomicUsize::new(0);

impl Lab {
    fn new(snapshotter: SnapshotterChoice) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let config = StoreConfig {
            snapshotter,
            ..StoreConfig::new(dir.path().join("state"))
        };
        let (store, _) = Store::open(config).unwrap();
        let worker = LlbWorker::new(WorkerOptions {
            store: Arc::clone(&store),
            executor: Arc::new(NamespaceExecutor::new(NamespaceConfig::default()).unwrap()),
            sessions: SessionManager::new(),
            platforms: vec![Platform::host()],
            network: NetworkOptions::default(),
            cgroup_parent: String::new(),
            rootless: false,
        });
        let solver = Solver::new(worker, Arc::new(MemoryCache::default()), SolverOptions::default());
        let registry = Registry::new(RegistryConfig::default()).client(Arc::new(Anonymous));
        let client = Arc::new(Client::new(SessionId::new(""), registry));
        Lab {
            solver,
            store,
            client,
            _dir: dir,
        }
    }

    fn job(&self) -> Job<LlbWorker> {
        let id = JobId::new(format!("job{}", JOBS.fetch_add(1, Ordering::Relaxed)));
        self.solver.job(JobSpec {
            id,
            tenant: Tenant::default(),
            client: Arc::clone(&self.client),
        })
    }

    async fn build(&self, state: &State) -> Result<LayerRef, SolveError<OpError>> {
        let graph = graph(state);
        Ok(self.job().result(&graph, graph.root().unwrap()).await?.value.unwrap())
    }

    /// Builds and gives back what the last step printed.
    async fn output(&self, state: &State) -> String {
        let graph = graph(state);
        let root = graph.root().unwrap();
        let job = self.job();
        job.result(&graph, root).await.unwrap();
        let progress = Arc::clone(job.progress());
        let mut reader = progress.subscribe();
        drop(job);
        progress.finish();
        let mut text = Vec::new();
        while let Some(events) = reader.next().await {
            for event in events {
                if let ProgressEvent::Log(log) = &*event
                    && log.vertex == root.vertex
                    && log.stream == LogStream::Stdout
                {
                    text.extend_from_slice(&log.read().unwrap());
                }
            }
        }
        String::from_utf8(text).unwrap()
    }

    async fn view(&self, layer: &LayerRef) -> View {
        self.store
            .realize(Some(layer), &kiln_store::RealizeCtx::default())
            .await
            .unwrap()
    }
}

fn graph(state: &State) -> Graph {
    Graph::load(&state.marshal(Some(&Platform::host())).unwrap()).unwrap()
}

fn base() -> State {
    let data = std::fs::read("/bin/busybox").expect("a static busybox in /bin").into();
    let file = |path: &str, mode, data| FileStep::MkFile {
        path: path.into(),
        mode,
        data,
        owner: None,
        timestamp: -1,
    };
    let steps = vec![
        FileStep::MkDir {
            path: "/bin".into(),
            mode: 0o755,
            make_parents: true,
            owner: None,
            timestamp: -1,
        },
        FileStep::MkDir {
            path: "/etc".into(),
            mode: 0o755,
            make_parents: true,
            owner: None,
            timestamp: 1_000_000_000_000_000_000,
        },
        file("/bin/busybox", 0o755, data),
    ];
    State::scratch().file(steps, Constraints::named("base"))
}

fn sh(script: &str) -> ExecSpec {
    let args = ["/bin/busybox", "sh", "-c", script].map(str::to_owned).to_vec();
    ExecSpec {
        args,
        ..ExecSpec::default()
    }
}

fn run(root: &State, spec: ExecSpec) -> State {
    root.run(spec, Constraints::named("step"))
}

fn cache(target: &str, id: &str, sharing: CacheSharing) -> MountSpec {
    MountSpec {
        target: target.into(),
        cache: Some(CacheMountOpt { id: id.into(), sharing }),
        ..MountSpec::default()
    }
}

fn files(view: &View) -> Vec<String> {
    let root = view.root().unwrap();
    let mut names: Vec<String> = view
        .walk(&root)
        .map(|n| String::from_utf8_lossy(&view.entry(&n).path).into_owned())
        .collect();
    names.sort();
    names.retain(|n| !n.is_empty());
    names
}

type Case = (
    &'static str,
    fn(SnapshotterChoice) -> futures::future::BoxFuture<'static, ()>,
);

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        const CASES: &[Case] = &[$((stringify!($name), |s| Box::pin($name(s)))),*];
    };
}

cases![
    what_a_step_leaves_becomes_a_layer,
    cache_mounts_persist_and_stay_outside,
    mounts_of_all_kinds,
    failures_name_process_and_code,
    locked_cache_mounts_exclude_each_other,
    a_dropped_build_kills_its_step,
    missing_secrets_are_named,
];

async fn what_a_step_leaves_becomes_a_layer(s: SnapshotterChoice) {
    let lab = Lab::new(s);
    let first = run(
        &base(),
        sh(
            "echo one > /made; busybox() { /bin/busybox \"$@\"; }; busybox mkdir -p /d/e; busybox rm /bin/gone 2>/dev/null; true",
        ),
    );
    let second = run(
        &first,
        sh("/bin/busybox rm /made; echo two > /d/e/f; /bin/busybox chown 7:8 /d/e/f"),
    );
    let layer = lab.build(&second).await.unwrap();
    let view = lab.view(&layer).await;
    // Targets of mounts (hosts, resolv.conf) are gone again; what the runtime makes stays.
    assert_eq!(
        files(&view),
        ["bin", "bin/busybox", "d", "d/e", "d/e/f", "dev", "etc", "proc", "sys"]
    );
    let node = view.find(b"/d/e/f", true).unwrap().unwrap();
    assert_eq!((view.entry(&node).uid, view.entry(&node).gid), (7, 8));
    let etc = view.find(b"/etc", true).unwrap().unwrap();
    assert_eq!(view.entry(&etc).mtime.unix_nanos(), 1_000_000_000_000_000_000);
    // The second build runs nothing.
    let again = lab.build(&second).await.unwrap();
    assert_eq!(again.id(), layer.id());
}

async fn cache_mounts_persist_and_stay_outside(s: SnapshotterChoice) {
    let lab = Lab::new(s);
    let step = |n: u32| {
        let mut spec = sh(&format!("echo {n} >> /cache/log; /bin/busybox cat /cache/log"));
        spec.mounts = vec![cache("/cache", "id", CacheSharing::Shared)];
        run(&base(), spec)
    };
    assert_eq!(lab.output(&step(1)).await, "1\n");
    assert_eq!(lab.output(&step(2)).await, "1\n2\n");
    // A step that ignores the cache starts with an empty one.
    let mut spec = sh("/bin/busybox ls /cache; echo 3 >> /cache/log");
    spec.mounts = vec![cache("/cache", "id", CacheSharing::Shared)];
    let about = Constraints {
        ignore_cache: true,
        ..Constraints::named("anew")
    };
    assert_eq!(lab.output(&base().run(spec, about)).await, "");
    assert_eq!(lab.output(&step(4)).await, "3\n4\n");
    let layer = lab.build(&step(2)).await.unwrap();
    assert!(!files(&lab.view(&layer).await).iter().any(|f| f.contains("log")));
}

async fn mounts_of_all_kinds(s: SnapshotterChoice) {
    let lab = Lab::new(s);
    let other = run(
        &base(),
        sh("/bin/busybox mkdir -p /src/sub; echo content > /src/sub/file"),
    );
    let mut spec = sh(
        "/bin/busybox cat /ro/file; echo x > /ro/y || echo readonly; echo changed > /rw/file; /bin/busybox cat /rw/file; \
         /bin/busybox stat -f -c %T /t; test -e /opt/secret || echo no secret; echo $TOKEN.",
    );
    let mount = |target: &str, readonly, no_output| MountSpec {
        target: target.into(),
        source: other.clone(),
        selector: "/src/sub".into(),
        readonly,
        no_output,
        ..MountSpec::default()
    };
    spec.mounts = vec![
        mount("/ro", true, false),
        mount("/rw", false, true),
        MountSpec {
            target: "/t".into(),
            tmpfs: Some(1 << 20),
            ..MountSpec::default()
        },
    ];
    let target = SecretMountTarget {
        path: "/opt/secret".into(),
        mode: 0o400,
        ..SecretMountTarget::default()
    };
    spec.secrets = vec![
        SecretSpec {
            target: Some(target),
            id: "absent".into(),
            env: None,
            optional: true,
        },
        SecretSpec {
            target: None,
            id: "absent".into(),
            env: Some("TOKEN".into()),
            optional: true,
        },
    ];
    let text = lab.output(&run(&base(), spec)).await;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines, ["content", "readonly", "changed", "tmpfs", "no secret", "."]);
    // What was written to the throw-away copy is nowhere.
    assert_eq!(
        lab.output(&run(&other, sh("/bin/busybox cat /src/sub/file"))).await,
        "content\n"
    );
}

async fn failures_name_process_and_code(s: SnapshotterChoice) {
    let lab = Lab::new(s);
    let failed = lab.build(&run(&base(), sh("exit 3"))).await.unwrap_err();
    assert_eq!(
        failed.to_string(),
        "process \"/bin/busybox sh -c exit 3\" did not complete successfully: exit code: 3"
    );
    assert_eq!(failed.source.exit_code(), Some(3));
    let spec = ExecSpec {
        args: vec!["/bin/nothing".into()],
        ..ExecSpec::default()
    };
    let failed = lab.build(&run(&base(), spec)).await.unwrap_err();
    assert!(
        failed
            .to_string()
            .contains("cannot execute \"/bin/nothing\": no such file or directory"),
        "{failed}"
    );
    assert_eq!(failed.source.exit_code(), Some(127));
    let mut state = base();
    state.around_mut().user = "ghost".into();
    let failed = lab.build(&run(&state, sh("true"))).await.unwrap_err();
    assert!(failed.to_string().contains("unable to find user ghost"), "{failed}");
}

async fn locked_cache_mounts_exclude_each_other(s: SnapshotterChoice) {
    let lab = Arc::new(Lab::new(s));
    let mut set = tokio::task::JoinSet::new();
    for n in 0..4 {
        let lab = Arc::clone(&lab);
        set.spawn(async move {
            let script = format!(
                "test ! -e /c/held || exit 9; echo {n} > /c/held; /bin/busybox sleep 0.05; /bin/busybox rm /c/held; echo {n} >> /d/all"
            );
            let mut spec = sh(&script);
            // In both orders: waiting for one while holding the other would never end.
            let (a, b) = if n % 2 == 0 { ("a", "b") } else { ("b", "a") };
            spec.mounts = vec![
                cache("/c", "lock", CacheSharing::Locked),
                cache("/d", "all", CacheSharing::Shared),
                cache("/x", a, CacheSharing::Locked),
                cache("/y", b, CacheSharing::Locked),
            ];
            lab.build(&run(&base(), spec)).await.map(drop)
        });
    }
    while let Some(done) = set.join_next().await {
        done.unwrap().unwrap();
    }
    let mut spec = sh("/bin/busybox sort /d/all");
    spec.mounts = vec![cache("/d", "all", CacheSharing::Shared)];
    assert_eq!(lab.output(&run(&base(), spec)).await, "0\n1\n2\n3\n");
}

fn running(mark: &str) -> usize {
    let lines = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| std::fs::read(e.path().join("cmdline")).ok());
    lines.filter(|l| String::from_utf8_lossy(l).contains(mark)).count()
}

async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        tokio::task::yield_now().await;
    }
}

async fn a_dropped_build_kills_its_step(s: SnapshotterChoice) {
    let lab = Lab::new(s);
    let mark = format!("5711.{}", std::process::id());
    let step = run(&base(), sh(&format!("/bin/busybox sleep {mark}")));
    tokio::select! {
        built = lab.build(&step) => panic!("{:?}", built.map(|l| l.id().clone())),
        () = wait_for("the step runs", || running(&mark) > 0) => {}
    }
    wait_for("the step is dead", || running(&mark) == 0).await;
    wait_for("nothing is in flight", || lab.solver.in_flight() == 0).await;
    let active = lab.store.root().join("active");
    wait_for("its snapshot is gone", || {
        std::fs::read_dir(&active).unwrap().count() == 0
    })
    .await;
}

async fn missing_secrets_are_named(s: SnapshotterChoice) {
    let lab = Lab::new(s);
    let mut spec = sh("true");
    spec.secrets = vec![SecretSpec {
        target: None,
        id: "token".into(),
        env: Some("T".into()),
        optional: false,
    }];
    let failed = lab.build(&run(&base(), spec)).await.unwrap_err();
    assert_eq!(failed.to_string(), "secret token: not found");
}

fn main() {
    kiln_executor::maybe_init();
    let filter: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let mut failed = Vec::new();
    for (kind, choice) in [
        ("overlay", SnapshotterChoice::Overlay),
        ("native", SnapshotterChoice::Native),
    ] {
        for (name, case) in CASES {
            let name = format!("{kind}::{name}");
            if !filter.is_empty() && !filter.iter().any(|f| name.contains(f.as_str())) {
                continue;
            }
            let begun = Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(|| runtime.block_on(case(choice))));
            println!(
                "test {name} ... {} ({:.0?})",
                if outcome.is_ok() { "ok" } else { "FAILED" },
                begun.elapsed()
            );
            if outcome.is_err() {
                failed.push(name);
            }
        }
    }
    if !failed.is_empty() {
        println!("failed: {failed:?}");
        std::process::exit(1);
    }
}
