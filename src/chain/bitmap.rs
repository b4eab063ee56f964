//! Names of our dirty bitmaps, and what to do with those that an earlier run left.

use crate::extent::ByteRange;
use std::fmt;

/// Bytes that one bit of our bitmaps covers. Equal to the smallest copy-before-write cluster, which makes the
/// broken-snapshot detector exact: both count in the same units.
pub const GRANULARITY: u32 = 64 * 1024;

/// What the names of end marks begin with. No line is called so: lines are hexadecimal.
const END_MARK: &str = "vf-end-";

/// The name of one of our bitmaps: `vf-<line>-<backup id>`.
///
/// The *line* is a random word of the chain's directory: chains of one VM in several directories keep their bitmaps
/// apart by it. The backup id holds random digits, so a bitmap with this name in a running QEMU proves that it has
/// recorded without a gap since that backup: a transient bitmap dies with its QEMU process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BitmapName {
    line: String,
    backup: String,
}

impl BitmapName {
    /// The bitmap that records since `backup`, for the chain with this line (8 hex digits).
    pub fn new(line: &str, backup: &str) -> Self {
        Self { line: line.to_owned(), backup: backup.to_owned() }
    }

    /// Reads a name; `None` if the bitmap is not ours.
    pub fn parse(name: &str) -> Option<Self> {
        let (line, backup) = name.strip_prefix("vf-")?.split_once('-')?;
        let is_line = line.len() == 8 && line.bytes().all(|b| b.is_ascii_hexdigit());
        (is_line && !backup.is_empty()).then(|| Self::new(line, backup))
    }

    /// The bitmap beside this one that tells whether the disk was ever smaller: `vf-end-<line>-<backup id>`.
    ///
    /// When a disk is made smaller QEMU cuts its bitmaps off and clears what it cuts, so that a disk which is then grown
    /// back has forgotten that its end became zeroes. This bitmap never records. Its one bit, the last, is set when it is
    /// made: once cleared, it stays cleared. A disk that lost less than that last granule keeps the bit, so the granule
    /// is read in any case.
    pub fn end_mark(&self) -> String {
        format!("{END_MARK}{}-{}", self.line, self.backup)
    }

    /// Reads the name of an end mark: whose it is. `None` if the bitmap is none of ours.
    pub fn parse_end_mark(name: &str) -> Option<Self> {
        Self::parse(&format!("vf-{}", name.strip_prefix(END_MARK)?))
    }

    /// The chain's line.
    pub fn line(&self) -> &str {
        &self.line
    }

    /// The backup since which the bitmap records.
    pub fn backup(&self) -> &str {
        &self.backup
    }
}

impl fmt::Display for BitmapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vf-{}-{}", self.line, self.backup)
    }
}

/// The bytes that the last bit of a bitmap stands for, on a disk of `size` bytes; `None`: the disk is empty.
pub fn last_granule(size: u64) -> Option<ByteRange> {
    let granule = u64::from(GRANULARITY);
    ByteRange::new(size.saturating_sub(1) / granule * granule, size)
}

/// A dirty bitmap as QEMU reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "these are QEMU's four flags of BlockDirtyInfo")]
pub struct ObservedBitmap {
    /// Name, `None` for anonymous bitmaps of block jobs.
    pub name: Option<String>,
    /// Dirty bytes.
    pub count: u64,
    /// Bytes a bit covers.
    pub granularity: u32,
    /// Records guest writes.
    pub recording: bool,
    /// Used by a job or an export.
    pub busy: bool,
    /// Stored in the image.
    pub persistent: bool,
    /// Loaded from an image that was not closed cleanly: worthless, can only be removed.
    pub inconsistent: bool,
}

/// One change to the bitmaps of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapAction {
    /// Give back what a failed run had taken: enable `into`, merge `from` into it, remove `from`. In one transaction
    /// and in this order: merging first would lose what the guest writes between the two.
    RollBack {
        /// Bitmap of the run that did not complete.
        from: String,
        /// Bitmap of the last backup that did.
        into: String,
    },
    /// Remove a bitmap that no backup will ask for again.
    Remove {
        /// Its name.
        name: String,
    },
}

