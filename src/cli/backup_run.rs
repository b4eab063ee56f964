//! `virt-fleece backup`: the run, with a mover in the same process.

use super::{
    CliError,
    backup::{BackupArgs, Report},
    progress::Progress,
};
use crate::{
    fleecing::{Leftover, recover},
    mover::{self, Channel, ChannelError, MoverSettings},
    run::{self, BackupRequest, Mover, RunError, RunStatus, Stop},
};
use std::{convert::Infallible, sync::OnceLock, time::Duration};
use tokio::sync::watch;

/// How long the mover may take to end when nobody needs it any more: it removes what it has begun at the target.
const MOVER_END_LIMIT: Duration = Duration::from_secs(15);

pub(super) async fn run(args: &BackupArgs) -> Result<Report, CliError> {
    let mut connection = args.vm_args.connect().await?;
    let _lock = connection.lock(Duration::from_secs(args.wait)).await?;
    let mut journal = connection.journal();
    let recovered = {
        let qmp = connection.qmp().clone();
        let access = args.target.location();
        let head = async |leftover: &Leftover| super::recover::head(leftover, access.as_ref()).await;
        recover(&qmp, &mut journal, connection.guest_agent(), head).await.map_err(RunError::from)?
    };
    if !recovered.is_nothing() {
        eprintln!("cleaned up behind an earlier backup: {}", super::recover::text(&recovered));
    }
    let access = args.target.access()?;
    let settings = MoverSettings { bandwidth: args.bandwidth_limit, nice: args.nice, ..MoverSettings::default() };
    let (ours, mut theirs) = Channel::pair().map_err(ChannelError::from).map_err(RunError::from)?;
    let serving = tokio::spawn(async move { mover::serve(&mut theirs, access, settings).await });
    let (status, shown) = watch::channel(RunStatus::default());
    let code = OnceLock::new();
    let mut mover = Mover::new(ours);
    let request = request(args);
    let result = {
        let work = run::backup(connection, &request, &mut mover, &status, signalled(&code));
        tokio::select! {
            result = work => result,
            never = show(shown) => match never {},
        }
    };
    drop(mover);
    // Not its result: what counts was said to the run.
    let _ = tokio::time::timeout(MOVER_END_LIMIT, serving).await;
    match (result, code.get()) {
        (Ok(finished), _) => Ok(Report { backup: finished.backup, recovered, engine_reason: finished.engine_reason }),
        (Err(RunError::Stopped(stop)), Some(code)) => Err(CliError::Signal { message: stop.message, code: *code }),
        (Err(error), _) => Err(error.into()),
    }
}

fn request(args: &BackupArgs) -> BackupRequest {
    BackupRequest {
        vm: args.vm.clone(),
        vm_uuid: None,
        backup_type: args.backup_type.backup_type(),
        volumes: args.volumes.clone(),
        exclude_volumes: args.exclude_volumes.clone(),
        unsuitable: Vec::new(),
        engine: args.engine.engine(),
        quiesce: args.quiesce.wish(),
        fleece_limit: args.fleece_limit,
        stall_timeout: Duration::from_secs(args.stall_timeout),
    }
}

/// Shows progress for as long as it is polled.
async fn show(mut status: watch::Receiver<RunStatus>) -> Infallible {
    let mut shown = None;
    loop {
        {
            let status = status.borrow_and_update();
            if status.cut.is_some() {
                let names = status.volumes.iter().map(|volume| volume.plan.name.clone());
                let shown = shown.get_or_insert_with(|| Progress::new("backing up", names));
                for (index, volume) in status.volumes.iter().enumerate() {
                    shown.set(index, volume.read, volume.total);
                }
                shown.tick();
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Ends with the first signal that asks the program to end; its exit code goes into `code`.
async fn signalled(code: &OnceLock<u8>) -> Stop {
    let (signal, number) = signal().await;
    let _ = code.set(number);
    Stop {
        reason: "Cancelled".into(),
        message: format!("{signal}: the backup was given up, the VM was left as it was before"),
    }
}

/// The first signal that asks the program to end: its name, and the exit code.
pub(super) async fn signal() -> (&'static str, u8) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => ("interrupted", 130),
        _ = terminate.recv() => ("terminated", 143),
    }
}
