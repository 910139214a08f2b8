//! Disk usage, pruning, and the garbage collection that runs by itself.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::Stream;
use kiln_proto::control::{PruneRequest, UsageRecord};
use kiln_proto::worker::GcPolicy as WireGcPolicy;
use kiln_store::{GcPolicy, RecordType, Stop, Store, StoreError, Tenant, Time, UsageRecord as Usage};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::Daemon;
use crate::config::{Config, GcRule};
use crate::control::blocking;
use crate::filter::{Fields, Filter};
use crate::progress::timestamp;
use crate::size::DiskSpace;
use crate::status::WireError;

fn store_error(error: &StoreError) -> WireError {
    match error {
        StoreError::Canceled => WireError::canceled(),
        other => WireError::new(tonic::Code::Internal, other.to_string()),
    }
}

fn field(record: &Usage, path: &str) -> Option<String> {
    let presence = |yes: bool| if yes { "true".to_owned() } else { String::new() };
    Some(match path {
        "id" => record.id.clone(),
        "parents" => record.parents.join(";"),
        "description" => record.description.clone(),
        "type" => record.record_type.to_string(),
        "inuse" => presence(record.in_use),
        "mutable" => presence(record.mutable),
        "immutable" => presence(!record.mutable),
        "shared" => presence(record.shared),
        "private" => presence(!record.shared),
        _ => return None,
    })
}

struct ByField<'a>(&'a Usage);

impl Fields for ByField<'_> {
    fn field(&self, path: &str) -> Option<String> {
        field(self.0, path)
    }
}

fn wire(record: &Usage) -> UsageRecord {
    UsageRecord {
        id: record.id.clone(),
        mutable: record.mutable,
        in_use: record.in_use,
        size: i64::try_from(record.size).unwrap_or(i64::MAX),
        parent: String::new(),
        created_at: Some(time(record.created_at)),
        last_used_at: record.last_used.map(time),
        usage_count: i64::try_from(record.usage_count).unwrap_or(i64::MAX),
        description: record.description.clone(),
        record_type: record.record_type.to_string(),
        shared: record.shared,
        parents: record.parents.clone(),
    }
}

fn system_time(time: Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(time.0).unwrap_or(0))
}

fn time(time: Time) -> kiln_proto::Timestamp {
    timestamp(system_time(time))
}

/// Nanoseconds as the wire has them; negative ones are none.
fn duration(nanoseconds: i64) -> Duration {
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0))
}

/// Records that match, and that were not used for `age` nanoseconds if that is given.
pub async fn list(daemon: &Arc<Daemon>, filter: &[String], age: i64) -> Result<Vec<UsageRecord>, WireError> {
    let filter = Filter::parse(filter).map_err(|e| WireError::invalid(e.to_string()))?;
    let (store, age) = (Arc::clone(daemon.store()), duration(age));
    blocking(move || {
        let now = SystemTime::now();
        let old_enough = |r: &Usage| {
            let used = system_time(r.last_used.unwrap_or(r.created_at));
            age.is_zero() || now.duration_since(used).unwrap_or_default() >= age
        };
        let records = store.usage(&Tenant::default());
        Ok(records
            .iter()
            .filter(|r| filter.matches(&ByField(r)) && old_enough(r))
            .map(wire)
            .collect())
    })
    .await
}

/// Removes what the request selects; yields what is removed as it goes. Dropping the stream stops it.
pub async fn prune(
    daemon: &Arc<Daemon>,
    request: PruneRequest,
) -> Result<impl Stream<Item = Result<UsageRecord, WireError>> + Send + use<>, WireError> {
    let filter = Filter::parse(&request.filter).map_err(|e| WireError::invalid(e.to_string()))?;
    let space = |n: i64| u64::try_from(n).unwrap_or(0);
    let policy = GcPolicy {
        all: request.all,
        keep_duration: duration(request.keep_duration),
        reserved_space: space(request.reserved_space),
        max_used_space: space(request.max_used_space),
        min_free_space: space(request.min_free_space),
        types: Vec::new(),
    };
    let store = Arc::clone(daemon.store());
    let (send, receive) = mpsc::channel(64);
    tokio::task::spawn_blocking(move || {
        let stop = Stop::default();
        let result = store.prune(
            &Tenant::default(),
            &policy,
            &|r| filter.matches(&ByField(r)),
            &stop,
            &mut |r| {
                if send.blocking_send(Ok(wire(r))).is_err() {
                    stop.stop();
                }
            },
        );
        match result {
            Ok(_) | Err(StoreError::Canceled) => {}
            // A client that is gone needs no answer.
            Err(error) => drop(send.blocking_send(Err(store_error(&error)))),
        }
    });
    Ok(ReceiverStream::new(receive))
}

/// A rule with its filter parsed and its sizes in bytes.
#[derive(Clone)]
struct Rule {
    policy: GcPolicy,
    filter: Filter,
    texts: Vec<String>,
}

/// Collects garbage a second after a build, at most once a minute.
pub struct Collector {
    rules: Vec<Rule>,
    enabled: bool,
    wake: Arc<Notify>,
    store: Arc<Store>,
}

