//! How far a run is, for whoever shows it.

use crate::{
    backup::{BackupId, SkippedVolume},
    fleecing::Cut,
    mover::{PlannedVolume, VolumeSummary},
};

/// How far a run is.
#[derive(Debug, Clone, Default)]
pub struct RunStatus {
    /// In one word.
    pub state: RunState,
    /// `job`, `filter` or `offline`, and why.
    pub engine: Option<(String, String)>,
    /// Version of the QEMU that runs the VM.
    pub qemu_version: Option<String>,
    /// Id of the backup to be.
    pub backup: Option<BackupId>,
    /// The backup that it stands on.
    pub parent: Option<BackupId>,
    /// Its number.
    pub sequence: u64,
    /// Line of the dirty bitmaps.
    pub bitmap_line: String,
    /// The volumes.
    pub volumes: Vec<VolumeStatus>,
    /// What is not backed up.
    pub skipped: Vec<SkippedVolume>,
    /// The point in time, once it is made.
    pub cut: Option<Cut>,
}

/// How far a run is, in one word.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RunState {
    /// Nothing is in the way of the VM yet.
    #[default]
    Preparing,
    /// The point in time is made, and is being read.
    Reading,
    /// Everything was read, and nothing is left in the VM but bitmaps; the target is making it durable.
    Committing,
}

/// How far a volume is.
#[derive(Debug, Clone)]
pub struct VolumeStatus {
    /// What is done with it.
    pub plan: PlannedVolume,
    /// Bytes read.
    pub read: u64,
    /// Bytes to read in all; 0 until known.
    pub total: u64,
    /// What was made of it, once it is done.
    pub summary: Option<VolumeSummary>,
}

impl RunStatus {
    /// Percent of the bytes to read that were read; none until that is known.
    pub fn percent(&self) -> Option<u64> {
        if self.volumes.iter().any(|volume| volume.total == 0 && volume.summary.is_none()) {
            return None;
        }
        let (read, total) = self.bytes();
        Some((read.min(total) * 100).checked_div(total).unwrap_or(100))
    }

    /// Bytes read, and to read.
    pub fn bytes(&self) -> (u64, u64) {
        self.volumes.iter().fold((0, 0), |(read, total), volume| (read + volume.read, total + volume.total))
    }
}
