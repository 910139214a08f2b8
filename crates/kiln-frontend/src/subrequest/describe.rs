//! `frontend.subrequests.describe`: which questions may be asked.

use serde::Serialize;

use super::{Metadata, metadata, table};

#[derive(Serialize)]
struct Named {
    name: &'static str,
    description: &'static str,
}

#[derive(Serialize)]
struct Question {
    name: &'static str,
    version: &'static str,
    r#type: &'static str,
    description: &'static str,
    opts: Option<Vec<Named>>,
    inputs: Option<Vec<Named>>,
    metadata: Option<Vec<Named>>,
    refs: Option<Vec<Named>>,
}

fn question(name: &'static str, description: &'static str, opts: Option<Vec<Named>>) -> Question {
    let keys = ["result.json", "result.txt"];
    let metadata = keys.map(|name| Named { name, description: "" }).into_iter().collect();
    Question {
        name,
        version: "1.0.0",
        r#type: "rpc",
        description,
        opts,
        inputs: None,
        metadata: Some(metadata),
        refs: None,
    }
}

/// The list. Lint and conversion are not on it: clients know of them by other means.
pub(super) fn answer() -> Metadata {
    let target = Named {
        name: "target",
        description: "Target build stage",
    };
    let questions = [
        question(
            "frontend.outline",
            "List all parameters current build target supports",
            Some(vec![target]),
        ),
        question(
            "frontend.targets",
            "List all targets current build supports",
            Some(Vec::new()),
        ),
        question("frontend.subrequests.describe", "List available subrequest types", None),
    ];
    let mut rows = vec![["NAME", "VERSION", "DESCRIPTION"].map(str::to_owned).to_vec()];
    rows.extend(questions.iter().map(|q| {
        let name = q.name.strip_prefix("frontend.").unwrap_or(q.name);
        [name, q.version, q.description].map(str::to_owned).to_vec()
    }));
    metadata(&questions, Some(table::lay_out(&rows, 1)), "1.0.0")
}