/// What to do with the bitmaps of one line on one node so that only the one of `head` (the newest complete backup)
/// remains, recording everything that changed since.
///
/// `observed` are all bitmaps of the node; those of other lines and of other tools are never touched. A bitmap of a
/// run that did not complete is merged into the head's bitmap if that exists; without it, it is only removed, and the
/// next backup of this volume is a full one. Of the end marks that of the head remains.
pub fn settle(line: &str, head: Option<&str>, observed: &[ObservedBitmap]) -> Vec<BitmapAction> {
    let ours = || {
        observed.iter().filter_map(|bitmap| {
            let name = BitmapName::parse(bitmap.name.as_deref()?)?;
            (name.line() == line).then_some((name, bitmap))
        })
    };
    let marks = observed.iter().filter_map(|bitmap| {
        let name = bitmap.name.as_deref()?;
        let of = BitmapName::parse_end_mark(name)?;
        let stale = of.line() == line && (Some(of.backup()) != head || bitmap.inconsistent);
        stale.then(|| BitmapAction::Remove { name: name.to_owned() })
    });
    let head_bitmap = ours().find(|(name, bitmap)| Some(name.backup()) == head && !bitmap.inconsistent);
    ours()
        .filter(|(name, bitmap)| Some(name.backup()) != head || bitmap.inconsistent)
        .map(|(name, bitmap)| match &head_bitmap {
            // A disabled head beside a recording bitmap: the recording one was started by a run that did not complete.
            // Not told apart by the time in the id, which a clock that jumps would make a lie. Bitmaps that do not
            // record are older than the head and hold nothing that it lacks.
            Some((into, head_state)) if !bitmap.inconsistent && bitmap.recording && !head_state.recording => {
                BitmapAction::RollBack { from: name.to_string(), into: into.to_string() }
            }
            _ => BitmapAction::Remove { name: name.to_string() },
        })
        .chain(marks)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "0123abcd";

    fn bitmap(backup: &str, recording: bool) -> ObservedBitmap {
        ObservedBitmap {
            name: Some(BitmapName::new(LINE, backup).to_string()),
            count: 0,
            granularity: GRANULARITY,
            recording,
            busy: false,
            persistent: false,
            inconsistent: false,
        }
    }

    #[test]
    fn names_read_back_and_foreign_names_do_not() {
        let name = BitmapName::new(LINE, "20261125T010203Z-00ff00ff");
        assert_eq!(BitmapName::parse(&name.to_string()), Some(name));
        for foreign in ["qmpbackup-1", "vf-", "vf-0123abcd", "vf-0123abcd-", "vf-nothex!!-x", "libvirt-tmp"] {
            assert_eq!(BitmapName::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_run_that_did_not_complete_is_merged_back() {
        let actions = settle(LINE, Some("1"), &[bitmap("1", false), bitmap("2", true)]);
        let name = |backup| BitmapName::new(LINE, backup).to_string();
        assert_eq!(actions, [BitmapAction::RollBack { from: name("2"), into: name("1") }]);
    }

    #[test]
    fn a_commit_that_was_cut_short_is_finished() {
        let actions = settle(LINE, Some("2"), &[bitmap("1", false), bitmap("2", true)]);
        assert_eq!(actions, [BitmapAction::Remove { name: BitmapName::new(LINE, "1").to_string() }]);
    }

    #[test]
    fn without_a_complete_backup_nothing_is_worth_keeping() {
        let actions = settle(LINE, None, &[bitmap("2", true)]);
        assert_eq!(actions, [BitmapAction::Remove { name: BitmapName::new(LINE, "2").to_string() }]);
    }

    #[test]
    fn an_inconsistent_head_is_removed_and_nothing_is_merged_into_it() {
        let mut head = bitmap("1", false);
        head.inconsistent = true;
        let actions = settle(LINE, Some("1"), &[head, bitmap("2", true)]);
        let name = |backup| BitmapName::new(LINE, backup).to_string();
        assert_eq!(actions, [BitmapAction::Remove { name: name("1") }, BitmapAction::Remove { name: name("2") }]);
    }

    #[test]
    fn the_end_mark_of_the_head_stays_and_others_go() {
        let mark = |line: &str, backup| ObservedBitmap {
            name: Some(BitmapName::new(line, backup).end_mark()),
            ..bitmap(backup, false)
        };
        let observed = [mark(LINE, "1"), bitmap("1", false), bitmap("2", true), mark(LINE, "2"), mark("ffffffff", "2")];
        let name = |backup| BitmapName::new(LINE, backup);
        let removed = BitmapAction::Remove { name: name("2").end_mark() };
        let rolled_back = BitmapAction::RollBack { from: name("2").to_string(), into: name("1").to_string() };
        assert_eq!(settle(LINE, Some("1"), &observed), [rolled_back, removed]);
        let worthless = ObservedBitmap { inconsistent: true, ..mark(LINE, "1") };
        let removed = BitmapAction::Remove { name: name("1").end_mark() };
        assert_eq!(settle(LINE, Some("1"), &[bitmap("1", true), worthless]), [removed]);
    }

    #[test]
    fn an_end_mark_is_no_bitmap_that_records_and_reads_back() {
        let name = BitmapName::new(LINE, "20261125T010203Z-00ff00ff");
        assert_eq!(BitmapName::parse_end_mark(&name.end_mark()), Some(name.clone()));
        assert_eq!(BitmapName::parse(&name.end_mark()), None);
        assert_eq!(BitmapName::parse_end_mark(&name.to_string()), None);
    }

    #[test]
    fn the_last_granule_ends_with_the_disk() {
        let granule = u64::from(GRANULARITY);
        for (size, start) in [(granule, 0), (granule + 512, granule), (3 * granule, 2 * granule), (512, 0)] {
            assert_eq!(last_granule(size), ByteRange::new(start, size));
        }
        assert_eq!(last_granule(0), None);
    }

    #[test]
    fn other_lines_and_other_tools_are_left_alone() {
        let mut other = bitmap("1", true);
        other.name = Some(BitmapName::new("ffffffff", "1").to_string());
        let mut foreign = bitmap("1", true);
        foreign.name = Some("backup-xyz".into());
        let mut anonymous = bitmap("1", true);
        anonymous.name = None;
        assert_eq!(settle(LINE, None, &[other, foreign, anonymous]), []);
    }
}
