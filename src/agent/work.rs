//! One run: from the claim to the last word.

use super::{
    KubeletDirectory, PodSocket,
    config::AgentConfig,
    kubelet::KubeletError,
    police,
    report::{self, Ending},
};
use crate::{
    api::{Assignment, BackupKind, LauncherReference, QuiescePolicy, VirtualMachineBackup},
    chain::BackupType,
    fleecing::{Recovered, SkippedDevice, Wish, recover},
    kubevirt::{LIBVIRT_RUNTIME_VOLUME, LIBVIRT_SOCKET},
    mover::{
        Channel, CompleteBackup,
        config::{SOCKET_NAME, SOCKET_VOLUME},
    },
    reason::{Reason, Retry},
    run::{
        BackupRequest, Finished, Mover, OfflineRequest, RunError, RunStatus, Stop, VmAddress, VmConnection, backup,
        offline_backup,
    },
};
use kube::{Client, ResourceExt};
use std::time::Duration;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

/// How long the mover's socket may take to appear once the controller saw the pod running.
const MOVER_LIMIT: Duration = Duration::from_secs(30);
/// How long another session of the VM may take to end.
const LOCK_LIMIT: Duration = Duration::from_secs(10);
/// A target that takes no data for so long is given up.
const STALL_TIMEOUT: Duration = Duration::from_secs(300);

/// What a run needs to know.
#[derive(Debug, Clone)]
pub(super) struct Work {
    /// The backup, as it was when the run was claimed.
    pub backup: VirtualMachineBackup,
    /// The order.
    pub assignment: Assignment,
    /// Bytes that its fleeces may take.
    pub fleece_limit: Option<u64>,
}

