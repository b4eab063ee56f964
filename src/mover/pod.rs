//! What a mover pod does, from its configuration to its termination message.

use super::{
    Channel, ChannelError, CompleteBackup, MoverError, MoverSettings, TargetAccess,
    config::{MoverConfig, MoverOutcome, MoverTarget, MoverTask, OfflineVolume},
    serve,
    target::open_repository,
};
use crate::{
    backup::BackupId,
    repository::{Catalogue, Location, Passphrase, Repository},
};
use std::{io, os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};
use tokio::net::{UnixListener, UnixStream};

/// Largest definition of a VM that goes into a backup, in bytes.
const MAX_DEFINITION: u64 = 1 << 20;

/// Does what the configuration says. Whatever happens, there is an outcome.
pub async fn run(config: MoverConfig) -> MoverOutcome {
    let done = match config.task {
        MoverTask::Backup { socket, vm, vm_uid, backup_uid, offline, definition_file, wait_seconds } => {
            tracing::info!(vm, backup_uid, "waiting for the agent");
            let work = BackupTask { socket, vm, vm_uid, offline, definition_file, wait_seconds };
            work.run(config.target).await
        }
        MoverTask::Probe => probe(config.target).await,
        MoverTask::Forget { vm, backups } => forget(config.target, &vm, &backups).await,
    };
    done.unwrap_or_else(|error| {
        let failure = error.to_failure();
        let message = failure.text();
        MoverOutcome::Failed { reason: failure.reason, message, retryable: failure.retryable }
    })
}

struct BackupTask {
    socket: String,
    vm: String,
    vm_uid: String,
    offline: Vec<OfflineVolume>,
    definition_file: Option<String>,
    wait_seconds: u64,
}

impl BackupTask {
    async fn run(self, target: MoverTarget) -> Result<MoverOutcome, MoverError> {
        let definition = self.definition_file.as_deref().map(read_definition).transpose()?;
        let access = access(target)?;
        let limit = Duration::from_secs(self.wait_seconds);
        let Some(stream) = accept(Path::new(&self.socket), limit).await? else {
            return Ok(MoverOutcome::Abandoned { message: "no agent came".into() });
        };
        let settings = MoverSettings {
            vm: Some(self.vm),
            vm_uuid: Some(self.vm_uid),
            definition,
            offline: self.offline,
            bandwidth: None,
            nice: 10,
        };
        Ok(match serve(&mut Channel::new(stream), access, settings).await? {
            Some(backup) => committed(&backup),
            None => MoverOutcome::Abandoned { message: "the agent gave the backup up".into() },
        })
    }
}

fn committed(backup: &CompleteBackup) -> MoverOutcome {
    let record = backup.record();
    let (incremental, stored_bytes) = match backup {
        CompleteBackup::Chain(manifest) => (
            manifest.volumes.iter().all(|volume| volume.parent.is_some()),
            manifest.volumes.iter().map(|volume| volume.file_bytes).sum(),
        ),
        CompleteBackup::Repository(manifest) => (
            manifest.volumes.iter().all(|volume| volume.parent.is_some()),
            manifest.volumes.iter().map(|volume| volume.stored_bytes).sum(),
        ),
    };
    MoverOutcome::Committed {
        backup_id: record.id.to_string(),
        point_in_time: record.point_in_time.to_string(),
        sequence: record.sequence,
        incremental,
        stored_bytes,
    }
}

fn read_definition(path: &str) -> Result<serde_json::Value, MoverError> {
    let bad = |why: String| MoverError::Config(format!("the VM's definition in {path} cannot be read: {why}"));
    let size = std::fs::metadata(path).map_err(|error| bad(error.to_string()))?.len();
    if size > MAX_DEFINITION {
        return Err(bad(format!("it has {size} bytes, more than {MAX_DEFINITION}")));
    }
    let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))
}

