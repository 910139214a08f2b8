//! The solver against a naive recursive twin, on random graphs and random histories.
//!
//! The twin knows nothing of tasks, sharing, links or laziness beyond the rules themselves: it is the essay in
//! `cache_key.rs` as a recursive function over strings. Sequences of builds must give equal values and equal runs.
//! Concurrent builds with cancellations and prunings have no single right value, but what they give must be what the
//! operations would make of each other, nothing may run twice at the same time, and nothing may stay behind.

#[allow(clippy::unwrap_used, reason = "a test")]
mod support;

use std::collections::{BTreeMap, HashMap};

use kiln_llb::{Edge, Graph};
use kiln_solver::Tenant;
use proptest::prelude::*;
use support::{GraphBuilder, Lab, TestOp, Value, compute};

/// A vertex of the random topology.
#[derive(Clone, Debug)]
struct Shape {
    inputs: Vec<(prop::sample::Index, bool)>,
    varies: bool,
    coarse: bool,
    transient: bool,
}

#[derive(Clone, Debug)]
struct Build {
    root: prop::sample::Index,
    /// Vertices whose operation was edited.
    variants: u16,
    ignores: u16,
    /// Records whose results are pruned before the build.
    pruned: u64,
    /// In concurrent histories: give the build up after this many yields.
    give_up: Option<u8>,
}

fn shapes() -> impl Strategy<Value = Vec<Shape>> {
    let shape = (
        prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..4),
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.4),
        prop::bool::weighted(0.3),
    );
    let shape = shape.prop_map(|(inputs, varies, coarse, transient)| Shape {
        inputs,
        varies,
        coarse,
        transient,
    });
    prop::collection::vec(shape, 1..11)
}

fn builds() -> impl Strategy<Value = Vec<Build>> {
    let sparse =
        || prop_oneof![3 => Just(0u16), 2 => any::<u16>().prop_map(|b| b & b.rotate_left(5) & b.rotate_left(9))];
    let build = (
        any::<prop::sample::Index>(),
        sparse(),
        sparse(),
        prop_oneof![2 => Just(0u64), 1 => any::<u64>()],
        prop::option::weighted(0.4, 0u8..40),
    );
    let build = build.prop_map(|(root, variants, ignores, pruned, give_up)| Build {
        root,
        variants,
        ignores,
        pruned,
        give_up,
    });
    prop::collection::vec(build, 1..8)
}

struct Planned {
    ops: Vec<TestOp>,
    inputs: Vec<Vec<usize>>,
    ignores: Vec<bool>,
    root: usize,
    graph: Graph,
}

fn plan(shapes: &[Shape], build: &Build) -> Planned {
    let mut builder = GraphBuilder::default();
    let mut edges: Vec<Edge> = Vec::new();
    let (mut ops, mut inputs, mut ignores) = (Vec::new(), Vec::new(), Vec::new());
    for (n, shape) in shapes.iter().enumerate() {
        let mut from = Vec::new();
        let mut by_content = Vec::new();
        if n > 0 {
            for (index, content) in &shape.inputs {
                from.push(index.index(n));
                by_content.push(*content);
            }
        }
        let op = TestOp {
            name: format!("v{n}"),
            variant: u32::from(build.variants >> n & 1),
            by_content,
            varies: shape.varies,
            coarse: shape.coarse,
            transient: shape.transient && from.is_empty(),
            ..TestOp::default()
        };
        let ignore = build.ignores >> n & 1 == 1;
        let of: Vec<Edge> = from.iter().map(|i| edges[*i]).collect();
        edges.push(builder.add_with(&op, &of, ignore));
        ops.push(op);
        inputs.push(from);
        ignores.push(ignore);
    }
    let root = build.root.index(shapes.len());
    Planned {
        graph: builder.graph(edges[root]),
        ops,
        inputs,
        ignores,
        root,
    }
}

/// The naive twin.
#[derive(Default)]
struct Twin {
    /// Canonical key -> version and, unless pruned, value.
    records: BTreeMap<String, (u64, Option<Value>)>,
    /// Definition key -> canonical key, and the versions it holds for.
    aliases: HashMap<String, (String, Vec<(String, u64)>)>,
    /// Canonical key -> version and content.
    contents: HashMap<String, (u64, String)>,
    runs: u64,
    unsaved: u64,
    /// A pruned result was made again. From then on it depends on timing which aliases of its consumers were looked at
    /// before and which after, and so how much later builds have to make to find the same values.
    remade: bool,
}

#[derive(Clone)]
struct Made {
    key: String,
    version: u64,
    value: Value,
    trusted: bool,
    volatile: bool,
}

struct TwinJob<'a> {
    plan: &'a Planned,
    made: HashMap<usize, Made>,
    keys: HashMap<usize, Option<String>>,
    ran: Vec<String>,
}

fn key(op: &TestOp, inputs: &[String]) -> String {
    format!("{}.{}{:?}[{}]", op.name, op.variant, op.by_content, inputs.join(" "))
}

impl Twin {
    fn version(&self, key: &str) -> u64 {
        self.records.get(key).map_or(0, |r| r.0)
    }

