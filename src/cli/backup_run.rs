//! `virt-fleece backup`: the run.
//!
//! Everything that can fail without the guest is done before the guest is touched, and the session is ended however
//! the run went: guest safety first, then the backup.

use super::{
    CliError,
    backup::{BackupArgs, Report},
    connection::Connection,
    progress::Progress,
    target::{CompleteBackup, Parent, Target, UnfinishedBackup, VolumeOutcome},
};
use crate::{
    backup::{BackupId, BackupRecord, SkippedVolume},
    chain::{ParentVolume, VolumePlan, plan_volume},
    fleecing::{
        self, Begin, Cut, Disks, Engine, EngineChoice, Leftover, Outcome, Quiesce, Request, Session, SessionError,
        Volume, guardian::Guardian, recover, settle_bitmaps,
    },
    image::ImageSink,
    mover::{Bandwidth, PullProgress, PullRequest, PullSummary, pull},
    qmp::{
        Capabilities, Qmp,
        command::{QueryBlockJobs, QueryStatus},
    },
};
use futures::{StreamExt, stream::FuturesUnordered};
use jiff::Timestamp;
use std::{
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::Duration,
};
use tokio::{sync::Semaphore, time::Instant};

/// Volumes that are read at once: more would only compete for the same disks and CPUs.
const PARALLEL_VOLUMES: usize = 2;
/// Run states in which disks can be backed up (QEMU `qapi/run-state.json`).
const GOOD_STATES: [&str; 6] = ["running", "paused", "prelaunch", "suspended", "guest-panicked", "watchdog"];

/// What is to be backed up, and how.
struct Plan {
    begin: Begin,
    id: BackupId,
    parent: Option<Parent>,
    disks: Vec<(Volume, VolumePlan)>,
    skipped: Vec<SkippedVolume>,
    engine: EngineChoice,
    qemu_version: String,
    vm_uuid: Option<String>,
    started: Timestamp,
}

pub(super) async fn run(args: &BackupArgs) -> Result<Report, CliError> {
    let started = Timestamp::now();
    let mut connection = args.vm_args.connect().await?;
    let _lock = connection.lock(Duration::from_secs(args.wait)).await?;
    let mut agent = std::mem::replace(&mut connection.agent, Ok(None));
    let mut journal = connection.journal();
    let recovered = {
        let agent = agent.as_mut().ok().and_then(Option::as_mut);
        let access = args.target.location();
        let head = async |leftover: &Leftover| super::recover::head(leftover, access.as_ref()).await;
        recover(&connection.qmp, &mut journal, agent, head).await?
    };
    if !recovered.is_nothing() {
        eprintln!("cleaned up behind an earlier backup: {}", super::recover::text(&recovered));
    }
    let running = check_state(&connection.qmp).await?;
    let vm = args.vm.clone().or_else(|| connection.name.clone());
    let vm = vm.ok_or_else(|| CliError::Usage("this VM has no name: give it one with --vm NAME".into()))?;
    // Unlocking a key and asking QEMU what it can do take a tenth of a second each, the one here, the other there.
    let (target, capabilities) = tokio::join!(args.target.open(&vm), Capabilities::probe(&connection.qmp));
    let target = target?;
    let planned = match capabilities {
        Ok(capabilities) => plan(args, &connection, &target, capabilities, vm, started).await,
        Err(error) => Err(SessionError::qmp("probing QEMU")(error).into()),
    };
    let plan = match planned {
        Ok(plan) => plan,
        Err(error) => {
            target.close().await;
            return Err(error);
        }
    };
    let unfinished = target.begin(plan.id.clone())?;
    let quiesce = Quiesce::prepare(args.quiesce.wish(), agent, running).await;
    let result = match quiesce {
        Ok(quiesce) => run_session(args, &connection, journal, &plan, &unfinished, quiesce).await,
        Err(error) => Err(error.into()),
    };
    match result {
        Ok((session, record, volumes)) => {
            let backup = commit(session, unfinished, record, volumes).await?;
            Ok(Report { backup, recovered, engine_reason: plan.engine.why })
        }
        Err(error) => {
            unfinished.discard().await;
            Err(error)
        }
    }
}

