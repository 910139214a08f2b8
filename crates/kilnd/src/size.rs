//! Sizes and durations as configuration files and flags write them.

use std::time::Duration;

use serde::Deserialize;

/// An amount of disk: bytes, or a share of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSpace {
    /// Bytes.
    Bytes(u64),
    /// Percent of the disk.
    Percent(u64),
}

impl DiskSpace {
    /// The amount in bytes on a disk of `disk` bytes. A share is rounded up to whole GiB and given in GB, so that it is
    /// the number other BuildKit daemons use; an unknown disk counts 2 GB.
    pub fn bytes(self, disk: Option<u64>) -> u64 {
        match (self, disk) {
            (Self::Bytes(n), _) => n,
            (Self::Percent(_), None) => 2_000_000_000,
            (Self::Percent(p), Some(total)) => {
                let share = u128::from(total) * u128::from(p) / 100;
                u64::try_from((share >> 30) + 1)
                    .unwrap_or(u64::MAX)
                    .saturating_mul(1_000_000_000)
            }
        }
    }
}

/// Parses `512MB`, `10%`, `1.5g`, `1024`. Units are binary, a trailing `b` or `ib` means nothing.
pub fn parse_disk_space(text: &str) -> Option<DiskSpace> {
    let text = text.trim();
    if let Some(percent) = text.strip_suffix('%') {
        return percent.trim().parse().ok().map(DiskSpace::Percent);
    }
    parse_size(text).map(DiskSpace::Bytes)
}

/// Parses a size with binary units.
pub fn parse_size(text: &str) -> Option<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift);
    }
    let value: f64 = number.parse().ok()?;
    let bytes = value * (1u64 << shift) as f64;
    (bytes.is_finite() && bytes >= 0.0 && bytes < u64::MAX as f64).then_some(bytes as u64)
}

/// Parses a duration as Go writes it (`1h30m`, `500ms`), or plain seconds.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut total = 0f64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let scale = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * scale;
        rest = tail;
    }
    Duration::try_from_secs_f64(total).ok()
}

/// A number of bytes, or a text for [`parse_disk_space`].
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum DiskSpaceText {
    /// Bytes.
    Number(u64),
    /// With a unit or `%`.
    Text(String),
}

impl DiskSpaceText {
    /// The amount, or the text that is none.
    pub fn parse(&self) -> Result<DiskSpace, String> {
        match self {
            Self::Number(n) => Ok(DiskSpace::Bytes(*n)),
            Self::Text(t) => parse_disk_space(t).ok_or_else(|| t.clone()),
        }
    }
}

/// A number of seconds, or a text for [`parse_duration`].
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum DurationText {
    /// Seconds.
    Number(u64),
    /// With units.
    Text(String),
}

impl DurationText {
    /// The duration, or the text that is none.
    pub fn parse(&self) -> Result<Duration, String> {
        match self {
            Self::Number(n) => Ok(Duration::from_secs(*n)),
            Self::Text(t) => parse_duration(t).ok_or_else(|| t.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes) in [
            ("1024", 1024),
            ("512MB", 512 << 20),
            ("1g", 1 << 30),
            ("1.5k", 1536),
            ("3 GiB", 3 << 30),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for bad in ["", "MB", "1x", "-1"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
        assert_eq!(DiskSpace::Percent(10).bytes(Some(100 << 30)), 11_000_000_000);
        assert_eq!(DiskSpace::Percent(10).bytes(None), 2_000_000_000);
    }

    #[test]
    fn durations_are_go_or_seconds() {
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("60"), Some(Duration::from_secs(60)));
        assert_eq!(parse_duration("5 apples"), None);
        assert_eq!(parse_duration(""), None);
    }
}
