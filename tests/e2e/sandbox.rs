//! What a step may do and see, asked by a probe that runs as a step: capabilities, system call filter, masked paths, namespaces.

use harness::{Daemon, Fixture, Image};

const PROBE: &str = r#"
=== Dockerfile
FROM busybox
COPY probe.sh /probe.sh
RUN sh /probe.sh > /report 2>&1
=== probe.sh
grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|Seccomp|NoNewPrivs):' /proc/self/status | tr '\t' ' '
echo pid $$
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "$name allowed"; else echo "$name refused"; fi; }
try mount mount -t tmpfs none /mnt
try umount umount /proc
try mknod-null mknod /tmp/null c 1 3
try mknod-disk sh -c 'mknod /tmp/disk b 8 0 && head -c 1 /tmp/disk'
try sethostname hostname other
try settime adjtimex -f 1
try chroot chroot / true
try chown chown 1:1 /tmp
try unshare-mount unshare -m true
try unshare-user unshare -U true
try unshare-net unshare -n true
try pivot-root pivot_root / /
try swapoff swapoff -a
try insmod insmod /probe.sh
try dmesg dmesg
try write-sys sh -c 'echo 1 > /sys/kernel/uevent_seqnum'
try write-sysctl sh -c 'echo 1 > /proc/sys/kernel/panic'
try sysrq sh -c 'echo h > /proc/sysrq-trigger'
try nice-down nice -n -5 true
try setuid su -s /bin/sh nobody -c true
for path in /proc/kcore /proc/keys /proc/timer_list /proc/acpi /proc/scsi /sys/firmware /proc/interrupts; do
    if [ -d $path ]; then echo "$path directory of $(ls $path | wc -l)"
    elif [ -e $path ]; then echo "$path file of $(head -c 10 $path 2>/dev/null | wc -c)"
    else echo "$path absent"; fi
done
for path in /proc/sys /proc/bus /proc/fs /proc/irq /sys /sys/fs/cgroup; do
    awk -v p=$path '$5 == p { split($6, o, ","); print p, o[1] }' /proc/self/mountinfo | sort -u
done
ls /dev | grep -v '\.sock$' | sort | tr '\n' ' '; echo
cat /proc/self/uid_map | tr -s ' '
ls -l /proc/self/ns | awk '{ print $9 }' | sort | tr '\n' ' '; echo
ps | wc -l
cat /proc/1/oom_score_adj
umask
ulimit -c -n -u 2>/dev/null | head -n 1 > /dev/null
"#;

fn report(daemon: &Daemon) -> Image {
    daemon.buildx().build(&Fixture::new(PROBE)).image()
}

/// The report of the reference daemon on the same machine, where one is at hand; without one the listed facts alone decide.
#[test]
fn a_step_can_do_what_it_can_elsewhere_and_no_more() {
    let daemon = Daemon::start();
    let image = report(&daemon);
    let text = image.file("report").text().to_owned();
    let has = |line: &str| {
        assert!(
            text.lines().any(|seen| seen.trim() == line),
            "no line {line:?} in the report:\n{text}"
        )
    };
    // The fourteen capabilities of containers.
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        has(&format!("{set}: 00000000a80425fb"));
    }
    for set in ["CapInh", "CapAmb"] {
        has(&format!("{set}: 0000000000000000"));
    }
    has("Seccomp: 2");
    has("NoNewPrivs: 0");
    has("pid 1");
    for refused in [
        "mount",
        "umount",
        "mknod-disk",
        "sethostname",
        "settime",
        "unshare-mount",
        "unshare-net",
        "pivot-root",
        "swapoff",
        "insmod",
        "write-sys",
        "write-sysctl",
        "sysrq",
        "nice-down",
    ] {
        has(&format!("{refused} refused"));
    }
    for allowed in ["mknod-null", "chroot", "chown", "setuid"] {
        has(&format!("{allowed} allowed"));
    }
    for masked in ["/proc/kcore", "/proc/timer_list", "/proc/keys"] {
        let masked = format!("{masked} ");
        let seen = text.lines().find(|line| line.starts_with(&masked)).unwrap_or_default();
        assert!(
            seen.ends_with("file of 0") || seen.ends_with("absent"),
            "{seen:?} can be read"
        );
    }
    for readonly in ["/proc/sys ro", "/sys ro"] {
        has(readonly);
    }
}

#[test]
fn the_reference_reports_the_same() {
    // Only where somebody has named a reference daemon beside the one under test.
    let Some(peer) = std::env::var_os("PEER") else { return };
    let ours = report(&Daemon::start()).file("report").text().to_owned();
    let theirs = report(&Daemon::with().program(peer).start())
        .file("report")
        .text()
        .to_owned();
    assert_eq!(ours, theirs);
}
