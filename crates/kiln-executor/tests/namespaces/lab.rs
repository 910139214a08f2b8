//! Roots made of a static busybox and the probe programs, and short ways to run something in them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use bytes::Bytes;
use kiln_executor::{
    ExecError, Executor, ExitReport, Held, NamespaceConfig, NamespaceExecutor, Overlay, OverlayWritable, ProcessIo,
    ProcessSpec, RootMount,
};
use tokio::sync::mpsc;

pub(crate) struct Lab {
    pub(crate) executor: NamespaceExecutor,
    pub(crate) runtime: tokio::runtime::Runtime,
}

/// The executor that all tests share.
pub(crate) fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        Lab {
            executor: NamespaceExecutor::new(NamespaceConfig::default()).unwrap(),
            runtime,
        }
    })
}

/// A directory with busybox, the probes, and an `/etc`; made once.
pub(crate) fn image() -> &'static Path {
    static IMAGE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    &IMAGE
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
            let root = dir.path().join("image");
            for sub in ["bin", "etc", "tmp", "home/node"] {
                fs::create_dir_all(root.join(sub)).unwrap();
            }
            fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
            fs::copy("/bin/busybox", root.join("bin/busybox")).expect("a static busybox in /bin");
            let names = Command::new("/bin/busybox").arg("--list").output().unwrap();
            for name in String::from_utf8(names.stdout)
                .unwrap()
                .lines()
                .filter(|n| *n != "busybox")
            {
                symlink("busybox", root.join("bin").join(name)).unwrap();
            }
            compile(&["-static", "-O1", "-w"], "probe.c", &root.join("bin/probe"));
            let bare = [
                "-m32",
                "-static",
                "-nostdlib",
                "-fno-stack-protector",
                "-fno-pic",
                "-no-pie",
            ];
            if cfg!(target_arch = "x86_64") {
                compile(&bare, "probe32.c", &root.join("bin/probe32"));
            }
            fs::write(
                root.join("etc/passwd"),
                "root:x:0:0:root:/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/sh\n",
            )
            .unwrap();
            fs::write(
                root.join("etc/group"),
                "root:x:0:\nbin:x:1:root\nnode:x:1000:\nvideo:x:44:node\n",
            )
            .unwrap();
            (dir, root)
        })
        .1
}

fn compile(flags: &[&str], source: &str, target: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/programs")
        .join(source);
    let status = Command::new("cc")
        .args(flags)
        .arg("-o")
        .arg(target)
        .arg(&source)
        .status()
        .expect("a C compiler");
    assert!(status.success(), "{}", source.display());
}

/// A writable overlay over the image.
pub(crate) struct Root {
    pub(crate) dir: tempfile::TempDir,
}

impl Root {
    pub(crate) fn new() -> Root {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for sub in ["upper", "work", "lower"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        Root { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the process wrote.
    pub(crate) fn upper(&self) -> PathBuf {
        self.path("upper")
    }

    pub(crate) fn mount(&self) -> RootMount {
        RootMount::Overlay(Overlay {
            lowers: vec![self.path("lower"), image().to_owned()],
            writable: Some(OverlayWritable {
                upper: self.upper(),
                work: self.path("work"),
            }),
        })
    }

    pub(crate) fn spec(&self, args: &[&str]) -> ProcessSpec {
        ProcessSpec::new(self.mount(), args.iter().map(|a| (*a).to_owned()).collect())
    }

    pub(crate) fn sh(&self, script: &str) -> ProcessSpec {
        self.spec(&["/bin/sh", "-c", script])
    }
}

#[derive(Debug)]
#[allow(dead_code, reason = "printed when a test fails")]
pub(crate) struct Outcome {
    pub(crate) report: ExitReport,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs and collects.
pub(crate) fn run(spec: ProcessSpec) -> Result<Outcome, ExecError> {
    let lab = lab();
    lab.runtime.block_on(async {
        let (out, stdout) = mpsc::channel(8);
        let (err, stderr) = mpsc::channel(8);
        let collected = (tokio::spawn(collect(stdout)), tokio::spawn(collect(stderr)));
        let report = lab
            .executor
            .run(spec, ProcessIo::channels(out, err), Held::nothing())
            .await;
        let (stdout, stderr) = (collected.0.await.unwrap(), collected.1.await.unwrap());
        Ok(Outcome {
            report: report?,
            stdout,
            stderr,
        })
    })
}

pub(crate) async fn collect(mut channel: mpsc::Receiver<Bytes>) -> String {
    let mut all = Vec::new();
    while let Some(bytes) = channel.recv().await {
        all.extend_from_slice(&bytes);
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// Runs something that must succeed and returns its output.
pub(crate) fn output(spec: ProcessSpec) -> String {
    let outcome = run(spec).unwrap();
    assert_eq!(outcome.report.exit_code, 0, "{outcome:?}");
    outcome.stdout
}

/// Waits for a condition that another process brings about.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !condition() {
        assert!(begun.elapsed().as_secs() < 20, "{what}");
        std::thread::yield_now();
    }
}
