//! Speed on honest files, and an answer in bounded time and memory on hostile ones.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code, unreachable_pub)]
mod fake;

use std::time::{Duration, Instant};

use fake::Fake;
use kiln_frontend::DockerfileFrontend;
use kiln_frontend::bridge::Frontend as _;

fn build(text: String) -> (Result<(), String>, Duration) {
    let fake = Fake {
        files: [("Dockerfile".to_owned(), text.into())].into(),
        ..Fake::default()
    };
    let start = Instant::now();
    let result = futures::executor::block_on(DockerfileFrontend::default().run(&fake, &Default::default()));
    (result.map(|_| ()).map_err(|e| e.to_string()), start.elapsed())
}

/// 2,000 lines as people write them: 20 stages, each with variables, copies, steps with mounts, metadata.
fn honest() -> String {
    let mut text = String::new();
    for stage in 0..20 {
        text.push_str(&format!("FROM alpine:3 AS stage{stage}\n"));
        for i in 0..11 {
            text.push_str(&format!(
                "# part {i}\nARG VERSION{i}=1.{i}\nENV NAME{i}=value-{i} PATH=/opt/{i}:$PATH\nWORKDIR /src/part{i}\n\
                 COPY --chown=1000:1000 package{i}.json src/*.c ./\n\
                 RUN --mount=type=cache,target=/root/.cache/{i} \\\n    make -C /src VERSION=${{VERSION{i}}} \\\n    && rm -rf /tmp/x\n\
                 LABEL part{i}=\"$NAME{i}\"\n"
            ));
        }
    }
    for stage in 0..19 {
        text.push_str(&format!("COPY --from=stage{stage} /out /out{stage}\n"));
    }
    text
}

#[test]
fn two_thousand_lines_take_less_than_ten_milliseconds() {
    let text = honest();
    assert!((2000..2100).contains(&text.lines().count()), "{}", text.lines().count());
    let best = (0..5)
        .map(|_| {
            let (result, time) = build(text.clone());
            result.unwrap();
            time
        })
        .min()
        .unwrap();
    println!("{} lines in {best:?}", text.lines().count());
    // Unoptimised code is some twenty times slower; there the bound only catches what is out of all proportion.
    let limit = if cfg!(debug_assertions) {
        Duration::from_secs(2)
    } else {
        Duration::from_millis(10)
    };
    assert!(best < limit, "{best:?}");
}

#[test]
fn hostile_files_end_in_an_answer() {
    let repeat = |line: &str, megabytes: usize| line.repeat((megabytes << 20) / line.len());
    let numbered = |f: &dyn Fn(usize) -> String, n: usize| (0..n).map(f).collect::<String>();
    let doubling = format!("FROM scratch\nENV A=xxxxxxxx\n{}", "ENV A=$A$A\n".repeat(100));
    let cases: Vec<(&str, String)> = vec![
        (
            "ten megabytes of RUN",
            format!("FROM scratch\n{}", repeat("RUN x\n", 10)),
        ),
        (
            "one instruction of ten megabytes",
            format!("FROM scratch\nRUN {}", repeat("abc \\\n", 10)),
        ),
        ("values that double", doubling),
        (
            "distinct variables",
            format!("FROM scratch\n{}", numbered(&|i| format!("ENV A{i}={i}\n"), 200_000)),
        ),
        (
            "steps that repeat them",
            format!(
                "FROM scratch\n{}",
                numbered(&|i| format!("ENV A{i}=x\nRUN y\n"), 10_000)
            ),
        ),
        ("stages on stages", {
            let mut text = "FROM scratch AS s0\n".to_owned();
            text += &numbered(&|i| format!("FROM s{i} AS s{}\nENV A{i}=1\n", i + 1), 5_000);
            text
        }),
        ("stages that copy", {
            let mut text = "FROM scratch AS s0\n".to_owned();
            text += &numbered(
                &|i| format!("FROM scratch AS s{}\nCOPY --from=s{i} a b\n", i + 1),
                5_000,
            );
            text
        }),
        (
            "unset variables",
            format!("FROM scratch\n{}", numbered(&|i| format!("ENV A{i}=$B{i}\n"), 5_000)),
        ),
        (
            "nested substitutions",
            format!("FROM scratch\nENV A={}\n", "${A:-".repeat(12_000)),
        ),
        ("ports", format!("FROM scratch\n{}", "EXPOSE 0-65535\n".repeat(300))),
        (
            "nested triggers",
            format!("FROM scratch\n{}RUN x\n", "ONBUILD ".repeat(8_000)),
        ),
        ("comments", format!("{}FROM scratch\n", repeat("# check=skip=all\n", 4))),
        (
            "here-documents",
            format!("FROM scratch\n{}", "COPY <<A <<B <<C /x\nA\nB\nC\n".repeat(5_000)),
        ),
        (
            "quotes",
            format!("FROM scratch\n{}", repeat("RUN echo '\"' \"$x ' ${y} <<\n", 1)),
        ),
    ];
    for (name, text) in cases {
        let (result, time) = build(text);
        println!(
            "{name}: {time:?} {}",
            result.err().unwrap_or_default().chars().take(80).collect::<String>()
        );
        assert!(time < Duration::from_secs(120), "{name}: {time:?}");
    }
}

/// Pieces from which files are put together at random; nothing may panic.
#[test]
fn random_files_never_panic() {
    const PIECES: &[&str] = &[
        "FROM ",
        "alpine",
        " AS ",
        "x",
        "\n",
        "\n\n",
        "RUN ",
        "COPY ",
        "ADD ",
        "ENV ",
        "ARG ",
        "--from=",
        "--mount=type=",
        "cache",
        ",target=",
        "/",
        ".",
        "..",
        "$",
        "{",
        "}",
        ":-",
        "#",
        "%",
        "//",
        "'",
        "\"",
        "\\",
        "`",
        "<<",
        "EOF",
        "-",
        "[",
        "]",
        ",",
        "é",
        "\u{feff}",
        "\r",
        "\t",
        " ",
        "=",
        "# escape=`",
        "# syntax=docker/dockerfile:1",
        "ONBUILD ",
        "HEALTHCHECK ",
        "--interval=",
        "EXPOSE ",
        "1-2",
        "@",
        "*",
        "?",
        "\u{0}",
        "\u{2028}",
        "https://h/x.git",
        "git@h:x",
        "STOPSIGNAL ",
        "USER ",
        "WORKDIR ",
        "SHELL ",
        "VOLUME ",
        "CMD ",
        "ENTRYPOINT ",
        "LABEL ",
        "0",
        "99999999999",
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % n as u64).unwrap()
    };
    for _ in 0..1000 {
        let mut text = if next(4) > 0 {
            "FROM scratch\n".to_owned()
        } else {
            String::new()
        };
        for _ in 0..next(60) {
            text.push_str(PIECES[next(PIECES.len())]);
        }
        let _ = build(text);
    }
}
