//! When a repository is asked, and what its answer means. Pure.

use super::{
    decision::{MoverFact, MoverState},
    quantity::quantity,
    reasons::reason,
    target,
};
use crate::{
    api::{BackupRepositorySpec, ConditionStatus, RepositoryStatus, find_condition, kinds, set_condition},
    mover::config::MoverOutcome,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::time::Duration;

/// A probe that failed is repeated after this: somebody may have mended a secret, which nobody tells us.
const AGAIN: Duration = Duration::from_secs(60);
/// A probe's pod that does not run after this is given up.
const START: Duration = Duration::from_secs(300);

/// What to do about a repository.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Probe {
    /// Make the pod.
    Begin,
    /// Look again after this.
    Wait(Duration),
    /// It waits for its pod; why, where that is known.
    Pending(String),
    /// Take the outcome, and delete the pod.
    Finish(Result<MoverOutcome, String>),
    /// The pod is being deleted.
    Gone,
}

/// What counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    pub(super) now: Timestamp,
    pub(super) generation: i64,
    pub(super) spec: &'a BackupRepositorySpec,
    pub(super) status: &'a RepositoryStatus,
    pub(super) pod: Option<&'a MoverFact>,
    /// How long the pod has been seen in its state.
    pub(super) pod_for: Duration,
    /// How long ago this controller saw a probe end.
    pub(super) last_end: Option<Duration>,
}

/// Decides.
pub(super) fn decide(facts: &Facts<'_>) -> Probe {
    if let Some(pod) = facts.pod {
        return match &pod.state {
            _ if pod.foreign => Probe::Pending("a pod that is not ours has the probe's name: delete it".into()),
            _ if pod.deleting => Probe::Gone,
            MoverState::Ended(Some(outcome)) => Probe::Finish(Ok(outcome.clone())),
            MoverState::Ended(None) => Probe::Finish(Err("the probe ended without an outcome: see its log".into())),
            MoverState::Running => Probe::Wait(Duration::from_secs(60)),
            MoverState::Pending(why) if facts.pod_for >= START => {
                let why = why.as_deref().unwrap_or("see the Events of the pod");
                Probe::Finish(Err(format!("the pod of the probe does not start: {why}")))
            }
            MoverState::Pending(why) => Probe::Pending(why.clone().unwrap_or_default()),
        };
    }
    let ready = find_condition(&facts.status.conditions, kinds::READY);
    // What was found is about another spec, or nothing was found yet.
    let Some(ready) =
        ready.filter(|ready| ready.observed_generation == Some(facts.generation) && ready.reason != reason::PROBING)
    else {
        return Probe::Begin;
    };
    let interval = super::duration::parse(&facts.spec.probe_interval).unwrap_or(Duration::from_secs(3600));
    let (pause, past) = if ready.status == ConditionStatus::True.as_str() {
        let last = facts.status.last_probe.as_ref().map(|last| facts.now.duration_since(last.0));
        (interval, last.map(|past| Duration::try_from(past).unwrap_or_default()))
    } else {
        (interval.min(AGAIN), facts.last_end)
    };
    match past.map(|past| pause.saturating_sub(past)) {
        Some(left) if !left.is_zero() => Probe::Wait(left),
        _ => Probe::Begin,
    }
}

fn present(status: &RepositoryStatus, generation: i64, spec: &BackupRepositorySpec) -> RepositoryStatus {
    let mut status = status.clone();
    status.observed_generation = Some(generation);
    status.location = Some(target::location(spec));
    status
}

/// It is being asked, for the first time or about another spec. What was found before stays in force meanwhile.
pub(super) fn probing(facts: &Facts<'_>, why: &str) -> RepositoryStatus {
    let mut status = present(facts.status, facts.generation, facts.spec);
    let known = find_condition(&status.conditions, kinds::READY).cloned();
    let unknown = known.as_ref().is_none_or(|ready| ready.reason == reason::PROBING);
    if !unknown && known.is_some_and(|ready| ready.observed_generation == Some(facts.generation)) {
        // A repetition: nothing that anybody has to know.
        return status;
    }
    let message = if why.is_empty() { "the repository is being opened".to_owned() } else { printable(why) };
    set(&mut status, facts, kinds::RECONCILING, (ConditionStatus::True, reason::PROBING, &message));
    if unknown {
        set(&mut status, facts, kinds::READY, (ConditionStatus::False, reason::PROBING, &message));
    }
    status
}

