//! Which disks a VM has, and which of them can be backed up.

use super::SessionError;
use crate::{
    chain::ObservedBitmap,
    image::qcow2::MAX_DISK,
    qmp::{Qmp, command},
};
use serde::Serialize;
use std::collections::HashMap;

/// Filters that may stand between a device and its image. Only these are walked through: below the image's own node
/// lie its protocol and backing nodes, which are not the disk.
const FILTERS: [&str; 3] = ["throttle", "copy-on-read", "compress"];

/// A disk that can be backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The device's alias without libvirt's `ua-`.
    pub name: String,
    /// QOM path or id, as `query-block` gives it.
    pub qdev: String,
    /// Node that the device uses.
    pub root_node: String,
    /// Node that holds the image: bitmaps live on it.
    pub format_node: String,
    /// Its driver: `raw`, `qcow2`, `file`, `host_device`, …
    pub driver: String,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// The image can store bitmaps (qcow2 version 3).
    pub persistent_bitmaps: bool,
    /// The bitmaps on the format node.
    pub bitmaps: Vec<ObservedBitmap>,
}

impl Volume {
    /// `qcow2`, or `raw` for everything that has no format of its own.
    pub fn source_format(&self) -> &'static str {
        if self.driver == "qcow2" { "qcow2" } else { "raw" }
    }
}

/// A device that is not backed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SkippedDevice {
    /// Its name, as well as it is known.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// The disks of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Disks {
    /// Those that can be backed up, in the order in which QEMU lists them.
    pub volumes: Vec<Volume>,
    /// Those that cannot.
    pub skipped: Vec<SkippedDevice>,
}

impl Disks {
    /// Asks QEMU.
    pub async fn discover(qmp: &Qmp) -> Result<Self, SessionError> {
        let devices = qmp.execute(&command::QueryBlock {}).await.map_err(SessionError::qmp("listing the disks"))?;
        let nodes = qmp
            .execute(&command::QueryNamedBlockNodes { flat: Some(true) })
            .await
            .map_err(SessionError::qmp("listing the block nodes"))?;
        let graph = BlockGraph::query(qmp).await?;
        Self::from_answers(&devices, &nodes, &graph)
    }

    fn from_answers(
        devices: &[command::BlockInfo],
        nodes: &[command::BlockNodeInfo],
        graph: &BlockGraph,
    ) -> Result<Self, SessionError> {
        let nodes: HashMap<&str, &command::BlockNodeInfo> =
            nodes.iter().map(|node| (node.node_name.as_str(), node)).collect();
        let mut disks = Self::default();
        for device in devices {
            match volume(device, &nodes, graph) {
                Ok(volume) => {
                    if let Some(other) = disks.volumes.iter().find(|other| other.name == volume.name) {
                        return Err(SessionError::VolumeNameClash {
                            name: volume.name,
                            first: other.qdev.clone(),
                            second: volume.qdev,
                        });
                    }
                    disks.volumes.push(volume);
                }
                Err(skipped) => disks.skipped.push(skipped),
            }
        }
        Ok(disks)
    }

    /// Sets volumes aside of which the caller knows that they cannot be backed up, and why.
    #[must_use]
    pub fn without(mut self, unsuitable: &[SkippedDevice]) -> Self {
        let reason = |name: &str| unsuitable.iter().find(|device| device.name == name);
        let (kept, dropped): (Vec<_>, Vec<_>) =
            self.volumes.into_iter().partition(|volume| reason(&volume.name).is_none());
        self.volumes = kept;
        self.skipped.extend(dropped.iter().filter_map(|volume| reason(&volume.name).cloned()));
        self
    }

    /// Keeps the volumes that the user wants: all, or those named, without those excluded.
    pub fn select(mut self, include: &[String], exclude: &[String]) -> Result<Self, SessionError> {
        let known = || self.volumes.iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>().join(", ");
        for name in include.iter().chain(exclude) {
            if !self.volumes.iter().any(|volume| volume.name == *name) {
                let skipped = self.skipped.iter().find(|device| device.name == *name);
                let known = match skipped {
                    Some(device) => format!("{} (`{}` is skipped: {})", known(), device.name, device.reason),
                    None => known(),
                };
                return Err(SessionError::UnknownVolume { name: name.clone(), known });
            }
        }
        let (kept, dropped): (Vec<_>, Vec<_>) = self.volumes.into_iter().partition(|volume| {
            (include.is_empty() || include.contains(&volume.name)) && !exclude.contains(&volume.name)
        });
        self.volumes = kept;
        self.skipped.extend(
            dropped.into_iter().map(|volume| SkippedDevice { name: volume.name, reason: "not selected".into() }),
        );
        if self.volumes.is_empty() {
            let skipped = self.skipped.iter().map(|device| format!("{}: {}", device.name, device.reason));
            return Err(SessionError::NoVolumes { skipped: skipped.collect::<Vec<_>>().join("; ") });
        }
        Ok(self)
    }
}

