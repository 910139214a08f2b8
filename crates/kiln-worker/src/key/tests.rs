//! Op digests against values that another implementation computed (cache-keys.md §8).

use bytes::Bytes;
use kiln_llb::op::{
    BuildOp, CacheMountOpt, CacheSharing, ChownOpt, CopyAction, DiffOp, ExecMeta, ExecMount, ExecOp, FileAction,
    FileActionKind, FileOp, HostIp, MergeOp, MkDirAction, MkFileAction, MountType, NetMode, PassthroughOp, ProxyEnv,
    RmAction, SecretEnv, SecretMountOpt, SymlinkAction, TmpfsOpt, UserOpt,
};
use kiln_oci::{DiffId, Digest, Platform};

use super::*;

fn digest(text: &str) -> Digest {
    text.parse().unwrap()
}

fn root() -> ExecMount {
    ExecMount {
        input: Some(0),
        dest: "/".into(),
        output: Some(0),
        ..ExecMount::default()
    }
}

fn amd64() -> Platform {
    Platform::new("linux", "amd64", "")
}

fn args(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

#[test]
fn g1_exec() {
    let op = ExecOp {
        meta: ExecMeta {
            args: args(&["/bin/sh", "-c", "echo \"a\" > /x && cat < /x"]),
            env: args(&[
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "V=é",
            ]),
            cwd: "/".into(),
            extra_hosts: vec![HostIp {
                host: "db".into(),
                ip: "10.0.0.9".into(),
            }],
            proxy_env: Some(ProxyEnv {
                http_proxy: "http://proxy".into(),
                ..ProxyEnv::default()
            }),
            remove_mount_stubs_recursive: true,
            ..ExecMeta::default()
        },
        mounts: vec![root()],
        ..ExecOp::default()
    };
    let key = exec_key(&op, &amd64(), 1).unwrap();
    assert_eq!(
        key.subject,
        r#"{"Type":"buildkit.exec.v0","Exec":{"meta":{"args":["/bin/sh","-c","echo \"a\" \u003e /x \u0026\u0026 cat \u003c /x"],"env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","V=é"],"cwd":"/","extraHosts":[{"Host":"db"}],"removeMountStubsRecursive":true}},"OS":"linux","Arch":"amd64"}"#
    );
    assert_eq!(
        key.digest.0,
        digest("sha256:9d875753b49a61d8fd8804b8502cf771e62ef52271ec49cffe0d705427624d09")
    );
    assert_eq!(
        key.digest.record_digest(0),
        digest("sha256:c6d4ee895aada44a4500d942f56e39abef53e15cf8256448df0c489b8aaec6de")
    );
    let selector = digest("sha256:8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1");
    assert_eq!(
        key.deps,
        vec![Dep {
            selector: Some(selector),
            content: false
        }]
    );
}

#[test]
fn g2_exec_with_mounts() {
    let none = ExecMount {
        input: None,
        output: None,
        ..ExecMount::default()
    };
    let cache = |dest: &str, id: &str, sharing| ExecMount {
        dest: dest.into(),
        mount_type: MountType::Cache,
        cache: Some(CacheMountOpt { id: id.into(), sharing }),
        ..none.clone()
    };
    let op = ExecOp {
        meta: ExecMeta {
            args: args(&["/bin/sh", "-c", "make"]),
            env: args(&["PATH=/bin"]),
            cwd: "/src".into(),
            remove_mount_stubs_recursive: true,
            ..ExecMeta::default()
        },
        mounts: vec![
            root(),
            cache("/root/.cache", "/root/.cache", CacheSharing::Shared),
            cache("/root/.m2", "maven", CacheSharing::Locked),
            ExecMount {
                dest: "/run/secrets/tok".into(),
                output: Some(0),
                mount_type: MountType::Secret,
                secret: Some(SecretMountOpt {
                    id: "tok".into(),
                    mode: 0o400,
                    ..SecretMountOpt::default()
                }),
                ..none.clone()
            },
            ExecMount {
                input: Some(1),
                selector: "sub/dir".into(),
                dest: "/src".into(),
                readonly: true,
                ..none.clone()
            },
            ExecMount {
                dest: "/tmp".into(),
                mount_type: MountType::Tmpfs,
                tmpfs: Some(TmpfsOpt { size: 65536 }),
                ..none.clone()
            },
        ],
        network: NetMode::None,
        secret_env: vec![SecretEnv {
            id: "tok".into(),
            name: "TOKEN".into(),
            optional: true,
        }],
        ..ExecOp::default()
    };
    let key = exec_key(&op, &Platform::new("linux", "arm", "v7"), 2).unwrap();
    assert_eq!(
        key.subject,
        r#"{"Type":"buildkit.exec.v0","Exec":{"meta":{"args":["/bin/sh","-c","make"],"env":["PATH=/bin"],"cwd":"/src","removeMountStubsRecursive":true},"mounts":[{"dest":"/"},{"input":-1,"dest":"/root/.cache","output":-1,"mountType":3,"cacheOpt":{"ID":"/root/.cache"}},{"input":-1,"dest":"/root/.m2","output":-1,"mountType":3,"cacheOpt":{}},{"input":-1,"dest":"/run/secrets/tok","mountType":1,"secretOpt":{"ID":"tok","mode":256}},{"input":1,"dest":"/src","output":-1,"readonly":true},{"input":-1,"dest":"/tmp","output":-1,"mountType":4,"TmpfsOpt":{"size":65536}}],"network":2,"secretenv":[{"ID":"tok","name":"TOKEN","optional":true}]},"OS":"linux","Arch":"arm","Variant":"v7"}"#
    );
    assert_eq!(
        key.digest.0,
        digest("sha256:682ebc320690697210f19cbebb7bb6f7106cc6c175908154297de3467d0d4045")
    );
    assert_eq!(
        key.digest.record_digest(0),
        digest("sha256:0a0ad300b670a26108e4065cbbfe2ade5036712aee50f50c77e834868b0f11bf")
    );
    let selector = digest("sha256:0b39d0785962e5c1fc2d5ab719154ae3bf214628222f74ef4ff1916f34fce19b");
    assert_eq!(
        key.deps[1],
        Dep {
            selector: Some(selector),
            content: true
        }
    );
    assert_eq!(key.selectors[1], vec![ContentSelector::plain("/sub/dir", true)]);

    // Several mounts of one input: the selector keeps their order, the content does not.
    let bind = |selector: &str| ExecMount {
        input: Some(1),
        selector: selector.into(),
        dest: "/m".into(),
        ..none.clone()
    };
    let op = ExecOp {
        mounts: vec![root(), bind("/b"), bind("/a"), bind("/a/sub")],
        ..ExecOp::default()
    };
    let key = exec_key(&op, &amd64(), 2).unwrap();
    let selector = digest("sha256:48df4d7c47dfe5b3432e4765224330713001b00299e6850f39dfa0f9df289793");
    assert_eq!(key.deps[1].selector, Some(selector));
    assert_eq!(
        key.selectors[1],
        vec![ContentSelector::plain("/a", true), ContentSelector::plain("/b", true)]
    );
}

fn copy(src: &str, dest: &str) -> CopyAction {
    CopyAction {
        src: src.into(),
        dest: dest.into(),
        mode: -1,
        follow_symlink: true,
        timestamp: -1,
        ..CopyAction::default()
    }
}

fn action(input: Option<u32>, secondary: Option<u32>, output: Option<u32>, kind: FileActionKind) -> FileAction {
    FileAction {
        input,
        secondary_input: secondary,
        output,
        kind,
    }
}

#[test]
fn g3_copy() {
    let copy = CopyAction {
        dir_copy_contents: true,
        create_dest_path: true,
        allow_wildcard: true,
        allow_empty_wildcard: true,
        ..copy("/src/app.txt", "/app/")
    };
    let op = FileOp {
        actions: vec![action(Some(0), Some(1), Some(0), FileActionKind::Copy(copy))],
    };
    let key = file_key(&op, 2).unwrap();
    assert_eq!(
        key.digest.0,
        digest("sha256:4ecc3e69fbf1e191a072a11011f955ea46d4d4c1d071dc359aa8758a45f9c6b4")
    );
    let selector = digest("sha256:c7a5c0334bbd61f34e568bb0dabbe8aae33aa8c542c1e8b475621a9bed0bee68");
    assert_eq!(
        key.deps,
        vec![
            Dep::default(),
            Dep {
                selector: Some(selector),
                content: true
            }
        ]
    );
    assert_eq!(key.selectors[1], vec![ContentSelector::plain("/src/app.txt", true)]);
}

#[test]
fn g4_owners_and_indexes() {
    let by_name = UserOpt::ByName {
        name: "app".into(),
        input: Some(0),
    };
    let op = FileOp {
        actions: vec![
            action(
                None,
                None,
                None,
                FileActionKind::MkDir(MkDirAction {
                    path: "/d".into(),
                    mode: 0o755,
                    make_parents: true,
                    owner: Some(ChownOpt {
                        user: Some(UserOpt::ById(0)),
                        group: Some(UserOpt::ById(1000)),
                    }),
                    timestamp: -1,
                }),
            ),
            action(
                Some(1),
                None,
                Some(0),
                FileActionKind::MkFile(MkFileAction {
                    path: "/d/f".into(),
                    mode: 0o644,
                    data: Bytes::from_static(b"hi\n"),
                    owner: Some(ChownOpt {
                        user: Some(by_name),
                        group: None,
                    }),
                    timestamp: 1_000_000_000,
                }),
            ),
        ],
    };
    let key = file_key(&op, 1).unwrap();
    assert_eq!(
        key.digest.0,
        digest("sha256:8704c1dccac01c7ad507ebbafaa1584eac4fea04fcff41188c003ddf31dd3e3f")
    );
    let selector = digest("sha256:74acf31844532670be412c65b8251ee55d072549080b1cffdbea6b1a192230a0");
    assert_eq!(
        key.deps,
        vec![Dep {
            selector: Some(selector),
            content: true
        }]
    );

    let op = FileOp {
        actions: vec![
            action(
                Some(0),
                None,
                None,
                FileActionKind::Symlink(SymlinkAction {
                    oldpath: "target".into(),
                    newpath: "/l".into(),
                    timestamp: -1,
                    ..SymlinkAction::default()
                }),
            ),
            action(
                Some(1),
                None,
                Some(0),
                FileActionKind::Rm(RmAction {
                    path: "/tmp/*".into(),
                    allow_not_found: true,
                    allow_wildcard: true,
                }),
            ),
        ],
    };
    let key = file_key(&op, 1).unwrap();
    assert_eq!(
        key.digest.0,
        digest("sha256:873bc5914dbd35f0e28eabdcf17f97343a19db4ce812dca2c7741764b971dcbf")
    );
}

#[test]
fn g5_two_copies_of_one_input() {
    let filtered = CopyAction {
        mode: 0o600,
        allow_wildcard: true,
        exclude_patterns: vec!["**/*.tmp".into()],
        ..copy("/b*", "/x/")
    };
    let op = FileOp {
        actions: vec![
            action(Some(0), Some(1), None, FileActionKind::Copy(copy("/a", "/x/"))),
            action(Some(2), Some(1), Some(0), FileActionKind::Copy(filtered)),
        ],
    };
    let key = file_key(&op, 2).unwrap();
    assert_eq!(
        key.digest.0,
        digest("sha256:980c666b3c9abaa3de3c1374a519346b93b7204c8b5863f1a5ef743e4754db09")
    );
    assert_eq!(
        key.digest.record_digest(0),
        digest("sha256:abd00d412a2b22c41fed12f5f2850f65aae099b6b3e3722f4eadd91dbfdf579d")
    );
    let selector = digest("sha256:28c019abf7f86a4928acc1e4ebe3085c6d1a50e802cd050346b3815be2577d89");
    assert_eq!(key.deps[1].selector, Some(selector));
    assert_eq!(
        key.selectors[1].iter().map(|s| s.path.as_str()).collect::<Vec<_>>(),
        ["/a", "/b*"]
    );
}

#[test]
fn g6_structure() {
    let merge = merge_key(
        &MergeOp {
            inputs: vec![Some(0), Some(1)],
        },
        2,
    );
    assert_eq!(
        merge.digest.0,
        digest("sha256:436287a2dc2ce494f564331be9ea3a9f27ebec398567877043da2f618f33d6c8")
    );
    assert_eq!(
        merge.digest.record_digest(0),
        digest("sha256:5dbfbafede47210a7bd7363461bc885ec7310febe761daffdf666bfdae5970ff")
    );
    let diff = diff_key(
        &DiffOp {
            lower: Some(0),
            upper: Some(1),
        },
        2,
    );
    assert_eq!(
        diff.digest.0,
        digest("sha256:164ae6dac10aea8de6cb7cda35914a10011485523f807ea840bca3e0ab19d8ff")
    );
    let diff = diff_key(
        &DiffOp {
            lower: None,
            upper: Some(0),
        },
        1,
    );
    assert_eq!(
        diff.digest.0,
        digest("sha256:f5284a0f1782a8c2cdb29841228c32706cbf04332ad37c3c7cb41659c6eeba0a")
    );
    let pass = passthrough_key(
        &PassthroughOp {
            id: "p1".into(),
            outputs: vec![1, 0],
        },
        2,
    );
    assert_eq!(
        pass.digest.0,
        digest("sha256:b4ad13384920399e7708d99373c3f97944e851edf2794d4cbb73a32dbc2a4aff")
    );
    let build = BuildOp {
        builder: -1,
        inputs: [("buildkit.llb.definition".to_owned(), Some(0))].into(),
        definition: None,
        attrs: [("llbbuild.filename".to_owned(), "x.llb".to_owned())].into(),
    };
    let build = build_key(&build, 1);
    assert_eq!(
        build.digest.0,
        digest("sha256:28f0a2514244fb9d3f5864a9d54643396ee06d896aa7855278a3e6ee1c60cffd")
    );
}

#[test]
fn g7_sources() {
    let image = image_key(
        &Digest::from_bytes([0xa1; 32]),
        &Platform::new("linux", "arm", "v7"),
        None,
    );
    assert_eq!(
        image,
        "sha256:59d2a522cd087e56e5eed187bb64abe7ff2068b2c78037df20c7ea0a5c9426c8"
    );
    let op = source_digest(&image).0;
    assert_eq!(
        op.0,
        digest("sha256:5351a49b42b98a3eb78c7934f17737726a8145d98548f9a32f41ba151b12eae0")
    );
    assert_eq!(
        op.record_digest(0),
        digest("sha256:bfb8e7f9f124bc7920bf351bcc73f6a6f06354f2293762d481a5f9b44d2e87bc")
    );
    let layers = [
        DiffId(Digest::from_bytes([0xb2; 32])),
        DiffId(Digest::from_bytes([0xc3; 32])),
    ];
    let chain = chain_key(&layers).unwrap();
    assert_eq!(
        chain,
        "sha256:ec20e9ff1a0df3fcfda1cf9c303d578407b6fe91e1e32b2e2f8fe47627a6be5e"
    );
    assert_eq!(
        source_digest(&chain).0.0,
        digest("sha256:e742ee4f5031dd277c2882954f2d4c269bea4b98280a9448976e1cdf52448257")
    );
    assert_eq!(chain_key(&[]), None);

    let commit = "42".repeat(20);
    let git = GitKey {
        commit: commit.clone(),
        ..GitKey::default()
    };
    assert_eq!(
        source_digest(&git_key(&git)).0.0,
        digest("sha256:76576a68fb6e15635ba7b3ca0771280e61dc656d8fe2a11e951746a92cdea253")
    );
    let kept = GitKey {
        keep_git_dir: true,
        reference: "refs/heads/main".into(),
        ..git.clone()
    };
    assert_eq!(
        source_digest(&git_key(&kept)).0.0,
        digest("sha256:c56ddf9ebbb25bcd23f0ffc1a9d5ea66ca9851125656181e04c52c7777d3d3e2")
    );
    let all = GitKey {
        subdir: "a/b".into(),
        skip_submodules: true,
        mtime: "commit".into(),
        bundle: true,
        keep_git_dir: false,
        ..kept
    };
    assert_eq!(
        git_key(&all),
        format!("{commit}:a/b(skip-submodules)(mtime=commit)(bundle)")
    );

    let mut http = HttpKey {
        file: BlobFile {
            filename: "tool-1.0.tgz".into(),
            ..BlobFile::default()
        },
        checksum: Digest::of("payload").to_string(),
        ..HttpKey::default()
    };
    let key = http_key(&http);
    assert_eq!(
        key,
        "sha256:8801b982985fea0b8e190dd82ecb60ce997a13a42fd1035726b79cf2da0b2f8a"
    );
    assert_eq!(
        source_digest(&key).0.0,
        digest("sha256:229406825873cb65a8eea7b1bb323c4ed4e5c2987c4bdf7173f1238ecd1e8d3c")
    );
    http.file.perm = 0o644;
    http.file.uid = 1;
    http.last_modified = "Fri, 02 Jan 2026 03:04:05 GMT".into();
    http.auth_header_secret = "h".into();
    http.headers = vec![("Accept".into(), "a/b".into())];
    assert_eq!(
        http_key(&http),
        "sha256:5d9de64c0d3b7c6ce67715160a6e67008228925856de56f6fe756b6eb98881ba"
    );
}

#[test]
fn an_input_that_is_changed_is_not_keyed_by_content() {
    let op = FileOp {
        actions: vec![action(
            Some(0),
            Some(0),
            Some(0),
            FileActionKind::Copy(copy("/a", "/b")),
        )],
    };
    assert_eq!(file_key(&op, 1).unwrap().deps, vec![Dep::default()]);
    let lost = UserOpt::ByName {
        name: "app".into(),
        input: Some(7),
    };
    let op = FileOp {
        actions: vec![action(
            Some(0),
            None,
            Some(0),
            FileActionKind::MkDir(MkDirAction {
                path: "/d".into(),
                owner: Some(ChownOpt {
                    user: Some(lost),
                    group: None,
                }),
                ..MkDirAction::default()
            }),
        )],
    };
    assert!(file_key(&op, 1).unwrap_err().to_string().contains("input 7 of 1"));
}

#[test]
fn the_last_mount_of_an_input_decides_about_content() {
    let again = ExecMount {
        input: Some(0),
        dest: "/again".into(),
        readonly: true,
        ..ExecMount::default()
    };
    let op = ExecOp {
        mounts: vec![root(), again],
        ..ExecOp::default()
    };
    let key = exec_key(&op, &amd64(), 1).unwrap();
    assert!(key.deps[0].content);
    assert_eq!(key.selectors[0], vec![ContentSelector::plain("/", false)]);
    let out_of_range = ExecMount {
        input: Some(3),
        dest: "/x".into(),
        ..ExecMount::default()
    };
    let op = ExecOp {
        mounts: vec![root(), out_of_range],
        ..ExecOp::default()
    };
    assert!(exec_key(&op, &amd64(), 1).is_err());
}
