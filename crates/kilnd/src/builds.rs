//! The builds the daemon knows: running ones, and those that ended a moment ago.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_frontend::bridge::FrontendResult;
use kiln_llb::{Definition, Graph};
use kiln_session::SessionId;
use kiln_solver::JobProgress;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::Job;
use crate::admission::Entitlements;
use crate::progress::Counter;
use crate::spool::Spool;
use crate::status::WireError;

/// How long a call waits for a build that its client has announced on another stream: calls of one client arrive in
/// any order.
pub const WAIT_FOR_BUILD: Duration = Duration::from_secs(3);

/// How long watching waits for its build.
pub const WAIT_FOR_STATUS: Duration = Duration::from_secs(6);

/// How long a build that ended can still be asked about.
const LINGER: Duration = Duration::from_secs(10);

/// A result within a build: a graph whose root is wanted, solved when somebody needs it and then once.
#[derive(Clone, Debug)]
pub struct BuildRef {
    /// What clients get to reproduce the result.
    pub definition: Arc<Definition>,
    /// The same, decoded and checked. Always has a root.
    pub graph: Graph,
}

/// What a build ends in before it is exported.
pub type BuildResult = FrontendResult<BuildRef>;

/// One build.
pub struct Build {
    /// The id its client chose.
    pub reference: String,
    /// Its values, until it ends: they hold leases that the next build must not wait for.
    job: Mutex<Option<Job>>,
    /// What happens in it.
    pub progress: Arc<JobProgress>,
    /// What it brought along for its operations.
    pub client: Arc<kiln_worker::Client>,
    /// Everything that is shown, on disk.
    pub spool: Spool,
    /// Its steps in numbers.
    pub counter: Counter,
    /// The client's session; empty if it has none.
    pub session: SessionId,
    /// Attributes of the request.
    pub attrs: BTreeMap<String, String>,
    /// Inputs for frontends.
    pub inputs: BTreeMap<String, Definition>,
    /// What its graphs may ask for.
    pub entitlements: Entitlements,
    /// Becomes canceled when the client gives up or the daemon stops.
    pub canceled: CancellationToken,
    /// What was looked at on the way, for provenance.
    pub trail: crate::provenance::Trail,
    refs: Mutex<HashMap<String, BuildRef>>,
    returned: watch::Sender<Option<Result<BuildResult, WireError>>>,
}

impl std::fmt::Debug for Build {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Build({})", self.reference)
    }
}

/// What a new build is made of.
pub struct NewBuild {
    /// The id its client chose.
    pub reference: String,
    /// Its values and progress.
    pub job: Job,
    /// Everything that is shown, on disk.
    pub spool: Spool,
    /// Its steps in numbers.
    pub counter: Counter,
    /// The client's session.
    pub session: SessionId,
    /// Attributes of the request.
    pub attrs: BTreeMap<String, String>,
    /// Inputs for frontends.
    pub inputs: BTreeMap<String, Definition>,
    /// What its graphs may ask for.
    pub entitlements: Entitlements,
}

impl Build {
    /// A build that nothing has happened to.
    pub fn new(new: NewBuild) -> Arc<Self> {
        let NewBuild {
            reference,
            job,
            spool,
            counter,
            session,
            attrs,
            inputs,
            entitlements,
        } = new;
        Arc::new(Self {
            reference,
            progress: Arc::clone(job.progress()),
            client: Arc::clone(job.client()),
            job: Mutex::new(Some(job)),
            spool,
            counter,
            session,
            attrs,
            inputs,
            entitlements,
            canceled: CancellationToken::new(),
            trail: Default::default(),
            refs: Mutex::default(),
            returned: watch::Sender::new(None),
        })
    }

    /// Its values, as long as it runs.
    pub fn job(&self) -> Result<Job, WireError> {
        let job = self.job.lock().unwrap_or_else(PoisonError::into_inner).clone();
        job.ok_or_else(|| WireError::new(tonic::Code::NotFound, format!("the build {} has ended", self.reference)))
    }

