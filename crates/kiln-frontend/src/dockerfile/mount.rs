//! `RUN --mount`: what the options say, checked twice: names of stages when the file is read, the rest after expansion.

use super::suggest::nearest;
use crate::gotext::{csv_fields, parse_bool, parse_ram_size, parse_uint, quote};

/// Kind of mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MountKind {
    /// Files of a stage, an image or the context.
    #[default]
    Bind,
    /// A directory that persists.
    Cache,
    /// A directory in memory.
    Tmpfs,
    /// A secret.
    Secret,
    /// An agent socket.
    Ssh,
}

impl MountKind {
    const ALL: &[(&str, MountKind)] = &[
        ("bind", MountKind::Bind),
        ("cache", MountKind::Cache),
        ("tmpfs", MountKind::Tmpfs),
        ("secret", MountKind::Secret),
        ("ssh", MountKind::Ssh),
    ];

    /// Its name in a Dockerfile.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, kind)| *kind == self)
            .map_or("", |(name, _)| name)
    }
}

/// A mount of a RUN instruction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Kind.
    pub kind: MountKind,
    /// Stage, image or context to mount from; empty for the main context.
    pub from: String,
    /// Path in it, or the id of a secret.
    pub source: String,
    /// Where it appears.
    pub target: String,
    /// Not writable.
    pub readonly: bool,
    /// Limit of a tmpfs in bytes; 0 is none.
    pub size: i64,
    /// Id of a cache, secret or agent.
    pub id: String,
    /// Sharing of a cache, empty by default.
    pub sharing: String,
    /// A secret or agent that must be there.
    pub required: bool,
    /// Variable for a secret.
    pub env: Option<String>,
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

const KEYS: &[&str] = &[
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
];

const SHARING: &[&str] = &["shared", "private", "locked"];

impl Mount {
    /// The `from` of a mount as written, checked to be free of variables. Nothing else is looked at yet.
    pub fn written_from(text: &str) -> Result<String, String> {
        let mut from = String::new();
        for field in fields(text)? {
            let Some((key, value)) = field.split_once('=') else {
                continue;
            };
            if !key.eq_ignore_ascii_case("from") {
                continue;
            }
            if value.find('$').is_some_and(|i| i + 1 != value.len()) {
                return Err("'from' doesn't support variable expansion, define alias stage instead".to_owned());
            }
            from = value.to_owned();
        }
        Ok(from)
    }

    /// The mount, every value expanded by `expand`. Options count in the order in which they stand.
    pub fn parse<E: From<String>>(text: &str, mut expand: impl FnMut(&str) -> Result<String, E>) -> Result<Self, E> {
        let mut mount = Self::default();
        let mut readonly = None;
        for field in fields(text)? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => (key.to_lowercase(), Some(expand(value)?)),
                None => (field.to_lowercase(), None),
            };
            match (key.as_str(), value) {
                ("readonly" | "ro", None) => readonly = Some(true),
                ("readwrite" | "rw", None) => readonly = Some(false),
                ("required", None) => mount.required = mount.requirable(&key, true)?,
                (_, None) => return Err(format!("invalid field '{field}' must be a key=value pair").into()),
                (key, Some(value)) => mount.set(key, value, &field, &mut readonly)?,
            }
        }
        mount.readonly = readonly.unwrap_or(!matches!(mount.kind, MountKind::Cache | MountKind::Tmpfs));
        mount.check()?;
        Ok(mount)
    }

    fn requirable(&self, key: &str, value: bool) -> Result<bool, String> {
        match self.kind {
            MountKind::Secret | MountKind::Ssh => Ok(value),
            kind => Err(format!("unexpected key '{key}' for mount type '{}'", kind.name())),
        }
    }

    fn set(&mut self, key: &str, value: String, field: &str, readonly: &mut Option<bool>) -> Result<(), String> {
        let bad_bool = || format!("invalid value for {key}: {value}");
        let number = |radix| {
            let parsed = parse_uint(&value, radix, u64::from(u32::MAX));
            parsed
                .map(|n| n as u32)
                .map_err(|_| format!("invalid value {value} for {key}"))
        };
        match key {
            "type" => {
                let lower = value.to_lowercase();
                self.kind = MountKind::ALL
                    .iter()
                    .find(|(name, _)| *name == lower)
                    .map(|(_, kind)| *kind)
                    .ok_or_else(|| {
                        let hint = nearest(&value, MountKind::ALL.iter().map(|(name, _)| *name));
                        format!("unsupported mount type {}{}", quote(&value), did_you_mean(hint))
                    })?;
            }
            "from" => self.from = value,
            "source" | "src" => self.source = value,
            "target" | "dst" | "destination" => self.target = value,
            "readonly" | "ro" => *readonly = Some(parse_bool(&value).ok_or_else(bad_bool)?),
            "readwrite" | "rw" => *readonly = Some(!parse_bool(&value).ok_or_else(bad_bool)?),
            "required" => {
                self.requirable(key, true)?;
                self.required = parse_bool(&value).ok_or_else(bad_bool)?;
            }
            "size" if self.kind == MountKind::Tmpfs => self.size = parse_ram_size(&value).ok_or_else(bad_bool)?,
            "size" => return Err(format!("unexpected key '{key}' for mount type '{}'", self.kind.name())),
            "id" => self.id = value,
            "sharing" => {
                let lower = value.to_lowercase();
                if !SHARING.contains(&lower.as_str()) {
                    let hint = nearest(&value, SHARING.iter().copied());
                    return Err(format!(
                        "unsupported sharing value {}{}",
                        quote(&value),
                        did_you_mean(hint)
                    ));
                }
                self.sharing = lower;
            }
            "mode" => self.mode = Some(number(8)?),
            "uid" => self.uid = Some(number(10)?),
            "gid" => self.gid = Some(number(10)?),
            "env" => self.env = Some(value),
            key => {
                let hint = nearest(key, KEYS.iter().copied());
                return Err(format!("unexpected key '{key}' in '{field}'{}", did_you_mean(hint)));
            }
        }
        Ok(())
    }

    /// What may not stand together, whatever the order.
    fn check(&self) -> Result<(), String> {
        let kind = self.kind;
        if matches!(kind, MountKind::Bind | MountKind::Tmpfs) {
            for (name, value) in [("mode", self.mode), ("uid", self.uid), ("gid", self.gid)] {
                if value.is_some() {
                    return Err(format!("{name} not allowed for {} type mounts", quote(kind.name())));
                }
            }
        }
        if kind == MountKind::Secret {
            if !self.from.is_empty() {
                return Err("secret mount should not have a from".to_owned());
            }
            if !self.sharing.is_empty() {
                return Err("secret mount should not define sharing".to_owned());
            }
            if self.source.is_empty() && self.target.is_empty() && self.id.is_empty() {
                return Err("invalid secret mount. one of source, target required".to_owned());
            }
            if !self.source.is_empty() && !self.id.is_empty() {
                return Err("both source and id can't be set".to_owned());
            }
        }
        if !self.sharing.is_empty() && kind != MountKind::Cache {
            return Err(format!("invalid cache sharing set for {} mount", kind.name()));
        }
        Ok(())
    }
}

