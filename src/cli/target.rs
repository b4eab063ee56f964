//! Where a backup goes: a directory of qcow2 chains, or a repository.

use super::{CliError, repository_args::AccessArgs};
use crate::{
    backup::{BackupId, BackupRecord},
    chain::{FullReason, VolumePlan},
    image::{
        self, ChainDirectory, ImageError, ImageSink, ManifestVolume, PartialBackup, SinkSummary, VmDirectory,
        qcow2::{Qcow2Options, Qcow2Writer},
        volume_chain,
    },
    repository::{
        self, Base, ChunkPipeline, Location, MANIFEST_VERSION, RepositorySession, StoredVolume, VolumeWriter,
    },
};
use clap::Args;
use serde::Serialize;
use std::{path::PathBuf, sync::Arc, time::Duration};

/// How long the target may take to make a backup durable.
const COMMIT_LIMIT: Duration = Duration::from_secs(300);
/// How long it may take to remove an unfinished one; the next run does it otherwise.
const DISCARD_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
#[group(required = true, multiple = false, args = ["qcow2_dir", "repository"])]
pub(super) struct TargetArgs {
    /// Directory for qcow2 images: one directory a VM, one a backup in it, one image a volume
    #[arg(long, value_name = "DIR")]
    qcow2_dir: Option<PathBuf>,
    /// Repository (deduplicated, compressed, encrypted): a directory, `s3://BUCKET/PREFIX`, `gs://…`, `az://…`
    #[arg(long, value_name = "URL")]
    repository: Option<String>,
    #[command(flatten)]
    access: AccessArgs,
    /// qcow2 images: compress with zstd
    #[arg(long, conflicts_with = "repository")]
    compress: bool,
    /// Repository: level of zstd from 1 to 19; 0 does not compress
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(i32).range(0..=19),
        conflicts_with = "qcow2_dir")]
    compression_level: i32,
}

/// The newest backup of the VM at a target.
#[derive(Debug, Clone)]
pub(super) struct Parent {
    pub(super) id: BackupId,
    pub(super) sequence: u64,
    pub(super) bitmap_line: String,
    pub(super) volumes: Vec<ParentVolume>,
}

/// A volume of it.
#[derive(Debug, Clone)]
pub(super) struct ParentVolume {
    pub(super) name: String,
    pub(super) virtual_size: u64,
    /// Whether an incremental backup can stand on it.
    pub(super) usable: bool,
}

impl Parent {
    pub(super) fn volume(&self, name: &str) -> Option<&ParentVolume> {
        self.volumes.iter().find(|volume| volume.name == name)
    }
}

/// A target that is open for one backup of one VM.
#[derive(Debug)]
pub(super) enum Target {
    Chain {
        directory: ChainDirectory,
        lock: VmDirectory,
        compress: bool,
    },
    Repository {
        session: Arc<RepositorySession>,
        location: Location,
        latest: Option<Box<repository::Manifest>>,
        level: i32,
    },
}

impl TargetArgs {
    /// Where the repository is, when it is one.
    pub(super) fn location(&self) -> Option<Location> {
        self.repository.as_ref().map(|url| self.access.location(url, false))
    }

    /// Opens the target.
    pub(super) async fn open(&self, vm: &str) -> Result<Target, CliError> {
        if let Some(url) = &self.repository {
            let location = self.access.location(url, false);
            let repository = self.access.open(url).await?;
            // Before anything is looked at that the backup relies on: see `repository::session`.
            let session = RepositorySession::start(repository).await?;
            let latest = match session.newest(vm).await {
                Ok(latest) => latest.map(Box::new),
                Err(error) => {
                    session.end().await;
                    return Err(error.into());
                }
            };
            return Ok(Target::Repository {
                session: Arc::new(session),
                location,
                latest,
                level: self.compression_level,
            });
        }
        let path = self
            .qcow2_dir
            .as_ref()
            .ok_or_else(|| CliError::Usage("name a target: --qcow2-dir or --repository".into()))?;
        let directory = ChainDirectory::create(path).map_err(CliError::Target)?;
        let lock = directory.lock(vm).map_err(CliError::Target)?;
        Ok(Target::Chain { directory, lock, compress: self.compress })
    }
}

impl Target {
    /// What the journal says about the target: its address, and the object that makes the backup complete.
    pub(super) fn address(&self, vm: &str, id: &BackupId) -> (String, Option<String>) {
        match self {
            Self::Chain { directory, .. } => (directory.path().display().to_string(), None),
            Self::Repository { session, location, .. } => {
                (location.url.clone(), Some(session.repository().manifest_name(vm, id)))
            }
        }
    }

