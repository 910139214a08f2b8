//! `make bench`: how long things take through the real `docker buildx`, beside another daemon where `PEER` names one. The two are
//! measured in turns, so that a busy moment of the machine hits both; a line shows the better of its rounds.

// A benchmark prints its table, and panics where a test would.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used, clippy::expect_used)]

use harness::{Build, Buildx, Daemon, Fixture, Registry};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// One daemon with what it is called.
struct Side {
    name: &'static str,
    program: PathBuf,
}

impl Side {
    fn start(&self) -> Daemon {
        Daemon::with().program(&self.program).start()
    }

    fn start_with(&self, registry: &Registry) -> Daemon {
        Daemon::with().program(&self.program).plain_http(registry).start()
    }
}

/// A measurement: seconds, or MiB for memory. Each call starts from nothing and measures one round.
type Measure = fn(&Side) -> f64;

const LINES: &[(&str, &str, usize, Measure)] = &[
    ("start", "start to listening, ms", 5, start),
    ("idle", "idle memory, MiB", 3, idle),
    ("cached", "fully cached rebuild", 5, cached),
    ("chain", "chain of 20 RUN steps", 3, chain),
    ("wide", "80 RUN steps in 8 stages", 3, wide),
    ("context-first", "context of 20,000 files, first", 3, context_first),
    ("context-same", "context of 20,000 files, unchanged", 3, context_same),
    ("context-one", "context of 20,000 files, one change", 3, context_one),
    ("copy-from", "COPY --from of 20,000 files", 3, copy_from),
    ("export", "OCI export (gzip) of 300 MB", 2, export),
    ("pull", "pull and unpack of 300 MB", 2, pull),
];

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let mut sides = vec![Side {
        name: "kiln",
        program: harness::lab::daemon(),
    }];
    if let Some(peer) = std::env::var_os("PEER").filter(|peer| !peer.is_empty()) {
        sides.push(Side {
            name: "peer",
            program: peer.into(),
        });
    }
    let mut table = String::new();
    let head = |name: &str| {
        if sides.len() == 1 && name != "kiln" {
            String::new()
        } else {
            format!("{name:>10}")
        }
    };
    let _ = writeln!(table, "{:<38}{}{}{}", "", head("kiln"), head("peer"), head("ratio"));
    print!("{table}");
    for (key, title, rounds, measure) in LINES {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| key.starts_with(wanted.as_str())) {
            continue;
        }
        let mut best = vec![f64::INFINITY; sides.len()];
        for _ in 0..*rounds {
            for (side, best) in sides.iter().zip(&mut best) {
                *best = best.min(measure(side));
            }
        }
        let mut line = format!("{title:<38}");
        for (value, side) in best.iter().zip(&sides) {
            assert!(value.is_finite(), "{} has no value for {title}", side.name);
            let _ = write!(line, "{value:>10.2}");
        }
        if let [ours, theirs] = best[..] {
            let _ = write!(line, "{:>10.2}", ours / theirs);
        }
        println!("{line}");
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let clock = Instant::now();
    work();
    clock.elapsed().as_secs_f64()
}

fn run(build: Build<'_>) {
    let _outcome = build.ok();
}

/// A client whose daemon has the base image already, so that no pull is measured.
fn warm(daemon: &Daemon) -> Buildx {
    let buildx = daemon.buildx();
    run(buildx.build(&Fixture::new("=== Dockerfile\nFROM busybox\nRUN true\n")));
    buildx
}

fn start(side: &Side) -> f64 {
    side.start().started_in().as_secs_f64() * 1000.0
}

fn idle(side: &Side) -> f64 {
    let daemon = side.start();
    let buildx = warm(&daemon);
    let _outcome = buildx.run(&["du"]).ok();
    // What a daemon frees, it frees soon after the last client has left.
    std::thread::park_timeout(Duration::from_secs(3));
    daemon.resident_kib() as f64 / 1024.0
}

fn chain_of(steps: usize) -> Fixture {
    let mut dockerfile = String::from("=== Dockerfile\nFROM busybox\n");
    for step in 0..steps {
        let _ = writeln!(dockerfile, "RUN echo {step} > /{step}");
    }
    Fixture::new(&dockerfile)
}

fn cached(side: &Side) -> f64 {
    let daemon = side.start();
    let buildx = warm(&daemon);
    let context = chain_of(10);
    run(buildx.build(&context));
    seconds(|| run(buildx.build(&context)))
}

