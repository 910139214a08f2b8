//! Git: as a context and in ADD, by branch, tag, commit and directory.

use harness::{Daemon, Fixture, HttpServer};
use std::path::Path;
use std::process::Command;

fn git(dir: &Path, args: &[&str]) -> String {
    let out = Command::new("git")
        .current_dir(dir)
        .args([
            "-c",
            "user.name=kiln",
            "-c",
            "user.email=kiln@example.org",
            "-c",
            "init.defaultBranch=main",
            "-c",
            "commit.gpgsign=false",
        ])
        .args(args)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "git {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// A repository with two commits, a tag and a branch, served as plain files.
fn repository() -> (Fixture, HttpServer, String) {
    let tree = Fixture::new(
        "=== repo/Dockerfile\nFROM scratch\nCOPY . /\n=== repo/file\none\n=== repo/sub/Dockerfile\nFROM scratch\nCOPY inner /\n=== repo/sub/inner\ninner\n",
    );
    let repo = tree.path().join("repo");
    git(&repo, &["init", "-q"]);
    git(&repo, &["add", "-A"]);
    git(&repo, &["commit", "-q", "-m", "one"]);
    git(&repo, &["tag", "-a", "v1", "-m", "v1"]);
    tree.write("repo/file", "two\n");
    git(&repo, &["commit", "-q", "-a", "-m", "two"]);
    let head = git(&repo, &["rev-parse", "HEAD"]);
    git(&repo, &["update-server-info"]);
    let server = HttpServer::start(&repo.join(".git"));
    (tree, server, head)
}

// caps: source.git source.git.subdir source.git.fullurl
#[test]
fn as_a_context() {
    let (tree, _server, head) = repository();
    // The client takes an address that ends in .git for a repository.
    let serve = HttpServer::start(tree.path());
    std::fs::rename(tree.path().join("repo/.git"), tree.path().join("project.git")).unwrap();
    let at = format!("{}/project.git", serve.address());
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let image = buildx.build_of(&at).image();
    assert_eq!(image.file("file").text(), "two\n");
    assert!(!image.has(".git"));
    assert_eq!(
        buildx.build_of(&format!("{at}#v1")).image().file("file").text(),
        "one\n"
    );
    assert_eq!(
        buildx.build_of(&format!("{at}#{head}")).image().file("file").text(),
        "two\n"
    );
    assert_eq!(
        buildx.build_of(&format!("{at}#main:sub")).image().files_in(""),
        ["inner"]
    );
    buildx.build_of(&format!("{at}#absent")).fails();
}

// caps: source.git.keepgitdir
#[test]
fn in_add() {
    let (tree, _server, _) = repository();
    let serve = HttpServer::start(tree.path());
    std::fs::rename(tree.path().join("repo/.git"), tree.path().join("project.git")).unwrap();
    let at = format!("{}/project.git", serve.address());
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM scratch\nADD {at}#v1 /one/\nADD --keep-git-dir=true {at} /two/\n"
    ));
    let daemon = Daemon::start();
    let (image, _) = daemon.buildx().build(&context).image_and_outcome();
    assert_eq!(image.file("one/file").text(), "one\n");
    assert_eq!(image.file("two/file").text(), "two\n");
    assert!(image.has("two/.git/HEAD") && !image.has("one/.git"));
    let (_, outcome) = daemon.buildx().build(&context).image_and_outcome();
    assert_eq!(
        outcome.progress().executed(),
        Vec::<&str>::new(),
        "nothing moved in the repository"
    );
}

// caps: source.git.checksum
#[test]
fn a_commit_that_is_not_the_expected_one() {
    let (tree, _server, head) = repository();
    let serve = HttpServer::start(tree.path());
    std::fs::rename(tree.path().join("repo/.git"), tree.path().join("project.git")).unwrap();
    let at = format!("{}/project.git", serve.address());
    let daemon = Daemon::start();
    let add = |checksum: &str| {
        Fixture::new(&format!(
            "=== Dockerfile\nFROM scratch\nADD --checksum={checksum} {at}#main /one/\n"
        ))
    };
    assert_eq!(
        daemon.buildx().build(&add(&head)).image().file("one/file").text(),
        "two\n"
    );
    let other = head.chars().rev().collect::<String>();
    daemon.buildx().build(&add(&other)).fails().says(&[&other]);
}

// caps: source.git.skipsubmodules
#[test]
fn submodules_come_along_unless_told_otherwise() {
    let (tree, _server, _) = repository();
    let outer = tree.path().join("outer");
    std::fs::create_dir(&outer).unwrap();
    git(&outer, &["init", "-q"]);
    let serve = HttpServer::start(tree.path());
    git(&tree.path().join("repo"), &["update-server-info"]);
    let inner = format!("{}/repo/.git", serve.address());
    git(&outer, &["submodule", "--quiet", "add", &inner, "inner"]);
    git(&outer, &["commit", "-q", "-m", "outer"]);
    git(&outer, &["update-server-info"]);
    std::fs::rename(outer.join(".git"), tree.path().join("outer.git")).unwrap();
    let at = format!("{}/outer.git", serve.address());
    let daemon = Daemon::start();
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM scratch\nADD {at} /with/\nADD {at}?submodules=false /without/\n"
    ));
    let image = daemon.buildx().build(&context).image();
    assert_eq!(image.file("with/inner/file").text(), "two\n");
    assert!(!image.has("without/inner/file") && image.has("without/.gitmodules"));
}
