//! Runs a step's process: asks clients, takes locks, mounts, runs, commits.

use std::sync::Arc;

use kiln_executor::{
    ExecError, Executor, ExitReport, Held, NetMode as ProcessNet, ProcessIo, ProcessSpec, Resources,
    SecurityMode as ProcessSecurity, Step, Stub, Ulimit, clean_stubs,
};
use kiln_llb::op::{ExecOp, InputIndex, MountType, NetMode, SecurityMode};
use kiln_session::{SessionId, SessionManager};
use kiln_solver::{ErrorKind, LogStream, OpContext, Reporter, Worker, WorkerError as _};
use kiln_store::{LayerMeta, LayerRef, RealizeCtx, Stop, Store, Tenant};
use tokio::sync::mpsc;

use crate::cache_mounts;
use crate::error::{OpError, is_lost};
use crate::layers::blocking;
use crate::mounts::{self, Input, Kept, Making, Mounts, Written};
use crate::surroundings::{self, DnsSettings};

/// Host name of a process whose step names none.
const HOST_NAME: &str = "buildkitsandbox";

/// The daemon's configuration of steps.
#[derive(Debug, Clone, Default)]
pub struct ExecSettings {
    /// Network of steps that ask for none in particular.
    pub isolated_network: bool,
    /// Name servers.
    pub dns: DnsSettings,
    /// Parent of steps' cgroups where the step names none.
    pub cgroup_parent: String,
    /// Limits of every step.
    pub resources: Resources,
}

/// Carries out exec operations.
#[derive(Clone)]
pub struct ExecRunner {
    /// Where layers come from and go to.
    pub store: Arc<Store>,
    /// What runs processes.
    pub executor: Arc<dyn Executor>,
    /// Who has secrets and agents.
    pub sessions: SessionManager,
    /// The daemon's configuration.
    pub settings: ExecSettings,
}

/// A process ended, or its surroundings could not be made, and an input turned out to be unusable.
#[derive(Debug)]
pub enum ExecFailed {
    /// The value of this input exists no longer.
    InputLost(usize),
    /// The step failed.
    Failed(OpError),
}

impl From<OpError> for ExecFailed {
    fn from(error: OpError) -> Self {
        ExecFailed::Failed(error)
    }
}

impl ExecRunner {
    /// Runs the process of `op` over `inputs` and returns one layer per output. `realize` gives, for an input, what its
    /// bytes may be fetched with.
    ///
    /// Dropping the future kills the process; what it used is released when it is reaped.
    pub async fn run<W: Worker>(
        &self,
        op: &ExecOp,
        inputs: &[Option<LayerRef>],
        cx: &OpContext<W>,
        tenant: &Tenant,
        group: &[SessionId],
        realize: &RealizeCtx,
    ) -> Result<Vec<Option<LayerRef>>, ExecFailed> {
        let clients = mounts::ask_clients(&self.sessions, group, op).await?;
        let realized = self.realize(op, inputs, realize).await?;
        let base = |m: &kiln_llb::op::ExecMount| {
            let input = m
                .input
                .and_then(|i| realized.get(i as usize))
                .and_then(Option::as_ref)?;
            Some((input.layer.clone(), input.view.clone()))
        };
        let caches = cache_mounts::take(&self.store, tenant, op, cx.ignores_cache(), base).await?;
        let _permit = cx.permit().await;

        let mut kept = Kept {
            caches,
            _teardown: cx.teardown(),
            ..Kept::default()
        };
        let spec = {
            let (store, tenant, op, inputs) = (Arc::clone(&self.store), tenant.clone(), op.clone(), realized.clone());
            let (sessions, runner) = (self.sessions.clone(), self.clone());
            let made = blocking(move |stop| {
                let making = Making {
                    store: &store,
                    tenant: &tenant,
                    sessions: &sessions,
                    inputs: &inputs,
                    clients: &clients,
                    stop,
                    kept: &mut kept,
                };
                let mounts = mounts::prepare(&op, making)?;
                Ok::<_, OpError>((runner.spec(&op, mounts, clients.variables), kept))
            });
            let (spec, made) = made.await?;
            kept = made;
            spec
        };
        let kept = Arc::new(kept);

        let report = self
            .execute(spec, cx.progress(), Arc::clone(&kept))
            .await
            .map_err(|e| failure(op, &e))?;
        let code = report.exit_code;
        let valid = match op.meta.valid_exit_codes.as_slice() {
            [] => code == 0,
            codes => codes.iter().any(|c| i64::from(*c) == i64::from(code)),
        };
        let written = kept.take_written();
        if !valid {
            return Err(exit_error(op, &report).into());
        }
        let recursive = op.meta.remove_mount_stubs_recursive;
        let description = op.meta.args.join(" ");
        let committed = blocking(move |stop| commit(written, &report.stubs, recursive, &description, stop)).await?;
        drop(kept);

        let mut outputs: Vec<Option<LayerRef>> = vec![None; op.outputs() as usize];
        for mount in &op.mounts {
            // A read-only mount passes its input through.
            if let Some(slot) = mount.output_index().and_then(|o| outputs.get_mut(o as usize))
                && let Some(input) = mount.input.and_then(|i| inputs.get(i as usize))
            {
                slot.clone_from(input);
            }
        }
        for (output, layer) in committed {
            if let Some(slot) = outputs.get_mut(output as usize) {
                *slot = Some(layer);
            }
        }
        Ok(outputs)
    }

