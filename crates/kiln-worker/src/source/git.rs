//! `git://`: a commit of a repository, by the `git` program.
//!
//! What was fetched is kept in a bare repository per address, so that the next build fetches only what is new. The commit
//! is laid out from an index, without a work tree of its own; only where `.git` is wanted or submodules are there a clone
//! is made. Nothing of the host's git configuration is read, and credentials travel in the environment, never in
//! arguments.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use kiln_llb::Vertex;
use kiln_llb::op::SourceOp;
use kiln_solver::{OpContext, WorkerError as _};
use kiln_store::{ContextDir, LayerMeta, LayerRef, OverlayFs, RecordType, Snapshotter as _, View};
use tokio::process::Command;

use super::git_remote::{Advertised, Found, Remote, scrub};
use super::remote::GitMeta;
use super::{Asker, Source, SourceInstance, SourceKey};
use crate::client::Pin;
use crate::error::{OpError, OpResult};
use crate::key::{GitKey, git_key};
use crate::layers::blocking;
use crate::worker::{LlbWorker, store_tenant};

/// Repositories.
#[derive(Debug)]
pub struct GitSource;

pub(super) struct GitInstance {
    worker: LlbWorker,
    remote: Remote,
    keep_git_dir: bool,
    skip_submodules: bool,
    checksum: String,
    mtime: String,
    token_secret: String,
    header_secret: String,
    found: Mutex<Option<Found>>,
}

impl Source for GitSource {
    fn schemes(&self) -> &'static [&'static str] {
        &["git"]
    }

    fn open(&self, worker: &LlbWorker, _: &Arc<Vertex>, op: &SourceOp) -> Result<Box<dyn SourceInstance>, OpError> {
        Ok(Box::new(GitInstance::new(worker, op)?))
    }
}

impl GitInstance {
    /// The repository that an operation names. No I/O.
    pub(super) fn new(worker: &LlbWorker, op: &SourceOp) -> Result<Self, OpError> {
        for unsupported in [
            "git.bundle",
            "git.checkoutbundle",
            "git.sig.pubkey",
            "git.mountsshsock",
            "git.knownsshhosts",
        ] {
            if op.attr(unsupported).is_some_and(|v| !v.is_empty()) {
                return Err(OpError::user(format!("{unsupported} is not supported by this daemon")));
            }
        }
        let mtime = op.attr("git.mtime").unwrap_or_default();
        if !matches!(mtime, "" | "checkout") {
            return Err(OpError::user(format!(
                "git.mtime `{mtime}` is not supported by this daemon"
            )));
        }
        let secret = |attr: &str, default: &str| op.attr(attr).unwrap_or(default).to_owned();
        Ok(Self {
            worker: worker.clone(),
            remote: Remote::parse(op)?,
            keep_git_dir: op.flag("git.keepgitdir"),
            skip_submodules: op.flag("git.skipsubmodules"),
            checksum: op.attr("git.checksum").unwrap_or_default().to_owned(),
            mtime: mtime.to_owned(),
            token_secret: secret("git.authtokensecret", ""),
            header_secret: secret("git.authheadersecret", ""),
            found: Mutex::default(),
        })
    }

    /// The header that authenticates towards the remote, if the client has one.
    async fn authorization(&self, asker: Asker<'_>) -> Result<Option<String>, OpError> {
        let host = self.remote.host();
        for (name, is_token) in [(&self.token_secret, true), (&self.header_secret, false)] {
            if name.is_empty() {
                continue;
            }
            for id in [format!("{name}.{host}"), name.clone()] {
                let asked = self.worker.any_session(asker, |session| {
                    let id = id.clone();
                    async move { session.secret(&id).await }
                });
                if let Some(value) = asked.await? {
                    let value = String::from_utf8_lossy(&value).trim().to_owned();
                    return Ok(Some(if is_token {
                        format!("basic {}", STANDARD.encode(format!("x-access-token:{value}")))
                    } else {
                        value
                    }));
                }
            }
        }
        Ok(None)
    }

    fn git(&self, authorization: Option<&str>) -> Git {
        let mut environment = Vec::new();
        if let Some(value) = authorization {
            environment.push(("GIT_CONFIG_COUNT".to_owned(), "1".to_owned()));
            environment.push((
                "GIT_CONFIG_KEY_0".to_owned(),
                format!("http.{}.extraheader", self.remote.origin()),
            ));
            environment.push(("GIT_CONFIG_VALUE_0".to_owned(), format!("Authorization: {value}")));
        }
        Git {
            environment,
            address: scrub(&self.remote.url),
        }
    }

