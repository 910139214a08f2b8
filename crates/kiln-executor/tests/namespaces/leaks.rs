//! Nothing stays: no mount, process, control group or descriptor, whatever ends first.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_executor::{Executor, Held, Output, ProcessIo};
use tokio::sync::mpsc;

use crate::lab::{Root, eventually, lab, output, run};

pub(crate) const CASES: &[crate::Case] = &[
    ("two_hundred_launches_leave_nothing", two_hundred_launches_leave_nothing),
    ("failed_set_ups_leave_nothing", failed_set_ups_leave_nothing),
    ("drop_kills_a_stubborn_tree", drop_kills_a_stubborn_tree),
    ("drop_while_starting_leaves_nothing", drop_while_starting_leaves_nothing),
    ("held_values_outlive_the_process", held_values_outlive_the_process),
    (
        "killed_daemon_takes_its_processes_along",
        killed_daemon_takes_its_processes_along,
    ),
];

fn groups() -> BTreeSet<String> {
    let own = format!("{}-", std::process::id());
    groups_of(&own)
}

fn groups_of(prefix: &str) -> BTreeSet<String> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let mut found = BTreeSet::new();
    for dir in mounts
        .lines()
        .filter(|l| l.contains(" cgroup"))
        .filter_map(|l| l.split(' ').nth(1))
    {
        for entry in std::fs::read_dir(format!("{dir}/kiln")).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                found.insert(entry.path().display().to_string());
            }
        }
    }
    found
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn mounts() -> String {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap()
}

/// Processes whose command line contains a mark.
fn processes(mark: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.bytes().all(|b| b.is_ascii_digit()) || name == std::process::id().to_string() {
            continue;
        }
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(mark) {
            found.push(name);
        }
    }
    found
}

fn two_hundred_launches_leave_nothing() {
    let root = Root::new();
    output(root.sh("true"));
    eventually("groups of the first run are gone", || groups().is_empty());
    let (before, mounted) = (descriptors(), mounts());
    let lab = lab();
    for round in 0..20 {
        lab.runtime.block_on(async {
            let runs = (0..10).map(|n| {
                let root = Root::new();
                async move {
                    let spec = root.sh("exit 3");
                    let report = lab
                        .executor
                        .run(spec, ProcessIo::default(), Held::nothing())
                        .await
                        .unwrap();
                    assert_eq!(report.exit_code, 3, "launch {round}.{n}");
                }
            });
            let mut set = tokio::task::JoinSet::new();
            runs.for_each(|r| drop(set.spawn(r)));
            while let Some(done) = set.join_next().await {
                done.unwrap();
            }
        });
    }
    eventually("control groups are gone", || groups().is_empty());
    eventually("descriptors are closed", || descriptors() <= before);
    assert_eq!(mounts(), mounted);
}

fn failed_set_ups_leave_nothing() {
    let (before, mounted) = (descriptors(), mounts());
    for _ in 0..20 {
        let root = Root::new();
        let mut spec = root.sh("true");
        spec.user = "nobody-there".into();
        run(spec).unwrap_err();
        run(root.spec(&["/not/there"])).unwrap_err();
    }
    eventually("control groups are gone", || groups().is_empty());
    eventually("descriptors are closed", || descriptors() <= before + 1);
    assert_eq!(mounts(), mounted);
}

fn drop_kills_a_stubborn_tree() {
    let mark = format!("4711.{}", std::process::id());
    let script = format!(
        "trap '' TERM INT HUP; (trap '' TERM HUP; setsid sh -c 'trap \"\" TERM; sleep {mark} & sleep {mark}' &) ; \
         sleep {mark} & echo ready; sleep {mark}"
    );
    let lab = lab();
    let root = Root::new();
    lab.runtime.block_on(async {
        let (out, mut stdout) = mpsc::channel(4);
        let io = ProcessIo {
            stdout: Output::Channel(out),
            ..ProcessIo::default()
        };
        let run = lab.executor.run(root.sh(&script), io, Held::nothing());
        tokio::select! {
            report = run => panic!("{report:?}"),
            () = async {
                stdout.recv().await.unwrap();
                while processes(&mark).len() < 4 {
                    tokio::task::yield_now().await;
                }
            } => {}
        }
    });
    eventually("all processes are dead", || processes(&mark).is_empty());
    eventually("control groups are gone", || groups().is_empty());
}

fn drop_while_starting_leaves_nothing() {
    let lab = lab();
    let mark = format!("4712.{}", std::process::id());
    for delay in 0..40 {
        let root = Root::new();
        let spec = root.sh(&format!("sleep {mark}"));
        lab.runtime.block_on(async {
            let run = lab.executor.run(spec, ProcessIo::default(), Held::new(root));
            let _ = tokio::time::timeout(Duration::from_micros(delay * 150), run).await;
        });
    }
    eventually("all processes are dead", || processes(&mark).is_empty());
    eventually("control groups are gone", || groups().is_empty());
}

fn held_values_outlive_the_process() {
    struct Flag(Arc<AtomicBool>, String);
    impl Drop for Flag {
        fn drop(&mut self) {
            assert!(processes(&self.1).is_empty(), "dropped while the process lived");
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let mark = format!("4713.{}", std::process::id());
    let dropped = Arc::new(AtomicBool::new(false));
    let lab = lab();
    let root = Root::new();
    let spec = root.sh(&format!("sleep {mark}"));
    lab.runtime.block_on(async {
        let held = Held::new(Flag(Arc::clone(&dropped), mark.clone()));
        let process = lab.executor.start(spec, ProcessIo::default(), held).await.unwrap();
        assert!(!dropped.load(Ordering::SeqCst));
        drop(process);
    });
    eventually("what is held is dropped", || dropped.load(Ordering::SeqCst));
}

/// Runs in a process of its own: a daemon that will be killed.
pub(crate) fn act(role: &str) {
    assert_eq!(role, "daemon");
    let mark = std::env::var("KILN_TEST_MARK").unwrap();
    let lab = lab();
    let root = Root::new();
    lab.runtime.block_on(async {
        let (out, mut stdout) = mpsc::channel(4);
        let io = ProcessIo {
            stdout: Output::Channel(out),
            ..ProcessIo::default()
        };
        let script = format!("(trap '' TERM; setsid sleep {mark} &); echo ready; sleep {mark}");
        let process = lab.executor.start(root.sh(&script), io, Held::nothing()).await.unwrap();
        stdout.recv().await.unwrap();
        println!("ready");
        process.wait().await.unwrap();
    });
}

fn killed_daemon_takes_its_processes_along() {
    let mark = format!("4714.{}", std::process::id());
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .env("KILN_TEST_ROLE", "daemon")
        .env("KILN_TEST_MARK", &mark)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(daemon.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "ready\n");
    assert!(processes(&mark).len() >= 2);
    let prefix = format!("{}-", daemon.id());
    assert!(!groups_of(&prefix).is_empty());
    let mounted = mounts();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    eventually("its processes are dead", || processes(&mark).is_empty());
    eventually("its control groups are gone", || groups_of(&prefix).is_empty());
    assert_eq!(mounts(), mounted);
}
