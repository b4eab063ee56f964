//! The commands that are used, typed. Field names and meaning are those of QEMU's `qapi/*.json`; optional fields are
//! left out when absent, so that a QEMU without them does not see them.

mod bitmap;
mod block;
mod job;
mod machine;
mod node;

pub use bitmap::{BitmapAdd, BitmapMerge, BitmapRef, Transaction, TransactionAction};
pub use block::{
    BitmapSource, BlockDirtyInfo, BlockExportAdd, BlockExportDel, BlockExportInfo, BlockGraphInfo, BlockInfo,
    BlockNodeInfo, ImageInfo, InsertedInfo, NbdServerStart, NbdServerStop, QueryBlock, QueryBlockExports,
    QueryBlockGraph, QueryNamedBlockNodes, ServerAddress,
};
pub use job::{
    BackupPerformance, BlockJobInfo, BlockdevBackup, BlockdevCreate, CreateOptions, JobCancel, JobDismiss, JobInfo,
    QueryBlockJobs, QueryJobs,
};
pub use machine::{
    AddFd, CloseFd, Cont, FdsetInfo, GetFd, QmpCapabilities, QomGet, QomSet, QueryFdsets, QueryName, QueryQmpSchema,
    QueryStatus, QueryUuid, QueryVersion, RemoveFd, StatusInfo, Stop, VersionInfo,
};
pub use node::{BlockdevAdd, BlockdevDel, CacheOptions, NodeOptions};

/// Defines a command: its struct, its name on the wire and the type of its answer.
macro_rules! command {
    ($(#[$doc:meta])* $name:ident => $wire:literal, $reply:ty { $($(#[$field_doc:meta])* $field:ident : $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, serde::Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }

        impl $crate::qmp::Command for $name {
            const NAME: &'static str = $wire;
            type Reply = $reply;
        }
    };
}
pub(crate) use command;

/// `{}`: the answer of commands that return nothing. What else may stand in it is ignored.
pub type Empty = serde::de::IgnoredAny;
