//! The mover: takes the content of disks from where it is readable, and stores it at a target.
//!
//! A mover serves one backup of one VM. It speaks with its *driver*, which runs the session in QEMU, over a Unix socket
//! ([`ToMover`], [`FromMover`]); the driver hands over connections to QEMU's NBD server as descriptors. In a cluster it is a
//! pod of its own, without rights to anything but its target; on the command line a task of the same process.

mod asked;
mod bandwidth;
mod channel;
pub mod config;
mod error;
mod message;
mod offline;
pub mod pod;
mod priority;
mod pull;
mod serve;
mod survey;
mod target;
mod trim;

pub use bandwidth::Bandwidth;
pub use channel::{Channel, ChannelError};
pub use error::MoverError;
pub use message::*;
pub use offline::disk_size;
pub use pull::{PullError, PullProgress, PullRequest, PullSummary, pull};
pub use serve::{MoverSettings, serve};
pub use target::{CompleteBackup, TargetAccess};