const AFTER_BUILD: Duration = Duration::from_secs(1);
const AT_MOST_EVERY: Duration = Duration::from_secs(60);

impl Collector {
    /// The rules of the configuration, or the defaults for the disk.
    pub fn new(config: &Config, store: &Arc<Store>) -> Result<Self, WireError> {
        let disk = rustix::fs::statvfs(store.root())
            .ok()
            .map(|s| s.f_blocks.saturating_mul(s.f_frsize));
        let rules = if config.gc_rules.is_empty() {
            default_rules(config, disk)
        } else {
            config.gc_rules.clone()
        };
        let rules = rules
            .iter()
            .map(|rule| {
                let filter = Filter::parse(&rule.filters).map_err(|e| WireError::invalid(e.to_string()))?;
                let bytes = |s: Option<DiskSpace>| s.map_or(0, |s| s.bytes(disk));
                let policy = GcPolicy {
                    all: rule.all,
                    keep_duration: rule.keep,
                    reserved_space: bytes(rule.reserved),
                    max_used_space: bytes(rule.max_used),
                    min_free_space: bytes(rule.min_free),
                    types: Vec::new(),
                };
                Ok(Rule {
                    policy,
                    filter,
                    texts: rule.filters.clone(),
                })
            })
            .collect::<Result<_, WireError>>()?;
        Ok(Self {
            rules,
            enabled: config.gc,
            wake: Arc::new(Notify::new()),
            store: Arc::clone(store),
        })
    }

    /// The rules as clients are told.
    pub fn policies(&self) -> Vec<WireGcPolicy> {
        if !self.enabled {
            return Vec::new();
        }
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.rules
            .iter()
            .map(|rule| WireGcPolicy {
                all: rule.policy.all,
                keep_duration: i64::try_from(rule.policy.keep_duration.as_nanos()).unwrap_or(i64::MAX),
                reserved_space: number(rule.policy.reserved_space),
                filters: rule.texts.clone(),
                max_used_space: number(rule.policy.max_used_space),
                min_free_space: number(rule.policy.min_free_space),
            })
            .collect()
    }

    /// A build has ended.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Runs until the daemon stops.
    pub fn run(&self, shutdown: CancellationToken) -> impl Future<Output = ()> + Send + use<> {
        let (rules, enabled) = (self.rules.clone(), self.enabled);
        let (wake, store) = (Arc::clone(&self.wake), Arc::clone(&self.store));
        async move {
            if !enabled {
                return;
            }
            let stopping = shutdown.clone();
            let work = async {
                loop {
                    wake.notified().await;
                    tokio::time::sleep(AFTER_BUILD).await;
                    let (rules, store, stop) = (rules.clone(), Arc::clone(&store), Stop::default());
                    // Stops the blocking half when the daemon does.
                    let _guard = stop.guard();
                    let stop = stop.clone();
                    let collected = blocking(move || collect(&store, &rules, &stop)).await;
                    match collected {
                        Ok(0) => {}
                        Ok(bytes) => tracing::info!(bytes, "garbage collected"),
                        Err(error) => tracing::error!(%error, "garbage collection failed"),
                    }
                    tokio::time::sleep(AT_MOST_EVERY).await;
                }
            };
            tokio::select! {
                () = work => {}
                () = stopping.cancelled() => {}
            }
        }
    }
}

fn collect(store: &Arc<Store>, rules: &[Rule], stop: &Stop) -> Result<u64, WireError> {
    let mut freed = 0;
    for rule in rules {
        let wanted = |r: &Usage| rule.filter.matches(&ByField(r));
        freed += store
            .prune(&Tenant::default(), &rule.policy, &wanted, stop, &mut |_| {})
            .map_err(|e| store_error(&e))?;
    }
    Ok(freed)
}

/// Contexts, cache mounts and checkouts go first, then what is old, then what is too much.
fn default_rules(config: &Config, disk: Option<u64>) -> Vec<GcRule> {
    let (reserved, free, max) = config.gc_limits;
    let at_most = |share: u64, limit: u64| {
        let share = DiskSpace::Percent(share).bytes(disk);
        DiskSpace::Bytes(share.min(limit))
    };
    let reserved = Some(reserved.unwrap_or_else(|| at_most(10, 10_000_000_000)));
    let free = Some(free.unwrap_or(DiskSpace::Percent(20)));
    let max = Some(max.unwrap_or_else(|| at_most(80, 100_000_000_000)));
    let transient = [RecordType::Local, RecordType::CacheMount, RecordType::Git];
    vec![
        GcRule {
            filters: transient.iter().map(|t| format!("type=={t}")).collect(),
            keep: Duration::from_secs(48 * 3600),
            max_used: Some(DiskSpace::Bytes(512_000_000)),
            ..GcRule::default()
        },
        GcRule {
            keep: Duration::from_secs(60 * 24 * 3600),
            reserved,
            max_used: max,
            min_free: free,
            ..GcRule::default()
        },
        GcRule {
            reserved,
            max_used: max,
            min_free: free,
            ..GcRule::default()
        },
        GcRule {
            all: true,
            reserved,
            max_used: max,
            min_free: free,
            ..GcRule::default()
        },
    ]
}
