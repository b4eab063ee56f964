//! The order of a backup of a running VM.
//!
//! Everything that can fail without the guest is done before the guest is touched, and the session is ended however
//! the run went: guest safety first, then the backup.

use super::{
    Mover, RunError, RunState, RunStatus, Stop, VmConnection, VolumeStatus,
    copy::{copy, planned},
    mover::Opened,
};
use crate::{
    backup::{BackupId, BackupRecord, SkippedVolume},
    chain::{BackupType, FullReason, ParentVolume, VolumePlan, plan_volume},
    fleecing::{
        self, Begin, Cut, Disks, Engine, EngineChoice, Outcome, Quiesce, Request, Session, SessionError, SkippedDevice,
        Volume, Wish, guardian::Guardian, settle_bitmaps,
    },
    mover::{CompleteBackup, Parent, PlannedVolume},
    qmp::{
        Capabilities, Qmp,
        command::{QueryBlockJobs, QueryStatus},
    },
};
use jiff::Timestamp;
use std::{pin::Pin, task::Poll, time::Duration};
use tokio::sync::watch;

/// Run states in which disks can be backed up (QEMU `qapi/run-state.json`).
const GOOD_STATES: [&str; 6] = ["running", "paused", "prelaunch", "suspended", "guest-panicked", "watchdog"];

/// What is wanted.
#[derive(Debug, Clone)]
pub struct BackupRequest {
    /// Name of the VM at the target; none: the one that QEMU knows.
    pub vm: Option<String>,
    /// UUID of the VM; none: the one that QEMU knows. Backups of another UUID are no parents.
    pub vm_uuid: Option<String>,
    /// Full or incremental.
    pub backup_type: BackupType,
    /// Only these volumes; empty: all.
    pub volumes: Vec<String>,
    /// Not these.
    pub exclude_volumes: Vec<String>,
    /// Not these either, of which the caller knows why they cannot be backed up.
    pub unsuitable: Vec<SkippedDevice>,
    /// How the point in time is made; none: what suits this QEMU.
    pub engine: Option<Engine>,
    /// Freezing the guest's file systems.
    pub quiesce: Wish,
    /// The most that all fleeces together may take, in bytes.
    pub fleece_limit: Option<u64>,
    /// Give up when the target takes no data for so long.
    pub stall_timeout: Duration,
}

/// A backup that is complete.
#[derive(Debug)]
pub struct Finished {
    /// What the target has.
    pub backup: CompleteBackup,
    /// Why this engine.
    pub engine_reason: String,
}

/// What is to be backed up, and how.
struct Plan {
    begin: Begin,
    id: BackupId,
    parent: Option<Parent>,
    sequence: u64,
    disks: Vec<(Volume, VolumePlan)>,
    skipped: Vec<SkippedVolume>,
    engine: EngineChoice,
    qemu_version: String,
    vm_uuid: Option<String>,
    started: Timestamp,
}

/// Backs a VM up: from planning to the commit. The caller holds the VM's lock and has recovered what an earlier run
/// left. `stop` is heeded wherever waiting takes long, and never in the middle of the cut or of the commit.
pub async fn backup(
    mut connection: VmConnection,
    request: &BackupRequest,
    mover: &mut Mover,
    status: &watch::Sender<RunStatus>,
    stop: impl Future<Output = Stop>,
) -> Result<Finished, RunError> {
    let mut stop = std::pin::pin!(stop);
    let started = Timestamp::now();
    let running = check_state(&connection.qmp).await?;
    let vm = request.vm.clone().or_else(|| connection.name.clone()).ok_or(RunError::NoName)?;
    // While the mover unlocks its target's key, which takes a tenth of a second as well.
    let probed = Capabilities::probe(&connection.qmp).await;
    let capabilities = probed.map_err(SessionError::qmp("probing QEMU"))?;
    let opened = mover.hello(&vm, &mut stop).await?;
    let mut plan = plan(request, &connection, capabilities, opened, vm, started).await?;
    let volumes = planned_volumes(&plan)?;
    let (target, object) = mover.begin(plan.id.clone(), volumes.clone()).await?;
    (plan.begin.target, plan.begin.object) = (target, object);
    publish(status, &plan, volumes);
    let agent = std::mem::replace(&mut connection.agent, Ok(None));
    let quiesce = Quiesce::prepare(request.quiesce, agent, running).await?;
    let (session, record) = run_session(request, &connection, &plan, mover, quiesce, status, stop).await?;
    let backup = commit(session, mover, record).await?;
    Ok(Finished { backup, engine_reason: plan.engine.why })
}

