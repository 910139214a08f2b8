//! RUN: a process in the stage's file system.

use kiln_llb::op::{CdiDevice, NetMode, ProxyEnv, SecurityMode};
use kiln_llb::state::{Constraints, ExecSpec, FileStep, MountSpec};
use kiln_llb::{EnvList, State};

use super::config::in_shell;
use super::dispatch::Step;
use super::names::instruction_text;
use super::{Bridge, Conversion};
use crate::dockerfile::expand::{Expander, Variables};
use crate::dockerfile::heredoc;
use crate::dockerfile::instruction::{Network, Run};
use crate::dockerfile::mount::Mount;
use crate::error::DockerfileError;
use crate::gotext::lossy;

/// Where a here-document with a `#!` line is mounted.
const PIPES: &str = "/dev/pipes/";

impl<B: Bridge> Conversion<'_, B> {
    pub(super) fn run(&mut self, step: &Step<'_>, run: &Run) -> Result<(), DockerfileError> {
        let span = step.instruction.span;
        let mounts = run
            .mounts
            .iter()
            .map(|text| Mount::parse(text, |value| self.expand(step, value)))
            .collect::<Result<Vec<_>, DockerfileError>>()?;
        // A process may look at anything.
        self.table.use_path(step.stage, "/");
        let mut spec = ExecSpec {
            sets_default_path: self.client.has("exec.meta.setsdefaultpath"),
            ..ExecSpec::default()
        };
        let mut shown = step.instruction.text.clone();
        let mut args = self.command_with_documents(step, run, &mut spec, &mut shown)?;
        if run.command.shell {
            args = in_shell(&self.table.stages[step.stage].image, &args);
        }
        spec.args.clone_from(&args);
        spec.proxy_env = self.proxy_env();
        self.add_mounts(step, mounts.as_slice(), &mut spec)?;
        if run.insecure {
            spec.security = SecurityMode::Insecure;
        }
        spec.network = match run.network {
            Network::Default => None,
            Network::None => Some(NetMode::None),
            Network::Host => Some(NetMode::Host),
        };
        let options = &self.client.options;
        if self.client.has("exec.meta.ulimit") {
            spec.ulimits.clone_from(&options.ulimits);
        }
        if self.client.has("exec.meta.cdi") {
            spec.cdi_devices = self.devices(run)?;
        }
        spec.extra_hosts.clone_from(&options.extra_hosts);
        if self.client.has("exec.mount.tmpfs.size") && options.shm_size > 0 {
            let size = Some(options.shm_size);
            spec.mounts.push(MountSpec {
                target: "/dev/shm".to_owned(),
                tmpfs: size,
                ..MountSpec::default()
            });
        }
        if self.client.has("exec.meta.cgroup.parent") {
            spec.cgroup_parent.clone_from(&options.cgroup_parent);
        }
        let limits = options
            .linux_resources
            .clone()
            .filter(|_| self.client.has("exec.meta.linux.resources"));

        let expander = Expander {
            keep_quotes: true,
            keep_unset: true,
            ..self.expander()
        };
        let masked = Masked {
            env: self.env_of(step.stage),
            secrets: &mounts,
        };
        let text = instruction_text(&expander, &shown, &masked);
        let platform = self.table.stages[step.stage].state.around().platform.clone();
        let name = self.step_name(step.stage, &text, platform.as_ref(), true);
        let mut about =
            Constraints::named(name).described("com.docker.dockerfile.v1.command", step.instruction.text.clone());
        about.locations.push(self.location(span));
        about.linux_resources = limits;
        about.ignore_cache = self.table.stages[step.stage].ignore_cache;

        let history = format!("RUN {} # buildkit", self.history_of(step.stage, &args));
        self.budget.charge(self.env_of(step.stage).size())?;
        let stage = &mut self.table.stages[step.stage];
        stage.state = stage.state.run(spec, about);
        self.commit(step.stage, history, true)
    }

    /// The words of the command with its here-documents: alone, one is the script itself; otherwise the shell reads them.
    fn command_with_documents(
        &self,
        step: &Step<'_>,
        run: &Run,
        spec: &mut ExecSpec,
        shown: &mut String,
    ) -> Result<Vec<String>, DockerfileError> {
        let Some(document) = run.files.first() else {
            return Ok(run.command.args.clone());
        };
        let ([command], true) = (run.command.args.as_slice(), run.command.shell) else {
            let args = crate::gotext::plain_list(&run.command.args);
            return Err(DockerfileError::new(format!(
                "parsing produced an invalid run command: {args}"
            )));
        };
        if !matches!(heredoc::operator(command), Ok(Some(_))) {
            let mut text = command.clone();
            for file in &run.files {
                text.push('\n');
                text.push_str(&lossy(&file.content));
                text.push_str(&file.name);
            }
            return Ok(vec![text]);
        }
        shown.push_str(&format!(" ({})", heredoc::summary(&lossy(&document.content))));
        let body = document.body();
        if self.table.stages[step.stage].image.os == "windows" || !body.starts_with(b"#!") {
            return Ok(vec![lossy(&body).into_owned()]);
        }
        let mkfile = FileStep::MkFile {
            path: document.name.clone(),
            mode: 0o755,
            data: body.into(),
            owner: None,
            timestamp: -1,
        };
        let about = Constraints::named("[internal] preparing inline document");
        spec.mounts.push(MountSpec {
            target: PIPES.to_owned(),
            source: State::scratch().file(vec![mkfile], about),
            selector: "/".to_owned(),
            readonly: true,
            ..MountSpec::default()
        });
        Ok(vec![crate::gotext::join_path(PIPES, &document.name)])
    }

    fn devices(&self, run: &Run) -> Result<Vec<CdiDevice>, DockerfileError> {
        if !run.devices.is_empty() && !self.request.labs {
            let what = "device feature is only supported in Dockerfile frontend 1.14.0-labs or later";
            return Err(DockerfileError::new(what));
        }
        let device = |(name, required): &(String, bool)| CdiDevice {
            name: name.clone(),
            optional: !required,
        };
        Ok(run.devices.iter().map(device).collect())
    }

    /// Proxies from build-args, lower-case names last so that they win.
    fn proxy_env(&self) -> Option<ProxyEnv> {
        let mut proxies = ProxyEnv::default();
        let mut any = false;
        for (name, value) in &self.build_args {
            let slot = match name.to_lowercase().as_str() {
                "http_proxy" => &mut proxies.http_proxy,
                "https_proxy" => &mut proxies.https_proxy,
                "ftp_proxy" => &mut proxies.ftp_proxy,
                "no_proxy" => &mut proxies.no_proxy,
                "all_proxy" => &mut proxies.all_proxy,
                _ => continue,
            };
            value.clone_into(slot);
            any = true;
        }
        any.then_some(proxies)
    }

    /// The command as history shows it: declared arguments with their values first, and how many there are.
    fn history_of(&self, index: usize, args: &[String]) -> String {
        let stage = &self.table.stages[index];
        let env = self.env_of(index);
        let mut words = Vec::with_capacity(stage.args.len() + args.len() + 1);
        if !stage.args.is_empty() {
            words.push(format!("|{}", stage.args.len()));
        }
        for (name, value) in &stage.args {
            let value = env.get(name).or(value.as_deref()).unwrap_or_default();
            words.push(format!("{name}={value}"));
        }
        words.extend(args.iter().cloned());
        words.join(" ")
    }
}

/// The environment of a step with its secrets blanked out.
struct Masked<'a> {
    env: &'a EnvList,
    secrets: &'a [Mount],
}

impl Variables for Masked<'_> {
    fn value(&self, name: &str) -> Option<&str> {
        let is_secret =
            |m: &Mount| m.kind == crate::dockerfile::mount::MountKind::Secret && m.env.as_deref() == Some(name);
        if self.secrets.iter().any(is_secret) {
            Some("****")
        } else {
            self.env.get(name)
        }
    }
}
