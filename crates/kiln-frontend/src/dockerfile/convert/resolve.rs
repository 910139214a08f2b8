//! What stages start from: images and contexts are looked up, all at once, and triggers of base images are taken over.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::future::try_join_all;
use kiln_llb::State;
use kiln_llb::state::Constraints;
use kiln_oci::{ImageRef, Platform};

use super::table::{Command, SCRATCH};
use super::{Bridge, Conversion};
use crate::bridge::ResolveImageOptions;
use crate::context::source;
use crate::context::{Loaded, NamedContext};
use crate::dockerfile::instruction::{Kind, Parsed};
use crate::dockerfile::lint;
use crate::dockerfile::parser;
use crate::dockerfile::read;
use crate::dockerfile::suggest::nearest;
use crate::error::{DockerfileError, Located};
use crate::image::Image;

/// Images whose names are suggested for misspelt ones.
const COMMON_IMAGES: &[&str] = &["alpine", "busybox", "centos", "debian", "golang", "ubuntu", "fedora"];

/// What a stage turned out to start from.
enum Start {
    /// A valid reference that nobody needs.
    Unused(ImageRef),
    /// A named context in place of the whole stage.
    Stage(Box<Loaded>),
    /// A named context in place of the base.
    Base(Box<Loaded>, Platform),
    /// An image.
    Image {
        reference: String,
        image: Box<Image>,
        platform: Platform,
    },
}

