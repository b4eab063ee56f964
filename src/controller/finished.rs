//! What is left to do about a finished backup: its mover, its stored data where that goes with it, its finalizer.

use super::{
    ControllerError,
    backup::Look,
    decision::{MoverFact, MoverState, RepositoryFact},
    mover_pod::{MoverPod, PodTask},
    names,
    reasons::event,
    start::{self, Created},
    write,
};
use crate::{
    api::{BackupPhase, DeletionPolicy},
    mover::config::MoverOutcome,
};
use kube::runtime::controller::Action;
use std::time::Duration;

/// The mover of a failed backup is kept so long, for its log.
const KEEP: Duration = Duration::from_secs(600);
/// A pod that forgets has so long.
const FORGET_SECONDS: i64 = 600;
/// Between attempts to forget.
const FORGET_AGAIN: Duration = Duration::from_secs(60);

/// What to do with the mover of a finished backup.
#[derive(Debug, PartialEq, Eq)]
enum Leftover {
    /// There is none.
    None,
    /// It is to be deleted, or is being deleted.
    Delete,
    /// It is kept for so long.
    Keep(Duration),
}

fn leftover(mover: Option<&MoverFact>, completed: bool, deleted: bool, age: Duration) -> Leftover {
    let Some(mover) = mover.filter(|mover| !mover.foreign) else { return Leftover::None };
    // Who still runs has nobody to work for.
    let ended = matches!(mover.state, MoverState::Ended(_));
    match KEEP.checked_sub(age) {
        Some(left) if ended && !completed && !deleted && !left.is_zero() => Leftover::Keep(left),
        _ => Leftover::Delete,
    }
}

/// Looks at a finished backup.
pub(super) async fn step(look: &Look<'_>) -> Result<Action, ControllerError> {
    let (context, backup) = (look.context, look.backup);
    let status = backup.status.clone().unwrap_or_default();
    let mover = context.mover(backup);
    let completed = status.phase == Some(BackupPhase::Completed);
    let since = status.completion_time.as_ref().map(|time| look.now.duration_since(time.0));
    let age = since.and_then(|age| Duration::try_from(age).ok()).unwrap_or(Duration::ZERO);
    let left = leftover(mover.as_ref(), completed, look.is_deleted(), age);
    if let (Leftover::Delete, Some(mover)) = (&left, &mover) {
        look.delete_mover(mover).await?;
    }
    context.give_back(&look.uid, left == Leftover::Delete);
    let stored = backup.spec.deletion_policy == DeletionPolicy::Delete && status.backup_id.is_some();
    if look.is_deleted() && left == Leftover::None && look.has_finalizer() && stored {
        // The only way to here with a finalizer of ours: once it is forgotten nothing is left.
        if let Some(again) = forget(look).await? {
            return Ok(Action::requeue(again));
        }
    }
    let wanted = left != Leftover::None || (stored && !look.is_deleted());
    // None can be added to an object that is being deleted.
    if look.has_finalizer() != wanted && !(wanted && look.is_deleted()) {
        write::finalizer(context, backup, wanted).await?;
    }
    if left == Leftover::None && !look.is_deleted() {
        context.sightings.forget(&look.uid);
    }
    Ok(match left {
        Leftover::Keep(left) => Action::requeue(left),
        Leftover::Delete => Action::requeue(Duration::from_secs(60)),
        Leftover::None => Action::await_change(),
    })
}

