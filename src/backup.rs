//! What every backup says about itself, wherever it is stored.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Id of a backup: `YYYYMMDDTHHMMSSZ-xxxxxxxx`, when it began (UTC) and eight random hex digits. A file name, sorted by
/// time for people; nothing relies on the clock.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId(String);

/// A text that is no backup id.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no backup id; they look like 20261125T010203Z-00ff00ff")]
pub struct BadBackupId(String);

impl BackupId {
    /// A new id. Fails when the system gives no randomness.
    pub fn generate() -> std::io::Result<Self> {
        let random = getrandom::u32().map_err(std::io::Error::other)?;
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
    type Err = BadBackupId;

    fn from_str(text: &str) -> Result<Self, BadBackupId> {
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
        if is_id { Ok(Self(text.to_owned())) } else { Err(BadBackupId(text.to_owned())) }
    }
}

impl TryFrom<String> for BackupId {
    type Error = BadBackupId;

    fn try_from(text: String) -> Result<Self, BadBackupId> {
        text.parse()
    }
}

impl From<BackupId> for String {
    fn from(id: BackupId) -> Self {
        id.0
    }
}

/// The part of a manifest that does not depend on where the data is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupRecord {
    /// Id of the backup.
    pub id: BackupId,
    /// Name of the VM at this target.
    pub vm: String,
    /// The VM's UUID, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_uuid: Option<String>,
    /// The backup before this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// Number of this backup among those of the VM, from 1.
    pub sequence: u64,
    /// Line of the dirty bitmaps: eight hex digits, the same for all backups of the VM at this target.
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
    /// Devices that were not backed up.
    #[serde(default)]
    pub skipped: Vec<SkippedVolume>,
    /// Version of the program.
    pub tool_version: String,
    /// What the VM was defined by, and the names of what that needs: of a KubeVirt VM, the object itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definition: Option<serde_json::Value>,
}

/// A device that was not backed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedVolume {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
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
