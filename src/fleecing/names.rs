//! Names of everything that we create in a QEMU process.
//!
//! Node names are fixed per disk slot: a second session on the same VM fails inside QEMU with a duplicate name, so two
//! sessions can never mix, whatever process started them. QEMU allows 31 bytes for a node name, so nothing of the
//! user's goes into one. What has to be matched to one backup (jobs) carries the backup's id instead.

use std::fmt;

/// Opaque text of our descriptor sets, by which a later process knows them.
pub const FDSET_OPAQUE: &str = "virt-fleece";
/// Name under which the NBD listener's descriptor is handed to QEMU.
pub const LISTENER_FD: &str = "vf-nbd";
/// First id of our descriptor sets (ASCII "vf"); QEMU itself counts from 0.
const FDSET_BASE: i64 = 0x7666_0000;
const KINDS: [&str; 7] = ["filter", "snapshot", "fleece", "fleece-file", "target", "target-file", "end"];

/// A disk's place in a session, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u16);

impl Slot {
    /// Copy-before-write filter over the disk.
    pub fn filter(self) -> String {
        format!("vf{}-filter", self.0)
    }

    /// `snapshot-access` node: reads as the disk was at the point in time.
    pub fn snapshot(self) -> String {
        format!("vf{}-snapshot", self.0)
    }

    /// Fleece: keeps the old data.
    pub fn fleece(self) -> String {
        format!("vf{}-fleece", self.0)
    }

    /// Protocol node under a qcow2 fleece.
    pub fn fleece_file(self) -> String {
        format!("vf{}-fleece-file", self.0)
    }

    /// Target image of a push transfer.
    pub fn target(self) -> String {
        format!("vf{}-target", self.0)
    }

    /// Protocol node under the target image.
    pub fn target_file(self) -> String {
        format!("vf{}-target-file", self.0)
    }

    /// Scratch node of the disk's size, whose bitmap has its last bit set: see [`crate::chain::BitmapName::end_mark`].
    pub fn end(self) -> String {
        format!("vf{}-end", self.0)
    }

    /// NBD export of the snapshot, and before it of the scratch node: block export id and NBD name.
    pub fn export(self) -> String {
        format!("vf{}", self.0)
    }

    /// Job that keeps the old data.
    pub fn fleece_job(self, backup: &str) -> String {
        format!("vf{}-fleece-{backup}", self.0)
    }

    /// Job that formats an image.
    pub fn create_job(self, backup: &str) -> String {
        format!("vf{}-create-{backup}", self.0)
    }

    /// Job that pushes the snapshot to the target.
    pub fn push_job(self, backup: &str) -> String {
        format!("vf{}-push-{backup}", self.0)
    }

    /// Bitmap of a push transfer on the snapshot node.
    pub fn push_bitmap(self) -> String {
        format!("vf{}-push", self.0)
    }

    /// Descriptor set of the fleece.
    pub fn fleece_fdset(self) -> i64 {
        FDSET_BASE + i64::from(self.0) * 2
    }

    /// Descriptor set of the target.
    pub fn target_fdset(self) -> i64 {
        FDSET_BASE + i64::from(self.0) * 2 + 1
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vf{}", self.0)
    }
}

/// Splits `vf<slot>-<rest>`.
fn parse(name: &str) -> Option<(Slot, &str)> {
    let (slot, rest) = name.strip_prefix("vf")?.split_once('-')?;
    let slot = slot.parse().ok()?;
    Some((Slot(slot), rest))
}

/// The slot of one of our nodes and its kind's rank in teardown (what is above others comes first); `None` for foreign nodes.
pub fn node_slot(name: &str) -> Option<(Slot, usize)> {
    let (slot, kind) = parse(name)?;
    Some((slot, KINDS.iter().position(|known| *known == kind)?))
}

/// The kind of one of our jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobKind {
    /// Keeps old data.
    Fleece,
    /// Formats an image.
    Create,
    /// Pushes data.
    Push,
}

/// Reads a job id; `None` for foreign jobs.
pub fn job(id: &str) -> Option<(Slot, JobKind)> {
    let (slot, rest) = parse(id)?;
    let kind = match rest.split_once('-')?.0 {
        "fleece" => JobKind::Fleece,
        "create" => JobKind::Create,
        "push" => JobKind::Push,
        _ => return None,
    };
    Some((slot, kind))
}

/// Whether a block export is ours.
pub fn is_export(id: &str) -> bool {
    id.strip_prefix("vf").is_some_and(|slot| slot.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_fit_qemus_31_bytes_and_read_back() {
        let slot = Slot(u16::MAX);
        let under = [slot.target(), slot.target_file(), slot.end()];
        for name in [slot.filter(), slot.snapshot(), slot.fleece(), slot.fleece_file()].into_iter().chain(under) {
            assert!(name.len() <= 31, "{name}");
            assert_eq!(node_slot(&name).map(|(slot, _)| slot), Some(slot));
        }
        for foreign in ["libvirt-1-storage", "vf", "vfx-fleece", "vf0-other", "#block123"] {
            assert_eq!(node_slot(foreign), None);
        }
    }

    #[test]
    fn jobs_and_exports_read_back() {
        assert_eq!(job(&Slot(3).fleece_job("20261125T010203Z-0011aabb")), Some((Slot(3), JobKind::Fleece)));
        assert_eq!(job(&Slot(0).push_job("x")), Some((Slot(0), JobKind::Push)));
        assert_eq!(job("vf0-fleece"), None);
        assert_eq!(job("drive-virtio0"), None);
        assert!(is_export(&Slot(1).export()));
        assert!(!is_export("vfx"));
    }
}
