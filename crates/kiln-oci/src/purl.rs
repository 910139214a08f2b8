//! Package URLs of images, as attestations name them (package-url specification, type `docker`).

use crate::{ImageRef, Platform};

/// The package URL of an image: `pkg:<kind>/<familiar name>@<tag>?platform=…`. A reference with a digest has a `digest`
/// qualifier and no tag of its own making; `kind` is `docker`, or `oci` for layouts.
pub fn image(kind: &str, image: &ImageRef, platform: Option<&Platform>) -> String {
    let reference = image.clone().or_latest();
    let name = reference.familiar_name();
    let mut out = format!("pkg:{kind}");
    for part in name.split('/') {
        out.push('/');
        escape(part, b"-_.~", &mut out);
    }
    if let Some(tag) = reference.tag() {
        out.push('@');
        escape(tag, PATH, &mut out);
    }
    let mut separator = '?';
    let mut qualifier = |key: &str, value: &str| {
        out.push(separator);
        separator = '&';
        out.push_str(key);
        out.push('=');
        escape(value, PATH, &mut out);
    };
    if let Some(digest) = reference.digest() {
        qualifier("digest", &digest.to_string());
    }
    if let Some(p) = platform {
        let p = p.normalized();
        let variant = if p.variant.is_empty() {
            String::new()
        } else {
            format!("/{}", p.variant)
        };
        qualifier("platform", &format!("{}/{}{variant}", p.os, p.architecture));
    }
    out
}

/// What may stand literally in a path segment besides letters and digits.
const PATH: &[u8] = b"-_.~$&+:=@";

fn escape(text: &str, literal: &[u8], out: &mut String) {
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || literal.contains(&b) {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_have_package_urls() {
        let hex = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        let amd64: Platform = "linux/amd64".parse().unwrap();
        for (text, platform, want) in [
            ("alpine", None, "pkg:docker/alpine@latest".to_owned()),
            (
                "user/test:v2",
                Some(&amd64),
                "pkg:docker/user/test@v2?platform=linux%2Famd64".to_owned(),
            ),
            (
                "localhost:5000/a/b:1",
                None,
                "pkg:docker/localhost%3A5000/a/b@1".to_owned(),
            ),
            (
                &format!("alpine@sha256:{hex}"),
                Some(&amd64),
                format!("pkg:docker/alpine?digest=sha256:{hex}&platform=linux%2Famd64"),
            ),
            (
                &format!("alpine:3@sha256:{hex}"),
                None,
                format!("pkg:docker/alpine@3?digest=sha256:{hex}"),
            ),
        ] {
            assert_eq!(
                image("docker", &ImageRef::parse(text).unwrap(), platform),
                want,
                "{text}"
            );
        }
    }
}
