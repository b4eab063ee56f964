//! Dirty bitmaps and transactions.

use super::{BlockdevBackup, Empty};
use serde::Serialize;

/// Names a bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BitmapRef {
    /// Its node.
    pub node: String,
    /// Its name.
    pub name: String,
}

/// Starts a bitmap.
#[derive(Debug, Clone, Serialize)]
pub struct BitmapAdd {
    /// Its node.
    pub node: String,
    /// Its name.
    pub name: String,
    /// Bytes that a bit covers.
    pub granularity: u32,
    /// Keep it in the image (qcow2 version 3).
    pub persistent: bool,
    /// Does not record.
    pub disabled: bool,
}

impl crate::qmp::Command for BitmapAdd {
    const NAME: &'static str = "block-dirty-bitmap-add";
    type Reply = Empty;
}

/// Adds the bits of bitmaps to another one.
#[derive(Debug, Clone, Serialize)]
pub struct BitmapMerge {
    /// Node of the target.
    pub node: String,
    /// The target.
    pub target: String,
    /// The sources.
    pub bitmaps: Vec<BitmapRef>,
}

/// One action of a transaction.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum TransactionAction {
    /// Starts a backup job. Holds its disk drained until the transaction ends.
    BlockdevBackup(BlockdevBackup),
    /// Starts a bitmap.
    BlockDirtyBitmapAdd(BitmapAdd),
    /// Removes a bitmap.
    BlockDirtyBitmapRemove(BitmapRef),
    /// Lets a bitmap record.
    BlockDirtyBitmapEnable(BitmapRef),
    /// Stops a bitmap.
    BlockDirtyBitmapDisable(BitmapRef),
    /// Adds bits to a bitmap.
    BlockDirtyBitmapMerge(BitmapMerge),
}

/// All of the actions or none. Without `completion-mode=grouped`, which is refused beside bitmap actions.
#[derive(Debug, Clone, Serialize)]
pub struct Transaction {
    /// Done in this order.
    pub actions: Vec<TransactionAction>,
}

impl crate::qmp::Command for Transaction {
    const NAME: &'static str = "transaction";
    type Reply = Empty;
}
