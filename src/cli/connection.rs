//! Options that name a VM, and the way to it.

use super::CliError;
use crate::{
    fleecing::{FleeceDirectory, Journal, SessionError, VmLock, guardian::Ways},
    guest_agent::{GuestAgent, LibvirtAgent, QgaSocket},
    qmp::{
        Qmp, QmpError, TimeLimits, UnixMonitor,
        command::{QueryName, QueryUuid},
        libvirt::{LibvirtConnection, LibvirtMonitor},
    },
};
use clap::Args;
use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

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

/// A VM that answers, and this node's state of it.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) qmp: Qmp,
    pub(super) agent: Agent,
    monitor_fd: Option<OwnedFd>,
    libvirt: Option<(PathBuf, String)>,
    pub(super) uuid: Option<String>,
    pub(super) name: Option<String>,
    pub(super) directory: FleeceDirectory,
    key: String,
}

impl VmArgs {
    /// Connects.
    pub(super) async fn connect(&self) -> Result<Connection, CliError> {
        let way = match (&self.qmp, &self.libvirt, &self.domain) {
            (Some(socket), ..) => self.through_socket(socket).await?,
            (None, Some(socket), Some(domain)) => through_libvirt(socket, domain).await?,
            _ => return Err(CliError::Usage("name the VM: --qmp SOCKET, or --libvirt SOCKET --domain NAME".into())),
        };
        let Way { qmp, agent, monitor_fd, libvirt, socket } = way;
        let ask = |error: QmpError| CliError::Unreachable(error);
        let uuid = qmp.execute(&QueryUuid {}).await.map_err(ask)?.uuid;
        let uuid = uuid.bytes().any(|b| b != b'0' && b != b'-').then_some(uuid);
        let name = qmp.execute(&QueryName {}).await.map_err(ask)?.name;
        let directory = FleeceDirectory::open(&self.fleece_dir)?;
        if let Some(kind) = directory.network_file_system() {
            tracing::warn!(
                "the fleece directory {} is on {kind}: when that stalls, the VM stalls; use a local disk (--fleece-dir)",
                directory.path().display()
            );
        }
        // One VM has one journal, however its socket is named; a VM without a UUID is known by its socket.
        let key = match uuid.as_deref().filter(|uuid| uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')) {
            Some(uuid) => uuid.to_ascii_lowercase(),
            None => socket_key(&socket),
        };
        Ok(Connection { qmp, agent, monitor_fd, libvirt, uuid, name, directory, key })
    }

    async fn through_socket(&self, socket: &Path) -> Result<Way, CliError> {
        let monitor = UnixMonitor::connect(socket, TimeLimits::default()).await.map_err(CliError::Unreachable)?;
        let agent = match &self.guest_agent {
            None => Ok(None),
            Some(path) => match QgaSocket::connect(path).await {
                Ok(agent) => Ok(Some(Box::new(agent) as Box<dyn GuestAgent>)),
                Err(error) => Err(error.to_string()),
            },
        };
        let monitor_fd = monitor.duplicate_fd().ok();
        Ok(Way { qmp: Qmp::new(Arc::new(monitor)), agent, monitor_fd, libvirt: None, socket: socket.to_owned() })
    }
}

/// The guest agent: none, or connected, or why not.
type Agent = Result<Option<Box<dyn GuestAgent>>, String>;

struct Way {
    qmp: Qmp,
    agent: Agent,
    monitor_fd: Option<OwnedFd>,
    libvirt: Option<(PathBuf, String)>,
    socket: PathBuf,
}

async fn through_libvirt(socket: &Path, name: &str) -> Result<Way, CliError> {
    let connection = LibvirtConnection::connect(socket, TimeLimits::default()).await.map_err(CliError::Unreachable)?;
    let domain = match name.parse() {
        Ok(uuid) => connection.domain_by_uuid(uuid).await,
        Err(_) => connection.domain_by_name(name).await,
    };
    let domain = domain.map_err(CliError::Unreachable)?;
    let monitor = LibvirtMonitor::open(Arc::new(connection), &domain).await.map_err(CliError::Unreachable)?;
    let monitor = Arc::new(monitor);
    Ok(Way {
        qmp: Qmp::new(Arc::<LibvirtMonitor>::clone(&monitor)),
        agent: Ok(Some(Box::new(LibvirtAgent(monitor)))),
        monitor_fd: None,
        libvirt: Some((socket.to_owned(), domain.uuid.to_string())),
        socket: socket.to_owned(),
    })
}

impl Connection {
    /// The ways by which a guardian releases the VM.
    pub(super) fn ways(&self, agent: Option<OwnedFd>) -> Ways {
        let monitor = self.monitor_fd.as_ref().and_then(|fd| fd.try_clone().ok());
        Ways { monitor, agent, libvirt: self.libvirt.clone() }
    }

    /// The journal of this VM.
    pub(super) fn journal(&self) -> Journal {
        Journal::at(self.directory.path().join(format!("{}.journal", self.key)))
    }

    /// Takes the lock of this VM, waiting for at most this long.
    pub(super) async fn lock(&self, wait: Duration) -> Result<VmLock, CliError> {
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            if let Some(lock) = self.directory.lock(&self.key)? {
                return Ok(lock);
            }
            if tokio::time::Instant::now() >= deadline {
                let holder = match self.journal().leftover() {
                    Ok(Some(leftover)) => {
                        format!(" (process {}, backup {})", leftover.begin.pid, leftover.begin.backup)
                    }
                    _ => String::new(),
                };
                let vm = self.name.clone().unwrap_or_else(|| self.qmp.peer());
                return Err(SessionError::Busy { vm, holder }.into());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn socket_key(socket: &Path) -> String {
    let path = socket.canonicalize().unwrap_or_else(|_| socket.to_owned());
    let hash = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
    format!("socket-{}", &hash[..16])
}
