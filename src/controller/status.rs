//! The controller's part of a backup's status. Pure.
//!
//! Each write applies all of that part: what is left out is removed. So every function here begins with what is there,
//! and takes away deliberately. `run` is the agent's and is never among it.

use super::{
    decision::{MoverFact, MoverState},
    quantity::quantity,
    reasons::reason,
};
use crate::{
    api::{
        Abort, Assignment, BackupPhase, ConditionStatus, Run, RunState, RunType, VirtualMachineBackup,
        VirtualMachineBackupStatus, kinds, set_condition,
    },
    mover::config::MoverOutcome,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::time::Duration;

/// Characters that a message may have.
const LONGEST_MESSAGE: usize = 1000;
/// Characters that a reason may have.
const LONGEST_REASON: usize = 64;

/// A change of the status: what it is to become.
pub(super) type Status = VirtualMachineBackupStatus;

/// What the controller wrote so far.
pub(super) fn present(backup: &VirtualMachineBackup) -> Status {
    let mut status = backup.status.clone().unwrap_or_default();
    status.run = None;
    status.observed_generation = backup.metadata.generation;
    status
}

/// A text of others, as it may be shown.
fn text(message: &str) -> String {
    crate::reason::printable(message, LONGEST_MESSAGE)
}

/// A word of others as a reason: letters and digits, beginning with a letter, as conditions want it.
fn word(reason: &str) -> String {
    let word: String = reason.chars().filter(char::is_ascii_alphanumeric).take(LONGEST_REASON).collect();
    if word.starts_with(|c: char| c.is_ascii_alphabetic()) { word } else { "Unknown".into() }
}

fn set(status: &mut Status, kind: &str, value: ConditionStatus, reason: &str, message: &str, now: Timestamp) {
    let generation = status.observed_generation;
    set_condition(&mut status.conditions, kind, value, reason, message, generation, now);
}

fn unset(status: &mut Status, kind: &str) {
    status.conditions.retain(|condition| condition.type_ != kind);
}

/// It is not finished.
fn going_on(status: &mut Status, phase: BackupPhase, why: &str, message: &str, now: Timestamp) {
    let (why, message) = (word(why), text(message));
    set(status, kinds::READY, ConditionStatus::False, &why, &message, now);
    set(status, kinds::RECONCILING, ConditionStatus::True, &why, &message, now);
    (status.phase, status.reason, status.message) = (Some(phase), Some(why), Some(message));
}

/// What the agent tells goes into the summary.
fn summarize(status: &mut Status, run: &Run, now: Timestamp) {
    status.progress.clone_from(&run.progress);
    status.point_in_time.clone_from(&run.point_in_time);
    status.backup_type = run_type(run);
    if let Some(quiesce) = &run.quiesce {
        let (value, why) = if quiesce.frozen {
            (ConditionStatus::True, reason::FROZEN)
        } else {
            (ConditionStatus::False, reason::NOT_FROZEN)
        };
        let message = match (&quiesce.reason, &quiesce.duration) {
            (Some(why), _) => text(why),
            (None, Some(duration)) => text(&format!("frozen for {duration}")),
            (None, None) => String::new(),
        };
        set(status, kinds::QUIESCED, value, why, &message, now);
    }
}

/// Full when a volume was read as a whole.
fn run_type(run: &Run) -> Option<RunType> {
    let mut types = run.volumes.iter().filter_map(|volume| volume.run_type).peekable();
    types.peek()?;
    Some(if types.all(|run_type| run_type == RunType::Incremental) { RunType::Incremental } else { RunType::Full })
}

/// It waits, or is at work.
pub(super) fn waiting(
    backup: &VirtualMachineBackup,
    phase: BackupPhase,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> Status {
    let mut status = present(backup);
    if let Some(run) = backup.status.as_ref().and_then(|status| status.run.as_ref())
        && phase == BackupPhase::Running
    {
        summarize(&mut status, run, now);
    }
    going_on(&mut status, phase, reason, message, now);
    status
}

/// The next attempt begins.
pub(super) fn started(backup: &VirtualMachineBackup, now: Timestamp) -> Status {
    let mut status = present(backup);
    status.attempts = Some(status.attempts.unwrap_or(0).saturating_add(1));
    (status.retry_after, status.assignment, status.active_node) = (None, None, None);
    forget_run(&mut status);
    let message = "the mover pod is being made";
    going_on(&mut status, BackupPhase::Preparing, reason::MOVER_STARTING, message, now);
    status
}

/// What an earlier attempt told is not about the next one.
fn forget_run(status: &mut Status) {
    (status.progress, status.point_in_time, status.backup_type) = (None, None, None);
    unset(status, kinds::QUIESCED);
}

/// The agent gets its order.
pub(super) fn assigned(backup: &VirtualMachineBackup, assignment: Assignment, now: Timestamp) -> Status {
    let mut status = present(backup);
    let message = format!("the agent on node {} is to begin", assignment.node_name);
    status.repository_vm = Some(assignment.repository_vm.clone());
    status.active_node = Some(assignment.node_name.clone());
    status.assignment = Some(assignment);
    going_on(&mut status, BackupPhase::Preparing, reason::AWAITING_AGENT, &message, now);
    status
}

/// The agent is told to give up.
pub(super) fn aborting(backup: &VirtualMachineBackup, why: &str, message: &str, now: Timestamp) -> Status {
    let mut status = present(backup);
    let phase = status.phase.unwrap_or(BackupPhase::Running);
    if let Some(assignment) = &mut status.assignment {
        assignment.abort = Some(Abort { reason: word(why), message: text(message) });
    }
    going_on(&mut status, phase, reason::ABORTING, message, now);
    status
}

/// The attempt is over, and another one follows.
pub(super) fn attempt_over(
    backup: &VirtualMachineBackup,
    (reason, message): (&str, &str),
    failure: bool,
    pause: Duration,
    now: Timestamp,
) -> Status {
    let mut status = present(backup);
    // Without it the agent has nothing to do with the backup any more, and stops whatever it still does.
    (status.assignment, status.active_node) = (None, None);
    forget_run(&mut status);
    if failure {
        status.failures = Some(status.failures.unwrap_or(0).saturating_add(1));
    }
    let pause = SignedDuration::try_from(pause).unwrap_or_default();
    // Whole seconds are what the API keeps.
    let after = now.checked_add(pause).unwrap_or(Timestamp::MAX);
    status.retry_after = Some(Time(Timestamp::from_second(after.as_second().saturating_add(1)).unwrap_or(after)));
    going_on(&mut status, BackupPhase::Pending, reason, message, now);
    status
}

/// What is known of a complete backup: from the agent, or where it did not live to tell, from the mover.
fn completion(status: &mut Status, run: Option<&Run>, mover: Option<&MoverFact>, now: Timestamp) {
    if let Some(run) = run.filter(|run| run.attempt == status.attempts.unwrap_or(0)) {
        summarize(status, run, now);
        status.backup_id.clone_from(&run.backup_id);
        let stored: Vec<i64> = run.volumes.iter().filter_map(|volume| volume.stored_bytes).collect();
        let sum = stored.iter().fold(0_i64, |sum, bytes| sum.saturating_add(*bytes));
        status.stored = (!stored.is_empty()).then(|| quantity(u64::try_from(sum).unwrap_or(0)));
    }
    let Some(MoverState::Ended(Some(outcome))) = mover.map(|mover| &mover.state) else { return };
    if let MoverOutcome::Committed { backup_id, point_in_time, incremental, stored_bytes, .. } = outcome {
        status.backup_id = Some(backup_id.clone());
        status.stored = Some(quantity(*stored_bytes));
        status.backup_type = Some(if *incremental { RunType::Incremental } else { RunType::Full });
        if let Ok(time) = point_in_time.parse() {
            status.point_in_time = Some(Time(time));
        }
    }
}

/// It is complete.
pub(super) fn completed(backup: &VirtualMachineBackup, mover: Option<&MoverFact>, now: Timestamp) -> Status {
    let mut status = present(backup);
    let run = backup.status.as_ref().and_then(|status| status.run.as_ref());
    let usable = run.filter(|run| run.state == RunState::Succeeded || mover.is_some());
    completion(&mut status, usable, mover, now);
    let message = match &status.backup_id {
        Some(id) => format!("complete and durable: backup {id}"),
        None => "complete and durable".into(),
    };
    status.progress = Some("100%".into());
    (status.retry_after, status.completion_time, status.active_node) = (None, Some(Time(now)), None);
    unset(&mut status, kinds::RECONCILING);
    set(&mut status, kinds::READY, ConditionStatus::True, reason::COMPLETED, &message, now);
    set(&mut status, kinds::COMPLETE, ConditionStatus::True, reason::COMPLETED, &message, now);
    (status.phase, status.reason, status.message) = (Some(BackupPhase::Completed), None, None);
    status
}

/// It failed for good.
pub(super) fn failed(backup: &VirtualMachineBackup, reason: &str, message: &str, now: Timestamp) -> Status {
    let mut status = present(backup);
    let (why, message) = (word(reason), text(message));
    (status.retry_after, status.completion_time, status.active_node) = (None, Some(Time(now)), None);
    unset(&mut status, kinds::RECONCILING);
    set(&mut status, kinds::READY, ConditionStatus::False, &why, &message, now);
    set(&mut status, kinds::STALLED, ConditionStatus::True, &why, &message, now);
    set(&mut status, kinds::FAILED, ConditionStatus::True, &why, &message, now);
    (status.phase, status.reason, status.message) = (Some(BackupPhase::Failed), Some(why), Some(message));
    status
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "tables read better so")]
mod tests {
    use super::*;
    use crate::api::find_condition;
    use serde_json::{Value, json};

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

    fn backup(status: Value) -> VirtualMachineBackup {
        let object = json!({
            "apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
            "metadata": {"name": "b", "namespace": "n", "generation": 3},
            "spec": {"source": {"name": "web"}, "repositoryRef": {"name": "r"}},
            "status": status,
        });
        serde_json::from_value(object).unwrap()
    }

    /// The conditions as `Ready=False:Queued`.
    fn conditions(status: &Status) -> Vec<String> {
        status.conditions.iter().map(|c| format!("{}={}:{}", c.type_, c.status, c.reason)).collect()
    }

    #[test]
    fn the_first_write_tells_kstatus_that_it_is_in_progress() {
        let first = waiting(&backup(json!(null)), BackupPhase::Pending, reason::QUEUED, "waits", NOW);
        assert_eq!(conditions(&first), ["Ready=False:Queued", "Reconciling=True:Queued"]);
        assert_eq!(first.observed_generation, Some(3));
        assert_eq!(first.conditions[0].observed_generation, Some(3));
        let again =
            waiting(&backup(serde_json::to_value(&first).unwrap()), BackupPhase::Pending, "Queued", "waits", NOW);
        assert_eq!(first, again, "the same again changes nothing");
    }

    #[test]
    fn a_complete_backup_says_what_the_agent_told() {
        let run = json!({
            "attempt": 2, "agent": {"instance": "i", "nodeName": "n"}, "state": "Succeeded", "backupID": "id-1",
            "pointInTime": "2026-01-01T00:00:00Z", "quiesce": {"frozen": false, "reason": "no\u{7}agent"},
            "volumes": [
                {"name": "a", "virtualBytes": 1, "type": "Incremental", "storedBytes": 734 << 20},
                {"name": "b", "virtualBytes": 1, "type": "Incremental", "storedBytes": 0},
            ],
        });
        let before = started(&backup(json!({"attempts": 1, "retryAfter": "2026-01-01T00:00:00Z"})), NOW);
        assert_eq!((before.attempts, before.retry_after.as_ref()), (Some(2), None));
        let mut value = serde_json::to_value(&before).unwrap();
        value["run"] = run;
        let done = completed(&backup(value), None, NOW);
        assert_eq!(conditions(&done), ["Ready=True:Completed", "Quiesced=False:NotFrozen", "Complete=True:Completed"]);
        assert_eq!(find_condition(&done.conditions, "Quiesced").unwrap().message, "no agent");
        assert_eq!(done.stored.as_deref(), Some("734Mi"));
        assert_eq!((done.backup_id.as_deref(), done.backup_type), (Some("id-1"), Some(RunType::Incremental)));
        assert_eq!((done.phase, done.reason.as_deref()), (Some(BackupPhase::Completed), None));
        assert!(done.run.is_none() && done.point_in_time.is_some());
    }

    #[test]
    fn a_dead_agent_s_backup_is_complete_by_the_mover_s_word() {
        let outcome = MoverOutcome::Committed {
            backup_id: "id-2".into(),
            point_in_time: "2026-01-01T00:00:00Z".into(),
            sequence: 4,
            incremental: false,
            stored_bytes: 5 << 30,
        };
        let mover = MoverFact {
            uid: "u".into(),
            foreign: false,
            deleting: false,
            node: None,
            state: MoverState::Ended(Some(outcome)),
        };
        let stale = json!({"attempts": 2, "run": {"attempt": 1, "agent": {"instance": "i", "nodeName": "n"},
            "state": "Failed", "backupID": "old"}});
        let done = completed(&backup(stale), Some(&mover), NOW);
        assert_eq!((done.backup_id.as_deref(), done.stored.as_deref()), (Some("id-2"), Some("5Gi")));
        assert_eq!(done.backup_type, Some(RunType::Full));
    }

    #[test]
    fn a_failed_backup_is_stalled() {
        let status = failed(
            &backup(json!({"conditions": [{"type": "Reconciling", "status": "True", "reason": "X",
            "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]})),
            "no such-thing",
            "m",
            NOW,
        );
        let expected = ["Ready=False:nosuchthing", "Stalled=True:nosuchthing", "Failed=True:nosuchthing"];
        assert_eq!(conditions(&status), expected);
        assert_eq!(failed(&backup(json!(null)), "1", "m", NOW).reason.as_deref(), Some("Unknown"));
    }

    #[test]
    fn an_attempt_that_is_over_leaves_nothing_of_it() {
        let before = json!({"attempts": 1, "progress": "42%", "type": "Full", "failures": 1,
            "assignment": {"attempt": 1, "nodeName": "n", "virtualMachineUID": "u", "repositoryVm": "n/web",
                "mover": {"namespace": "n", "name": "m", "uid": "u"}}});
        let over = attempt_over(&backup(before.clone()), ("MoverLost", "gone"), true, Duration::from_secs(10), NOW);
        assert_eq!((over.progress, over.assignment.is_none(), over.failures), (None, true, Some(2)));
        assert!(over.retry_after.unwrap().0 >= Timestamp::from_second(10).unwrap());
        let cut = attempt_over(&backup(before), ("Migrating", "moves"), false, Duration::from_secs(10), NOW);
        assert_eq!(cut.failures, Some(1));
        assert_eq!(cut.reason.as_deref(), Some("Migrating"));
    }
}
