//! The table of stages: real ones in file order, then the images and contexts that instructions name on the side.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use indexmap::IndexMap;
use kiln_llb::State;
use kiln_oci::Platform;

use super::outline::{ArgInfo, Capture};
use super::{Bridge, Conversion};
use crate::context::{NamedContext, PendingLocal};
use crate::dockerfile::expand::{Expansion, NoVariables};
use crate::dockerfile::instruction::{Instruction, Kind};
use crate::dockerfile::lint::{self, LintScope};
use crate::dockerfile::span::Span;
use crate::dockerfile::stage::{Dockerfile, Stage};
use crate::dockerfile::suggest::nearest;
use crate::error::{DockerfileError, Located};
use crate::gotext::{join_path, parse_platform, quote};
use crate::image::Image;

/// The name of the empty base.
pub(super) const SCRATCH: &str = "scratch";

/// All stages.
#[derive(Default)]
pub(super) struct Table {
    pub(super) stages: Vec<StageState>,
    by_name: HashMap<String, usize>,
    /// Paths used of a stage's file system, shared along chains of stages.
    paths: Vec<BTreeSet<String>>,
    /// Arguments before the first FROM.
    pub(super) global_args: BTreeMap<String, ArgInfo>,
    /// Client directories whose paths are not known yet, with the stage that uses them.
    pub(super) pending: Vec<(PendingLocal, usize)>,
}

/// One entry of the table.
#[derive(Default)]
pub(super) struct StageState {
    /// Name as declared, in lower case; empty if none.
    pub(super) name: String,
    /// Name as shown: the declared one, or `stage-<index>`.
    pub(super) label: String,
    pub(super) description: String,
    /// What it is based on; a full reference once resolved.
    pub(super) base_name: String,
    /// The FROM line.
    pub(super) text: String,
    pub(super) span: Option<Span>,
    pub(super) base: Option<usize>,
    /// Stages it needs, with the instruction that says so.
    pub(super) deps: BTreeMap<usize, Span>,
    pub(super) named_context: Option<NamedContext>,
    pub(super) platform: Option<Platform>,
    pub(super) commands: Vec<Command>,
    pub(super) state: State,
    pub(super) image: Image,
    pub(super) base_image: Option<Arc<Image>>,
    pub(super) dispatched: bool,
    pub(super) resolved: bool,
    pub(super) triggers_taken: bool,
    /// Arguments declared so far with their values, those of parent stages first.
    pub(super) args: IndexMap<String, Option<String>>,
    /// Where each variable of the image's environment stands.
    pub(super) env_positions: HashMap<String, usize>,
    pub(super) env_indexed: bool,
    /// Paths of the main context it uses.
    pub(super) context_paths: BTreeSet<String>,
    /// Where its own paths are kept.
    paths: usize,
    pub(super) ignore_cache: bool,
    /// Not declared by a FROM.
    pub(super) implicit: bool,
    pub(super) step: usize,
    pub(super) steps: usize,
    pub(super) in_trigger: bool,
    pub(super) capture: Capture,
    pub(super) workdir_set: bool,
    pub(super) last_cmd: Option<Span>,
    pub(super) last_entrypoint: Option<Span>,
    pub(super) last_healthcheck: Option<Span>,
}

impl StageState {
    /// Where errors about the stage itself point to.
    pub(super) fn place(&self) -> Span {
        self.span.unwrap_or(Span::EMPTY)
    }
}

/// An instruction in a stage.
#[derive(Clone, Debug)]
pub(super) struct Command {
    pub(super) instruction: Arc<Instruction>,
    /// Stages it takes files from; for mounts one each.
    pub(super) sources: Vec<usize>,
    pub(super) trigger: bool,
}

impl Table {
    /// Appends an entry, connecting it to the stage it is based on.
    pub(super) fn add(&mut self, mut stage: StageState) -> usize {
        let index = self.stages.len();
        stage.base = self.by_name.get(&stage.base_name).copied();
        stage.paths = self.paths.len();
        self.paths.push(BTreeSet::new());
        if !stage.name.is_empty() {
            self.by_name.insert(stage.name.to_lowercase(), index);
        }
        self.stages.push(stage);
        index
    }

