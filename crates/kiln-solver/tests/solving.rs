//! What builds may rely on: sharing, cancellation, laziness, errors, progress.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_llb::{Edge, Graph, LinuxResources, OpMetadata};
use kiln_solver::{ErrorKind, Job, LogStream, ProgressEvent, SolverOptions, Tenant, VertexProgress};
use support::{Behavior, GraphBuilder, Lab, TestOp, TestWorker, op};
use tokio::sync::Semaphore;

fn graph(build: impl FnOnce(&mut GraphBuilder) -> Edge) -> Graph {
    let mut builder = GraphBuilder::default();
    let root = build(&mut builder);
    builder.graph(root)
}

fn gate() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(0))
}

fn start(job: &Job<TestWorker>, graph: &Graph) -> tokio::task::JoinHandle<Result<String, String>> {
    let (job, graph) = (job.clone(), graph.clone());
    tokio::spawn(async move {
        let result = job.result(&graph, graph.root().unwrap()).await;
        result.map(|r| r.value.text).map_err(|e| e.to_string())
    })
}

/// The last state of each vertex by name, after the job is over.
async fn states(job: &Job<TestWorker>) -> Vec<VertexProgress> {
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
    states.sort_by(|a, b| a.name.cmp(&b.name));
    states
}

#[test]
fn a_long_chain_needs_no_stack() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_stack_size(256 << 10)
        .build()
        .unwrap();
    runtime.block_on(async {
        let lab = Lab::new();
        // Ten bytes of stack for each vertex: any recursion would overflow.
        let chain = graph(|g| {
            let mut at = g.add(&op("base"), &[]);
            for n in 0..25_000 {
                // Values must not grow with the chain.
                let step = TestOp {
                    by_content: vec![true],
                    coarse: true,
                    ..op(&format!("s{n}"))
                };
                at = g.add(&step, &[at]);
            }
            at
        });
        assert_eq!(lab.build(&chain).await.unwrap(), "s24999.0(<s24998>)");
        lab.worker.take_begun();
        assert_eq!(lab.build(&chain).await.unwrap(), "s24999.0(<s24998>)");
        assert_eq!(lab.worker.take_begun(), Vec::<String>::new());
        lab.until_idle().await;
    });
}

#[tokio::test]
async fn independent_stages_overlap_and_are_not_needed_by_a_hit() {
    let lab = Lab::new();
    let (left, right) = (gate(), gate());
    lab.worker.behave(
        "left",
        Behavior {
            gate: Some(Arc::clone(&left)),
            ..Behavior::default()
        },
    );
    lab.worker.behave(
        "right",
        Behavior {
            gate: Some(Arc::clone(&right)),
            ..Behavior::default()
        },
    );
    let g = graph(|g| {
        let base = g.add(&op("base"), &[]);
        let a = g.add(&op("left"), &[base]);
        let b = g.add(&op("right"), &[base]);
        // The usual shape of a last stage: copied from one stage onto another.
        g.add(
            &TestOp {
                by_content: vec![false, true],
                ..op("copy")
            },
            &[a, b],
        )
    });
    let job = lab.job();
    let build = start(&job, &g);
    lab.worker.until_begun("left", 1).await;
    lab.worker.until_begun("right", 1).await;
    left.add_permits(1);
    right.add_permits(1);
    build.await.unwrap().unwrap();
    assert_eq!(lab.worker.take_begun(), ["base", "copy", "left", "right"]);
    // Everything but the result is pruned: nothing is made.
    lab.cache
        .prune_by(&Tenant::default(), |values| !values[0].text.starts_with("copy"));
    lab.build(&g).await.unwrap();
    assert_eq!(lab.worker.take_begun(), Vec::<String>::new());
}

