//! What a backup is: a JSON document beside its images. `docs/qcow2-chain.md` describes it for others.

use super::ImageError;
use crate::backup::{BackupId, BackupRecord};
use serde::{Deserialize, Serialize};

/// Version of the manifest that is written.
pub const FORMAT_VERSION: u32 = 1;

/// A complete backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// What it is.
    #[serde(flatten)]
    pub backup: BackupRecord,
    /// The volumes.
    pub volumes: Vec<ManifestVolume>,
}

/// A volume of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestVolume {
    /// Name.
    pub name: String,
    /// File beside the manifest.
    pub file: String,
    /// The backup whose image of this volume is below this one; none: this image is a full one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// Why the volume was read as a whole: a stable word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_reason: Option<String>,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// `raw` or `qcow2`: what the VM has.
    pub source_format: String,
    /// The dirty bitmap that records since this backup.
    pub bitmap: String,
    /// BLAKE3 of the file, 64 hex digits.
    pub digest: String,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes that counted as changed.
    pub dirty_bytes: u64,
    /// Bytes read from the snapshot.
    pub read_bytes: u64,
    /// Bytes stored as data, before compression.
    pub data_bytes: u64,
    /// Bytes found or declared to be zero.
    pub zero_bytes: u64,
}

impl Manifest {
    /// Reads a manifest.
    pub fn parse(bytes: &[u8], path: &std::path::Path) -> Result<Self, ImageError> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let broken = |error: serde_json::Error| ImageError::damaged(path, error.to_string());
        let version: Version = serde_json::from_slice(bytes).map_err(broken)?;
        if version.format_version > FORMAT_VERSION {
            return Err(ImageError::TooNew {
                path: path.to_owned(),
                found: version.format_version,
                known: FORMAT_VERSION,
            });
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(broken)?;
        // Names become paths: nothing in a manifest may leave its directory.
        let plain = |name: &str| super::directory::check_name("volume", name).is_ok();
        match manifest.volumes.iter().find(|volume| !plain(&volume.name) || !plain(&volume.file)) {
            Some(volume) => Err(ImageError::damaged(path, format!("`{}` is no name of a file", volume.file))),
            None => Ok(manifest),
        }
    }

    /// The volume with this name.
    pub fn volume(&self, name: &str) -> Option<&ManifestVolume> {
        self.volumes.iter().find(|volume| volume.name == name)
    }
}
