//! The registry of a process's metrics.

use prometheus_client::{encoding::text::encode, metrics::info::Info, registry::Registry};
use std::sync::{Mutex, PoisonError};

/// Content type of `OpenMetrics` text.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of this process. Their names begin with `virt_fleece_`.
#[derive(Debug)]
pub struct Metrics(Mutex<Registry>);

impl Metrics {
    /// A registry that knows the version of the program and its role, such as `controller`.
    pub fn new(role: &'static str) -> Self {
        let mut registry = Registry::with_prefix("virt_fleece");
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION")), ("role", role)]);
        registry.register("build", "Version and role of this process", build);
        Self(Mutex::new(registry))
    }

    /// Registers metrics. Called once by each owner of some.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All metrics as `OpenMetrics` text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string fails only where a metric's own encoder does.
        let _ = encode(&mut text, &self.0.lock().unwrap_or_else(PoisonError::into_inner));
        text
    }
}