#[tokio::test]
async fn equal_work_of_two_clients_runs_once_and_outlives_the_first() {
    let lab = Lab::new();
    let slow = gate();
    lab.worker.behave(
        "slow",
        Behavior {
            gate: Some(Arc::clone(&slow)),
            log: Some("hello\n"),
            ..Behavior::default()
        },
    );
    // Other digests, equal keys: a label that is no part of the operation.
    let one = graph(|g| {
        let base = g.add(&op("base"), &[]);
        g.add(&op("slow"), &[base])
    });
    let two = graph(|g| {
        let base = g.add(&op("base"), &[]);
        g.add(&TestOp { salt: 1, ..op("slow") }, &[base])
    });
    assert_ne!(one.root(), two.root());
    let (a, b) = (lab.job_of("a", Tenant::default()), lab.job_of("b", Tenant::default()));
    let first = start(&a, &one);
    lab.worker.until_begun("slow", 1).await;
    let second = start(&b, &two);
    // The second sees the log of what it joined.
    let mut reader = b.progress().subscribe();
    'log: loop {
        for event in reader.next().await.unwrap() {
            if let ProgressEvent::Log(log) = event.as_ref() {
                assert_eq!(
                    (log.read().unwrap().as_ref(), log.stream),
                    (b"hello\n".as_slice(), LogStream::Stdout)
                );
                assert_eq!(log.vertex, two.root().unwrap().vertex);
                break 'log;
            }
        }
    }
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    slow.add_permits(1);
    assert_eq!(second.await.unwrap().unwrap(), "slow.0(base.0())");
    assert_eq!(lab.worker.begun("slow"), 1);
    let seen = states(&a).await;
    assert_eq!(
        seen.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(),
        ["base", "slow"]
    );
    assert_eq!(seen[1].error.as_deref(), Some("context canceled"));
    let seen = states(&b).await;
    assert!(
        seen.iter().all(|v| v.completed.is_some() && v.error.is_none()),
        "{seen:?}"
    );
    lab.until_idle().await;
}

#[tokio::test]
async fn work_dies_with_its_last_waiter_and_newcomers_wait_for_the_end() {
    let lab = Lab::new();
    let (slow, teardown) = (gate(), gate());
    lab.worker.behave(
        "slow",
        Behavior {
            gate: Some(Arc::clone(&slow)),
            slow_teardown: Some(Arc::clone(&teardown)),
            ..Behavior::default()
        },
    );
    let g = graph(|g| g.add(&op("slow"), &[]));
    let (a, b, c) = (lab.job(), lab.job(), lab.job());
    let first = start(&a, &g);
    lab.worker.until_begun("slow", 1).await;
    let second = start(&b, &g);
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    a.cancel();
    assert_eq!(first.await.unwrap().unwrap_err(), "context canceled");
    drop(b);
    second.abort();
    second.await.unwrap_err();
    // Nobody waits now; a newcomer does not start before the old run is torn down.
    let third = start(&c, &g);
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
    assert_eq!(lab.worker.begun("slow"), 1);
    teardown.add_permits(1);
    lab.worker.until_begun("slow", 2).await;
    slow.add_permits(1);
    third.await.unwrap().unwrap();
    lab.until_idle().await;
}

#[tokio::test]
async fn an_error_of_one_clients_session_is_not_the_others() {
    let lab = Lab::new();
    let slow = gate();
    let behavior = Behavior {
        gate: Some(Arc::clone(&slow)),
        needs_client: Some("b"),
        ..Behavior::default()
    };
    lab.worker.behave("secret", behavior);
    let g = graph(|g| g.add(&op("secret"), &[]));
    let (a, b) = (lab.job_of("a", Tenant::default()), lab.job_of("b", Tenant::default()));
    let first = start(&a, &g);
    lab.worker.until_begun("secret", 1).await;
    // Alone, a fails.
    slow.add_permits(1);
    assert_eq!(first.await.unwrap().unwrap_err(), "no session of b");
    // Its job remembers; another job tries by itself.
    assert_eq!(start(&a, &g).await.unwrap().unwrap_err(), "no session of b");
    assert_eq!(lab.worker.begun("secret"), 1);
    let c = lab.job_of("c", Tenant::default());
    let third = start(&c, &g);
    lab.worker.until_begun("secret", 2).await;
    let second = start(&b, &g);
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    // The one who could have helped leaves: c's run fails for c, and nobody else is asked to run.
    second.abort();
    second.await.unwrap_err();
    slow.add_permits(1);
    third.await.unwrap().unwrap_err();
    let again = start(&b, &g);
    slow.add_permits(1);
    assert_eq!(again.await.unwrap().unwrap(), "secret.0()");
    lab.until_idle().await;
}