fn chain(side: &Side) -> f64 {
    let daemon = side.start();
    let buildx = warm(&daemon);
    let context = chain_of(20);
    seconds(|| run(buildx.build(&context)))
}

fn wide(side: &Side) -> f64 {
    let daemon = side.start();
    let buildx = warm(&daemon);
    let mut dockerfile = String::from("=== Dockerfile\n");
    for stage in 0..8 {
        let _ = writeln!(dockerfile, "FROM busybox AS s{stage}");
        for step in 0..10 {
            let _ = writeln!(dockerfile, "RUN echo {stage} {step} > /{stage}-{step}");
        }
    }
    dockerfile.push_str("FROM scratch\n");
    for stage in 0..8 {
        let _ = writeln!(dockerfile, "COPY --from=s{stage} /{stage}-9 /");
    }
    let context = Fixture::new(&dockerfile);
    seconds(|| run(buildx.build(&context)))
}

fn many_files() -> Fixture {
    let context = Fixture::new("=== Dockerfile\nFROM scratch\nCOPY . /\n");
    for number in 0..20_000 {
        context.write(
            format!("d{}/e{}/f{number}", number % 20, number % 100),
            format!("file {number}\n").repeat(20),
        );
    }
    context
}

fn context_first(side: &Side) -> f64 {
    let daemon = side.start();
    let buildx = warm(&daemon);
    let context = many_files();
    seconds(|| run(buildx.build(&context)))
}

fn context_same(side: &Side) -> f64 {
    let daemon = side.start();
    let buildx = warm(&daemon);
    let context = many_files();
    run(buildx.build(&context));
    seconds(|| run(buildx.build(&context)))
}

fn context_one(side: &Side) -> f64 {
    let daemon = side.start();
    let buildx = warm(&daemon);
    let context = many_files();
    run(buildx.build(&context));
    context.write("d0/e0/f0", "changed\n");
    seconds(|| run(buildx.build(&context)))
}

fn copy_from(side: &Side) -> f64 {
    let daemon = side.start();
    let buildx = warm(&daemon);
    let make = "FROM busybox AS make\nRUN mkdir /d && cd /d && i=0; while [ $i -lt 20000 ]; do echo $i > /d/f$i; i=$((i+1)); done\n";
    let context = Fixture::empty();
    context.write("Dockerfile", make);
    run(buildx.build(&context));
    context.write("Dockerfile", format!("{make}FROM busybox\nCOPY --from=make /d /d\n"));
    seconds(|| run(buildx.build(&context)))
}

/// 300 MB that compress as programs do: words in a fixed but irregular order.
fn three_hundred_megabytes() -> Fixture {
    let context = Fixture::new("=== Dockerfile\nFROM scratch\nCOPY data /data\n");
    let mut state = 88_172_645_463_325_252_u64;
    let words: Vec<String> = (0..4096_u32)
        .map(|number| format!("{:x}_{}", number.wrapping_mul(2_654_435_761), number % 7))
        .collect();
    for file in 0..30 {
        let mut text = String::with_capacity(10_100_000);
        while text.len() < 10_000_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            text.push_str(&words[(state % 4096) as usize]);
            text.push(if state & 0x1000 == 0 { ' ' } else { '\n' });
        }
        context.write(format!("data/{file}"), text);
    }
    context
}

fn export(side: &Side) -> f64 {
    let daemon = side.start();
    let buildx = warm(&daemon);
    let context = three_hundred_megabytes();
    run(buildx.build(&context));
    let build = buildx.build(&context);
    let file = build.result_path("image.tar");
    seconds(|| run(build.arg(format!("--output=type=oci,dest={}", file.display()))))
}

fn pull(side: &Side) -> f64 {
    let registry = Registry::empty();
    let reference = format!("{}/big/image:1", registry.host());
    {
        // Whoever made the image does not matter; the same side does, so that a missing peer is no reason to skip.
        let maker = side.start_with(&registry);
        run(maker
            .buildx()
            .build(&three_hundred_megabytes())
            .args(&["-t", &reference, "--push", "--provenance=false"]));
    }
    let daemon = side.start_with(&registry);
    let buildx = warm(&daemon);
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM busybox\nRUN --mount=from={reference},target=/m test -s /m/data/0\n"
    ));
    seconds(|| run(buildx.build(&context)))
}
