//! The examples: each is built, its image read and its program run; the second build is all cached and byte for byte the first;
//! a touched source file runs again only what depends on it.

use harness::{Daemon, Fixture, Image, Outcome};

/// What is expected of an example.
struct Example {
    /// Its directory.
    name: &'static str,
    /// Options of the client.
    options: &'static [&'static str],
    /// A program of the image, and what it prints.
    runs: Option<(&'static [&'static str], &'static str)>,
    /// Paths that belong to build stages and must not be in the image.
    absent: &'static [&'static str],
    /// Layers above the base's.
    own_layers: usize,
    /// A file to change, a step that runs again then, and one that does not.
    touch: Option<(&'static str, &'static str, &'static str)>,
}

impl Example {
    /// Builds the example twice and once more with a changed file; returns the first image and what the client said.
    fn check(&self) -> (Image, Outcome) {
        let daemon = Daemon::start();
        let buildx = daemon.buildx();
        let context = Fixture::copy_of(&format!("examples/{}", self.name));
        // The official syntax line is Kiln's own business; the reference would pull an image for it.
        let dockerfile = context.read("Dockerfile");
        if harness::lab::is_reference() {
            context.write("Dockerfile", dockerfile.replacen("# syntax=", "# no-syntax=", 1));
        }
        let build = || buildx.build(&context).args(self.options);
        let (image, outcome) = build().image_and_outcome();
        for path in self.absent {
            assert!(!image.has(path), "{path} belongs to a build stage and is in the image");
        }
        let from_base = base_layers(&image);
        assert_eq!(
            image.layers.len() - from_base,
            self.own_layers,
            "layers of its own: {:#?}",
            image.config["history"]
        );
        if let Some((command, expected)) = self.runs {
            assert_eq!(image.run(command), expected);
        }
        let (again, second) = build().image_and_outcome();
        assert_eq!(
            second.progress().executed(),
            Vec::<&str>::new(),
            "the second build is cached"
        );
        assert_eq!(
            (again.digest, again.layers.len()),
            (image.digest.clone(), image.layers.len())
        );
        assert_eq!(again.config, image.config);
        if let Some((file, runs, stays)) = self.touch {
            let text = context.read(file);
            context.write(file, format!("{text}\n"));
            let third = build().ok().progress();
            assert!(!third.cached(runs), "{runs} depends on {file}");
            assert!(third.cached(stays), "{stays} does not depend on {file}");
        }
        (image, outcome)
    }
}

/// How many layers came with the base: those the lab made, which say so in the history.
fn base_layers(image: &Image) -> usize {
    let steps = image.config["history"].as_array().into_iter().flatten();
    steps.filter(|step| step["created_by"] == "kiln lab").count()
}

#[test]
fn go_to_scratch() {
    let example = Example {
        name: "go-scratch",
        options: &[],
        runs: Some((&["/server"], "hello from scratch\ncertificates: yes\n")),
        absent: &["usr", "go", "app", "bin"],
        own_layers: 2,
        touch: Some(("internal/greeting/greeting.go", "go build", "go mod download")),
    };
    let (image, _) = example.check();
    assert_eq!(image.files_in(""), ["etc/ssl/certs/ca-certificates.crt", "server"]);
    assert_eq!(*image.runtime("Entrypoint"), serde_json::json!(["/server"]));
    assert!(image.runtime("ExposedPorts")["8080/tcp"].is_object());
    assert!(image.tree_size() < 4_000_000, "{} bytes", image.tree_size());
}

#[test]
fn go_to_a_distroless_base() {
    let example = Example {
        name: "go-distroless",
        options: &[],
        runs: Some((&["/app"], "static linux/amd64, a shell: false\n")),
        absent: &["src", "usr/local/go", "bin/sh"],
        own_layers: 1,
        touch: None,
    };
    let (image, _) = example.check();
    assert_eq!(*image.runtime("User"), serde_json::json!("nonroot:nonroot"));
    assert!(image.file("etc/ssl/certs/ca-certificates.crt").size > 1000);
}

