//! From a step's mounts to what the executor mounts: snapshots that receive writes, layers to read, secrets, agents.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use kiln_executor::{FileMount, MountFlags, MountKind, MountSpec, Overlay, OverlayWritable, RootMount};
use kiln_llb::op::{ExecMount, ExecOp, MountType, OutputIndex};
use kiln_session::ssh::AgentSocket;
use kiln_session::{SessionError, SessionErrorKind, SessionId, SessionManager};
use kiln_solver::{TeardownGuard, WorkerError as _};
use kiln_store::{ActiveRoot, ActiveSnapshot, LayerRef, Mount, Stop, Store, Tenant, View};

use crate::cache_mounts::TakenCache;
use crate::error::OpError;

/// Everything a running step needs to stay, dropped when its process tree is dead and reaped.
#[derive(Default)]
pub(crate) struct Kept {
    pub(crate) views: Vec<View>,
    /// Directories that read-only mounts needed.
    pub(crate) scratch: Vec<ActiveSnapshot>,
    pub(crate) caches: Vec<TakenCache>,
    pub(crate) sockets: Vec<AgentSocket>,
    pub(crate) socket_dir: Option<tempfile::TempDir>,
    /// Taken out again when the step succeeded.
    pub(crate) written: Mutex<Vec<Written>>,
    pub(crate) _teardown: Option<TeardownGuard>,
}

impl Written {
    /// The directory that holds what the step wrote.
    pub(crate) fn writable_dir(&self) -> Option<&Path> {
        match self.root.mount() {
            Mount::Overlay { writable, .. } => writable.as_ref().map(|(upper, _)| upper.as_path()),
            Mount::Bind { path, .. } => Some(path),
        }
    }
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
    pub(crate) root: ActiveRoot,
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
        let value = std::str::from_utf8(&value).map_err(|_| {
            OpError::user(format!("secret {} is not text and cannot be a variable", variable.id)).personal()
        })?;
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
        s.secret(id)
            .await?
            .ok_or_else(|| SessionError::Unsupported(String::new()))
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

/// What mounts are made with and for.
pub(crate) struct Making<'a> {
    pub(crate) store: &'a Arc<Store>,
    pub(crate) tenant: &'a Tenant,
    pub(crate) sessions: &'a SessionManager,
    pub(crate) inputs: &'a [Option<Input>],
    pub(crate) clients: &'a FromClients,
    pub(crate) stop: &'a Stop,
    /// Receives whatever must live as long as the step.
    pub(crate) kept: &'a mut Kept,
}

/// Makes snapshots, sockets and the list of mounts. Blocks.
pub(crate) fn prepare(op: &ExecOp, mut making: Making<'_>) -> Result<Mounts, OpError> {
    let mut root = None;
    let mut below = Vec::new();
    let mut order: Vec<(usize, &ExecMount)> = op.mounts.iter().enumerate().collect();
    order.sort_by(|(_, a), (_, b)| a.dest.cmp(&b.dest));
    for (index, mount) in order {
        if mount.mount_type == MountType::Bind && mount.dest == "/" {
            root = Some(match making.writable(mount)? {
                Mount::Overlay { lowers, writable } => RootMount::Overlay(overlay(lowers, writable)),
                Mount::Bind { path, .. } => RootMount::Bind { path },
            });
        } else if let Some(spec) = making.mount(index, mount)? {
            below.push(spec);
        }
    }
    let root = root.ok_or_else(|| OpError::user("the process has no root mount"))?;
    let root_readonly = op.mounts.iter().any(|m| m.dest == "/" && m.readonly);
    Ok(Mounts {
        root,
        root_readonly,
        below,
    })
}