/// Has the stored data forgotten. `None`: it is, or nobody can; otherwise when to look again.
async fn forget(look: &Look<'_>) -> Result<Option<Duration>, ControllerError> {
    let (context, backup) = (look.context, look.backup);
    if context.sightings.ago(&look.uid, "forgotten").is_some() {
        // The watch has not told yet that pod and finalizer are gone: not another pod, which nobody would remove.
        return Ok(None);
    }
    let name = names::forget(&look.namespace, &look.name, &look.uid);
    let namespace = context.mover_namespace(backup);
    let Some(pod) = context.pod_of_backup(backup, &name) else {
        return begin(look, namespace, name).await;
    };
    if pod.deleting || pod.foreign {
        return Ok(Some(Duration::from_secs(30)));
    }
    let MoverState::Ended(outcome) = &pod.state else { return Ok(Some(Duration::from_secs(60))) };
    if matches!(outcome, Some(MoverOutcome::Forgotten)) {
        look.tell(event::FORGOTTEN, "Forget", "the stored data is forgotten; the next prune frees its space").await;
        // Before the finalizer: after a crash in between, what is forgotten is forgotten again.
        write::delete_pod(context, &namespace, &name, &pod.uid).await?;
        context.sightings.note(&look.uid, "forgotten");
        return Ok(None);
    }
    let shown = context.sightings.since(&look.uid, "forget", pod.uid.clone());
    if shown.is_zero() {
        let why = match outcome {
            Some(MoverOutcome::Failed { reason, message, .. }) => format!("{reason}: {message}"),
            _ => "the pod ended without an outcome".to_owned(),
        };
        let note = format!("{why}; it is tried again. spec.deletionPolicy: Retain lets the object go without");
        tracing::warn!(why, "the stored data cannot be forgotten");
        look.warn(event::FORGET_FAILED, "Forget", &note).await;
    }
    match FORGET_AGAIN.checked_sub(shown) {
        Some(left) if !left.is_zero() => Ok(Some(left)),
        _ => {
            write::delete_pod(context, &namespace, &name, &pod.uid).await?;
            Ok(Some(Duration::from_secs(30)))
        }
    }
}

async fn begin(look: &Look<'_>, namespace: String, name: String) -> Result<Option<Duration>, ControllerError> {
    let status = look.backup.status.as_ref();
    let id = status.and_then(|status| status.backup_id.clone()).unwrap_or_default();
    let vm = status.and_then(|status| status.repository_vm.clone());
    let vm = vm.unwrap_or_else(|| format!("{}/{}", look.namespace, look.backup.spec.source.name));
    let (target, fact) = look.context.target(look.backup);
    let Some(target) = target else {
        let why = match fact {
            RepositoryFact::Obstacle(obstacle) => obstacle.message,
            RepositoryFact::Ready => String::new(),
        };
        let note = format!("backup {id} of {vm} stays where it is: {why}");
        look.warn(event::FORGET_SKIPPED, "Forget", &note).await;
        return Ok(None);
    };
    let pod = MoverPod {
        owner: start::owner(look, &namespace),
        namespace,
        name,
        task: PodTask::Forget { vm, backups: vec![id] },
        target: &target,
        image: &look.context.image,
        active_seconds: FORGET_SECONDS,
    };
    match start::create_pod(look, &pod).await? {
        Created::Ours => {}
        Created::Foreign => {
            let note = format!("pod {}/{} is not ours, but has our name: delete it", pod.namespace, pod.name);
            look.warn(event::MOVER_REFUSED, "Forget", &note).await;
        }
        Created::Rejected(refusal) => look.warn(event::FORGET_FAILED, "Forget", &refusal).await,
    }
    Ok(Some(Duration::from_secs(30)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn movers_go_after_success_and_are_kept_for_their_log_after_failure() {
        let mover = |state| MoverFact { uid: "u".into(), foreign: false, deleting: false, node: None, state };
        let (ended, running) = (mover(MoverState::Ended(None)), mover(MoverState::Running));
        let minute = Duration::from_secs(60);
        let cases = [
            (None, true, false, minute, Leftover::None),
            (Some(&ended), true, false, Duration::ZERO, Leftover::Delete),
            (Some(&running), true, false, Duration::ZERO, Leftover::Delete),
            (Some(&running), false, false, Duration::ZERO, Leftover::Delete),
            (Some(&ended), false, false, minute, Leftover::Keep(minute * 9)),
            (Some(&ended), false, false, minute * 10, Leftover::Delete),
            (Some(&ended), false, true, minute, Leftover::Delete),
        ];
        for (mover, completed, deleted, age, expected) in cases {
            assert_eq!(leftover(mover, completed, deleted, age), expected, "{mover:?} {completed} {deleted} {age:?}");
        }
        let foreign = MoverFact { foreign: true, ..running };
        assert_eq!(leftover(Some(&foreign), true, true, minute), Leftover::None);
    }
}