    async fn resolve(&self, asker: Asker<'_>) -> Result<Found, OpError> {
        let found = self.look_up(asker).await?;
        if !self.checksum.is_empty()
            && !found.commit.starts_with(&self.checksum)
            && !found.object.starts_with(&self.checksum)
        {
            return Err(OpError::user(format!(
                "expected checksum to match {}, got {}",
                self.checksum, found.commit
            )));
        }
        Ok(found)
    }

    async fn look_up(&self, asker: Asker<'_>) -> Result<Found, OpError> {
        if let Some(commit) = self.remote.commit() {
            return Ok(Found {
                commit: commit.clone(),
                object: commit.clone(),
                reference: commit,
            });
        }
        let authorization = self.authorization(asker).await?;
        let git = self.git(authorization.as_deref());
        let listed = git.run(&["ls-remote", "--", &self.remote.url], None).await?;
        Advertised::parse(&listed).find(&self.remote.reference).ok_or_else(|| {
            let what = if self.remote.reference.is_empty() {
                "HEAD"
            } else {
                &self.remote.reference
            };
            OpError::missing(format!(
                "repository {} does not contain ref {what}",
                scrub(&self.remote.url)
            ))
        })
    }

    /// The bare repository of the address, with the commit in it, and the program that works on it.
    async fn repository(&self, asker: Asker<'_>, found: &Found) -> Result<(Git, ContextDir), OpError> {
        let authorization = self.authorization(asker).await?;
        let git = self.git(authorization.as_deref());
        let tenant = store_tenant(asker.tenant())?;
        let store = Arc::clone(self.worker.store());
        let key = format!("git:{}", self.remote.url);
        let description = format!("shared git repo for {}", scrub(&self.remote.url));
        let repository = blocking(move |stop| store.context(&tenant, &key, &description, stop)).await?;
        git.fetch(&repository.fs_path(), &self.remote.url, found).await?;
        Ok((git, repository))
    }

    /// What the reference stands for, and the objects themselves if they are wanted; only those make it fetch anything.
    pub(super) async fn meta(&self, asker: Asker<'_>, objects: bool) -> Result<GitMeta, OpError> {
        let found = self.resolve(asker).await?;
        let annotated = found.object != found.commit;
        let mut meta = GitMeta {
            checksum: found.object.clone(),
            reference: found.reference.clone(),
            commit_checksum: if annotated { found.commit.clone() } else { String::new() },
            ..GitMeta::default()
        };
        if objects {
            let (git, repository) = self.repository(asker, &found).await?;
            let bare = repository.fs_path();
            meta.commit_object = Some(git.object(&bare, "commit", &found.commit).await?);
            if annotated {
                meta.tag_object = Some(git.object(&bare, "tag", &found.object).await?);
            }
        }
        Ok(meta)
    }
}

#[async_trait]
impl SourceInstance for GitInstance {
    async fn key(&self, cx: &OpContext<LlbWorker>) -> Result<SourceKey, OpError> {
        let found = self.resolve(cx.into()).await?;
        for client in cx.clients() {
            let identifier = self.remote.display();
            client.pin(
                cx.vertex().digest,
                Pin {
                    identifier,
                    digest: found.commit.clone(),
                    platform: String::new(),
                },
            );
        }
        let key = git_key(&GitKey {
            commit: if self.keep_git_dir {
                found.object.clone()
            } else {
                found.commit.clone()
            },
            keep_git_dir: self.keep_git_dir,
            reference: found.reference.clone(),
            subdir: self.remote.subdir.clone(),
            skip_submodules: self.skip_submodules,
            mtime: self.mtime.clone(),
            bundle: false,
        });
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        Ok(SourceKey {
            keys: vec![key],
            transient: false,
        })
    }