/// The volume behind a device, or why there is none.
fn volume(
    device: &command::BlockInfo,
    nodes: &HashMap<&str, &command::BlockNodeInfo>,
    graph: &BlockGraph,
) -> Result<Volume, SkippedDevice> {
    let qdev = device.qdev.clone().unwrap_or_default();
    let name = volume_name(&qdev, &device.device);
    let shown = name.clone().unwrap_or_else(|| if qdev.is_empty() { "(unnamed)".into() } else { qdev.clone() });
    let skip = |reason: &str| Err(SkippedDevice { name: shown.clone(), reason: reason.to_owned() });
    let Some(inserted) = &device.inserted else {
        return skip("no medium");
    };
    if device.removable && device.tray_open.is_some() {
        return skip("removable medium (CD-ROM or floppy)");
    }
    if inserted.ro {
        return skip("read-only");
    }
    if qdev.is_empty() {
        return skip("not attached to a device");
    }
    let Some(name) = name else {
        return skip("the device has no id, so its backups could not be told apart");
    };
    if !is_plain_name(&name) {
        return skip("the device's id cannot be a file name");
    }
    let Some(root_node) = inserted.node_name.clone() else {
        return skip("its block node has no name");
    };
    let mut format_node = root_node.clone();
    // At most once through all nodes: a graph in which filters form a ring would be followed for ever.
    for _ in 0..=nodes.len() {
        let Some(node) = nodes.get(format_node.as_str()) else {
            return skip("its block node is not listed by QEMU");
        };
        if super::names::node_slot(&format_node).is_some() {
            return skip("an earlier backup's filter is still on it; run `virt-fleece recover`");
        }
        if !FILTERS.contains(&node.drv.as_str()) {
            if node.image.virtual_size > MAX_DISK {
                return skip("its size is more than an image can have (2 PiB)");
            }
            return Ok(Volume {
                name,
                qdev,
                root_node,
                format_node: format_node.clone(),
                driver: node.drv.clone(),
                virtual_size: node.image.virtual_size,
                persistent_bitmaps: node.drv == "qcow2" && node.image.has_bitmap_support(),
                bitmaps: node.dirty_bitmaps.iter().map(observed).collect(),
            });
        }
        match graph.filtered_child(&format_node) {
            Some(child) if child != format_node => format_node = child,
            _ => break,
        }
    }
    skip("what lies under its filter node is unknown")
}

fn observed(bitmap: &command::BlockDirtyInfo) -> ObservedBitmap {
    ObservedBitmap {
        name: bitmap.name.clone(),
        count: bitmap.count,
        granularity: bitmap.granularity,
        recording: bitmap.recording,
        busy: bitmap.busy,
        persistent: bitmap.persistent,
        inconsistent: bitmap.inconsistent.unwrap_or(false),
    }
}

/// The name of the volume on the device `qdev` (a QOM path or an id) with the backend name `device`.
///
/// virtio-blk answers `/machine/peripheral/ID/virtio-backend`, SCSI and IDE disks their id, pflash
/// `/machine/system.flashN`; devices without an id sit below `peripheral-anon` or `unattached`, where only the backend's
/// name (`-drive id=`) is left.
fn volume_name(qdev: &str, device: &str) -> Option<String> {
    let id = if let Some(rest) = qdev.strip_prefix("/machine/peripheral/") {
        rest.split('/').next().unwrap_or_default().to_owned()
    } else if let Some(flash) = qdev.strip_prefix("/machine/system.flash") {
        format!("pflash{flash}")
    } else if qdev.starts_with('/') || qdev.is_empty() {
        device.to_owned()
    } else {
        qdev.to_owned()
    };
    let name = id.strip_prefix("ua-").unwrap_or(&id);
    (!name.is_empty()).then(|| name.to_owned())
}

