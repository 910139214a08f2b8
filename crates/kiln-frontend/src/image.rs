//! The image config a build produces, member by member as the original writes it.
//!
//! A base image's config passes through this form: members it does not have are lost, as they always were; that is observable
//! in image ids.

use std::collections::BTreeMap;

use kiln_oci::image_config::DEFAULT_PATH;
use kiln_oci::{HistoryEntry, Platform, Timestamp, go_json};
use serde::{Deserialize, Deserializer, Serialize};

/// `PATH` of Windows images, which their system sets.
const WINDOWS: &str = "windows";

/// An image config.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Image {
    /// When it was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// Who made it.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "null")]
    pub author: String,
    /// Architecture.
    #[serde(deserialize_with = "null")]
    pub architecture: String,
    /// Operating system.
    #[serde(deserialize_with = "null")]
    pub os: String,
    /// Version of the operating system.
    #[serde(
        rename = "os.version",
        skip_serializing_if = "String::is_empty",
        deserialize_with = "null"
    )]
    pub os_version: String,
    /// Features of the operating system.
    #[serde(
        rename = "os.features",
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null"
    )]
    pub os_features: Vec<String>,
    /// Variant of the architecture.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "null")]
    pub variant: String,
    /// Layers.
    #[serde(deserialize_with = "null")]
    pub rootfs: RootFs,
    /// How it came to be.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null")]
    pub history: Vec<HistoryEntry>,
    /// How to run it.
    #[serde(deserialize_with = "null")]
    pub config: RunConfig,
}

/// Layers of an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type", deserialize_with = "null")]
    pub kind: String,
    /// Diff ids from the bottom up; null and empty are written differently.
    pub diff_ids: Option<Vec<String>>,
}

/// How to run an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RunConfig {
    /// User.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "null")]
    pub user: String,
    /// Ports.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null")]
    pub exposed_ports: BTreeMap<String, Empty>,
    /// Environment, in the order of first assignment.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null")]
    pub env: Vec<String>,
    /// Entry point.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null")]
    pub entrypoint: Vec<String>,
    /// Default arguments.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null")]
    pub cmd: Vec<String>,
    /// Volumes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null")]
    pub volumes: BTreeMap<String, Empty>,
    /// Working directory.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "null")]
    pub working_dir: String,
    /// Labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null")]
    pub labels: BTreeMap<String, String>,
    /// Signal that stops it.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "null")]
    pub stop_signal: String,
    /// Whether the command was given as one string (Windows).
    #[serde(skip_serializing_if = "std::ops::Not::not", deserialize_with = "null")]
    pub args_escaped: bool,
    /// Health check.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<HealthConfig>,
    /// Triggers for builds on top of it.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null")]
    pub on_build: Vec<String>,
    /// Shell of shell-form instructions.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null")]
    pub shell: Vec<String>,
}

/// An empty JSON object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// A health check, durations in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct HealthConfig {
    /// `NONE`, or `CMD`/`CMD-SHELL` and the command.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null")]
    pub test: Vec<String>,
    /// Between checks.
    #[serde(skip_serializing_if = "is_zero")]
    pub interval: i64,
    /// For one check.
    #[serde(skip_serializing_if = "is_zero")]
    pub timeout: i64,
    /// Before failures count.
    #[serde(skip_serializing_if = "is_zero")]
    pub start_period: i64,
    /// Between checks in the start period.
    #[serde(skip_serializing_if = "is_zero")]
    pub start_interval: i64,
    /// Failures in a row.
    #[serde(skip_serializing_if = "is_zero")]
    pub retries: i64,
}

fn is_zero(n: &i64) -> bool {
    *n == 0
}

/// `null` is the same as absent.
fn null<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

impl Image {
    /// Reads a config.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// The config of the empty file system.
    pub fn empty(platform: &Platform) -> Self {
        let mut image = Self::default();
        image.set_platform(platform.clone());
        image.rootfs.kind = "layers".to_owned();
        image.config.working_dir = "/".to_owned();
        if platform.os != WINDOWS {
            image.config.env.push(format!("PATH={DEFAULT_PATH}"));
        }
        image
    }

    /// As JSON.
    pub fn to_json(&self) -> Vec<u8> {
        go_json::to_vec(self).unwrap_or_default()
    }

    /// The platform as written.
    pub fn platform(&self) -> Platform {
        Platform {
            architecture: self.architecture.clone(),
            os: self.os.clone(),
            os_version: self.os_version.clone(),
            os_features: self.os_features.clone(),
            variant: self.variant.clone(),
        }
    }

    /// Sets the platform.
    pub fn set_platform(&mut self, p: Platform) {
        self.architecture = p.architecture;
        self.os = p.os;
        self.os_version = p.os_version;
        self.os_features = p.os_features;
        self.variant = p.variant;
    }

    /// Whether the image has no layers and never had any.
    pub fn is_empty(&self) -> bool {
        self.rootfs.diff_ids.as_ref().is_none_or(Vec::is_empty) && self.history.iter().all(|h| h.empty_layer)
    }

    /// Adds the default `PATH` if none is set.
    pub fn ensure_path(&mut self, os: &str) {
        let set = self.config.env.iter().any(|e| split_env(e).0 == "PATH");
        if !set && os != WINDOWS {
            self.config.env.push(format!("PATH={DEFAULT_PATH}"));
        }
    }
}

/// Name and value of a `NAME=value` entry.
pub(crate) fn split_env(entry: &str) -> (&str, &str) {
    entry.split_once('=').unwrap_or((entry, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_in_their_order_and_unknown_ones_lost() {
        let json = br#"{"config":{"Cmd":["a"],"Env":null,"Labels":{"b":"<"},"Foo":1,"ExposedPorts":{"80/tcp":{}}},
            "os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":null},"x":1,
            "history":[{"created":"2020-01-01T00:00:00Z","created_by":"x"}]}"#;
        let image = Image::parse(json).unwrap();
        let want = "{\"architecture\":\"amd64\",\"os\":\"linux\",\"rootfs\":{\"type\":\"layers\",\"diff_ids\":null},\
            \"history\":[{\"created\":\"2020-01-01T00:00:00Z\",\"created_by\":\"x\"}],\
            \"config\":{\"ExposedPorts\":{\"80/tcp\":{}},\"Cmd\":[\"a\"],\"Labels\":{\"b\":\"\\u003c\"}}}";
        assert_eq!(String::from_utf8(image.to_json()).unwrap(), want);
        assert!(!image.is_empty());
        assert!(Image::empty(&Platform::new("linux", "amd64", "")).is_empty());
    }
}
