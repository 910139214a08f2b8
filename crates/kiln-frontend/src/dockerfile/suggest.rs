//! "Did you mean …?": the nearest of a few options, at most two edits away.

use std::cell::RefCell;

thread_local! {
    static ROWS: RefCell<(Vec<usize>, Vec<usize>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// The option nearest to `value`, if one is at most two edits away. A value that is one of the options gets no suggestion: the
/// trouble lies elsewhere. Of equally near options one
/// made of the same letters wins, else the first.
pub(crate) fn nearest<'a>(value: &str, options: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut best: Option<&str> = None;
    let mut limit = 3;
    for option in options {
        if option == value {
            return None;
        }
        // One more than the best so far is enough to tell equally near from further away.
        let distance = distance(value, option, limit + 1);
        let swapped = || distance == limit && limit < 3 && letters(option) == letters(value);
        if distance < limit || (swapped() && best.is_some_and(|b| letters(b) != letters(value))) {
            limit = distance;
            best = Some(option);
        }
    }
    best.filter(|s| !s.is_empty())
}

/// As [`nearest`] without regard to case; the answer is written in the case of `value`.
pub(crate) fn nearest_any_case<'a>(value: &str, options: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let lower: Vec<String> = options.into_iter().map(str::to_lowercase).collect();
    let found = nearest(&value.to_lowercase(), lower.iter().map(String::as_str))?;
    Some(if value == value.to_lowercase() {
        found.to_owned()
    } else if value == value.to_uppercase() {
        found.to_uppercase()
    } else {
        found.to_owned()
    })
}

fn letters(text: &str) -> Vec<char> {
    let mut letters: Vec<char> = text.chars().take(256).collect();
    letters.sort_unstable();
    letters
}

/// Edits between `a` and `b`, or `limit` when there are at least that many.
fn distance(a: &str, b: &str, limit: usize) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(256).collect(), b.chars().take(256).collect());
    if a.len().abs_diff(b.len()) >= limit {
        return limit;
    }
    ROWS.with_borrow_mut(|(previous, current)| {
        previous.clear();
        previous.extend(0..=b.len());
        for (i, x) in a.iter().enumerate() {
            current.clear();
            current.push(i + 1);
            for (j, y) in b.iter().enumerate() {
                let up = previous.get(j + 1).copied().unwrap_or(limit) + 1;
                let left = current.get(j).copied().unwrap_or(limit) + 1;
                let diagonal = previous.get(j).copied().unwrap_or(limit) + usize::from(x != y);
                current.push(up.min(left).min(diagonal));
            }
            std::mem::swap(previous, current);
        }
        previous.last().copied().unwrap_or(limit).min(limit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_nearest_within_two_edits() {
        let options = ["build", "base", "test"];
        assert_eq!(nearest("bulid", options), Some("build"));
        assert_eq!(nearest("bild", options), Some("build"));
        assert_eq!(nearest("production", options), None);
        assert_eq!(nearest("base", options), None);
        assert_eq!(nearest("rnu", ["env", "run"]), Some("run"));
        assert_eq!(nearest_any_case("FORM", ["FROM", "RUN"]), Some("FROM".to_owned()));
        assert_eq!(nearest_any_case("cpoy", ["COPY"]), Some("copy".to_owned()));
        assert_eq!(nearest_any_case("Cpoy", ["COPY"]), Some("copy".to_owned()));
    }
}
