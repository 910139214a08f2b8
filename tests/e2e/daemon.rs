//! The daemon itself: addresses, TLS, configuration, registries with an authority of their own, `kiln` and `buildctl` as clients.

use harness::{Buildx, Daemon, Fixture, Image, Registry, lab};
use std::process::Command;

const HELLO: &str = "=== Dockerfile\nFROM busybox\nRUN echo hello > /hello\n";

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

#[test]
fn it_listens_on_tcp_as_well() {
    let address = format!("tcp://127.0.0.1:{}", free_port());
    let daemon = Daemon::with().arg("--addr").arg(&address).start();
    let context = Fixture::new(HELLO);
    for client in [lab::Client::Stable, lab::Client::Newest] {
        assert_eq!(
            Buildx::new(client, &address)
                .build(&context)
                .image()
                .file("hello")
                .text(),
            "hello\n"
        );
    }
    assert_eq!(daemon.buildx().build(&context).image().file("hello").text(), "hello\n");
}

#[test]
fn mutual_tls() {
    let dir = tempfile::tempdir().unwrap();
    harness::registry::certificates(dir.path(), "server", "IP:127.0.0.1,DNS:localhost");
    harness::registry::certificates(dir.path(), "client", "DNS:client");
    let file = |name: &str| dir.path().join(name).display().to_string();
    let address = format!("tcp://127.0.0.1:{}", free_port());
    let _daemon = Daemon::with()
        .arg("--addr")
        .arg(&address)
        .arg("--tlscacert")
        .arg(&file("ca.crt"))
        .arg("--tlscert")
        .arg(&file("server.crt"))
        .arg("--tlskey")
        .arg(&file("server.key"))
        .start();
    let context = Fixture::new(HELLO);
    let options = format!(
        "cacert={},cert={},key={},servername=localhost",
        file("ca.crt"),
        file("client.crt"),
        file("client.key")
    );
    for client in [lab::Client::Stable, lab::Client::Newest] {
        let buildx = Buildx::with_options(client, &address, &["--driver-opt", &options]);
        assert_eq!(buildx.build(&context).image().file("hello").text(), "hello\n");
    }
    // Without a certificate there is no way in.
    let stranger = Buildx::with_options(
        lab::Client::Newest,
        &address,
        &[
            "--driver-opt",
            &format!("cacert={},servername=localhost", file("ca.crt")),
        ],
    );
    stranger.build(&context).fails();
}

#[test]
fn a_registry_with_an_authority_of_its_own() {
    let registry = Registry::tls();
    let config = format!(
        "[registry.\"{}\"]\n  http = false\n  ca = [\"{}\"]\n",
        registry.host(),
        registry.authority().display()
    );
    let trusting = Daemon::with().config(&config).start();
    let reference = format!("{}/team/app:1", registry.host());
    let _pushed = trusting
        .buildx()
        .build(&Fixture::new(HELLO))
        .args(&["-t", &reference, "--push"])
        .ok();
    assert_eq!(Image::pull(&registry, "team/app", "1").file("hello").text(), "hello\n");
    let context = Fixture::new(&format!("=== Dockerfile\nFROM {reference}\n"));
    let _used = trusting.buildx().build(&context).ok();
    // Loopback addresses are spoken to in plain HTTP where nothing is configured, so each daemon is told not to.
    let suspicious = Daemon::with()
        .config(&format!("[registry.\"{}\"]\n  http = false\n", registry.host()))
        .start();
    suspicious.buildx().build(&context).fails().says(&["certificate"]);
    let careless = Daemon::with()
        .config(&format!(
            "[registry.\"{}\"]\n  http = false\n  insecure = true\n",
            registry.host()
        ))
        .start();
    let _used = careless.buildx().build(&context).ok();
}

