//! Block nodes.

use super::{BitmapRef, Empty, command};
use serde::Serialize;

/// Creates a node.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevAdd {
    /// Its name, at most 31 bytes.
    pub node_name: String,
    /// Driver and options.
    #[serde(flatten)]
    pub options: NodeOptions,
}

impl crate::qmp::Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Reply = Empty;
}

command!(
    /// Deletes a node that nothing uses.
    BlockdevDel => "blockdev-del", Empty {
        /// Its name.
        node_name: String,
    }
);

/// Host page cache of a file node.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheOptions {
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Ignore flushes.
    pub no_flush: bool,
}

/// Driver and options of a node.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "driver", rename_all = "kebab-case")]
pub enum NodeOptions {
    /// A file; `/dev/fdset/N` for a passed descriptor.
    #[serde(rename_all = "kebab-case")]
    File {
        /// Its name.
        filename: String,
        /// `off` for passed descriptors: QEMU's lock would hit our own duplicate.
        locking: &'static str,
        /// Cache mode.
        #[serde(skip_serializing_if = "Option::is_none")]
        cache: Option<CacheOptions>,
        /// `unmap`: discards free space. Left out, they are ignored.
        #[serde(skip_serializing_if = "Option::is_none")]
        discard: Option<&'static str>,
    },
    /// A qcow2 image.
    #[serde(rename_all = "kebab-case")]
    Qcow2 {
        /// Node of the file.
        file: String,
        /// Node of the backing image; `None` is written as an explicit null: none at all, whatever the image says.
        backing: Option<String>,
    },
    /// Keeps old data of `file` in `target` before the guest overwrites it.
    #[serde(rename_all = "kebab-case")]
    CopyBeforeWrite {
        /// Node of the disk.
        file: String,
        /// Node of the fleece.
        target: String,
        /// Copied when the node is opened: only what it marks is kept and can be read.
        #[serde(skip_serializing_if = "Option::is_none")]
        bitmap: Option<BitmapRef>,
        /// `break-snapshot`: the guest's write goes on.
        on_cbw_error: &'static str,
        /// Seconds until a slow copy counts as failed. Overflows before 9.1: only 0-4 work there.
        #[serde(skip_serializing_if = "Option::is_none")]
        cbw_timeout: Option<u32>,
    },
    /// Reads what a copy-before-write filter kept.
    SnapshotAccess {
        /// Node of the filter.
        file: String,
        /// `unmap`: what is discarded is not kept any more, and cannot be read any more. Left out, discards are ignored.
        #[serde(skip_serializing_if = "Option::is_none")]
        discard: Option<&'static str>,
    },
    /// Reads zeroes, forgets writes.
    NullCo {
        /// Bytes.
        size: u64,
    },
}
