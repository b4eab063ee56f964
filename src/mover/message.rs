//! What driver and mover say to each other, in one backup.
//!
//! `Hello` → `Opened`, `Begin` → `Begun`, then per volume `Read` → `Progress` … `VolumeDone`, and at the end `Commit` →
//! `Committed`. `Failed` answers anything, and is the mover's last word. A connection that ends before `Commit` was sent
//! means that the backup is given up.

use crate::{
    backup::{BackupId, BackupRecord},
    chain::FullReason,
    extent::ByteRange,
};
use serde::{Deserialize, Serialize};

/// Version of the protocol. Both sides come from one binary as a rule; during an upgrade they may differ, and then do
/// not speak to each other.
pub const PROTOCOL: u32 = 1;

/// From the driver.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToMover {
    /// The first message.
    Hello {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Name of the VM at the target.
        vm: String,
    },
    /// A backup begins.
    Begin {
        /// Its id.
        backup: BackupId,
        /// Its volumes.
        volumes: Vec<PlannedVolume>,
    },
    /// Read a volume. A connection to QEMU's NBD server comes with it, unless the volume is the mover's own.
    Read(ReadOrder),
    /// Everything was read and the snapshot is proved unbroken: make the backup complete.
    Commit {
        /// What it is.
        record: Box<BackupRecord>,
    },
}

/// How to read a volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReadOrder {
    /// Index among the volumes of `Begin`.
    pub volume: usize,
    /// Name of the NBD export; none: the volume is one that the mover has mounted, of a stopped VM.
    pub export: Option<String>,
    /// Bitmap that says what changed; none: everything is read.
    pub bitmap: Option<String>,
    /// First byte and first byte behind what is read in any case.
    pub always: Option<(u64, u64)>,
    /// Most bytes that may be outstanding: what the send buffer of QEMU's end takes.
    pub credit: u64,
    /// Discard what was read: see [`super::PullRequest`].
    pub discard: bool,
}

/// A volume of a backup to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedVolume {
    /// Its name.
    pub name: String,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// `raw` or `qcow2`: what the VM has.
    pub source_format: String,
    /// The dirty bitmap that records from this backup on; empty for a stopped VM.
    pub bitmap: String,
    /// The backup since which the dirty bitmap told the changes; none: it is read as a whole.
    pub parent: Option<BackupId>,
    /// Why it is read as a whole.
    pub full_reason: Option<FullReason>,
}

/// From the mover.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromMover {
    /// The target is open.
    Opened {
        /// [`PROTOCOL`].
        protocol: u32,
        /// The newest backup of the VM there.
        parent: Option<Parent>,
        /// The disks that the mover has mounted, of a stopped VM: name and size in bytes.
        offline: Vec<(String, u64)>,
    },
    /// It takes the backup.
    Begun {
        /// Address of the target: a directory, or the address of a repository.
        address: String,
        /// In a repository: the object whose presence says that the backup is complete.
        object: Option<String>,
    },
    /// How far a volume is.
    Progress {
        /// Its index.
        volume: usize,
        /// Bytes read.
        read: u64,
        /// Bytes to read in all; 0 until known.
        total: u64,
    },
    /// A volume was read, and is durable.
    VolumeDone {
        /// Its index.
        volume: usize,
        /// What was made of it.
        summary: VolumeSummary,
    },
    /// The backup is complete and durable.
    Committed {
        /// Its manifest, as the target has it.
        manifest: serde_json::Value,
        /// It is in a repository.
        repository: bool,
    },
    /// The mover gives up.
    Failed(MoverFailure),
}

/// What was read and stored of a volume, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSummary {
    /// What counted as changed.
    pub dirty_bytes: u64,
    /// What was read.
    pub read_bytes: u64,
    /// Data that the target did not have.
    pub new_bytes: u64,
    /// What was stored for it.
    pub stored_bytes: u64,
}

/// Why a mover gave up, in a form that crosses the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct MoverFailure {
    /// Stable word.
    pub reason: String,
    /// For people.
    pub message: String,
    /// What caused it.
    #[source]
    pub cause: Option<Box<Cause>>,
    /// Another attempt may succeed.
    pub retryable: bool,
    /// Exit code of a command that fails for it.
    pub exit_code: u8,
}

/// A cause of a failure, and its own cause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Cause {
    /// For people.
    pub message: String,
    /// What caused it.
    #[source]
    pub cause: Option<Box<Cause>>,
}

impl Cause {
    /// The cause of an error, with all that is behind it.
    pub fn of(error: &dyn std::error::Error) -> Option<Box<Self>> {
        let source = error.source()?;
        Some(Box::new(Self { message: source.to_string(), cause: Self::of(source) }))
    }
}

impl MoverFailure {
    /// The whole chain in one line.
    pub fn text(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = self.cause.as_ref();
        while let Some(next) = cause {
            text = format!("{text}: {}", next.message);
            cause = next.cause.as_ref();
        }
        text
    }
}

/// The newest backup of the VM at a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its id.
    pub id: BackupId,
    /// Its number.
    pub sequence: u64,
    /// Line of the dirty bitmaps.
    pub bitmap_line: String,
    /// UUID of the VM that it is of.
    pub vm_uuid: Option<String>,
    /// Its volumes.
    pub volumes: Vec<ParentVolume>,
}

/// A volume of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentVolume {
    /// Its name.
    pub name: String,
    /// Bytes of the disk then.
    pub virtual_size: u64,
    /// Whether an incremental backup can stand on it.
    pub usable: bool,
}

impl Parent {
    /// The volume with this name.
    pub fn volume(&self, name: &str) -> Option<&ParentVolume> {
        self.volumes.iter().find(|volume| volume.name == name)
    }
}

impl ReadOrder {
    /// What is read in any case.
    pub fn always(&self) -> Option<ByteRange> {
        self.always.and_then(|(start, end)| ByteRange::new(start, end))
    }
}
