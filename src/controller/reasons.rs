//! The stable words that conditions, status and Events use. Alerts and scripts match them: they are never renamed.

/// Of conditions, `status.reason` and aborts.
pub(super) mod reason {
    // What a backup waits for.
    pub(crate) const QUEUED: &str = "Queued";
    pub(crate) const VM_NOT_FOUND: &str = "VirtualMachineNotFound";
    pub(crate) const VM_STARTING: &str = "VirtualMachineStarting";
    pub(crate) const VM_STOPPING: &str = "VirtualMachineStopping";
    pub(crate) const VM_CRASHING: &str = "VirtualMachineCrashing";
    pub(crate) const VM_CHANGED: &str = "VirtualMachineChanged";
    pub(crate) const VM_UNREADABLE: &str = "VirtualMachineUnreadable";
    pub(crate) const NO_VOLUMES: &str = "NoVolumes";
    pub(crate) const MIGRATING: &str = "Migrating";
    pub(crate) const EVACUATING: &str = "Evacuating";
    pub(crate) const VOLUME_MIGRATION: &str = "VolumeMigration";
    pub(crate) const IN_TREE_BACKUP: &str = "InTreeBackupRunning";
    pub(crate) const REPOSITORY_NOT_FOUND: &str = "RepositoryNotFound";
    pub(crate) const REPOSITORY_NOT_ALLOWED: &str = "RepositoryNotAllowed";
    pub(crate) const REPOSITORY_NOT_READY: &str = "RepositoryNotReady";
    pub(crate) const ANOTHER_BACKUP: &str = "AnotherBackupRunning";
    pub(crate) const NODE_BUSY: &str = "NodeBusy";
    pub(crate) const REPOSITORY_BUSY: &str = "RepositoryBusy";
    pub(crate) const OLD_MOVER: &str = "OldMoverTerminating";
    // What it does.
    pub(crate) const MOVER_STARTING: &str = "MoverStarting";
    pub(crate) const MOVER_REFUSED: &str = "MoverRefused";
    pub(crate) const MOVER_REJECTED: &str = "MoverRejected";
    pub(crate) const AWAITING_AGENT: &str = "AwaitingAgent";
    pub(crate) const IN_PROGRESS: &str = "InProgress";
    pub(crate) const ABORTING: &str = "Aborting";
    pub(crate) const MOVER_SETTLING: &str = "MoverSettling";
    // How it, or an attempt, ended.
    pub(crate) const COMPLETED: &str = "Completed";
    pub(crate) const CANCELLED: &str = "Cancelled";
    pub(crate) const DELETED: &str = "Deleted";
    pub(crate) const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
    pub(crate) const LAUNCHER_TERMINATING: &str = "LauncherTerminating";
    pub(crate) const VM_STARTED: &str = "VirtualMachineStarted";
    pub(crate) const MOVER_NOT_STARTED: &str = "MoverNotStarted";
    pub(crate) const MOVER_LOST: &str = "MoverLost";
    pub(crate) const AGENT_NOT_RESPONDING: &str = "AgentNotResponding";
    pub(crate) const AGENT_LOST: &str = "AgentLost";
    pub(crate) const AGENT_RESTARTED: &str = "AgentRestarted";
    pub(crate) const ASSIGNMENT_WITHDRAWN: &str = "AssignmentWithdrawn";
    pub(crate) const FROZEN: &str = "Frozen";
    pub(crate) const NOT_FROZEN: &str = "NotFrozen";
    // Repositories.
    pub(crate) const PROBING: &str = "Probing";
    pub(crate) const READY: &str = "Ready";
    pub(crate) const REACHED: &str = "Reached";
    pub(crate) const PROBE_FAILED: &str = "ProbeFailed";
    pub(crate) const DAMAGED_BACKUPS: &str = "DamagedBackups";
}

/// Of Events.
pub(super) mod event {
    pub(crate) const STARTED: &str = "BackupStarted";
    pub(crate) const RUNNING: &str = "BackupRunning";
    pub(crate) const COMPLETED: &str = "BackupCompleted";
    pub(crate) const FAILED: &str = "BackupFailed";
    pub(crate) const RETRIED: &str = "BackupRetried";
    pub(crate) const ABORTED: &str = "BackupAborted";
    pub(crate) const MOVER_CREATED: &str = "MoverCreated";
    pub(crate) const MOVER_REFUSED: &str = "MoverRefused";
    pub(crate) const DEFINITION_OMITTED: &str = "DefinitionOmitted";
    pub(crate) const FORGOTTEN: &str = "BackupForgotten";
    pub(crate) const FORGET_FAILED: &str = "ForgetFailed";
    pub(crate) const FORGET_SKIPPED: &str = "ForgetSkipped";
    pub(crate) const REPOSITORY_READY: &str = "RepositoryReady";
    pub(crate) const REPOSITORY_NOT_READY: &str = "RepositoryNotReady";
}
