//! What holds for every file: a first line that says what it is for, a bounded length, no trace of the machine it was written on,
//! every command and example that a page names exists.

use std::path::{Path, PathBuf};

/// Lines of a source file, its unit tests not counted.
const LONGEST: usize = 700;

/// Files that are longer and may only become shorter: a list to empty, not to extend.
const LONGER: &[(&str, usize)] = &[];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the source tree")
        .to_owned()
}

/// All files beneath `dir` with one of the endings; build results and the repository's own data are left out.
fn files(dir: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_symlink() || name == ".git" {
            continue;
        } else if path.is_dir() {
            if !matches!(name.as_str(), "target" | ".cache" | "node_modules") {
                files(&path, endings, found);
            }
        } else if endings.is_empty() || endings.iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
}

fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    files(&root().join("crates"), &[".rs"], &mut found);
    files(&root().join("tests"), &[".rs"], &mut found);
    found
}

fn short(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).expect("a readable file")).into_owned()
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let silent: Vec<String> = sources()
        .iter()
        .filter(|path| !read(path).starts_with("//! "))
        .map(|path| short(path))
        .collect();
    assert!(
        silent.is_empty(),
        "the first line of these files is no `//! …`:\n{}",
        silent.join("\n")
    );
}

#[test]
fn every_proto_file_says_what_it_is_for() {
    let mut found = Vec::new();
    files(&root().join("proto"), &[".proto"], &mut found);
    assert!(!found.is_empty());
    let silent: Vec<String> = found
        .iter()
        .filter(|path| !read(path).starts_with("//"))
        .map(|path| short(path))
        .collect();
    assert!(
        silent.is_empty(),
        "the first line of these files is no comment:\n{}",
        silent.join("\n")
    );
}

#[test]
fn no_source_file_is_too_long() {
    let mut long = Vec::new();
    for path in sources() {
        let text = read(&path);
        // Tests may be as long as their subject needs: the end-to-end ones, those of a crate, and unit tests in a file of their own.
        let name = short(&path);
        let is_test = name.starts_with("tests/e2e/") || name.contains("/tests/") || name.ends_with("/tests.rs");
        let code = text
            .split("\n#[cfg(test)]\nmod ")
            .next()
            .unwrap_or_default()
            .lines()
            .count();
        let limit = LONGER
            .iter()
            .find(|(name, _)| *name == short(&path))
            .map_or(LONGEST, |(_, lines)| *lines);
        if !is_test && code > limit {
            long.push(format!("{} has {code} lines", short(&path)));
        }
    }
    assert!(
        long.is_empty(),
        "more than {LONGEST} lines without tests:\n{}",
        long.join("\n")
    );
}

#[test]
fn unsafe_code_is_in_one_file() {
    let allowed = "crates/kiln-executor/src/sys.rs";
    let marks = ["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code"];
    let mut found = Vec::new();
    for path in sources() {
        let name = short(&path);
        if name == allowed || name.starts_with("tests/tidy/") {
            continue;
        }
        let text = read(&path);
        // The module declaration is where the lint is lifted for that one file.
        let lifted = |line: &str| name == "crates/kiln-executor/src/lib.rs" && line.contains("allow(unsafe_code");
        if text
            .lines()
            .any(|line| marks.iter().any(|mark| line.contains(mark)) && !lifted(line))
        {
            found.push(name);
        }
    }
    assert!(found.is_empty(), "unsafe code outside {allowed}: {found:?}");
}

#[test]
fn nothing_names_a_machine_or_a_package_host() {
    // Put together from halves, so that this list does not find itself.
    let forbidden = [
        concat!("/wor", "k/"),
        concat!("/roo", "t/.cargo"),
        concat!("deb.debia", "n.org"),
        concat!("pypi.", "org"),
        concat!("crates.", "io/"),
        concat!("registry.npm", "js"),
        concat!("/.rus", "tup"),
    ];
    let mut all = Vec::new();
    files(&root(), &[], &mut all);
    let mut found = Vec::new();
    for path in all
        .iter()
        .filter(|path| path.file_name().is_some_and(|name| name != "Cargo.lock"))
    {
        let text = read(path);
        for (number, line) in text.lines().enumerate() {
            if forbidden.iter().any(|word| line.contains(word)) {
                found.push(format!("{}:{}: {}", short(path), number + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn commands_in_the_pages_exist() {
    let makefile = read(&root().join("Makefile"));
    let targets: Vec<&str> = makefile
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
        .collect();
    let mut pages = vec![root().join("README.md")];
    files(&root().join("docs"), &[".md"], &mut pages);
    let mut missing = Vec::new();
    for page in pages.iter().filter(|page| page.exists()) {
        let text = read(page);
        for words in text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()) {
            for pair in words.windows(2) {
                if pair[0].trim_start_matches(['`', '$', '(']) == "make" {
                    let target = pair[1].trim_matches(|c: char| !c.is_ascii_alphanumeric() && c != '-');
                    let is_command =
                        pair[0].starts_with('`') || words.first() == Some(&"make") || words.first() == Some(&"$");
                    if is_command && !target.is_empty() && !targets.contains(&target) {
                        missing.push(format!("{}: make {target}", short(page)));
                    }
                }
            }
        }
    }
    assert!(
        missing.is_empty(),
        "these commands are in no Makefile:\n{}",
        missing.join("\n")
    );
}

#[test]
fn relative_links_in_the_pages_lead_somewhere() {
    let mut pages = vec![root().join("README.md")];
    files(&root().join("docs"), &[".md"], &mut pages);
    files(&root().join("examples"), &[".md"], &mut pages);
    let mut broken = Vec::new();
    for page in pages.iter().filter(|page| page.exists()) {
        let text = read(page);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.contains(' ') {
                continue;
            }
            if !page.parent().is_some_and(|dir| dir.join(file).exists()) {
                broken.push(format!("{} -> {link}", short(page)));
            }
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn every_example_has_a_test_and_a_line_in_the_list() {
    let tests = read(&root().join("tests/e2e/examples.rs"));
    let list = read(&root().join("examples/README.md"));
    let mut missing = Vec::new();
    for entry in std::fs::read_dir(root().join("examples")).expect("examples").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            if !tests.contains(&format!("\"{name}\"")) {
                missing.push(format!("tests/e2e/examples.rs does not build examples/{name}"));
            }
            if !list.contains(&format!("({name}/")) {
                missing.push(format!("examples/README.md does not list {name}"));
            }
        }
    }
    assert!(missing.is_empty(), "\n{}", missing.join("\n"));
}

#[test]
fn nothing_is_left_for_later_in_the_code() {
    let marks = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("#[", "ignore"),
        concat!("FIX", "ME"),
    ];
    let mut found = Vec::new();
    for path in sources() {
        for (number, line) in read(&path).lines().enumerate() {
            if marks.iter().any(|mark| line.contains(mark)) && !line.contains("tempfile") {
                found.push(format!("{}:{}: {}", short(&path), number + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}