async fn check_state(qmp: &Qmp) -> Result<bool, RunError> {
    let failed = || SessionError::qmp("reading the VM's state");
    let status = qmp.execute(&QueryStatus {}).await.map_err(failed())?;
    if !GOOD_STATES.contains(&status.status.as_str()) {
        return Err(SessionError::VmState { state: status.status }.into());
    }
    let jobs = qmp.execute(&QueryBlockJobs {}).await.map_err(failed())?;
    if let Some(job) = jobs.first() {
        let holder = format!(" (block job `{}` of type {}, not ours)", job.device, job.kind);
        return Err(SessionError::Busy { vm: qmp.peer(), holder }.into());
    }
    Ok(status.running)
}

async fn plan(
    request: &BackupRequest,
    connection: &VmConnection,
    capabilities: Capabilities,
    opened: Opened,
    vm: String,
    started: Timestamp,
) -> Result<Plan, RunError> {
    let qmp = &connection.qmp;
    let engine = fleecing::choose(request.engine, &capabilities)?;
    let vm_uuid = request.vm_uuid.clone().or_else(|| connection.uuid.clone());
    let sequence = opened.parent.as_ref().map_or(1, |parent| parent.sequence + 1);
    let parent = opened.parent.filter(|parent| is_same_vm(parent, vm_uuid.as_deref()));
    let line = match &parent {
        Some(parent) => parent.bitmap_line.clone(),
        None => new_line()?,
    };
    let head = |volume: &str| {
        let parent = parent.as_ref().filter(|parent| parent.volume(volume).is_some())?;
        Some(parent.id.to_string())
    };
    let before = Disks::discover(qmp).await?;
    settle_bitmaps(qmp, &line, head).await?;
    let disks =
        Disks::discover(qmp).await?.without(&request.unsuitable).select(&request.volumes, &request.exclude_volumes)?;
    let mut planned = Vec::new();
    for volume in disks.volumes {
        // Inconsistent bitmaps were removed just now; for the reason on record they count as there.
        let was = before.volumes.iter().find(|was| was.format_node == volume.format_node);
        let inconsistent = was.into_iter().flat_map(|was| &was.bitmaps).filter(|bitmap| bitmap.inconsistent);
        let observed: Vec<_> = volume.bitmaps.iter().chain(inconsistent).cloned().collect();
        let below = parent.as_ref().and_then(|parent| {
            let below = parent.volume(&volume.name)?;
            let (virtual_size, usable) = (below.virtual_size, below.usable);
            Some(ParentVolume { backup: parent.id.to_string(), virtual_size, usable })
        });
        let (requested, any_backup) = (request.backup_type, parent.is_some());
        let plan = plan_volume(requested, &line, any_backup, below.as_ref(), volume.virtual_size, &observed);
        if let (VolumePlan::Full { reason }, BackupType::Incremental) = (&plan, requested) {
            let reason = reason.to_string();
            return Err(SessionError::NotIncremental { volume: volume.name, reason }.into());
        }
        planned.push((volume, plan));
    }
    let id = BackupId::generate().map_err(SessionError::local("taking randomness"))?;
    Ok(Plan {
        begin: Begin {
            backup: id.to_string(),
            bitmap_line: line,
            // Told by the mover a little later.
            target: String::new(),
            object: None,
            vm,
            parent: parent.as_ref().map(|parent| parent.id.to_string()),
            pid: std::process::id(),
        },
        id,
        parent,
        sequence,
        disks: planned,
        skipped: disks.skipped.into_iter().map(|s| SkippedVolume { name: s.name, reason: s.reason }).collect(),
        engine,
        qemu_version: capabilities.version.qemu.to_string(),
        vm_uuid,
        started,
    })
}

/// A new VM with the name of an old one has nothing in common with it. Where a UUID is not known it is taken for the
/// same: its bitmaps decide.
pub(super) fn is_same_vm(parent: &Parent, vm_uuid: Option<&str>) -> bool {
    match (parent.vm_uuid.as_deref(), vm_uuid) {
        (Some(then), Some(now)) => then == now,
        _ => true,
    }
}

pub(super) fn new_line() -> Result<String, RunError> {
    let random =
        getrandom::u32().map_err(|error| SessionError::local("taking randomness")(std::io::Error::other(error)))?;
    Ok(format!("{random:08x}"))
}

fn planned_volumes(plan: &Plan) -> Result<Vec<PlannedVolume>, RunError> {
    let bitmap = crate::chain::BitmapName::new(&plan.begin.bitmap_line, &plan.begin.backup).to_string();
    plan.disks.iter().map(|(volume, how)| planned(volume, how, &bitmap)).collect()
}

fn publish(status: &watch::Sender<RunStatus>, plan: &Plan, volumes: Vec<PlannedVolume>) {
    let volumes = volumes.into_iter().map(|plan| VolumeStatus { plan, read: 0, total: 0, summary: None });
    status.send_replace(RunStatus {
        state: RunState::Preparing,
        engine: Some((plan.engine.engine.to_string(), plan.engine.why.clone())),
        qemu_version: Some(plan.qemu_version.clone()),
        backup: Some(plan.id.clone()),
        parent: plan.parent.as_ref().map(|parent| parent.id.clone()),
        sequence: plan.sequence,
        bitmap_line: plan.begin.bitmap_line.clone(),
        volumes: volumes.collect(),
        skipped: plan.skipped.clone(),
        cut: None,
    });
}

