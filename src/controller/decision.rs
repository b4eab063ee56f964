//! What to do next about a backup that is not finished. Pure: all that counts is in [`Facts`].
//!
//! An attempt begins with a write that raises `status.attempts`, and is over with one that sets `status.retryAfter`.
//! In between it has a mover pod, then an assignment, then a run. Whatever else happened: where the mover says that the
//! backup is committed, it is complete.

use super::{
    duration,
    machine::{Machine, Obstacle, Place, place},
    reasons::reason,
};
use crate::{
    api::{Assignment, BackupPhase, Run, RunState, VirtualMachineBackup, VirtualMachineBackupStatus},
    mover::config::MoverOutcome,
};
use jiff::{SignedDuration, Timestamp};
use std::time::Duration;

/// A backup without a deadline of its own has this one.
pub(super) const DEFAULT_DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// What should be there already is waited for so long after the backup was created.
const PATIENCE: Duration = Duration::from_secs(600);
/// So many attempts may fail.
pub(super) const MAX_FAILURES: i64 = 5;
/// A mover that does not run after this is given up.
const MOVER_START: Duration = Duration::from_secs(600);
/// An agent claims its work within this time.
const CLAIM: Duration = Duration::from_secs(60);
/// An agent that works says so at least every 20 s; after this it counts as lost.
const SILENCE: Duration = Duration::from_secs(300);
/// An agent undoes a session within this time, or it is not there.
const UNDO: Duration = Duration::from_secs(30);
/// After a mover has ended its agent has this time to say so.
const REPORT: Duration = Duration::from_secs(15);
/// A mover whose agent restarted has this time to finish a commit that it began.
const SETTLE: Duration = Duration::from_secs(60);
/// Pause before the first further attempt; it doubles with each failure.
const BACKOFF: Duration = Duration::from_secs(10);
const MAX_BACKOFF: Duration = Duration::from_secs(600);

/// What is known of a mover pod.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct MoverFact {
    /// Its UID.
    pub(super) uid: String,
    /// It is not ours, though it has our name.
    pub(super) foreign: bool,
    /// It is being deleted.
    pub(super) deleting: bool,
    /// The node it runs on.
    pub(super) node: Option<String>,
    /// How far it is.
    pub(super) state: MoverState,
}

/// How far a mover pod is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum MoverState {
    /// It does not run yet; why, where the kubelet or the scheduler says so.
    Pending(Option<String>),
    /// It runs.
    Running,
    /// It ended, with the outcome it told.
    Ended(Option<MoverOutcome>),
}

/// The repository of a backup, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RepositoryFact {
    /// It can be used.
    Ready,
    /// It cannot.
    Obstacle(Obstacle),
}

/// All that a decision depends on.
#[derive(Debug, Clone)]
pub(super) struct Facts<'a> {
    /// Now.
    pub(super) now: Timestamp,
    /// The backup.
    pub(super) backup: &'a VirtualMachineBackup,
    /// Its VM.
    pub(super) machine: Machine<'a>,
    /// Its repository.
    pub(super) repository: RepositoryFact,
    /// The mover pod of the last attempt.
    pub(super) mover: Option<&'a MoverFact>,
    /// How long this controller has seen the run and the assignment unchanged.
    pub(super) silence: Duration,
    /// How long it has seen the mover pod in its present state.
    pub(super) mover_for: Duration,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Decision {
    /// Nothing but to say what it waits for, and to look again after this time at the latest.
    Wait {
        /// Phase to show.
        phase: BackupPhase,
        /// Stable word.
        reason: String,
        /// For people.
        message: String,
        /// When to look again.
        again: Duration,
    },
    /// Begin the next attempt here, where there is room.
    Start(Place),
    /// Make the mover pod of the attempt.
    CreateMover(Place),
    /// Tell the agent of the node, now that the mover runs.
    Assign {
        /// The node.
        node: String,
        /// The VM.
        place: Place,
    },
    /// Tell the agent to give up.
    Abort {
        /// Stable word.
        reason: String,
        /// For people.
        message: String,
    },
    /// The attempt is over; another one follows after the pause.
    EndAttempt {
        /// Stable word.
        reason: String,
        /// For people.
        message: String,
        /// It counts as failed.
        failure: bool,
        /// The pause.
        pause: Duration,
    },
    /// Delete the mover pod of the attempt that is over.
    DeleteMover,
    /// The backup is complete.
    Complete,
    /// The backup failed for good.
    Fail {
        /// Stable word.
        reason: String,
        /// For people.
        message: String,
    },
}