    fn find(&self, key: &str) -> Option<(u64, Value)> {
        let (version, value) = self.records.get(key)?;
        Some((*version, value.clone()?))
    }

    fn follow(&self, key: &str) -> Option<String> {
        let (canonical, conditions) = self.aliases.get(key)?;
        conditions
            .iter()
            .all(|(k, v)| self.version(k) == *v)
            .then(|| canonical.clone())
    }

    /// The identity of a vertex without making anything. Remembered in the job, as what it is made of may change.
    fn key(&self, job: &mut TwinJob<'_>, n: usize) -> Option<String> {
        if let Some(known) = job.keys.get(&n) {
            return known.clone();
        }
        let op = &job.plan.ops[n];
        let found = (|| {
            if job.plan.ignores[n] || op.transient {
                return None;
            }
            let inputs: Vec<Option<String>> = job.plan.inputs[n].clone().iter().map(|i| self.key(job, *i)).collect();
            let inputs: Vec<String> = inputs.into_iter().collect::<Option<_>>()?;
            let definition = key(op, &inputs);
            if op.by_content.contains(&true) {
                self.follow(&definition)
            } else {
                Some(definition)
            }
        })();
        job.keys.insert(n, found.clone());
        found
    }

    fn value(&mut self, job: &mut TwinJob<'_>, n: usize) -> Made {
        if let Some(made) = job.made.get(&n) {
            return made.clone();
        }
        let made = self.find_or_make(job, n);
        job.made.insert(n, made.clone());
        made
    }

    fn find_or_make(&mut self, job: &mut TwinJob<'_>, n: usize) -> Made {
        let op = job.plan.ops[n].clone();
        let inputs = job.plan.inputs[n].clone();
        let ignore = job.plan.ignores[n];
        let by_content = op.by_content.contains(&true);
        let hit = |key: String, (version, value)| Made {
            key,
            version,
            value,
            trusted: true,
            volatile: false,
        };
        if !ignore {
            if let Some(key) = self.key(job, n)
                && let Some(found) = self.find(&key)
            {
                return hit(key, found);
            }
            if by_content && !op.transient {
                let mut parts = Vec::new();
                let mut looked_at = Vec::new();
                let mut usable = true;
                for (i, content) in inputs.iter().zip(&op.by_content) {
                    let known = self.key(job, *i);
                    if *content {
                        let remembered = known.and_then(|k| {
                            let (version, content) = self.contents.get(&k)?;
                            (self.version(&k) == *version).then(|| (k.clone(), *version, content.clone()))
                        });
                        let (k, version, content) = remembered.unwrap_or_else(|| {
                            let made = self.value(job, *i);
                            (made.key, made.version, made.value.content)
                        });
                        looked_at.push((k, version));
                        parts.push(content);
                    } else if let Some(known) = known {
                        parts.push(known);
                    } else {
                        let made = self.value(job, *i);
                        usable &= made.trusted && !made.volatile;
                        parts.push(made.key);
                    }
                }
                let canonical = key(&op, &parts);
                if usable && let Some(found) = self.find(&canonical) {
                    self.learn(job, n, &canonical, &looked_at);
                    return hit(canonical, found);
                }
            }
        }
        let made: Vec<Made> = inputs.iter().map(|i| self.value(job, *i)).collect();
        let parts: Vec<String> = made
            .iter()
            .zip(op.by_content.iter().chain(std::iter::repeat(&false)))
            .map(|(m, content)| {
                if *content {
                    m.value.content.clone()
                } else {
                    m.key.clone()
                }
            })
            .collect();
        let used_whole = || made.iter().zip(&op.by_content).filter(|(_, c)| !**c).map(|(m, _)| m);
        let trusted = !ignore && used_whole().all(|m| m.trusted);
        let volatile = op.transient || used_whole().any(|m| m.volatile);
        let canonical = key(&op, &parts);
        let looked_at: Vec<(String, u64)> = made
            .iter()
            .zip(&op.by_content)
            .filter(|(_, c)| **c)
            .map(|(m, _)| (m.key.clone(), m.version))
            .collect();
        if trusted
            && !volatile
            && let Some(found) = self.find(&canonical)
        {
            self.learn(job, n, &canonical, &looked_at);
            return hit(canonical, found);
        }
        let values: Vec<Value> = made.iter().map(|m| m.value.clone()).collect();
        let value = compute(&op, &values, self.runs);
        self.runs += 1;
        job.ran.push(op.name.clone());
        let version = if volatile {
            self.unsaved += 1;
            u64::MAX - self.unsaved
        } else {
            let version = self.version(&canonical) + 1;
            self.remade |= version > 1 && !ignore;
            self.records.insert(canonical.clone(), (version, Some(value.clone())));
            self.learn(job, n, &canonical, &looked_at);
            version
        };
        Made {
            key: canonical,
            version,
            value,
            trusted,
            volatile,
        }
    }

