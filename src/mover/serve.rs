//! The mover's side of a backup.

use super::{
    Bandwidth, Channel, ChannelError, CompleteBackup, FromMover, MoverError, PROTOCOL, PlannedVolume, PullError,
    PullProgress, PullRequest, PullSummary, ReadOrder, TargetAccess, ToMover, VolumeSummary,
    config::OfflineVolume,
    offline, priority, pull,
    target::{Target, UnfinishedBackup, VolumeOutcome},
};
use crate::{backup::BackupRecord, image::ImageSink};
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Between two messages about progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// How a mover serves.
#[derive(Debug, Default)]
pub struct MoverSettings {
    /// The one VM that it may store a backup of; none: any.
    pub vm: Option<String>,
    /// UUID of that VM, for its manifest; none: what the driver says.
    pub vm_uuid: Option<String>,
    /// Definition of the VM, for its manifest.
    pub definition: Option<serde_json::Value>,
    /// Disks of a stopped VM.
    pub offline: Vec<OfflineVolume>,
    /// Most bytes that are read in a second.
    pub bandwidth: Option<u64>,
    /// Priority of all threads of the process from the first read on; 0 leaves them as they are.
    pub nice: i32,
}

/// Serves one backup on a connection to a driver. `None`: it was given up by the driver.
pub async fn serve(
    channel: &mut Channel,
    access: TargetAccess,
    settings: MoverSettings,
) -> Result<Option<CompleteBackup>, MoverError> {
    match serve_one(channel, access, settings).await {
        Err(MoverError::Channel(ChannelError::Closed)) => Ok(None),
        Err(error) => {
            // It may be gone.
            let _ = channel.send(&FromMover::Failed(error.to_failure()), None).await;
            Err(error)
        }
        Ok(backup) => Ok(Some(backup)),
    }
}

async fn serve_one(
    channel: &mut Channel,
    access: TargetAccess,
    settings: MoverSettings,
) -> Result<CompleteBackup, MoverError> {
    // While the driver looks at the VM: a passphrase is slow to check.
    let opening = tokio::spawn(access.open());
    let hello = channel.receive().await;
    let open = opening.await.map_err(|_| MoverError::Config("opening the target died".into()))?;
    let open = match (hello, open) {
        (Ok(ToMover::Hello { protocol, vm }), Ok(open)) => match greet(&settings, protocol, &vm) {
            Ok(()) => open.of_vm(&vm).await?,
            Err(error) => {
                open.close().await;
                return Err(error);
            }
        },
        (Ok(_), Ok(open)) => {
            open.close().await;
            return Err(unexpected("the first message"));
        }
        (Err(error), open) => {
            if let Ok(open) = open {
                open.close().await;
            }
            return Err(error.into());
        }
        (_, Err(error)) => return Err(error),
    };
    let (unfinished, volumes) = match begin(channel, &open, &settings).await {
        Ok((backup, volumes)) => (open.begin(backup)?, volumes),
        Err(error) => {
            open.close().await;
            return Err(error);
        }
    };
    match Serving::run(channel, &unfinished, volumes, &settings).await {
        Ok((record, outcomes)) => {
            // From here on the driver may go away: what is complete is complete.
            let record = of_this_vm(record, settings);
            let backup = unfinished.commit(record, outcomes).await?;
            let repository = matches!(backup, CompleteBackup::Repository(_));
            let manifest = serde_json::to_value(&backup).unwrap_or_default();
            if let Err(error) = channel.send(&FromMover::Committed { manifest, repository }, None).await {
                tracing::warn!(%error, "the backup is complete, but the agent could not be told");
            }
            Ok(backup)
        }
        Err(error) => {
            unfinished.discard().await;
            Err(error)
        }
    }
}

fn unexpected(what: &str) -> MoverError {
    ChannelError::Protocol(format!("{what} is not one that fits here")).into()
}

fn greet(settings: &MoverSettings, protocol: u32, vm: &str) -> Result<(), MoverError> {
    if protocol != PROTOCOL {
        let detail = format!("it speaks version {protocol}, this mover {PROTOCOL}: an upgrade is under way");
        return Err(ChannelError::Protocol(detail).into());
    }
    match &settings.vm {
        Some(own) if own != vm => Err(MoverError::Config(format!("this mover is for {own}, not for {vm}"))),
        _ => Ok(()),
    }
}

