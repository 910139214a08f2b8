//! Names of steps, and their places in the text.

use kiln_llb::state::Location;
use kiln_llb::{EnvList, SourcePosition, SourceRange};
use kiln_oci::Platform;

use super::{Bridge, Conversion};
use crate::dockerfile::expand::{Expander, Variables};
use crate::dockerfile::span::Span;

impl<B: Bridge> Conversion<'_, B> {
    /// The name of the next step of a stage: `[platform stage i/n] text`. A stage without steps has no prefixes. With
    /// `cross_target` the platform is followed by the one that the stage's arguments say it builds for.
    pub(super) fn step_name(
        &mut self,
        index: usize,
        text: &str,
        platform: Option<&Platform>,
        cross_target: bool,
    ) -> String {
        let multi_platform = self.client.options.multi_platform;
        let stage = &mut self.table.stages[index];
        if stage.steps == 0 {
            return text.to_owned();
        }
        let mut out = "[".to_owned();
        if let (true, Some(platform)) = (multi_platform, platform) {
            out.push_str(&super::args::long(platform));
            if let Some(target) = target_in(&stage.state.around().env).filter(|_| cross_target) {
                out.push_str(&cross(platform, &target));
            }
            out.push(' ');
        }
        if !stage.label.is_empty() {
            out.push_str(&stage.label);
            out.push(' ');
        }
        stage.step += 1;
        let width = stage.steps.to_string().len();
        out.push_str(&format!("{:>width$}/{}] ", stage.step, stage.steps));
        if stage.in_trigger {
            out.push_str("ONBUILD ");
        }
        out.push_str(text);
        out
    }

    /// A place in the Dockerfile.
    pub(super) fn location(&self, span: Span) -> Location {
        let position = |line: u32| SourcePosition {
            line: i32::try_from(line).unwrap_or(i32::MAX),
            character: 0,
        };
        let ranges = span
            .iter()
            .map(|line| SourceRange {
                start: position(line),
                end: position(line),
            })
            .collect();
        Location {
            file: self.request.file.clone(),
            ranges,
        }
    }
}

/// The first word of an instruction in upper case, and the rest expanded as far as it can be understood.
pub(super) fn instruction_text(expander: &Expander, text: &str, env: &dyn Variables) -> String {
    let text = expander.text(text, env).unwrap_or_else(|_| text.to_owned());
    match text.split_once(' ') {
        Some((keyword, rest)) => format!("{} {rest}", keyword.to_uppercase()),
        None => text.to_uppercase(),
    }
}

/// The platform that the arguments of a stage say it builds for.
fn target_in(env: &EnvList) -> Option<Platform> {
    if let Some(platform) = env.get("TARGETPLATFORM").and_then(|text| text.parse().ok()) {
        return Some(platform);
    }
    let part = |name| env.get(name).map(str::to_owned);
    let (os, architecture, variant) = (part("TARGETOS"), part("TARGETARCH"), part("TARGETVARIANT"));
    if os.is_none() && architecture.is_none() && variant.is_none() {
        return None;
    }
    Some(Platform {
        os: os.unwrap_or_default(),
        architecture: architecture.unwrap_or_default(),
        variant: variant.unwrap_or_default(),
        ..Platform::default()
    })
}

/// What is added for a target other than the platform of the step.
fn cross(platform: &Platform, target: &Platform) -> String {
    let mut target = target.clone();
    if target.os.is_empty() {
        target.os.clone_from(&platform.os);
    }
    if target.architecture.is_empty() {
        target.architecture.clone_from(&platform.architecture);
    }
    let target = target.normalized();
    if target.os != platform.os {
        return format!("->{}", target.id());
    }
    if target.architecture == platform.architecture {
        return String::new();
    }
    match target.variant.as_str() {
        "" => format!("->{}", target.architecture),
        variant => format!("->{}/{variant}", target.architecture),
    }
}