#[tokio::test]
async fn a_waiter_retries_a_personal_failure_with_its_own_session() {
    let lab = Lab::new();
    let slow = gate();
    lab.worker.behave(
        "auth",
        Behavior {
            gate: Some(Arc::clone(&slow)),
            needs_client: Some("nobody"),
            ..Behavior::default()
        },
    );
    let g = graph(|g| g.add(&op("auth"), &[]));
    let (a, b) = (lab.job_of("a", Tenant::default()), lab.job_of("b", Tenant::default()));
    let first = start(&a, &g);
    lab.worker.until_begun("auth", 1).await;
    let second = start(&b, &g);
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    slow.add_permits(1);
    assert_eq!(first.await.unwrap().unwrap_err(), "no session of nobody");
    // b runs it by itself, and only then fails.
    lab.worker.until_begun("auth", 2).await;
    assert!(!second.is_finished());
    slow.add_permits(1);
    assert_eq!(second.await.unwrap().unwrap_err(), "no session of nobody");
    assert_eq!(lab.worker.begun("auth"), 2);
}

#[tokio::test]
async fn ignoring_the_cache_reaches_what_is_built_upon_it_except_by_equal_content() {
    let lab = Lab::new();
    let build = |ignore: bool| {
        graph(|g| {
            let base = g.add(&op("base"), &[]);
            let stage = g.add_with(
                &TestOp {
                    varies: true,
                    coarse: true,
                    ..op("stage")
                },
                &[base],
                ignore,
            );
            let on_top = g.add(&op("on-top"), &[stage]);
            let further = g.add(&op("further"), &[on_top]);
            let copied = g.add(
                &TestOp {
                    by_content: vec![false, true],
                    ..op("copied")
                },
                &[base, stage],
            );
            g.add(&op("end"), &[further, copied])
        })
    };
    let old = lab.build(&build(false)).await.unwrap();
    lab.worker.take_begun();
    // As with --no-cache-filter=stage: the stage, and what stands on it, is made again; what was copied from it is equal.
    let new = lab.build(&build(true)).await.unwrap();
    assert_eq!(lab.worker.take_begun(), ["end", "further", "on-top", "stage"]);
    assert_ne!(old, new);
    // The new results replaced the old ones, and nothing is made twice.
    assert_eq!(lab.build(&build(false)).await.unwrap(), new);
    assert_eq!(lab.worker.take_begun(), Vec::<String>::new());
}

#[tokio::test]
async fn an_input_that_is_lost_is_made_again_once() {
    let lab = Lab::new();
    let g = graph(|g| {
        let base = g.add(
            &TestOp {
                varies: true,
                ..op("base")
            },
            &[],
        );
        g.add(&op("top"), &[base])
    });
    lab.worker.behave(
        "top",
        Behavior {
            loses: Some((0, Arc::new(AtomicU64::new(1)))),
            ..Behavior::default()
        },
    );
    assert_eq!(lab.build(&g).await.unwrap(), "top.0(base.0#1())");
    assert_eq!(lab.worker.take_begun(), ["base", "base", "top"]);
    // A loss without end is an error, not a loop.
    let g = graph(|g| {
        let base = g.add(&op("base"), &[]);
        g.add(&op("hopeless"), &[base])
    });
    let always = Arc::new(AtomicU64::new(u64::MAX));
    lab.worker.behave(
        "hopeless",
        Behavior {
            loses: Some((0, Arc::clone(&always))),
            ..Behavior::default()
        },
    );
    let error = lab.build(&g).await.unwrap_err();
    assert!(error.contains("lost again and again"), "{error}");
    assert!(u64::MAX - always.load(Ordering::SeqCst) < 20);
}

