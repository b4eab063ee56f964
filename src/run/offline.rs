//! The order of a backup of a stopped VM: its mover has the disks mounted and reads them itself.

use super::{
    Finished, Mover, RunError, RunState, RunStatus, Stop, VolumeStatus,
    backup::{is_same_vm, new_line},
    mover::unexpected,
};
use crate::{
    backup::{BackupId, BackupRecord, SkippedVolume},
    chain::FullReason,
    fleecing::{Cut, QuiesceOutcome, SessionError},
    mover::{FromMover, PlannedVolume, ReadOrder},
};
use jiff::Timestamp;
use std::time::Duration;
use tokio::sync::watch;

/// What is wanted.
#[derive(Debug, Clone)]
pub struct OfflineRequest {
    /// Name of the VM at the target.
    pub vm: String,
    /// UID of the VM.
    pub vm_uuid: Option<String>,
    /// A full backup was asked for: also look for every chunk.
    pub full: bool,
    /// What is not backed up.
    pub skipped: Vec<SkippedVolume>,
}

/// Backs a stopped VM up. `stop` must also tell when the VM is started; `still_stopped` is asked at the end, when all is
/// read, whether it was stopped all the time: otherwise what was read is no instant, and nothing is committed.
pub async fn offline_backup(
    request: &OfflineRequest,
    mover: &mut Mover,
    status: &watch::Sender<RunStatus>,
    stop: impl Future<Output = Stop>,
    still_stopped: impl AsyncFnOnce() -> Result<(), Stop>,
) -> Result<Finished, RunError> {
    let mut stop = std::pin::pin!(stop);
    let started = Timestamp::now();
    let opened = mover.hello(&request.vm, &mut stop).await?;
    let sequence = opened.parent.as_ref().map_or(1, |parent| parent.sequence + 1);
    let parent = opened.parent.filter(|parent| is_same_vm(parent, request.vm_uuid.as_deref()));
    let bitmap_line = match &parent {
        Some(parent) => parent.bitmap_line.clone(),
        None => new_line()?,
    };
    let id = BackupId::generate().map_err(SessionError::local("taking randomness"))?;
    let reason = if request.full { FullReason::Requested } else { FullReason::Stopped };
    let plan = |(name, virtual_size): (String, u64)| PlannedVolume {
        name,
        virtual_size,
        source_format: "raw".into(),
        bitmap: String::new(),
        parent: None,
        full_reason: Some(reason),
    };
    let volumes: Vec<PlannedVolume> = opened.offline.into_iter().map(plan).collect();
    mover.begin(id.clone(), volumes.clone()).await?;
    let cut = Cut {
        point_in_time: Timestamp::now(),
        pause: Duration::ZERO,
        quiesce: QuiesceOutcome::NotFrozen { why: "the VM is stopped".into() },
    };
    let engine_reason = "the VM is stopped".to_owned();
    let shown = volumes.iter().map(|plan| VolumeStatus { plan: plan.clone(), read: 0, total: 0, summary: None });
    status.send_replace(RunStatus {
        state: RunState::Reading,
        engine: Some(("offline".into(), engine_reason.clone())),
        qemu_version: None,
        backup: Some(id.clone()),
        parent: parent.as_ref().map(|parent| parent.id.clone()),
        sequence,
        bitmap_line: bitmap_line.clone(),
        volumes: shown.collect(),
        skipped: request.skipped.clone(),
        cut: Some(cut.clone()),
    });
    tokio::select! {
        read = read_all(volumes.len(), mover, status) => read?,
        stop = &mut stop => return Err(RunError::Stopped(stop)),
    }
    still_stopped().await.map_err(RunError::Stopped)?;
    status.send_modify(|status| status.state = RunState::Committing);
    let record = BackupRecord {
        id,
        vm: request.vm.clone(),
        vm_uuid: request.vm_uuid.clone(),
        parent: parent.map(|parent| parent.id),
        sequence,
        bitmap_line,
        point_in_time: cut.point_in_time,
        started,
        finished: Timestamp::now(),
        engine: "offline".into(),
        transfer: "pull".into(),
        qemu_version: String::new(),
        cut_microseconds: 0,
        quiesce: serde_json::to_value(&cut.quiesce).unwrap_or_default(),
        skipped: request.skipped.clone(),
        tool_version: env!("CARGO_PKG_VERSION").into(),
        definition: None,
    };
    let backup = mover.commit(record).await?;
    Ok(Finished { backup, engine_reason })
}

/// One volume after the other.
async fn read_all(volumes: usize, mover: &mut Mover, status: &watch::Sender<RunStatus>) -> Result<(), RunError> {
    for index in 0..volumes {
        let order = ReadOrder { volume: index, export: None, bitmap: None, always: None, credit: 0, discard: false };
        mover.read(order, None).await?;
        loop {
            match mover.receive().await? {
                FromMover::Progress { volume, read, total } if volume <= index => {
                    status.send_modify(|status| {
                        let volume = &mut status.volumes[volume];
                        (volume.read, volume.total) = (read, total);
                    });
                }
                FromMover::VolumeDone { volume, summary } if volume == index => {
                    status.send_modify(|status| status.volumes[volume].summary = Some(summary));
                    break;
                }
                _ => return Err(unexpected("how far it is")),
            }
        }
    }
    Ok(())
}
