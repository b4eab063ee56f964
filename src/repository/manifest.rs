//! What a backup in a repository is: a sealed JSON document. Its presence is the commit.

use super::{
    RepositoryError,
    chunk::ChunkId,
    index::{MAX_VIRTUAL_SIZE, Shape},
    repository::Repository,
    seal::OVERHEAD,
};
use crate::backup::{BackupId, BackupRecord};
use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Version of the manifest that is written.
pub const MANIFEST_VERSION: u32 = 1;
/// Largest manifest, in bytes.
const MAX_MANIFEST: u64 = 16 << 20;
/// Manifests that are read at once.
const PARALLEL_READS: usize = 32;
/// So many of the newest by name are read to find the newest by sequence: clocks may go wrong, but not that often.
const NEWEST_LOOKED_AT: usize = 16;

/// A complete backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub format_version: u32,
    /// What it is.
    #[serde(flatten)]
    pub backup: BackupRecord,
    /// The volumes.
    pub volumes: Vec<StoredVolume>,
}

/// A volume of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredVolume {
    /// Name.
    pub name: String,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Root of the index, 64 hex digits.
    pub root: String,
    /// The backup since which the dirty bitmap told the changes; none: the volume was read as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// Why it was read as a whole: a stable word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_reason: Option<String>,
    /// `raw` or `qcow2`: what the VM has.
    pub source_format: String,
    /// The dirty bitmap that records since this backup.
    pub bitmap: String,
    /// Bytes that counted as changed.
    pub dirty_bytes: u64,
    /// Bytes read from the snapshot.
    pub read_bytes: u64,
    /// Bytes of the read that were data.
    pub data_bytes: u64,
    /// Bytes found or declared to be zero.
    pub zero_bytes: u64,
    /// Bytes of data that the repository did not have, before compression.
    pub new_bytes: u64,
    /// Bytes that were sent for them.
    pub stored_bytes: u64,
}

impl Manifest {
    /// The volume with this name.
    pub fn volume(&self, name: &str) -> Option<&StoredVolume> {
        self.volumes.iter().find(|volume| volume.name == name)
    }
}

impl StoredVolume {
    /// Root of the index.
    pub fn root(&self) -> Option<ChunkId> {
        ChunkId::from_hex(&self.root)
    }

    /// Form of the index in this repository.
    pub fn shape(&self, repository: &Repository) -> Shape {
        Shape { size: self.virtual_size, chunk_size: repository.chunk_size() }
    }
}

/// What is where: of one backup, without reading it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ManifestName {
    pub(super) id: BackupId,
    pub(super) object: String,
}

/// All backups that could be read, and what could not.
#[derive(Debug, Default)]
pub struct Catalogue {
    /// In the order of VM, sequence, id.
    pub manifests: Vec<Manifest>,
    /// What cannot be trusted or read.
    pub damaged: Vec<RepositoryError>,
}

impl Repository {
    /// Name of the object whose presence says that a backup is complete.
    pub fn manifest_name(&self, vm: &str, id: &BackupId) -> String {
        format!("backups/{}/{id}", self.vm_tag(vm))
    }

    /// Commits a backup: everything that it names must be durable. Fails when the id exists.
    pub(super) async fn write_manifest(&self, manifest: &Manifest) -> Result<(), RepositoryError> {
        let name = self.manifest_name(&manifest.backup.vm, &manifest.backup.id);
        let document = serde_json::to_vec(manifest)
            .map_err(|error| RepositoryError::Invalid(format!("the manifest cannot be written: {error}")))?;
        if document.len() as u64 > MAX_MANIFEST {
            let (bytes, limit) = (document.len(), MAX_MANIFEST);
            return Err(RepositoryError::Invalid(format!("the manifest has {bytes} bytes, more than {limit}")));
        }
        let packed = super::chunk::pack(&document, 3);
        let mut content = (document.len() as u64).to_le_bytes().to_vec();
        content.extend_from_slice(&packed);
        let object = self.manifests().seal(name.as_bytes(), &content)?;
        if self.storage().create(&name, object.into()).await? {
            return Ok(());
        }
        Err(RepositoryError::Busy { what: "a backup with the same id", holder: manifest.backup.id.to_string() })
    }

    pub(super) async fn read_manifest(&self, name: &ManifestName) -> Result<Manifest, RepositoryError> {
        let object = self.storage().require(&name.object, MAX_MANIFEST + 9 + OVERHEAD as u64).await?;
        let content = self.manifests().open(name.object.as_bytes(), &object, &name.object)?;
        let damaged = |detail: String| RepositoryError::damaged(&name.object, detail);
        let (length, packed) = content.split_at_checked(8).ok_or_else(|| damaged("it is too short".into()))?;
        let length = u64::from_le_bytes(length.try_into().unwrap_or_default());
        if length > MAX_MANIFEST {
            return Err(damaged(format!("it claims {length} bytes")));
        }
        let document = super::chunk::unpack(packed, length as usize, &name.object)?;
        let version: Version =
            serde_json::from_slice(&document).map_err(|error| damaged(format!("it is no manifest: {error}")))?;
        if version.format_version > MANIFEST_VERSION {
            let (found, known) = (version.format_version, MANIFEST_VERSION);
            return Err(RepositoryError::TooNew { object: name.object.clone(), found, known });
        }
        let manifest: Manifest =
            serde_json::from_slice(&document).map_err(|error| damaged(format!("it is no manifest: {error}")))?;
        if manifest.backup.id != name.id || self.manifest_name(&manifest.backup.vm, &name.id) != name.object {
            return Err(damaged("it is the manifest of another backup".into()));
        }
        let bad = |volume: &StoredVolume| volume.root().is_none() || volume.virtual_size > MAX_VIRTUAL_SIZE;
        if let Some(volume) = manifest.volumes.iter().find(|volume| bad(volume)) {
            return Err(damaged(format!("volume `{}` has no usable index", volume.name)));
        }
        let names: std::collections::HashSet<_> = manifest.volumes.iter().map(|volume| &volume.name).collect();
        if names.len() != manifest.volumes.len() {
            return Err(damaged("it has two volumes of one name".into()));
        }
        Ok(manifest)
    }

