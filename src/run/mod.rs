//! One backup of one running VM: the session in QEMU and the mover that stores what it reads, driven together.
//!
//! The same code runs on the command line, with a mover in the same process, and in a node's agent, with a mover in a pod.

mod backup;
mod copy;
mod error;
mod mover;
mod offline;
mod status;
mod vm;

pub use backup::{BackupRequest, Finished, backup};
pub use error::{RunError, Stop};
pub use mover::Mover;
pub use offline::{OfflineRequest, offline_backup};
pub use status::{RunState, RunStatus, VolumeStatus};
pub use vm::{VmAddress, VmConnection};
