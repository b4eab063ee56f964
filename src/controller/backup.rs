//! Reconciles a backup: sees what there is, has it decided (`decision`), and does it. One step at a time: what a step
//! writes brings the next look.

use super::{
    ControllerError,
    admission::Answer,
    context::Context,
    decision::{self, Decision, Facts, MoverFact, MoverState},
    finished,
    index::{Key, is_finished, key_of},
    machine::Place,
    metrics::ResultLabels,
    reasons::{event, reason},
    start, status, write,
};
use crate::api::{BackupPhase, FINALIZER, VirtualMachineBackup, VirtualMachineBackupStatus};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{Resource, runtime::controller::Action};
use std::{sync::Arc, time::Duration};
use tracing::Instrument;

/// The summary of a running backup is written so often.
const SUMMARY: Duration = Duration::from_secs(5);
/// Somebody who waits for a place looks again after this, though he is told when there is one.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// A backup that is looked at.
pub(super) struct Look<'a> {
    pub(super) context: &'a Context,
    pub(super) backup: &'a VirtualMachineBackup,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) now: Timestamp,
}

/// Looks at a backup.
pub(super) async fn reconcile(
    backup: Arc<VirtualMachineBackup>,
    context: Arc<Context>,
) -> Result<Action, ControllerError> {
    let (namespace, name) = key_of(&backup.metadata);
    let uid = backup.metadata.uid.clone().unwrap_or_default();
    let attempt = backup.status.as_ref().and_then(|status| status.attempts).unwrap_or(0);
    let span = tracing::info_span!("backup", backup = %format!("{namespace}/{name}"), backup_uid = uid, attempt);
    let look = Look { context: &context, backup: &backup, namespace, name, uid, now: Timestamp::now() };
    async {
        match look.step().await {
            // It was deleted meanwhile: nothing to do any more.
            Err(error) if error.is_not_found() => Ok(Action::await_change()),
            other => other,
        }
    }
    .instrument(span)
    .await
}

