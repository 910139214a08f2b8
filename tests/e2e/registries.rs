//! Registries: push, pull, credentials, tokens, mirrors, indexes, and bytes that are not what they claim to be.

use harness::{Daemon, Fault, Faults, Fixture, Image, Registry};

const APP: &str = "=== Dockerfile\nFROM busybox\nRUN echo pushed > /pushed\n";

fn push(registry: &Registry, daemon: &Daemon, name: &str) -> harness::Outcome {
    let reference = format!("{}/{name}", registry.host());
    daemon
        .buildx()
        .build(&Fixture::new(APP))
        .args(&["-t", &reference, "--push"])
        .run()
}

#[test]
fn push_and_use_as_a_base() {
    let registry = Registry::empty();
    let daemon = Daemon::with().plain_http(&registry).start();
    let outcome = push(&registry, &daemon, "team/app:1").ok();
    let image = Image::pull(&registry, "team/app", "1");
    assert_eq!(image.file("pushed").text(), "pushed\n");
    assert_eq!(
        outcome.metadata["image.name"].as_str().unwrap(),
        format!("{}/team/app:1", registry.host())
    );
    let second = Daemon::with().plain_http(&registry).start();
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM {}/team/app:1\nRUN cat /pushed > /copy\n",
        registry.host()
    ));
    let derived = second.buildx().build(&context).image();
    assert_eq!(derived.file("copy").text(), "pushed\n");
    assert_eq!(
        derived.layers[..2]
            .iter()
            .map(|layer| &layer.digest)
            .collect::<Vec<_>>(),
        image.layers.iter().map(|layer| &layer.digest).collect::<Vec<_>>()
    );
    // By digest, and with nothing fetched a second time.
    let blobs = registry.requests("GET", "/blobs/");
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM {}/team/app@{}\nRUN cat /pushed > /copy\n",
        registry.host(),
        image.digest
    ));
    let again = second.buildx().build(&context).image();
    assert_eq!(again.file("copy").text(), "pushed\n");
    assert_eq!(
        registry.requests("GET", "/blobs/"),
        blobs,
        "what is here is not fetched again"
    );
}

#[test]
fn pushing_twice_uploads_nothing() {
    let registry = Registry::empty();
    let daemon = Daemon::with().plain_http(&registry).start();
    let _first = push(&registry, &daemon, "team/app:1").ok();
    let uploads = registry.requests("PUT", "/blobs/");
    let _second = push(&registry, &daemon, "team/app:2").ok();
    let layers = uploads;
    // A new attestation with its own times is the only thing that may be new.
    assert!(
        registry.requests("PUT", "/blobs/") - layers <= 2,
        "layers are not uploaded again"
    );
    assert_eq!(
        Image::pull(&registry, "team/app", "2").layer_digests(),
        Image::pull(&registry, "team/app", "1").layer_digests()
    );
}

#[test]
fn basic_credentials_come_from_the_client() {
    let registry = Registry::basic("ann", "pass word");
    let daemon = Daemon::with().plain_http(&registry).start();
    let reference = format!("{}/private/app:1", registry.host());
    let context = Fixture::new(APP);
    let buildx = daemon.buildx();
    buildx
        .build(&context)
        .args(&["-t", &reference, "--push"])
        .fails()
        .says(&["401"]);
    buildx.login(registry.host(), "ann", "wrong");
    buildx
        .build(&context)
        .args(&["-t", &reference, "--push"])
        .fails()
        .says(&["401"]);
    buildx.login(registry.host(), "ann", "pass word");
    let _outcome = buildx.build(&context).args(&["-t", &reference, "--push"]).ok();
    let derived = Fixture::new(&format!("=== Dockerfile\nFROM {reference}\nRUN cat /pushed > /copy\n"));
    assert_eq!(buildx.build(&derived).image().file("copy").text(), "pushed\n");
    // Another client without the password gets nothing, although the daemon has it all.
    let stranger = daemon.buildx();
    stranger.build(&derived).fails().says(&[&reference]);
    assert!(!daemon.log().contains("pass word"));
    assert!(daemon.state_files_with(b"pass word").is_empty());
}

