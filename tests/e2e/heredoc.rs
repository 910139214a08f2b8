//! Here-documents in RUN and COPY.

use harness::{Daemon, Fixture};

#[test]
fn in_run_and_copy() {
    let daemon = Daemon::start();
    let context = Fixture::new(
        r#"=== Dockerfile
FROM busybox
ARG WHO=kiln
ENV WHO=$WHO
RUN <<EOT
echo "hello $WHO" > /ran
cd /tmp
pwd >> /ran
EOT
RUN <<EOT sh > /piped
echo piped
EOT
RUN cat <<A > /two && cat <<B >> /two
first
A
second
B
COPY <<EOT /expanded
hello $WHO
EOT
COPY <<'EOT' /literal
hello $WHO
EOT
COPY --chmod=750 --chown=5:6 <<-one.txt <<two.txt /dir/
	tabs go
one.txt
2
two.txt
RUN <<EOT
#!/bin/cat
a script of its own
EOT
"#,
    );
    let (image, outcome) = daemon.buildx().build(&context).image_and_outcome();
    assert_eq!(image.file("ran").text(), "hello kiln\n/tmp\n");
    assert_eq!(image.file("piped").text(), "piped\n");
    assert_eq!(image.file("two").text(), "first\nsecond\n");
    assert_eq!(image.file("expanded").text(), "hello kiln\n");
    assert_eq!(image.file("literal").text(), "hello $WHO\n");
    assert_eq!(image.file("dir/one.txt").text(), "tabs go\n");
    let two = image.file("dir/two.txt");
    assert_eq!((two.text(), two.mode, two.uid, two.gid), ("2\n", 0o750, 5, 6));
    assert!(outcome.progress().log().contains("a script of its own"));
}
