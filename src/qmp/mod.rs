//! QEMU's machine protocol: the monitor edge, typed commands, and the transports that carry them.
//!
//! [`Monitor`] is the edge: one command out, one answer back. Two transports implement it: a QMP Unix socket and
//! libvirt's RPC socket (`virDomainQemuMonitorCommand`). Everything that QEMU and libvirt answer is untrusted input.

mod error;
mod monitor;

pub use error::{ErrorClass, QmpError};
pub use monitor::{Command, Monitor, Qmp};
