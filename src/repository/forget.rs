//! Forgetting backups by their id, whether they can be read or not.

use super::{
    RepositoryError,
    manifest::{Manifest, ManifestName},
    repository::Repository,
};
use crate::backup::BackupId;

/// A backup that is there, as far as its name tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedBackup(ManifestName);

impl NamedBackup {
    /// Its id.
    pub fn id(&self) -> &BackupId {
        &self.0.id
    }

    /// The object whose presence makes it a backup.
    pub fn object(&self) -> &str {
        &self.0.object
    }
}

impl Repository {
    /// A backup of a VM that is known by name; whether it is there is not looked at.
    pub fn name_backup(&self, vm: &str, id: &BackupId) -> NamedBackup {
        NamedBackup(ManifestName { id: id.clone(), object: self.manifest_name(vm, id) })
    }

    /// The backups with these ids, of one VM or all; each id once, oldest first. All of them are there, or it fails.
    pub async fn named(&self, vm: Option<&str>, ids: &[BackupId]) -> Result<Vec<NamedBackup>, RepositoryError> {
        let mut found: Vec<NamedBackup> = Vec::new();
        let names = self.manifest_names(vm).await?;
        for name in names.iter().filter(|name| ids.contains(&name.id)) {
            if found.last().is_some_and(|last| *last.id() == name.id) {
                let id = &name.id;
                return Err(RepositoryError::Invalid(format!("several VMs have a backup {id}: name one with --vm")));
            }
            found.push(NamedBackup(name.clone()));
        }
        if let Some(missing) = ids.iter().find(|id| !found.iter().any(|known| known.id() == *id)) {
            let of_vm = vm.map_or_else(String::new, |vm| format!(" of VM `{vm}`"));
            let known = match names.len() {
                0 => "none".to_owned(),
                many => format!("{many} others; see `virt-fleece list`"),
            };
            return Err(RepositoryError::NotFound { what: format!("backup {missing}{of_vm}"), known });
        }
        Ok(found)
    }

    /// Reads a backup's manifest.
    pub async fn read_named(&self, backup: &NamedBackup) -> Result<Manifest, RepositoryError> {
        self.read_manifest(&backup.0).await
    }

    /// Forgets a backup, even one that cannot be read. Its chunks stay until a prune finds that nobody needs them.
    pub async fn forget_named(&self, backup: &NamedBackup) -> Result<(), RepositoryError> {
        self.storage().delete(backup.object()).await
    }
}
