//! Moves disk content: from an NBD export into an image sink.

mod asked;
mod bandwidth;
pub mod config;
mod pull;
mod survey;
mod trim;

pub use bandwidth::Bandwidth;
pub use pull::{PullError, PullProgress, PullRequest, PullSummary, pull};
