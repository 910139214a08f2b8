//! The walk over the stages: each begins with its base, then its instructions apply one by one.

use std::collections::BTreeSet;
use std::sync::Arc;

use kiln_llb::EnvList;
use kiln_oci::HistoryEntry;

use super::table::Command;
use super::{Bridge, Conversion};
use crate::dockerfile::expand::{ExpandError, Expander, Expansion};
use crate::dockerfile::instruction::{Argument, Instruction, Kind};
use crate::dockerfile::lint::{self, LintScope};
use crate::dockerfile::suggest::nearest;
use crate::error::{DockerfileError, Located};
use crate::image::split_env;

/// Arguments that are known and recorded, but are no variables of steps.
pub(super) const NOT_IN_ENV: &[&str] = &["BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"];

/// What history entries of this frontend say about their origin.
const COMMENT: &str = "buildkit.dockerfile.v0";

/// An instruction while it is applied.
pub(super) struct Step<'a> {
    /// The stage.
    pub stage: usize,
    /// The instruction.
    pub instruction: &'a Instruction,
    /// Stages it takes files from.
    pub sources: &'a [usize],
    /// Rules in force for it.
    pub lint: LintScope<'a>,
}

impl<B: Bridge> Conversion<'_, B> {
    /// Applies all instructions of the needed stages, in file order.
    pub(super) fn dispatch_stages(&mut self, reachable: &BTreeSet<usize>) -> Result<(), DockerfileError> {
        for index in 0..self.table.stages.len() {
            let stage = &self.table.stages[index];
            if !self.request.all_stages && (!reachable.contains(&index) || stage.dispatched) {
                continue;
            }
            self.start_stage(index)?;
            let commands = self.table.stages[index].commands.clone();
            for command in &commands {
                self.dispatch(index, command).at_span(command.instruction.span)?;
            }
        }
        Ok(())
    }

    /// Applies the config of what a stage starts from.
    fn start_stage(&mut self, index: usize) -> Result<(), DockerfileError> {
        self.inherit(index)?;
        let options = &self.client.options;
        let stage = &mut self.table.stages[index];
        stage.dispatched = true;
        let os = stage
            .platform
            .get_or_insert_with(|| self.target_platform.clone())
            .os
            .clone();
        stage.image.ensure_path(&os);
        let around = stage.state.around_mut();
        for entry in &stage.image.config.env {
            let (name, value) = split_env(entry);
            around.env.set(name, value);
        }
        if !options.hostname.is_empty() {
            around.hostname.clone_from(&options.hostname);
        }
        around.network = options.network;
        if !stage.image.config.user.is_empty() {
            around.user.clone_from(&stage.image.config.user);
        }
        let dir = stage.image.config.working_dir.clone();
        if !dir.is_empty() {
            let span = stage.place();
            self.change_dir(index, &dir).at_span(span)?;
        }
        Ok(())
    }

    fn dispatch(&mut self, index: usize, command: &Command) -> Result<(), DockerfileError> {
        let instruction = Arc::clone(&command.instruction);
        let linter = self.linter;
        self.table.stages[index].in_trigger = command.trigger;
        let lint = linter.scope(&instruction.comments);
        let step = Step {
            stage: index,
            instruction: &instruction,
            sources: &command.sources,
            lint,
        };
        match &instruction.kind {
            Kind::Env(pairs) => self.env(&step, pairs),
            Kind::Label(pairs) => self.label(&step, pairs),
            Kind::Arg(arguments) => self.arg(&step, arguments),
            Kind::Cmd(command) => self.cmd(&step, command),
            Kind::Entrypoint(command) => self.entrypoint(&step, command),
            Kind::Healthcheck(check) => self.healthcheck(&step, check),
            Kind::Shell(shell) => self.shell(&step, shell),
            Kind::User(user) => self.user(&step, user),
            Kind::Volume(volumes) => self.volume(&step, volumes),
            Kind::StopSignal(signal) => self.stop_signal(&step, signal),
            Kind::Maintainer(name) => self.maintainer(&step, name),
            Kind::Onbuild(text) => {
                self.table.stages[index].image.config.on_build.push(text.clone());
                Ok(())
            }
            Kind::Expose(ports) => self.expose(&step, ports),
            Kind::Workdir(path) => self.workdir(&step, path),
            Kind::Run(run) => self.run(&step, run),
            Kind::Add(add) => self.add(&step, add),
            Kind::Copy(copy) => self.copy(&step, copy),
        }
    }

    /// The variables instructions of a stage see.
    pub(super) fn env_of(&self, index: usize) -> &EnvList {
        &self.table.stages[index].state.around().env
    }

    /// Expands a word of an instruction; variables nobody set are reported.
    pub(super) fn expand(&self, step: &Step<'_>, word: &str) -> Result<String, DockerfileError> {
        Ok(self.expand_with(step, self.expander(), word)?.text)
    }

    /// As [`Conversion::expand`] with another reading of the word.
    pub(super) fn expand_with(
        &self,
        step: &Step<'_>,
        expander: Expander,
        word: &str,
    ) -> Result<Expansion, DockerfileError> {
        let result = expander.expand(word, self.env_of(step.stage));
        self.report_unset(step, &result);
        let expansion = result?;
        self.budget.charge(expansion.text.len())?;
        Ok(expansion)
    }

    fn report_unset(&self, step: &Step<'_>, result: &Result<Expansion, ExpandError>) {
        let unmatched = match result {
            Ok(expansion) => &expansion.unmatched,
            Err(error) => &error.unmatched,
        };
        let stage = &self.table.stages[step.stage];
        let undeclared =
            |name: &&String| !NOT_IN_ENV.contains(&name.as_str()) && !stage.args.contains_key(name.as_str());
        for name in unmatched.iter().filter(undeclared) {
            step.lint.report(&lint::UNDEFINED_VAR, step.instruction.span, || {
                let env = self.env_of(step.stage);
                let hint = if self.budget.may_compare(env.len()) {
                    nearest(name, env.iter().map(|(k, _)| k))
                } else {
                    None
                };
                let hint = hint.map(|h| format!(" (did you mean ${h}?)")).unwrap_or_default();
                format!("Usage of undefined variable '${name}'{hint}")
            });
        }
    }

    /// Adds a history entry.
    pub(super) fn commit(&mut self, index: usize, text: String, layer: bool) -> Result<(), DockerfileError> {
        // What an instruction takes beside its text: an entry here, a vertex if it makes a layer.
        self.budget.charge(text.len() + if layer { 4096 } else { 256 })?;
        let entry = HistoryEntry {
            created: self.epoch,
            created_by: text,
            comment: COMMENT.to_owned(),
            empty_layer: !layer,
            ..HistoryEntry::default()
        };
        self.table.stages[index].image.history.push(entry);
        Ok(())
    }

    fn arg(&mut self, step: &Step<'_>, arguments: &[Argument]) -> Result<(), DockerfileError> {
        use super::outline::ArgInfo;
        let span = step.instruction.span;
        let mut shown = Vec::with_capacity(arguments.len());
        for argument in arguments {
            self.report_secret(step, "ARG", &argument.name);
            let name = &argument.name;
            let given = self.build_args.get(name).cloned();
            let global = self.global_args.get(name).map(str::to_owned);
            let mut inherited = false;
            let value = match (given, &argument.value, global) {
                (Some(given), _, _) => Some(given),
                (None, Some(default), _) => Some(self.expand(step, default)?),
                (None, None, Some(global)) => {
                    // Expanded where it was set.
                    inherited = true;
                    Some(global)
                }
                (None, None, None) => None,
            };
            let stage = &mut self.table.stages[step.stage];
            if let Some(value) = &value
                && !NOT_IN_ENV.contains(&name.as_str())
            {
                stage.state.around_mut().env.set(name.clone(), value.clone());
            }
            if !inherited {
                let mut info = ArgInfo::new(argument, span);
                info.value = value.clone().unwrap_or_default();
                stage.capture.declared.insert(name.clone(), info);
            }
            stage.capture.used.insert(name.clone());
            stage.args.insert(name.clone(), value.clone());
            shown.push(match value {
                Some(value) => format!("{name}={value}"),
                None => name.clone(),
            });
        }
        self.commit(step.stage, format!("ARG {}", shown.join(" ")), false)
    }

    /// Reports a variable whose name sounds like a secret.
    pub(super) fn report_secret(&self, step: &Step<'_>, keyword: &str, name: &str) {
        if lint::sounds_secret(name) {
            step.lint
                .report(&lint::SECRETS_USED_IN_ARG_OR_ENV, step.instruction.span, || {
                    let name = crate::gotext::quote(name);
                    format!("Do not use ARG or ENV instructions for sensitive data ({keyword} {name})")
                });
        }
    }
}