/// One path component without surprises.
fn is_plain_name(name: &str) -> bool {
    name.len() <= 200
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'#'))
}

/// Who is whose child among the block nodes.
#[derive(Debug, Default)]
pub struct BlockGraph {
    /// (parent, role, child), by node name.
    edges: Vec<(String, String, String)>,
}

impl BlockGraph {
    /// Asks QEMU. `x-debug-query-block-graph` has been there since 4.0; `children` in `query-named-block-nodes` came
    /// with 10.1 only.
    pub async fn query(qmp: &Qmp) -> Result<Self, SessionError> {
        let graph =
            qmp.execute(&command::QueryBlockGraph {}).await.map_err(SessionError::qmp("reading the block graph"))?;
        let names: HashMap<u64, &str> = graph.nodes.iter().map(|node| (node.id, node.name.as_str())).collect();
        let name = |id: &u64| names.get(id).map(|name| (*name).to_owned());
        let edges =
            graph.edges.iter().filter_map(|edge| Some((name(&edge.parent)?, edge.name.clone(), name(&edge.child)?)));
        Ok(Self { edges: edges.collect() })
    }

    /// What a filter node stands on.
    pub fn filtered_child(&self, parent: &str) -> Option<String> {
        let child = |role: &str| {
            self.edges.iter().find(|(p, r, _)| p == parent && r == role).map(|(_, _, child)| child.clone())
        };
        child("file").or_else(|| child("backing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_the_alias() {
        let cases = [
            ("/machine/peripheral/ua-rootdisk/virtio-backend", "", Some("rootdisk")),
            ("ua-data", "", Some("data")),
            ("/machine/peripheral/d1/virtio-backend", "drive1", Some("d1")),
            ("/machine/system.flash1", "", Some("pflash1")),
            ("/machine/peripheral-anon/device[0]/virtio-backend", "drive0", Some("drive0")),
            ("/machine/unattached/device[20]", "", None),
            ("", "", None),
        ];
        for (qdev, device, expected) in cases {
            assert_eq!(volume_name(qdev, device).as_deref(), expected, "{qdev}");
        }
    }

    #[test]
    fn names_that_are_paths_are_no_names() {
        for bad in ["../x", "a/b", ".hidden", "a\0b"] {
            assert!(!is_plain_name(bad));
        }
        assert!(is_plain_name("root-disk_1.img"));
    }

    /// What becomes of a VM whose one disk stands on the node `a`.
    fn disks(nodes: serde_json::Value, edges: &[(&str, &str)]) -> Disks {
        let inserted = serde_json::json!({ "ro": false, "node-name": "a" });
        let device = serde_json::json!({ "device": "", "qdev": "ua-disk", "removable": false, "inserted": inserted });
        let devices = [serde_json::from_value(device).unwrap()];
        let nodes: Vec<command::BlockNodeInfo> = serde_json::from_value(nodes).unwrap();
        let edge = |(parent, child): &(&str, &str)| ((*parent).to_owned(), "file".to_owned(), (*child).to_owned());
        let graph = BlockGraph { edges: edges.iter().map(edge).collect() };
        Disks::from_answers(&devices, &nodes, &graph).unwrap()
    }

    fn node(name: &str, drv: &str, size: u64) -> serde_json::Value {
        serde_json::json!({ "node-name": name, "drv": drv, "image": { "virtual-size": size } })
    }

    #[test]
    fn filters_are_walked_through_but_not_in_a_ring() {
        let filters =
            || serde_json::json!([node("a", "throttle", 512), node("b", "throttle", 512), node("c", "raw", 512)]);
        let found = disks(filters(), &[("a", "b"), ("b", "c")]);
        assert_eq!(found.volumes[0].format_node, "c");
        for edges in [&[("a", "b"), ("b", "a")][..], &[("a", "a")], &[("a", "b")], &[("a", "gone")]] {
            let found = disks(filters(), edges);
            assert_eq!((found.volumes.len(), found.skipped.len()), (0, 1), "{edges:?}");
        }
    }

    #[test]
    fn a_disk_larger_than_any_image_is_skipped() {
        assert_eq!(disks(serde_json::json!([node("a", "raw", MAX_DISK)]), &[]).volumes.len(), 1);
        let found = disks(serde_json::json!([node("a", "raw", MAX_DISK + 512)]), &[]);
        assert!(found.skipped[0].reason.contains("2 PiB"), "{found:?}");
    }
}
