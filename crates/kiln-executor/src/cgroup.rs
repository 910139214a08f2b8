//! Control groups: one per process in every hierarchy that helps, on v2, v1 and hybrid hosts; nothing where nothing may be made.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};

use crate::device::{DEVICE_RULES, device_program};
use crate::error::ExecError;
use crate::executor::Usage;
use crate::protocol::CgroupView;
use crate::spec::{Resources, SecurityMode};
use crate::sys;

/// Which control groups the executor uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CgroupPolicy {
    /// Whatever the host has.
    #[default]
    Auto,
    /// The v2 hierarchy only, even where v1 hierarchies exist.
    UnifiedOnly,
    /// None: no limits, no accounting.
    Off,
}

/// Directory of Kiln's groups below the parent.
const NAME: &str = "kiln";
/// Where the daemon's own processes go when their group must not hold processes (v2's "no internal processes" rule).
const DAEMON_LEAF: &str = "kiln-daemon";
/// v1 hierarchies in which each process gets a group.
const V1_ALWAYS: [&str; 5] = ["memory", "pids", "cpu", "cpuacct", "devices"];
const V2_CONTROLLERS: [&str; 5] = ["memory", "pids", "cpu", "io", "cpuset"];

/// A mounted hierarchy.
#[derive(Debug, Clone)]
struct Hierarchy {
    mount: PathBuf,
    /// v1 controllers; empty for v2.
    controllers: BTreeSet<String>,
    unified: bool,
}

/// The host's hierarchies, and what has been found out about them.
#[derive(Debug)]
pub(crate) struct Cgroups {
    hierarchies: Vec<Hierarchy>,
    rootless: bool,
    /// `pid-starttime` of this process: groups of dead daemons can be told from those of living ones.
    owner: String,
    enabled: Mutex<HashSet<PathBuf>>,
    warned: Mutex<HashSet<String>>,
    device_program: OnceLock<Option<OwnedFd>>,
}

impl Cgroups {
    /// Looks at the host, and removes groups that daemons which no longer live left behind.
    pub(crate) fn detect(policy: CgroupPolicy, rootless: bool) -> Self {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut hierarchies = match policy {
            CgroupPolicy::Off => Vec::new(),
            _ => parse_mounts(&table),
        };
        if policy == CgroupPolicy::UnifiedOnly {
            hierarchies.retain(|h| h.unified);
        }
        if rootless {
            // Only the daemon's own part of a tree may have been delegated to it.
            let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
            for hierarchy in &mut hierarchies {
                if let Some(path) = own_path(&own, hierarchy) {
                    let leaf = format!("/{DAEMON_LEAF}");
                    let path = path.strip_suffix(&leaf).unwrap_or(path);
                    hierarchy.mount = hierarchy.mount.join(path.trim_start_matches('/'));
                }
            }
        }
        let cgroups = Cgroups {
            hierarchies,
            rootless,
            owner: owner_name(std::process::id()).unwrap_or_else(|| "0-0".to_owned()),
            enabled: Mutex::default(),
            warned: Mutex::default(),
            device_program: OnceLock::new(),
        };
        cgroups.sweep();
        cgroups
    }

    /// What a process should see at `/sys/fs/cgroup`.
    pub(crate) fn view(&self) -> CgroupView {
        if self.hierarchies.iter().any(|h| !h.unified) {
            CgroupView::Legacy
        } else if self.hierarchies.is_empty() {
            CgroupView::None
        } else {
            CgroupView::Unified
        }
    }

