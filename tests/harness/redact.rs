//! Takes out of a text what differs from run to run, so that two runs, or two daemons, can be compared.

use regex::Regex;
use std::sync::OnceLock;

/// Replaces digests, durations, sizes in transfer, temporary paths, ports and step times by names in angle brackets.
pub fn redact(text: &str) -> String {
    static RULES: OnceLock<Vec<(Regex, &'static str)>> = OnceLock::new();
    let rules = RULES.get_or_init(|| {
        [
            (r"sha256:[0-9a-f]{64}", "<digest>"),
            (r"/tmp/kiln-[A-Za-z0-9-]+", "<dir>"),
            (r"127\.0\.0\.1:\d+", "<registry>"),
            (r"(?m)^(#\d+) \d+\.\d+ ", "$1 <time> "),
            (r"\b\d+(\.\d+)?(ms|s)\b", "<time>"),
            (r"\b\d+(\.\d+)?\s?[kMG]?B( / \d+(\.\d+)?\s?[kMG]?B)?\b", "<size>"),
            (r"\b[a-z0-9]{25}\b", "<id>"),
        ]
        .into_iter()
        .map(|(pattern, name)| (Regex::new(pattern).expect("a valid pattern"), name))
        .collect()
    });
    rules.iter().fold(text.to_owned(), |text, (pattern, name)| {
        pattern.replace_all(&text, *name).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_goes() {
        let text = "#3 0.123 hi\n#3 DONE 1.2s\n#4 transferring context: 12.3kB done at /tmp/kiln-ab12/x";
        assert_eq!(
            redact(text),
            "#3 <time> hi\n#3 DONE <time>\n#4 transferring context: <size> done at <dir>/x"
        );
    }
}