impl Look<'_> {
    /// As Events name it.
    pub(super) fn reference(&self) -> ObjectReference {
        self.backup.object_ref(&())
    }

    /// Now as the status has it: in whole seconds.
    fn second(&self) -> Timestamp {
        Timestamp::from_second(self.now.as_second()).unwrap_or(self.now)
    }

    pub(super) fn has_finalizer(&self) -> bool {
        self.backup.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER)
    }

    pub(super) fn is_deleted(&self) -> bool {
        self.backup.metadata.deletion_timestamp.is_some()
    }

    fn key(&self) -> Key {
        (self.namespace.clone(), self.name.clone())
    }

    async fn step(&self) -> Result<Action, ControllerError> {
        if is_finished(self.backup) {
            return finished::step(self).await;
        }
        if !self.has_finalizer() {
            return if self.is_deleted() {
                // Others hold it; there is nothing of ours.
                self.context.give_back(&self.uid, false);
                Ok(Action::await_change())
            } else {
                self.first_write().await
            };
        }
        let mover = self.context.mover(self.backup);
        let decision = self.decide(mover.as_ref());
        self.keep_place(&decision, mover.as_ref());
        self.act(decision, mover.as_ref()).await
    }

    /// The finalizer, before there is anything to undo, and the first word to whoever looks.
    async fn first_write(&self) -> Result<Action, ControllerError> {
        let version = write::finalizer(self.context, self.backup, true).await?;
        if self.backup.status.as_ref().is_some_and(|status| status.phase.is_some()) {
            return Ok(Action::await_change());
        }
        let mut backup = self.backup.clone();
        backup.metadata.resource_version = version;
        let message = "the controller has seen it";
        let first = status::waiting(&backup, BackupPhase::Pending, reason::QUEUED, message, self.second());
        write::status(self.context, &backup, &first).await?;
        tracing::info!(vm = self.backup.spec.source.name, "a new backup");
        Ok(Action::await_change())
    }

    fn decide(&self, mover: Option<&MoverFact>) -> Decision {
        let nothing = VirtualMachineBackupStatus::default();
        let status = self.backup.status.as_ref().unwrap_or(&nothing);
        let (attempt, assignment, run) = decision::attempt(status);
        let looks = format!(
            "{attempt} {} {} {:?} {:?}",
            assignment.is_some(),
            assignment.is_some_and(|assignment| assignment.abort.is_some()),
            run.map(|run| (run.state, &run.agent.instance)),
            run.and_then(|run| run.updated.as_ref()),
        );
        let silence = self.context.sightings.since(&self.uid, "run", looks);
        let looks = mover.map_or(String::new(), |mover| {
            let state = match mover.state {
                MoverState::Pending(_) => "pending",
                MoverState::Running => "running",
                MoverState::Ended(_) => "ended",
            };
            format!("{} {state}", mover.uid)
        });
        let mover_for = self.context.sightings.since(&self.uid, "mover", looks);
        let (_, repository) = self.context.target(self.backup);
        let vm = (self.namespace.clone(), self.backup.spec.source.name.clone());
        let backup = self.backup;
        self.context.with_machine(&vm, |machine| {
            decision::decide(&Facts { now: self.now, backup, machine, repository, mover, silence, mover_for })
        })
    }

    /// Gives a place back that is not needed: between attempts, once the old mover is gone.
    fn keep_place(&self, decision: &Decision, mover: Option<&MoverFact>) {
        if matches!(decision, Decision::Start(_)) {
            return;
        }
        let at_work = self.backup.status.as_ref().is_some_and(decision::in_progress);
        self.context.give_back(&self.uid, at_work || mover.is_some());
    }

    async fn act(&self, decision: Decision, mover: Option<&MoverFact>) -> Result<Action, ControllerError> {
        let (backup, second) = (self.backup, self.second());
        match decision {
            Decision::Wait { phase, reason, message, again } => self.wait(phase, &reason, &message, again).await,
            Decision::Start(place) => self.start(&place).await,
            Decision::CreateMover(place) => start::create_mover(self, &place).await,
            Decision::Assign { node, place } => start::assign(self, node, &place, mover).await,
            Decision::DeleteMover => {
                if let Some(mover) = mover {
                    self.delete_mover(mover).await?;
                }
                Ok(Action::requeue(Duration::from_secs(30)))
            }
            Decision::Abort { reason, message } => {
                write::status(self.context, backup, &status::aborting(backup, &reason, &message, second)).await?;
                tracing::info!(reason, message, "the agent is told to give up");
                self.warn(event::ABORTED, "Abort", &format!("{reason}: {message}")).await;
                Ok(Action::await_change())
            }
            Decision::EndAttempt { reason, message, failure, pause } => {
                self.end_attempt((&reason, &message), failure, pause).await
            }
            Decision::Complete => self.complete(mover).await,
            Decision::Fail { reason, message } => self.fail(&reason, &message).await,
        }
    }

    pub(super) async fn delete_mover(&self, mover: &MoverFact) -> Result<(), ControllerError> {
        if mover.foreign || mover.deleting {
            return Ok(());
        }
        let attempt = self.backup.status.as_ref().and_then(|status| status.attempts).unwrap_or(0);
        let name = super::names::mover(&self.namespace, &self.name, &self.uid, attempt);
        let namespace = self.context.mover_namespace(self.backup);
        tracing::info!(pod = name, "deleting the mover");
        write::delete_pod(self.context, &namespace, &name, &mover.uid).await
    }

    pub(super) async fn warn(&self, reason: &str, action: &str, note: &str) {
        self.context.events.warning(reason, action, note, &self.reference()).await;
    }

    pub(super) async fn tell(&self, reason: &str, action: &str, note: &str) {
        self.context.events.normal(reason, action, note, &self.reference()).await;
    }

    /// Says what it waits for, where that is something new.
    pub(super) async fn wait(
        &self,
        phase: BackupPhase,
        reason: &str,
        message: &str,
        again: Duration,
    ) -> Result<Action, ControllerError> {
        let present = status::present(self.backup);
        let wanted = status::waiting(self.backup, phase, reason, message, self.second());
        let written = self.backup.status.as_ref().and_then(|status| status.observed_generation);
        if wanted == present && written == wanted.observed_generation {
            return Ok(Action::requeue(again));
        }
        if present.phase == wanted.phase && present.reason == wanted.reason && phase == BackupPhase::Running {
            // Only progress: the agent itself tells it more often than anybody looks.
            if let Some(left) =
                self.context.sightings.ago(&self.uid, "summary").and_then(|ago| SUMMARY.checked_sub(ago))
            {
                return Ok(Action::requeue(left.min(again)));
            }
        }
        write::status(self.context, self.backup, &wanted).await?;
        self.context.sightings.note(&self.uid, "summary");
        if present.phase != wanted.phase && phase == BackupPhase::Running {
            let node = present.assignment.map(|assignment| assignment.node_name).unwrap_or_default();
            self.tell(event::RUNNING, "Backup", &format!("the agent on node {node} is at work")).await;
        }
        if present.reason != wanted.reason {
            tracing::info!(?phase, reason, message, "waits");
        }
        Ok(Action::requeue(again))
    }

    async fn start(&self, place: &Place) -> Result<Action, ControllerError> {
        let request = self.context.request(self.backup, place.node().map(ToOwned::to_owned));
        let answer = {
            let mut admission = self.context.admission();
            let answer = admission.ask(request);
            self.context.count(&admission);
            answer
        };
        if let Answer::Denied { reason, message } = answer {
            let left = decision::deadline(self.backup).duration_since(self.now);
            let left = Duration::try_from(left).unwrap_or_default() + Duration::from_millis(50);
            return self.wait(BackupPhase::Pending, reason, &message, ASK_AGAIN.min(left)).await;
        }
        let started = status::started(self.backup, self.second());
        let attempt = started.attempts.unwrap_or(1);
        // On an error the place is kept: it may have been written after all, or by an earlier look. The next one sees.
        write::status(self.context, self.backup, &started).await?;
        self.context.metrics.attempts.inc();
        let place = place.node().map_or("of the stopped VM".to_owned(), |node| format!("on node {node}"));
        tracing::info!(attempt, place, "an attempt begins");
        self.tell(event::STARTED, "Backup", &format!("attempt {attempt} {place}")).await;
        Ok(Action::await_change())
    }

    pub(super) async fn end_attempt(
        &self,
        (reason, message): (&str, &str),
        failure: bool,
        pause: Duration,
    ) -> Result<Action, ControllerError> {
        let over = status::attempt_over(self.backup, (reason, message), failure, pause, self.second());
        write::status(self.context, self.backup, &over).await?;
        let labels = ResultLabels { result: if failure { "failed" } else { "cut_short" }, reason: reason.to_owned() };
        self.context.metrics.retries.get_or_create(&labels).inc();
        tracing::info!(reason, message, failure, "the attempt is over; another one follows");
        self.warn(event::RETRIED, "Retry", &format!("{reason}: {message}")).await;
        Ok(Action::await_change())
    }

    async fn complete(&self, mover: Option<&MoverFact>) -> Result<Action, ControllerError> {
        let done = status::completed(self.backup, mover, self.second());
        write::status(self.context, self.backup, &done).await?;
        let metrics = &self.context.metrics;
        let labels = ResultLabels { result: "completed", reason: reason::COMPLETED.into() };
        metrics.finished.get_or_create(&labels).inc();
        if let Some(created) = &self.backup.metadata.creation_timestamp {
            metrics.duration.observe(self.now.duration_since(created.0).as_secs_f64());
        }
        metrics.note_success(&self.namespace, &self.backup.spec.source.name, self.now.as_second());
        let id = done.backup_id.as_deref().unwrap_or_default();
        let stored = done.stored.as_deref().unwrap_or("an unknown amount");
        tracing::info!(backup_id = id, stored, "the backup is complete");
        self.tell(event::COMPLETED, "Backup", &format!("backup {id}: {stored} stored")).await;
        Ok(Action::await_change())
    }

    async fn fail(&self, reason: &str, message: &str) -> Result<Action, ControllerError> {
        write::status(self.context, self.backup, &status::failed(self.backup, reason, message, self.second())).await?;
        let labels = ResultLabels { result: "failed", reason: reason.to_owned() };
        self.context.metrics.finished.get_or_create(&labels).inc();
        tracing::warn!(reason, message, "the backup failed");
        self.warn(event::FAILED, "Backup", &format!("{reason}: {message}")).await;
        // It is looked at as a finished one.
        Ok(Action::await_change())
    }

    /// For the log.
    pub(super) fn full_name(&self) -> String {
        let (namespace, name) = self.key();
        format!("{namespace}/{name}")
    }
}
