//! What a backup is: a JSON document beside its images. `docs/qcow2-chain.md` describes it for others.

use super::ImageError;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Version of the manifest that is written.
pub const FORMAT_VERSION: u32 = 1;

/// Id of a backup: `YYYYMMDDTHHMMSSZ-xxxxxxxx`, when it began (UTC) and eight random hex digits. A file name, sorted by
/// time for people; nothing relies on the clock.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId(String);

impl BackupId {
    /// A new id.
    pub fn generate() -> Result<Self, ImageError> {
        let random = getrandom::u32()
            .map_err(|error| ImageError::io("take randomness from", "the system")(std::io::Error::other(error)))?;
        Ok(Self(format!("{}-{random:08x}", Timestamp::now().strftime("%Y%m%dT%H%M%SZ"))))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for BackupId {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let shape: String = text
            .chars()
            .map(|c| match c {
                '0'..='9' => '0',
                'a'..='f' => 'a',
                other => other,
            })
            .collect();
        let is_id = text.len() == 25
            && shape.starts_with("00000000T000000Z-")
            && shape[17..].bytes().all(|b| b == b'0' || b == b'a');
        if is_id {
            Ok(Self(text.to_owned()))
        } else {
            Err(ImageError::BadName { what: "backup id", name: text.into() })
        }
    }
}

impl TryFrom<String> for BackupId {
    type Error = ImageError;

    fn try_from(text: String) -> Result<Self, ImageError> {
        text.parse()
    }
}

impl From<BackupId> for String {
    fn from(id: BackupId) -> Self {
        id.0
    }
}

/// A complete backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Id of the backup.
    pub id: BackupId,
    /// Name of the VM in this directory.
    pub vm: String,
    /// The VM's UUID, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_uuid: Option<String>,
    /// The backup before this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// Number of this backup among those of the VM, from 1.
    pub sequence: u64,
    /// Line of the dirty bitmaps: eight hex digits, the same for all backups of the VM in this directory.
    pub bitmap_line: String,
    /// The instant from which all volumes are.
    pub point_in_time: Timestamp,
    /// When the run began.
    pub started: Timestamp,
    /// When the data was complete.
    pub finished: Timestamp,
    /// `job` or `filter`.
    pub engine: String,
    /// `pull`.
    pub transfer: String,
    /// Version of the QEMU that ran the VM.
    pub qemu_version: String,
    /// How long QEMU took to make the point in time, in microseconds.
    pub cut_microseconds: u64,
    /// `frozen` (with the number of file systems and the microseconds), or `not_frozen` and why.
    pub quiesce: serde_json::Value,
    /// The volumes.
    pub volumes: Vec<ManifestVolume>,
    /// Devices that were not backed up.
    #[serde(default)]
    pub skipped: Vec<SkippedVolume>,
    /// Version of the program.
    pub tool_version: String,
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

/// A device that was not backed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedVolume {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_back_and_nothing_else_does() {
        let id = BackupId::generate().unwrap();
        assert_eq!(id.as_str().parse::<BackupId>().unwrap(), id);
        for bad in ["", "latest", "../x", "20261125T010203Z-00ff00fg", "20261125T010203Z-00ff00ff/"] {
            assert!(bad.parse::<BackupId>().is_err(), "{bad}");
        }
    }
}