#[tokio::test]
async fn a_value_found_lost_by_its_user_is_made_again() {
    let lab = Lab::new();
    let g = graph(|g| {
        g.add(
            &TestOp {
                varies: true,
                ..op("image")
            },
            &[],
        )
    });
    let job = lab.job();
    let edge = g.root().unwrap();
    let solved = job.result(&g, edge).await.unwrap();
    let again = job.result_again(&g, edge, solved.run).await.unwrap();
    assert_ne!(solved.value.text, again.value.text);
    // Only the run that was lost is forgotten.
    assert_eq!(job.result_again(&g, edge, solved.run).await.unwrap().value, again.value);
}

#[tokio::test]
async fn the_first_failure_ends_a_build_and_what_only_it_wanted() {
    let lab = Lab::new();
    lab.worker.behave(
        "bad",
        Behavior {
            error: Some((ErrorKind::User, "exit code: 3")),
            ..Behavior::default()
        },
    );
    lab.worker.behave(
        "endless",
        Behavior {
            gate: Some(gate()),
            ..Behavior::default()
        },
    );
    let g = graph(|g| {
        let endless = g.add(&op("endless"), &[]);
        let bad = g.add(&op("bad"), &[endless]);
        let bad2 = g.add(&op("bad"), &[]);
        g.add(&op("end"), &[bad, bad2])
    });
    let job = lab.job();
    let error = job.result(&g, g.root().unwrap()).await.unwrap_err();
    assert_eq!(
        (error.to_string().as_str(), error.kind()),
        ("exit code: 3", ErrorKind::User)
    );
    assert_eq!(
        error.vertex,
        g.vertices()
            .find(|v| v.name() == "bad" && v.inputs.is_empty())
            .unwrap()
            .digest
    );
    lab.until_idle().await;
    let seen = states(&job).await;
    let of = |name: &str| seen.iter().find(|v| v.name == name && v.started.is_some()).unwrap();
    assert_eq!(of("bad").error.as_deref(), Some("exit code: 3"));
    assert_eq!(of("endless").error.as_deref(), Some("context canceled"));
    assert!(seen.iter().all(|v| v.started.is_none() || v.completed.is_some()));
}

