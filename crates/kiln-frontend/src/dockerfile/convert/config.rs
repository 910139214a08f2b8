//! Instructions that only change the image config: ENV, LABEL, CMD, ENTRYPOINT, HEALTHCHECK, SHELL, USER, VOLUME, STOPSIGNAL,
//! MAINTAINER.

use std::sync::LazyLock;

use super::dispatch::Step;
use super::{Bridge, Conversion};
use crate::dockerfile::instruction::{CommandLine, Healthcheck};
use crate::dockerfile::lint;
use crate::dockerfile::parser::Pair;
use crate::dockerfile::span::Span;
use crate::error::DockerfileError;
use crate::gotext::{format_duration, plain_list, quote_list};
use crate::image::{Empty, HealthConfig, Image, split_env};

/// A pair as history shows it.
fn shown(pair: &Pair) -> String {
    format!("{}={}", pair.key, pair.value)
}

impl<B: Bridge> Conversion<'_, B> {
    fn expanded(&self, step: &Step<'_>, pairs: &[Pair]) -> Result<Vec<Pair>, DockerfileError> {
        // All of them see the environment from before the instruction.
        let expand = |pair: &Pair| {
            Ok(Pair {
                key: self.expand(step, &pair.key)?,
                value: self.expand(step, &pair.value)?,
                legacy: pair.legacy,
            })
        };
        pairs.iter().map(expand).collect()
    }

    fn report_legacy(&self, step: &Step<'_>, pair: &Pair) {
        if pair.legacy {
            step.lint
                .report(&lint::LEGACY_KEY_VALUE_FORMAT, step.instruction.span, || {
                    let keyword = &step.instruction.keyword;
                    format!("\"{keyword} key=value\" should be used instead of legacy \"{keyword} key value\" format")
                });
        }
    }

    pub(super) fn env(&mut self, step: &Step<'_>, pairs: &[Pair]) -> Result<(), DockerfileError> {
        let pairs = self.expanded(step, pairs)?;
        let mut text = "ENV".to_owned();
        for pair in &pairs {
            self.report_legacy(step, pair);
            self.report_secret(step, "ENV", &pair.key);
            text.push(' ');
            text.push_str(&shown(pair));
            let stage = &mut self.table.stages[step.stage];
            stage.state.around_mut().env.set(pair.key.clone(), pair.value.clone());
            stage.set_image_env(&pair.key, &pair.value);
        }
        self.commit(step.stage, text, false)
    }

    pub(super) fn label(&mut self, step: &Step<'_>, pairs: &[Pair]) -> Result<(), DockerfileError> {
        let pairs = self.expanded(step, pairs)?;
        let mut text = "LABEL".to_owned();
        for pair in pairs {
            self.report_legacy(step, &pair);
            text.push(' ');
            text.push_str(&shown(&pair));
            self.table.stages[step.stage]
                .image
                .config
                .labels
                .insert(pair.key, pair.value);
        }
        self.commit(step.stage, text, false)
    }

    fn report_repeated(&self, step: &Step<'_>, earlier: Option<Span>) {
        if let Some(span) = earlier {
            step.lint.report(&lint::MULTIPLE_INSTRUCTIONS_DISALLOWED, span, || {
                let keyword = &step.instruction.keyword;
                let why = "because only the last one will be used";
                format!("Multiple {keyword} instructions should not be used in the same stage {why}")
            });
        }
    }

    /// The words of a CMD or ENTRYPOINT, with the shell in front if it is in shell form.
    fn command_words(&self, step: &Step<'_>, command: &CommandLine) -> Vec<String> {
        if !command.shell {
            return command.args.clone();
        }
        let image = &self.table.stages[step.stage].image;
        if image.config.shell.is_empty() {
            step.lint
                .report(&lint::JSON_ARGS_RECOMMENDED, step.instruction.span, || {
                    let keyword = &step.instruction.keyword;
                    let why = "to prevent unintended behavior related to OS signals";
                    format!("JSON arguments recommended for {keyword} {why}")
                });
        }
        in_shell(image, &command.args)
    }

    pub(super) fn cmd(&mut self, step: &Step<'_>, command: &CommandLine) -> Result<(), DockerfileError> {
        let earlier = self.table.stages[step.stage].last_cmd.replace(step.instruction.span);
        self.report_repeated(step, earlier);
        let words = self.command_words(step, command);
        let text = format!("CMD {}", quote_list(&words));
        let config = &mut self.table.stages[step.stage].image.config;
        config.cmd = words;
        config.args_escaped = true;
        self.commit(step.stage, text, false)
    }

    pub(super) fn entrypoint(&mut self, step: &Step<'_>, command: &CommandLine) -> Result<(), DockerfileError> {
        let earlier = self.table.stages[step.stage]
            .last_entrypoint
            .replace(step.instruction.span);
        self.report_repeated(step, earlier);
        let words = self.command_words(step, command);
        let text = format!("ENTRYPOINT {}", quote_list(&words));
        let stage = &mut self.table.stages[step.stage];
        stage.image.config.entrypoint = words;
        // A command of the base was meant for another entry point.
        if stage.last_cmd.is_none() {
            stage.image.config.cmd = Vec::new();
        }
        self.commit(step.stage, text, false)
    }

    pub(super) fn healthcheck(&mut self, step: &Step<'_>, check: &Healthcheck) -> Result<(), DockerfileError> {
        let earlier = self.table.stages[step.stage]
            .last_healthcheck
            .replace(step.instruction.span);
        self.report_repeated(step, earlier);
        let text = format!(
            "HEALTHCHECK {{Test:{} Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
            plain_list(&check.test),
            format_duration(check.interval),
            format_duration(check.timeout),
            format_duration(check.start_period),
            format_duration(check.start_interval),
            check.retries
        );
        self.table.stages[step.stage].image.config.healthcheck = Some(HealthConfig {
            test: check.test.clone(),
            interval: check.interval,
            timeout: check.timeout,
            start_period: check.start_period,
            start_interval: check.start_interval,
            retries: check.retries,
        });
        self.commit(step.stage, text, false)
    }

    pub(super) fn shell(&mut self, step: &Step<'_>, shell: &[String]) -> Result<(), DockerfileError> {
        self.table.stages[step.stage].image.config.shell = shell.to_vec();
        self.commit(step.stage, format!("SHELL {}", plain_list(shell)), false)
    }

    pub(super) fn user(&mut self, step: &Step<'_>, user: &str) -> Result<(), DockerfileError> {
        let user = self.expand(step, user)?;
        let stage = &mut self.table.stages[step.stage];
        stage.state.around_mut().user.clone_from(&user);
        stage.image.config.user.clone_from(&user);
        self.commit(step.stage, format!("USER {user}"), false)
    }

    pub(super) fn volume(&mut self, step: &Step<'_>, volumes: &[String]) -> Result<(), DockerfileError> {
        let volumes = volumes
            .iter()
            .map(|v| self.expand(step, v))
            .collect::<Result<Vec<_>, _>>()?;
        if volumes.iter().any(String::is_empty) {
            return Err(DockerfileError::new("VOLUME specified can not be an empty string"));
        }
        let text = format!("VOLUME {}", plain_list(&volumes));
        let known = &mut self.table.stages[step.stage].image.config.volumes;
        known.extend(volumes.into_iter().map(|v| (v, Empty {})));
        self.commit(step.stage, text, false)
    }

    pub(super) fn stop_signal(&mut self, step: &Step<'_>, signal: &str) -> Result<(), DockerfileError> {
        let signal = self.expand(step, signal)?;
        if !is_signal(&signal) {
            return Err(DockerfileError::new(format!("invalid signal: {signal}")));
        }
        self.table.stages[step.stage]
            .image
            .config
            .stop_signal
            .clone_from(&signal);
        self.commit(step.stage, format!("STOPSIGNAL {signal}"), false)
    }

    pub(super) fn maintainer(&mut self, step: &Step<'_>, name: &str) -> Result<(), DockerfileError> {
        name.clone_into(&mut self.table.stages[step.stage].image.author);
        self.commit(step.stage, format!("MAINTAINER {name}"), false)
    }
}

