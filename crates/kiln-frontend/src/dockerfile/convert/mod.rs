//! Stages to LLB: one conversion per platform.
//!
//! A conversion reads the file, lays out the table of stages ([`table`]), finds what each needs from outside, all of it at once
//! ([`resolve`]), and then walks the needed stages in file order ([`dispatch`] and one file per group of instructions). The walk
//! is pure: everything that has to be asked was asked before.

mod add_copy;
mod args;
mod chmod;
mod config;
mod dispatch;
mod epoch;
mod expose;
mod files;
mod mounts;
mod names;
mod outline;
mod resolve;
mod run;
mod table;
mod workdir;

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_llb::state::Late;
use kiln_llb::{EnvList, SourceInfo, State};
use kiln_match::PatternMatcher;
use kiln_oci::{Platform, Timestamp};

use self::args::Budget;
use self::table::Table;
use super::lint::Linter;
use super::stage::Dockerfile;
use crate::bridge::Bridge;
use crate::context::BuildClient;
use crate::error::DockerfileError;
use crate::image::Image;

pub(crate) use self::outline::{Outline, Requirement};

/// What to convert.
pub(crate) struct Request<'a> {
    /// The Dockerfile.
    pub file: Arc<SourceInfo>,
    /// The platform asked for; `None` means the native one, or what the base image is for.
    pub platform: Option<Platform>,
    /// Walk all stages, not only what the target needs.
    pub all_stages: bool,
    /// Where findings go.
    pub linter: &'a Linter,
    /// Whether the labs channel of the language was asked for.
    pub labs: bool,
}

/// A converted build.
pub(crate) struct Converted {
    /// The result's file system.
    pub state: State,
    /// Platform of steps on file systems that have none.
    pub platform: Platform,
    /// Its image config.
    pub image: Image,
    /// The config of the image it started from.
    pub base_image: Option<Arc<Image>>,
    /// The moment everything is dated to.
    pub epoch: Option<Timestamp>,
    /// Arguments, secrets and agents of the target.
    pub outline: Outline,
}

/// A conversion under way.
pub(super) struct Conversion<'a, B: Bridge> {
    client: &'a BuildClient<'a, B>,
    request: &'a Request<'a>,
    linter: &'a Linter,
    escape: char,
    target_platform: Platform,
    /// No platform was asked for.
    implicit_target: bool,
    build_args: BTreeMap<String, String>,
    global_args: EnvList,
    epoch: Option<Timestamp>,
    table: Table,
    /// The main context, decided on at the end.
    context: Late,
    ignored: Option<PatternMatcher>,
    ignores_everything: bool,
    budget: Budget,
}

/// Converts a Dockerfile.
pub(crate) async fn convert<B: Bridge>(
    client: &BuildClient<'_, B>,
    request: &Request<'_>,
) -> Result<Converted, DockerfileError> {
    if request.file.data.is_empty() {
        return Err(DockerfileError::new("the Dockerfile cannot be empty"));
    }
    let file = Dockerfile::read(&request.file.data, request.linter)?;
    if file.stages.is_empty() {
        return Err(DockerfileError::new("dockerfile contains no stages to build"));
    }
    file.lint_names(request.linter);
    let target_platform = request
        .platform
        .clone()
        .unwrap_or_else(|| client.build_platform.clone());
    let mut conversion = Conversion {
        client,
        request,
        linter: request.linter,
        escape: file.escape,
        implicit_target: request.platform.is_none(),
        target_platform,
        build_args: client.options.build_args.clone(),
        global_args: EnvList::default(),
        epoch: None,
        table: Table::default(),
        context: Late::default(),
        ignored: None,
        ignores_everything: false,
        budget: Budget::default(),
    };
    let known = conversion.set_global_args(&file)?;
    conversion.resolve_epoch(&file).await?;
    conversion.build_table(file, &known)?;
    let target = conversion.target()?;
    conversion.connect_stages()?;
    let reachable = conversion.resolve_stages(target).await?;
    conversion.load_ignore_patterns().await?;
    conversion.dispatch_stages(&reachable)?;
    conversion.finish(target).await
}

impl<B: Bridge> Conversion<'_, B> {
    async fn load_ignore_patterns(&mut self) -> Result<(), DockerfileError> {
        let patterns = self.client.ignore_patterns().await?;
        if !patterns.is_empty() {
            self.ignores_everything = patterns.iter().any(|p| matches!(p.as_str(), "*" | "**" | "**/*"));
            let matcher = PatternMatcher::new(&patterns).map_err(|e| DockerfileError::new(e.to_string()))?;
            self.ignored = Some(matcher);
        }
        Ok(())
    }

    /// Everything that can only be said once all stages are done.
    async fn finish(mut self, target: usize) -> Result<Converted, DockerfileError> {
        self.table.use_path(target, "/");
        let mut image = std::mem::take(&mut self.table.stages[target].image);
        image.config.labels.extend(self.client.options.labels.clone());
        self.linter.failure()?;
        let needed = self.table.context_paths();
        let context = self.client.main_context(&needed).await?;
        self.context.set(&context);
        for (pending, stage) in &self.table.pending {
            pending.settle(&self.table.used_paths(*stage));
        }
        if !self.implicit_target {
            let wanted = &self.target_platform;
            let same_machine = wanted.os == image.os && wanted.architecture == image.architecture;
            image.os.clone_from(&wanted.os);
            image.architecture.clone_from(&wanted.architecture);
            if !wanted.variant.is_empty() || !same_machine {
                image.variant.clone_from(&wanted.variant);
            }
            if !wanted.os_version.is_empty() || !same_machine {
                image.os_version.clone_from(&wanted.os_version);
            }
            if !wanted.os_features.is_empty() {
                image.os_features.clone_from(&wanted.os_features);
            }
        }
        image.set_platform(image.platform().normalized());
        if image.os.is_empty() {
            image.os = Platform::host().os;
        }
        let outline = self.outline(target);
        let stage = &self.table.stages[target];
        Ok(Converted {
            state: stage.state.clone(),
            platform: self.target_platform.clone(),
            image,
            base_image: stage.base_image.clone(),
            epoch: self.epoch,
            outline,
        })
    }
}
