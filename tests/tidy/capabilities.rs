//! Every capability that the daemon advertises has a test that uses it. A test says so in a comment above its `#[test]`:
//! `// caps: exec.mount.cache exec.mount.cache.sharing`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Advertised and used by no test yet. The list may only become shorter: an id with a test must leave it.
const NOT_YET: &[&str] = &[
    "diffop",
    "exec.cgroup",
    "exec.meta.cgroup.parent",
    "exec.meta.linux.resources",
    "exec.meta.setsdefaultpath",
    "exec.validexitcode",
    "file.rm.nofollowsymlink",
    "file.rm.wildcard",
    "file.symlink.create",
    "gateway.evaluate",
    "gc.freespacefilter",
    "mergeop",
    "meta.exportcache",
    "passthroughop",
    "readdir",
    "readfile",
    "reference.attestations",
    "reference.output",
    "resolveimage.resolvemode",
    "soruce.http.uidgid",
    "source.git.httpauth",
    "source.http.auth",
    "source.http.header",
    "source.image.checksum",
    "source.image.layerlimit",
    "source.metaresolver",
    "statfile",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the source tree")
        .to_owned()
}

/// The string literals of the constant lists of ids.
fn advertised() -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join("crates/kiln-llb/src/caps.rs")).expect("the list of capabilities");
    let mut ids = BTreeSet::new();
    for name in ["LLB_CAPS:", "FRONTEND_CAPS:", "GATEWAY_CAPS:"] {
        let Some(list) = text.split(name).nth(1).and_then(|rest| rest.split("];").next()) else {
            continue;
        };
        ids.extend(
            list.lines()
                .filter_map(|line| line.trim().strip_prefix('"')?.strip_suffix("\","))
                .map(str::to_owned),
        );
    }
    assert!(
        ids.len() > 20,
        "the lists of capabilities have moved; tell tests/tidy/capabilities.rs where"
    );
    ids
}

/// Ids named above tests, with the file that names them.
fn tested() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![root().join("crates"), root().join("tests")];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") && !path.ends_with("tidy/capabilities.rs") {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                let lines: Vec<&str> = text.lines().map(str::trim).collect();
                for (index, line) in lines.iter().enumerate() {
                    let Some(ids) = line.strip_prefix("// caps:") else {
                        continue;
                    };
                    // Only comments and attributes may stand between the list and its test.
                    let rest = lines[index + 1..]
                        .iter()
                        .take_while(|line| line.starts_with("//") || line.starts_with("#["));
                    let is_test = rest
                        .clone()
                        .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"));
                    assert!(
                        is_test,
                        "{}:{}: a list of capabilities stands above no test",
                        path.display(),
                        index + 1
                    );
                    found.extend(
                        ids.split_whitespace()
                            .map(|id| (id.to_owned(), path.display().to_string())),
                    );
                }
            }
        }
    }
    found
}

#[test]
fn every_advertised_capability_has_a_test() {
    let (advertised, tested) = (advertised(), tested());
    let mut wrong = Vec::new();
    for id in &advertised {
        match (tested.contains_key(id), NOT_YET.contains(&id.as_str())) {
            (false, false) => wrong.push(format!("{id} is advertised and no test uses it")),
            (true, true) => wrong.push(format!("{id} has a test now: take it off the list")),
            _ => {}
        }
    }
    for id in NOT_YET.iter().filter(|id| !advertised.contains(**id)) {
        wrong.push(format!("{id} is on the list and not advertised"));
    }
    for (id, file) in tested.iter().filter(|(id, _)| !advertised.contains(*id)) {
        wrong.push(format!("{file} tests {id}, which is not advertised"));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