    /// Realises the inputs that are mounted, all at once.
    async fn realize(
        &self,
        op: &ExecOp,
        inputs: &[Option<LayerRef>],
        ctx: &RealizeCtx,
    ) -> Result<Vec<Option<Input>>, ExecFailed> {
        let used = |index: usize| {
            let mounted = |m: &kiln_llb::op::ExecMount| {
                matches!(m.mount_type, MountType::Bind | MountType::Cache)
                    && m.input == InputIndex::try_from(index).ok()
            };
            op.mounts.iter().any(mounted)
        };
        let work = inputs.iter().enumerate().map(|(index, layer)| async move {
            let Some(layer) = layer.as_ref().filter(|_| used(index)) else {
                return Ok(None);
            };
            match self.store.realize(Some(layer), ctx).await {
                Ok(view) => Ok(Some(Input {
                    layer: layer.clone(),
                    view,
                })),
                Err(error) if is_lost(&error) => Err(ExecFailed::InputLost(index)),
                Err(error) => Err(ExecFailed::Failed(error.into())),
            }
        });
        futures::future::try_join_all(work).await
    }

    fn spec(&self, op: &ExecOp, mounts: Mounts, secret_variables: Vec<String>) -> ProcessSpec {
        let meta = &op.meta;
        let net = match op.network {
            NetMode::Host => ProcessNet::Host,
            NetMode::None => ProcessNet::None,
            NetMode::Unset if self.settings.isolated_network => ProcessNet::None,
            NetMode::Unset => ProcessNet::Host,
        };
        let hostname = if meta.hostname.is_empty() {
            HOST_NAME
        } else {
            &meta.hostname
        };
        let mut spec = ProcessSpec::new(mounts.root, meta.args.clone());
        spec.root_readonly = mounts.root_readonly;
        spec.mounts = mounts.below;
        spec.env.clone_from(&meta.env);
        if let Some(proxy) = &meta.proxy_env {
            spec.env.extend(surroundings::proxy_variables(proxy));
        }
        spec.env.extend(secret_variables);
        spec.cwd.clone_from(&meta.cwd);
        spec.user.clone_from(&meta.user);
        spec.hostname = hostname.to_owned();
        spec.hosts = Some(surroundings::hosts(hostname, &meta.extra_hosts));
        spec.resolv_conf = Some(surroundings::resolv_conf(&self.settings.dns, net == ProcessNet::Host));
        spec.net = net;
        spec.security = match op.security {
            SecurityMode::Sandbox => ProcessSecurity::Sandbox,
            SecurityMode::Insecure => ProcessSecurity::Insecure,
        };
        let limit = |u: &kiln_llb::op::Ulimit| Ulimit {
            name: u.name.clone(),
            soft: u.soft,
            hard: u.hard,
        };
        spec.ulimits = meta.ulimit.iter().map(limit).collect();
        spec.cgroup_parent = if meta.cgroup_parent.is_empty() {
            self.settings.cgroup_parent.clone()
        } else {
            meta.cgroup_parent.clone()
        };
        spec.resources = self.settings.resources.clone();
        spec
    }