/// Time from one instant to another; none when it is negative.
fn since(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}

/// When a backup fails if it is not complete.
pub(super) fn deadline(backup: &VirtualMachineBackup) -> Timestamp {
    let created = backup.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let allowed = backup.spec.deadline.as_deref().and_then(duration::parse).unwrap_or(DEFAULT_DEADLINE);
    let allowed = SignedDuration::try_from(allowed).unwrap_or(SignedDuration::MAX);
    created.checked_add(allowed).unwrap_or(Timestamp::MAX)
}

/// The pause before the next attempt.
fn pause(failures: i64) -> Duration {
    let doublings = u32::try_from(failures.clamp(1, 7) - 1).unwrap_or(0);
    (BACKOFF * 2_u32.pow(doublings)).min(MAX_BACKOFF)
}

/// The run of the present attempt, and its assignment.
pub(super) fn attempt(status: &VirtualMachineBackupStatus) -> (i64, Option<&Assignment>, Option<&Run>) {
    let number = status.attempts.unwrap_or(0);
    let assignment = status.assignment.as_ref().filter(|assignment| assignment.attempt == number);
    let run = status.run.as_ref().filter(|run| run.attempt == number && assignment.is_some());
    (number, assignment, run)
}

/// An attempt has begun and is not over.
pub(super) fn in_progress(status: &VirtualMachineBackupStatus) -> bool {
    status.attempts.unwrap_or(0) > 0
        && status.retry_after.is_none()
        && !status.phase.is_some_and(BackupPhase::is_terminal)
}

/// Whether the agent or the mover says that the backup is durable.
fn is_committed(status: &VirtualMachineBackupStatus, mover: Option<&MoverFact>) -> bool {
    let told = mover.filter(|mover| !mover.foreign).map(|mover| &mover.state);
    let ran = status.run.as_ref().filter(|run| run.attempt == status.attempts.unwrap_or(0) && run.attempt > 0);
    matches!(told, Some(MoverState::Ended(Some(MoverOutcome::Committed { .. }))))
        || ran.is_some_and(|run| run.state == RunState::Succeeded && run.backup_id.is_some())
}

/// Decides about a backup that is not finished.
pub(super) fn decide(facts: &Facts<'_>) -> Decision {
    let nothing = VirtualMachineBackupStatus::default();
    let status = facts.backup.status.as_ref().unwrap_or(&nothing);
    if is_committed(status, facts.mover) {
        return Decision::Complete;
    }
    if !in_progress(status) {
        return between(facts, status);
    }
    match attempt(status) {
        (_, None, _) => preparing(facts, status),
        (_, Some(assignment), run) => assigned(facts, status, assignment, run),
    }
}

/// The user does not want it any more, or not so late.
fn stop(facts: &Facts<'_>) -> Option<(&'static str, String)> {
    if facts.backup.metadata.deletion_timestamp.is_some() {
        return Some((reason::DELETED, "the backup is being deleted".into()));
    }
    if facts.backup.spec.cancel {
        return Some((reason::CANCELLED, "the backup was cancelled (spec.cancel)".into()));
    }
    if facts.now < deadline(facts.backup) {
        return None;
    }
    let status = facts.backup.status.as_ref();
    let waited = status.and_then(|status| status.message.as_deref()).unwrap_or("it did not begin");
    let (text, hint) = match facts.backup.spec.deadline.as_deref() {
        Some(deadline) => (deadline.to_owned(), "a longer spec.deadline"),
        None => (duration::show(DEFAULT_DEADLINE), "a spec.deadline"),
    };
    let message = format!("not complete within {text} ({hint} allows more); last: {waited}");
    Some((reason::DEADLINE_EXCEEDED, message))
}

