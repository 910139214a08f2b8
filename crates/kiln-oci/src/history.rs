//! How an image's history is made to agree with its layers, and how an epoch clamps it (semantics.md §7, "Config").

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::descriptor::null_as_default;

/// One entry of an image config's history (OCI image config, "history").
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// When the entry was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// The command that made it.
    #[serde(
        default,
        skip_serializing_if = "String::is_empty",
        deserialize_with = "null_as_default"
    )]
    pub created_by: String,
    /// The author of the build.
    #[serde(
        default,
        skip_serializing_if = "String::is_empty",
        deserialize_with = "null_as_default"
    )]
    pub author: String,
    /// Any comment.
    #[serde(
        default,
        skip_serializing_if = "String::is_empty",
        deserialize_with = "null_as_default"
    )]
    pub comment: String,
    /// Whether the entry made no layer.
    #[serde(
        default,
        skip_serializing_if = "std::ops::Not::not",
        deserialize_with = "null_as_default"
    )]
    pub empty_layer: bool,
}

/// What is known of a layer beside its bytes, for history entries that the frontend did not write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerNote {
    /// Which vertex made it, for example `[2/3] RUN make`.
    pub description: String,
    /// When it was made.
    pub created: Option<Timestamp>,
}

/// The comment of entries that were added here.
pub const ADDED_COMMENT: &str = "buildkit.exporter.image.v0";

/// Makes `history` fit `layers` (bottom first): afterwards there is exactly one entry not marked empty for every layer,
/// and every entry has a time if any time is known at all.
pub fn normalize(mut history: Vec<HistoryEntry>, layers: &[LayerNote]) -> Vec<HistoryEntry> {
    let mut seen = 0;
    for entry in history.iter_mut().filter(|e| !e.empty_layer) {
        match layers.get(seen) {
            Some(note) => {
                entry.created = entry.created.or(note.created);
                seen += 1;
            }
            None => entry.empty_layer = true,
        }
    }
    for note in layers.iter().skip(seen) {
        history.push(HistoryEntry {
            created: note.created,
            created_by: note.description.clone(),
            comment: ADDED_COMMENT.to_owned(),
            ..HistoryEntry::default()
        });
    }
    // Entries without a time before the first new layer would else get the time of the base image: the first gap takes
    // the time that follows it, later ones the time before them.
    let Some(first_gap) = history.iter().position(|e| e.created.is_none()) else {
        return history;
    };
    let (before, after) = history.split_at(first_gap);
    let mut current = after
        .iter()
        .find_map(|e| e.created)
        .or_else(|| before.last().and_then(|e| e.created));
    for entry in history.iter_mut().skip(first_gap) {
        match entry.created {
            Some(t) => current = Some(t),
            None => entry.created = current,
        }
    }
    history
}

/// Lowers times later than `epoch` (and missing ones) to it, except in the leading entries that equal those of the base
/// image's `base` history: those describe what somebody else built.
pub fn clamp(history: &mut [HistoryEntry], base: &[HistoryEntry], epoch: Timestamp) {
    let common = history.iter().zip(base).take_while(|(a, b)| a == b).count();
    for entry in history.iter_mut().skip(common) {
        if entry.created.is_none_or(|t| t > epoch) {
            entry.created = Some(epoch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(by: &str, created: Option<i64>, empty: bool) -> HistoryEntry {
        HistoryEntry {
            created: created.map(|s| Timestamp::new(s, 0)),
            created_by: by.into(),
            empty_layer: empty,
            ..HistoryEntry::default()
        }
    }

    fn note(description: &str, created: i64) -> LayerNote {
        LayerNote {
            description: description.into(),
            created: Some(Timestamp::new(created, 0)),
        }
    }

    fn times(history: &[HistoryEntry]) -> Vec<Option<i64>> {
        history.iter().map(|e| e.created.map(|t| t.seconds())).collect()
    }

    #[test]
    fn gaps_take_the_time_after_the_first_gap_and_then_the_time_before() {
        let history = vec![
            entry("base", Some(10), false),
            entry("ENV", None, true),
            entry("RUN", None, false),
            entry("CMD", None, true),
            entry("COPY", Some(40), false),
            entry("LABEL", None, true),
        ];
        let fixed = normalize(history, &[note("", 1), note("", 30), note("", 35)]);
        assert_eq!(times(&fixed), [10, 30, 30, 30, 40, 40].map(Some));
        // nothing follows the gap: the last known time
        let fixed = normalize(vec![entry("a", Some(5), true), entry("b", None, true)], &[]);
        assert_eq!(times(&fixed), [Some(5), Some(5)]);
        assert_eq!(times(&normalize(vec![entry("b", None, true)], &[])), [None]);
    }

    #[test]
    fn entries_and_layers_agree_afterwards() {
        let fixed = normalize(
            vec![entry("base", Some(1), false)],
            &[note("x", 1), note("[2/2] RUN y", 7)],
        );
        assert_eq!(fixed[1].created_by, "[2/2] RUN y");
        assert_eq!(fixed[1].comment, ADDED_COMMENT);
        assert_eq!(fixed[1].created, Some(Timestamp::new(7, 0)));
        let fixed = normalize(
            vec![entry("a", Some(1), false), entry("b", Some(2), false)],
            &[note("x", 1)],
        );
        assert_eq!(fixed.iter().map(|e| e.empty_layer).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn the_epoch_leaves_the_base_image_alone() {
        let base = vec![entry("base", Some(100), false)];
        let mut history = vec![
            entry("base", Some(100), false),
            entry("RUN", Some(90), false),
            entry("CMD", None, true),
            entry("X", Some(5), true),
        ];
        clamp(&mut history, &base, Timestamp::new(50, 0));
        assert_eq!(times(&history), [100, 50, 50, 5].map(Some));
    }
}