    /// Remembers what was looked at: contents of inputs, and that the definition leads to this record.
    fn learn(&mut self, job: &mut TwinJob<'_>, n: usize, canonical: &str, looked_at: &[(String, u64)]) {
        let op = &job.plan.ops[n];
        let mut identities = Vec::new();
        for (i, content) in job.plan.inputs[n].iter().zip(&op.by_content) {
            let made = job.made.get(i);
            if let Some(made) = made
                && *content
                && !made.volatile
                && self.version(&made.key) == made.version
            {
                self.contents
                    .insert(made.key.clone(), (made.version, made.value.content.clone()));
            }
            identities.push(match made {
                Some(made) if *content && made.volatile => None,
                Some(made) => Some(made.key.clone()),
                None => job.keys.get(i).cloned().flatten(),
            });
        }
        if let Some(identities) = identities.into_iter().collect::<Option<Vec<_>>>() {
            let definition = key(op, &identities);
            if definition != canonical {
                self.aliases
                    .insert(definition, (canonical.to_owned(), looked_at.to_vec()));
            }
        }
    }
}

/// What the operations make of each other if nothing is ever cached; run numbers aside.
fn ideal(plan: &Planned, n: usize, memo: &mut HashMap<usize, Value>) -> Value {
    if let Some(value) = memo.get(&n) {
        return value.clone();
    }
    let inputs: Vec<Value> = plan.inputs[n].iter().map(|i| ideal(plan, *i, memo)).collect();
    let value = without_runs(&compute(&plan.ops[n], &inputs, 0));
    memo.insert(n, value.clone());
    value
}

fn without_runs(value: &Value) -> Value {
    let strip = |text: &str| {
        let mut out = String::new();
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            if c == '#' {
                while chars.peek().is_some_and(char::is_ascii_digit) {
                    chars.next();
                }
            } else {
                out.push(c);
            }
        }
        out
    };
    Value {
        text: strip(&value.text),
        content: strip(&value.content),
        run: 0,
    }
}

fn runtime(threads: usize) -> tokio::runtime::Runtime {
    if threads > 1 {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .build()
            .unwrap()
    } else {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: Some(Box::new(prop::test_runner::FileFailurePersistence::WithSource("seeds"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn builds_one_after_the_other_equal_the_twin(shapes in shapes(), builds in builds()) {
        runtime(1).block_on(async {
            let lab = Lab::new();
            let mut twin = Twin::default();
            let tenant = Tenant::default();
            // Records are pruned by what their values are, run numbers aside: the twin's ids are its own.
            for build in &builds {
                let pruned = |value: &Value| {
                    let text = without_runs(value).text;
                    build.pruned >> (text.bytes().map(u64::from).sum::<u64>() % 64) & 1 == 1
                };
                for (_, value) in twin.records.values_mut() {
                    value.take_if(|v| pruned(v));
                }
                lab.cache.prune_by(&tenant, |outputs: &[Value]| outputs.iter().any(pruned));
                let plan = plan(&shapes, build);
                let mut job = TwinJob { plan: &plan, made: HashMap::new(), keys: HashMap::new(), ran: Vec::new() };
                let expected = twin.value(&mut job, plan.root);
                job.ran.sort();
                let got = lab.build(&plan.graph).await.unwrap();
                let ran = lab.worker.take_begun();
                // Run numbers follow the order of runs, which is free among independent vertices.
                let got = without_runs(&Value { text: got, content: String::new(), run: 0 });
                prop_assert_eq!(&got.text, &without_runs(&expected.value).text);
                lab.until_idle().await;
                if twin.remade {
                    break;
                }
                prop_assert_eq!(&ran, &job.ran, "runs");
            }
            Ok(())
        })?;
    }

    #[test]
    fn concurrent_builds_give_what_the_operations_make(shapes in shapes(), builds in builds()) {
        runtime(2).block_on(async {
            let lab = Lab::new();
            let tenant = Tenant::default();
            let mut waiting = Vec::new();
            for (n, build) in builds.iter().enumerate() {
                if build.pruned != 0 {
                    let mut k = 0u32;
                    lab.cache.prune(&tenant, |_| { k += 1; build.pruned >> (k % 64) & 1 == 1 });
                }
                let plan = plan(&shapes, build);
                let job = lab.job();
                let give_up = build.give_up;
                waiting.push((n, plan.root, tokio::spawn({
                    let (graph, job) = (plan.graph.clone(), job);
                    async move {
                        let work = job.result(&graph, graph.root().unwrap());
                        match give_up {
                            None => Some(work.await),
                            Some(after) => {
                                let patience = async {
                                    for _ in 0..after {
                                        tokio::task::yield_now().await;
                                    }
                                };
                                tokio::select! {
                                    biased;
                                    result = work => Some(result),
                                    () = patience => None,
                                }
                            }
                        }
                    }
                }), plan));
            }
            for (n, root, task, plan) in waiting {
                if let Some(result) = task.await.unwrap() {
                    let value = result.map_err(|e| TestCaseError::fail(format!("build {n}: {e}")))?.value;
                    let wanted = ideal(&plan, root, &mut HashMap::new());
                    prop_assert_eq!(without_runs(&value), wanted, "build {}", n);
                }
            }
            lab.until_idle().await;
            Ok(())
        })?;
    }
}