#[tokio::test]
async fn a_panic_is_an_internal_error() {
    let lab = Lab::new();
    lab.worker.behave(
        "panics",
        Behavior {
            panics: true,
            ..Behavior::default()
        },
    );
    let g = graph(|g| g.add(&op("panics"), &[]));
    let job = lab.job();
    let error = job.result(&g, g.root().unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    lab.until_idle().await;
}

#[tokio::test]
async fn permits_limit_how_much_runs() {
    let lab = Lab::with(SolverOptions {
        max_parallelism: Some(1),
        ..SolverOptions::default()
    });
    let (left, right) = (gate(), gate());
    lab.worker.behave(
        "left",
        Behavior {
            gate: Some(Arc::clone(&left)),
            ..Behavior::default()
        },
    );
    lab.worker.behave(
        "right",
        Behavior {
            gate: Some(Arc::clone(&right)),
            ..Behavior::default()
        },
    );
    let g = graph(|g| {
        let (a, b) = (g.add(&op("left"), &[]), g.add(&op("right"), &[]));
        g.add(&op("end"), &[a, b])
    });
    let job = lab.job();
    let build = start(&job, &g);
    for _ in 0..500 {
        tokio::task::yield_now().await;
    }
    assert_eq!(lab.worker.begun("left") + lab.worker.begun("right"), 1);
    left.add_permits(1);
    right.add_permits(1);
    build.await.unwrap().unwrap();
}

#[tokio::test]
async fn tenants_share_neither_results_nor_running_work() {
    let lab = Lab::new();
    let slow = gate();
    lab.worker.behave(
        "slow",
        Behavior {
            gate: Some(Arc::clone(&slow)),
            ..Behavior::default()
        },
    );
    let g = graph(|g| g.add(&op("slow"), &[]));
    let (a, b) = (lab.job_of("a", Tenant::new("a")), lab.job_of("b", Tenant::new("b")));
    let (first, second) = (start(&a, &g), start(&b, &g));
    lab.worker.until_begun("slow", 2).await;
    slow.add_permits(2);
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(lab.worker.begun("slow"), 2);
}

#[tokio::test]
async fn limits_are_part_of_a_run_but_not_of_its_key() {
    let lab = Lab::new();
    let slow = gate();
    lab.worker.behave(
        "slow",
        Behavior {
            gate: Some(Arc::clone(&slow)),
            ..Behavior::default()
        },
    );
    let with = |memory: i64| {
        let mut builder = GraphBuilder::default();
        let linux_resources = Some(LinuxResources {
            memory,
            ..LinuxResources::default()
        });
        let step = TestOp {
            salt: memory as u32,
            ..op("slow")
        };
        let root = builder.add_full(
            &step,
            &[],
            1,
            OpMetadata {
                linux_resources,
                ..OpMetadata::default()
            },
        );
        builder.graph(root)
    };
    let (a, b) = (lab.job(), lab.job());
    let (first, second) = (start(&a, &with(1)), start(&b, &with(2)));
    lab.worker.until_begun("slow", 2).await;
    slow.add_permits(2);
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(lab.build(&with(3)).await.unwrap(), "slow.0()");
    assert_eq!(lab.worker.begun("slow"), 2);
}

#[tokio::test]
async fn an_image_under_another_manifest_with_equal_layers_is_the_same() {
    let lab = Lab::new();
    let build = |variant: u32| {
        graph(|g| {
            let image = TestOp {
                variant,
                second_key: Some("layers".into()),
                ..op("image")
            };
            let image = g.add(&image, &[]);
            g.add(&op("run"), &[image])
        })
    };
    lab.build(&build(1)).await.unwrap();
    lab.worker.take_begun();
    lab.build(&build(2)).await.unwrap();
    assert_eq!(lab.worker.take_begun(), Vec::<String>::new());
}

#[tokio::test]
async fn a_cached_build_reports_everything_as_cached() {
    let lab = Lab::new();
    let g = graph(|g| {
        let base = g.add(&op("a-base"), &[]);
        let run = g.add(&op("b-run"), &[base]);
        g.add(&op("c-end"), &[run])
    });
    lab.build(&g).await.unwrap();
    let job = lab.job();
    job.result(&g, g.root().unwrap()).await.unwrap();
    let seen = states(&job).await;
    let cached: Vec<(&str, bool)> = seen.iter().map(|v| (v.name.as_str(), v.cached)).collect();
    // The source was asked what it stands for, which is work of its own.
    assert_eq!(cached, [("a-base", false), ("b-run", true), ("c-end", true)]);
    assert!(seen.iter().all(|v| v.completed.is_some() && v.error.is_none()));
}

#[tokio::test]
async fn all_outputs_of_a_vertex_come_from_one_run() {
    let lab = Lab::new();
    let mut builder = GraphBuilder::default();
    let many = builder.add_full(
        &TestOp {
            varies: true,
            ..op("many")
        },
        &[],
        3,
        OpMetadata::default(),
    );
    let (second, third) = (Edge { output: 1, ..many }, Edge { output: 2, ..many });
    let end = builder.add(&op("end"), &[second, third]);
    let g = builder.graph(end);
    assert_eq!(lab.build(&g).await.unwrap(), "end.0(many.0#0()@1 many.0#0()@2)");
    assert_eq!(lab.worker.take_begun(), ["end", "many"]);
}

#[tokio::test]
async fn sources_are_asked_once_for_all_who_wait() {
    let lab = Lab::new();
    let g = graph(|g| g.add(&op("image"), &[]));
    let jobs: Vec<_> = (0..5).map(|_| lab.job()).collect();
    let builds: Vec<_> = jobs.iter().map(|j| start(j, &g)).collect();
    for build in builds {
        build.await.unwrap().unwrap();
    }
    assert_eq!(lab.worker.keyed.lock().unwrap().len(), 1);
    assert_eq!(lab.worker.begun("image"), 1);
}