/// From the preparation to the proof that everything was read from an unbroken snapshot. On an error the session is
/// ended and rolled back.
async fn run_session(
    request: &BackupRequest,
    connection: &VmConnection,
    plan: &Plan,
    mover: &mut Mover,
    mut quiesce: Quiesce,
    status: &watch::Sender<RunStatus>,
    mut stop: Pin<&mut impl Future<Output = Stop>>,
) -> Result<(Session, BackupRecord), RunError> {
    let session_request = Request {
        begin: plan.begin.clone(),
        disks: plan.disks.clone(),
        engine: plan.engine.clone(),
        fleece_limit: request.fleece_limit,
    };
    let needs_guardian = quiesce.is_wanted() || plan.engine.engine == Engine::Filter;
    let mut guardian = if needs_guardian {
        let ways = connection.ways(quiesce.duplicate_fd());
        Guardian::start(ways).map_err(SessionError::local("starting the guardian process"))?
    } else {
        Guardian::none()
    };
    let (qmp, directory, journal) = (connection.qmp.clone(), connection.directory.clone(), connection.journal());
    let mut session = Session::prepare(qmp, directory, journal, session_request).await?;
    // Asked once more at the last moment, and then not before the cut is over: nothing comes between freeze and thaw.
    let early = futures::poll!(&mut stop);
    let cut = match early {
        Poll::Ready(stop) => Err(RunError::Stopped(stop)),
        Poll::Pending => session.cut(&mut quiesce, &mut guardian).await.map_err(RunError::from),
    };
    drop(guardian);
    let made = match cut {
        Err(error) => Err(error),
        Ok(cut) => {
            status.send_modify(|status| (status.cut, status.state) = (Some(cut.clone()), RunState::Reading));
            tokio::select! {
                copied = copy(request, &mut session, mover, status) => copied.map(|()| cut),
                stop = &mut stop => Err(RunError::Stopped(stop)),
            }
        }
    };
    let made = match made {
        Ok(cut) => release(&mut session).await.map(|()| record(plan, &cut)),
        Err(error) => Err(error),
    };
    match made {
        Ok(record) => {
            status.send_modify(|status| status.state = RunState::Committing);
            Ok((session, record))
        }
        Err(error) => {
            roll_back(session).await;
            Err(error)
        }
    }
}

async fn release(session: &mut Session) -> Result<(), RunError> {
    session.note_committing()?;
    Ok(session.release().await?)
}

/// Ends the session without a backup. What cannot be undone now is undone by the next run.
async fn roll_back(session: Session) {
    if let Err(left) = session.end(Outcome::RolledBack).await {
        tracing::error!(error = &left as &dyn std::error::Error, "cleaning up failed");
    }
}

fn record(plan: &Plan, cut: &Cut) -> BackupRecord {
    BackupRecord {
        id: plan.id.clone(),
        vm: plan.begin.vm.clone(),
        vm_uuid: plan.vm_uuid.clone(),
        parent: plan.parent.as_ref().map(|parent| parent.id.clone()),
        sequence: plan.sequence,
        bitmap_line: plan.begin.bitmap_line.clone(),
        point_in_time: cut.point_in_time,
        started: plan.started,
        finished: Timestamp::now(),
        engine: plan.engine.engine.to_string(),
        transfer: "pull".into(),
        qemu_version: plan.qemu_version.clone(),
        cut_microseconds: u64::try_from(cut.pause.as_micros()).unwrap_or(u64::MAX),
        quiesce: serde_json::to_value(&cut.quiesce).unwrap_or_default(),
        skipped: plan.skipped.clone(),
        tool_version: env!("CARGO_PKG_VERSION").into(),
        definition: None,
    }
}

/// The target's commit decides; only then do the bitmaps advance.
async fn commit(session: Session, mover: &mut Mover, record: BackupRecord) -> Result<CompleteBackup, RunError> {
    match mover.commit(record).await {
        // It may be complete, or become so: the bitmaps stay as they are, and the next run asks the target.
        Err(error @ RunError::MoverLost(_)) => {
            session.leave();
            Err(error)
        }
        Err(error) => {
            roll_back(session).await;
            Err(error)
        }
        Ok(backup) => {
            // It is complete whatever happens now: a bitmap that stays is put in order by the next run.
            if let Err(error) = session.end(Outcome::Committed).await {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "the backup is complete, but cleaning up failed");
            }
            Ok(backup)
        }
    }
}

/// Why a volume is read as a whole, of a plan.
pub(super) fn full_reason(plan: &VolumePlan) -> Option<FullReason> {
    match plan {
        VolumePlan::Full { reason } => Some(*reason),
        VolumePlan::Incremental { .. } => None,
    }
}
