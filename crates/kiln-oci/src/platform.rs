//! Platforms: what an image is for and what a step runs on, in normal form and as text.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An operating system, an architecture and their refinements (OCI image index, `platform`).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// CPU architecture in Go's naming, for example `amd64`.
    pub architecture: String,
    /// Operating system in Go's naming, for example `linux`.
    pub os: String,
    /// Version of the operating system; Windows only in practice.
    #[serde(rename = "os.version", default, skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// Required features of the operating system.
    #[serde(rename = "os.features", default, skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
    /// CPU variant, for example `v7`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// A text that names no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid platform `{0}`")]
pub struct PlatformError(pub String);

impl Platform {
    /// A platform without refinements, normalised.
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        Self {
            os: os.into(),
            architecture: architecture.into(),
            variant: variant.into(),
            ..Self::default()
        }
        .normalized()
    }

    /// The platform this program runs on.
    pub fn host() -> Self {
        Self::new(std::env::consts::OS, std::env::consts::ARCH, "")
    }

    /// The normal form of known aliases: lower case; `x86_64` is `amd64` and its variant `v1` vanishes; `aarch64` is
    /// `arm64` whose default `v8` vanishes; `i386` is `386`; `armhf` and `armel` are `arm` `v7` and `v6`; `arm` without a
    /// variant is `v7`; `macos` is `darwin`; features are sorted and unique.
    pub fn normalized(&self) -> Self {
        let mut p = self.clone();
        p.os = p.os.to_lowercase();
        if p.os == "macos" {
            p.os = "darwin".into();
        }
        let (arch, variant) = normal_arch(&p.architecture.to_lowercase(), &p.variant.to_lowercase());
        p.architecture = arch;
        p.variant = variant;
        p.os_features.sort();
        p.os_features.dedup();
        p
    }

    /// The platform id used as key of results: `os[(version[+feature…])]/arch[/variant]` of the normal form.
    pub fn id(&self) -> String {
        let p = self.normalized();
        let mut out = p.os.clone();
        if !p.os_version.is_empty() || !p.os_features.is_empty() {
            out.push('(');
            out.push_str(&p.os_version);
            for feature in &p.os_features {
                out.push('+');
                out.push_str(feature);
            }
            out.push(')');
        }
        out.push('/');
        out.push_str(&p.architecture);
        if !p.variant.is_empty() {
            out.push('/');
            out.push_str(&p.variant);
        }
        out
    }

    /// Whether both name the same kind of machine after normalisation, refinements of the OS left aside.
    pub fn same_machine(&self, other: &Self) -> bool {
        let (a, b) = (self.normalized(), other.normalized());
        a.os == b.os && a.architecture == b.architecture && a.variant == b.variant
    }

    /// How well a machine of platform `wanted` runs programs for `self`: 0 is its own kind, greater numbers are lesser
    /// kinds it also runs (older variants, then `386` on `amd64` and 32-bit `arm` on `arm64`), `None` is not at all.
    /// Versions and features of the operating system are left aside.
    pub fn runs_on(&self, wanted: &Self) -> Option<u32> {
        let (image, machine) = (self.normalized(), wanted.normalized());
        if image.os != machine.os {
            return None;
        }
        kinds_run_by(&machine.architecture, &machine.variant)
            .iter()
            .position(|(arch, variant)| image.architecture == *arch && image.variant == *variant)
            .and_then(|at| u32::try_from(at).ok())
    }

    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self.os.is_empty() && self.architecture.is_empty()
    }
}

/// The kinds of programs a machine runs, its own first, in normal form.
fn kinds_run_by(arch: &str, variant: &str) -> Vec<(String, String)> {
    let number = variant.strip_prefix('v').and_then(|n| n.parse::<u32>().ok());
    let mut kinds = vec![(arch.to_owned(), variant.to_owned())];
    let mut add = |arch: &str, variant: String| kinds.push((arch.to_owned(), variant));
    match (arch, number) {
        ("amd64", n) => {
            for older in (2..n.unwrap_or(1)).rev() {
                add(arch, format!("v{older}"));
            }
            if !variant.is_empty() {
                add(arch, String::new());
            }
            add("386", String::new());
        }
        ("arm", Some(n)) => (5..n).rev().for_each(|older| add(arch, format!("v{older}"))),
        ("arm64", n) => {
            if n.is_some_and(|n| n > 8) {
                add(arch, String::new());
            }
            (5..=8).rev().for_each(|older| add("arm", format!("v{older}")));
        }
        _ => {}
    }
    kinds
}

