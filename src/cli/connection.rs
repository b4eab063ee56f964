//! Options that name a VM, and the way to it.

use super::CliError;
use crate::run::{VmAddress, VmConnection};
use clap::Args;
use std::path::PathBuf;

/// Default directory of fleeces and journals.
pub(super) const FLEECE_DIR: &str = "/var/tmp/virt-fleece";

#[derive(Debug, Args)]
pub(super) struct VmArgs {
    /// QMP socket of the VM (qemu -qmp unix:SOCKET,server=on,wait=off); nobody else may be connected to it
    #[arg(
        long,
        value_name = "SOCKET",
        env = "VIRT_FLEECE_QMP",
        required_unless_present = "libvirt",
        conflicts_with = "libvirt"
    )]
    qmp: Option<PathBuf>,
    /// Socket of the libvirt daemon that runs the VM (virtqemud-sock, libvirt-sock); needs --domain
    #[arg(long, value_name = "SOCKET", requires = "domain")]
    libvirt: Option<PathBuf>,
    /// Name or UUID of the VM in libvirt
    #[arg(long, value_name = "NAME", requires = "libvirt")]
    domain: Option<String>,
    /// Guest agent socket of the VM, to freeze its file systems (libvirt knows its own)
    #[arg(long, value_name = "SOCKET", conflicts_with = "libvirt")]
    guest_agent: Option<PathBuf>,
    /// Directory for fleeces and journals, on a local disk
    #[arg(long, value_name = "DIR", env = "VIRT_FLEECE_DIR", default_value = FLEECE_DIR)]
    fleece_dir: PathBuf,
}

impl VmArgs {
    /// Connects.
    pub(super) async fn connect(&self) -> Result<VmConnection, CliError> {
        let address = match (&self.qmp, &self.libvirt, &self.domain) {
            (Some(socket), ..) => VmAddress::Qmp { socket: socket.clone(), guest_agent: self.guest_agent.clone() },
            (None, Some(socket), Some(domain)) => VmAddress::Libvirt { socket: socket.clone(), domain: domain.clone() },
            _ => return Err(CliError::Usage("name the VM: --qmp SOCKET, or --libvirt SOCKET --domain NAME".into())),
        };
        Ok(VmConnection::open(&address, &self.fleece_dir, None).await?)
    }
}
