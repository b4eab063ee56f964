//! The way to a VM, and this node's state of it.

use super::RunError;
use crate::{
    fleecing::{FleeceDirectory, Journal, SessionError, VmLock, guardian::Ways},
    guest_agent::{GuestAgent, LibvirtAgent, QgaSocket},
    qmp::{
        Qmp, QmpError, TimeLimits, UnixMonitor,
        command::{QueryName, QueryUuid},
        libvirt::{LibvirtConnection, LibvirtMonitor},
    },
};
use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// How to reach a VM.
#[derive(Debug, Clone)]
pub enum VmAddress {
    /// By a QMP socket of its own.
    Qmp {
        /// The socket.
        socket: PathBuf,
        /// That of its guest agent.
        guest_agent: Option<PathBuf>,
    },
    /// By the libvirt daemon that runs it.
    Libvirt {
        /// The daemon's socket.
        socket: PathBuf,
        /// Name or UUID.
        domain: String,
    },
}

/// A VM that answers, and this node's state of it.
#[derive(Debug)]
pub struct VmConnection {
    pub(super) qmp: Qmp,
    pub(super) agent: Agent,
    monitor_fd: Option<OwnedFd>,
    libvirt: Option<(PathBuf, String)>,
    pub(super) uuid: Option<String>,
    pub(super) name: Option<String>,
    pub(super) directory: FleeceDirectory,
    key: String,
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

impl VmConnection {
    /// Connects. `key` names lock and journal of the VM on this node; without one its UUID does, or its socket where it
    /// has no UUID.
    pub async fn open(address: &VmAddress, fleece_directory: &Path, key: Option<String>) -> Result<Self, RunError> {
        let way = match address {
            VmAddress::Qmp { socket, guest_agent } => through_socket(socket, guest_agent.as_deref()).await,
            VmAddress::Libvirt { socket, domain } => through_libvirt(socket, domain).await,
        };
        let Way { qmp, agent, monitor_fd, libvirt, socket } = way.map_err(RunError::Unreachable)?;
        let uuid = qmp.execute(&QueryUuid {}).await.map_err(RunError::Unreachable)?.uuid;
        let uuid = uuid.bytes().any(|b| b != b'0' && b != b'-').then_some(uuid);
        let name = qmp.execute(&QueryName {}).await.map_err(RunError::Unreachable)?.name;
        let directory = FleeceDirectory::open(fleece_directory)?;
        if let Some(kind) = directory.network_file_system() {
            tracing::warn!(
                "the fleece directory {} is on {kind}: when that stalls, the VM stalls; use a local disk (--fleece-dir)",
                directory.path().display()
            );
        }
        // One VM has one journal, however its socket is named; a VM without a UUID is known by its socket.
        let known = uuid.as_deref().filter(|uuid| uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'));
        let key = key.unwrap_or_else(|| known.map_or_else(|| socket_key(&socket), str::to_ascii_lowercase));
        Ok(Self { qmp, agent, monitor_fd, libvirt, uuid, name, directory, key })
    }

    /// The same, with fleeces that belong to the user of a QEMU that runs in a pod.
    #[must_use]
    pub fn with_fleece_owner(mut self, uid: u32, selinux_label: &str) -> Self {
        self.directory = self.directory.with_owner(uid, selinux_label);
        self
    }

    /// The monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// The guest agent, where there is one.
    pub fn guest_agent(&mut self) -> Option<&mut Box<dyn GuestAgent>> {
        self.agent.as_mut().ok().and_then(Option::as_mut)
    }

    /// The name that QEMU knows.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The UUID that QEMU knows.
    pub fn uuid(&self) -> Option<&str> {
        self.uuid.as_deref()
    }

    /// Where fleeces and journals are.
    pub fn fleece_directory(&self) -> &FleeceDirectory {
        &self.directory
    }

    /// The ways by which a guardian releases the VM.
    pub(super) fn ways(&self, agent: Option<OwnedFd>) -> Ways {
        let monitor = self.monitor_fd.as_ref().and_then(|fd| fd.try_clone().ok());
        Ways { monitor, agent, libvirt: self.libvirt.clone() }
    }

    /// The journal of this VM.
    pub fn journal(&self) -> Journal {
        Journal::at(self.directory.path().join(format!("{}.journal", self.key)))
    }

    /// Takes the lock of this VM, waiting for at most this long.
    pub async fn lock(&self, wait: Duration) -> Result<VmLock, RunError> {
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

async fn through_socket(socket: &Path, guest_agent: Option<&Path>) -> Result<Way, QmpError> {
    let monitor = UnixMonitor::connect(socket, TimeLimits::default()).await?;
    let agent = match guest_agent {
        None => Ok(None),
        Some(path) => match QgaSocket::connect(path).await {
            Ok(agent) => Ok(Some(Box::new(agent) as Box<dyn GuestAgent>)),
            Err(error) => Err(error.to_string()),
        },
    };
    let monitor_fd = monitor.duplicate_fd().ok();
    Ok(Way { qmp: Qmp::new(Arc::new(monitor)), agent, monitor_fd, libvirt: None, socket: socket.to_owned() })
}

async fn through_libvirt(socket: &Path, name: &str) -> Result<Way, QmpError> {
    let connection = LibvirtConnection::connect(socket, TimeLimits::default()).await?;
    let domain = match name.parse() {
        Ok(uuid) => connection.domain_by_uuid(uuid).await,
        Err(_) => connection.domain_by_name(name).await,
    }?;
    let monitor = Arc::new(LibvirtMonitor::open(Arc::new(connection), &domain).await?);
    Ok(Way {
        qmp: Qmp::new(Arc::<LibvirtMonitor>::clone(&monitor)),
        agent: Ok(Some(Box::new(LibvirtAgent(monitor)))),
        monitor_fd: None,
        libvirt: Some((socket.to_owned(), domain.uuid.to_string())),
        socket: socket.to_owned(),
    })
}

fn socket_key(socket: &Path) -> String {
    let path = socket.canonicalize().unwrap_or_else(|_| socket.to_owned());
    let hash = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
    format!("socket-{}", &hash[..16])
}