fn normal_arch(arch: &str, variant: &str) -> (String, String) {
    let (a, v) = match arch {
        "i386" | "i686" | "386" | "x86" => ("386", ""),
        "x86_64" | "x86-64" | "amd64" => ("amd64", if variant == "v1" { "" } else { variant }),
        "aarch64" | "arm64" => (
            "arm64",
            match variant {
                "8" | "v8" | "v8.0" => "",
                "9" | "9.0" | "v9.0" => "v9",
                other => other,
            },
        ),
        "armhf" => ("arm", "v7"),
        "armel" => ("arm", "v6"),
        "arm" => (
            "arm",
            match variant {
                "" | "7" => "v7",
                "5" => "v5",
                "6" => "v6",
                "8" => "v8",
                other => other,
            },
        ),
        other => (other, variant),
    };
    (a.to_owned(), v.to_owned())
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id())
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    /// Parses `os[(version[+feature…])]/arch[/variant]`, or one word that is a known OS or architecture. The result is
    /// as written, not normalised, except that a single word is completed from the host.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || PlatformError(text.to_owned());
        if text.is_empty() || text.contains('*') {
            return Err(bad());
        }
        let mut parts = text.split('/');
        let first = parts.next().ok_or_else(bad)?;
        let (os, os_version, os_features) = split_os(first).ok_or_else(bad)?;
        let rest: Vec<&str> = parts.collect();
        let word = |s: &str| !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
        if !word(&os) || !rest.iter().all(|s| word(s)) {
            return Err(bad());
        }
        let mut p = Self {
            os,
            os_version,
            os_features,
            ..Self::default()
        };
        match rest.as_slice() {
            [] => {
                let lower = p.os.to_lowercase();
                if KNOWN_OS.contains(&lower.as_str()) {
                    p.os = if lower == "macos" { "darwin".into() } else { lower };
                    let host = Self::host();
                    p.architecture = host.architecture;
                    p.variant = host.variant;
                } else {
                    let (arch, variant) = normal_arch(&lower, "");
                    if !KNOWN_ARCH.contains(&arch.as_str()) {
                        return Err(bad());
                    }
                    p.os = Self::host().os;
                    p.architecture = arch;
                    p.variant = variant;
                }
            }
            [arch] => p.architecture = (*arch).to_owned(),
            [arch, variant] => {
                p.architecture = (*arch).to_owned();
                p.variant = (*variant).to_owned();
            }
            _ => return Err(bad()),
        }
        Ok(p)
    }
}

fn split_os(text: &str) -> Option<(String, String, Vec<String>)> {
    let Some((os, rest)) = text.split_once('(') else {
        return Some((text.to_owned(), String::new(), Vec::new()));
    };
    let inner = rest.strip_suffix(')')?;
    let mut parts = inner.split('+');
    let version = parts.next().unwrap_or_default().to_owned();
    Some((
        os.to_owned(),
        version,
        parts.filter(|s| !s.is_empty()).map(str::to_owned).collect(),
    ))
}

const KNOWN_OS: &[&str] = &[
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "illumos",
    "ios",
    "js",
    "linux",
    "macos",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "wasip1",
    "windows",
];

const KNOWN_ARCH: &[&str] = &[
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64", "ppc64le", "riscv64",
    "s390x", "wasm",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_have_one_normal_form() {
        for (text, id) in [
            ("linux/x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v2", "linux/amd64/v2"),
            ("Linux/aarch64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("macos/arm64", "darwin/arm64"),
            ("windows(10.0.1+b+a)/amd64", "windows(10.0.1+a+b)/amd64"),
            ("arm64", "linux/arm64"),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().id(), id, "{text}");
        }
        for bad in ["", "linux/", "a/b/c/d", "nonsense", "linux/a b", "*"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
