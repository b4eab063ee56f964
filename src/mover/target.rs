//! Where a backup goes: a directory of qcow2 chains, or a repository.

use super::{MoverError, Parent, ParentVolume, PlannedVolume};
use crate::{
    backup::{BackupId, BackupRecord},
    chain::FullReason,
    image::{
        self, ChainDirectory, ImageError, ImageSink, ManifestVolume, PartialBackup, SinkSummary, VmDirectory,
        qcow2::{Qcow2Options, Qcow2Writer},
        volume_chain,
    },
    repository::{
        self, Base, ChunkPipeline, Location, MANIFEST_VERSION, Passphrase, Repository, RepositoryError,
        RepositorySession, StoredVolume, VolumeWriter,
    },
};
use serde::Serialize;
use std::{path::PathBuf, sync::Arc, time::Duration};

/// How long the target may take to make a backup durable.
const COMMIT_LIMIT: Duration = Duration::from_secs(300);
/// How long it may take to remove an unfinished one; the next run does it otherwise.
const DISCARD_LIMIT: Duration = Duration::from_secs(10);

/// Where backups go, and the way there.
#[derive(Debug)]
pub enum TargetAccess {
    /// A directory of qcow2 images.
    Chain {
        /// The directory.
        path: PathBuf,
        /// Compress the images with zstd.
        compress: bool,
    },
    /// A repository.
    Repository {
        /// Its place.
        location: Location,
        /// Its passphrase.
        passphrase: Passphrase,
        /// Make it when there is none.
        create: bool,
        /// Level of zstd; 0 does not compress.
        level: i32,
    },
}

/// A target that can be reached.
#[derive(Debug)]
pub(super) enum OpenTarget {
    Chain { directory: ChainDirectory, compress: bool },
    Repository { session: Arc<RepositorySession>, location: Location, level: i32 },
}

impl TargetAccess {
    /// Opens it. That takes a while (a passphrase is slow to check by design), so it is done before anything waits.
    pub(super) async fn open(self) -> Result<OpenTarget, MoverError> {
        match self {
            Self::Chain { path, compress } => {
                let directory = ChainDirectory::create(&path).map_err(MoverError::Target)?;
                Ok(OpenTarget::Chain { directory, compress })
            }
            Self::Repository { location, passphrase, create, level } => {
                let repository = open_repository(&location, passphrase, create).await?;
                // Before anything is looked at that the backup relies on: see `repository::session`.
                let session = Arc::new(RepositorySession::start(repository).await?);
                Ok(OpenTarget::Repository { session, location, level })
            }
        }
    }
}

/// Opens a repository; `create` makes it where there is none.
pub(super) async fn open_repository(
    location: &Location,
    passphrase: Passphrase,
    create: bool,
) -> Result<Arc<Repository>, MoverError> {
    let storage = Location { create, ..location.clone() }.open()?;
    match Repository::open(storage.clone(), passphrase.clone()).await {
        Err(RepositoryError::Missing { .. }) if create => {}
        opened => return Ok(opened?),
    }
    match Repository::init(storage.clone(), passphrase.clone(), repository::DEFAULT_CHUNK_SIZE).await {
        Ok(repository) => Ok(repository),
        // Somebody else may have been faster.
        Err(error) => Repository::open(storage, passphrase).await.map_err(|_| error.into()),
    }
}

impl OpenTarget {
    /// The target for one backup of one VM.
    pub(super) async fn of_vm(self, vm: &str) -> Result<Target, MoverError> {
        match self {
            Self::Chain { directory, compress } => {
                let lock = directory.lock(vm).map_err(MoverError::Target)?;
                Ok(Target::Chain { vm: vm.to_owned(), directory, lock, compress })
            }
            Self::Repository { session, location, level } => match session.newest(vm).await {
                Ok(latest) => {
                    let (vm, latest) = (vm.to_owned(), latest.map(Box::new));
                    Ok(Target::Repository { vm, session, location, latest, level })
                }
                Err(error) => {
                    session.end().await;
                    Err(error.into())
                }
            },
        }
    }

    /// Gives it up.
    pub(super) async fn close(self) {
        if let Self::Repository { session, .. } = self {
            session.end().await;
        }
    }
}

/// A target that is open for one backup of one VM.
#[derive(Debug)]
pub(super) enum Target {
    Chain {
        vm: String,
        directory: ChainDirectory,
        lock: VmDirectory,
        compress: bool,
    },
    Repository {
        vm: String,
        session: Arc<RepositorySession>,
        location: Location,
        latest: Option<Box<repository::Manifest>>,
        level: i32,
    },
}

impl Target {
    /// What the journal says about the target: its address, and the object that makes the backup complete.
    pub(super) fn address(&self, id: &BackupId) -> (String, Option<String>) {
        match self {
            Self::Chain { directory, .. } => (directory.path().display().to_string(), None),
            Self::Repository { vm, session, location, .. } => {
                (location.url.clone(), Some(session.repository().manifest_name(vm, id)))
            }
        }
    }