#[test]
fn a_broken_configuration_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("buildkitd.toml");
    std::fs::write(&file, "debug = true\n[worker.oci\n").unwrap();
    let out = Command::new("timeout")
        .arg("20")
        .arg(lab::daemon())
        .args([
            "--config",
            &file.display().to_string(),
            "--root",
            &dir.path().join("s").display().to_string(),
        ])
        .args(["--addr", &format!("unix://{}", dir.path().join("k.sock").display())])
        .output()
        .unwrap();
    assert!(!out.status.success() && out.status.code() != Some(124));
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    // The reference gives the line, Kiln the file as well.
    assert!(lab::is_reference() || said.contains("buildkitd.toml"), "{said}");
}

#[test]
fn the_version_and_the_workers() {
    let out = Command::new(lab::daemon()).arg("--version").output().unwrap();
    assert!(out.status.success());
    let daemon = Daemon::start();
    let inspected = daemon.buildx().run(&["inspect"]).ok().stdout;
    assert!(inspected.contains("BuildKit version:"), "{inspected}");
    assert!(inspected.contains("Platforms:"), "{inspected}");
}

/// `buildctl` belongs to the reference and is in no Debian package; where it is at hand it must work.
#[test]
fn buildctl_where_it_is_at_hand() {
    let found = std::env::var_os("KILN_E2E_BUILDCTL").map(std::path::PathBuf::from);
    let Some(buildctl) = found else {
        println!("no buildctl: KILN_E2E_BUILDCTL names none");
        return;
    };
    let daemon = Daemon::start();
    let run = |args: &[&str]| {
        let out = Command::new("timeout")
            .arg("120")
            .arg(&buildctl)
            .args(["--addr", &daemon.address()])
            .args(args)
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "buildctl {args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    assert!(run(&["debug", "workers"]).contains("linux/"));
    let context = Fixture::new(HELLO);
    let dir = context.path().display().to_string();
    let out = tempfile::tempdir().unwrap();
    let output = format!("type=local,dest={}", out.path().display());
    let locals = [format!("context={dir}"), format!("dockerfile={dir}")];
    run(&[
        "build",
        "--frontend",
        "dockerfile.v0",
        "--local",
        &locals[0],
        "--local",
        &locals[1],
        "--output",
        &output,
    ]);
    assert_eq!(std::fs::read_to_string(out.path().join("hello")).unwrap(), "hello\n");
    assert!(run(&["du"]).contains("Total:"));
    run(&["prune", "--all"]);
}

/// `kiln build`, against a daemon and with one it starts for itself.
#[test]
fn the_command_line_of_kiln() {
    if lab::is_reference() {
        return;
    }
    let daemon = Daemon::start();
    let context = Fixture::new(
        "=== Dockerfile\nFROM busybox AS build\nARG WHO=nobody\nRUN echo hello $WHO > /hello\nFROM scratch\nCOPY --from=build /hello /\n",
    );
    let out = tempfile::tempdir().unwrap();
    let kiln = |args: &[&str]| {
        let result = Command::new("timeout")
            .arg("120")
            .arg(lab::program("kiln"))
            .args(args)
            .arg(context.path())
            .env("CI", "true")
            .output()
            .unwrap();
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&result.stdout),
            String::from_utf8_lossy(&result.stderr)
        );
        assert!(result.status.success(), "kiln {args:?}: {said}");
        said
    };
    let address = daemon.address();
    let archive = out.path().join("i.tar");
    let output = format!("type=oci,dest={}", archive.display());
    let said = kiln(&[
        "--addr",
        &address,
        "build",
        "--build-arg",
        "WHO=kiln",
        "--output",
        &output,
    ]);
    let image = Image::open(&archive);
    assert_eq!(image.file("hello").text(), "hello kiln\n");
    assert!(said.contains("sha256:"), "{said}");
    let local = format!("type=local,dest={}", out.path().join("tree").display());
    kiln(&["--addr", &address, "build", "--target", "build", "--output", &local]);
    assert!(out.path().join("tree/bin/busybox").exists());
}