    /// The stage of that name, whatever its case.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(&name.to_lowercase()).copied()
    }

    /// Names that may be suggested.
    pub(super) fn labels(&self) -> impl Iterator<Item = &str> {
        self.stages.iter().map(|s| s.label.as_str()).filter(|l| !l.is_empty())
    }

    /// `target` and everything it needs, in table order.
    pub(super) fn reachable(&self, target: usize) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        let mut pending = vec![target];
        while let Some(index) = pending.pop() {
            if found.insert(index)
                && let Some(stage) = self.stages.get(index)
            {
                pending.extend(stage.base);
                pending.extend(stage.deps.keys());
            }
        }
        found
    }

    /// Notes that a path of a stage's file system is used.
    pub(super) fn use_path(&mut self, stage: usize, path: &str) {
        let slot = self.stages.get(stage).map_or(usize::MAX, |s| s.paths);
        if let Some(paths) = self.paths.get_mut(slot) {
            paths.insert(join_path("/", path));
        }
    }

    /// Shares the paths of `base` with `stage`: what is used of one is used of the other.
    pub(super) fn share_paths(&mut self, stage: usize, base: usize) {
        let slot = self.stages.get(base).map_or(0, |b| b.paths);
        if let Some(stage) = self.stages.get_mut(stage) {
            stage.paths = slot;
        }
    }

    /// Paths used of a stage's file system, relative; empty if all of it is.
    pub(super) fn used_paths(&self, stage: usize) -> Vec<String> {
        let slot = self.stages.get(stage).map_or(usize::MAX, |s| s.paths);
        self.paths.get(slot).map(relative).unwrap_or_default()
    }

    /// Paths used of the main context, relative; empty if all of it is.
    pub(super) fn context_paths(&self) -> Vec<String> {
        // Only stages that were walked have noted any.
        let all: BTreeSet<String> = self
            .stages
            .iter()
            .flat_map(|s| s.context_paths.iter().cloned())
            .collect();
        relative(&all)
    }
}

fn relative(paths: &BTreeSet<String>) -> Vec<String> {
    if paths.contains("/") {
        return Vec::new();
    }
    let mut list: Vec<String> = paths
        .iter()
        .map(|p| join_path(".", p.trim_start_matches('/')))
        .collect();
    list.sort();
    list
}