#[test]
fn node_with_production_dependencies_only() {
    let example = Example {
        name: "node-service",
        options: &[],
        runs: Some((&["/usr/local/bin/node", "dist/server.js"], "hello production\n")),
        absent: &[
            "app/src",
            "app/build.js",
            "app/node_modules/checker",
            "app/vendor",
            "root/.npm",
        ],
        own_layers: 4,
        touch: Some(("src/server.js", "npm run build", "npm ci --offline")),
    };
    let (image, _) = example.check();
    assert!(image.has("app/node_modules/greeter"));
    assert!(
        !image.file("app/dist/server.js").text().contains("The service itself"),
        "the built file is in the image"
    );
    assert_eq!(*image.runtime("User"), serde_json::json!("node"));
}

#[test]
fn node_with_a_shared_stage_and_a_test_target() {
    let example = Example {
        name: "node-targets",
        options: &[],
        runs: Some((&["/usr/local/bin/node", "dist/server.js"], "hello production\n")),
        absent: &["app/test.js", "app/vendor", "app/node_modules/checker"],
        own_layers: 3,
        touch: Some(("src/server.js", "npm run build", "npm ci")),
    };
    let _ = example.check();
    let daemon = Daemon::start();
    let buildx = daemon.buildx();
    let context = Fixture::copy_of("examples/node-targets");
    context.write(
        "Dockerfile",
        context.read("Dockerfile").replacen("# syntax=", "# no-syntax=", 1),
    );
    let tested = buildx.build(&context).target("test").ok();
    assert!(tested.progress().log().contains("checked"));
    assert!(tested.progress().find("npm run build").is_none());
    let built = buildx.build(&context).ok().progress();
    assert!(
        built.cached("npm ci") && !built.cached("npm run build"),
        "the dependencies are installed once for both"
    );
    context.write("test.js", "throw new Error('broken')\n");
    buildx
        .build(&context)
        .target("test")
        .fails()
        .says(&["broken", "npm test"]);
}

#[test]
fn python_wheels() {
    let example = Example {
        name: "python-wheels",
        options: &[],
        runs: Some((&["/usr/local/bin/python", "app.py"], "hello python\n")),
        absent: &["build", "app/greeter"],
        own_layers: 4,
        touch: Some(("app.py", "COPY app.py", "pip wheel")),
    };
    let _ = example.check();
}

#[test]
fn python_with_a_prefix() {
    let example = Example {
        name: "python-prefix",
        options: &[],
        runs: Some((&["/usr/local/bin/python", "app.py"], "hello python\n")),
        absent: &["install", "root/.cache/pip", "app/greeter"],
        own_layers: 4,
        touch: Some(("app.py", "useradd", "--prefix=/install")),
    };
    let (image, _) = example.check();
    assert!(image.file("etc/passwd").text().contains("appuser"));
}

#[test]
fn java() {
    let example = Example {
        name: "java-jar",
        options: &[],
        runs: Some((&["/usr/local/bin/java", "-jar", "/app.jar"], "hello from java 17\n")),
        absent: &["build", "usr/local/bin/javac"],
        own_layers: 1,
        touch: None,
    };
    let _ = example.check();
}

#[test]
fn a_front_end_behind_nginx() {
    let example = Example {
        name: "frontend-nginx",
        options: &["--build-arg", "VERSION=1.2.3"],
        runs: Some((&["/bin/sh", "-c", "nginx -t -q 2>&1"], "")),
        absent: &["app", "usr/local/bin/node"],
        own_layers: 2,
        touch: Some(("nginx.conf", "COPY nginx.conf", "node bundle.js")),
    };
    let (image, _) = example.check();
    assert!(
        image
            .file("usr/share/nginx/html/index.html")
            .text()
            .contains("version 1.2.3")
    );
    assert_eq!(*image.runtime("Cmd"), serde_json::json!(["nginx", "-g", "daemon off;"]));
}

#[test]
fn a_front_end_and_an_api() {
    let example = Example {
        name: "frontend-and-api",
        options: &[],
        runs: Some((&["./api"], "serving index.html\n")),
        absent: &["app/build.js", "app/main.go", "usr/local/go", "usr/local/bin/node"],
        own_layers: 3,
        touch: Some(("frontend/build.js", "node build.js", "go build")),
    };
    let _ = example.check();
}