    fn sweep(&self) {
        for hierarchy in &self.hierarchies {
            let Ok(entries) = fs::read_dir(hierarchy.mount.join(NAME)) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let Some((owner, _)) = name.rsplit_once('-') else {
                    continue;
                };
                let Some(pid) = owner.split('-').next().and_then(|p| p.parse().ok()) else {
                    continue;
                };
                if owner_name(pid).as_deref() != Some(owner) {
                    remove_dir(&entry.path());
                }
            }
        }
    }

    /// Makes the groups of one process. What the host does not allow is left out and logged once.
    pub(crate) fn create(
        &self,
        id: u64,
        parent: &str,
        resources: &Resources,
        security: SecurityMode,
    ) -> Result<Group, ExecError> {
        let parent = parent_path(parent)?.join(NAME);
        let mut group = Group {
            dirs: Vec::new(),
            devices_confined: security == SecurityMode::Insecure,
        };
        let mut satisfied = Satisfied::default();
        for hierarchy in &self.hierarchies {
            if !hierarchy.unified && !hierarchy.wanted(resources) {
                continue;
            }
            let base = hierarchy.mount.join(&parent);
            let path = base.join(format!("{}-{id}", self.owner));
            if let Err(e) = fs::create_dir_all(&base).and_then(|()| fs::create_dir(&path)) {
                self.warn_once("create", &base, &e);
                continue;
            }
            group.dirs.push(GroupDir {
                path: path.clone(),
                unified: hierarchy.unified,
            });
            if hierarchy.unified {
                self.enable(&hierarchy.mount, &parent);
                self.limit_v2(&path, resources, &mut satisfied);
            } else {
                self.limit_v1(&path, hierarchy, resources, &mut satisfied);
                if hierarchy.controllers.contains("devices") && !group.devices_confined {
                    match confine_devices_v1(&path) {
                        Ok(()) => group.devices_confined = true,
                        Err(e) => self.warn_once("confine devices in", &base, &e),
                    }
                }
            }
        }
        if !group.devices_confined
            && let Some(dir) = group.dirs.iter().find(|d| d.unified)
        {
            match self.confine_devices_v2(&dir.path) {
                Ok(()) => group.devices_confined = true,
                Err(e) if self.rootless => tracing::debug!("devices of control group: {e}"),
                Err(e) => self.warn_once("confine devices in", &dir.path, &e),
            }
        }
        for name in satisfied.missing(resources) {
            self.warn_text(
                name,
                &format!("limit of {name} ignored: no control group controller for it"),
            );
        }
        Ok(group)
    }

    fn warn_once(&self, attempt: &str, path: &Path, error: &io::Error) {
        let key = format!("{attempt} {}", path.display());
        self.warn_text(
            &key,
            &format!("cannot {key}: {error}; steps run without these limits and accounts"),
        );
    }

    fn warn_text(&self, key: &str, text: &str) {
        if self
            .warned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key.to_owned())
        {
            tracing::warn!("control groups: {text}");
        }
    }

    /// Turns controllers on for the children of every directory from the top to `parent`.
    fn enable(&self, mount: &Path, parent: &Path) {
        let mut dirs = vec![mount.to_owned()];
        for part in parent.components() {
            let next = dirs.last().map(|d| d.join(part)).unwrap_or_default();
            dirs.push(next);
        }
        for dir in dirs {
            if !self
                .enabled
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(dir.clone())
            {
                continue;
            }
            let available = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
            let control = dir.join("cgroup.subtree_control");
            for name in available.split_whitespace().filter(|c| V2_CONTROLLERS.contains(c)) {
                let mut outcome = fs::write(&control, format!("+{name}"));
                if outcome.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
                    && move_processes(&dir).is_ok()
                {
                    outcome = fs::write(&control, format!("+{name}"));
                }
                if let Err(e) = outcome {
                    self.warn_once(&format!("enable {name} in"), &dir, &e);
                }
            }
        }
    }

    fn limit_v2(&self, path: &Path, r: &Resources, satisfied: &mut Satisfied) {
        let mut set = |file: &str, value: Option<String>, what: &'static str| {
            if let Some(value) = value {
                satisfied.note(what, fs::write(path.join(file), value).is_ok());
            }
        };
        set("memory.max", r.memory.map(|m| m.to_string()), "memory");
        let swap = r.memory_swap.map(|s| match (u64::try_from(s), r.memory) {
            (Ok(both), Some(memory)) => both.saturating_sub(memory).to_string(),
            (Ok(both), None) => both.to_string(),
            (Err(_), _) => "max".to_owned(),
        });
        set("memory.swap.max", swap, "swap");
        set("cpu.weight", r.cpu_shares.map(|s| weight(s).to_string()), "cpu");
        if r.cpu_quota.is_some() || r.cpu_period.is_some() {
            let quota = match r.cpu_quota {
                Some(q) if q > 0 => q.to_string(),
                _ => "max".to_owned(),
            };
            set(
                "cpu.max",
                Some(format!("{quota} {}", r.cpu_period.unwrap_or(100_000))),
                "cpu",
            );
        }
        set("cpuset.cpus", r.cpuset_cpus.clone(), "cpuset");
        set("cpuset.mems", r.cpuset_mems.clone(), "cpuset");
        set("pids.max", r.pids.map(|p| p.to_string()), "pids");
    }

    fn limit_v1(&self, path: &Path, hierarchy: &Hierarchy, r: &Resources, satisfied: &mut Satisfied) {
        let has = |name: &str| hierarchy.controllers.contains(name);
        let mut set = |file: &str, value: Option<String>, what: &'static str| {
            if let Some(value) = value {
                satisfied.note(what, fs::write(path.join(file), value).is_ok());
            }
        };
        if has("memory") {
            set("memory.limit_in_bytes", r.memory.map(|m| m.to_string()), "memory");
            set(
                "memory.memsw.limit_in_bytes",
                r.memory_swap.map(|m| m.to_string()),
                "swap",
            );
        }
        if has("cpu") {
            set("cpu.shares", r.cpu_shares.map(|s| s.to_string()), "cpu");
            set("cpu.cfs_period_us", r.cpu_period.map(|p| p.to_string()), "cpu");
            set("cpu.cfs_quota_us", r.cpu_quota.map(|q| q.to_string()), "cpu");
        }
        if has("pids") {
            set("pids.max", r.pids.map(|p| p.to_string()), "pids");
        }
        if has("cpuset") {
            // A fresh group has neither cores nor nodes, and nobody can enter it.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                inherit_cpuset(path, &hierarchy.mount, file);
            }
            set("cpuset.cpus", r.cpuset_cpus.clone(), "cpuset");
            set("cpuset.mems", r.cpuset_mems.clone(), "cpuset");
        }
    }

    fn confine_devices_v2(&self, path: &Path) -> io::Result<()> {
        let program = self
            .device_program
            .get_or_init(|| match sys::load_device_program(&device_program()) {
                Ok(program) => Some(program),
                Err(e) => {
                    tracing::debug!("device program: {e}");
                    None
                }
            });
        let Some(program) = program else {
            return Err(io::Error::other("the kernel takes no device program"));
        };
        let dir = open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        sys::attach_device_program(&dir, program)
    }
}