async fn check_state(qmp: &Qmp) -> Result<bool, CliError> {
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
    args: &BackupArgs,
    connection: &Connection,
    target: &Target,
    capabilities: Capabilities,
    vm: String,
    started: Timestamp,
) -> Result<Plan, CliError> {
    let qmp = &connection.qmp;
    let engine = fleecing::choose(args.engine.engine(), &capabilities)?;
    let parent = target.parent(&vm)?;
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
    let disks = Disks::discover(qmp).await?.select(&args.volumes, &args.exclude_volumes)?;
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
        let requested = args.backup_type.backup_type();
        let any_backup = parent.is_some();
        let plan = plan_volume(requested, &line, any_backup, below.as_ref(), volume.virtual_size, &observed);
        if let (VolumePlan::Full { reason }, crate::chain::BackupType::Incremental) = (&plan, requested) {
            let reason = reason.to_string();
            return Err(SessionError::NotIncremental { volume: volume.name, reason }.into());
        }
        planned.push((volume, plan));
    }
    let id = BackupId::generate().map_err(SessionError::local("taking randomness"))?;
    let (address, object) = target.address(&vm, &id);
    Ok(Plan {
        begin: Begin {
            backup: id.to_string(),
            bitmap_line: line,
            target: address,
            vm,
            object,
            parent: parent.as_ref().map(|parent| parent.id.to_string()),
            pid: std::process::id(),
        },
        id,
        parent,
        disks: planned,
        skipped: disks.skipped.into_iter().map(|s| SkippedVolume { name: s.name, reason: s.reason }).collect(),
        engine,
        qemu_version: capabilities.version.qemu.to_string(),
        vm_uuid: connection.uuid.clone(),
        started,
    })
}

fn new_line() -> Result<String, CliError> {
    let random = getrandom::u32()
        .map_err(|error| CliError::Session(SessionError::local("taking randomness")(std::io::Error::other(error))))?;
    Ok(format!("{random:08x}"))
}

/// From the preparation to the proof that everything was read from an unbroken snapshot. On an error the session is
/// ended and rolled back.
async fn run_session(
    args: &BackupArgs,
    connection: &Connection,
    journal: fleecing::Journal,
    plan: &Plan,
    unfinished: &UnfinishedBackup,
    mut quiesce: Quiesce,
) -> Result<(Session, BackupRecord, Vec<VolumeOutcome>), CliError> {
    let sinks = plan
        .disks
        .iter()
        .map(|(volume, how)| unfinished.sink(&volume.name, volume.virtual_size, how))
        .collect::<Result<Vec<_>, _>>()?;
    let request = Request {
        begin: plan.begin.clone(),
        disks: plan.disks.clone(),
        engine: plan.engine.clone(),
        fleece_limit: args.fleece_limit,
    };
    let needs_guardian = quiesce.is_wanted() || plan.engine.engine == Engine::Filter;
    let mut guardian = if needs_guardian {
        let ways = connection.ways(quiesce.duplicate_fd());
        Guardian::start(ways).map_err(SessionError::local("starting the guardian process"))?
    } else {
        Guardian::none()
    };
    let mut session = Session::prepare(connection.qmp.clone(), connection.directory.clone(), journal, request).await?;
    let mut signal = std::pin::pin!(signal());
    // Registers the handlers, so that a signal waits for the end of the cut: nothing comes between freeze and thaw.
    let early = futures::poll!(&mut signal);
    let cut = match early {
        Poll::Ready(error) => Err(error),
        Poll::Pending => session.cut(&mut quiesce, &mut guardian).await.map_err(CliError::from),
    };
    drop(guardian);
    let made = match cut {
        Err(error) => Err(error),
        Ok(cut) => tokio::select! {
            copied = copy(args, &mut session, sinks, unfinished.unit()) => copied.map(|summaries| (cut, summaries)),
            error = signal => Err(error),
        },
    };
    let made = made.and_then(|(cut, summaries)| {
        session.note_committing()?;
        Ok((record(plan, &cut), outcomes(&session, summaries)))
    });
    match made {
        Ok((record, volumes)) => Ok((session, record, volumes)),
        Err(error) => {
            roll_back(session).await;
            Err(error)
        }
    }
}

/// Ends the session without a backup. What cannot be undone now is undone by the next run.
async fn roll_back(session: Session) {
    if let Err(left) = session.end(Outcome::RolledBack).await {
        tracing::error!(error = &left as &dyn std::error::Error, "cleaning up failed");
    }
}

