//! `make demo`: a daemon on a socket of its own, real multi-stage builds through the real `docker buildx`, the built programs run,
//! everything stopped again.

// A demonstration talks to its user, and panics where a test would.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

use harness::{Daemon, Fixture};
use std::time::Instant;

/// An example, the stage that does the work, the path there whose size tells what was left behind, and the program to run.
struct Show {
    example: &'static str,
    build_stage: &'static str,
    run: &'static [&'static str],
}

const SHOWS: &[Show] = &[
    Show {
        example: "go-scratch",
        build_stage: "builder",
        run: &["/server"],
    },
    Show {
        example: "go-distroless",
        build_stage: "build",
        run: &["/app"],
    },
    Show {
        example: "node-service",
        build_stage: "builder",
        run: &["/usr/local/bin/node", "dist/server.js"],
    },
    Show {
        example: "frontend-and-api",
        build_stage: "api-builder",
        run: &["./api"],
    },
    Show {
        example: "frontend-nginx",
        build_stage: "builder",
        run: &["/bin/cat", "/usr/share/nginx/html/index.html"],
    },
];

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1_048_576.0)
}

fn main() {
    let started = Instant::now();
    let daemon = Daemon::start();
    println!(
        "daemon    {} on {}, listening after {} ms",
        daemon.program().display(),
        daemon.address(),
        daemon.started_in().as_millis()
    );
    let buildx = daemon.buildx();
    println!("client    {}", buildx.run(&["version"]).ok().stdout.trim());
    println!();
    println!(
        "{:<18} {:>12} {:>12} {:>8} {:>8}  its program says",
        "example", "image", "build stage", "first", "again"
    );
    for show in SHOWS {
        let context = Fixture::copy_of(&format!("examples/{}", show.example));
        if harness::lab::is_reference() {
            context.write(
                "Dockerfile",
                context.read("Dockerfile").replacen("# syntax=", "# no-syntax=", 1),
            );
        }
        let clock = Instant::now();
        let image = buildx.build(&context).image();
        let first = clock.elapsed();
        let clock = Instant::now();
        let (again, outcome) = buildx.build(&context).image_and_outcome();
        let second = clock.elapsed();
        assert_eq!(
            again.digest, image.digest,
            "the second build is the first, byte for byte"
        );
        assert!(
            outcome.progress().executed().is_empty(),
            "the second build is all cached"
        );
        let stage = buildx.build(&context).target(show.build_stage).image();
        let said = image.run(show.run);
        println!(
            "{:<18} {:>12} {:>12} {:>7.1}s {:>7.1}s  {}",
            show.example,
            mib(image.size()),
            mib(stage.size()),
            first.as_secs_f64(),
            second.as_secs_f64(),
            said.lines().next().unwrap_or_default()
        );
        assert!(
            image.size() <= stage.size(),
            "the image is no larger than its build stage"
        );
    }
    println!();
    let du = buildx.run(&["du"]).ok().stdout;
    println!(
        "cache     {}",
        du.lines()
            .rev()
            .find(|line| line.starts_with("Total:"))
            .unwrap_or_default()
    );
    drop(buildx);
    drop(daemon);
    println!("stopped   everything, after {:.1} s", started.elapsed().as_secs_f64());
}