/// Why a run could not be carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkError {
    /// The mover's socket is not there.
    #[error("the mover's socket cannot be reached")]
    Mover(#[source] KubeletError),
    /// libvirt's socket is not there.
    #[error("libvirt of the virt-launcher pod cannot be reached")]
    Launcher(#[source] KubeletError),
    /// The run failed.
    #[error(transparent)]
    Run(#[from] RunError),
}

impl From<crate::fleecing::SessionError> for WorkError {
    fn from(error: crate::fleecing::SessionError) -> Self {
        Self::Run(error.into())
    }
}

impl Reason for WorkError {
    fn reason(&self) -> &str {
        match self {
            Self::Mover(_) => "MoverUnreachable",
            Self::Launcher(_) => "LauncherUnreachable",
            Self::Run(error) => error.reason(),
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Mover(_) | Self::Launcher(_) => Retry::Backoff,
            Self::Run(error) => error.retry(),
        }
    }
}

/// Carries a run out. `stop` is what the controller says; what migrations and the VM's end say is watched here.
pub(super) async fn carry_out(
    config: &AgentConfig,
    client: &Client,
    work: &Work,
    status: &watch::Sender<RunStatus>,
    stop: watch::Receiver<Option<Stop>>,
) -> Ending {
    let namespace = work.backup.namespace().unwrap_or_default();
    let told = async {
        tokio::select! {
            stop = told(stop) => stop,
            stop = deadline(&work.assignment) => stop,
            stop = police::watch(client, &namespace, &work.backup.spec.source.name, work.assignment.launcher.as_ref()) => stop,
        }
    };
    let result = match &work.assignment.launcher {
        Some(launcher) => Box::pin(online(config, client, work, launcher, &namespace, status, told)).await,
        None => Box::pin(offline(config, client, work, &namespace, status, told)).await,
    };
    match result {
        Ok(backup) => {
            tracing::info!(id = %backup.record().id, "the backup is complete");
            Ending::Succeeded
        }
        Err(WorkError::Run(RunError::Stopped(stop))) => {
            tracing::info!(reason = stop.reason, "the backup was given up: {}", stop.message);
            Ending::Aborted { reason: stop.reason, message: stop.message }
        }
        Err(error) => {
            let message = report::chain_of(&error);
            tracing::warn!(reason = error.reason(), "the backup failed: {message}");
            let retryable = error.retry() != Retry::Terminal;
            Ending::Failed { reason: error.reason().to_owned(), message, retryable }
        }
    }
}

async fn told(mut stop: watch::Receiver<Option<Stop>>) -> Stop {
    loop {
        if let Some(stop) = stop.borrow_and_update().clone() {
            return stop;
        }
        if stop.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

async fn deadline(assignment: &Assignment) -> Stop {
    let Some(deadline) = &assignment.deadline else { return std::future::pending().await };
    let left = deadline.0.duration_since(jiff::Timestamp::now());
    sleep(Duration::try_from(left).unwrap_or_default()).await;
    Stop {
        reason: "DeadlineExceeded".into(),
        message: "the backup was not complete before its deadline (spec.deadline)".into(),
    }
}

async fn online(
    config: &AgentConfig,
    client: &Client,
    work: &Work,
    launcher: &LauncherReference,
    namespace: &str,
    status: &watch::Sender<RunStatus>,
    stop: impl Future<Output = Stop>,
) -> Result<CompleteBackup, WorkError> {
    let kubelet = KubeletDirectory::new(config.kubelet_directory.clone(), config.check_cgroups);
    let mut mover = connect_mover(&kubelet, &work.assignment.mover.uid).await?;
    let (mut connection, _socket) =
        connect_vm(config, &kubelet, &launcher.pod_uid, namespace, &work.backup.spec.source.name).await?;
    let _lock = connection.lock(LOCK_LIMIT).await?;
    clean_up(&mut connection).await?;
    let unsuitable = police::unsuitable_volumes(client, namespace, &work.backup.spec.source.name).await?;
    let request = request(work, unsuitable);
    Ok(backup(connection, &request, &mut mover, status, stop).await.map(|Finished { backup, .. }| backup)?)
}

/// What an earlier session left in the VM. Its bitmaps stay as they are: the next plan puts them in order by what the
/// target has, which this process cannot see.
pub(super) async fn clean_up(connection: &mut VmConnection) -> Result<Recovered, WorkError> {
    let (qmp, mut journal) = (connection.qmp().clone(), connection.journal());
    let recovered = recover(&qmp, &mut journal, connection.guest_agent(), async |_| None).await?;
    if !recovered.is_nothing() {
        tracing::warn!(?recovered, "cleaned up behind an earlier backup");
    }
    Ok(recovered)
}

async fn offline(
    config: &AgentConfig,
    client: &Client,
    work: &Work,
    namespace: &str,
    status: &watch::Sender<RunStatus>,
    stop: impl Future<Output = Stop>,
) -> Result<CompleteBackup, WorkError> {
    let kubelet = KubeletDirectory::new(config.kubelet_directory.clone(), config.check_cgroups);
    let mut mover = connect_mover(&kubelet, &work.assignment.mover.uid).await?;
    let request = OfflineRequest {
        vm: work.assignment.repository_vm.clone(),
        vm_uuid: Some(work.assignment.virtual_machine_uid.clone()),
        full: work.backup.spec.backup_type == BackupKind::Full,
        skipped: Vec::new(),
    };
    let vm = &work.backup.spec.source.name;
    let still_stopped = async || police::is_stopped(client, namespace, vm).await;
    let finished = offline_backup(&request, &mut mover, status, stop, still_stopped).await?;
    Ok(finished.backup)
}

fn request(work: &Work, unsuitable: Vec<SkippedDevice>) -> BackupRequest {
    let (spec, assignment, fleece_limit) = (&work.backup.spec, &work.assignment, work.fleece_limit);
    let volumes = spec.volumes.clone().unwrap_or_default();
    BackupRequest {
        vm: Some(assignment.repository_vm.clone()),
        vm_uuid: Some(assignment.virtual_machine_uid.clone()),
        backup_type: match spec.backup_type {
            BackupKind::Auto => BackupType::Auto,
            BackupKind::Full => BackupType::Full,
        },
        volumes: volumes.include,
        exclude_volumes: volumes.exclude,
        unsuitable,
        engine: None,
        quiesce: match spec.quiesce {
            QuiescePolicy::IfPossible => Wish::IfPossible,
            QuiescePolicy::Required => Wish::Required,
            QuiescePolicy::Never => Wish::Never,
        },
        fleece_limit,
        stall_timeout: STALL_TIMEOUT,
    }
}

/// The mover listens soon after its container runs, but not at once.
async fn connect_mover(kubelet: &KubeletDirectory, pod_uid: &str) -> Result<Mover, WorkError> {
    let deadline = Instant::now() + MOVER_LIMIT;
    loop {
        let connected = match kubelet.socket(pod_uid, SOCKET_VOLUME, SOCKET_NAME) {
            Ok(socket) => socket.connect().await,
            Err(error) => Err(error),
        };
        match connected {
            Ok(stream) => return Ok(Mover::new(Channel::new(stream))),
            Err(error @ KubeletError::Foreign { .. }) => return Err(WorkError::Mover(error)),
            Err(error) if Instant::now() > deadline => return Err(WorkError::Mover(error)),
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}

/// The VM by way of its launcher's libvirt. The socket is held as long as the connection may be made anew.
pub(super) async fn connect_vm(
    config: &AgentConfig,
    kubelet: &KubeletDirectory,
    launcher_uid: &str,
    namespace: &str,
    name: &str,
) -> Result<(VmConnection, PodSocket), WorkError> {
    let socket = kubelet.socket(launcher_uid, LIBVIRT_RUNTIME_VOLUME, LIBVIRT_SOCKET).map_err(WorkError::Launcher)?;
    // Whoever listens now listens for the connections to come, too: the inode is the same.
    drop(socket.connect().await.map_err(WorkError::Launcher)?);
    // KubeVirt's name of the domain (`pkg/virt-launcher/virtwrap/util`, `VMINamespaceKeyFunc`).
    let address = VmAddress::Libvirt { socket: socket.path(), domain: format!("{namespace}_{name}") };
    let connection = VmConnection::open(&address, &config.fleece_directory, Some(launcher_uid.to_owned())).await?;
    Ok((connection.with_fleece_owner(config.qemu_uid, &config.selinux_label), socket))
}
