//! Values with commas in them: outputs, caches, secrets.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use kiln_session::attach::{ExportTarget, Secret};

use crate::error::{CliError, Result};

/// Splits `type=oci,"dest=a,b"` into pairs: fields are separated by commas, a field with a comma stands in quotes.
pub(crate) fn fields(text: &str) -> Result<Vec<(String, String)>> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let Some(field) = fields.last_mut() else { break };
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                field.push('"');
            }
            '"' if quoted || field.is_empty() => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            character => field.push(character),
        }
    }
    if quoted {
        return Err(CliError::usage(format!("{text:?}: a quote is not closed")));
    }
    Ok(fields
        .into_iter()
        .map(|field| match field.split_once('=') {
            Some((key, value)) => (key.trim().to_lowercase(), value.to_owned()),
            None => (field, String::new()),
        })
        .collect())
}

/// An exporter for the daemon, and where its result goes on this side.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) kind: String,
    pub(crate) attrs: BTreeMap<String, String>,
    pub(crate) target: Option<ExportTarget>,
}

/// Reads `--output`: `type=…` with attributes, a directory, or `-` for a tar archive on standard output.
pub(crate) fn output(text: &str) -> Result<Option<Output>> {
    let mut attrs: BTreeMap<String, String> = match text {
        "-" => [
            ("type".to_owned(), "tar".to_owned()),
            ("dest".to_owned(), "-".to_owned()),
        ]
        .into(),
        _ if !text.contains('=') => [
            ("type".to_owned(), "local".to_owned()),
            ("dest".to_owned(), text.to_owned()),
        ]
        .into(),
        _ => fields(text)?.into_iter().collect(),
    };
    let Some(mut kind) = attrs.remove("type") else {
        return Err(CliError::usage(format!("--output {text}: type is missing")));
    };
    let dest = attrs.remove("dest");
    if kind == "registry" {
        kind = "image".to_owned();
        attrs.insert("push".to_owned(), "true".to_owned());
    }
    let target = match kind.as_str() {
        "cacheonly" => return Ok(None),
        "local" => {
            let Some(dest) = dest else {
                return Err(CliError::usage("--output type=local needs dest=DIRECTORY"));
            };
            let delete = attrs.get("mode").is_some_and(|mode| mode == "delete");
            Some(ExportTarget::Directory {
                path: PathBuf::from(dest),
                delete,
            })
        }
        "tar" | "oci" | "docker" => Some(match dest.as_deref() {
            Some("-") | None if std::io::stdout().is_terminal() => {
                return Err(CliError::usage(format!(
                    "--output type={kind}: a terminal is no place for it, name dest=FILE"
                )));
            }
            Some("-") | None => ExportTarget::Writer(Box::new(std::io::stdout())),
            Some(dest) => ExportTarget::File(PathBuf::from(dest)),
        }),
        _ => None,
    };
    Ok(Some(Output { kind, attrs, target }))
}

/// Reads `--secret`: `id=ID[,src=PATH]`, `id=ID,env=NAME`.
pub(crate) fn secret(text: &str) -> Result<(String, Secret)> {
    let mut id = None;
    let (mut file, mut env, mut kind) = (None, None, None);
    for (key, value) in fields(text)? {
        match key.as_str() {
            "id" => id = Some(value),
            "src" | "source" => file = Some(value),
            "env" => env = Some(value),
            "type" if value == "file" || value == "env" => kind = Some(value),
            _ => return Err(CliError::usage(format!("--secret {text}: unexpected {key:?}"))),
        }
    }
    let Some(id) = id else {
        return Err(CliError::usage(format!("--secret {text}: id is missing")));
    };
    if kind.as_deref() == Some("env") && env.is_none() {
        env = file.take();
    }
    let variable = env.clone().unwrap_or_else(|| id.clone());
    if file.is_none()
        && let Some(value) = std::env::var_os(&variable)
    {
        return Ok((id, Secret::Value(Bytes::from(value.into_encoded_bytes()))));
    }
    if let Some(name) = env {
        return Err(CliError::usage(format!(
            "--secret {text}: the environment has no {name}"
        )));
    }
    let path = PathBuf::from(file.unwrap_or_else(|| id.clone()));
    if !path.is_file() {
        return Err(CliError::usage(format!(
            "--secret {text}: {} is not a file",
            path.display()
        )));
    }
    Ok((id, Secret::File(path)))
}

