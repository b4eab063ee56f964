//! Metrics of the controller.

use crate::operator::Metrics;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
};

/// A finished backup.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ResultLabels {
    pub(super) result: &'static str,
    pub(super) reason: String,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct VmLabels {
    pub(super) namespace: String,
    pub(super) vm: String,
}

/// A kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct KindLabels {
    pub(super) kind: &'static str,
}

/// A repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RepositoryLabels {
    pub(super) kind: &'static str,
    pub(super) namespace: String,
    pub(super) name: String,
}

/// All of them.
#[derive(Debug, Clone)]
pub(super) struct ControllerMetrics {
    pub(super) leader: Gauge,
    pub(super) finished: Family<ResultLabels, Counter>,
    pub(super) attempts: Counter,
    pub(super) retries: Family<ResultLabels, Counter>,
    pub(super) duration: Histogram,
    pub(super) last_success: Family<VmLabels, Gauge>,
    pub(super) unfinished: Gauge,
    pub(super) at_work: Gauge,
    pub(super) queued: Gauge,
    pub(super) reconciles: Family<KindLabels, Counter>,
    pub(super) reconcile_errors: Family<KindLabels, Counter>,
    pub(super) reconcile_seconds: Histogram,
    pub(super) repository_ready: Family<RepositoryLabels, Gauge>,
    pub(super) repository_bytes: Family<RepositoryLabels, Gauge>,
}

impl ControllerMetrics {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let all = Self {
            leader: Gauge::default(),
            finished: Family::default(),
            attempts: Counter::default(),
            retries: Family::default(),
            // A second to a day and a half.
            duration: Histogram::new(exponential_buckets(1.0, 2.0, 18)),
            last_success: Family::default(),
            unfinished: Gauge::default(),
            at_work: Gauge::default(),
            queued: Gauge::default(),
            reconciles: Family::default(),
            reconcile_errors: Family::default(),
            reconcile_seconds: Histogram::new(exponential_buckets(0.000_1, 4.0, 9)),
            repository_ready: Family::default(),
            repository_bytes: Family::default(),
        };
        metrics.register(|registry| {
            let mut gauge = |name, help, metric: &Gauge| registry.register(name, help, metric.clone());
            gauge("leader", "Whether this process leads", &all.leader);
            gauge("backups_unfinished", "Backups that are not finished", &all.unfinished);
            gauge("backups_at_work", "Backups that have a place on a node", &all.at_work);
            gauge("backups_queued", "Backups that wait for a place", &all.queued);
            registry.register("backups_finished", "Backups that are finished", all.finished.clone());
            registry.register("backup_attempts", "Attempts that were begun", all.attempts.clone());
            registry.register("backup_retries", "Attempts that are followed by another", all.retries.clone());
            registry.register(
                "backup_duration_seconds",
                "Time from creation to completion of complete backups",
                all.duration.clone(),
            );
            registry.register(
                "last_success_timestamp_seconds",
                "When the newest complete backup of a VM became complete",
                all.last_success.clone(),
            );
            registry.register("reconciles", "Looks at an object", all.reconciles.clone());
            registry.register("reconcile_errors", "Looks that failed, and are repeated", all.reconcile_errors.clone());
            registry.register("reconcile_seconds", "Time that a look took", all.reconcile_seconds.clone());
            registry.register("repository_ready", "Whether a repository is ready", all.repository_ready.clone());
            registry.register(
                "repository_stored_bytes",
                "Size of a repository when it was last probed",
                all.repository_bytes.clone(),
            );
        });
        all
    }

    /// A VM has a complete backup as of this time, if there is no newer one.
    pub(super) fn note_success(&self, namespace: &str, vm: &str, seconds: i64) {
        let labels = VmLabels { namespace: namespace.into(), vm: vm.into() };
        let gauge = self.last_success.get_or_create(&labels);
        if gauge.get() < seconds {
            gauge.set(seconds);
        }
    }
}