/// No attempt is in progress: what is in the way of the next one?
fn between(facts: &Facts<'_>, status: &VirtualMachineBackupStatus) -> Decision {
    if let Some((reason, message)) = stop(facts) {
        return Decision::Fail { reason: reason.into(), message };
    }
    let mover = facts.mover.filter(|mover| !mover.foreign);
    if mover.is_some_and(|mover| !mover.deleting) {
        return Decision::DeleteMover;
    }
    if let Some(after) = status.retry_after.as_ref()
        && facts.now < after.0
    {
        // Why the last attempt ended is what people want to know.
        let (reason, message) = (status.reason.as_deref().unwrap_or("Unknown"), status.message.clone());
        let again = since(facts.now, after.0) + Duration::from_millis(50);
        return pending(facts, reason, message.unwrap_or_default(), again);
    }
    if let Some(mover) = mover {
        let node = mover.node.as_deref().map_or(String::new(), |node| format!(", which the kubelet of {node} sees to"));
        let attempts = status.attempts.unwrap_or(0);
        let message = format!("the mover of attempt {attempts} has to end first{node}");
        return pending(facts, reason::OLD_MOVER, message, Duration::from_secs(30));
    }
    let created = facts.backup.metadata.creation_timestamp.as_ref().map_or(facts.now, |time| time.0);
    let refused = |obstacle: Obstacle| {
        if !obstacle.lasting {
            return pending(facts, obstacle.reason, obstacle.message, Duration::from_secs(30));
        }
        let age = since(created, facts.now);
        match PATIENCE.checked_sub(age) {
            Some(left) if !left.is_zero() => {
                pending(facts, obstacle.reason, obstacle.message, left.min(Duration::from_secs(30)))
            }
            _ => Decision::Fail { reason: obstacle.reason.into(), message: obstacle.message },
        }
    };
    if let RepositoryFact::Obstacle(obstacle) = &facts.repository {
        return refused(obstacle.clone());
    }
    match place(&facts.backup.spec.source.name, &facts.machine) {
        Err(obstacle) => refused(obstacle),
        Ok(place) => Decision::Start(place),
    }
}

/// Waits, and looks at the deadline in time.
fn wait(facts: &Facts<'_>, phase: BackupPhase, reason: &str, message: String, again: Duration) -> Decision {
    let left = since(facts.now, deadline(facts.backup)) + Duration::from_millis(50);
    Decision::Wait { phase, reason: reason.into(), message, again: again.min(left) }
}

fn pending(facts: &Facts<'_>, reason: &str, message: String, again: Duration) -> Decision {
    wait(facts, BackupPhase::Pending, reason, message, again)
}

/// The mover is being started; no agent knows of it.
fn preparing(facts: &Facts<'_>, status: &VirtualMachineBackupStatus) -> Decision {
    if let Some((reason, message)) = stop(facts) {
        return Decision::Fail { reason: reason.into(), message };
    }
    let place = match place(&facts.backup.spec.source.name, &facts.machine) {
        Ok(place) => place,
        Err(obstacle) => return cut_short(obstacle.reason, obstacle.message),
    };
    let Some(mover) = facts.mover else {
        return match &facts.repository {
            RepositoryFact::Ready => Decision::CreateMover(place),
            RepositoryFact::Obstacle(obstacle) => cut_short(obstacle.reason, obstacle.message.clone()),
        };
    };
    if mover.foreign {
        let message = "a pod that is not ours has the name of the mover: delete it".to_owned();
        return wait(facts, BackupPhase::Preparing, reason::MOVER_REFUSED, message, Duration::from_secs(30));
    }
    if mover.deleting {
        return failed(status, reason::MOVER_LOST, "the mover pod was deleted before the backup began".into(), true);
    }
    match &mover.state {
        MoverState::Ended(outcome) => ended(status, outcome.as_ref(), reason::MOVER_LOST),
        MoverState::Pending(why) if facts.mover_for >= MOVER_START => {
            let why = why.as_deref().unwrap_or("see the Events of the pod");
            failed(status, reason::MOVER_NOT_STARTED, format!("the mover pod does not start: {why}"), true)
        }
        MoverState::Pending(why) => {
            let why = why.as_deref().map_or(String::new(), |why| format!(": {why}"));
            let message = format!("the mover pod is starting{why}");
            let again = MOVER_START.saturating_sub(facts.mover_for) + Duration::from_millis(50);
            wait(facts, BackupPhase::Preparing, reason::MOVER_STARTING, message, again)
        }
        MoverState::Running => match (place.node(), mover.node.as_deref()) {
            (_, None) => {
                let message = "the mover pod runs on a node that is not known yet".to_owned();
                wait(facts, BackupPhase::Preparing, reason::MOVER_STARTING, message, Duration::from_secs(5))
            }
            (Some(node), Some(other)) if node != other => {
                let message = format!("the VM runs on node {node} now; the mover is on {other}");
                cut_short(reason::VM_CHANGED, message)
            }
            (_, Some(node)) => Decision::Assign { node: node.to_owned(), place },
        },
    }
}