/// The one agent that comes. Nobody else can reach the socket: it is in a volume of this pod.
async fn accept(path: &Path, limit: Duration) -> Result<Option<UnixStream>, MoverError> {
    let failed = |error: io::Error| MoverError::Channel(ChannelError::Io(error));
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    // It appears when it can be connected to, with the rights that it is to have.
    let staging = path.with_extension("new");
    let _ = std::fs::remove_file(&staging);
    let listener = UnixListener::bind(&staging).map_err(failed)?;
    std::fs::set_permissions(&staging, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&staging, path).map_err(failed)?;
    let accepted = tokio::time::timeout(limit, listener.accept()).await;
    let _ = std::fs::remove_file(path);
    match accepted {
        Ok(accepted) => Ok(Some(accepted.map_err(failed)?.0)),
        Err(_) => Ok(None),
    }
}

fn access(target: MoverTarget) -> Result<TargetAccess, MoverError> {
    match target {
        MoverTarget::Qcow2Directory { path, compress } => Ok(TargetAccess::Chain { path: path.into(), compress }),
        MoverTarget::Repository { create, compression_level, .. } => {
            let (location, passphrase) = repository(&target)?;
            Ok(TargetAccess::Repository { location, passphrase, create, level: compression_level })
        }
    }
}

/// The place of a repository and its passphrase. The file's last line end is not part of it.
fn repository(target: &MoverTarget) -> Result<(Location, Passphrase), MoverError> {
    let MoverTarget::Repository { url, s3_endpoint, s3_region, ca_file, passphrase_file, create, .. } = target else {
        return Err(MoverError::Config("this needs a repository".into()));
    };
    let text = std::fs::read_to_string(passphrase_file)
        .map_err(|error| MoverError::Config(format!("the passphrase (key of the secret) cannot be read: {error}")))?;
    let text = text.strip_suffix('\n').unwrap_or(&text).trim_end_matches('\r').to_owned();
    let location = Location {
        url: url.clone(),
        s3_endpoint: s3_endpoint.clone(),
        s3_region: s3_region.clone(),
        ca_file: ca_file.clone().map(Into::into),
        create: *create,
    };
    Ok((location, Passphrase::new(text)?))
}

async fn open(target: &MoverTarget) -> Result<Arc<Repository>, MoverError> {
    let create = matches!(target, MoverTarget::Repository { create: true, .. });
    let (location, passphrase) = repository(target)?;
    open_repository(&location, passphrase, create).await
}

async fn probe(target: MoverTarget) -> Result<MoverOutcome, MoverError> {
    let repository = open(&target).await?;
    let Catalogue { manifests, damaged } = repository.catalogue(None).await?;
    let usage = repository.chunk_usage(|_, _, _| {}).await?;
    let sizes = manifests.iter().flat_map(|manifest| &manifest.volumes).map(|volume| volume.virtual_size);
    Ok(MoverOutcome::Probed {
        repository_id: repository.id(),
        backups: manifests.len() as u64,
        virtual_machines: repository.count_vms().await? as u64,
        logical_bytes: sizes.fold(0, u64::saturating_add),
        stored_bytes: usage.bytes,
        damaged: damaged.len() as u64,
    })
}

async fn forget(target: MoverTarget, vm: &str, backups: &[String]) -> Result<MoverOutcome, MoverError> {
    let ids = backups.iter().map(|id| id.parse::<BackupId>()).collect::<Result<Vec<_>, _>>();
    let ids = ids.map_err(|error| MoverError::Config(error.to_string()))?;
    if let MoverTarget::Qcow2Directory { .. } = target {
        let message = "backups in a directory of images stand on each other; delete the files by hand";
        return Err(MoverError::Config(message.into()));
    }
    let repository = open(&target).await?;
    for id in &ids {
        repository.forget_named(&repository.name_backup(vm, id)).await?;
    }
    // A manifest that came back with a power cut would name chunks that a prune has removed.
    repository.storage().flush().await?;
    Ok(MoverOutcome::Forgotten)
}
