//! From the state of a run to what the API server is told.

use crate::{
    api::{AgentClaim, Chain, Run, RunQuiesce, RunState, RunType, RunVolume, SkippedDevice},
    fleecing::QuiesceOutcome,
    run::{RunStatus, VolumeStatus},
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::time::Duration;

/// Longest text of an error that goes into a status, in characters.
const MAX_MESSAGE: usize = 1000;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// Complete.
    Succeeded,
    /// Failed.
    Failed {
        /// Stable word.
        reason: String,
        /// For people.
        message: String,
        /// Another attempt makes sense.
        retryable: bool,
    },
    /// Given up.
    Aborted {
        /// Stable word.
        reason: String,
        /// For people.
        message: String,
    },
}

/// What the API server is told of a run.
pub(super) fn run(
    attempt: i64,
    agent: &AgentClaim,
    status: &RunStatus,
    ending: Option<&Ending>,
    now: Timestamp,
) -> Run {
    let (state, reason, message, retryable) = match ending {
        None => (state(status), None, None, None),
        Some(Ending::Succeeded) => (RunState::Succeeded, None, None, None),
        Some(Ending::Failed { reason, message, retryable }) => {
            (RunState::Failed, Some(reason.clone()), Some(shortened(message)), Some(*retryable))
        }
        Some(Ending::Aborted { reason, message }) => {
            (RunState::Aborted, Some(reason.clone()), Some(shortened(message)), None)
        }
    };
    let (engine, engine_reason) = status.engine.clone().unzip();
    let succeeded = state == RunState::Succeeded;
    Run {
        attempt,
        agent: agent.clone(),
        state,
        reason,
        message,
        retryable,
        progress: if succeeded { Some("100%".into()) } else { status.percent().map(|percent| format!("{percent}%")) },
        point_in_time: status.cut.as_ref().map(|cut| Time(cut.point_in_time)),
        pause: status.cut.as_ref().map(|cut| milliseconds(cut.pause)),
        quiesce: status.cut.as_ref().map(|cut| quiesce(&cut.quiesce)),
        engine,
        engine_reason,
        qemu_version: status.qemu_version.clone(),
        chain: (!status.bitmap_line.is_empty()).then(|| Chain {
            bitmap_line: status.bitmap_line.clone(),
            sequence: signed(status.sequence),
            parent: status.parent.as_ref().map(ToString::to_string),
        }),
        backup_id: status.backup.as_ref().map(ToString::to_string),
        volumes: status.volumes.iter().map(volume).collect(),
        skipped: status
            .skipped
            .iter()
            .map(|skipped| SkippedDevice { name: skipped.name.clone(), reason: skipped.reason.clone() })
            .collect(),
        updated: Some(Time(now)),
    }
}

fn state(status: &RunStatus) -> RunState {
    match status.state {
        crate::run::RunState::Preparing => RunState::Preparing,
        crate::run::RunState::Reading => RunState::Reading,
        crate::run::RunState::Committing => RunState::Committing,
    }
}

fn volume(volume: &VolumeStatus) -> RunVolume {
    let summary = volume.summary.as_ref();
    RunVolume {
        name: volume.plan.name.clone(),
        virtual_bytes: signed(volume.plan.virtual_size),
        run_type: Some(if volume.plan.parent.is_some() { RunType::Incremental } else { RunType::Full }),
        full_reason: volume.plan.full_reason.map(crate::chain::FullReason::word),
        dirty_bytes: summary.map(|summary| signed(summary.dirty_bytes)),
        read_bytes: Some(signed(volume.read)),
        total_bytes: (volume.total > 0).then(|| signed(volume.total)),
        new_bytes: summary.map(|summary| signed(summary.new_bytes)),
        stored_bytes: summary.map(|summary| signed(summary.stored_bytes)),
    }
}

fn quiesce(outcome: &QuiesceOutcome) -> RunQuiesce {
    match outcome {
        QuiesceOutcome::Frozen { file_systems, microseconds } => RunQuiesce {
            frozen: true,
            duration: Some(milliseconds(Duration::from_micros(*microseconds))),
            file_systems: Some(signed(*file_systems)),
            reason: None,
        },
        QuiesceOutcome::NotFrozen { why } => {
            RunQuiesce { frozen: false, reason: Some(shortened(why)), ..RunQuiesce::default() }
        }
    }
}

/// Such as `2.5ms`.
fn milliseconds(duration: Duration) -> String {
    format!("{:.1}ms", duration.as_secs_f64() * 1000.0)
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Errors may quote what a guest said.
fn shortened(text: &str) -> String {
    text.chars().take(MAX_MESSAGE).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// An error and all that caused it, in one line.
pub(super) fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mover::{PlannedVolume, VolumeSummary};

    fn status() -> RunStatus {
        let plan = PlannedVolume {
            name: "root".into(),
            virtual_size: 1 << 30,
            source_format: "raw".into(),
            bitmap: "b".into(),
            parent: None,
            full_reason: Some(crate::chain::FullReason::FirstBackup),
        };
        RunStatus {
            volumes: vec![VolumeStatus { plan, read: 1 << 28, total: 1 << 30, summary: None }],
            ..RunStatus::default()
        }
    }

    #[test]
    fn a_run_tells_how_far_it_is_and_how_it_ended() {
        let agent = AgentClaim { instance: "i".into(), node_name: "n".into(), claimed: None };
        let now = Timestamp::UNIX_EPOCH;
        let going = run(3, &agent, &status(), None, now);
        assert_eq!((going.progress.as_deref(), going.attempt), (Some("25%"), 3));
        assert_eq!(going.volumes[0].full_reason.as_deref(), Some("FirstBackup"));
        let mut status = status();
        status.volumes[0].summary = Some(VolumeSummary { stored_bytes: 7, ..VolumeSummary::default() });
        let ended = run(3, &agent, &status, Some(&Ending::Succeeded), now);
        assert_eq!((ended.state, ended.volumes[0].stored_bytes), (RunState::Succeeded, Some(7)));
        let message = "\u{1b}[2J".repeat(1000);
        let failed = Ending::Failed { reason: "X".into(), message, retryable: true };
        let failed = run(3, &agent, &status, Some(&failed), now);
        let text = failed.message.unwrap();
        assert!(text.len() <= MAX_MESSAGE && !text.contains('\u{1b}'));
        assert_eq!(failed.retryable, Some(true));
    }
}