    async fn fetch(&self, cx: &OpContext<LlbWorker>) -> OpResult<Option<LayerRef>> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(found) = found else {
            return Err(OpError::internal("a git source was fetched before it was keyed".into()).into());
        };
        let _permit = cx.permit().await;
        let (git, repository) = self.repository(cx.into(), &found).await?;
        let bare = repository.fs_path();
        let tenant = store_tenant(cx.tenant())?;
        let store = Arc::clone(self.worker.store());
        let (snapshot, out) = blocking(move |_| {
            let snapshot = store.new_active(&tenant, None, &View::scratch())?;
            let out = snapshot.builder()?;
            Ok::<_, OpError>((snapshot, out))
        })
        .await?;
        let files = out.fs_path();
        let submodules = !self.skip_submodules && git.has_submodules(&bare, &found.commit).await;
        if (self.keep_git_dir && self.remote.subdir.is_empty()) || (submodules && self.remote.subdir.is_empty()) {
            git.clone_into(&files, &bare, &self.remote.url, &found, submodules)
                .await?;
            if !self.keep_git_dir {
                blocking({
                    let files = files.clone();
                    move |_| {
                        remove_git_dirs(&files).map_err(|e| OpError::internal(format!("remove .git: {e}")).because(e))
                    }
                })
                .await?;
            }
        } else {
            git.lay_out(&files, &bare, &found.commit, &self.remote.subdir, snapshot.dir())
                .await?;
        }
        drop(repository);
        let description = format!("git snapshot for {}", self.remote.display());
        let layer = blocking(move |stop| {
            // A commit lies on nothing, so what was written is the layer whatever mounts this machine can do.
            OverlayFs.prepare(&View::scratch(), out, stop)?.seal(stop)?;
            snapshot.commit(LayerMeta {
                description,
                record_type: RecordType::Git,
                ..LayerMeta::default()
            })
        })
        .await?;
        Ok(Some(layer))
    }
}

/// Removes `.git` of the work tree and of all submodules. Directories are not followed through links.
fn remove_git_dirs(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if entry.file_name() == ".git" {
            if kind.is_dir() {
                std::fs::remove_dir_all(entry.path())?
            } else {
                std::fs::remove_file(entry.path())?
            }
        } else if kind.is_dir() {
            remove_git_dirs(&entry.path())?;
        }
    }
    Ok(())
}

/// The `git` program with an environment of its own.
struct Git {
    environment: Vec<(String, String)>,
    /// For messages.
    address: String,
}

impl Git {
    /// Runs git and returns the text it printed.
    async fn run(&self, args: &[&str], index: Option<&Path>) -> Result<String, OpError> {
        self.output(args, index)
            .await
            .map(|out| String::from_utf8_lossy(&out).into_owned())
    }