/// What the controller knows better than the driver.
fn of_this_vm(mut record: BackupRecord, settings: MoverSettings) -> BackupRecord {
    if let Some(vm) = settings.vm {
        record.vm = vm;
    }
    if settings.vm_uuid.is_some() {
        record.vm_uuid = settings.vm_uuid;
    }
    record.definition = settings.definition.or(record.definition);
    record
}

async fn begin(
    channel: &mut Channel,
    target: &Target,
    settings: &MoverSettings,
) -> Result<(crate::backup::BackupId, Vec<PlannedVolume>), MoverError> {
    let mut disks = Vec::new();
    for volume in &settings.offline {
        let size = offline::open(volume).and_then(|file| {
            offline::disk_size(&file).map_err(|source| MoverError::Offline { volume: volume.name.clone(), source })
        })?;
        disks.push((volume.name.clone(), size));
    }
    let parent = target.parent()?;
    channel.send(&FromMover::Opened { protocol: PROTOCOL, parent, offline: disks }, None).await?;
    let ToMover::Begin { backup, volumes } = channel.receive().await? else {
        return Err(unexpected("the message behind the greeting"));
    };
    let (address, object) = target.address(&backup);
    channel.send(&FromMover::Begun { address, object }, None).await?;
    Ok((backup, volumes))
}

type Read = Result<(usize, PullSummary), MoverError>;

/// One backup under way.
struct Serving<'a> {
    unit: u64,
    volumes: &'a [PlannedVolume],
    settings: &'a MoverSettings,
    bandwidth: Option<Arc<Bandwidth>>,
    progress: Vec<Arc<PullProgress>>,
    sinks: Vec<Option<Box<dyn ImageSink>>>,
    summaries: Vec<Option<PullSummary>>,
    given_up: GivenUp,
}

