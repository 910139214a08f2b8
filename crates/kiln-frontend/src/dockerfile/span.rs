//! Places in a Dockerfile: whole physical lines.

/// The physical lines `first` to `last`, counted from 1 and both included. A client sees one range per line, each from
/// character 0 to character 0 of that line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    first: u32,
    last: u32,
}

impl Span {
    /// A location that names no line at all.
    pub const EMPTY: Span = Span { first: 1, last: 0 };

    /// Lines `first` to `last`; a `last` before `first` means the single line `first`.
    pub fn lines(first: u32, last: u32) -> Self {
        Self {
            first,
            last: last.max(first),
        }
    }

    /// One line.
    pub fn line(line: u32) -> Self {
        Self {
            first: line,
            last: line,
        }
    }

    /// The first line, `None` for [`Span::EMPTY`].
    pub fn first(&self) -> Option<u32> {
        (!self.is_empty()).then_some(self.first)
    }

    /// The last line, `None` for [`Span::EMPTY`].
    pub fn last(&self) -> Option<u32> {
        (!self.is_empty()).then_some(self.last)
    }

    /// Whether the span names no line.
    pub fn is_empty(&self) -> bool {
        self.first > self.last
    }

    /// Every line of the span.
    pub fn iter(&self) -> impl Iterator<Item = u32> + use<> {
        self.first..=self.last
    }
}
