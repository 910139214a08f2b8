//! What a confined process can see and do, as the probe program tells.

use std::collections::BTreeMap;

use kiln_executor::{
    CgroupPolicy, Executor, Held, NamespaceConfig, NamespaceExecutor, Output, ProcessIo, SecurityMode,
};
use tokio::sync::mpsc;

use crate::lab::{Root, collect, lab, output};

pub(crate) const CASES: &[crate::Case] = &[
    ("probe_of_a_confined_process", probe_of_a_confined_process),
    ("non_root_has_no_capabilities", non_root_has_no_capabilities),
    ("programs_of_32_bits_live", programs_of_32_bits_live),
    ("insecure_has_everything", insecure_has_everything),
    ("devices_are_confined_without_v1", devices_are_confined_without_v1),
    (
        "devices_are_confined_without_control_groups",
        devices_are_confined_without_control_groups,
    ),
    ("set_user_id_programs_work", set_user_id_programs_work),
];

const EPERM: &str = "1";
const ENOSYS: &str = "38";

fn parse(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .filter_map(|l| l.split_once(['=', '\t']))
        .map(|(k, v)| (k.trim_end_matches(':'), v.trim()))
        .collect()
}

fn probe_of_a_confined_process() {
    let root = Root::new();
    let mut spec = root.spec(&["probe"]);
    spec.hosts = Some("127.0.0.1 localhost\n".into());
    spec.resolv_conf = Some("nameserver 9.9.9.9\n".into());
    let text = output(spec);
    let seen = parse(&text);
    let is = |key: &str, value: &str| assert_eq!(seen.get(key).copied(), Some(value), "{key} in\n{text}");
    is("status.CapEff", "00000000a80425fb");
    is("status.CapPrm", "00000000a80425fb");
    is("status.CapBnd", "00000000a80425fb");
    is("status.CapInh", "0000000000000000");
    is("status.CapAmb", "0000000000000000");
    is("status.NoNewPrivs", "0");
    is("status.Seccomp", "2");
    is("pid", "1");
    is("sid", "1");
    for forbidden in [
        "mount",
        "umount2",
        "unshare_user",
        "unshare_net",
        "setns",
        "clone_user",
        "bpf",
        "keyctl",
        "add_key",
        "kexec_load",
        "init_module",
        "perf_event_open",
        "io_uring_setup",
        "userfaultfd",
        "pivot_root",
        "reboot",
        "swapon",
        "settimeofday",
        "sethostname",
        "open_by_handle_at",
        "fsopen",
        "iopl",
        "acct",
        "quotactl",
        "syslog",
        "socket_vsock",
        "socket_alg",
        "personality_odd",
        "open_block",
        "open_kmsg",
    ] {
        is(&format!("call.{forbidden}"), EPERM);
    }
    is("call.clone3", ENOSYS);
    is("call.unknown_9999", ENOSYS);
    for allowed in [
        "socket_inet",
        "socket_raw",
        "personality_ask",
        "chroot",
        "mknod_block",
        "mknod_null",
        "open_null",
    ] {
        is(&format!("call.{allowed}"), "0");
    }
    // Masked: empty to read. Read-only: EROFS (30).
    is("path./proc/keys", "chr read 0 write 0");
    is("path./proc/timer_list", "chr read 0 write 0");
    assert!(!text.contains("open."), "a descriptor leaked:\n{text}");
    is("path./proc/sys/kernel/hostname", "file read 1 write 30");
    is("path./sys", "dir read 1 write 30");
    is("path./sys/firmware", "dir read 0 write 30");
    is("path./etc/hosts", "file read 1 write 30");
    is("path./etc/resolv.conf", "file read 1 write 30");
    is("path./run", "missing");
    is("path./dev/kmsg", "missing");
    is("path./dev/mem", "missing");
    is("path./dev/null", "chr read 0 write 0");
    is("path./dev/shm", "dir read 0 write 0");
    for space in ["mnt", "pid", "uts", "ipc", "cgroup"] {
        let host = std::fs::read_link(format!("/proc/self/ns/{space}")).unwrap();
        assert_ne!(
            seen.get(format!("ns.{space}").as_str()).copied(),
            host.to_str(),
            "{space}"
        );
    }
}

fn non_root_has_no_capabilities() {
    let root = Root::new();
    let mut spec = root.spec(&["probe"]);
    spec.user = "node".into();
    let text = output(spec);
    let seen = parse(&text);
    assert_eq!(seen["status.CapEff"], "0000000000000000");
    assert_eq!(seen["status.CapPrm"], "0000000000000000");
    assert_eq!(seen["status.CapBnd"], "00000000a80425fb");
    assert_eq!(seen["status.Groups"], "44 1000");
}