/// Tells threads that read for a backup that nobody wants it any more.
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Serving<'_> {
    /// Until the driver says that everything is read.
    async fn run(
        channel: &mut Channel,
        unfinished: &UnfinishedBackup,
        volumes: Vec<PlannedVolume>,
        settings: &MoverSettings,
    ) -> Result<(BackupRecord, Vec<VolumeOutcome>), MoverError> {
        let sinks = volumes.iter().map(|volume| unfinished.sink(volume).map(Some)).collect::<Result<_, _>>()?;
        let mut serving = Serving {
            unit: unfinished.unit(),
            volumes: &volumes,
            settings,
            bandwidth: settings.bandwidth.map(|rate| Arc::new(Bandwidth::new(rate))),
            progress: volumes.iter().map(|_| Arc::default()).collect(),
            sinks,
            summaries: volumes.iter().map(|_| None).collect(),
            given_up: GivenUp(Arc::default()),
        };
        let record = serving.serve(channel).await?;
        let summaries = std::mem::take(&mut serving.summaries);
        drop(serving);
        let mut outcomes = Vec::new();
        for (plan, summary) in volumes.into_iter().zip(summaries) {
            let Some(PullSummary { dirty_bytes, read_bytes, sink, .. }) = summary else {
                return Err(unexpected("a commit before every volume was read"));
            };
            outcomes.push(VolumeOutcome { plan, dirty_bytes, read_bytes, sink });
        }
        Ok((record, outcomes))
    }

    async fn serve(&mut self, channel: &mut Channel) -> Result<BackupRecord, MoverError> {
        let mut reads: FuturesUnordered<BoxFuture<'static, Read>> = FuturesUnordered::new();
        let mut shown: Vec<(u64, u64)> = self.volumes.iter().map(|_| (0, 0)).collect();
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        loop {
            tokio::select! {
                message = channel.receive() => match message? {
                    ToMover::Read(order) => {
                        let socket = order.export.is_some().then(|| channel.take_fd()).transpose()?;
                        reads.push(self.read(order, socket)?);
                    }
                    ToMover::Commit { record } if reads.is_empty() => return Ok(*record),
                    _ => return Err(unexpected("a message in the middle of a backup")),
                },
                Some(read) = reads.next(), if !reads.is_empty() => {
                    let (volume, summary) = read?;
                    let message = FromMover::VolumeDone {
                        volume,
                        summary: VolumeSummary {
                            dirty_bytes: summary.dirty_bytes,
                            read_bytes: summary.read_bytes,
                            new_bytes: summary.sink.new_bytes,
                            stored_bytes: summary.sink.stored_bytes,
                        },
                    };
                    self.summaries[volume] = Some(summary);
                    channel.send(&message, None).await?;
                }
                _ = tick.tick(), if !reads.is_empty() => {
                    for (volume, progress) in self.progress.iter().enumerate() {
                        let now = (progress.read.load(Ordering::Relaxed), progress.total.load(Ordering::Relaxed));
                        if now != shown[volume] {
                            shown[volume] = now;
                            let message = FromMover::Progress { volume, read: now.0, total: now.1 };
                            channel.send(&message, None).await?;
                        }
                    }
                }
            }
        }
    }

    fn read(&mut self, order: ReadOrder, socket: Option<OwnedFd>) -> Result<BoxFuture<'static, Read>, MoverError> {
        let index = order.volume;
        let (Some(plan), Some(sink)) = (self.volumes.get(index), self.sinks.get_mut(index).and_then(Option::take))
        else {
            return Err(unexpected("an order to read a volume twice, or one that is not there,"));
        };
        // Not before: the cut must not wait for a processor.
        if self.settings.nice > 0 {
            priority::lower(self.settings.nice);
        }
        let progress = Arc::clone(&self.progress[index]);
        let name = plan.name.clone();
        let Some(socket) = socket else {
            let volume = self.settings.offline.iter().find(|volume| volume.name == name);
            let volume = volume.ok_or_else(|| unexpected("an order to read a volume that is not mounted"))?;
            let file = offline::open(volume)?;
            let size = plan.virtual_size;
            return Ok(self.read_offline(index, name, file, size, sink));
        };
        let request = PullRequest {
            always: order.always(),
            export: order.export.unwrap_or_default(),
            size: Some(plan.virtual_size),
            bitmap: order.bitmap,
            unit: self.unit,
            bandwidth: self.bandwidth.clone(),
            credit: Some(order.credit),
            discard: order.discard,
        };
        Ok(Box::pin(async move {
            let failed = |source: PullError| MoverError::Volume { volume: name.clone(), source };
            let stream = UnixStream::from(socket);
            let stream = stream.set_nonblocking(true).and_then(|()| tokio::net::UnixStream::from_std(stream));
            let stream = stream.map_err(ChannelError::from)?;
            pull(stream, &request, sink, &progress).await.map(|summary| (index, summary)).map_err(failed)
        }))
    }

    fn read_offline(
        &self,
        index: usize,
        name: String,
        file: File,
        size: u64,
        sink: Box<dyn ImageSink>,
    ) -> BoxFuture<'static, Read> {
        let (progress, unit) = (Arc::clone(&self.progress[index]), self.unit);
        let given_up = Arc::clone(&self.given_up.0);
        Box::pin(async move {
            let (sender, result) = tokio::sync::oneshot::channel();
            // A plain thread, not the runtime's pool: it may hang in the target, and nobody must wait for it then.
            let work = move || {
                let read = offline::read_all(&file, unit, sink, &progress, || given_up.load(Ordering::Relaxed));
                let _ = sender.send(read);
            };
            let failed = |source: PullError| MoverError::Volume { volume: name.clone(), source };
            std::thread::Builder::new()
                .name("offline-disk".into())
                .spawn(work)
                .map_err(|source| MoverError::Offline { volume: name.clone(), source })?;
            let read = result.await.map_err(|_| failed(PullError::SinkDied))?;
            let summary = read.map_err(|error| failed(PullError::Sink(error)))?;
            if summary.size != size {
                let source = std::io::Error::other(format!("it has {} bytes now, not {size}", summary.size));
                return Err(MoverError::Offline { volume: name.clone(), source });
            }
            Ok((index, summary))
        })
    }
}
