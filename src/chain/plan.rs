//! Full or incremental, per volume.

use super::bitmap::{BitmapName, GRANULARITY, ObservedBitmap, last_granule};
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
    /// The disk is smaller than it was, or was so for some time.
    #[error("the disk was made smaller since the newest backup")]
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
        /// From the last granule of the disk as it was to its end, read in any case: a block device may hold anything
        /// in what it grew by, and what was cut off and grown back within that granule is in no bitmap.
        tail: Option<ByteRange>,
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
    let find = |name: String| observed.iter().find(|b| b.name.as_deref() == Some(&name));
    let (Some(bitmap), Some(mark)) = (find(name.to_string()), find(name.end_mark())) else {
        return full(FullReason::BitmapMissing);
    };
    if bitmap.inconsistent || mark.inconsistent {
        full(FullReason::BitmapInconsistent)
    } else if bitmap.busy {
        full(FullReason::BitmapBusy)
    } else if !bitmap.recording {
        full(FullReason::BitmapDisabled)
    } else if bitmap.granularity != GRANULARITY {
        full(FullReason::BitmapGranularity)
    } else if virtual_size < parent.virtual_size || mark.count == 0 || mark.recording {
        full(FullReason::Shrunk)
    } else {
        let from = last_granule(parent.virtual_size).map_or(0, ByteRange::start);
        let tail = ByteRange::new(from, virtual_size);
        VolumePlan::Incremental { parent: parent.backup.clone(), bitmap: name, tail }
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
            count: 0,
            granularity: GRANULARITY,
            recording: true,
            busy: false,
            persistent: false,
            inconsistent: false,
        }
    }

    fn mark() -> ObservedBitmap {
        let name = BitmapName::new(LINE, "1").end_mark();
        ObservedBitmap { name: Some(name), count: u64::from(GRANULARITY), recording: false, ..good() }
    }

    fn parent() -> ParentVolume {
        ParentVolume { backup: "1".into(), virtual_size: 10 * MIB, usable: true }
    }

    fn plan(size: u64, observed: &[ObservedBitmap]) -> VolumePlan {
        plan_volume(BackupType::Auto, LINE, true, Some(&parent()), size, observed)
    }

    #[test]
    fn a_recording_bitmap_of_the_newest_backup_allows_an_incremental() {
        let tail = ByteRange::new(10 * MIB - u64::from(GRANULARITY), 10 * MIB);
        let expected = VolumePlan::Incremental { parent: "1".into(), bitmap: BitmapName::new(LINE, "1"), tail };
        assert_eq!(plan(10 * MIB, &[good(), mark()]), expected);
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
            assert_eq!(plan(10 * MIB, &[bitmap, mark()]), VolumePlan::Full { reason });
        }
        assert_eq!(plan(10 * MIB, &[]), VolumePlan::Full { reason: FullReason::BitmapMissing });
    }

    #[test]
    fn a_grown_disk_reads_its_tail_and_a_shrunk_one_everything() {
        let observed = [good(), mark()];
        let VolumePlan::Incremental { tail, .. } = plan(12 * MIB, &observed) else { panic!("not incremental") };
        assert_eq!(tail, ByteRange::new(10 * MIB - u64::from(GRANULARITY), 12 * MIB));
        assert_eq!(plan(9 * MIB, &observed), VolumePlan::Full { reason: FullReason::Shrunk });
    }

    #[test]
    fn a_disk_without_a_whole_end_mark_is_read_as_a_whole() {
        let cases = [
            (FullReason::Shrunk, vec![good(), ObservedBitmap { count: 0, ..mark() }]),
            (FullReason::Shrunk, vec![good(), ObservedBitmap { recording: true, ..mark() }]),
            (FullReason::BitmapInconsistent, vec![good(), ObservedBitmap { inconsistent: true, ..mark() }]),
            (FullReason::BitmapMissing, vec![good()]),
            (FullReason::BitmapMissing, vec![mark()]),
        ];
        for (reason, observed) in cases {
            for size in [10 * MIB, 12 * MIB] {
                assert_eq!(plan(size, &observed), VolumePlan::Full { reason }, "{observed:?}");
            }
        }
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