/// Which limits found a controller.
#[derive(Default)]
struct Satisfied(HashSet<&'static str>);

impl Satisfied {
    fn note(&mut self, what: &'static str, done: bool) {
        if done {
            self.0.insert(what);
        }
    }

    fn missing(&self, r: &Resources) -> Vec<&'static str> {
        let asked = [
            ("memory", r.memory.is_some()),
            ("swap", r.memory_swap.is_some()),
            (
                "cpu",
                r.cpu_shares.is_some() || r.cpu_period.is_some() || r.cpu_quota.is_some(),
            ),
            ("cpuset", r.cpuset_cpus.is_some() || r.cpuset_mems.is_some()),
            ("pids", r.pids.is_some()),
        ];
        asked
            .into_iter()
            .filter(|(what, asked)| *asked && !self.0.contains(what))
            .map(|(what, _)| what)
            .collect()
    }
}

impl Hierarchy {
    fn wanted(&self, r: &Resources) -> bool {
        let cpuset = r.cpuset_cpus.is_some() || r.cpuset_mems.is_some();
        self.controllers
            .iter()
            .any(|c| V1_ALWAYS.contains(&c.as_str()) || (cpuset && c == "cpuset"))
    }
}

fn confine_devices_v1(path: &Path) -> io::Result<()> {
    fs::write(path.join("devices.deny"), "a")?;
    for rule in DEVICE_RULES {
        fs::write(path.join("devices.allow"), rule.v1())?;
    }
    Ok(())
}

