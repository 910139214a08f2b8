//! The image config: a typed view over a JSON object whose unknown members survive.
//!
//! Frontends and tools put members into a config that no struct knows (`Healthcheck`, `OnBuild`, `moby.buildkit.…`), so a
//! config is never re-encoded from a struct: it is a map of raw values, of which a few are read and replaced. Writing
//! gives compact JSON with top-level members in byte order and Go's escapes (semantics.md §7, "Config and manifest").

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::descriptor::null_as_default;
use crate::{DiffId, HistoryEntry, Platform, Timestamp, go_json};

/// The `PATH` of images and steps that set none, on everything but Windows.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An image config. See the module's text.
#[derive(Clone, Debug, Default)]
pub struct ImageConfig {
    members: BTreeMap<String, Box<RawValue>>,
}

/// Why bytes are no usable image config.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("failed to parse image config")]
    Parse(#[source] serde_json::Error),
    /// A known member has the wrong type.
    #[error("failed to parse member `{member}` of image config")]
    Member {
        /// Name of the member.
        member: &'static str,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// `os` or `architecture` is missing.
    #[error("invalid image config: {0} is missing")]
    Missing(&'static str),
    /// A value could not be written.
    #[error("failed to write image config")]
    Write(#[source] serde_json::Error),
}

/// The `config` member: how to run the image (OCI image config, "config", and Docker's additions).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    /// User, or user and group, by name or id.
    #[serde(deserialize_with = "null_as_default")]
    pub user: String,
    /// `port/protocol` keys with empty objects.
    #[serde(deserialize_with = "null_as_default")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    /// `NAME=value` in order.
    #[serde(deserialize_with = "null_as_default")]
    pub env: Vec<String>,
    /// Entry point; absent and empty differ.
    pub entrypoint: Option<Vec<String>>,
    /// Default arguments.
    pub cmd: Option<Vec<String>>,
    /// Volume paths with empty objects.
    #[serde(deserialize_with = "null_as_default")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    /// Working directory.
    #[serde(deserialize_with = "null_as_default")]
    pub working_dir: String,
    /// Labels.
    #[serde(deserialize_with = "null_as_default")]
    pub labels: BTreeMap<String, String>,
    /// Signal that stops a container.
    #[serde(deserialize_with = "null_as_default")]
    pub stop_signal: String,
    /// Whether the command line is already escaped (Windows).
    #[serde(deserialize_with = "null_as_default")]
    pub args_escaped: bool,
    /// Instructions for builds on top of this image.
    #[serde(deserialize_with = "null_as_default")]
    pub on_build: Vec<String>,
    /// Default shell of shell-form instructions.
    pub shell: Option<Vec<String>>,
    /// Health check as Docker writes it.
    pub healthcheck: Option<serde_json::Value>,
    /// Whatever else is there.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

#[derive(Serialize, Deserialize, Default)]
struct RootFs {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    diff_ids: Option<Vec<DiffId>>,
}

impl ImageConfig {
    /// Reads a config. Only the outer object is looked at; members are parsed when asked for.
    ///
    /// # Errors
    /// [`ConfigError::Parse`] for anything but a JSON object in UTF-8.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        Ok(Self {
            members: serde_json::from_slice(bytes).map_err(ConfigError::Parse)?,
        })
    }

    /// The config of a result for which nobody gave one: the platform, the default `PATH` and `/` as working directory.
    ///
    /// # Errors
    /// None in practice.
    pub fn empty(platform: &Platform) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        config.set("architecture", &platform.architecture)?;
        config.set("os", &platform.os)?;
        if !platform.variant.is_empty() {
            config.set("variant", &platform.variant)?;
        }
        if !platform.os_version.is_empty() {
            config.set("os.version", &platform.os_version)?;
        }
        if !platform.os_features.is_empty() {
            config.set("os.features", &platform.os_features)?;
        }
        if platform.os == "windows" {
            config.set("config", &serde_json::json!({"WorkingDir": "/"}))?;
        } else {
            config.set(
                "config",
                &serde_json::json!({"Env": [format!("PATH={DEFAULT_PATH}")], "WorkingDir": "/"}),
            )?;
        }
        config.set_layers(&[], &[])?;
        Ok(config)
    }

    /// One member, parsed; `None` if it is absent or null.
    ///
    /// # Errors
    /// [`ConfigError::Member`] if it has another type.
    pub fn get<'a, T: Deserialize<'a>>(&'a self, member: &'static str) -> Result<Option<T>, ConfigError> {
        match self.members.get(member) {
            None => Ok(None),
            Some(raw) => serde_json::from_str(raw.get()).map_err(|source| ConfigError::Member { member, source }),
        }
    }

    /// Replaces one member.
    ///
    /// # Errors
    /// [`ConfigError::Write`] if the value has no JSON form.
    pub fn set<T: Serialize + ?Sized>(&mut self, member: &str, value: &T) -> Result<(), ConfigError> {
        let text = go_json::to_string(value).map_err(ConfigError::Write)?;
        let raw = RawValue::from_string(text).map_err(ConfigError::Write)?;
        self.members.insert(member.to_owned(), raw);
        Ok(())
    }

    /// Whether the member is there, be it null.
    pub fn has(&self, member: &str) -> bool {
        self.members.contains_key(member)
    }

    /// Removes one member.
    pub fn remove(&mut self, member: &str) {
        self.members.remove(member);
    }

    /// Which platform the image is for; both `os` and `architecture` must be there.
    ///
    /// # Errors
    /// [`ConfigError::Missing`] or [`ConfigError::Member`].
    pub fn platform(&self) -> Result<Platform, ConfigError> {
        let text = |member| Ok::<String, ConfigError>(self.get::<String>(member)?.unwrap_or_default());
        let p = Platform {
            architecture: text("architecture")?,
            os: text("os")?,
            os_version: text("os.version")?,
            os_features: self.get("os.features")?.unwrap_or_default(),
            variant: text("variant")?,
        };
        if p.os.is_empty() {
            return Err(ConfigError::Missing("os"));
        }
        if p.architecture.is_empty() {
            return Err(ConfigError::Missing("architecture"));
        }
        Ok(p)
    }

    /// The layers' diff ids, bottom first; empty if there are none or if `rootfs.type` is not `layers`.
    ///
    /// # Errors
    /// [`ConfigError::Member`] if `rootfs` is malformed.
    pub fn diff_ids(&self) -> Result<Vec<DiffId>, ConfigError> {
        let rootfs: RootFs = self.get("rootfs")?.unwrap_or_default();
        Ok(if rootfs.kind == "layers" {
            rootfs.diff_ids.unwrap_or_default()
        } else {
            Vec::new()
        })
    }

    /// The history entries.
    ///
    /// # Errors
    /// [`ConfigError::Member`] if `history` is malformed.
    pub fn history(&self) -> Result<Vec<HistoryEntry>, ConfigError> {
        Ok(self.get("history")?.unwrap_or_default())
    }

    /// When the image was made.
    ///
    /// # Errors
    /// [`ConfigError::Member`] if `created` is no time.
    pub fn created(&self) -> Result<Option<Timestamp>, ConfigError> {
        self.get("created")
    }

    /// How to run the image.
    ///
    /// # Errors
    /// [`ConfigError::Member`] if `config` is malformed.
    pub fn run_config(&self) -> Result<RunConfig, ConfigError> {
        Ok(self.get("config")?.unwrap_or_default())
    }

    /// Replaces `rootfs` and `history`. No layers are written as null, as Go writes a nil list.
    ///
    /// # Errors
    /// None in practice.
    pub fn set_layers(&mut self, diff_ids: &[DiffId], history: &[HistoryEntry]) -> Result<(), ConfigError> {
        let diff_ids = (!diff_ids.is_empty()).then(|| diff_ids.to_vec());
        self.set(
            "rootfs",
            &RootFs {
                kind: "layers".to_owned(),
                diff_ids,
            },
        )?;
        self.set("history", &(!history.is_empty()).then_some(history))
    }

    /// Replaces `created`; `None` is written as null.
    ///
    /// # Errors
    /// None in practice.
    pub fn set_created(&mut self, created: Option<Timestamp>) -> Result<(), ConfigError> {
        self.set("created", &created)
    }

    /// The bytes to store and to hash: compact, top-level members in byte order, inner values in their given order.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.push(b'{');
        for (i, (name, raw)) in self.members.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            // A string always has a JSON form.
            out.extend_from_slice(&go_json::to_vec(name).unwrap_or_default());
            out.push(b':');
            go_json::compact(raw.get(), &mut out);
        }
        out.push(b'}');
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Digest;

    #[test]
    fn unknown_members_survive_and_the_order_is_fixed() {
        let mut c = ImageConfig::parse(
            br#" { "os":"linux", "custom":{"z": 1.0, "a": "<x>"}, "architecture":"amd64",
                  "config":{"Healthcheck":{"Test":["NONE"]},"OnBuild":["RUN x"],"Env":null,"Weird":1}, "history": null }"#,
        )
        .unwrap();
        let a = DiffId(Digest::of("a"));
        c.set_layers(
            &[a],
            &[HistoryEntry {
                created_by: "RUN a && b".into(),
                ..HistoryEntry::default()
            }],
        )
        .unwrap();
        c.set_created(Some(Timestamp::new(0, 0))).unwrap();
        let want = format!(
            r#"{{"architecture":"amd64","config":{{"Healthcheck":{{"Test":["NONE"]}},"OnBuild":["RUN x"],"Env":null,"Weird":1}},"created":"1970-01-01T00:00:00Z","custom":{{"z":1.0,"a":"\u003cx\u003e"}},"history":[{{"created_by":"RUN a \u0026\u0026 b"}}],"os":"linux","rootfs":{{"type":"layers","diff_ids":["{a}"]}}}}"#
        );
        assert_eq!(String::from_utf8(c.to_bytes()).unwrap(), want);
        let run = c.run_config().unwrap();
        assert_eq!(run.on_build, ["RUN x"]);
        assert!(run.env.is_empty() && run.other.contains_key("Weird"));
        assert_eq!(c.diff_ids().unwrap(), [a]);
        assert_eq!(c.platform().unwrap().id(), "linux/amd64");
        assert!(oci_spec::image::ImageConfiguration::from_reader(c.to_bytes().as_slice()).is_ok());
    }

    #[test]
    fn no_layers_are_null() {
        let c = ImageConfig::empty(&Platform::new("linux", "arm64", "")).unwrap();
        assert_eq!(
            String::from_utf8(c.to_bytes()).unwrap(),
            r#"{"architecture":"arm64","config":{"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"WorkingDir":"/"},"history":null,"os":"linux","rootfs":{"type":"layers","diff_ids":null}}"#
        );
        assert!(c.diff_ids().unwrap().is_empty());
    }

    #[test]
    fn bad_configs_are_named() {
        assert!(matches!(ImageConfig::parse(b"[]"), Err(ConfigError::Parse(_))));
        let c = ImageConfig::parse(br#"{"os":"linux","rootfs":3}"#).unwrap();
        assert!(matches!(c.platform(), Err(ConfigError::Missing("architecture"))));
        assert!(matches!(
            c.diff_ids(),
            Err(ConfigError::Member { member: "rootfs", .. })
        ));
    }
}