fn printable(text: &str) -> String {
    crate::reason::printable(text, 1000)
}

/// What a probe found.
pub(super) fn found(facts: &Facts<'_>, outcome: &Result<MoverOutcome, String>) -> RepositoryStatus {
    let mut status = present(facts.status, facts.generation, facts.spec);
    status.conditions.retain(|condition| condition.type_ != kinds::RECONCILING && condition.type_ != kinds::STALLED);
    match outcome {
        Ok(MoverOutcome::Probed { repository_id, backups, virtual_machines, logical_bytes, stored_bytes, damaged }) => {
            let number = |value: u64| Some(i64::try_from(value).unwrap_or(i64::MAX));
            status.repository_id = Some(repository_id.clone());
            status.backups = number(*backups);
            status.virtual_machines = number(*virtual_machines);
            status.stored_bytes = number(*stored_bytes);
            status.stored = Some(quantity(*stored_bytes));
            let ratio = *logical_bytes as f64 / (*stored_bytes).max(1) as f64;
            status.deduplication_ratio = (*stored_bytes > 0).then(|| format!("{ratio:.1}"));
            status.last_probe = Some(Time(facts.now));
            let (reason, message) = if *damaged > 0 {
                let message = format!("{damaged} backups cannot be read: `virt-fleece repository check` tells which");
                (reason::DAMAGED_BACKUPS, message)
            } else {
                (reason::READY, format!("{backups} backups of {virtual_machines} virtual machines"))
            };
            answer(&mut status, facts, (ConditionStatus::True, reason, &message));
            reach(&mut status, facts, (ConditionStatus::True, reason::REACHED, "the repository was opened"));
        }
        other => {
            let (reason, message, retryable) = match other {
                Ok(MoverOutcome::Failed { reason, message, retryable }) => {
                    (reason.as_str(), message.as_str(), *retryable)
                }
                Ok(_) => (reason::PROBE_FAILED, "the probe did something else", true),
                Err(why) => (reason::PROBE_FAILED, why.as_str(), true),
            };
            let word: String = reason.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
            let word = if word.starts_with(|c: char| c.is_ascii_alphabetic()) { word } else { "Unknown".into() };
            let message = printable(message);
            answer(&mut status, facts, (ConditionStatus::False, &word, &message));
            reach(&mut status, facts, (ConditionStatus::False, &word, &message));
            let kind = if retryable { kinds::RECONCILING } else { kinds::STALLED };
            set(&mut status, facts, kind, (ConditionStatus::True, &word, &message));
        }
    }
    status
}

fn set(
    status: &mut RepositoryStatus,
    facts: &Facts<'_>,
    kind: &str,
    (value, why, text): (ConditionStatus, &str, &str),
) {
    set_condition(&mut status.conditions, kind, value, why, text, Some(facts.generation), facts.now);
}

fn answer(status: &mut RepositoryStatus, facts: &Facts<'_>, what: (ConditionStatus, &str, &str)) {
    set(status, facts, kinds::READY, what);
}

fn reach(status: &mut RepositoryStatus, facts: &Facts<'_>, what: (ConditionStatus, &str, &str)) {
    set(status, facts, kinds::REACHABLE, what);
}

#[cfg(test)]
mod tests {
    use super::{super::target::samples::repository, *};
    use serde_json::json;

    fn conditions(status: &RepositoryStatus) -> Vec<String> {
        status.conditions.iter().map(|c| format!("{}={}:{}", c.type_, c.status, c.reason)).collect()
    }

    fn pod(state: MoverState) -> MoverFact {
        MoverFact { uid: "u".into(), foreign: false, deleting: false, node: None, state }
    }

    fn probed(damaged: u64) -> MoverOutcome {
        MoverOutcome::Probed {
            repository_id: "id".into(),
            backups: 7,
            virtual_machines: 2,
            logical_bytes: 124,
            stored_bytes: 10,
            damaged,
        }
    }