fn inherit_cpuset(path: &Path, top: &Path, file: &str) {
    let mut chain: Vec<&Path> = path.ancestors().take_while(|p| *p != top).collect();
    chain.push(top);
    chain.reverse();
    for pair in chain.windows(2) {
        if let [parent, child] = pair
            && fs::read_to_string(child.join(file)).is_ok_and(|v| v.trim().is_empty())
            && let Ok(value) = fs::read_to_string(parent.join(file))
        {
            let _ = fs::write(child.join(file), value.trim());
        }
    }
}

/// v1 shares (2..=262144) as v2 weight (1..=10000).
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// Empties a v2 group of processes by moving them into a leaf.
fn move_processes(dir: &Path) -> io::Result<()> {
    let leaf = dir.join(DAEMON_LEAF);
    match fs::create_dir(&leaf) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let members = fs::read_to_string(dir.join("cgroup.procs"))?;
    for pid in members.lines() {
        // A process may have ended meanwhile.
        let _ = fs::write(leaf.join("cgroup.procs"), pid);
    }
    Ok(())
}

/// The client's cgroup parent as a relative path. `a-b.slice:…` is systemd's notation for `a.slice/a-b.slice`.
fn parent_path(parent: &str) -> Result<PathBuf, ExecError> {
    let (parent, slice) = match parent.split_once(':') {
        Some((slice, _)) if slice.ends_with(".slice") => (slice, true),
        _ => (parent, parent.ends_with(".slice") && !parent.contains('/')),
    };
    let mut path = PathBuf::new();
    if slice {
        let stem = parent.trim_end_matches(".slice");
        let mut name = String::new();
        for part in stem.split('-') {
            if !name.is_empty() {
                name.push('-');
            }
            name.push_str(part);
            path.push(format!("{name}.slice"));
        }
    } else {
        path.extend(parent.split('/').filter(|p| !p.is_empty() && *p != "."));
    }
    if path.components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
        return Err(ExecError::Invalid(format!("cgroup parent {parent:?}")));
    }
    Ok(path)
}

/// `pid-starttime`, or nothing if there is no such process.
fn owner_name(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is in parentheses and may contain anything; the start time is the 22nd.
    let start = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
    Some(format!("{pid}-{start}"))
}

fn own_path<'a>(own: &'a str, hierarchy: &Hierarchy) -> Option<&'a str> {
    own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let same = if hierarchy.unified {
            controllers.is_empty()
        } else {
            controllers.split(',').any(|c| hierarchy.controllers.contains(c))
        };
        same.then_some(path)
    })
}

/// Hierarchies of `/proc/self/mountinfo`.
fn parse_mounts(table: &str) -> Vec<Hierarchy> {
    const KNOWN: [&str; 8] = [
        "memory", "pids", "cpu", "cpuacct", "devices", "cpuset", "blkio", "freezer",
    ];
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(mount) = left.split(' ').nth(4) else { continue };
        let mut right = right.split(' ');
        let (kind, _, options) = (right.next(), right.next(), right.next().unwrap_or_default());
        let unified = match kind {
            Some("cgroup2") => true,
            Some("cgroup") => false,
            _ => continue,
        };
        let controllers: BTreeSet<String> = if unified {
            BTreeSet::new()
        } else {
            options
                .split(',')
                .filter(|o| KNOWN.contains(o))
                .map(str::to_owned)
                .collect()
        };
        let repeated = found
            .iter()
            .any(|h| h.unified == unified && h.controllers == controllers);
        if repeated || (!unified && controllers.is_empty()) {
            continue;
        }
        found.push(Hierarchy {
            mount: PathBuf::from(mount),
            controllers,
            unified,
        });
    }
    found
}

#[derive(Debug)]
struct GroupDir {
    path: PathBuf,
    unified: bool,
}

/// The groups of one process. Drop removes them, so the last holder must be on a thread that may block.
#[derive(Debug)]
pub(crate) struct Group {
    dirs: Vec<GroupDir>,
    /// Device nodes in images are harmless (or everything is allowed).
    pub(crate) devices_confined: bool,
}