#[test]
fn development_or_production() {
    let production = Example {
        name: "dev-prod",
        options: &[],
        runs: Some((&["/usr/local/bin/node", "index.js"], "running in production\n")),
        absent: &["app/tools.txt"],
        own_layers: 2,
        touch: None,
    };
    let (image, outcome) = production.check();
    assert!(
        outcome.progress().find("echo debugger").is_none(),
        "the other stage never ran"
    );
    assert_eq!(image.runtime("Labels")["environment"], "prod");
    let development = Example {
        name: "dev-prod",
        options: &["--build-arg", "ENVIRONMENT=dev"],
        runs: Some((&["/usr/local/bin/node", "index.js"], "running in development\n")),
        absent: &[],
        own_layers: 3,
        touch: None,
    };
    let (image, _) = development.check();
    assert_eq!(image.file("app/tools.txt").text(), "debugger\n");
}

#[test]
fn a_health_check_and_files_of_a_named_user() {
    let example = Example {
        name: "healthcheck-chown",
        options: &[],
        runs: None,
        absent: &["build"],
        own_layers: 4,
        touch: None,
    };
    let (image, _) = example.check();
    for path in ["app/dist", "app/dist/server.js", "app/package.json"] {
        assert_eq!((image.file(path).uid, image.file(path).gid), (1001, 1001), "{path}");
    }
    assert_eq!(image.file("app/package.json").mode, 0o440);
    let check = image.runtime("Healthcheck");
    assert_eq!(check["Interval"], 30_000_000_000_u64);
    assert_eq!(check["StartPeriod"], 5_000_000_000_u64);
    assert_eq!(check["Retries"], 3);
    assert_eq!(image.runtime("StopSignal"), "SIGINT");
}

#[test]
fn a_secret_in_a_step() {
    let secret = Fixture::empty();
    secret.write("token", "t0ken-of-the-example");
    let option = format!("id=npm_token,src={}", secret.path().join("token").display());
    let options: &'static [&'static str] =
        Box::leak(vec!["--secret", &*Box::leak(option.into_boxed_str())].into_boxed_slice());
    let example = Example {
        name: "secret-mount",
        options,
        runs: Some((
            &["/bin/cat", "/package.txt"],
            "private package, fetched with a token of 20 characters\n",
        )),
        absent: &["app", "run/secrets"],
        own_layers: 1,
        touch: None,
    };
    let (image, outcome) = example.check();
    assert!(!image.mentions(b"t0ken-of-the-example") && !outcome.stderr.contains("t0ken-of-the-example"));
}

#[test]
fn an_ignore_file() {
    let example = Example {
        name: "ignore-file",
        options: &[],
        runs: None,
        absent: &["notes.txt", "src/draft.tmp"],
        own_layers: 1,
        touch: None,
    };
    assert_eq!(example.check().0.files_in(""), ["src/keep.tmp", "src/main.txt"]);
}

#[test]
fn a_bound_compiler() {
    let example = Example {
        name: "bound-compiler",
        options: &[],
        runs: Some((&["/hello"], "hello from a bound compiler\n")),
        absent: &["usr", "src"],
        own_layers: 1,
        touch: None,
    };
    assert_eq!(example.check().0.file("hello").mode, 0o555);
    let daemon = Daemon::start();
    let context = Fixture::copy_of("examples/bound-compiler");
    context.write(
        "Dockerfile",
        context.read("Dockerfile").replacen("# syntax=", "# no-syntax=", 1),
    );
    let _outcome = daemon.buildx().build(&context).target("check").ok();
}

/// Whether the tests that reach package registries are left out; they say so.
fn offline(name: &str) -> bool {
    let offline = std::env::var_os("KILN_E2E_OFFLINE").is_some_and(|value| value == "1");
    if offline {
        println!("examples/{name} is left out: KILN_E2E_OFFLINE=1");
    }
    offline
}

#[test]
fn npm_ci_from_a_real_registry() {
    if offline("node-registry") {
        return;
    }
    let example = Example {
        name: "node-registry",
        options: &[],
        runs: Some((&["/usr/local/bin/node", "index.js"], "two days are 172800000 ms\n")),
        absent: &["app/node_modules/is-number", "root/.npm"],
        own_layers: 3,
        touch: Some(("index.js", "npm test", "npm ci")),
    };
    let _ = example.check();
}

#[test]
fn pip_install_from_a_real_index() {
    if offline("python-registry") {
        return;
    }
    let example = Example {
        name: "python-registry",
        options: &[],
        runs: Some((&["/usr/local/bin/python", "app.py"], "six 1.16.0\n")),
        absent: &["root/.cache/pip"],
        own_layers: 2,
        touch: Some(("app.py", "COPY app.py", "pip install")),
    };
    let _ = example.check();
}