    #[test]
    fn a_repository_is_asked_at_first_after_changes_and_now_and_then() {
        let spec = repository(json!({"probeInterval": "1h"}));
        let now = Timestamp::from_second(100_000).unwrap();
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        let facts = |status, pod, generation| Facts {
            now,
            generation,
            spec: &spec,
            status,
            pod,
            pod_for: Duration::ZERO,
            last_end: Some(Duration::from_secs(20)),
        };
        let nothing = RepositoryStatus::default();
        assert_eq!(decide(&facts(&nothing, None, 1)), Probe::Begin);
        let asked = probing(&facts(&nothing, None, 1), "");
        assert_eq!(conditions(&asked), ["Reconciling=True:Probing", "Ready=False:Probing"]);
        assert_eq!(decide(&facts(&asked, None, 1)), Probe::Begin);
        let good = found(&facts(&asked, None, 1), &Ok(probed(0)));
        assert_eq!(conditions(&good), ["Ready=True:Ready", "Reachable=True:Reached"]);
        assert_eq!((good.stored.as_deref(), good.deduplication_ratio.as_deref()), (Some("10"), Some("12.4")));
        assert_eq!(decide(&facts(&good, None, 1)), Probe::Wait(minutes(60)));
        assert_eq!(probing(&facts(&good, None, 1), "x"), good, "a repetition changes nothing");
        assert_eq!(decide(&facts(&good, None, 2)), Probe::Begin, "another spec");
        let changed = probing(&facts(&good, None, 2), "");
        assert_eq!(conditions(&changed), ["Ready=True:Ready", "Reachable=True:Reached", "Reconciling=True:Probing"]);
        assert_eq!(decide(&facts(&changed, None, 2)), Probe::Begin);
        let last_probe = Some(Time(now - jiff::SignedDuration::from_mins(61)));
        let old = RepositoryStatus { last_probe, ..good.clone() };
        assert_eq!(decide(&facts(&old, None, 1)), Probe::Begin);
        let damaged = found(&facts(&good, None, 1), &Ok(probed(3)));
        assert_eq!(conditions(&damaged)[0], "Ready=True:DamagedBackups");
    }

    #[test]
    fn failures_are_told_and_asked_again_soon() {
        let spec = repository(json!({}));
        let nothing = RepositoryStatus::default();
        let mut facts = Facts {
            now: Timestamp::UNIX_EPOCH,
            generation: 1,
            spec: &spec,
            status: &nothing,
            pod: None,
            pod_for: Duration::ZERO,
            last_end: None,
        };
        let failed =
            |retryable| Ok(MoverOutcome::Failed { reason: "WrongPassphrase".into(), message: "m".into(), retryable });
        let bad = found(&facts, &failed(false));
        let expected =
            ["Ready=False:WrongPassphrase", "Reachable=False:WrongPassphrase", "Stalled=True:WrongPassphrase"];
        assert_eq!(conditions(&bad), expected);
        assert_eq!(conditions(&found(&facts, &failed(true)))[2], "Reconciling=True:WrongPassphrase");
        facts.status = &bad;
        assert_eq!(decide(&facts), Probe::Begin, "after a restart");
        facts.last_end = Some(Duration::from_secs(20));
        assert_eq!(decide(&facts), Probe::Wait(Duration::from_secs(40)));
        facts.last_end = Some(Duration::from_secs(60));
        assert_eq!(decide(&facts), Probe::Begin);
        // Its pod.
        let cases = [
            (pod(MoverState::Running), Probe::Wait(Duration::from_secs(60))),
            (pod(MoverState::Pending(Some("no secret".into()))), Probe::Pending("no secret".into())),
            (pod(MoverState::Ended(Some(probed(0)))), Probe::Finish(Ok(probed(0)))),
            (MoverFact { deleting: true, ..pod(MoverState::Ended(None)) }, Probe::Gone),
        ];
        for (pod, expected) in &cases {
            facts.pod = Some(pod);
            assert_eq!(decide(&facts), *expected);
        }
        facts.pod = Some(&cases[1].0);
        facts.pod_for = START;
        assert!(matches!(decide(&facts), Probe::Finish(Err(why)) if why.contains("no secret")));
        facts.pod_for = Duration::ZERO;
        let lost = pod(MoverState::Ended(None));
        facts.pod = Some(&lost);
        assert!(matches!(decide(&facts), Probe::Finish(Err(_))));
    }
}
