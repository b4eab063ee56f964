//! Errors of a fleecing session.

use crate::{
    qmp::QmpError,
    reason::{Reason, Retry},
};
use std::{io, path::PathBuf, time::Duration};

/// Why a session could not be run, or was given up. The guest is safe in every case.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The monitor failed, or QEMU refused a command.
    #[error("{attempt} failed")]
    Qmp {
        /// What was attempted.
        attempt: String,
        /// What the monitor said.
        #[source]
        source: QmpError,
    },
    /// The fleece directory is unusable.
    #[error("fleece directory {path} cannot be used")]
    FleeceDirectory {
        /// The directory or a file in it.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no space for a fleece.
    #[error(
        "not enough space for the fleece in {path}: {available} bytes are free; free some, or name another --fleece-dir"
    )]
    NoFleeceSpace {
        /// The directory.
        path: PathBuf,
        /// Free bytes.
        available: u64,
    },
    /// A file or descriptor of ours failed.
    #[error("{attempt} failed")]
    Local {
        /// What was attempted.
        attempt: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another session of this VM runs.
    #[error("another backup of VM {vm} is running{holder}; wait for it, or cancel it there")]
    Busy {
        /// The VM.
        vm: String,
        /// ` (…)`: who, when known.
        holder: String,
    },
    /// The VM is in a state that has no backup.
    #[error("VM is in state `{state}`, which cannot be backed up")]
    VmState {
        /// QEMU's run state.
        state: String,
    },
    /// Two volumes have one name.
    #[error("two disks have the name `{name}` ({first} and {second}); give the devices different ids")]
    VolumeNameClash {
        /// The name.
        name: String,
        /// First device.
        first: String,
        /// Second device.
        second: String,
    },
    /// A volume was named that does not exist.
    #[error("there is no volume `{name}`; this VM has: {known}")]
    UnknownVolume {
        /// The name.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// No disk is left.
    #[error("no disk is left to back up ({skipped})")]
    NoVolumes {
        /// Why each device was skipped.
        skipped: String,
    },
    /// The wanted engine does not run on this QEMU.
    #[error("engine `{engine}` does not run on this QEMU: {why}")]
    EngineUnavailable {
        /// The engine.
        engine: &'static str,
        /// Why.
        why: String,
    },
    /// Every volume had to be incremental, and one cannot be.
    #[error("volume `{volume}` cannot be backed up incrementally: {reason}; use --type auto to back it up as a whole")]
    NotIncremental {
        /// The volume.
        volume: String,
        /// Why.
        reason: String,
    },
    /// The file systems had to be frozen, and could not be.
    #[error("the guest's file systems could not be frozen: {detail}")]
    Quiesce {
        /// Why.
        detail: String,
    },
    /// The fleece took all the space that it may.
    #[error(
        "the fleece reached its limit of {limit} bytes: the guest overwrote too much while the backup ran; give it more space (--fleece-dir, --fleece-limit) or back up at a quieter time"
    )]
    FleeceFull {
        /// The limit in bytes.
        limit: u64,
    },
    /// Others took the space that the fleece was to grow into, where a full fleece hits the guest.
    #[error(
        "only {available} bytes are left for the fleece, since others write to its file system: free some, or name another --fleece-dir"
    )]
    FleeceSqueezed {
        /// Free bytes.
        available: u64,
    },
    /// Old data could not be kept: what would be read is no longer the point in time.
    #[error("the snapshot of volume `{volume}` is broken: {detail}")]
    SnapshotBroken {
        /// The volume.
        volume: String,
        /// What was seen.
        detail: String,
    },
    /// The disk has another size than it was planned with, or was smaller for a moment and its bitmap forgot that part.
    #[error("volume `{volume}` was resized while the backup was prepared; try again")]
    Resized {
        /// The volume.
        volume: String,
    },
    /// A job of ours ended behind our back.
    #[error("job {job} of volume `{volume}` ended early: {detail}")]
    JobLost {
        /// The volume.
        volume: String,
        /// The job.
        job: String,
        /// Its state or error.
        detail: String,
    },
    /// QEMU did not come to an end with a job or export.
    #[error("QEMU did not finish {what} within {limit:?}")]
    Stuck {
        /// What.
        what: String,
        /// The limit.
        limit: Duration,
    },
    /// Something of ours is still in QEMU.
    #[error("could not remove everything from the VM: {left}; run `virt-fleece recover` with the same options")]
    LeftBehind {
        /// What is left.
        left: String,
    },
}

impl SessionError {
    /// For `map_err`: the attempt that the monitor error ended.
    pub fn qmp(attempt: impl Into<String>) -> impl FnOnce(QmpError) -> Self {
        let attempt = attempt.into();
        move |source| Self::Qmp { attempt, source }
    }

    /// For `map_err`: the attempt that the system error ended.
    pub fn local(attempt: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let attempt = attempt.into();
        move |source| Self::Local { attempt, source }
    }
}

impl Reason for SessionError {
    fn reason(&self) -> &str {
        match self {
            Self::Qmp { source, .. } => source.reason(),
            Self::FleeceDirectory { .. } => "FleeceDirectoryUnusable",
            Self::NoFleeceSpace { .. } => "NoFleeceSpace",
            Self::Local { .. } => "LocalError",
            Self::Busy { .. } => "Busy",
            Self::VmState { .. } => "VmState",
            Self::VolumeNameClash { .. } => "VolumeNameClash",
            Self::UnknownVolume { .. } => "UnknownVolume",
            Self::NoVolumes { .. } => "NoVolumes",
            Self::EngineUnavailable { .. } => "EngineUnavailable",
            Self::NotIncremental { .. } => "NotIncremental",
            Self::Quiesce { .. } => "QuiesceFailed",
            Self::FleeceFull { .. } | Self::FleeceSqueezed { .. } => "FleeceFull",
            Self::SnapshotBroken { .. } => "SnapshotBroken",
            Self::Resized { .. } => "DiskResized",
            Self::JobLost { .. } => "JobLost",
            Self::Stuck { .. } => "QemuStuck",
            Self::LeftBehind { .. } => "LeftBehind",
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Qmp { source, .. } => source.retry(),
            Self::Busy { .. }
            | Self::Quiesce { .. }
            | Self::FleeceFull { .. }
            | Self::FleeceSqueezed { .. }
            | Self::SnapshotBroken { .. }
            | Self::Resized { .. } => Retry::Backoff,
            _ => Retry::Terminal,
        }
    }
}