impl<B: Bridge> Conversion<'_, B> {
    /// Enters all declared stages: bases and platforms expanded, named contexts looked up.
    pub(super) fn build_table(
        &mut self,
        file: Dockerfile,
        known: &BTreeMap<String, ArgInfo>,
    ) -> Result<(), DockerfileError> {
        self.table.global_args.clone_from(known);
        for (index, stage) in file.stages.into_iter().enumerate() {
            let linter = self.linter;
            let lint = linter.scope(&stage.comments);
            let mut used = BTreeSet::new();
            let base = self.expand_in_from(&stage.base, stage.span, known, &lint);
            let base = base.at_span(stage.span)?;
            if base.text.is_empty() {
                let message = format!("base name ({}) should not be blank", stage.base);
                return Err(DockerfileError::at(message, stage.span));
            }
            used.extend(base.matched);
            let mut entry = StageState {
                base_name: base.text,
                label: stage.name.clone(),
                platform: self.stage_platform(&stage, known, &lint, &mut used)?,
                ..StageState::default()
            };
            if !stage.name.is_empty() && !stage.name.eq_ignore_ascii_case(SCRATCH) && stage.name != "context" {
                let platform = entry.platform.as_ref().or(self.request.platform.as_ref());
                entry.named_context = self.client.named_context(&stage.name, platform)?;
            }
            self.fill(&mut entry, stage);
            if entry.named_context.is_some() {
                let index = self.table.add(entry);
                // The context takes the place of everything the stage is made of.
                self.table.stages[index].base = None;
                continue;
            }
            if entry.name.is_empty() {
                entry.label = format!("stage-{index}");
            }
            entry.capture.used = used;
            entry.ignore_cache = self.client.options.ignores_cache_of(&entry.name);
            let index = self.table.add(entry);
            let entry = &mut self.table.stages[index];
            let from_image = entry.base_name != SCRATCH && entry.base.is_none();
            let counted = |c: &&Command| {
                matches!(
                    c.instruction.kind,
                    Kind::Add(_) | Kind::Copy(_) | Kind::Run(_) | Kind::Workdir(_)
                )
            };
            entry.steps = usize::from(from_image) + entry.commands.iter().filter(counted).count();
        }
        Ok(())
    }

    fn fill(&self, entry: &mut StageState, stage: Stage) {
        entry.name = stage.name;
        entry.description = stage.description;
        entry.text = stage.text;
        entry.span = Some(stage.span);
        let command = |instruction| Command {
            instruction: Arc::new(instruction),
            sources: Vec::new(),
            trigger: false,
        };
        entry.commands = stage.instructions.into_iter().map(command).collect();
    }

    /// Expands a word of a FROM line, where only global arguments count.
    fn expand_in_from(
        &self,
        word: &str,
        span: Span,
        known: &BTreeMap<String, ArgInfo>,
        lint: &LintScope<'_>,
    ) -> Result<Expansion, DockerfileError> {
        let result = self.expander().expand(word, &self.global_args);
        let unmatched = match &result {
            Ok(expansion) => &expansion.unmatched,
            Err(error) => &error.unmatched,
        };
        for name in unmatched.iter().filter(|name| !known.contains_key(*name)) {
            lint.report(&lint::UNDEFINED_ARG_IN_FROM, span, || {
                let options = known
                    .keys()
                    .map(String::as_str)
                    .chain(self.global_args.iter().map(|(k, _)| k));
                let hint = nearest(name, options)
                    .map(|h| format!(" (did you mean {h}?)"))
                    .unwrap_or_default();
                format!("FROM argument '{name}' is not declared{hint}")
            });
        }
        let expansion = result?;
        self.budget.charge(expansion.text.len())?;
        Ok(expansion)
    }

    fn stage_platform(
        &self,
        stage: &Stage,
        known: &BTreeMap<String, ArgInfo>,
        lint: &LintScope<'_>,
        used: &mut BTreeSet<String>,
    ) -> Result<Option<Platform>, DockerfileError> {
        if stage.platform.is_empty() {
            return Ok(None);
        }
        let expansion = self.expand_in_from(&stage.platform, stage.span, known, lint);
        let expansion = expansion
            .context("failed to process arguments for platform ")
            .at_span(stage.span)?;
        self.lint_platform(stage, &expansion, lint);
        let hint = || {
            let mut names = expansion.unmatched.iter();
            names.find_map(|name| nearest(name, self.global_args.iter().map(|(k, _)| k)).map(str::to_owned))
        };
        if expansion.text.is_empty() {
            let message = format!("empty platform value from expression {}", stage.platform);
            return Err(DockerfileError::at(message, stage.span).suggesting(hint()));
        }
        let platform = parse_platform(&expansion.text).map_err(|e| {
            let error = DockerfileError::at(e, stage.span).suggesting(hint());
            error
                .context(format!("failed to parse platform {}", stage.platform))
                .with_span(stage.span)
        })?;
        used.extend(expansion.matched);
        Ok(Some(platform))
    }

    fn lint_platform(&self, stage: &Stage, expansion: &Expansion, lint: &LintScope<'_>) {
        let target = self.global_args.get("TARGETPLATFORM");
        let only_target = expansion.matched.len() == 1 && expansion.matched.contains("TARGETPLATFORM");
        if only_target && expansion.unmatched.is_empty() && target == Some(expansion.text.as_str()) {
            lint.report(&lint::REDUNDANT_TARGET_PLATFORM, stage.span, || {
                let what = "is redundant as this is the default behavior";
                format!("Setting platform to predefined {} in FROM {what}", stage.platform)
            });
        }
        if expansion.matched.is_empty()
            && expansion.unmatched.is_empty()
            && let Ok(platform) = expansion.text.parse::<Platform>()
            && !stage.name.contains(&platform.os)
            && !stage.name.contains(&platform.architecture)
        {
            lint.report(&lint::FROM_PLATFORM_FLAG_CONST_DISALLOWED, stage.span, || {
                format!(
                    "FROM --platform flag should not use constant value {}",
                    quote(&expansion.text)
                )
            });
        }
    }

    /// The stage to build.
    pub(super) fn target(&self) -> Result<usize, DockerfileError> {
        let name = &self.client.options.target;
        if name.is_empty() {
            return Ok(self.table.stages.len().saturating_sub(1));
        }
        self.table.find(name).ok_or_else(|| {
            let hint = nearest(name, self.table.labels()).map(str::to_owned);
            DockerfileError::new(format!("target stage {} could not be found", quote(name))).suggesting(hint)
        })
    }

    /// Connects every instruction with the stages it takes files from; what is no stage becomes an entry of its own.
    pub(super) fn connect_stages(&mut self) -> Result<(), DockerfileError> {
        for index in 0..self.table.stages.len() {
            let mut commands = std::mem::take(&mut self.table.stages[index].commands);
            for command in &mut commands {
                self.connect(index, command)?;
            }
            self.table.stages[index].commands = commands;
        }
        self.check_cycles()?;
        if let [only] = self.table.stages.as_mut_slice() {
            only.label = String::new();
        }
        Ok(())
    }

    /// Finds the sources of one instruction of stage `stage`.
    pub(super) fn connect(&mut self, stage: usize, command: &mut Command) -> Result<(), DockerfileError> {
        let instruction = command.instruction.clone();
        let span = instruction.span;
        match &instruction.kind {
            Kind::Copy(copy) if !copy.from.is_empty() => {
                let literal = self.expander().text(&copy.from, &NoVariables)?;
                if literal != copy.from {
                    let way_out = "define a new stage with FROM using ARG from global scope as a workaround";
                    return Err(DockerfileError::new(format!(
                        "variable expansion is not supported for --from, {way_out}"
                    )));
                }
                let source = match copy.from.parse::<i64>() {
                    Ok(number) => usize::try_from(number)
                        .ok()
                        .filter(|n| *n < self.table.stages.len())
                        .ok_or_else(|| DockerfileError::new(format!("invalid stage index {number}")))?,
                    Err(_) => self.stage_or_image(&copy.from, Some(span)),
                };
                command.sources = vec![source];
            }
            Kind::Run(run) => {
                for from in &run.mount_from {
                    let from = if from.is_empty() { SCRATCH } else { from };
                    let source = self.stage_or_image(from, None);
                    command.sources.push(source);
                }
            }
            _ => {}
        }
        for source in &command.sources {
            self.table.stages[stage].deps.insert(*source, span);
        }
        Ok(())
    }

    fn stage_or_image(&mut self, name: &str, span: Option<Span>) -> usize {
        if let Some(index) = self.table.find(name) {
            return index;
        }
        self.table.add(StageState {
            base_name: name.to_owned(),
            span,
            implicit: true,
            ..StageState::default()
        })
    }

    /// Refuses stages that need themselves, one location for each instruction on the way.
    fn check_cycles(&self) -> Result<(), DockerfileError> {
        let stages = &self.table.stages;
        let mut done = vec![false; stages.len()];
        let mut on_path = vec![false; stages.len()];
        for start in 0..stages.len() {
            if done[start] {
                continue;
            }
            // Each level: the stage, and the needs not yet followed.
            let mut path = vec![(start, stages[start].deps.iter())];
            let mut spans: Vec<Span> = Vec::new();
            done[start] = true;
            on_path[start] = true;
            while let Some((stage, needs)) = path.last_mut() {
                match needs.next() {
                    Some((&next, &span)) if on_path[next] => {
                        spans.push(span);
                        let label = &stages[start].label;
                        let error = DockerfileError::new(format!("circular dependency detected on stage: {label}"));
                        return Err(spans.into_iter().fold(error, DockerfileError::with_span));
                    }
                    Some((&next, &span)) if !done[next] => {
                        done[next] = true;
                        on_path[next] = true;
                        spans.push(span);
                        path.push((next, stages[next].deps.iter()));
                    }
                    Some(_) => {}
                    None => {
                        on_path[*stage] = false;
                        path.pop();
                        spans.pop();
                    }
                }
            }
        }
        Ok(())
    }
}