    fn refs(&self) -> MutexGuard<'_, HashMap<String, BuildRef>> {
        self.refs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a result an id that is valid until the build ends.
    pub fn register(&self, reference: BuildRef) -> String {
        let id = crate::random_id();
        self.refs().insert(id.clone(), reference);
        id
    }

    /// The result behind an id.
    pub fn lookup(&self, id: &str) -> Option<BuildRef> {
        self.refs().get(id).cloned()
    }

    /// Sets what the client says the build ends in. Only the first one counts.
    pub fn set_returned(&self, outcome: Result<BuildResult, WireError>) -> Result<(), WireError> {
        let mut first = false;
        self.returned.send_if_modified(|slot| {
            first = slot.is_none();
            if first {
                *slot = Some(outcome);
            }
            first
        });
        if first {
            Ok(())
        } else {
            Err(WireError::new(tonic::Code::Unknown, "gateway result is already set"))
        }
    }

    /// Waits for [`Build::set_returned`].
    pub async fn returned(&self) -> Result<BuildResult, WireError> {
        let mut receiver = self.returned.subscribe();
        let outcome = match receiver.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            // The sender lives as long as `self`.
            Err(_) => None,
        };
        outcome.unwrap_or_else(|| Err(WireError::canceled()))
    }

    /// The build has ended: forgets its values, so that what they keep alive can go, and ends its progress.
    pub fn end(&self) {
        self.refs().clear();
        let job = self.job.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.progress.finish();
        drop(job);
    }
}

/// All builds by id.
#[derive(Clone, Debug, Default)]
pub struct Builds(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    builds: Mutex<HashMap<String, Arc<Build>>>,
    changed: watch::Sender<u64>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            builds: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }
}

/// Keeps a build known; when dropped, the build lingers for a while and is then forgotten.
#[derive(Debug)]
pub struct Registered {
    builds: Builds,
    build: Arc<Build>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let (builds, build) = (self.builds.clone(), Arc::clone(&self.build));
        // Without a runtime the process is ending and there is nobody left to ask.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                tokio::time::sleep(LINGER).await;
                build.end();
                builds.lock().remove(&build.reference);
            });
        }
    }
}

impl Builds {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Build>>> {
        self.0.builds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a build of this id is known, so that no other can have it.
    pub fn contains(&self, reference: &str) -> bool {
        self.lock().contains_key(reference)
    }

    /// Makes a build known. Its id must be new.
    pub fn register(&self, build: Arc<Build>) -> Result<Registered, WireError> {
        {
            let mut builds = self.lock();
            if builds.contains_key(&build.reference) {
                return Err(already_exists(&build.reference));
            }
            builds.insert(build.reference.clone(), Arc::clone(&build));
        }
        self.0.changed.send_modify(|n| *n += 1);
        Ok(Registered {
            builds: self.clone(),
            build,
        })
    }

    /// The build of this id, if it is known.
    pub fn get(&self, reference: &str) -> Option<Arc<Build>> {
        self.lock().get(reference).cloned()
    }

    /// Waits until a build of this id is known.
    pub async fn wait(&self, reference: &str, limit: Duration) -> Result<Arc<Build>, WireError> {
        let mut changed = self.0.changed.subscribe();
        let found = tokio::time::timeout(limit, async {
            loop {
                if let Some(build) = self.get(reference) {
                    return Some(build);
                }
                if changed.changed().await.is_err() {
                    return None;
                }
            }
        })
        .await;
        match found {
            Ok(Some(build)) => Ok(build),
            _ => Err(WireError::new(
                tonic::Code::NotFound,
                format!("no such job {reference}"),
            )),
        }
    }

    /// Gives every build up.
    pub fn cancel_all(&self) {
        for build in self.lock().values() {
            build.canceled.cancel();
        }
    }
}

/// The error for an id that is taken.
pub fn already_exists(reference: &str) -> WireError {
    WireError::new(tonic::Code::AlreadyExists, format!("job ID {reference} exists"))
}
