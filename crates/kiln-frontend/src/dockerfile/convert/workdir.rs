//! WORKDIR: a directory that later instructions start from, made if it is not there.

use kiln_llb::state::{Constraints, FileStep, Owner};

use super::dispatch::Step;
use super::names::instruction_text;
use super::{Bridge, Conversion, files};
use crate::dockerfile::lint;
use crate::error::DockerfileError;

impl<B: Bridge> Conversion<'_, B> {
    /// Changes the directory of a stage and returns it with forward slashes.
    pub(super) fn change_dir(&mut self, index: usize, path: &str) -> Result<String, DockerfileError> {
        let stage = &mut self.table.stages[index];
        let os = stage.platform.as_ref().map_or("", |p| p.os.as_str()).to_owned();
        let dir = files::normalize(&stage.image.config.working_dir, path, &os, false)
            .map_err(|e| DockerfileError::new(format!("normalizing workdir: normalizing working directory: {e}")))?;
        stage.image.config.working_dir = files::from_slash(&dir, &os);
        stage.state.set_dir(&dir);
        Ok(dir)
    }

    pub(super) fn workdir(&mut self, step: &Step<'_>, path: &str) -> Result<(), DockerfileError> {
        let path = self.expand(step, path)?;
        let stage = &mut self.table.stages[step.stage];
        let os = stage.platform.as_ref().map_or("", |p| p.os.as_str()).to_owned();
        let set_before = std::mem::replace(&mut stage.workdir_set, true);
        if !set_before && !files::is_absolute(&path, &os) {
            step.lint
                .report(&lint::WORKDIR_RELATIVE_PATH, step.instruction.span, || {
                    let why = "can have unexpected results if the base image changes";
                    format!("Relative workdir {} {why}", crate::gotext::quote(&path))
                });
        }
        let dir = self.change_dir(step.stage, &path)?;
        let layer = dir != "/";
        if layer {
            let text = instruction_text(&self.expander(), &step.instruction.text, self.env_of(step.stage));
            let platform = self.table.stages[step.stage].platform.clone();
            let name = self.step_name(step.stage, &text, platform.as_ref(), true);
            let mut about = Constraints::named(name);
            about.locations.push(self.location(step.instruction.span));
            let timestamp = self.epoch.map_or(-1, |t| t.seconds().saturating_mul(1_000_000_000));
            let stage = &mut self.table.stages[step.stage];
            let user = stage.image.config.user.as_str();
            let owner = (!user.is_empty()).then(|| Owner::parse(user));
            let mkdir = FileStep::MkDir {
                path: dir.clone(),
                mode: 0o755,
                make_parents: true,
                owner,
                timestamp,
            };
            stage.state = stage.state.file(vec![mkdir], about);
        }
        self.commit(step.stage, format!("WORKDIR {dir}"), layer)
    }
}