    /// The newest backup of the VM.
    pub(super) fn parent(&self, vm: &str) -> Result<Option<Parent>, CliError> {
        match self {
            Self::Chain { directory, .. } => {
                let Some(latest) = directory.latest(vm).map_err(CliError::Target)? else { return Ok(None) };
                let volumes = latest
                    .volumes
                    .iter()
                    .map(|volume| {
                        let usable = volume_chain(directory, &latest, &volume.name);
                        if let Err(error) = &usable {
                            tracing::warn!(%error, "the newest backup cannot be built on");
                        }
                        ParentVolume {
                            name: volume.name.clone(),
                            virtual_size: volume.virtual_size,
                            usable: usable.is_ok(),
                        }
                    })
                    .collect();
                Ok(Some(Parent::new(latest.backup, volumes)))
            }
            Self::Repository { latest, .. } => Ok(latest.as_ref().map(|latest| {
                let volumes = latest
                    .volumes
                    .iter()
                    .map(|volume| ParentVolume {
                        name: volume.name.clone(),
                        virtual_size: volume.virtual_size,
                        usable: true,
                    })
                    .collect();
                Parent::new(latest.backup.clone(), volumes)
            })),
        }
    }

    /// The backup's place, which does not look like a backup yet.
    pub(super) fn begin(self, id: BackupId) -> Result<UnfinishedBackup, CliError> {
        Ok(match self {
            Self::Chain { lock, compress, .. } => {
                UnfinishedBackup::Chain { partial: lock.begin(id).map_err(CliError::Target)?, compress }
            }
            Self::Repository { session, latest, level, .. } => {
                let pipeline = ChunkPipeline::new(Arc::clone(&session), level);
                UnfinishedBackup::Repository { session, pipeline, latest }
            }
        })
    }

    /// Gives the target up before a backup was begun.
    pub(super) async fn close(self) {
        if let Self::Repository { session, .. } = self {
            session.end().await;
        }
    }
}

impl Parent {
    fn new(record: BackupRecord, volumes: Vec<ParentVolume>) -> Self {
        Self { id: record.id, sequence: record.sequence, bitmap_line: record.bitmap_line, volumes }
    }
}

/// A backup that is being written.
#[derive(Debug)]
pub(super) enum UnfinishedBackup {
    Chain {
        partial: PartialBackup,
        compress: bool,
    },
    Repository {
        session: Arc<RepositorySession>,
        pipeline: Arc<ChunkPipeline>,
        latest: Option<Box<repository::Manifest>>,
    },
}

/// What was made of a volume.
#[derive(Debug)]
pub(super) struct VolumeOutcome {
    pub(super) name: String,
    pub(super) plan: VolumePlan,
    pub(super) virtual_size: u64,
    pub(super) source_format: String,
    pub(super) bitmap: String,
    pub(super) dirty_bytes: u64,
    pub(super) read_bytes: u64,
    pub(super) sink: SinkSummary,
}

/// A complete backup, as its target describes it.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub(super) enum CompleteBackup {
    Chain(image::Manifest),
    Repository(repository::Manifest),
}

impl UnfinishedBackup {
    /// Bytes in whose multiples content has to come.
    pub(super) fn unit(&self) -> u64 {
        match self {
            Self::Chain { .. } => image::qcow2::CLUSTER,
            Self::Repository { session, .. } => session.repository().chunk_size(),
        }
    }

    /// Takes the content of a volume.
    pub(super) fn sink(
        &self,
        volume: &str,
        virtual_size: u64,
        plan: &VolumePlan,
    ) -> Result<Box<dyn ImageSink>, CliError> {
        match self {
            Self::Chain { partial, compress } => {
                let (file_name, path, file) = partial.create_volume(volume).map_err(CliError::Target)?;
                let backing = match plan {
                    VolumePlan::Full { .. } => None,
                    VolumePlan::Incremental { parent, .. } => {
                        Some(PartialBackup::backing_name(&parse_id(parent)?, &file_name))
                    }
                };
                let options = Qcow2Options { virtual_size, backing, compress: *compress };
                Ok(Box::new(Qcow2Writer::new(file, path, options)))
            }
            Self::Repository { pipeline, latest, session } => {
                let incremental = matches!(plan, VolumePlan::Incremental { .. });
                // Asked for a full backup, nothing is taken for granted: every chunk is looked for, so that what got
                // lost in the repository is there again.
                let trusted = !matches!(plan, VolumePlan::Full { reason: FullReason::Requested });
                let latest = latest.as_ref().filter(|_| trusted);
                let below = latest.and_then(|latest| latest.volume(volume));
                let base = below.and_then(|below| {
                    Some(Base {
                        shape: below.shape(session.repository()),
                        root: below.root()?,
                        unchanged_is_inherited: incremental,
                    })
                });
                Ok(Box::new(VolumeWriter::new(Arc::clone(pipeline), virtual_size, base)))
            }
        }
    }

