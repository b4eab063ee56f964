//! Full or incremental, per volume.

use super::bitmap::{BitmapName, GRANULARITY, ObservedBitmap};
use crate::extent::ByteRange;
use serde::{Deserialize, Serialize};

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupType {
    /// Incremental where it is safe, full for every volume where it is not, with the reason on record.
    #[default]
    Auto,
    /// Everything is read and stored.
    Full,
    /// Incremental for every volume, or no backup at all.
    Incremental,
}

/// Why a volume is read as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum FullReason {
    /// The user asked for it.
    #[error("a full backup was requested")]
    Requested,
    /// There is no complete backup of this VM yet.
    #[error("there is no earlier backup of this VM")]
    FirstBackup,
    /// The newest backup does not have this volume (new disk, or excluded then).
    #[error("the newest backup does not have this volume")]
    NotInParent,
    /// The bitmap that recorded since the newest backup is gone. Absent never means "nothing changed".
    #[error(
        "the dirty bitmap is gone: QEMU was restarted or the VM migrated since the newest backup, or somebody removed it"
    )]
    BitmapMissing,
    /// QEMU was killed while the bitmap was in use.
    #[error("the dirty bitmap is inconsistent: QEMU was not shut down cleanly")]
    BitmapInconsistent,
    /// The bitmap did not record for some time.
    #[error("the dirty bitmap was disabled, so it may have missed writes")]
    BitmapDisabled,
    /// Somebody else uses the bitmap.
    #[error("the dirty bitmap is in use by another job or export")]
    BitmapBusy,
    /// The bitmap is not one that we made.
    #[error("the dirty bitmap has an unexpected granularity")]
    BitmapGranularity,
    /// The image that an incremental one would stand on is missing or damaged.
    #[error("the newest backup of this volume is missing or damaged")]
    ParentUnusable,
    /// The disk is smaller than it was.
    #[error("the disk is smaller than in the newest backup")]
    Shrunk,
    /// Nothing records the changes of a VM that does not run.
    #[error("the VM is stopped, so there is no dirty bitmap")]
    Stopped,
}

impl FullReason {
    /// Stable CamelCase word.
    pub fn word(self) -> String {
        format!("{self:?}")
    }
}

/// The volume in the newest complete backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentVolume {
    /// Id of that backup.
    pub backup: String,
    /// Size of the disk then, in bytes.
    pub virtual_size: u64,
    /// Its image and all below it are there.
    pub usable: bool,
}

/// How a volume is backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumePlan {
    /// Everything is read.
    Full {
        /// Why.
        reason: FullReason,
    },
    /// What the bitmap says is read.
    Incremental {
        /// Id of the backup that this one builds on.
        parent: String,
        /// The bitmap that recorded since then.
        bitmap: BitmapName,
        /// What the disk grew by: read in any case, since a block device may hold anything there.
        grown: Option<ByteRange>,
    },
}

/// Decides how to back up one volume. `parent` is the volume in the newest complete backup of the VM, `any_backup`
/// whether there is one at all; `observed` are the bitmaps of its node after [`super::settle`].
pub fn plan_volume(
    requested: BackupType,
    line: &str,
    any_backup: bool,
    parent: Option<&ParentVolume>,
    virtual_size: u64,
    observed: &[ObservedBitmap],
) -> VolumePlan {
    let full = |reason| VolumePlan::Full { reason };
    if requested == BackupType::Full {
        return full(FullReason::Requested);
    }
    let Some(parent) = parent else {
        return full(if any_backup { FullReason::NotInParent } else { FullReason::FirstBackup });
    };
    if !parent.usable {
        return full(FullReason::ParentUnusable);
    }
    let name = BitmapName::new(line, &parent.backup);
    let wire_name = name.to_string();
    let Some(bitmap) = observed.iter().find(|b| b.name.as_deref() == Some(&wire_name)) else {
        return full(FullReason::BitmapMissing);
    };
    if bitmap.inconsistent {
        full(FullReason::BitmapInconsistent)
    } else if bitmap.busy {
        full(FullReason::BitmapBusy)
    } else if !bitmap.recording {
        full(FullReason::BitmapDisabled)
    } else if bitmap.granularity != GRANULARITY {
        full(FullReason::BitmapGranularity)
    } else if virtual_size < parent.virtual_size {
        full(FullReason::Shrunk)
    } else {
        // The cluster that held the old end is read as well: its rest was not part of the disk then.
        let old_end = parent.virtual_size / u64::from(GRANULARITY) * u64::from(GRANULARITY);
        let grown = if virtual_size > parent.virtual_size { ByteRange::new(old_end, virtual_size) } else { None };
        VolumePlan::Incremental { parent: parent.backup.clone(), bitmap: name, grown }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "0123abcd";
    const MIB: u64 = 1 << 20;

    fn good() -> ObservedBitmap {
        ObservedBitmap {
            name: Some(BitmapName::new(LINE, "1").to_string()),
            granularity: GRANULARITY,
            recording: true,
            busy: false,
            persistent: false,
            inconsistent: false,
        }
    }

    fn parent() -> ParentVolume {
        ParentVolume { backup: "1".into(), virtual_size: 10 * MIB, usable: true }
    }

    fn plan(size: u64, observed: &[ObservedBitmap]) -> VolumePlan {
        plan_volume(BackupType::Auto, LINE, true, Some(&parent()), size, observed)
    }

    #[test]
    fn a_recording_bitmap_of_the_newest_backup_allows_an_incremental() {
        let expected = VolumePlan::Incremental { parent: "1".into(), bitmap: BitmapName::new(LINE, "1"), grown: None };
        assert_eq!(plan(10 * MIB, &[good()]), expected);
    }

    #[test]
    fn every_doubt_about_the_bitmap_means_full() {
        let cases = [
            (FullReason::BitmapInconsistent, ObservedBitmap { inconsistent: true, ..good() }),
            (FullReason::BitmapBusy, ObservedBitmap { busy: true, ..good() }),
            (FullReason::BitmapDisabled, ObservedBitmap { recording: false, ..good() }),
            (FullReason::BitmapGranularity, ObservedBitmap { granularity: 4096, ..good() }),
            (FullReason::BitmapMissing, ObservedBitmap { name: Some("other".into()), ..good() }),
        ];
        for (reason, bitmap) in cases {
            assert_eq!(plan(10 * MIB, &[bitmap]), VolumePlan::Full { reason });
        }
        assert_eq!(plan(10 * MIB, &[]), VolumePlan::Full { reason: FullReason::BitmapMissing });
    }

    #[test]
    fn a_grown_disk_reads_its_tail_and_a_shrunk_one_everything() {
        let VolumePlan::Incremental { grown, .. } = plan(12 * MIB, &[good()]) else { panic!("not incremental") };
        assert_eq!(grown, ByteRange::new(10 * MIB, 12 * MIB));
        assert_eq!(plan(9 * MIB, &[good()]), VolumePlan::Full { reason: FullReason::Shrunk });
    }

    #[test]
    fn new_volumes_and_first_backups_are_full() {
        let with = |any| plan_volume(BackupType::Auto, LINE, any, None, MIB, &[good()]);
        assert_eq!(with(false), VolumePlan::Full { reason: FullReason::FirstBackup });
        assert_eq!(with(true), VolumePlan::Full { reason: FullReason::NotInParent });
        let requested = plan_volume(BackupType::Full, LINE, true, Some(&parent()), 10 * MIB, &[good()]);
        assert_eq!(requested, VolumePlan::Full { reason: FullReason::Requested });
    }
}