fn programs_of_32_bits_live() {
    if cfg!(target_arch = "x86_64") {
        let root = Root::new();
        assert_eq!(output(root.spec(&["/bin/probe32"])), "hello from 32 bits 1\n");
    }
}

fn insecure_has_everything() {
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = parse(&own)["CapPrm"].to_owned();
    let root = Root::new();
    let script = "sed 's/^/status./' /proc/self/status; mkdir /m && mount -t tmpfs none /m && echo mounted; \
                  test -w /sys/kernel && echo sys; test -w /proc/sys/kernel/hostname && echo proc";
    let mut spec = root.sh(script);
    spec.security = SecurityMode::Insecure;
    let text = output(spec);
    let seen = parse(&text);
    for set in ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"] {
        assert_eq!(seen[format!("status.{set}").as_str()], own, "{set}");
    }
    assert_eq!(seen["status.Seccomp"], "0");
    assert!(text.contains("mounted\nsys\nproc\n"), "{text}");
}

fn probe_with(policy: CgroupPolicy) -> String {
    let executor = NamespaceExecutor::new(NamespaceConfig { cgroups: policy }).unwrap();
    let root = Root::new();
    lab().runtime.block_on(async {
        let (out, stdout) = mpsc::channel(4);
        let io = ProcessIo {
            stdout: Output::Channel(out),
            ..ProcessIo::default()
        };
        let process = executor
            .start(root.spec(&["probe"]), io, Held::nothing())
            .await
            .unwrap();
        let text = collect(stdout).await;
        assert_eq!(process.wait().await.unwrap().exit_code, 0);
        text
    })
}

fn devices_are_confined_without_v1() {
    let text = probe_with(CgroupPolicy::UnifiedOnly);
    let seen = parse(&text);
    for (call, result) in [
        ("mknod_block", "0"),
        ("open_block", EPERM),
        ("open_null", "0"),
        ("open_kmsg", EPERM),
    ] {
        assert_eq!(seen[format!("call.{call}").as_str()], result, "{call} in\n{text}");
    }
}

fn devices_are_confined_without_control_groups() {
    let text = probe_with(CgroupPolicy::Off);
    let seen = parse(&text);
    // Without a device controller the mounts refuse devices: EACCES.
    for (call, result) in [
        ("mknod_block", "0"),
        ("open_block", "13"),
        ("open_null", "13"),
        ("open_kmsg", "13"),
    ] {
        assert_eq!(seen[format!("call.{call}").as_str()], result, "{call} in\n{text}");
    }
    assert_eq!(seen["path./dev/null"], "chr read 0 write 0");
}

fn set_user_id_programs_work() {
    let root = Root::new();
    output(root.sh("cp /bin/probe /bin/raised && chmod 4755 /bin/raised"));
    let mut spec = root.spec(&["raised"]);
    spec.user = "node".into();
    let text = output(spec);
    let seen = parse(&text);
    assert_eq!(
        seen["status.Uid"].split_whitespace().collect::<Vec<_>>(),
        ["1000", "0", "0", "0"],
        "{text}"
    );
    assert_eq!(seen["status.CapEff"], "00000000a80425fb");
}

/// Prints what the probe sees in a root given by `KILN_TEST_ROOT`, to be laid beside what another builder's steps see.
pub(crate) fn print_for_comparison() {
    let lower = std::path::PathBuf::from(std::env::var_os("KILN_TEST_ROOT").unwrap());
    let run = |args: &[&str], user: &str| {
        let root = Root::new();
        let mut spec = root.spec(args);
        if let kiln_executor::RootMount::Overlay(o) = &mut spec.root {
            o.lowers = vec![lower.clone()];
        }
        spec.user = user.into();
        spec.hosts = Some("127.0.0.1 localhost\n".into());
        spec.resolv_conf = Some(std::fs::read_to_string("/etc/resolv.conf").unwrap());
        println!("{}", crate::lab::run(spec).unwrap().stdout);
    };
    run(&["/bin/probe", "one"], "");
    run(&["/bin/sh", "-c", "/bin/id; exec /bin/probe"], "node");
    run(
        &["/bin/sh", "-c", "mount; ls -la / /dev; stat -c %a /dev/shm; exit 3"],
        "root",
    );
}