    /// The newest backup of the VM.
    pub(super) fn parent(&self) -> Result<Option<Parent>, MoverError> {
        match self {
            Self::Chain { vm, directory, .. } => {
                let Some(latest) = directory.latest(vm).map_err(MoverError::Target)? else { return Ok(None) };
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
                Ok(Some(parent(latest.backup, volumes)))
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
                parent(latest.backup.clone(), volumes)
            })),
        }
    }

    /// The backup's place, which does not look like a backup yet.
    pub(super) fn begin(self, id: BackupId) -> Result<UnfinishedBackup, MoverError> {
        Ok(match self {
            Self::Chain { lock, compress, .. } => {
                UnfinishedBackup::Chain { partial: lock.begin(id).map_err(MoverError::Target)?, compress }
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

fn parent(record: BackupRecord, volumes: Vec<ParentVolume>) -> Parent {
    Parent {
        id: record.id,
        sequence: record.sequence,
        bitmap_line: record.bitmap_line,
        vm_uuid: record.vm_uuid,
        volumes,
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
    pub(super) plan: PlannedVolume,
    pub(super) dirty_bytes: u64,
    pub(super) read_bytes: u64,
    pub(super) sink: SinkSummary,
}

/// A complete backup, as its target describes it.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum CompleteBackup {
    /// In a directory of images.
    Chain(image::Manifest),
    /// In a repository.
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
    pub(super) fn sink(&self, volume: &PlannedVolume) -> Result<Box<dyn ImageSink>, MoverError> {
        match self {
            Self::Chain { partial, compress } => {
                let (file_name, path, file) = partial.create_volume(&volume.name).map_err(MoverError::Target)?;
                let backing = volume.parent.as_ref().map(|parent| PartialBackup::backing_name(parent, &file_name));
                let options = Qcow2Options { virtual_size: volume.virtual_size, backing, compress: *compress };
                Ok(Box::new(Qcow2Writer::new(file, path, options)))
            }
            Self::Repository { pipeline, latest, session } => {
                let incremental = volume.parent.is_some();
                // Asked for a full backup, nothing is taken for granted: every chunk is looked for, so that what got
                // lost in the repository is there again.
                let trusted = volume.full_reason != Some(FullReason::Requested);
                let latest = latest.as_ref().filter(|_| trusted);
                let below = latest.and_then(|latest| latest.volume(&volume.name));
                let base = below.and_then(|below| {
                    Some(Base {
                        shape: below.shape(session.repository()),
                        root: below.root()?,
                        unchanged_is_inherited: incremental,
                    })
                });
                Ok(Box::new(VolumeWriter::new(Arc::clone(pipeline), volume.virtual_size, base)))
            }
        }
    }

    /// Makes the backup complete and durable.
    pub(super) async fn commit(
        self,
        backup: BackupRecord,
        volumes: Vec<VolumeOutcome>,
    ) -> Result<CompleteBackup, MoverError> {
        match self {
            Self::Chain { partial, .. } => {
                let volumes = volumes.into_iter().map(image_volume).collect();
                let manifest = image::Manifest { format_version: image::FORMAT_VERSION, backup, volumes };
                let (written, complete) = (manifest.clone(), partial.complete_path());
                if let Err(error) = in_background(COMMIT_LIMIT, move || partial.commit(&written)).await {
                    // It may have taken effect later than it was waited for.
                    let looked = in_background(DISCARD_LIMIT, move || image::look_for_backup(&complete));
                    if looked.await.is_err() {
                        return Err(MoverError::Target(error));
                    }
                    tracing::warn!(%error, "the backup is complete, though its commit seemed to fail");
                }
                Ok(CompleteBackup::Chain(manifest))
            }
            Self::Repository { session, .. } => {
                let volumes = volumes.into_iter().map(stored_volume).collect();
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
    /// What it is, wherever it is.
    pub fn record(&self) -> &BackupRecord {
        match self {
            Self::Chain(manifest) => &manifest.backup,
            Self::Repository(manifest) => &manifest.backup,
        }
    }
}

fn image_volume(volume: VolumeOutcome) -> ManifestVolume {
    let VolumeOutcome { plan, dirty_bytes, read_bytes, sink } = volume;
    ManifestVolume {
        file: PartialBackup::file_name(&plan.name),
        name: plan.name,
        parent: plan.parent,
        full_reason: plan.full_reason.map(FullReason::word),
        virtual_size: plan.virtual_size,
        source_format: plan.source_format,
        bitmap: plan.bitmap,
        digest: sink.content.unwrap_or_default(),
        file_bytes: sink.stored_bytes,
        dirty_bytes,
        read_bytes,
        data_bytes: sink.data_bytes,
        zero_bytes: sink.zero_bytes,
    }
}

fn stored_volume(volume: VolumeOutcome) -> StoredVolume {
    let VolumeOutcome { plan, dirty_bytes, read_bytes, sink } = volume;
    StoredVolume {
        name: plan.name,
        virtual_size: plan.virtual_size,
        root: sink.content.unwrap_or_default(),
        parent: plan.parent,
        full_reason: plan.full_reason.map(FullReason::word),
        source_format: plan.source_format,
        bitmap: plan.bitmap,
        dirty_bytes,
        read_bytes,
        data_bytes: sink.data_bytes,
        zero_bytes: sink.zero_bytes,
        new_bytes: sink.new_bytes,
        stored_bytes: sink.stored_bytes,
    }
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