#[test]
fn tokens_with_scopes() {
    let registry = Registry::token("bob", "secret", "team/");
    let daemon = Daemon::with().plain_http(&registry).start();
    let buildx = daemon.buildx();
    let context = Fixture::new(APP);
    let reference = format!("{}/team/app:1", registry.host());
    buildx.build(&context).args(&["-t", &reference, "--push"]).fails();
    buildx.login(registry.host(), "bob", "secret");
    let _outcome = buildx.build(&context).args(&["-t", &reference, "--push"]).ok();
    assert_eq!(
        Image::pull(&registry, "team/app", "1").file("pushed").text(),
        "pushed\n"
    );
    assert!(
        registry
            .scopes()
            .iter()
            .any(|scope| scope.contains("repository:team/app:") && scope.contains("push")),
        "{:?}",
        registry.scopes()
    );
    let second = Daemon::with().plain_http(&registry).start();
    let client = second.buildx();
    client.login(registry.host(), "bob", "secret");
    let derived = Fixture::new(&format!("=== Dockerfile\nFROM {reference}\nRUN cat /pushed > /copy\n"));
    assert_eq!(client.build(&derived).image().file("copy").text(), "pushed\n");
    // A repository the token server gives no rights for.
    let foreign = format!("{}/other/app:1", registry.host());
    buildx.build(&context).args(&["-t", &foreign, "--push"]).fails();
    assert!(registry.get("/v2/other/app/manifests/1").is_none());
}

// caps: returnmap resolveimage
#[test]
fn a_platform_is_chosen_from_an_index() {
    let registry = Registry::empty();
    let daemon = Daemon::with().plain_http(&registry).start();
    let reference = format!("{}/multi/app:1", registry.host());
    let context = Fixture::new(
        "=== Dockerfile\nFROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /arch\n=== amd64\namd64\n=== arm64\narm64\n",
    );
    let buildx = daemon.buildx();
    let outcome = buildx
        .build(&context)
        .args(&["--platform", "linux/amd64,linux/arm64", "-t", &reference, "--push"])
        .ok();
    assert!(outcome.metadata["containerimage.digest"].is_string());
    let index = registry.json("/v2/multi/app/manifests/1");
    let platforms: Vec<&str> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|m| m["platform"]["architecture"].as_str())
        .collect();
    assert_eq!(
        &platforms[..2],
        ["amd64", "arm64"],
        "images first, attestations after them"
    );
    let derived = Fixture::new(&format!("=== Dockerfile\nFROM {reference}\nLABEL x=1\n"));
    for arch in ["amd64", "arm64"] {
        let image = buildx
            .build(&derived)
            .args(&["--platform", &format!("linux/{arch}")])
            .image();
        assert_eq!(image.file("arch").text(), format!("{arch}\n"));
        assert_eq!(image.config["architecture"], arch);
    }
    buildx
        .build(&derived)
        .args(&["--platform", "linux/s390x"])
        .fails()
        .says(&["no match for platform in manifest"]);
}

#[test]
fn a_mirror_that_has_nothing_is_passed_over() {
    let nothing = Registry::empty();
    let registry = Registry::empty();
    let first = Daemon::with().plain_http(&registry).start();
    let _outcome = push(&registry, &first, "library/only-here:1").ok();
    let config = format!(
        "[registry.\"example.test\"]\n  mirrors = [\"{}\", \"{}\"]\n[registry.\"{}\"]\n  http = true\n",
        nothing.host(),
        registry.host(),
        nothing.host()
    );
    let daemon = Daemon::with().plain_http(&registry).config(&config).start();
    let context = Fixture::new("=== Dockerfile\nFROM example.test/library/only-here:1\nRUN cat /pushed > /copy\n");
    assert_eq!(daemon.buildx().build(&context).image().file("copy").text(), "pushed\n");
    assert!(
        nothing.requests("HEAD", "only-here") + nothing.requests("GET", "only-here") > 0,
        "the first mirror was asked"
    );
}

#[test]
fn a_layer_with_a_wrong_digest_is_refused() {
    let registry = Registry::empty();
    let first = Daemon::with().plain_http(&registry).start();
    let _outcome = push(&registry, &first, "team/app:1").ok();
    let image = Image::pull(&registry, "team/app", "1");
    let top = &image.layers.last().unwrap().digest;
    let file = registry.blob_file(top);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&file, bytes).unwrap();
    let daemon = Daemon::with().plain_http(&registry).start();
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM {}/team/app:1\nRUN cat /pushed\n",
        registry.host()
    ));
    let outcome = daemon.buildx().build(&context).fails();
    assert!(
        !outcome.progress().log().contains("pushed"),
        "no step ran on the corrupt layer"
    );
}