/// The attempt ends through no fault of its own.
fn cut_short(reason: &str, message: String) -> Decision {
    Decision::EndAttempt { reason: reason.into(), message, failure: false, pause: BACKOFF }
}

/// The attempt failed: another one, unless it makes no sense or there were enough.
fn failed(status: &VirtualMachineBackupStatus, reason: &str, message: String, retryable: bool) -> Decision {
    let failures = status.failures.unwrap_or(0).saturating_add(1);
    if !retryable || failures >= MAX_FAILURES {
        let message = if retryable { format!("{message} (attempt {failures} that failed, the last)") } else { message };
        return Decision::Fail { reason: reason.into(), message };
    }
    Decision::EndAttempt { reason: reason.into(), message, failure: true, pause: pause(failures) }
}

/// The mover ended without a commit.
fn ended(status: &VirtualMachineBackupStatus, outcome: Option<&MoverOutcome>, otherwise: &'static str) -> Decision {
    match outcome {
        Some(MoverOutcome::Failed { reason, message, retryable }) => {
            failed(status, reason, message.clone(), *retryable)
        }
        Some(MoverOutcome::Abandoned { message }) => {
            failed(status, otherwise, format!("the mover gave up: {message}"), true)
        }
        _ => failed(status, otherwise, "the mover ended without an outcome: see its log, and its limits".into(), true),
    }
}

/// Reasons of an abort that are no fault of the backup.
fn is_cut_short(reason: &str) -> bool {
    let reasons = [
        // An agent that was told to end, for an upgrade, say.
        reason::AGENT_RESTARTED,
        reason::ASSIGNMENT_WITHDRAWN,
        reason::MIGRATING,
        reason::EVACUATING,
        reason::LAUNCHER_TERMINATING,
        reason::VM_STARTED,
        reason::VM_CHANGED,
        reason::VM_STOPPING,
        reason::VM_STARTING,
        reason::VM_NOT_FOUND,
        reason::VOLUME_MIGRATION,
        reason::IN_TREE_BACKUP,
        reason::VM_UNREADABLE,
        reason::VM_CRASHING,
    ];
    reasons.contains(&reason)
}

/// What follows when an attempt was given up for this reason.
fn aborted(status: &VirtualMachineBackupStatus, reason: &str, message: String) -> Decision {
    match reason {
        reason::CANCELLED | reason::DEADLINE_EXCEEDED | reason::DELETED => {
            Decision::Fail { reason: reason.into(), message }
        }
        _ if is_cut_short(reason) => cut_short(reason, message),
        _ => failed(status, reason, message, true),
    }
}

