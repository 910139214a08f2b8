//! From a step's mounts to what the executor mounts: snapshots that receive writes, layers to read, secrets, agents.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use kiln_executor::{FileMount, MountFlags, MountKind, MountSpec, Overlay, RootMount};
use kiln_llb::op::{ExecMount, ExecOp, MountType, OutputIndex};
use kiln_session::ssh::AgentSocket;
use kiln_session::{SessionError, SessionErrorKind, SessionId, SessionManager};
use kiln_solver::{TeardownGuard, WorkerError as _};
use kiln_store::{ActiveSnapshot, LayerRef, Store, Tenant, View};

use crate::cache_mounts::TakenCache;
use crate::error::OpError;
use crate::snapshot;

/// Everything a running step needs to stay, dropped when its process tree is dead and reaped.
#[derive(Default)]
pub(crate) struct Kept {
    pub(crate) views: Vec<View>,
    pub(crate) caches: Vec<TakenCache>,
    pub(crate) sockets: Vec<AgentSocket>,
    pub(crate) socket_dir: Option<tempfile::TempDir>,
    /// Taken out again when the step succeeded.
    pub(crate) written: Mutex<Vec<Written>>,
    pub(crate) _teardown: Option<TeardownGuard>,
}

impl Kept {
    /// The snapshots, for committing or dropping.
    pub(crate) fn take_written(&self) -> Vec<Written> {
        std::mem::take(&mut *self.written.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A snapshot that receives what the step writes below one mount.
pub(crate) struct Written {
    pub(crate) snapshot: ActiveSnapshot,
    pub(crate) dest: String,
    /// The output that it becomes; without one it is thrown away.
    pub(crate) output: Option<OutputIndex>,
}

/// What clients provided, fetched before anything is made.
#[derive(Default)]
pub(crate) struct FromClients {
    /// Values by position of the secret mount; missing optional ones are absent.
    pub(crate) secrets: Vec<(usize, Bytes)>,
    /// Variables from secrets.
    pub(crate) variables: Vec<String>,
    /// Sessions by position of the ssh mount.
    pub(crate) agents: Vec<(usize, SessionId)>,
}

/// Asks the job's sessions for secrets and agents. A required one that nobody has is an error.
pub(crate) async fn ask_clients(
    sessions: &SessionManager,
    group: &[SessionId],
    op: &ExecOp,
) -> Result<FromClients, OpError> {
    let mut got = FromClients::default();
    for (index, mount) in op.mounts.iter().enumerate() {
        match mount.mount_type {
            MountType::Secret => {
                let options = mount.secret.clone().unwrap_or_default();
                if options.id.is_empty() {
                    return Err(OpError::user(format!("secret mount {} has no id", mount.dest)));
                }
                match secret(sessions, group, &options.id).await? {
                    Some(value) => got.secrets.push((index, value)),
                    None if options.optional => {}
                    None => return Err(missing_secret(&options.id)),
                }
            }
            MountType::Ssh => {
                let options = mount.ssh.clone().unwrap_or_default();
                let found = sessions.any(group, |s| {
                    let id = options.id.clone();
                    async move { s.check_agent(&id).await.map(|()| s.id().clone()) }
                });
                match found.await {
                    Ok(session) => got.agents.push((index, session)),
                    Err(_) if options.optional => {}
                    Err(error) => return Err(error.into()),
                }
            }
            MountType::Bind | MountType::Cache | MountType::Tmpfs => {}
        }
    }
    for variable in &op.secret_env {
        let value = match secret(sessions, group, &variable.id).await? {
            Some(value) => value,
            None if variable.optional => Bytes::new(),
            None => return Err(missing_secret(&variable.id)),
        };
        let value = std::str::from_utf8(&value)
            .map_err(|_| OpError::user(format!("secret {} is not text and cannot be a variable", variable.id)).personal())?;
        got.variables.push(format!("{}={value}", variable.name));
    }
    Ok(got)
}

fn missing_secret(id: &str) -> OpError {
    OpError::user(format!("secret {id}: not found")).personal()
}

async fn secret(sessions: &SessionManager, group: &[SessionId], id: &str) -> Result<Option<Bytes>, OpError> {
    let asked = sessions.any(group, |s| async move {
        // A session without the secret is no answer while another one may have it.
        s.secret(id).await?.ok_or_else(|| SessionError::Unsupported(String::new()))
    });
    match asked.await {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.kind() {
            SessionErrorKind::Unsupported | SessionErrorKind::NotFound => Ok(None),
            SessionErrorKind::Gone if group.is_empty() => Ok(None),
            _ => Err(error.into()),
        },
    }
}

/// What the executor is to mount.
pub(crate) struct Mounts {
    pub(crate) root: RootMount,
    pub(crate) root_readonly: bool,
    pub(crate) below: Vec<MountSpec>,
}

/// An input of the step, realised.
#[derive(Clone)]
pub(crate) struct Input {
    pub(crate) layer: LayerRef,
    pub(crate) view: View,
}

/// Makes snapshots, sockets and the list of mounts. Blocks; `kept` receives whatever must live as long as the step.
pub(crate) fn prepare(
    store: &Arc<Store>,
    tenant: &Tenant,
    op: &ExecOp,
    inputs: &[Option<Input>],
    clients: &FromClients,
    sessions: &SessionManager,
    kept: &mut Kept,
) -> Result<Mounts, OpError> {
    let mut root = None;
    let mut below = Vec::new();
    let mut order: Vec<(usize, &ExecMount)> = op.mounts.iter().enumerate().collect();
    order.sort_by(|(_, a), (_, b)| a.dest.cmp(&b.dest));
    for (index, mount) in order {
        let input = mount.input.and_then(|i| inputs.get(i as usize)).and_then(Option::as_ref);
        match mount.mount_type {
            MountType::Bind if mount.dest == "/" => {
                root = Some(RootMount::Overlay(writable(store, tenant, mount, input, kept)?));
            }
            MountType::Bind => {
                let selector = mount.selector.clone();
                let fresh = !mount.readonly || input.is_none();
                let kind = match input {
                    Some(input) if !fresh => {
                        kept.views.push(input.view.clone());
                        MountKind::Overlay { overlay: reading(&input.view), selector }
                    }
                    input => MountKind::Overlay { overlay: writable(store, tenant, mount, input, kept)?, selector },
                };
                let spec = MountSpec::new(mount.dest.clone(), kind);
                below.push(if mount.readonly { spec.readonly() } else { spec });
            }
            MountType::Cache => {
                let Some(taken) = kept.caches.iter().find(|c| c.index == index) else { continue };
                let source = taken.mount.path().to_owned();
                let spec = MountSpec::new(mount.dest.clone(), MountKind::Bind { source, selector: mount.selector.clone() });
                below.push(if mount.readonly { spec.readonly() } else { spec });
            }
            MountType::Tmpfs => {
                let size = mount.tmpfs.as_ref().and_then(|t| u64::try_from(t.size).ok()).filter(|s| *s > 0);
                let mut spec = MountSpec::new(mount.dest.clone(), MountKind::Tmpfs { size, mode: None });
                spec.flags.nosuid = true;
                below.push(spec);
            }
            MountType::Secret => {
                let Some((_, value)) = clients.secrets.iter().find(|(i, _)| *i == index) else { continue };
                let options = mount.secret.clone().unwrap_or_default();
                let mode = options.mode & 0o777;
                let file = FileMount { content: value.to_vec(), mode, uid: options.uid, gid: options.gid };
                let flags = MountFlags { nosuid: true, nodev: true, noexec: mode & 0o111 == 0 };
                below.push(MountSpec { dest: mount.dest.clone(), kind: MountKind::File(file), readonly: true, flags });
            }
            MountType::Ssh => {
                let Some((_, session)) = clients.agents.iter().find(|(i, _)| *i == index) else { continue };
                let source = agent_socket(mount, session, sessions, kept)?;
                below.push(MountSpec::new(mount.dest.clone(), MountKind::Bind { source, selector: String::new() }));
            }
        }
    }
    let root = root.ok_or_else(|| OpError::user("the process has no root mount"))?;
    let root_readonly = op.mounts.iter().any(|m| m.dest == "/" && m.readonly);
    Ok(Mounts { root, root_readonly, below })
}

fn reading(view: &View) -> Overlay {
    Overlay { lowers: snapshot::lowers(view), writable: None }
}

/// A new snapshot over the input.
fn writable(
    store: &Arc<Store>,
    tenant: &Tenant,
    mount: &ExecMount,
    input: Option<&Input>,
    kept: &mut Kept,
) -> Result<Overlay, OpError> {
    let scratch = View::scratch();
    let view = input.map_or(&scratch, |i| &i.view);
    let snapshot = store.new_active(tenant, input.map(|i| &i.layer), view)?;
    let overlay = snapshot::mount_overlay(&snapshot)?;
    kept.views.push(view.clone());
    let output = if mount.readonly { None } else { mount.output_index() };
    kept.written
        .get_mut()
        .unwrap_or_else(PoisonError::into_inner)
        .push(Written { snapshot, dest: mount.dest.clone(), output });
    Ok(overlay)
}

fn agent_socket(
    mount: &ExecMount,
    session: &SessionId,
    sessions: &SessionManager,
    kept: &mut Kept,
) -> Result<PathBuf, OpError> {
    let options = mount.ssh.clone().unwrap_or_default();
    let failed = |what: &str, e: std::io::Error| OpError::internal(format!("cannot {what} ssh agent socket: {e}"));
    if kept.socket_dir.is_none() {
        // Not in the state directory: paths of sockets are short.
        kept.socket_dir = Some(tempfile::Builder::new().prefix("kiln-ssh-").tempdir().map_err(|e| failed("make", e))?);
    }
    let Some(dir) = &kept.socket_dir else { return Err(OpError::internal("no directory for sockets".to_owned())) };
    let path = dir.path().join(kept.sockets.len().to_string());
    let session = sessions.try_get(session).ok_or_else(|| OpError::from(SessionError::NoActiveSessions))?;
    let socket = session.forward_agent(&options.id, path.clone())?;
    let mode = if options.mode & 0o777 == 0 { 0o600 } else { options.mode & 0o777 };
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).map_err(|e| failed("set mode of", e))?;
    std::os::unix::fs::chown(&path, Some(options.uid), Some(options.gid)).map_err(|e| failed("set owner of", e))?;
    kept.sockets.push(socket);
    Ok(path)
}