/// Exports the snapshots and reads them; for each disk what was read.
async fn copy(
    args: &BackupArgs,
    session: &mut Session,
    sinks: Vec<Box<dyn ImageSink>>,
    unit: u64,
) -> Result<Vec<PullSummary>, CliError> {
    session.export().await?;
    // Not before: the cut must not wait for a processor.
    if args.nice > 0 {
        super::priority::lower(args.nice);
    }
    let session = &*session;
    let progress: Vec<Arc<PullProgress>> = sinks.iter().map(|_| Arc::default()).collect();
    let bandwidth = args.bandwidth_limit.map(|rate| Arc::new(Bandwidth::new(rate)));
    let slots = Arc::new(Semaphore::new(PARALLEL_VOLUMES));
    let mut pulls: FuturesUnordered<_> = session
        .disks()
        .iter()
        .zip(sinks)
        .zip(&progress)
        .enumerate()
        .map(|(index, ((disk, sink), progress))| {
            let request = PullRequest {
                export: disk.slot.export(),
                size: Some(disk.volume.virtual_size),
                bitmap: disk.previous_bitmap(),
                always: match &disk.plan {
                    VolumePlan::Incremental { grown, .. } => *grown,
                    VolumePlan::Full { .. } => None,
                },
                unit,
                bandwidth: bandwidth.clone(),
                socket: None,
            };
            let slots = Arc::clone(&slots);
            async move {
                let _slot = slots.acquire().await;
                let stream = session.connect()?;
                let stream = stream
                    .set_nonblocking(true)
                    .and_then(|()| tokio::net::UnixStream::from_std(stream))
                    .map_err(SessionError::local("connecting to QEMU's NBD server"))?;
                let socket = rustix::fs::fstat(&stream).ok().map(|socket| socket.st_ino);
                let request = PullRequest { socket, ..request };
                match pull(stream, &request, sink, progress).await {
                    Ok(summary) => Ok((index, summary)),
                    Err(source) => Err(CliError::Volume { volume: disk.volume.name.clone(), source }),
                }
            }
        })
        .collect();
    let all = async {
        let mut done = Vec::new();
        while let Some(result) = pulls.next().await {
            done.push(result?);
        }
        done.sort_by_key(|(index, ..)| *index);
        let summaries: Vec<_> = done.into_iter().map(|(_, summary)| summary).collect();
        Ok::<_, CliError>(summaries)
    };
    let names: Vec<String> = session.disks().iter().map(|disk| disk.volume.name.clone()).collect();
    let summaries = tokio::select! {
        summaries = all => summaries?,
        error = session.watch() => return Err(error.into()),
        error = show(names, &progress, args.stall_timeout) => return Err(error),
    };
    session.prove_unbroken().await?;
    Ok(summaries)
}

/// Shows progress; returns only when there is none any more.
async fn show(names: Vec<String>, volumes: &[Arc<PullProgress>], stall_timeout: u64) -> CliError {
    let mut shown = Progress::new("backing up", names);
    let (mut last, mut since) = (u64::MAX, Instant::now());
    loop {
        let mut sum = 0;
        for (index, volume) in volumes.iter().enumerate() {
            let (read, total) = (volume.read.load(Ordering::Relaxed), volume.total.load(Ordering::Relaxed));
            shown.set(index, read, total);
            sum += read;
        }
        shown.tick();
        if sum != last {
            (last, since) = (sum, Instant::now());
        } else if since.elapsed() > Duration::from_secs(stall_timeout) {
            shown.finish();
            return CliError::Stalled { seconds: stall_timeout };
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn outcomes(session: &Session, summaries: Vec<PullSummary>) -> Vec<VolumeOutcome> {
    let outcome = |(disk, summary): (&fleecing::SessionDisk, PullSummary)| VolumeOutcome {
        name: disk.volume.name.clone(),
        plan: disk.plan.clone(),
        virtual_size: disk.volume.virtual_size,
        source_format: disk.volume.source_format().to_owned(),
        bitmap: session.new_bitmap(),
        dirty_bytes: summary.dirty_bytes,
        read_bytes: summary.read_bytes,
        sink: summary.sink,
    };
    session.disks().iter().zip(summaries).map(outcome).collect()
}

fn record(plan: &Plan, cut: &Cut) -> BackupRecord {
    BackupRecord {
        id: plan.id.clone(),
        vm: plan.begin.vm.clone(),
        vm_uuid: plan.vm_uuid.clone(),
        parent: plan.parent.as_ref().map(|parent| parent.id.clone()),
        sequence: plan.parent.as_ref().map_or(1, |parent| parent.sequence + 1),
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
    }
}

/// The target's commit decides; only then do the bitmaps advance.
async fn commit(
    session: Session,
    unfinished: UnfinishedBackup,
    record: BackupRecord,
    volumes: Vec<VolumeOutcome>,
) -> Result<CompleteBackup, CliError> {
    match unfinished.commit(record, volumes).await {
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

/// Ends with the first signal that asks the program to end.
pub(super) async fn signal() -> CliError {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => CliError::Signal { signal: "interrupted", code: 130 },
        _ = terminate.recv() => CliError::Signal { signal: "terminated", code: 143 },
    }
}