impl Group {
    /// A v2 directory to be born in.
    pub(crate) fn birthplace(&self) -> io::Result<Option<OwnedFd>> {
        let Some(dir) = self.dirs.iter().find(|d| d.unified) else {
            return Ok(None);
        };
        Ok(Some(open(
            &dir.path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?))
    }

    /// Files to which a process writes itself to enter the v1 groups.
    pub(crate) fn enter_files(&self) -> io::Result<Vec<OwnedFd>> {
        let legacy = self.dirs.iter().filter(|d| !d.unified);
        legacy
            .map(|d| {
                Ok(open(
                    d.path.join("tasks"),
                    OFlags::WRONLY | OFlags::CLOEXEC,
                    Mode::empty(),
                )?)
            })
            .collect()
    }

    /// The directories, for the launcher to remove when the daemon dies.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        self.dirs.iter().map(|d| d.path.clone()).collect()
    }

    /// What the group counted, and whether memory ran out.
    pub(crate) fn usage(&self) -> (Usage, bool) {
        let mut usage = Usage::default();
        let mut oom = false;
        for dir in &self.dirs {
            let read = |file: &str| fs::read_to_string(dir.path.join(file)).ok();
            let number = |file: &str| read(file).and_then(|t| t.trim().parse::<u64>().ok());
            if dir.unified {
                usage.peak_memory = number("memory.peak").or(usage.peak_memory);
                usage.peak_pids = number("pids.peak").or(usage.peak_pids);
                oom |= read("memory.events").and_then(|t| field(&t, "oom_kill")).unwrap_or(0) > 0;
                if let Some(us) = read("cpu.stat").and_then(|t| field(&t, "usage_usec")) {
                    usage.cpu_total = usage.cpu_total.or(Some(Duration::from_micros(us)));
                }
                if let Some(stat) = read("io.stat") {
                    let sum = |key: &str| {
                        stat.split_whitespace()
                            .filter_map(|w| w.strip_prefix(key)?.parse::<u64>().ok())
                            .sum()
                    };
                    usage.io_read = Some(sum("rbytes="));
                    usage.io_written = Some(sum("wbytes="));
                }
            } else {
                usage.peak_memory = number("memory.max_usage_in_bytes").or(usage.peak_memory);
                oom |= read("memory.oom_control")
                    .and_then(|t| field(&t, "oom_kill"))
                    .unwrap_or(0)
                    > 0;
                if let Some(ns) = number("cpuacct.usage") {
                    usage.cpu_total = Some(Duration::from_nanos(ns));
                }
            }
        }
        (usage, oom)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for dir in &self.dirs {
            remove_dir(&dir.path);
        }
    }
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Removes a group and the groups its processes made in it. The kernel may need a moment after the last process is reaped.
pub(crate) fn remove_dir(path: &Path) {
    for attempt in 0..50u32 {
        match fs::remove_dir(path) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) || e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                    if entry.file_type().is_ok_and(|t| t.is_dir()) {
                        remove_dir(&entry.path());
                    }
                }
                std::thread::sleep(Duration::from_millis(u64::from(attempt.min(20))));
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove control group {}: {e}", path.display());
                return;
            }
            _ => return,
        }
    }
    tracing::warn!("control group {} stays busy", path.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
        32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n\
        40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn hybrid_host_is_read() {
        let found = parse_mounts(HYBRID);
        let mounts: Vec<_> = found.iter().map(|h| (h.mount.to_str().unwrap(), h.unified)).collect();
        let base = "/sys/fs/cgroup";
        assert_eq!(
            mounts,
            [
                (format!("{base}/cpu,cpuacct").as_str(), false),
                (format!("{base}/memory").as_str(), false),
                (format!("{base}/unified").as_str(), true)
            ]
        );
    }

    #[test]
    fn parents_of_both_notations() {
        let path = |p: &str| parent_path(p).unwrap().to_str().unwrap().to_owned();
        assert_eq!(path(""), "");
        assert_eq!(path("/a/b/"), "a/b");
        assert_eq!(path("user-1000.slice:kiln:"), "user.slice/user-1000.slice");
        assert_eq!(path("ci.slice"), "ci.slice");
        assert!(parent_path("/a/../../b").is_err());
    }

    #[test]
    fn weights() {
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 39, 10_000));
    }
}