fn fields(text: &str) -> Result<Vec<String>, String> {
    csv_fields(text).map_err(|e| format!("failed to parse csv mounts: {e}"))
}

fn did_you_mean(option: Option<&str>) -> String {
    option.map(|o| format!(" (did you mean {o}?)")).unwrap_or_default()
}

/// A device of a RUN instruction, in the syntax of the labs channel: `name[,required[=bool]]`. The name, and whether it must
/// be there.
pub(crate) fn parse_device(text: &str) -> Result<(String, bool), String> {
    let mut name = String::new();
    let mut required = false;
    for field in csv_fields(text).map_err(|e| format!("failed to parse csv devices: {e}"))? {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.to_lowercase(), Some(value)),
            None => (field.to_lowercase(), None),
        };
        match (key.as_str(), value) {
            ("required", None) => required = true,
            ("required", Some(value)) => {
                required = parse_bool(value).ok_or_else(|| format!("invalid value for required: {value}"))?;
            }
            ("name", Some(_)) if !name.is_empty() => return Err(format!("device name already set to {name}")),
            ("name", Some(value)) => name = value.to_owned(),
            _ if name.is_empty() => name = field,
            (_, None) => return Err(format!("invalid field '{field}' must be a key=value pair")),
            (key, _) => {
                let hint = nearest(key, ["name", "required"]);
                return Err(format!("unexpected key '{key}' in '{field}'{}", did_you_mean(hint)));
            }
        }
    }
    Ok((name, required))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Mount, String> {
        Mount::parse(text, |v| Ok(v.replace("$x", "a,b")))
    }

    #[test]
    fn mounts() {
        assert_eq!(
            parse("type=cache,target=/c,sharing=Locked,mode=0755,uid=1").unwrap(),
            Mount {
                kind: MountKind::Cache,
                target: "/c".into(),
                sharing: "locked".into(),
                mode: Some(0o755),
                uid: Some(1),
                ..Mount::default()
            }
        );
        assert!(parse("target=/x").unwrap().readonly);
        assert!(!parse("target=/x,rw").unwrap().readonly);
        assert!(!parse("target=/x,RO=false").unwrap().readonly);
        assert_eq!(parse("type=tmpfs,size=1m").unwrap().size, 1 << 20);
        assert_eq!(parse("target=$x").unwrap().target, "a,b");
        assert!(parse("type=secret,id=a,required").unwrap().required);
    }

    #[test]
    fn refused_mounts() {
        for (text, message) in [
            ("type=foo", "unsupported mount type \"foo\""),
            ("type=bnd", "unsupported mount type \"bnd\" (did you mean bind?)"),
            ("typ=cache", "unexpected key 'typ' in 'typ=cache' (did you mean type?)"),
            ("foo", "invalid field 'foo' must be a key=value pair"),
            ("type=cache,sharing=x", "unsupported sharing value \"x\""),
            ("sharing=shared", "invalid cache sharing set for bind mount"),
            (
                "type=secret,id=a,sharing=shared",
                "secret mount should not define sharing",
            ),
            (
                "type=secret,env=A",
                "invalid secret mount. one of source, target required",
            ),
            ("type=secret,id=a,source=b", "both source and id can't be set"),
            ("type=secret,id=a,from=b", "secret mount should not have a from"),
            (
                "required,type=secret,id=a",
                "unexpected key 'required' for mount type 'bind'",
            ),
            ("size=1m,type=tmpfs", "unexpected key 'size' for mount type 'bind'"),
            ("type=tmpfs,size=zz", "invalid value for size: zz"),
            ("ro=maybe", "invalid value for ro: maybe"),
            ("type=cache,mode=9", "invalid value 9 for mode"),
            ("mode=755", "mode not allowed for \"bind\" type mounts"),
        ] {
            assert_eq!(parse(text).unwrap_err(), message, "{text}");
        }
        assert!(Mount::written_from("from=$x").is_err());
        assert_eq!(Mount::written_from("target=$x,FROM=a$").unwrap(), "a$");
    }
}
