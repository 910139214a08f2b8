//! `Asker`: who asks a source.

use std::sync::Arc;

use kiln_solver::{OpContext, Reporter, Tenant};

use crate::client::Client;
use crate::worker::LlbWorker;

/// Who asks a source: whose sessions and credentials it may use, whose store it works in, and who is told of it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Asker<'a> {
    /// An operation, on behalf of the jobs that wait for it at the moment.
    Operation(&'a OpContext<LlbWorker>),
    /// A frontend that wants to know something of a source without its files.
    Frontend {
        /// The client of its build.
        client: &'a Arc<Client>,
        /// The build's tenant.
        tenant: &'a Tenant,
        /// The vertex that shows the question.
        progress: &'a Reporter,
    },
}

impl<'a> From<&'a OpContext<LlbWorker>> for Asker<'a> {
    fn from(cx: &'a OpContext<LlbWorker>) -> Self {
        Self::Operation(cx)
    }
}

impl<'a> Asker<'a> {
    /// The clients that wait for the answer; those of an operation come and go.
    pub(crate) fn clients(self) -> Vec<Arc<Client>> {
        match self {
            Self::Operation(cx) => cx.clients(),
            Self::Frontend { client, .. } => vec![Arc::clone(client)],
        }
    }

    /// Whose store it is.
    pub(crate) fn tenant(self) -> &'a Tenant {
        match self {
            Self::Operation(cx) => cx.tenant(),
            Self::Frontend { tenant, .. } => tenant,
        }
    }

    /// Where progress goes.
    pub(crate) fn progress(self) -> &'a Reporter {
        match self {
            Self::Operation(cx) => cx.progress(),
            Self::Frontend { progress, .. } => progress,
        }
    }
}