#[test]
fn an_image_that_points_outside_stays_inside() {
    let registry = Registry::empty();
    let daemon = Daemon::with().plain_http(&registry).start();
    let reference = format!("{}/team/links:1", registry.host());
    let buildx = daemon.buildx();
    let base = Fixture::new(
        "=== Dockerfile\nFROM busybox\nRUN ln -s /tmp /absolute && ln -s ../../../../../../tmp /climbing && ln -s / /self\n",
    );
    let _outcome = buildx.build(&base).args(&["-t", &reference, "--push"]).ok();
    let name = format!("kiln-outside-{}", std::process::id());
    let context = Fixture::new(&format!(
        "=== Dockerfile\nFROM {reference}\nCOPY f /absolute/{name}-1\nCOPY f /climbing/{name}-2\nWORKDIR /climbing/{name}-3\nADD f /self/self/self/tmp/{name}-4\nRUN --mount=type=cache,target=/climbing/{name}-5 true\n=== f\nf\n"
    ));
    let image = buildx.build(&context).image();
    for number in 1..=5 {
        // The reference's runtime makes a missing working directory by its name, and on the host.
        if number == 3 && harness::lab::is_reference() {
            let _ = std::fs::remove_dir(format!("/tmp/{name}-3"));
            continue;
        }
        assert!(
            !std::path::Path::new("/tmp").join(format!("{name}-{number}")).exists(),
            "written on the host: {number}"
        );
    }
    for number in [1, 2, 4] {
        assert_eq!(image.file(&format!("tmp/{name}-{number}")).text(), "f\n");
    }
}

/// A registry with an image, and a proxy before it; the reference to the image by way of the proxy.
fn behind(rule: impl Fn(&str, usize) -> Fault + Send + Sync + 'static) -> (Registry, Faults, String, String) {
    let registry = Registry::empty();
    let first = Daemon::with().plain_http(&registry).start();
    let _outcome = push(&registry, &first, "team/app:1").ok();
    let faults = Faults::before(registry.host(), rule);
    let reference = format!("{}/team/app:1", faults.host());
    let config = format!("[registry.\"{}\"]\n  http = true\n", faults.host());
    (registry, faults, reference, config)
}

#[test]
fn refusals_that_pass_are_waited_for() {
    for status in [429, 503] {
        // Each request is refused once, then served.
        let (_registry, faults, reference, config) = behind(move |_, before| {
            if before == 0 {
                Fault::Status(status)
            } else {
                Fault::None
            }
        });
        let daemon = Daemon::with().config(&config).start();
        let context = Fixture::new(&format!("=== Dockerfile\nFROM {reference}\nRUN cat /pushed > /copy\n"));
        // The reference gives up on these; Kiln tries again.
        if harness::lab::is_reference() {
            let _ = daemon.buildx().build(&context).run();
        } else {
            assert_eq!(
                daemon.buildx().build(&context).image().file("copy").text(),
                "pushed\n",
                "after {status}"
            );
            assert!(faults.requests().len() > 3);
        }
    }
}

#[test]
fn a_download_that_breaks_off_is_taken_up_again() {
    let (_registry, faults, reference, config) = behind(|request, before| {
        if request.contains("/blobs/") && before == 0 {
            Fault::Cut(700)
        } else {
            Fault::None
        }
    });
    let daemon = Daemon::with().config(&config).start();
    let context = Fixture::new(&format!("=== Dockerfile\nFROM {reference}\nRUN cat /pushed > /copy\n"));
    assert_eq!(daemon.buildx().build(&context).image().file("copy").text(), "pushed\n");
    let blobs = faults
        .requests()
        .iter()
        .filter(|request| request.starts_with("GET") && request.contains("/blobs/"))
        .count();
    assert!(blobs > 3, "some were asked for twice: {:?}", faults.requests());
}

#[test]
fn a_refusal_that_stays_is_an_error() {
    let (_registry, _faults, reference, config) = behind(|request, _| {
        if request.contains("/blobs/") {
            Fault::Status(403)
        } else {
            Fault::None
        }
    });
    let daemon = Daemon::with().config(&config).start();
    let context = Fixture::new(&format!("=== Dockerfile\nFROM {reference}\nRUN cat /pushed > /copy\n"));
    daemon.buildx().build(&context).fails().says(&["403"]);
}

#[test]
fn an_upload_that_is_refused_once_succeeds() {
    let registry = Registry::empty();
    let faults = Faults::before(registry.host(), |request, before| {
        if request.starts_with("PUT") && before == 0 {
            Fault::Status(503)
        } else {
            Fault::None
        }
    });
    let config = format!("[registry.\"{}\"]\n  http = true\n", faults.host());
    let daemon = Daemon::with().config(&config).start();
    let reference = format!("{}/team/app:1", faults.host());
    let outcome = daemon
        .buildx()
        .build(&Fixture::new(APP))
        .args(&["-t", &reference, "--push"])
        .run();
    if outcome.code == Some(0) {
        assert_eq!(
            Image::pull(&registry, "team/app", "1").file("pushed").text(),
            "pushed\n"
        );
    } else {
        // The reference may give up here.
        assert!(harness::lab::is_reference(), "{}", outcome.stderr);
    }
}
