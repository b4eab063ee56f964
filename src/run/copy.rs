//! Reading the snapshots: connections to QEMU's NBD server go to the mover, and are watched.

use super::{BackupRequest, Mover, RunError, RunStatus, backup::full_reason, mover::unexpected};
use crate::{
    backup::BackupId,
    chain::VolumePlan,
    fleecing::{Session, SessionDisk, SessionError, Volume},
    mover::{ChannelError, FromMover, PlannedVolume, ReadOrder},
    nbd,
};
use rustix::net::Shutdown;
use std::{os::fd::AsFd, os::unix::net::UnixStream, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

/// Volumes that are read at once: more would only compete for the same disks and CPUs.
const PARALLEL_VOLUMES: usize = 2;
/// How long QEMU may take to greet. Its send buffer is not known before.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// A connection to QEMU that the mover reads from. When this side gives up it is shut down, whatever the mover does: a
/// connection that nobody reads would keep QEMU's main loop.
#[derive(Debug)]
struct PassedConnection(UnixStream);

impl Drop for PassedConnection {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}

/// What the mover has to know of a volume.
pub(super) fn planned(volume: &Volume, plan: &VolumePlan, bitmap: &str) -> Result<PlannedVolume, RunError> {
    let parent = match plan {
        VolumePlan::Full { .. } => None,
        VolumePlan::Incremental { parent, .. } => {
            let parent = parent.parse::<BackupId>();
            Some(parent.map_err(|error| ChannelError::Protocol(error.to_string()))?)
        }
    };
    Ok(PlannedVolume {
        name: volume.name.clone(),
        virtual_size: volume.virtual_size,
        source_format: volume.source_format().to_owned(),
        bitmap: bitmap.to_owned(),
        parent,
        full_reason: full_reason(plan),
    })
}

/// Exports the snapshots, has them read, and proves that they were whole to the end.
pub(super) async fn copy(
    request: &BackupRequest,
    session: &mut Session,
    mover: &mut Mover,
    status: &watch::Sender<RunStatus>,
) -> Result<(), RunError> {
    session.export().await?;
    let session = &*session;
    tokio::select! {
        read = read_all(session, mover, status) => read?,
        error = session.watch() => return Err(error.into()),
        error = stalls(request.stall_timeout, status) => return Err(error),
    }
    session.prove_unbroken().await?;
    Ok(())
}

async fn read_all(session: &Session, mover: &mut Mover, status: &watch::Sender<RunStatus>) -> Result<(), RunError> {
    let disks = session.disks();
    let mut connections: Vec<Option<PassedConnection>> = disks.iter().map(|_| None).collect();
    let (mut next, mut done) = (0, 0);
    while done < disks.len() {
        while next < disks.len() && next - done < PARALLEL_VOLUMES {
            connections[next] = Some(start(session, next, &disks[next], mover).await?);
            next += 1;
        }
        match mover.receive().await? {
            FromMover::Progress { volume, read, total } if volume < next => {
                status.send_modify(|status| {
                    let volume = &mut status.volumes[volume];
                    (volume.read, volume.total) = (read, total);
                });
            }
            FromMover::VolumeDone { volume, summary } if connections.get_mut(volume).is_some_and(|c| c.is_some()) => {
                connections[volume] = None;
                done += 1;
                status.send_modify(|status| {
                    let volume = &mut status.volumes[volume];
                    volume.summary = Some(summary);
                    (volume.read, volume.total) = (summary.read_bytes, summary.read_bytes);
                });
            }
            _ => return Err(unexpected("how far it is")),
        }
    }
    Ok(())
}

/// Hands a connection over, and keeps a duplicate.
async fn start(
    session: &Session,
    index: usize,
    disk: &SessionDisk,
    mover: &mut Mover,
) -> Result<PassedConnection, RunError> {
    let attempt = || SessionError::local("connecting to QEMU's NBD server");
    let stream = session.connect()?;
    let kept = PassedConnection(stream.try_clone().map_err(attempt())?);
    let credit = credit(&kept.0).await.map_err(attempt())?;
    let order = ReadOrder {
        volume: index,
        export: Some(disk.slot.export()),
        bitmap: disk.previous_bitmap(),
        always: match &disk.plan {
            VolumePlan::Incremental { tail: Some(tail), .. } => Some((tail.start(), tail.end())),
            _ => None,
        },
        credit,
        discard: session.discards(),
    };
    mover.read(order, Some(stream.as_fd())).await?;
    Ok(kept)
}

/// Most bytes that may be outstanding. Asked here, since the mover may live in another network namespace, from where
/// nothing can be said about this socket; and after the greeting, since QEMU sets its buffer when it accepts.
async fn credit(stream: &UnixStream) -> std::io::Result<u64> {
    stream.set_nonblocking(true)?;
    let waiting = tokio::net::UnixStream::from_std(stream.try_clone()?)?;
    timeout(GREETING_LIMIT, waiting.readable())
        .await
        .map_err(|_| std::io::Error::new(std::io::ErrorKind::TimedOut, "QEMU does not greet"))??;
    let inode = rustix::fs::fstat(stream)?.st_ino;
    Ok(nbd::credit_of_peer(inode))
}

/// Ends when nothing moves any more.
async fn stalls(limit: Duration, status: &watch::Sender<RunStatus>) -> RunError {
    let (mut last, mut since) = (u64::MAX, Instant::now());
    loop {
        let (read, _) = status.borrow().bytes();
        if read != last {
            (last, since) = (read, Instant::now());
        } else if since.elapsed() > limit {
            return RunError::Stalled { seconds: limit.as_secs() };
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