impl<B: Bridge> Conversion<'_, B> {
    /// Resolves what `target` needs, in rounds, because triggers of a base image may need further stages. Returns the stages
    /// needed.
    pub(super) async fn resolve_stages(&mut self, target: usize) -> Result<BTreeSet<usize>, DockerfileError> {
        loop {
            let reachable = self.table.reachable(target);
            self.resolve_bases(&reachable).await?;
            let mut new_sources = false;
            for &index in &reachable {
                self.inherit(index)?;
                new_sources |= self.take_triggers(index)?;
            }
            if !new_sources {
                return Ok(self.table.reachable(target));
            }
        }
    }

    async fn resolve_bases(&mut self, reachable: &BTreeSet<usize>) -> Result<(), DockerfileError> {
        let mut open = Vec::new();
        for (index, stage) in self.table.stages.iter_mut().enumerate() {
            if stage.base.is_some() || stage.dispatched || stage.resolved {
                continue;
            }
            let needed = reachable.contains(&index) || self.request.all_stages;
            stage.resolved = needed;
            if stage.base_name == SCRATCH && stage.named_context.is_none() {
                stage.state = State::scratch();
                stage.image = Image::empty(&self.target_platform);
                stage.platform = Some(self.target_platform.clone());
                stage.dispatched |= stage.implicit;
            } else {
                open.push((index, needed));
            }
        }
        let this = &*self;
        let starts = try_join_all(open.iter().map(|&(index, needed)| async move {
            this.start_of(index, needed)
                .await
                .at_span(this.table.stages[index].place())
        }))
        .await?;
        for ((index, needed), start) in open.into_iter().zip(starts) {
            self.begin(index, needed, start)?;
        }
        Ok(())
    }

    /// Finds out what a stage starts from.
    async fn start_of(&self, index: usize, needed: bool) -> Result<Start, DockerfileError> {
        let stage = &self.table.stages[index];
        let name = &stage.base_name;
        let reference = ImageRef::parse(name).map_err(|e| {
            DockerfileError::new(format!(
                "failed to parse stage name {}: {e}",
                crate::gotext::quote(name)
            ))
        })?;
        let mut platform = stage.platform.clone().unwrap_or_else(|| self.target_platform.clone());
        let full_name = reference.clone().or_latest().to_string();
        if !needed {
            return Ok(Start::Unused(reference.or_latest()));
        }
        if let Some(context) = &stage.named_context {
            return Ok(Start::Stage(Box::new(context.load(self.client).await?)));
        }
        let context: Option<NamedContext> = self.client.named_context(&full_name, Some(&platform))?;
        if let Some(context) = context {
            return Ok(Start::Base(Box::new(context.load(self.client).await?), platform));
        }
        let prefix = if self.client.options.multi_platform {
            format!("{} ", super::args::long(&platform))
        } else {
            String::new()
        };
        let options = ResolveImageOptions {
            log_name: format!("[{prefix}internal] load metadata for {full_name}"),
            platform: Some(platform.clone()),
            resolve_mode: self.client.options.resolve_mode.name().to_owned(),
            store: None,
        };
        let resolved = self.client.resolve_image(&full_name, options).await.map_err(|error| {
            let mut options: Vec<String> = self.table.labels().map(str::to_owned).collect();
            options.extend(
                COMMON_IMAGES
                    .iter()
                    .flat_map(|image| [(*image).to_owned(), format!("{image}:latest")]),
            );
            let hint = nearest(name, options.iter().map(String::as_str)).map(str::to_owned);
            DockerfileError::from(error).context(name).suggesting(hint)
        })?;
        let mut reference = reference;
        if resolved.reference != reference.to_string() {
            reference = ImageRef::parse(&resolved.reference).map_err(|e| {
                DockerfileError::new(format!(
                    "failed to parse ref {}: {e}",
                    crate::gotext::quote(&resolved.reference)
                ))
            })?;
        }
        let image = Image::parse(&resolved.config)
            .map_err(|e| DockerfileError::new(format!("failed to parse image config: {e}")))?;
        if stage.platform.is_none() && self.implicit_target {
            platform = self.detected(&image, platform);
        }
        let reference = match resolved.digest.parse() {
            Ok(digest) => reference.with_digest(digest).to_string(),
            Err(_) => reference.to_string(),
        };
        Ok(Start::Image {
            reference,
            image: Box::new(image),
            platform,
        })
    }

    /// Without a platform asked for, an image for the build platform is taken for what it is.
    fn detected(&self, image: &Image, wanted: Platform) -> Platform {
        let build = &self.client.build_platform;
        let same = |p: &Platform| p.os == image.os && p.architecture == image.architecture;
        if !same(&wanted) && same(build) {
            build.clone()
        } else {
            wanted
        }
    }

    /// Sets a stage up on what it starts from.
    fn begin(&mut self, index: usize, needed: bool, start: Start) -> Result<(), DockerfileError> {
        let stage = &mut self.table.stages[index];
        stage.dispatched |= stage.implicit;
        match start {
            Start::Stage(loaded) => {
                stage.dispatched = true;
                stage.state = loaded.state;
                if let Some(image) = loaded.image {
                    if !image.architecture.is_empty() && !image.os.is_empty() {
                        stage.platform = Some(image.platform());
                    }
                    stage.image = Image { created: None, ..image };
                }
                self.table.pending.extend(loaded.pending.map(|p| (p, index)));
            }
            Start::Base(loaded, platform) => {
                let image = loaded.image.unwrap_or_else(|| Image::empty(&platform));
                stage.base_image = Some(Arc::new(image.clone()));
                stage.image = Image { created: None, ..image };
                stage.state = loaded.state;
                stage.state.around_mut().platform = Some(platform.normalized());
                stage.platform = Some(platform);
                self.table.pending.extend(loaded.pending.map(|p| (p, index)));
            }
            Start::Unused(reference) => {
                let platform = stage.platform.clone().unwrap_or_else(|| self.target_platform.clone());
                stage.platform = Some(platform);
                stage.base_name = reference.to_string();
                // The name of the FROM step is made all the same, and counts.
                self.step_name(index, "", None, false);
            }
            Start::Image {
                reference,
                image,
                platform,
            } => {
                stage.base_image = Some(Arc::new((*image).clone()));
                let written = std::mem::replace(&mut stage.base_name, reference);
                stage.image = Image {
                    created: None,
                    ..*image
                };
                if !stage.image.is_empty() {
                    self.start_from_image(index, &platform, &written, needed);
                }
                self.table.stages[index].platform = Some(platform);
            }
        }
        Ok(())
    }

    fn start_from_image(&mut self, index: usize, platform: &Platform, written: &str, needed: bool) {
        let reference = self.table.stages[index].base_name.clone();
        let name = self.step_name(index, &format!("FROM {reference}"), Some(platform), false);
        let stage = &self.table.stages[index];
        let mut about = Constraints::named(name)
            .described("com.docker.dockerfile.v1.command", stage.text.clone())
            .on(Some(platform.clone()));
        about.locations.push(self.location(stage.place()));
        let full = ImageRef::parse(&reference).map_or(reference, |r| r.or_latest().to_string());
        let state = source::image(&full, self.client.options.resolve_mode, about);
        let actual = stage.image.platform();
        if needed && (platform.os != actual.os || platform.architecture != actual.architecture) {
            self.linter
                .report(&lint::INVALID_BASE_IMAGE_PLATFORM, stage.place(), || {
                    let quote = |p: &Platform| crate::gotext::quote(&p.id());
                    format!(
                        "Base image {written} was pulled with platform {}, expected {} for current build",
                        quote(&actual),
                        quote(platform)
                    )
                });
        }
        self.table.stages[index].state = state;
    }

    /// Takes over from the stage this one is based on.
    pub(super) fn inherit(&mut self, index: usize) -> Result<(), DockerfileError> {
        let Some(base) = self.table.stages[index].base else {
            return Ok(());
        };
        let parent = &self.table.stages[base];
        let size = 1024 + parent.state.around().env.size() + image_size(&parent.image) + 64 * parent.args.len();
        self.budget.charge(size)?;
        let mut image = parent.image.clone();
        // Triggers of the parent fire here and go no further.
        image.config.on_build = Vec::new();
        let (state, platform, base_image) = (parent.state.clone(), parent.platform.clone(), parent.base_image.clone());
        let (args, workdir_set) = (parent.args.clone(), parent.workdir_set);
        let stage = &mut self.table.stages[index];
        stage.image = image;
        stage.state = state;
        stage.platform = platform;
        stage.base_image = base_image;
        stage.args = args;
        stage.workdir_set = workdir_set;
        self.table.share_paths(index, base);
        Ok(())
    }

    /// Puts the triggers of what a stage starts from before its own instructions. Returns whether they need further stages.
    fn take_triggers(&mut self, index: usize) -> Result<bool, DockerfileError> {
        let stage = &mut self.table.stages[index];
        let mut triggers = std::mem::take(&mut stage.image.config.on_build);
        if let (Some(base), false) = (stage.base, stage.triggers_taken) {
            stage.triggers_taken = true;
            let commands = &self.table.stages[base].commands;
            triggers.extend(commands.iter().filter_map(|c| match &c.instruction.kind {
                Kind::Onbuild(text) => Some(text.clone()),
                _ => None,
            }));
        }
        if triggers.is_empty() {
            return Ok(false);
        }
        let span = self.table.stages[index].place();
        let mut commands = Vec::with_capacity(triggers.len());
        let mut new_sources = false;
        for trigger in &triggers {
            let command = self.trigger(index, trigger, span).map_err(|e| e.relocated(span))?;
            new_sources |= !command.sources.is_empty();
            commands.push(command);
        }
        let stage = &mut self.table.stages[index];
        stage.steps += commands.len();
        commands.append(&mut stage.commands);
        stage.commands = commands;
        Ok(new_sources)
    }

    fn trigger(
        &mut self,
        index: usize,
        text: &str,
        span: crate::dockerfile::span::Span,
    ) -> Result<Command, DockerfileError> {
        let mut parsed = parser::parse(text.as_bytes())?;
        let (Some(mut node), true) = (parsed.nodes.pop(), parsed.nodes.is_empty()) else {
            return Err(DockerfileError::new("onbuild trigger should be a single expression"));
        };
        node.span = span;
        let silent = lint::Linter::silent();
        let instruction = match read::read(&node, &silent.scope(&[])).map_err(DockerfileError::new)? {
            Parsed::Instruction(instruction) => instruction,
            Parsed::Stage(_) => return Err(DockerfileError::new("*instructions.Stage is not a command type")),
        };
        let mut command = Command {
            instruction: Arc::new(instruction),
            sources: Vec::new(),
            trigger: true,
        };
        self.connect(index, &mut command)?;
        Ok(command)
    }
}

/// Roughly what a copy of a config takes.
fn image_size(image: &Image) -> usize {
    let config = &image.config;
    let texts = |list: &[String]| list.iter().map(|s| s.len() + 24).sum::<usize>();
    let history: usize = image.history.iter().map(|h| h.created_by.len() + 96).sum();
    let labels: usize = config.labels.iter().map(|(k, v)| k.len() + v.len() + 64).sum();
    let keys = |n: usize| n * 64;
    history
        + labels
        + texts(&config.env)
        + texts(&config.cmd)
        + texts(&config.entrypoint)
        + texts(&config.on_build)
        + keys(config.exposed_ports.len() + config.volumes.len())
}
