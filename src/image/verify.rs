//! Is a backup what its manifest says.

use super::{ChainDirectory, ImageError, Manifest, PartialBackup, digest, qcow2::Qcow2Image};
use crate::backup::BackupId;
use serde::Serialize;
use std::{collections::HashSet, fs::File, path::PathBuf};

/// An image of a volume's chain.
#[derive(Debug)]
pub struct ChainLink {
    /// Its backup.
    pub backup: BackupId,
    /// The file.
    pub path: PathBuf,
    /// Its BLAKE3 according to the manifest.
    pub digest: String,
    /// Its bytes according to the manifest.
    pub file_bytes: u64,
    /// Opened, header checked.
    pub image: Qcow2Image,
}

impl ChainLink {
    /// Reads the whole file and compares. `seen` hears of every file that was read.
    pub fn check_digest(&self) -> Result<(), ImageError> {
        let file = File::open(&self.path).map_err(ImageError::io("open", &self.path))?;
        let (bytes, found) = digest(&file, &self.path)?;
        if bytes != self.file_bytes || found != self.digest {
            let detail = format!("its content changed since the backup (BLAKE3 {found}, expected {})", self.digest);
            return Err(ImageError::damaged(&self.path, detail));
        }
        Ok(())
    }
}

/// The images that make up a volume of a backup, newest first. Everything but the content is checked: every link is
/// there, has its size, is the image that its manifest describes, and stands on the one that its manifest names.
pub fn volume_chain(
    directory: &ChainDirectory,
    manifest: &Manifest,
    volume: &str,
) -> Result<Vec<ChainLink>, ImageError> {
    let mut links = Vec::new();
    let mut seen = HashSet::new();
    let mut current = manifest.clone();
    loop {
        let backup = directory.backup_path(&current.backup.vm, &current.backup.id);
        let entry = current.volume(volume).ok_or_else(|| ImageError::NotFound {
            what: format!("volume `{volume}`"),
            path: backup.clone(),
            known: current.volumes.iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>().join(", "),
        })?;
        let path = backup.join(&entry.file);
        if !seen.insert(current.backup.id.clone()) {
            return Err(ImageError::damaged(path, "its chain runs in a circle"));
        }
        let image = Qcow2Image::open(&path)?;
        let expected = entry.parent.as_ref().map(|parent| PartialBackup::backing_name(parent, &entry.file));
        let size = path.metadata().map_err(ImageError::io("open", &path))?.len();
        if size != entry.file_bytes {
            let detail = format!("it has {size} bytes, its manifest says {}", entry.file_bytes);
            return Err(ImageError::damaged(path, detail));
        }
        if image.virtual_size() != entry.virtual_size || image.backing() != expected.as_deref() {
            return Err(ImageError::damaged(path, "it is not the image that its manifest describes"));
        }
        let parent = entry.parent.clone();
        links.push(ChainLink {
            backup: current.backup.id.clone(),
            path: path.clone(),
            digest: entry.digest.clone(),
            file_bytes: entry.file_bytes,
            image,
        });
        let Some(parent) = parent else { return Ok(links) };
        current = directory
            .manifest(&current.backup.vm, &parent)?
            .ok_or_else(|| ImageError::damaged(path, format!("the backup {parent} that it builds on is missing")))?;
    }
}

/// The result for one backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifiedBackup {
    /// The backup.
    pub id: BackupId,
    /// What is wrong, per volume; empty: everything is as it was written.
    pub problems: Vec<String>,
}

/// Checks all volumes of a backup down to their full images. Files in `known_good` were read before and are not read
/// again; `on_file` is called for each that is read, with its bytes.
#[allow(clippy::implicit_hasher, reason = "one caller, one set")]
pub fn verify_backup(
    directory: &ChainDirectory,
    manifest: &Manifest,
    known_good: &mut HashSet<PathBuf>,
    mut on_file: impl FnMut(&ChainLink),
) -> VerifiedBackup {
    let mut problems = Vec::new();
    for volume in &manifest.volumes {
        let result = volume_chain(directory, manifest, &volume.name).and_then(|links| {
            for link in links {
                if !known_good.contains(&link.path) {
                    on_file(&link);
                    link.check_digest()?;
                    known_good.insert(link.path);
                }
            }
            Ok(())
        });
        if let Err(error) = result {
            problems.push(format!("volume `{}`: {}", volume.name, chain_of_causes(&error)));
        }
    }
    VerifiedBackup { id: manifest.backup.id.clone(), problems }
}

fn chain_of_causes(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain_of_causes(source)),
        None => error.to_string(),
    }
}
