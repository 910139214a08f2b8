//! Arguments before the first FROM, the platform arguments, and the bound on what expansion may produce.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kiln_llb::EnvList;
use kiln_oci::{ImageRef, Platform};

use super::outline::ArgInfo;
use super::{Bridge, Conversion};
use crate::dockerfile::expand::{Expander, Variables};
use crate::dockerfile::lint;
use crate::dockerfile::stage::{Dockerfile, GlobalArg, Stage};
use crate::error::{DockerfileError, Located};

impl Variables for EnvList {
    fn value(&self, name: &str) -> Option<&str> {
        self.get(name)
    }
}

/// Bytes a conversion may still produce. A short file can stand for an endless build: values that double on every line,
/// environments that every step repeats.
#[derive(Debug)]
pub(super) struct Budget {
    left: AtomicUsize,
    /// Options that may still be compared to find a suggestion.
    comparisons: AtomicUsize,
}

const MAX_PRODUCED: usize = 256 << 20;
const MAX_COMPARISONS: usize = 2_000_000;

impl Default for Budget {
    fn default() -> Self {
        Self {
            left: AtomicUsize::new(MAX_PRODUCED),
            comparisons: AtomicUsize::new(MAX_COMPARISONS),
        }
    }
}

/// Takes `amount` out of what is left; `false` if it is not there.
fn take(left: &AtomicUsize, amount: usize) -> bool {
    left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(amount))
        .is_ok()
}

impl Budget {
    /// Takes `bytes` out of what is left.
    pub(super) fn charge(&self, bytes: usize) -> Result<(), DockerfileError> {
        if take(&self.left, bytes) {
            return Ok(());
        }
        let limit = MAX_PRODUCED >> 20;
        Err(DockerfileError::new(format!(
            "the Dockerfile stands for a build whose description exceeds {limit} MiB"
        )))
    }

    /// Whether `count` more options may be compared.
    pub(super) fn may_compare(&self, count: usize) -> bool {
        take(&self.comparisons, count)
    }
}

/// The platform as `os/architecture[/variant]`, as written.
fn short(p: &Platform) -> String {
    let mut text = format!("{}/{}", p.os, p.architecture);
    if !p.variant.is_empty() {
        text.push('/');
        text.push_str(&p.variant);
    }
    text
}

/// The platform with version and features of its system, as written.
pub(super) fn long(p: &Platform) -> String {
    if p.os_version.is_empty() && p.os_features.is_empty() {
        return short(p);
    }
    let mut system = p.os_version.clone();
    for feature in &p.os_features {
        system.push('+');
        system.push_str(feature);
    }
    short(&Platform {
        os: format!("{}({system})", p.os),
        ..p.clone()
    })
}

impl<B: Bridge> Conversion<'_, B> {
    /// An expander for words of this file.
    pub(super) fn expander(&self) -> Expander {
        Expander::with_escape(self.escape)
    }

    /// Sets the environment of FROM lines and returns what is known of each argument.
    pub(super) fn set_global_args(&mut self, file: &Dockerfile) -> Result<BTreeMap<String, ArgInfo>, DockerfileError> {
        let target = match self.client.options.target.as_str() {
            "" => file.stages.last().map(|s| s.name.clone()).unwrap_or_default(),
            target => target.to_owned(),
        };
        let platform_args = self.platform_args(&target);
        // What the file says by itself has to make sense, too.
        if let Ok((defaults, _)) = self.evaluate(&platform_args, &file.global_args, &BTreeMap::new()) {
            self.lint_default_bases(&file.stages, &defaults);
        }
        let (values, known) = self.evaluate(&platform_args, &file.global_args, &self.build_args)?;
        self.global_args = values;
        Ok(known)
    }

    fn platform_args(&self, target: &str) -> EnvList {
        let (build, wanted) = (&self.client.build_platform, &self.target_platform);
        let target = if target.is_empty() { "default" } else { target };
        let pairs: [(&str, String); 11] = [
            ("BUILDPLATFORM", short(build)),
            ("BUILDOS", build.os.clone()),
            ("BUILDOSVERSION", build.os_version.clone()),
            ("BUILDARCH", build.architecture.clone()),
            ("BUILDVARIANT", build.variant.clone()),
            ("TARGETPLATFORM", long(wanted)),
            ("TARGETOS", wanted.os.clone()),
            ("TARGETOSVERSION", wanted.os_version.clone()),
            ("TARGETARCH", wanted.architecture.clone()),
            ("TARGETVARIANT", wanted.variant.clone()),
            ("TARGETSTAGE", target.to_owned()),
        ];
        let mut env = EnvList::default();
        for (name, value) in pairs {
            env.set(name, self.build_args.get(name).cloned().unwrap_or(value));
        }
        env
    }

    fn evaluate(
        &self,
        platform_args: &EnvList,
        args: &[GlobalArg],
        build_args: &BTreeMap<String, String>,
    ) -> Result<(EnvList, BTreeMap<String, ArgInfo>), DockerfileError> {
        let mut env = platform_args.clone();
        let mut known: BTreeMap<String, ArgInfo> = BTreeMap::new();
        for (arg, span) in args.iter().flat_map(|g| g.arguments.iter().map(move |a| (a, g.span))) {
            let mut info = ArgInfo::new(arg, span);
            let value = match (build_args.get(&arg.name), &arg.value) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => {
                    let expansion = self.expander().expand(default, &env).at_span(span)?;
                    self.budget.charge(expansion.text.len())?;
                    info.deps = expansion.matched;
                    if info.deps.remove(&arg.name)
                        && let Some(before) = known.get(&arg.name)
                    {
                        info.deps.extend(before.deps.iter().cloned());
                    }
                    Some(expansion.text)
                }
                (None, None) => None,
            };
            if let Some(value) = value {
                info.value.clone_from(&value);
                env.set(arg.name.clone(), value);
            }
            known.insert(arg.name.clone(), info);
        }
        Ok((env, known))
    }

    fn lint_default_bases(&self, stages: &[Stage], defaults: &EnvList) {
        for stage in stages {
            let Ok(base) = self.expander().text(&stage.base, defaults) else {
                return;
            };
            if ImageRef::parse(&base).is_err() {
                self.linter.report(&lint::INVALID_DEFAULT_ARG_IN_FROM, stage.span, || {
                    format!(
                        "Default value for ARG {} results in empty or invalid base image name",
                        stage.base
                    )
                });
            }
        }
    }

    /// The value of a build-arg, or of a non-empty global argument.
    pub(super) fn global_value(&self, name: &str) -> Option<String> {
        let given = self.build_args.get(name).cloned();
        given.or_else(|| self.global_args.get(name).filter(|v| !v.is_empty()).map(str::to_owned))
    }

    /// Replaces the value of an argument wherever it is set; an empty one unsets it.
    pub(super) fn replace_global(&mut self, name: &str, value: &str) {
        if self.build_args.contains_key(name) {
            if value.is_empty() {
                self.build_args.remove(name);
            } else {
                self.build_args.insert(name.to_owned(), value.to_owned());
            }
        }
        if self.global_args.get(name).is_some() {
            if value.is_empty() {
                self.global_args.remove(name);
            } else {
                self.global_args.set(name, value);
            }
        }
    }
}