impl super::table::StageState {
    /// Sets a variable of the image: in place if it is there, at the end otherwise.
    fn set_image_env(&mut self, name: &str, value: &str) {
        let env = &mut self.image.config.env;
        if !self.env_indexed {
            self.env_indexed = true;
            // Of two entries for one variable the first is the one that changes.
            for (i, entry) in env.iter().enumerate().rev() {
                self.env_positions.insert(split_env(entry).0.to_owned(), i);
            }
        }
        let entry = format!("{name}={value}");
        match self.env_positions.get(name).and_then(|&i| env.get_mut(i)) {
            Some(slot) => *slot = entry,
            None => {
                self.env_positions.insert(name.to_owned(), env.len());
                env.push(entry);
            }
        }
    }
}

/// Words run by the image's shell, joined to one.
pub(super) fn in_shell(image: &Image, args: &[String]) -> Vec<String> {
    let mut words = if !image.config.shell.is_empty() {
        image.config.shell.clone()
    } else if image.os == "windows" {
        ["cmd", "/S", "/C"].map(str::to_owned).to_vec()
    } else {
        ["/bin/sh", "-c"].map(str::to_owned).to_vec()
    };
    words.push(args.join(" "));
    words
}

/// Names of signals without `SIG`, as of Linux on common machines.
const SIGNALS: &[&str] = &[
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE", "POLL",
    "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU", "URG", "USR1",
    "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
];

static REAL_TIME_SIGNALS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let low = (1..=15).map(|n| format!("RTMIN+{n}"));
    let high = (1..=14).map(|n| format!("RTMAX-{n}"));
    low.chain(high)
        .chain(["RTMIN".to_owned(), "RTMAX".to_owned()])
        .collect()
});

/// Whether a text names a signal: a number other than 0, or a name with or without `SIG` in any case.
fn is_signal(text: &str) -> bool {
    if let Ok(number) = text.parse::<i64>() {
        return number != 0;
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    SIGNALS.contains(&name) || REAL_TIME_SIGNALS.iter().any(|s| s == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals() {
        for text in ["9", "-1", "SIGTERM", "term", "sigrtmin+3", "RTMAX-14"] {
            assert!(is_signal(text), "{text}");
        }
        for text in ["0", "", "foo", "SIG", "RTMIN+16"] {
            assert!(!is_signal(text), "{text}");
        }
    }
}
