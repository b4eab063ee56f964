//! Disks, block nodes, and what is exported of them.

use super::{BitmapRef, Empty, command};
use serde::{Deserialize, Serialize};

command!(
    /// The disks of the VM.
    QueryBlock => "query-block", Vec<BlockInfo> {}
);
command!(
    /// All nodes with a name.
    QueryNamedBlockNodes => "query-named-block-nodes", Vec<BlockNodeInfo> {
        /// Leave out the nodes below each (libvirt refuses answers that are too long or too deep).
        flat: Option<bool>,
    }
);
command!(
    /// Parents and children of all nodes.
    QueryBlockGraph => "x-debug-query-block-graph", BlockGraphInfo {}
);
command!(
    /// All exports.
    QueryBlockExports => "query-block-exports", Vec<BlockExportInfo> {}
);
command!(
    /// Removes an export.
    BlockExportDel => "block-export-del", Empty {
        /// Its id.
        id: String,
        /// `hard`: clients are cut off.
        mode: &'static str,
    }
);
command!(
    /// Starts the NBD server; there is one in a QEMU process.
    NbdServerStart => "nbd-server-start", Empty {
        /// Where it listens.
        addr: ServerAddress,
    }
);
command!(
    /// Stops the NBD server with all its exports.
    NbdServerStop => "nbd-server-stop", Empty {}
);

/// Exports a node over NBD. Never with an iothread: `blockdev-backup` on such a node aborts QEMU (seen on 10.0.2, 11.1.3).
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportAdd {
    /// Always `nbd`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Id of the export.
    pub id: String,
    /// Node.
    pub node_name: String,
    /// NBD name.
    pub name: String,
    /// Clients may write.
    pub writable: bool,
    /// Bitmaps to show; they must not be recording.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapSource>,
}

impl crate::qmp::Command for BlockExportAdd {
    const NAME: &'static str = "block-export-add";
    type Reply = Empty;
}

/// A bitmap to export, on any node below (since 7.1).
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct BitmapSource(pub BitmapRef);

/// Where a server listens.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub enum ServerAddress {
    /// A named descriptor (`getfd`) of a listening socket.
    Fd {
        /// Its name.
        str: String,
    },
}

/// An export.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockExportInfo {
    /// Its id.
    pub id: String,
    /// Its node.
    pub node_name: String,
}

/// A disk.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockInfo {
    /// Name of the backend (`-drive id=`); empty with `-blockdev`.
    pub device: String,
    /// QOM path or id of the device.
    pub qdev: Option<String>,
    /// The medium.
    pub inserted: Option<InsertedInfo>,
    /// The medium can be changed.
    #[serde(default)]
    pub removable: bool,
    /// There is a tray.
    pub tray_open: Option<bool>,
}

/// The medium of a disk.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InsertedInfo {
    /// Its node.
    pub node_name: Option<String>,
    /// Read-only.
    pub ro: bool,
}

/// A node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockNodeInfo {
    /// Its name.
    #[serde(default)]
    pub node_name: String,
    /// Its driver.
    pub drv: String,
    /// What it shows.
    pub image: ImageInfo,
    /// Its bitmaps.
    #[serde(default)]
    pub dirty_bitmaps: Vec<BlockDirtyInfo>,
}

/// An image.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Bytes.
    pub virtual_size: u64,
    /// What the format adds.
    pub format_specific: Option<FormatSpecific>,
}

impl ImageInfo {
    /// Whether the image can store bitmaps: qcow2 says `compat: 1.1` for its version 3.
    pub fn has_bitmap_support(&self) -> bool {
        let compat = self.format_specific.as_ref().and_then(|specific| specific.data.get("compat"));
        compat.and_then(serde_json::Value::as_str) == Some("1.1")
    }
}

/// What a format adds to an image's description.
#[derive(Debug, Clone, Deserialize)]
pub struct FormatSpecific {
    /// Depends on the format.
    #[serde(default)]
    pub data: serde_json::Value,
}

/// A bitmap.
#[derive(Debug, Clone, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "QEMU's BlockDirtyInfo")]
pub struct BlockDirtyInfo {
    /// Name; none for those of block jobs.
    pub name: Option<String>,
    /// Dirty bytes.
    pub count: u64,
    /// Bytes that a bit covers.
    pub granularity: u32,
    /// Records writes.
    pub recording: bool,
    /// In use by a job or export.
    pub busy: bool,
    /// Kept in the image.
    pub persistent: bool,
    /// Was not saved cleanly: can only be removed.
    pub inconsistent: Option<bool>,
}

/// The block graph.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockGraphInfo {
    /// All vertices.
    pub nodes: Vec<GraphNode>,
    /// All edges.
    pub edges: Vec<GraphEdge>,
}

/// A vertex.
#[derive(Debug, Clone, Deserialize)]
pub struct GraphNode {
    /// Id within the answer.
    pub id: u64,
    /// Name of the node, backend or job.
    pub name: String,
}

/// An edge.
#[derive(Debug, Clone, Deserialize)]
pub struct GraphEdge {
    /// Id of the parent.
    pub parent: u64,
    /// Id of the child.
    pub child: u64,
    /// Role: `file`, `backing`, …
    pub name: String,
}
