//! The same executor without privileges: a user made for the test, in a user namespace of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use kiln_executor::{
    Executor, FileMount, Held, IdMapping, MountKind, MountSpec, NetMode, ProcessIo, Resources, enter_user_namespace,
};

use crate::lab::{Root, lab, output, run};

pub(crate) const CASES: &[crate::Case] = &[
    ("ordinary_user_with_subordinate_ids", ordinary_user_with_subordinate_ids),
    ("ordinary_user_with_a_single_id", ordinary_user_with_a_single_id),
];

/// A user of this machine, removed on drop.
struct User {
    name: String,
    uid: u32,
    gid: u32,
}

impl User {
    fn create(kind: &str) -> User {
        let name = format!("kiln{kind}{}", std::process::id());
        let done = Command::new("useradd")
            .args(["--create-home", "--shell", "/bin/sh", &name])
            .output()
            .expect("useradd");
        assert!(done.status.success(), "{done:?}");
        let id = |flag: &str| {
            let text = Command::new("id").args([flag, &name]).output().unwrap().stdout;
            String::from_utf8(text).unwrap().trim().parse().unwrap()
        };
        User {
            uid: id("-u"),
            gid: id("-g"),
            name,
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // Its last processes may still be ending.
        for _ in 0..100 {
            let done = Command::new("userdel").args(["--remove", &self.name]).output();
            if done.is_ok_and(|d| d.status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

/// Ends with the test, before its user is removed.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs this program as the user, in a role; its standard input keeps it waiting at the end until it is closed.
fn as_user(user: &User, role: &str, path: &str) -> (Daemon, Vec<String>) {
    let home = std::path::Path::new("/home").join(&user.name);
    let program = home.join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let child = Command::new(&program)
        .env_clear()
        .env("KILN_TEST_ROLE", role)
        .env("PATH", path)
        .env("TMPDIR", &home)
        .current_dir(&home)
        .uid(user.uid)
        .gid(user.gid)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = Daemon(child);
    let lines = BufReader::new(child.0.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let mut seen = Vec::new();
    for line in lines {
        let end = line == "end";
        seen.push(line);
        if end {
            break;
        }
    }
    assert_eq!(seen.last().map(String::as_str), Some("end"), "{seen:#?}");
    (child, seen)
}

fn ordinary_user_with_subordinate_ids() {
    let user = User::create("sub");
    let (mut child, seen) = as_user(&user, "rootless", "/usr/bin:/bin:/usr/sbin:/sbin");
    let has = |line: &str| assert!(seen.iter().any(|l| l == line), "{line} not in {seen:#?}");
    has("mapping subordinate");
    has("root 0 0");
    has("user 1000 1000 1000:1000");
    has("opaque user.overlay.opaque");
    has("secret 400 1000");
    has("hosts 127.0.0.1 localhost");
    has("net 1");
    has("limited ok");
    // The daemon, its launcher and its step belong to other users of the host, in another user namespace.
    let own = std::fs::read_link("/proc/self/ns/user").unwrap();
    let pids = seen
        .iter()
        .filter_map(|l| l.strip_prefix("pid "))
        .map(|p| p.parse::<u32>().unwrap());
    let mut checked = 0;
    for pid in pids.chain([child.0.id()]) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let uid = status
            .lines()
            .find_map(|l| l.strip_prefix("Uid:"))
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap()
            .to_owned();
        assert_ne!(uid, "0", "{status}");
        assert_ne!(std::fs::read_link(format!("/proc/{pid}/ns/user")).unwrap(), own);
        checked += 1;
    }
    assert!(checked >= 3, "{seen:#?}");
    drop(child.0.stdin.take());
    assert!(child.0.wait().unwrap().success());
}

fn ordinary_user_with_a_single_id() {
    let user = User::create("one");
    // The helpers are not in this PATH.
    let tools = tempfile::tempdir().unwrap();
    std::fs::set_permissions(tools.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for tool in ["cc", "as", "ld"] {
        std::os::unix::fs::symlink(format!("/usr/bin/{tool}"), tools.path().join(tool)).unwrap();
    }
    let (mut child, seen) = as_user(&user, "single", tools.path().to_str().unwrap());
    let has = |start: &str| assert!(seen.iter().any(|l| l.starts_with(start)), "{start} not in {seen:#?}");
    has("mapping single running with a single user id (newuidmap: ");
    has("root 0 0");
    has("other user refused: cannot become user 1000: it is not mapped");
    drop(child.0.stdin.take());
    assert!(child.0.wait().unwrap().success());
}

/// What the user's process does.
pub(crate) fn act(single: bool) {
    let mapping = enter_user_namespace().unwrap();
    match &mapping {
        IdMapping::Subordinate { uids, gids } => {
            assert!(*uids > 60000 && *gids > 60000, "{mapping:?}");
            println!("mapping subordinate");
        }
        other => println!("mapping single {}", other.notice().unwrap_or_default()),
    }
    let root = Root::new();
    println!("root {}", output(root.sh("echo $(id -u) $(id -g)")).trim());
    let mut spec = root.sh("echo $(id -u) $(id -g) $(stat -c %u:%g .)");
    spec.user = "node".into();
    spec.cwd = "/srv".into();
    match run(spec) {
        Ok(outcome) => println!("user {}", outcome.stdout.trim()),
        Err(e) => println!("other user refused: {e}"),
    }
    if !single {
        more(&root);
    }
    println!("end");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
}

fn more(root: &Root) {
    output(root.sh("rm -r /home && mkdir -p /home/new && chown -R 4711:4712 /home"));
    let attributes = Command::new("getfattr")
        .args(["-d", "-m", "user.overlay"])
        .arg(root.upper().join("home"))
        .output();
    let marked = match attributes {
        Ok(found) => String::from_utf8_lossy(&found.stdout).contains("user.overlay.opaque"),
        // Without the tool: the kernel shows it as well.
        Err(_) => kiln_fs::Dir::open_ambient(root.upper())
            .unwrap()
            .xattrs("home", |n| n == b"user.overlay.opaque")
            .is_ok_and(|x| !x.is_empty()),
    };
    println!("opaque {}", if marked { "user.overlay.opaque" } else { "missing" });
    let mut spec = root.sh(
        "stat -c 'secret %a %u' /s; head -1 /etc/hosts | sed 's/^/hosts /'; ip -o link | wc -l | sed 's/^ */net /'",
    );
    let file = FileMount {
        content: b"x".to_vec(),
        mode: 0o400,
        uid: 1000,
        gid: 1000,
    };
    spec.mounts = vec![MountSpec::new("/s", MountKind::File(file)).readonly()];
    spec.hosts = Some("127.0.0.1 localhost\n".into());
    spec.net = NetMode::None;
    print!("{}", output(spec));
    // Limits that cannot be kept are no failure.
    let mut spec = root.sh("echo limited ok");
    spec.resources = Resources {
        memory: Some(64 << 20),
        pids: Some(100),
        ..Resources::default()
    };
    print!("{}", output(spec));
    let lab = lab();
    let spec = root.sh("sleep 1000");
    let process = lab
        .runtime
        .block_on(lab.executor.start(spec, ProcessIo::default(), Held::nothing()))
        .unwrap();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let mine =
            std::fs::read_link(entry.path().join("ns/user")).ok() == std::fs::read_link("/proc/self/ns/user").ok();
        if mine && (line.contains("sleep 1000") || line.starts_with("kiln-launcher")) {
            println!("pid {name}");
        }
    }
    println!("end");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
    drop(process);
    std::process::exit(0);
}
