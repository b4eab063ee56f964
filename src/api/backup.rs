//! `VirtualMachineBackup`: what a user asks for.

use super::VirtualMachineBackupStatus;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// One backup of one virtual machine, made once. The VM goes on running and does not notice.
///
/// KubeVirt has a kind of the same name in another group: use the short name `vfb`, or the full one,
/// `virtualmachinebackups.virtfleece.io`.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "virtfleece.io",
    version = "v1alpha1",
    kind = "VirtualMachineBackup",
    plural = "virtualmachinebackups",
    namespaced,
    status = "VirtualMachineBackupStatus",
    shortname = "vfb",
    category = "virtfleece",
    derive = "PartialEq",
    doc = "One backup of one virtual machine, made once, while it runs: an exact point in time of all its disks.",
    selectable = ".spec.source.name",
    selectable = ".status.activeNode",
    validation = Rule::new("self.metadata.name.size() <= 200").message("the name may have at most 200 characters: the pods of the backup are named after it"),
    printcolumn(name = "VM", type_ = "string", json_path = ".spec.source.name", description = "Virtual machine"),
    printcolumn(name = "Type", type_ = "string", json_path = ".status.type", description = "Full or Incremental"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase", description = "Pending, Preparing, Running, Completed or Failed"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress", description = "Part of the bytes to read that were read"),
    printcolumn(name = "Stored", type_ = "string", json_path = ".status.stored", description = "Bytes that this backup added to its target"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", priority = 1, description = "Why it waits or failed"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.assignment.nodeName", priority = 1, description = "Node on which the VM was backed up"),
    printcolumn(name = "Engine", type_ = "string", json_path = ".status.run.engine", priority = 1, description = "How the point in time was made"),
    printcolumn(name = "PIT", type_ = "date", json_path = ".status.pointInTime", priority = 1, description = "The point in time"),
    printcolumn(name = "Chain", type_ = "integer", json_path = ".status.run.chain.sequence", priority = 1, description = "Number of the backup among those of the VM"),
    printcolumn(name = "Pause", type_ = "string", json_path = ".status.run.pause", priority = 1, description = "How long the point in time took to make")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.repositoryRef) != has(self.target)")
        .message("name where the backup goes: either repositoryRef or target"),
    validation = Rule::new("self.source == oldSelf.source && self.type == oldSelf.type && self.quiesce == oldSelf.quiesce && has(self.repositoryRef) == has(oldSelf.repositoryRef) && (!has(self.repositoryRef) || self.repositoryRef == oldSelf.repositoryRef) && has(self.target) == has(oldSelf.target) && (!has(self.target) || self.target == oldSelf.target) && has(self.volumes) == has(oldSelf.volumes) && (!has(self.volumes) || self.volumes == oldSelf.volumes) && has(self.deadline) == has(oldSelf.deadline) && (!has(self.deadline) || self.deadline == oldSelf.deadline)")
        .message("a backup is made once: all but cancel and deletionPolicy is fixed; create another VirtualMachineBackup"),
    validation = Rule::new("!oldSelf.cancel || self.cancel").message("a cancelled backup stays cancelled; create another one"),
)]
pub struct VirtualMachineBackupSpec {
    /// The virtual machine to back up, in the namespace of this object.
    pub source: BackupSource,
    /// The repository that takes the backup: deduplicated, compressed, encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repository_ref: Option<RepositoryReference>,
    /// A volume that takes the backup as qcow2 images, readable by qemu-img alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<BackupTarget>,
    /// Auto reads what changed since the newest backup where that is known, and everything where it is not. Full reads
    /// everything, and stores again whatever the repository has lost.
    #[serde(default, rename = "type")]
    pub backup_type: BackupKind,
    /// Which of the VM's volumes; without it all that can be backed up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volumes: Option<VolumeSelection>,
    /// Whether the guest's file systems are frozen at the point in time, by the guest agent.
    #[serde(default)]
    pub quiesce: QuiescePolicy,
    /// Gives the backup up. The VM is left as it was before.
    #[serde(default)]
    pub cancel: bool,
    /// The backup fails when it is not complete so long after its creation, such as "2h" or "45m".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("duration(self) > duration('0s')").message("a duration greater than zero, such as 2h or 45m"))]
    #[schemars(length(max = 32))]
    pub deadline: Option<String>,
    /// What becomes of the stored data when this object is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// What is backed up.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackupSource {
    /// Name of the VirtualMachine.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// A repository.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RepositoryReference {
    /// BackupRepository (in the namespace of this object) or ClusterBackupRepository.
    #[serde(default)]
    pub kind: RepositoryKind,
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Kind of a repository.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub enum RepositoryKind {
    /// In the namespace.
    #[default]
    BackupRepository,
    /// Of the cluster's administrator.
    ClusterBackupRepository,
}

/// Where qcow2 images go.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackupTarget {
    /// A claim with a file system, in the namespace of this object.
    pub persistent_volume_claim: ClaimTarget,
    /// Compresses with zstd.
    #[serde(default)]
    pub compress: bool,
}

/// A claim.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClaimTarget {
    /// Name of the PersistentVolumeClaim.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
}

/// What is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum BackupKind {
    /// What changed, where that is known.
    #[default]
    Auto,
    /// Everything.
    Full,
}

/// A choice of volumes, by their names in the VM's spec.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSelection {
    /// Only these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128))]
    pub include: Vec<String>,
    /// Not these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128))]
    pub exclude: Vec<String>,
}

/// Freezing the guest's file systems.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum QuiescePolicy {
    /// Where a guest agent answers; crash-consistent otherwise, with the condition Quiesced telling why.
    #[default]
    IfPossible,
    /// No backup without it.
    Required,
    /// Crash-consistent.
    Never,
}

/// What becomes of stored data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum DeletionPolicy {
    /// It stays in the repository.
    #[default]
    Retain,
    /// It is forgotten; the next prune of the repository frees what nobody else needs.
    Delete,
}