    /// Runs, and writes both outputs to the step's log while it does.
    async fn execute(&self, spec: ProcessSpec, log: &Reporter, kept: Arc<Kept>) -> Result<ExitReport, ExecError> {
        let (out, stdout) = mpsc::channel(4);
        let (err, stderr) = mpsc::channel(4);
        let run = self.executor.run(spec, ProcessIo::channels(out, err), Held::new(kept));
        let (report, (), ()) = tokio::join!(
            run,
            write_log(stdout, LogStream::Stdout, log),
            write_log(stderr, LogStream::Stderr, log)
        );
        report
    }
}

async fn write_log(mut chunks: mpsc::Receiver<bytes::Bytes>, stream: LogStream, log: &Reporter) {
    let mut warned = false;
    while let Some(chunk) = chunks.recv().await {
        // A log that cannot be written does not fail the step.
        if let Err(error) = log.log(stream, &chunk)
            && !std::mem::replace(&mut warned, true)
        {
            tracing::warn!(%error, "output of a step is lost");
        }
    }
}

/// Clears mount targets away and turns snapshots that are outputs into layers. The others are dropped.
fn commit(
    written: Vec<Written>,
    stubs: &[Stub],
    recursive: bool,
    description: &str,
    stop: &Stop,
) -> Result<Vec<(u32, LayerRef)>, OpError> {
    let mut layers = Vec::new();
    for written in written {
        let Some(output) = written.output else { continue };
        if written.dest == "/"
            && let Some(dir) = written.writable_dir()
        {
            clean_stubs(dir, stubs, recursive)
                .map_err(|e| OpError::internal(format!("cannot remove mount targets: {e}")).because(e))?;
        }
        let Written {
            snapshot, root, dest, ..
        } = written;
        root.seal(stop)?;
        let meta = LayerMeta {
            description: format!("mount {dest} from exec {description}"),
            ..LayerMeta::default()
        };
        layers.push((output, snapshot.commit(meta)?));
    }
    Ok(layers)
}

/// `process "…" did not complete successfully`.
fn unsuccessful(op: &ExecOp) -> String {
    format!(
        "process {} did not complete successfully",
        quote(&op.meta.args.join(" "))
    )
}

fn exit_error(op: &ExecOp, report: &ExitReport) -> OpError {
    let mut text = format!("{}: exit code: {}", unsuccessful(op), report.exit_code);
    if report.oom_killed {
        text.push_str(": cannot allocate memory");
    }
    OpError::exit(text, report.exit_code)
}

/// What kept a process from running, or from being watched to its end.
fn failure(op: &ExecOp, error: &ExecError) -> OpError {
    let kind = match error {
        ExecError::Setup {
            step: Step::User | Step::Exec | Step::Source | Step::Cwd | Step::Target | Step::Ulimit,
            ..
        }
        | ExecError::Invalid(_) => ErrorKind::User,
        _ => ErrorKind::Internal,
    };
    let text = format!("{}: {error}", unsuccessful(op));
    match error {
        // What a shell answers.
        ExecError::Setup {
            step: Step::Exec,
            errno: ENOENT,
            ..
        } => OpError::exit(text, 127),
        ExecError::Setup { step: Step::Exec, .. } => OpError::exit(text, 126),
        _ => OpError::new(kind, text),
    }
}

const ENOENT: i32 = 2;

/// A string in double quotes as Go writes it (`%q`): clients compare this text.
fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\u{b}' => out.push_str("\\v"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
            // Unprintable: what Rust escapes, too, apart from combining marks and quotes.
            c if c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{feff}') => {
                out.push_str(&format!("\\u{:04x}", c as u32));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_is_gos() {
        assert_eq!(
            quote("/bin/sh -c echo \"a\\b\"\n\ttrue é \u{1}"),
            "\"/bin/sh -c echo \\\"a\\\\b\\\"\\n\\ttrue é \\x01\""
        );
    }

    #[test]
    fn failures_say_what_the_reference_says() {
        let mut op = ExecOp::default();
        op.meta.args = vec!["/bin/sh".into(), "-c".into(), "exit 3".into()];
        assert_eq!(
            unsuccessful(&op),
            "process \"/bin/sh -c exit 3\" did not complete successfully"
        );
    }
}