    /// Names of the backups, of one VM or all, oldest first.
    pub(super) async fn manifest_names(&self, vm: Option<&str>) -> Result<Vec<ManifestName>, RepositoryError> {
        let directory = vm.map_or_else(|| "backups".to_owned(), |vm| format!("backups/{}", self.vm_tag(vm)));
        let mut names: Vec<_> = self
            .storage()
            .list_all(&directory)
            .await?
            .into_iter()
            .filter_map(|object| {
                let id = object.name.rsplit('/').next()?.parse().ok()?;
                Some(ManifestName { id, object: object.name })
            })
            .collect();
        names.sort();
        Ok(names)
    }

    async fn read_all(&self, names: Vec<ManifestName>) -> Catalogue {
        let mut catalogue = Catalogue::default();
        let mut read = stream::iter(names)
            .map(|name| async move {
                let result = self.read_manifest(&name).await;
                // One that was forgotten since it was listed is not damaged.
                let gone = result.is_err() && self.storage().exists(&name.object).await.is_ok_and(|exists| !exists);
                (!gone).then_some(result)
            })
            .buffer_unordered(PARALLEL_READS);
        while let Some(result) = read.next().await {
            match result {
                Some(Ok(manifest)) => catalogue.manifests.push(manifest),
                Some(Err(error)) => catalogue.damaged.push(error),
                None => {}
            }
        }
        let order =
            |manifest: &Manifest| (manifest.backup.vm.clone(), manifest.backup.sequence, manifest.backup.id.clone());
        catalogue.manifests.sort_by_cached_key(order);
        catalogue
    }

    /// The backups of a VM, or of all.
    pub async fn catalogue(&self, vm: Option<&str>) -> Result<Catalogue, RepositoryError> {
        Ok(self.read_all(self.manifest_names(vm).await?).await)
    }

    /// The newest backup of a VM that can be read.
    pub async fn latest(&self, vm: &str) -> Result<Option<Manifest>, RepositoryError> {
        let mut names = self.manifest_names(Some(vm)).await?;
        let newest = names.split_off(names.len().saturating_sub(NEWEST_LOOKED_AT));
        let catalogue = self.read_all(newest).await;
        for error in &catalogue.damaged {
            tracing::warn!(error = error as &dyn std::error::Error, "a backup cannot be read");
        }
        Ok(catalogue.manifests.into_iter().next_back())
    }

    /// A backup by its id, or `latest`. Without a VM the id is looked for among all.
    pub async fn find(&self, vm: Option<&str>, backup: &str) -> Result<Manifest, RepositoryError> {
        let names = self.manifest_names(vm).await?;
        let of_vm = vm.map_or_else(String::new, |vm| format!(" of VM `{vm}`"));
        let known = |names: &[ManifestName]| match names.len() {
            0 => "none".to_owned(),
            1..=8 => names.iter().map(|name| name.id.as_str()).collect::<Vec<_>>().join(", "),
            many => format!("{many} backups; see `virt-fleece list`"),
        };
        if backup == "latest" {
            let Some(vm) = vm else {
                return Err(RepositoryError::Invalid("`latest` needs a VM: name it with --vm".into()));
            };
            let missing = || RepositoryError::NotFound { what: format!("backup{of_vm}"), known: known(&names) };
            return self.latest(vm).await?.ok_or_else(missing);
        }
        match names.iter().find(|name| name.id.as_str() == backup) {
            Some(name) => self.read_manifest(name).await,
            None => Err(RepositoryError::NotFound { what: format!("backup {backup}{of_vm}"), known: known(&names) }),
        }
    }

    /// Whether a backup is complete, by its presence alone.
    pub async fn has_backup(&self, vm: &str, id: &BackupId) -> Result<bool, RepositoryError> {
        self.storage().exists(&self.manifest_name(vm, id)).await
    }

    /// Forgets a backup. Its chunks stay until a prune finds that nobody needs them.
    pub async fn forget(&self, vm: &str, id: &BackupId) -> Result<(), RepositoryError> {
        self.storage().delete(&self.manifest_name(vm, id)).await
    }

    /// Names of all VMs that have backups.
    pub async fn vms(self: &Arc<Self>) -> Result<Vec<String>, RepositoryError> {
        let mut seen = std::collections::HashSet::new();
        let mut names = self.manifest_names(None).await?;
        // One of each VM is enough; should that one be damaged, the VM is found by another.
        names.reverse();
        let tag = |name: &ManifestName| name.object.split('/').nth(1).map(str::to_owned);
        let mut vms = Vec::new();
        for name in names {
            if tag(&name).is_some_and(|tag| !seen.contains(&tag))
                && let Ok(manifest) = self.read_manifest(&name).await
            {
                seen.extend(tag(&name));
                vms.push(manifest.backup.vm);
            }
        }
        vms.sort();
        Ok(vms)
    }
}

#[derive(Deserialize)]
struct Version {
    format_version: u32,
}
