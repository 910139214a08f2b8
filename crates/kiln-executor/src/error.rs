//! What can go wrong when a process is run.

use std::io;

use serde::{Deserialize, Serialize};

/// Failure to run a process. A process that ran and failed is no error but an [`ExitReport`](crate::ExitReport).
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The surroundings could not be made; nothing of the command ran.
    #[error("{}", setup_message(*step, *errno, detail))]
    Setup {
        /// What was being done.
        step: Step,
        /// `errno(3)` of the call that failed; 0 when the cause is not a system call.
        errno: i32,
        /// On what, e.g. the path; may be empty.
        detail: String,
    },
    /// The process that launches others could not be started or has died.
    #[error("cannot launch processes: {attempt}")]
    Launcher {
        /// What was attempted.
        attempt: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The control group could not be made.
    #[error("cannot {attempt} control group {path}")]
    Cgroup {
        /// What was attempted, e.g. `create`.
        attempt: &'static str,
        /// The directory or file.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The spec asks for something that cannot be.
    #[error("invalid process specification: {0}")]
    Invalid(String),
    /// The process has ended already.
    #[error("the process has ended")]
    Ended,
    /// The process has no terminal.
    #[error("the process has no terminal")]
    NoTerminal,
}

impl ExecError {
    /// The command itself could not be executed (missing, not executable, wrong format), as opposed to its surroundings.
    pub fn is_exec(&self) -> bool {
        matches!(self, ExecError::Setup { step: Step::Exec, .. })
    }
}

fn setup_message(step: Step, errno: i32, detail: &str) -> String {
    let attempt = step.attempt();
    let cause = if errno == 0 { String::new() } else { errno_text(errno) };
    match (step, detail.is_empty(), cause.is_empty()) {
        (Step::User, false, _) => detail.to_owned(),
        (_, true, true) => format!("cannot {attempt}"),
        (_, true, false) => format!("cannot {attempt}: {cause}"),
        (_, false, true) => format!("cannot {attempt}: {detail}"),
        (_, false, false) => format!("cannot {attempt} {detail}: {cause}"),
    }
}

/// The kernel's words for an errno, lower case.
pub fn errno_text(errno: i32) -> String {
    nix::errno::Errno::from_raw(errno).desc().to_lowercase()
}

/// A step of setting up a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Step {
    /// Fork into new namespaces.
    Clone,
    /// Receive and read the specification.
    Spec,
    /// Join the control groups.
    Cgroup,
    /// Enter namespaces of a running process.
    Join,
    /// Make mount propagation private.
    Propagation,
    /// Mount the root file system.
    Root,
    /// Open a mount source, or the part of it that is selected.
    Source,
    /// Mount something.
    Mount,
    /// Create a mount target.
    Target,
    /// Make devices.
    Devices,
    /// Mask or protect paths of proc and sysfs.
    Mask,
    /// Change the root.
    Pivot,
    /// Set the host name.
    Hostname,
    /// Bring up the network.
    Network,
    /// Look up the user, or become it.
    User,
    /// Create or enter the working directory.
    Cwd,
    /// Set resource limits.
    Ulimit,
    /// Make the terminal.
    Terminal,
    /// Install the seccomp filter.
    Seccomp,
    /// Set capabilities.
    Capabilities,
    /// Arrange the standard streams.
    Streams,
    /// Execute the program.
    Exec,
}

impl Step {
    /// Ends the sentence "cannot …".
    pub fn attempt(self) -> &'static str {
        match self {
            Step::Clone => "create namespaces",
            Step::Spec => "read process specification",
            Step::Cgroup => "join control group",
            Step::Join => "enter namespaces of the running process",
            Step::Propagation => "make mounts private",
            Step::Root => "mount root file system",
            Step::Source => "open mount source",
            Step::Mount => "mount",
            Step::Target => "create mount target",
            Step::Devices => "make device",
            Step::Mask => "protect path",
            Step::Pivot => "change root",
            Step::Hostname => "set host name",
            Step::Network => "bring up network",
            Step::User => "change user",
            Step::Cwd => "enter working directory",
            Step::Ulimit => "set limit",
            Step::Terminal => "make terminal",
            Step::Seccomp => "install seccomp filter",
            Step::Capabilities => "set capabilities",
            Step::Streams => "arrange standard streams",
            Step::Exec => "execute",
        }
    }
}
