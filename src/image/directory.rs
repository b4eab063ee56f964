//! The plain directory of qcow2 chains.
//!
//! `DIR/<vm>/<backup id>/manifest.json` and `<volume>.qcow2` beside it. A backup under way is `<backup id>.partial`;
//! renaming it is the commit. Images name the one below them by a relative path, so `qemu-img` reads any point alone,
//! and the directory can be moved as a whole.

use super::{ImageError, Manifest};
use crate::backup::BackupId;
use rustix::fs::FlockOperation;
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

const MANIFEST: &str = "manifest.json";
/// BLAKE3 of the manifest, checked by `b3sum --check`.
const MANIFEST_DIGEST: &str = "manifest.json.b3";
const PARTIAL: &str = ".partial";

/// A directory of chains.
#[derive(Debug, Clone)]
pub struct ChainDirectory {
    path: PathBuf,
}

impl ChainDirectory {
    /// An existing directory.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let path = path.canonicalize().map_err(ImageError::io("open", path))?;
        fs::read_dir(&path).map_err(ImageError::io("open", &path))?;
        Ok(Self { path })
    }

    /// An existing directory, or a new one.
    pub fn create(path: &Path) -> Result<Self, ImageError> {
        create_durably(path)?;
        Self::open(path)
    }

    /// Its absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The VMs that have a directory here, sorted.
    pub fn vms(&self) -> Result<Vec<String>, ImageError> {
        let mut vms = Self::names(&self.path)?;
        vms.retain(|name| check_name("VM", name).is_ok() && self.path.join(name).is_dir());
        Ok(vms)
    }

    /// All backups of a VM. A directory without a manifest is none; one whose manifest cannot be trusted does not stand
    /// in the way of the others.
    pub fn inventory(&self, vm: &str) -> Result<Inventory, ImageError> {
        check_name("VM", vm)?;
        let mut inventory = Inventory::default();
        for name in Self::names(&self.path.join(vm))? {
            if let Ok(id) = name.parse::<BackupId>() {
                match self.manifest(vm, &id) {
                    Ok(manifest) => inventory.manifests.extend(manifest),
                    Err(error) => inventory.unreadable.push((id, error)),
                }
            }
        }
        inventory.manifests.sort_by(|a, b| (a.backup.sequence, &a.backup.id).cmp(&(b.backup.sequence, &b.backup.id)));
        Ok(inventory)
    }

    /// The complete backups of a VM, oldest first; a warning for each that cannot be trusted.
    pub fn manifests(&self, vm: &str) -> Result<Vec<Manifest>, ImageError> {
        let inventory = self.inventory(vm)?;
        for (id, error) in &inventory.unreadable {
            tracing::warn!(%error, "backup {id} of {vm} cannot be used");
        }
        Ok(inventory.manifests)
    }

    /// A backup's manifest, `None` when there is no such complete backup.
    pub fn manifest(&self, vm: &str, id: &BackupId) -> Result<Option<Manifest>, ImageError> {
        let path = self.backup_path(vm, id).join(MANIFEST);
        match fs::read(&path) {
            Ok(bytes) => {
                check_manifest_digest(&path, &bytes)?;
                let manifest = Manifest::parse(&bytes, &path)?;
                if manifest.backup.id != *id || manifest.backup.vm != vm {
                    return Err(ImageError::damaged(path, "it belongs to another backup"));
                }
                Ok(Some(manifest))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ImageError::Io { attempt: "read", path, source }),
        }
    }

    /// The newest complete backup of a VM.
    pub fn latest(&self, vm: &str) -> Result<Option<Manifest>, ImageError> {
        Ok(self.manifests(vm)?.pop())
    }

    /// The backup with this id, or the newest for `latest`; an error that names what there is.
    pub fn find(&self, vm: &str, id: &str) -> Result<Manifest, ImageError> {
        if let Ok(id) = id.parse::<BackupId>() {
            // Its own error, where there is one.
            self.manifest(vm, &id)?;
        }
        let Inventory { mut manifests, unreadable } = self.inventory(vm)?;
        if id == "latest" {
            // A newer one that cannot be trusted: an older point must be asked for by name.
            let newest = manifests.last().map(|manifest| manifest.backup.id.clone());
            if let Some((_, error)) = unreadable.into_iter().rfind(|(id, _)| Some(id) > newest.as_ref()) {
                return Err(error);
            }
        }
        let found = match id {
            "latest" => manifests.pop(),
            id => manifests
                .iter()
                .position(|manifest| manifest.backup.id.as_str() == id)
                .map(|at| manifests.swap_remove(at)),
        };
        let known = || manifests.iter().map(|manifest| manifest.backup.id.to_string()).collect::<Vec<_>>().join(", ");
        found.ok_or_else(|| ImageError::NotFound {
            what: if id == "latest" { "complete backup".into() } else { format!("backup `{id}`") },
            path: self.path.join(vm),
            known: if manifests.is_empty() { "none".into() } else { known() },
        })
    }

    /// Where a complete backup is.
    pub fn backup_path(&self, vm: &str, id: &BackupId) -> PathBuf {
        self.path.join(vm).join(id.as_str())
    }

    /// Takes the VM's directory for one run (`flock`, so it ends with the process), makes it if need be, and removes
    /// what runs that were cut short left in it.
    pub fn lock(&self, vm: &str) -> Result<VmDirectory, ImageError> {
        check_name("VM", vm)?;
        let path = self.path.join(vm);
        create_durably(&path)?;
        let handle = File::open(&path).map_err(ImageError::io("open", &path))?;
        match rustix::fs::flock(&handle, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(ImageError::Busy { path }),
            Err(error) => return Err(ImageError::io("lock", &path)(error.into())),
        }
        for name in Self::names(&path)? {
            if name.strip_suffix(PARTIAL).is_some_and(|id| id.parse::<BackupId>().is_ok()) {
                let partial = path.join(&name);
                tracing::info!(path = %partial.display(), "removing what an unfinished backup left");
                fs::remove_dir_all(&partial).map_err(ImageError::io("remove", &partial))?;
            }
        }
        Ok(VmDirectory { directory: self.clone(), vm: vm.to_owned(), handle })
    }

    fn names(path: &Path) -> Result<Vec<String>, ImageError> {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(ImageError::Io { attempt: "list", path: path.to_owned(), source }),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(ImageError::io("list", path))?;
            names.extend(entry.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }
}

