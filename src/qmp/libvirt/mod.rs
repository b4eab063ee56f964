//! The monitor through libvirt's RPC socket, without libvirt's C library.
//!
//! Where libvirt runs the machine it holds QEMU's only monitor; its own socket is the way in. In `KubeVirt`'s launcher
//! pod that is `/var/run/libvirt/virtqemud-sock`, on a host `/run/libvirt/virtqemud-sock` or `libvirt-sock`. The
//! protocol is private to libvirt by declaration, but remote clients of any age must work with any daemon, so what was
//! released stays. Layers: [`xdr`] (values), [`message`] (one message, pure), `rpc` (socket, serials, keepalive),
//! [`LibvirtConnection`] (open, look up), [`LibvirtMonitor`] (commands to QEMU and to the guest agent).

mod agent;
mod connection;
mod domain;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
pub mod message;
mod monitor;
mod rpc;
pub mod xdr;

pub use connection::{Driver, LibvirtConnection};
pub use domain::{Domain, DomainState, DomainUuid, NotUuid};
pub use message::{LibvirtError, decode_message, libvirt_code};
pub use monitor::LibvirtMonitor;
