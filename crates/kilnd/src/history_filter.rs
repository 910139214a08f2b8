//! Filters of build records: comma-separated terms, all of which must hold; several texts are alternatives.

use std::cmp::Ordering;
use std::time::{Duration, SystemTime};

use kiln_proto::control::BuildHistoryRecord;

use crate::filter::{Filter, FilterError};

/// A parsed list of filters.
#[derive(Debug, Default)]
pub struct HistoryFilter {
    alternatives: Vec<(Filter, Vec<Comparison>)>,
}

#[derive(Debug)]
struct Comparison {
    field: Field,
    or_equal: bool,
    ordering: Ordering,
    value: Value,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Field {
    StartedAt,
    CompletedAt,
    Duration,
}

#[derive(Clone, Copy, Debug)]
enum Value {
    Length(Duration),
    Time(SystemTime),
}

impl HistoryFilter {
    /// Parses a list. Times are RFC 3339, or durations before now.
    pub fn parse(texts: &[String]) -> Result<Self, FilterError> {
        let mut alternatives = Vec::new();
        for text in texts.iter().filter(|t| !t.trim().is_empty()) {
            let mut plain = Vec::new();
            let mut comparisons = Vec::new();
            for term in text.split(',').map(str::trim).filter(|t| !t.is_empty()) {
                match comparison(term) {
                    None => plain.push(term),
                    Some(Ok(c)) => comparisons.push(c),
                    Some(Err(reason)) => {
                        return Err(FilterError {
                            text: text.clone(),
                            reason,
                        });
                    }
                }
            }
            alternatives.push((Filter::parse(&[plain.join(",")])?, comparisons));
        }
        Ok(Self { alternatives })
    }

    /// Whether the record matches one of the filters.
    pub fn matches(&self, record: &BuildHistoryRecord) -> bool {
        let fields = |path: &str| match path {
            "ref" => Some(record.r#ref.clone()),
            "status" => Some(state(record).to_owned()),
            "repository" => repository(record),
            _ => None,
        };
        self.alternatives.is_empty()
            || self
                .alternatives
                .iter()
                .any(|(filter, comparisons)| filter.matches(&fields) && comparisons.iter().all(|c| c.holds(record)))
    }
}

fn state(record: &BuildHistoryRecord) -> &'static str {
    match (&record.completed_at, &record.error) {
        (None, _) => "running",
        (_, None) => "completed",
        (_, Some(e)) if e.code == tonic::Code::Cancelled as i32 => "canceled",
        (_, Some(_)) => "error",
    }
}

fn repository(record: &BuildHistoryRecord) -> Option<String> {
    record
        .frontend_attrs
        .get("vcs:source")
        .or_else(|| record.frontend_attrs.get("context"))
        .cloned()
}

fn comparison(term: &str) -> Option<Result<Comparison, String>> {
    let (name, field) = [
        ("startedAt", Field::StartedAt),
        ("completedAt", Field::CompletedAt),
        ("duration", Field::Duration),
    ]
    .into_iter()
    .find(|(name, _)| term.starts_with(name))?;
    let rest = term.strip_prefix(name)?;
    let (ordering, or_equal, value) = if let Some(v) = rest.strip_prefix("<=") {
        (Ordering::Less, true, v)
    } else if let Some(v) = rest.strip_prefix(">=") {
        (Ordering::Greater, true, v)
    } else if let Some(v) = rest.strip_prefix('<') {
        (Ordering::Less, false, v)
    } else if let Some(v) = rest.strip_prefix('>') {
        (Ordering::Greater, false, v)
    } else {
        return Some(Err(format!("expected <, <=, > or >= after {name}")));
    };
    let value = value.trim().trim_matches('"');
    let parsed = match crate::size::parse_duration(value) {
        Some(length) => Some(Value::Length(length)),
        None => value.parse::<jiff::Timestamp>().ok().map(|t| Value::Time(t.into())),
    };
    Some(match parsed {
        Some(value) => Ok(Comparison {
            field,
            or_equal,
            ordering,
            value,
        }),
        None => Err(format!("`{value}` is neither a duration nor a time")),
    })
}

impl Comparison {
    fn holds(&self, record: &BuildHistoryRecord) -> bool {
        let time = |t: &Option<kiln_proto::Timestamp>| t.and_then(|t| SystemTime::try_from(t).ok());
        let (started, completed) = (time(&record.created_at), time(&record.completed_at));
        let found = match (self.field, self.value) {
            (Field::Duration, Value::Length(limit)) => started.map(|s| {
                let end = completed.unwrap_or_else(SystemTime::now);
                end.duration_since(s).unwrap_or_default().cmp(&limit)
            }),
            (Field::Duration, Value::Time(_)) => None,
            (field, value) => {
                let limit = match value {
                    Value::Time(t) => Some(t),
                    Value::Length(ago) => SystemTime::now().checked_sub(ago),
                };
                let at = if field == Field::StartedAt { started } else { completed };
                at.zip(limit).map(|(at, limit)| at.cmp(&limit))
            }
        };
        found.is_some_and(|o| o == self.ordering || self.or_equal && o == Ordering::Equal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::timestamp;

    #[test]
    fn terms_are_joined_and_compared() {
        let now = SystemTime::now();
        let record = BuildHistoryRecord {
            r#ref: "abc".into(),
            created_at: Some(timestamp(now - Duration::from_secs(7200))),
            completed_at: Some(timestamp(now - Duration::from_secs(7140))),
            ..Default::default()
        };
        for (filter, expected) in [
            ("status==completed", true),
            ("status==error", false),
            ("ref~=^a,duration<=2m", true),
            ("duration>2m", false),
            ("startedAt<1h", true),
            ("startedAt>1h", false),
            ("completedAt>=2000-01-01T00:00:00Z", true),
        ] {
            let parsed = HistoryFilter::parse(&[filter.to_owned()]).unwrap();
            assert_eq!(parsed.matches(&record), expected, "{filter}");
        }
        assert!(HistoryFilter::parse(&["startedAt~1h".to_owned()]).is_err());
        assert!(HistoryFilter::parse(&[String::new()]).unwrap().matches(&record));
    }
}