/// The backups of a VM.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Complete ones, oldest first.
    pub manifests: Vec<Manifest>,
    /// Those whose manifest is damaged or cannot be read, and why.
    pub unreadable: Vec<(BackupId, ImageError)>,
}

/// A VM's directory, held by one run.
#[derive(Debug)]
pub struct VmDirectory {
    directory: ChainDirectory,
    vm: String,
    handle: File,
}

impl VmDirectory {
    /// Begins a backup.
    pub fn begin(self, id: BackupId) -> Result<PartialBackup, ImageError> {
        let path = self.directory.path.join(&self.vm).join(format!("{id}{PARTIAL}"));
        DirBuilder::new().mode(0o700).create(&path).map_err(ImageError::io("create", &path))?;
        Ok(PartialBackup { vm: self, id, path })
    }
}

/// A backup under way. Dropped without a commit, it stays partial and is removed by the next run.
#[derive(Debug)]
pub struct PartialBackup {
    vm: VmDirectory,
    id: BackupId,
    path: PathBuf,
}

impl PartialBackup {
    /// A new file for a volume's image: its name, path and descriptor.
    pub fn create_volume(&self, volume: &str) -> Result<(String, PathBuf, File), ImageError> {
        check_name("volume", volume)?;
        let name = Self::file_name(volume);
        let path = self.path.join(&name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(ImageError::io("create", &path))?;
        Ok((name, path, file))
    }

    /// Name of a volume's image.
    pub fn file_name(volume: &str) -> String {
        format!("{volume}.qcow2")
    }

    /// The relative name by which an image of this backup refers to the same volume's image in another one.
    pub fn backing_name(parent: &BackupId, file: &str) -> String {
        format!("../{parent}/{file}")
    }

    /// Where it will be when it is complete.
    pub fn complete_path(&self) -> PathBuf {
        self.vm.directory.backup_path(&self.vm.vm, &self.id)
    }

    /// Makes the backup complete. Its images must be durable. When this returns, the backup is there; on an error it is
    /// not, unless the file system carries out later what it refused now ([`look_for_backup`]).
    pub fn commit(self, manifest: &Manifest) -> Result<(), ImageError> {
        let path = self.path.join(MANIFEST);
        let mut json =
            serde_json::to_vec_pretty(manifest).map_err(|error| ImageError::io("write", &path)(error.into()))?;
        json.push(b'\n');
        write_durably(&path, &json)?;
        write_durably(&self.path.join(MANIFEST_DIGEST), digest_line(&json).as_bytes())?;
        sync(&self.path)?;
        let complete = self.complete_path();
        if let Err(error) = fs::rename(&self.path, &complete) {
            // A network file system may have done it and lost the answer. What is still there was not renamed, whatever
            // has its name.
            if self.path.exists() || look_for_backup(&complete).is_err() {
                return Err(ImageError::io("rename", &self.path)(error));
            }
        }
        // It is seen from now on, so it counts. Should a power cut take it back, the next backup stands on the one
        // before, and reads everything.
        if let Err(error) = self.vm.handle.sync_all() {
            tracing::warn!(%error, path = %complete.display(), "the backup is complete, but may not survive a power cut");
        }
        Ok(())
    }

    /// Removes the backup.
    pub fn discard(self) -> Result<(), ImageError> {
        fs::remove_dir_all(&self.path).map_err(ImageError::io("remove", &self.path))
    }
}

/// What `b3sum manifest.json` prints.
fn digest_line(manifest: &[u8]) -> String {
    format!("{}  {MANIFEST}\n", blake3::hash(manifest).to_hex())
}

/// A manifest that was changed after the backup, by a person or by a disk, is not trusted.
fn check_manifest_digest(path: &Path, manifest: &[u8]) -> Result<(), ImageError> {
    let digest = path.with_file_name(MANIFEST_DIGEST);
    match fs::read(&digest) {
        Ok(line) if line == digest_line(manifest).as_bytes() => Ok(()),
        Ok(_) => Err(ImageError::damaged(path, format!("it does not agree with {MANIFEST_DIGEST} beside it"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(ImageError::damaged(path, format!("{MANIFEST_DIGEST} beside it is missing")))
        }
        Err(error) => Err(ImageError::io("read", digest)(error)),
    }
}

/// Makes a directory and those above it; what was new survives a power cut.
fn create_durably(path: &Path) -> Result<(), ImageError> {
    let new: Vec<_> = path.ancestors().take_while(|above| !above.as_os_str().is_empty() && !above.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(ImageError::io("create", path))?;
    for made in new {
        let above = made.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync(above)?;
    }
    Ok(())
}

/// Whether a backup is complete at this path; an error when it is not.
pub fn look_for_backup(path: &Path) -> Result<(), ImageError> {
    let manifest = path.join(MANIFEST);
    fs::metadata(&manifest).map(drop).map_err(ImageError::io("find", &manifest))
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let failed = || ImageError::io("write", path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed())?;
    file.write_all(bytes).map_err(failed())?;
    file.sync_all().map_err(failed())
}

fn sync(directory: &Path) -> Result<(), ImageError> {
    let handle = File::open(directory).map_err(ImageError::io("open", directory))?;
    handle.sync_all().map_err(ImageError::io("write", directory))
}

/// Names become path components: one of them, without surprises.
pub(super) fn check_name(what: &'static str, name: &str) -> Result<(), ImageError> {
    let plain = !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'#' | b'@' | b':' | b'+'));
    if plain { Ok(()) } else { Err(ImageError::BadName { what, name: name.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::BackupRecord;

    fn manifest(id: &BackupId) -> Manifest {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let backup = BackupRecord {
            id: id.clone(),
            vm: "web".into(),
            vm_uuid: None,
            parent: None,
            sequence: 1,
            bitmap_line: String::new(),
            point_in_time: now,
            started: now,
            finished: now,
            engine: "job".into(),
            transfer: "pull".into(),
            qemu_version: String::new(),
            cut_microseconds: 0,
            quiesce: serde_json::Value::Null,
            skipped: Vec::new(),
            tool_version: String::new(),
            definition: None,
        };
        Manifest { format_version: super::super::FORMAT_VERSION, backup, volumes: Vec::new() }
    }

    #[test]
    fn a_backup_in_the_place_is_not_taken_for_this_one() {
        let directory = tempfile::tempdir().unwrap();
        let chains = ChainDirectory::create(&directory.path().join("new/below/new")).unwrap();
        let id = BackupId::generate().unwrap();
        let begin = || chains.lock("web").unwrap().begin(id.clone()).unwrap();
        let first = begin();
        let complete = first.complete_path();
        assert!(look_for_backup(&complete).is_err());
        first.commit(&manifest(&id)).unwrap();
        look_for_backup(&complete).unwrap();
        assert!(begin().commit(&manifest(&id)).is_err());
        assert_eq!(chains.inventory("web").unwrap().manifests.len(), 1);
    }
}
