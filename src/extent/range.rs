//! Half-open byte ranges.

/// The bytes `start..end` of a disk. Never empty, never reversed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// The range `start..end` in bytes; `None` when it would be empty or reversed.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// The range of `length` bytes from `start`; `None` when it is empty or does not fit into 64 bits.
    pub fn with_length(start: u64, length: u64) -> Option<Self> {
        Self::new(start, start.checked_add(length)?)
    }

    /// First byte.
    pub fn start(self) -> u64 {
        self.start
    }

    /// First byte behind the range.
    pub fn end(self) -> u64 {
        self.end
    }

    /// Number of bytes, at least 1.
    #[allow(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// The bytes that both ranges have.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The bytes up to `offset` and those from it on.
    pub fn split_at(self, offset: u64) -> (Option<Self>, Option<Self>) {
        let offset = offset.clamp(self.start, self.end);
        (Self::new(self.start, offset), Self::new(offset, self.end))
    }
}

impl std::fmt::Display for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}
