//! An excerpt of a text with some lines marked.

/// The lines around `marked`, two on each side of a single line and one of a longer stretch, as clients print them. Empty if
/// there is nothing to show.
pub(super) fn print(filename: &str, text: &[u8], marked: &[u32]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.split('\n').collect();
    let count = u32::try_from(lines.len()).unwrap_or(u32::MAX);
    let (Some(&first), Some(&last)) = (marked.iter().min(), marked.iter().max()) else {
        return String::new();
    };
    if first < 1 || first > count {
        return String::new();
    }
    let (mut start, mut end) = (first, last.min(count));
    let context = if start == end { 4 } else { 2 };
    let mut shown = 0;
    while shown < context {
        if start > 1 {
            start -= 1;
            shown += 1;
        }
        if end != count {
            end += 1;
            shown += 1;
        }
        shown += 1;
    }
    let rule = "--------------------";
    let mut out = format!("{filename}:{first}\n{rule}\n");
    for (number, line) in (1u32..).zip(&lines).filter(|(n, _)| (start..=end).contains(n)) {
        let mark = if marked.contains(&number) { ">>>" } else { "   " };
        out.push_str(&format!(" {number:3} | {mark} {line}\n"));
    }
    out.push_str(rule);
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_on_both_sides() {
        let text = b"a\nb\nc\nd\ne\nf";
        let rule = "--------------------\n";
        assert_eq!(
            print("F", text, &[3]),
            format!("F:3\n{rule}   1 |     a\n   2 |     b\n   3 | >>> c\n   4 |     d\n   5 |     e\n{rule}")
        );
        assert_eq!(
            print("F", text, &[1, 2]),
            format!("F:1\n{rule}   1 | >>> a\n   2 | >>> b\n   3 |     c\n{rule}")
        );
        assert_eq!(print("F", text, &[0]), "");
        assert_eq!(print("F", text, &[9]), "");
        assert_eq!(print("F", text, &[]), "");
    }
}
