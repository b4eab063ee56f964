//! qcow2 images, as far as backups need them: written once from front to back, read in chains.
//!
//! What is written is plain qcow2 version 3 (QEMU `docs/interop/qcow2.rst`): `qemu-img` alone can check, convert and
//! boot it. What is read is untrusted: nothing in a file is believed before it was checked against the file's size.

mod chain;
mod format;
mod image;
mod writer;

pub use chain::ChainReader;
pub use format::{CLUSTER, MAX_DISK};
pub use image::{Cluster, Qcow2Image};
pub use writer::{Qcow2Options, Qcow2Writer};
