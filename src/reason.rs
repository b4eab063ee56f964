//! What every error of this crate can answer: a stable reason for machines, and whether trying again makes sense.

use std::time::Duration;

/// Whether the same attempt may succeed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Trying again gives the same result until somebody changes something.
    Terminal,
    /// A passing condition: try again with growing delays.
    Backoff,
    /// Try again after this time.
    After(Duration),
}

/// An error that can be reported to a machine as well as to a person.
pub trait Reason: std::error::Error {
    /// Stable CamelCase word, for JSON output, conditions and metrics.
    fn reason(&self) -> &str;
    /// Whether trying again makes sense.
    fn retry(&self) -> Retry;
}

/// The beginning of an untrusted text, for errors: they end up on terminals and in logs, where control characters do
/// not belong, and a long one fills the screen.
pub(crate) fn printable(text: &str, longest: usize) -> String {
    text.chars().take(longest).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_printed_moves_no_cursor() {
        assert_eq!(super::printable("\u{1b}[2J\u{9b}é\r\nend and more", 9), " [2J é  e");
    }
}