/// Reads `--ssh`: `default`, or `ID=SOCKET`.
pub(crate) fn ssh(text: &str) -> Result<(String, PathBuf)> {
    let (id, socket) = match text.split_once('=') {
        Some((id, socket)) => (id, PathBuf::from(socket)),
        None => match std::env::var_os("SSH_AUTH_SOCK") {
            Some(socket) => (text, PathBuf::from(socket)),
            None => return Err(CliError::usage(format!("--ssh {text}: SSH_AUTH_SOCK is not set"))),
        },
    };
    use std::os::unix::fs::FileTypeExt as _;
    let is_socket = std::fs::metadata(&socket).is_ok_and(|metadata| metadata.file_type().is_socket());
    if !is_socket {
        let socket = socket.display();
        return Err(CliError::usage(format!(
            "--ssh {text}: {socket} is not the socket of an agent (key files are added with ssh-add)"
        )));
    }
    Ok((id.to_owned(), socket))
}

/// A cache to import from or export to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cache {
    pub(crate) kind: String,
    pub(crate) attrs: BTreeMap<String, String>,
}

/// Reads `--cache-from` and `--cache-to`; a plain name is an image.
pub(crate) fn cache(text: &str) -> Result<Cache> {
    if !text.contains('=') {
        return Ok(Cache {
            kind: "registry".to_owned(),
            attrs: BTreeMap::from([("ref".to_owned(), text.to_owned())]),
        });
    }
    let mut attrs: BTreeMap<String, String> = fields(text)?.into_iter().collect();
    match attrs.remove("type") {
        Some(kind) => Ok(Cache { kind, attrs }),
        None => Err(CliError::usage(format!("{text}: type is missing"))),
    }
}

/// The tag under which a local cache directory keeps its manifest.
fn tag_of(cache: &Cache) -> &str {
    cache.attrs.get("tag").map_or("latest", String::as_str)
}

const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// The digest a local cache directory has under the cache's tag, from its `index.json`.
pub(crate) fn local_cache_digest(cache: &Cache) -> Result<Option<String>> {
    let Some(source) = cache.attrs.get("src") else {
        return Err(CliError::usage("a local cache needs src=DIRECTORY"));
    };
    let path = Path::new(source).join("index.json");
    let Ok(text) = std::fs::read(&path) else {
        return Ok(None);
    };
    let index: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| CliError::io(path.display().to_string(), error.into()))?;
    let manifests = index.get("manifests").and_then(|manifests| manifests.as_array());
    let tagged = manifests.into_iter().flatten().find(|manifest| {
        let name = manifest
            .get("annotations")
            .and_then(|annotations| annotations.get(REF_NAME));
        name.and_then(|name| name.as_str()) == Some(tag_of(cache))
    });
    Ok(tagged.and_then(|manifest| Some(manifest.get("digest")?.as_str()?.to_owned())))
}

/// Files a new cache manifest (the daemon's descriptor of it) in a local cache directory.
pub(crate) fn file_local_cache(cache: &Cache, descriptor: &str) -> Result<()> {
    let Some(dest) = cache.attrs.get("dest") else {
        return Ok(());
    };
    let path = Path::new(dest).join("index.json");
    let failed = |error: std::io::Error| CliError::io(format!("write {}", path.display()), error);
    let mut entry: serde_json::Value = serde_json::from_str(descriptor).map_err(|error| failed(error.into()))?;
    entry["annotations"] = serde_json::json!({ REF_NAME: tag_of(cache) });
    let old: serde_json::Value = std::fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let mut manifests: Vec<_> = old
        .get("manifests")
        .and_then(|list| list.as_array())
        .cloned()
        .unwrap_or_default();
    let name = |value: &serde_json::Value| value.get("annotations").and_then(|map| map.get(REF_NAME)).cloned();
    manifests.retain(|manifest| name(manifest) != name(&entry));
    manifests.push(entry);
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    });
    let partial = path.with_extension("json.partial");
    std::fs::write(&partial, index.to_string())
        .and_then(|()| std::fs::rename(&partial, &path))
        .map_err(failed)
}

