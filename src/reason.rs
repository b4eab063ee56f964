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
    fn reason(&self) -> &'static str;
    /// Whether trying again makes sense.
    fn retry(&self) -> Retry;
}