impl Making<'_> {
    /// One mount below the root; nothing for what is optional and absent.
    fn mount(&mut self, index: usize, mount: &ExecMount) -> Result<Option<MountSpec>, OpError> {
        let spec = match mount.mount_type {
            MountType::Bind => {
                // Read-only without an input: an empty directory, which is a fresh one.
                let shown = match (mount.readonly, self.input(mount).cloned()) {
                    (true, Some(input)) => self.reading(&input)?,
                    _ => self.writable(mount)?,
                };
                let selector = mount.selector.clone();
                let kind = match shown {
                    Mount::Overlay { lowers, writable } => MountKind::Overlay {
                        overlay: overlay(lowers, writable),
                        selector,
                    },
                    Mount::Bind { path, .. } => MountKind::Bind { source: path, selector },
                };
                let spec = MountSpec::new(mount.dest.clone(), kind);
                if mount.readonly { spec.readonly() } else { spec }
            }
            MountType::Cache => {
                let Some(taken) = self.kept.caches.iter().find(|c| c.index == index) else {
                    return Ok(None);
                };
                let source = taken.mount.path().to_owned();
                let kind = MountKind::Bind {
                    source,
                    selector: mount.selector.clone(),
                };
                let spec = MountSpec::new(mount.dest.clone(), kind);
                if mount.readonly { spec.readonly() } else { spec }
            }
            MountType::Tmpfs => {
                let size = mount
                    .tmpfs
                    .as_ref()
                    .and_then(|t| u64::try_from(t.size).ok())
                    .filter(|s| *s > 0);
                let mut spec = MountSpec::new(mount.dest.clone(), MountKind::Tmpfs { size, mode: None });
                spec.flags.nosuid = true;
                spec
            }
            MountType::Secret => {
                let Some((_, value)) = self.clients.secrets.iter().find(|(i, _)| *i == index) else {
                    return Ok(None);
                };
                let options = mount.secret.clone().unwrap_or_default();
                let mode = options.mode & 0o777;
                let file = FileMount {
                    content: value.to_vec(),
                    mode,
                    uid: options.uid,
                    gid: options.gid,
                };
                let flags = MountFlags {
                    nosuid: true,
                    nodev: true,
                    noexec: mode & 0o111 == 0,
                };
                MountSpec {
                    dest: mount.dest.clone(),
                    kind: MountKind::File(file),
                    readonly: true,
                    flags,
                }
            }
            MountType::Ssh => {
                let Some((_, session)) = self.clients.agents.iter().find(|(i, _)| *i == index) else {
                    return Ok(None);
                };
                let source = agent_socket(mount, session, self.sessions, self.kept)?;
                MountSpec::new(
                    mount.dest.clone(),
                    MountKind::Bind {
                        source,
                        selector: String::new(),
                    },
                )
            }
        };
        Ok(Some(spec))
    }

    fn input(&self, mount: &ExecMount) -> Option<&Input> {
        self.inputs.get(mount.input? as usize)?.as_ref()
    }

    /// A new snapshot over the mount's input, writable.
    fn writable(&mut self, mount: &ExecMount) -> Result<Mount, OpError> {
        let (layer, view) = match self.input(mount) {
            Some(input) => (Some(input.layer.clone()), input.view.clone()),
            None => (None, View::scratch()),
        };
        let snapshot = self.store.new_active(self.tenant, layer.as_ref(), &view)?;
        let root = self
            .store
            .snapshotter()
            .prepare(&view, snapshot.builder()?, self.stop)?;
        let shown = root.mount().clone();
        let output = if mount.readonly { None } else { mount.output_index() };
        self.kept
            .written
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Written {
                snapshot,
                root,
                dest: mount.dest.clone(),
                output,
            });
        self.kept.views.push(view);
        Ok(shown)
    }

    /// An input as it is.
    fn reading(&mut self, input: &Input) -> Result<Mount, OpError> {
        let snapshot = self.store.new_active(self.tenant, None, &View::scratch())?;
        let scratch = snapshot.dir().join("scratch");
        std::fs::create_dir(&scratch)
            .map_err(|e| OpError::internal(format!("cannot make a directory for a mount: {e}")).because(e))?;
        let shown = self.store.snapshotter().read_only(&input.view, &scratch, self.stop)?;
        self.kept.scratch.push(snapshot);
        self.kept.views.push(input.view.clone());
        Ok(shown)
    }
}

fn overlay(lowers: Vec<PathBuf>, writable: Option<(PathBuf, PathBuf)>) -> Overlay {
    Overlay {
        lowers,
        writable: writable.map(|(upper, work)| OverlayWritable { upper, work }),
    }
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
        kept.socket_dir = Some(
            tempfile::Builder::new()
                .prefix("kiln-ssh-")
                .tempdir()
                .map_err(|e| failed("make", e))?,
        );
    }
    let Some(dir) = &kept.socket_dir else {
        return Err(OpError::internal("no directory for sockets".to_owned()));
    };
    let path = dir.path().join(kept.sockets.len().to_string());
    let session = sessions
        .try_get(session)
        .ok_or_else(|| OpError::from(SessionError::NoActiveSessions))?;
    let socket = session.forward_agent(&options.id, path.clone())?;
    let mode = if options.mode & 0o777 == 0 {
        0o600
    } else {
        options.mode & 0o777
    };
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).map_err(|e| failed("set mode of", e))?;
    std::os::unix::fs::chown(&path, Some(options.uid), Some(options.gid)).map_err(|e| failed("set owner of", e))?;
    kept.sockets.push(socket);
    Ok(path)
}