    /// Makes the backup complete and durable.
    pub(super) async fn commit(
        self,
        backup: BackupRecord,
        volumes: Vec<VolumeOutcome>,
    ) -> Result<CompleteBackup, CliError> {
        match self {
            Self::Chain { partial, .. } => {
                let volumes = volumes.into_iter().map(image_volume).collect::<Result<_, _>>()?;
                let manifest = image::Manifest { format_version: image::FORMAT_VERSION, backup, volumes };
                let (written, complete) = (manifest.clone(), partial.complete_path());
                if let Err(error) = in_background(COMMIT_LIMIT, move || partial.commit(&written)).await {
                    // It may have taken effect later than it was waited for.
                    let looked = in_background(DISCARD_LIMIT, move || image::look_for_backup(&complete));
                    if looked.await.is_err() {
                        return Err(CliError::Target(error));
                    }
                    tracing::warn!(%error, "the backup is complete, though its commit seemed to fail");
                }
                Ok(CompleteBackup::Chain(manifest))
            }
            Self::Repository { session, .. } => {
                let volumes = volumes.into_iter().map(stored_volume).collect::<Result<_, _>>()?;
                let manifest = repository::Manifest { format_version: MANIFEST_VERSION, backup, volumes };
                session.commit(&manifest, COMMIT_LIMIT).await?;
                Ok(CompleteBackup::Repository(manifest))
            }
        }
    }

    /// Removes what was written, as far as that can be done soon.
    pub(super) async fn discard(self) {
        match self {
            Self::Chain { partial, .. } => {
                if let Err(error) = in_background(DISCARD_LIMIT, move || partial.discard()).await {
                    tracing::warn!(%error, "the unfinished backup is left to the next run");
                }
            }
            Self::Repository { session, .. } => {
                let _ = tokio::time::timeout(DISCARD_LIMIT, session.end()).await;
            }
        }
    }
}

impl CompleteBackup {
    pub(super) fn record(&self) -> &BackupRecord {
        match self {
            Self::Chain(manifest) => &manifest.backup,
            Self::Repository(manifest) => &manifest.backup,
        }
    }
}

fn parse_id(id: &str) -> Result<BackupId, CliError> {
    id.parse().map_err(|error: crate::backup::BadBackupId| CliError::Usage(error.to_string()))
}

/// The backup that is below a volume, or why there is none.
fn parentage(plan: &VolumePlan) -> Result<(Option<BackupId>, Option<String>), CliError> {
    Ok(match plan {
        VolumePlan::Full { reason } => (None, Some(reason.word())),
        VolumePlan::Incremental { parent, .. } => (Some(parse_id(parent)?), None),
    })
}

fn image_volume(volume: VolumeOutcome) -> Result<ManifestVolume, CliError> {
    let (parent, full_reason) = parentage(&volume.plan)?;
    Ok(ManifestVolume {
        file: PartialBackup::file_name(&volume.name),
        name: volume.name,
        parent,
        full_reason,
        virtual_size: volume.virtual_size,
        source_format: volume.source_format,
        bitmap: volume.bitmap,
        digest: volume.sink.content.unwrap_or_default(),
        file_bytes: volume.sink.stored_bytes,
        dirty_bytes: volume.dirty_bytes,
        read_bytes: volume.read_bytes,
        data_bytes: volume.sink.data_bytes,
        zero_bytes: volume.sink.zero_bytes,
    })
}

fn stored_volume(volume: VolumeOutcome) -> Result<StoredVolume, CliError> {
    let (parent, full_reason) = parentage(&volume.plan)?;
    Ok(StoredVolume {
        name: volume.name,
        virtual_size: volume.virtual_size,
        root: volume.sink.content.unwrap_or_default(),
        parent,
        full_reason,
        source_format: volume.source_format,
        bitmap: volume.bitmap,
        dirty_bytes: volume.dirty_bytes,
        read_bytes: volume.read_bytes,
        data_bytes: volume.sink.data_bytes,
        zero_bytes: volume.sink.zero_bytes,
        new_bytes: volume.sink.new_bytes,
        stored_bytes: volume.sink.stored_bytes,
    })
}

/// Work on the target, which may hang: waited for until the limit. What ends later than that changes nothing for the
/// VM: a backup that becomes complete after its bitmaps were rolled back is followed by a full one.
async fn in_background(
    limit: Duration,
    work: impl FnOnce() -> Result<(), ImageError> + Send + 'static,
) -> Result<(), ImageError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = sender.send(work());
    });
    match tokio::time::timeout(limit, receiver).await {
        Ok(Ok(result)) => result,
        _ => Err(ImageError::io("finish", "the backup's directory")(std::io::ErrorKind::TimedOut.into())),
    }
}
