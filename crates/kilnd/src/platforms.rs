//! Which platforms steps can run on: the machine's own, and those the kernel emulates through `binfmt_misc`.

use std::path::Path;

use kiln_oci::Platform;

/// Where the kernel lists its interpreters (`Documentation/admin-guide/binfmt-misc.rst`).
const BINFMT: &str = "/proc/sys/fs/binfmt_misc";

/// Interpreters by the architecture they run, as QEMU's packages register them.
const EMULATORS: &[(&str, &str, &str)] = &[
    ("qemu-aarch64", "arm64", ""),
    ("qemu-arm", "arm", "v7"),
    ("qemu-i386", "386", ""),
    ("qemu-x86_64", "amd64", ""),
    ("qemu-riscv64", "riscv64", ""),
    ("qemu-ppc64le", "ppc64le", ""),
    ("qemu-s390x", "s390x", ""),
    ("qemu-mips64el", "mips64le", ""),
    ("qemu-mips64", "mips64", ""),
    ("qemu-loongarch64", "loong64", ""),
];

/// The native platform first, then what its processors run as well, then emulated ones.
pub fn available() -> Vec<Platform> {
    let native = Platform::host();
    let mut out = vec![native.clone()];
    if native.architecture == "amd64" {
        out.extend(amd64_levels().iter().map(|v| Platform::new("linux", "amd64", v)));
        out.push(Platform::new("linux", "386", ""));
    }
    for (name, arch, variant) in EMULATORS {
        let platform = Platform::new("linux", arch, variant);
        if !out.contains(&platform) && enabled(&Path::new(BINFMT).join(name)) {
            out.push(platform);
            if *arch == "arm" {
                out.push(Platform::new("linux", "arm", "v6"));
            }
        }
    }
    out
}

fn enabled(entry: &Path) -> bool {
    std::fs::read_to_string(entry).is_ok_and(|text| text.lines().next() == Some("enabled"))
}

/// Levels of the x86-64 psABI beyond the first that this processor has.
#[cfg(target_arch = "x86_64")]
fn amd64_levels() -> Vec<&'static str> {
    let has_v2 = std::is_x86_feature_detected!("sse4.2") && std::is_x86_feature_detected!("popcnt");
    let has_v3 = has_v2
        && std::is_x86_feature_detected!("avx2")
        && std::is_x86_feature_detected!("bmi2")
        && std::is_x86_feature_detected!("fma");
    let has_v4 = has_v3
        && std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl");
    [("v2", has_v2), ("v3", has_v3), ("v4", has_v4)]
        .into_iter()
        .filter(|(_, has)| *has)
        .map(|(v, _)| v)
        .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn amd64_levels() -> Vec<&'static str> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_native_platform_comes_first_and_nothing_twice() {
        let all = available();
        assert_eq!(all[0], Platform::host());
        let mut ids: Vec<_> = all.iter().map(Platform::id).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), all.len());
    }
}
