//! Options that name a VM, and the way to it.

use super::CliError;
use crate::{
    fleecing::{FleeceDirectory, Journal, SessionError, VmLock},
    guest_agent::{GuestAgent, QgaSocket},
    qmp::{
        Qmp, QmpError, TimeLimits, UnixMonitor,
        command::{QueryName, QueryUuid},
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
    #[arg(long, value_name = "SOCKET", env = "VIRT_FLEECE_QMP")]
    qmp: PathBuf,
    /// Guest agent socket of the VM, to freeze its file systems
    #[arg(long, value_name = "SOCKET")]
    guest_agent: Option<PathBuf>,
    /// Directory for fleeces and journals, on a local disk
    #[arg(long, value_name = "DIR", env = "VIRT_FLEECE_DIR", default_value = FLEECE_DIR)]
    fleece_dir: PathBuf,
}

/// A VM that answers, and this node's state of it.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) qmp: Qmp,
    pub(super) monitor_fd: Option<OwnedFd>,
    pub(super) uuid: Option<String>,
    pub(super) name: Option<String>,
    pub(super) directory: FleeceDirectory,
    key: String,
}

impl VmArgs {
    /// Connects.
    pub(super) async fn connect(&self) -> Result<Connection, CliError> {
        let monitor =
            UnixMonitor::connect(&self.qmp, TimeLimits::default()).await.map_err(CliError::Unreachable)?;
        let monitor_fd = monitor.duplicate_fd().ok();
        let qmp = Qmp::new(Arc::new(monitor));
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
            None => socket_key(&self.qmp),
        };
        Ok(Connection { qmp, monitor_fd, uuid, name, directory, key })
    }

    /// The guest agent: none named, or connected, or why not.
    pub(super) async fn agent(&self) -> Result<Option<Box<dyn GuestAgent>>, String> {
        match &self.guest_agent {
            None => Ok(None),
            Some(path) => match QgaSocket::connect(path).await {
                Ok(agent) => Ok(Some(Box::new(agent) as Box<dyn GuestAgent>)),
                Err(error) => Err(error.to_string()),
            },
        }
    }
}

impl Connection {
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
                    Ok(Some(leftover)) => format!(" (process {}, backup {})", leftover.begin.pid, leftover.begin.backup),
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
