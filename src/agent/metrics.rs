//! Metrics of an agent. Movers have none of their own: they have no port, and what they did is in the run's status.

use super::report::Ending;
use crate::{operator::Metrics, run::RunStatus};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
};
use std::time::Duration;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RunLabels {
    result: &'static str,
    reason: String,
}

/// All of them.
#[derive(Debug, Clone)]
pub(super) struct AgentMetrics {
    pub(super) sessions: Gauge,
    pub(super) fleece_available: Gauge,
    ended: Family<RunLabels, Counter>,
    read: Counter,
    stored: Counter,
    duration: Histogram,
    pause: Histogram,
}

impl AgentMetrics {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let all = Self {
            sessions: Gauge::default(),
            fleece_available: Gauge::default(),
            ended: Family::default(),
            read: Counter::default(),
            stored: Counter::default(),
            // A second to a day and a half.
            duration: Histogram::new(exponential_buckets(1.0, 2.0, 18)),
            // Half a millisecond to half a second.
            pause: Histogram::new(exponential_buckets(0.000_5, 2.0, 11)),
        };
        metrics.register(|registry| {
            registry.register("agent_sessions", "Runs that this agent carries out", all.sessions.clone());
            let help = "Bytes that fleeces can still take on this node";
            registry.register("agent_fleece_available_bytes", help, all.fleece_available.clone());
            registry.register("agent_runs", "Runs that ended, by result and reason", all.ended.clone());
            registry.register("agent_read_bytes", "Bytes read from snapshots", all.read.clone());
            registry.register("agent_stored_bytes", "Bytes that movers stored for them", all.stored.clone());
            registry.register("agent_run_seconds", "How long runs took", all.duration.clone());
            let help = "How long points in time took to make";
            registry.register("agent_pause_seconds", help, all.pause.clone());
        });
        all
    }

    /// A run has ended.
    pub(super) fn ended(&self, ending: &Ending, status: &RunStatus, took: Duration) {
        let (result, reason) = match ending {
            Ending::Succeeded => ("succeeded", String::new()),
            Ending::Failed { reason, .. } => ("failed", reason.clone()),
            Ending::Aborted { reason, .. } => ("aborted", reason.clone()),
        };
        self.ended.get_or_create(&RunLabels { result, reason }).inc();
        self.read.inc_by(status.bytes().0);
        let summaries = status.volumes.iter().filter_map(|volume| volume.summary);
        self.stored.inc_by(summaries.map(|summary| summary.stored_bytes).sum());
        self.duration.observe(took.as_secs_f64());
        if let Some(cut) = &status.cut {
            self.pause.observe(cut.pause.as_secs_f64());
        }
    }
}