/// An agent has the order.
fn assigned(
    facts: &Facts<'_>,
    status: &VirtualMachineBackupStatus,
    assignment: &Assignment,
    run: Option<&Run>,
) -> Decision {
    let terminal = run.filter(|run| run.state.is_terminal());
    let dead = match facts.mover.map(|mover| &mover.state) {
        None => true,
        Some(MoverState::Ended(_)) => facts.mover_for >= REPORT,
        Some(_) => false,
    };
    if let Some(abort) = &assignment.abort {
        // The controller's own reason comes first: the agent may have come upon the cause by itself, as another one.
        if terminal.is_some() || facts.silence >= UNDO {
            if abort.reason == reason::MOVER_LOST
                && let Some(MoverState::Ended(outcome)) = facts.mover.map(|mover| &mover.state)
            {
                return ended(status, outcome.as_ref(), reason::MOVER_LOST);
            }
            return aborted(status, &abort.reason, abort.message.clone());
        }
        let again = UNDO.saturating_sub(facts.silence) + Duration::from_millis(50);
        let message = abort.message.clone();
        return Decision::Wait { phase: phase(run), reason: reason::ABORTING.into(), message, again };
    }
    if let Some(run) = terminal {
        return after_run(facts, status, run);
    }
    if let Some((reason, message)) = stop(facts) {
        return Decision::Abort { reason: reason.into(), message };
    }
    if let Err((reason, message)) = still(facts, assignment) {
        return Decision::Abort { reason: reason.into(), message };
    }
    if dead {
        let message = "the mover pod ended while the backup ran".to_owned();
        return Decision::Abort { reason: reason::MOVER_LOST.into(), message };
    }
    let node = &assignment.node_name;
    let (patience, lost, message) = match run {
        None => (CLAIM, reason::AGENT_NOT_RESPONDING, format!("no agent on node {node} takes the work: see its pod")),
        Some(_) => (SILENCE, reason::AGENT_LOST, format!("the agent on node {node} reports nothing any more")),
    };
    if facts.silence >= patience {
        return Decision::Abort { reason: lost.into(), message };
    }
    let mut again = patience.saturating_sub(facts.silence) + Duration::from_millis(50);
    if matches!(facts.mover.map(|mover| &mover.state), Some(MoverState::Ended(_))) {
        again = again.min(REPORT.saturating_sub(facts.mover_for) + Duration::from_millis(50));
    }
    let (reason, message) = match run {
        None => (reason::AWAITING_AGENT, format!("the agent on node {node} is to begin")),
        Some(run) => (reason::IN_PROGRESS, doing(run, node)),
    };
    wait(facts, phase(run), reason, message, again)
}

fn phase(run: Option<&Run>) -> BackupPhase {
    if run.is_some() { BackupPhase::Running } else { BackupPhase::Preparing }
}

fn doing(run: &Run, node: &str) -> String {
    match run.state {
        RunState::Committing => "everything is read; the target makes it durable".into(),
        RunState::Reading => "the point in time is made, and is being read".into(),
        _ => format!("the agent on node {node} makes everything ready"),
    }
}

/// Whether the VM is still what the assignment is about, as far as the controller sees it. The agent watches the same
/// by itself, and is faster.
fn still(facts: &Facts<'_>, assignment: &Assignment) -> Result<(), (&'static str, String)> {
    let name = &facts.backup.spec.source.name;
    match (place(name, &facts.machine), &assignment.launcher) {
        (Err(obstacle), Some(_)) => Err((obstacle.reason, obstacle.message)),
        (Err(obstacle), None) if obstacle.reason == reason::VM_NOT_FOUND => Err((obstacle.reason, obstacle.message)),
        (Ok(Place::Running { .. }) | Err(_), None) => {
            Err((reason::VM_STARTED, format!("the VirtualMachine {name} was started; it needs its volumes")))
        }
        (Ok(Place::Stopped { vm_uid }), None) if vm_uid == assignment.virtual_machine_uid => Ok(()),
        (Ok(Place::Running { vm_uid, instance_uid, launcher_uid, node }), Some(launcher))
            if vm_uid == assignment.virtual_machine_uid
                && instance_uid == launcher.instance_uid
                && launcher_uid == launcher.pod_uid
                && node == assignment.node_name =>
        {
            Ok(())
        }
        _ => Err((reason::VM_CHANGED, format!("the VirtualMachine {name} is another one, or runs elsewhere now"))),
    }
}

/// The run is over, without success.
fn after_run(facts: &Facts<'_>, status: &VirtualMachineBackupStatus, run: &Run) -> Decision {
    let reason = run.reason.clone().unwrap_or_else(|| "Unknown".into());
    let message = run.message.clone().unwrap_or_else(|| "the agent gives no reason".into());
    if run.state == RunState::Aborted {
        return aborted(status, &reason, message);
    }
    let alive = facts.mover.is_some_and(|mover| !mover.foreign && !matches!(mover.state, MoverState::Ended(_)));
    if reason == reason::AGENT_RESTARTED && alive && facts.silence < SETTLE {
        // It may be about to commit what it has: then the backup is complete.
        let again = SETTLE.saturating_sub(facts.silence) + Duration::from_millis(50);
        return wait(facts, BackupPhase::Running, reason::MOVER_SETTLING, message, again);
    }
    failed(status, &reason, message, run.retryable.unwrap_or(false))
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "tables read better so")]
#[path = "decision_tests.rs"]
mod tests;