    /// Runs git and returns what it printed. Dropping the future kills it.
    async fn output(&self, args: &[&str], index: Option<&Path>) -> Result<Vec<u8>, OpError> {
        // Files are made as with umask 022 whatever the daemon's is.
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "umask 022; exec git \"$@\"",
            "git",
            "-c",
            "protocol.ext.allow=never",
            "-c",
            "gc.auto=0",
        ]);
        command.args(args);
        command.env_clear();
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        command.envs([
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
        ]);
        command.envs([
            ("HOME", "/dev/null"),
            ("LC_ALL", "C"),
            ("GIT_SSH_COMMAND", "ssh -F /dev/null -o BatchMode=yes"),
        ]);
        command.envs(self.environment.iter().map(|(k, v)| (k, v)));
        if let Some(index) = index {
            command.env("GIT_INDEX_FILE", index);
        }
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = command
            .output()
            .await
            .map_err(|e| OpError::unavailable(format!("git could not be started: {e}")).because(e))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let doing = args
            .iter()
            .find(|a| !a.starts_with('-') && !a.contains('/'))
            .copied()
            .unwrap_or("git");
        Err(OpError::user(format!(
            "failed to run git {doing} for {}: {}",
            self.address,
            scrub(said.trim())
        ))
        .personal())
    }

    /// Brings the commit into the bare repository, with as little history as the remote allows.
    async fn fetch(&self, bare: &Path, url: &str, found: &Found) -> Result<(), OpError> {
        let dir = format!("--git-dir={}", bare.display());
        if !bare.join("HEAD").exists() {
            self.run(&[&dir, "init", "--quiet", "--bare", "--initial-branch=master"], None)
                .await?;
        }
        let has = format!("{}^{{commit}}", found.commit);
        if self.run(&[&dir, "cat-file", "-e", &has], None).await.is_ok() {
            return Ok(());
        }
        let wanted = if found.reference.is_empty() {
            &found.commit
        } else {
            &found.reference
        };
        let shallow = self
            .run(
                &[
                    &dir,
                    "fetch",
                    "--quiet",
                    "--no-tags",
                    "--depth=1",
                    "--force",
                    "--",
                    url,
                    wanted,
                ],
                None,
            )
            .await;
        if shallow.is_ok() && self.run(&[&dir, "cat-file", "-e", &has], None).await.is_ok() {
            return Ok(());
        }
        // The reference moved meanwhile, or the remote gives out no single commits: ask for it, then for everything.
        let alone = self
            .run(
                &[
                    &dir,
                    "fetch",
                    "--quiet",
                    "--no-tags",
                    "--depth=1",
                    "--force",
                    "--",
                    url,
                    &found.commit,
                ],
                None,
            )
            .await;
        if alone.is_err() {
            let all = ["+refs/heads/*:refs/kiln/heads/*", "+refs/tags/*:refs/kiln/tags/*"];
            let unshallow = if bare.join("shallow").exists() {
                "--unshallow"
            } else {
                "--quiet"
            };
            self.run(
                &[
                    &dir, "fetch", "--quiet", "--force", unshallow, "--", url, all[0], all[1],
                ],
                None,
            )
            .await?;
        }
        self.run(&[&dir, "cat-file", "-e", &has], None)
            .await
            .map(drop)
            .map_err(|e| {
                OpError::missing(format!(
                    "repository {} does not contain commit {}",
                    self.address, found.commit
                ))
                .because(e)
            })
    }

    /// A commit or tag object as its digest is taken over it, without the header. Asks the repository only.
    async fn object(&self, bare: &Path, kind: &str, id: &str) -> Result<Bytes, OpError> {
        let dir = format!("--git-dir={}", bare.display());
        self.output(&[&dir, "cat-file", kind, id], None).await.map(Bytes::from)
    }

    async fn has_submodules(&self, bare: &Path, commit: &str) -> bool {
        let dir = format!("--git-dir={}", bare.display());
        self.run(&[&dir, "cat-file", "-e", &format!("{commit}:.gitmodules")], None)
            .await
            .is_ok()
    }

    /// Writes the files of a commit, or of one directory of it, without `.git`.
    async fn lay_out(
        &self,
        files: &Path,
        bare: &Path,
        commit: &str,
        subdir: &str,
        scratch: &Path,
    ) -> Result<(), OpError> {
        let dir = format!("--git-dir={}", bare.display());
        let index: PathBuf = scratch.join("index");
        let tree = format!("{commit}:{subdir}");
        self.run(&[&dir, "read-tree", &tree], Some(&index)).await.map_err(|e| {
            OpError::missing(format!("invalid git subdir {subdir}: it is no directory of {commit}")).because(e)
        })?;
        let (at, tree) = (files.display().to_string(), format!("--work-tree={}", files.display()));
        self.run(
            &["-C", &at, &dir, &tree, "checkout-index", "--all", "--force", "--quiet"],
            Some(&index),
        )
        .await?;
        Ok(())
    }

    /// Makes a shallow clone, as users get one, with submodules.
    async fn clone_into(
        &self,
        files: &Path,
        bare: &Path,
        url: &str,
        found: &Found,
        submodules: bool,
    ) -> Result<(), OpError> {
        let at = files.display().to_string();
        self.run(&["-C", &at, "init", "--quiet", "--initial-branch=master"], None)
            .await?;
        self.run(&["-C", &at, "remote", "add", "origin", url], None).await?;
        let from = bare.display().to_string();
        self.run(
            &[
                "-C",
                &at,
                "fetch",
                "--quiet",
                "--depth=1",
                "--update-shallow",
                "--",
                &from,
                &found.commit,
            ],
            None,
        )
        .await?;
        self.run(&["-C", &at, "checkout", "--quiet", "--detach", &found.commit], None)
            .await?;
        if submodules {
            let update = ["-C", &at, "submodule", "update", "--quiet", "--init", "--recursive"];
            let shallow: Vec<&str> = update.into_iter().chain(["--depth=1"]).collect();
            // Servers of plain files, and those that give out no single commits, have whole histories only.
            if let Err(shallow) = self.run(&shallow, None).await {
                tracing::debug!(address = self.address, error = %shallow, "submodules are fetched whole");
                self.run(&update, None).await?;
            }
        }
        self.run(&["-C", &at, "remote", "set-url", "origin", &scrub(url)], None)
            .await?;
        Ok(())
    }
}
