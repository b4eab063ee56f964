//! What the processes of the operator have in common.

mod http;
mod metrics;

pub use http::{Health, ServeError, serve};
pub use metrics::Metrics;
