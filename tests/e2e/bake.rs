//! `docker buildx bake`: several targets in one go, one using another, and `--print`.

use harness::{Daemon, Fixture};

// caps: frontend.inputs
#[test]
fn targets_groups_and_contexts() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== docker-bake.hcl
variable "WHO" { default = "bake" }
group "default" { targets = ["app", "tool"] }
target "base" { dockerfile = "base.Dockerfile" }
target "app" {
  dockerfile = "app.Dockerfile"
  contexts = { base = "target:base" }
  args = { WHO = WHO }
  output = ["type=local,dest=out/app"]
}
target "tool" {
  dockerfile-inline = "FROM scratch\nCOPY tool.txt /"
  output = ["type=local,dest=out/tool"]
}
=== base.Dockerfile
FROM busybox
RUN echo base > /base.txt
=== app.Dockerfile
FROM base AS build
ARG WHO
RUN echo "$WHO on $(cat /base.txt)" > /app.txt
FROM scratch
COPY --from=build /app.txt /
=== tool.txt
tool
"#,
    );
    let buildx = daemon.buildx();
    let run = |args: &[&str]| {
        let mut command = buildx.command();
        command
            .current_dir(context.path())
            .args(["bake", "--progress=plain", "--allow=fs=*"])
            .args(args);
        command.output().unwrap()
    };
    let result = run(&[]);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    assert_eq!(context.read("out/app/app.txt"), "bake on base\n");
    assert_eq!(context.read("out/tool/tool.txt"), "tool\n");
    let result = run(&["--print", "app"]);
    let plan: serde_json::Value = serde_json::from_slice(&result.stdout).unwrap();
    assert_eq!(plan["target"]["app"]["args"]["WHO"], "bake");
}
