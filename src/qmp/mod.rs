//! QEMU's machine protocol: the monitor edge, typed commands, and the transports that carry them.
//!
//! [`Monitor`] is the edge: one command out, one answer back. Two transports implement it: a QMP Unix socket and
//! libvirt's RPC socket (`virDomainQemuMonitorCommand`). Everything that QEMU and libvirt answer is untrusted input.

mod codec;
pub mod command;
mod error;
pub mod libvirt;
mod monitor;
mod probe;
mod unix;

pub use codec::{CodecError, LineDecoder, MAX_LINE, MAX_WEIGHT};
pub use error::{ErrorClass, QmpError};
pub use monitor::{Command, Monitor, Qmp};
pub use probe::Capabilities;
pub use unix::{TimeLimits, UnixMonitor};