/// Bytes in `10GB`, `512MiB`, `1000`.
pub(crate) fn size(text: &str) -> Result<i64> {
    let split = text
        .find(|character: char| !character.is_ascii_digit() && character != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit.trim().to_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(CliError::usage(format!("{text:?} is not a size"))),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| CliError::usage(format!("{text:?} is not a size")))?;
    Ok((number * factor) as i64)
}

/// Nanoseconds in `36h`, `90m`, `1h30m`, `7d`.
pub(crate) fn duration(text: &str) -> Result<i64> {
    let bad = || CliError::usage(format!("{text:?} is not a duration"));
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let split = rest
            .find(|character: char| !character.is_ascii_digit() && character != '.')
            .ok_or_else(bad)?;
        let (number, tail) = rest.split_at(split);
        let end = tail
            .find(|character: char| character.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86400.0,
            _ => return Err(bad()),
        };
        total += number.parse::<f64>().map_err(|_| bad())? * seconds;
        rest = tail;
    }
    Ok((total * 1e9) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_commas() {
        let parsed = fields(r#"type=oci,"dest=a,b.tar",Name=x"#).unwrap();
        let pairs: Vec<_> = parsed
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        assert_eq!(pairs, [("type", "oci"), ("dest", "a,b.tar"), ("name", "x")]);
        assert!(fields(r#"a="b"#).is_ok(), "a quote inside a value is a character");
        assert!(fields(r#""a=b"#).is_err());
    }

    #[test]
    fn outputs() {
        let local = output("out/dir").unwrap().unwrap();
        assert_eq!(local.kind, "local");
        assert!(matches!(
            local.target,
            Some(ExportTarget::Directory { delete: false, .. })
        ));
        let oci = output("type=oci,dest=x.tar,compression=zstd").unwrap().unwrap();
        assert_eq!(
            oci.attrs,
            BTreeMap::from([("compression".to_owned(), "zstd".to_owned())])
        );
        assert!(matches!(oci.target, Some(ExportTarget::File(_))));
        let registry = output("type=registry,name=a/b").unwrap().unwrap();
        assert_eq!(
            (registry.kind.as_str(), registry.attrs["push"].as_str()),
            ("image", "true")
        );
        assert!(output("type=cacheonly").unwrap().is_none());
        assert!(output("dest=x").is_err());
        assert!(output("type=local").is_err());
    }

    #[test]
    fn secrets() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "x").unwrap();
        let (id, value) = secret(&format!("id=t,src={}", file.display())).unwrap();
        assert_eq!(
            (id.as_str(), matches!(value, Secret::File(path) if path == file)),
            ("t", true)
        );
        assert!(matches!(secret("id=home,env=PATH").unwrap().1, Secret::Value(_)));
        assert!(secret("id=x,env=SURELY_NOT_SET_ANYWHERE").is_err());
        assert!(secret("src=x").is_err());
        assert!(secret("id=x,src=/does/not/exist").is_err());
    }

    #[test]
    fn sizes_and_durations() {
        assert_eq!(size("10GB").unwrap(), 10_000_000_000);
        assert_eq!(size("1.5MiB").unwrap(), 1_572_864);
        assert!(size("much").is_err());
        assert_eq!(duration("1h30m").unwrap(), 5_400_000_000_000);
        assert_eq!(duration("250ms").unwrap(), 250_000_000);
        assert!(duration("soon").is_err());
        assert!(duration("10").is_err());
    }

    #[test]
    fn a_local_cache_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let to = cache(&format!("type=local,dest={at}")).unwrap();
        let from = cache(&format!("type=local,src={at}")).unwrap();
        assert_eq!(local_cache_digest(&from).unwrap(), None);
        for digest in ["sha256:aa", "sha256:bb"] {
            file_local_cache(&to, &format!(r#"{{"mediaType":"m","digest":"{digest}","size":1}}"#)).unwrap();
            assert_eq!(local_cache_digest(&from).unwrap().as_deref(), Some(digest));
        }
        let other = cache(&format!("type=local,src={at},tag=other")).unwrap();
        assert_eq!(local_cache_digest(&other).unwrap(), None);
        assert_eq!(cache("user/image").unwrap().attrs["ref"], "user/image");
    }
}
