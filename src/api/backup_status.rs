//! `VirtualMachineBackup`: what became of it.

use super::Condition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// What became of a backup. The controller writes all of it but `run`, which is the agent's.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineBackupStatus {
    /// Generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// A summary in one word; conditions tell more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<BackupPhase>,
    /// Why it waits or failed: a stable word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why it waits or failed, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Part of the bytes to read that were read, such as "42%".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// Full when a volume was read as a whole, Incremental otherwise.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub backup_type: Option<RunType>,
    /// Bytes that this backup added to its target, such as "734Mi".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<String>,
    /// The instant from which all volumes are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point_in_time: Option<Time>,
    /// Id of the backup in its repository or directory, once it is complete: for `virt-fleece restore --backup`.
    #[serde(default, rename = "backupID", skip_serializing_if = "Option::is_none")]
    pub backup_id: Option<String>,
    /// Name of the VM at its target, for `virt-fleece restore --vm`: NAMESPACE/NAME in a repository, NAMESPACE.NAME in a
    /// directory of images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository_vm: Option<String>,
    /// When it was complete or had failed for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Attempts that were begun, from 1. One that was cut short by a migration, say, is followed by another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts: Option<i64>,
    /// Attempts that failed by themselves; those that a migration cut short, say, do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failures: Option<i64>,
    /// The last attempt is over; no further one before this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<Time>,
    /// Ready, Reconciling, Stalled, Complete, Failed, Quiesced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The node whose agent has something to do for this backup; not there when it is done. Agents select by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_node: Option<String>,
    /// What the controller wants of the agent on a node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Assignment>,
    /// What that agent did. Written by it alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<Run>,
}

/// A backup in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub enum BackupPhase {
    /// It waits; `reason` says for what.
    Pending,
    /// A mover is being started.
    Preparing,
    /// The agent is at work.
    Running,
    /// Complete and durable.
    Completed,
    /// Failed for good.
    Failed,
}

impl BackupPhase {
    /// Nothing follows.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed)
    }
}

/// What was read of a backup, or of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum RunType {
    /// Everything.
    Full,
    /// What had changed.
    Incremental,
}

/// An order to the agent of one node. It is carried out once: a later attempt is another order.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Assignment {
    /// Number of the attempt, from 1.
    pub attempt: i64,
    /// The node whose agent does it.
    pub node_name: String,
    /// UID of the VirtualMachine: a new VM of the same name is another one.
    #[serde(rename = "virtualMachineUID")]
    pub virtual_machine_uid: String,
    /// Name of the VM at its target: `NAMESPACE/NAME` in a repository, `NAMESPACE.NAME` in a directory of images.
    pub repository_vm: String,
    /// The running VM; none when it is stopped, and the mover reads its claims.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launcher: Option<LauncherReference>,
    /// The pod that stores the data.
    pub mover: PodReference,
    /// When the order was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assigned: Option<Time>,
    /// The agent gives up by itself at this time, API server or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Time>,
    /// Present: the agent undoes everything and reports `Aborted`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<Abort>,
}

/// The pod that runs a VM.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LauncherReference {
    /// UID of the VirtualMachineInstance.
    #[serde(rename = "instanceUID")]
    pub instance_uid: String,
    /// Its virt-launcher pod, in the namespace of the backup.
    pub pod_name: String,
    /// UID of that pod.
    #[serde(rename = "podUID")]
    pub pod_uid: String,
}

/// A pod, by all that identifies it.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodReference {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

/// Why a run is to be given up.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Abort {
    /// Stable word.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// What the agent did.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Run {
    /// The attempt that this is about.
    pub attempt: i64,
    /// The process that claimed it.
    pub agent: AgentClaim,
    /// How far it is.
    pub state: RunState,
    /// Why it failed or was aborted: a stable word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Failed: whether another attempt makes sense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retryable: Option<bool>,
    /// Part of the bytes to read that were read, such as "42%".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// The instant from which all volumes are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point_in_time: Option<Time>,
    /// How long QEMU took to make the point in time, such as "2.5ms".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<String>,
    /// What became of freezing the guest's file systems.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesce: Option<RunQuiesce>,
    /// How the point in time was made: job or filter; `offline` for a stopped VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// Why this engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_reason: Option<String>,
    /// Version of the QEMU that runs the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu_version: Option<String>,
    /// Where the backup stands among those of the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<Chain>,
    /// Id of the backup at its target; it is there when the state is `Succeeded`.
    #[serde(default, rename = "backupID", skip_serializing_if = "Option::is_none")]
    pub backup_id: Option<String>,
    /// The volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub volumes: Vec<RunVolume>,
    /// Devices that are not backed up, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub skipped: Vec<SkippedDevice>,
    /// When the agent wrote this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated: Option<Time>,
}

/// Who claimed a run.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentClaim {
    /// The agent's process: random at each start, so that a restarted one knows what is not its own.
    pub instance: String,
    /// Its node.
    pub node_name: String,
    /// When it claimed the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claimed: Option<Time>,
}

/// How far a run is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum RunState {
    /// Taken.
    #[default]
    Claimed,
    /// Fleeces and mover are made ready; nothing is in the way of the VM yet.
    Preparing,
    /// The point in time is made, and is being read.
    Reading,
    /// Everything was read; the target is making it durable.
    Committing,
    /// Complete and durable.
    Succeeded,
    /// It failed; the VM is as it was before.
    Failed,
    /// It was given up because the controller, a migration or the end of the VM asked for it.
    Aborted,
}

impl RunState {
    /// Nothing follows.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Aborted)
    }
}

/// What became of freezing.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunQuiesce {
    /// Whether the file systems were frozen at the point in time.
    pub frozen: bool,
    /// How long, such as "46ms".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,
    /// How many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_systems: Option<i64>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Where a backup stands.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Chain {
    /// Line of the dirty bitmaps: the same for all backups of the VM at this target.
    pub bitmap_line: String,
    /// Number among the backups of the VM, from 1.
    pub sequence: i64,
    /// The backup before this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
}

/// A volume of a run. Sizes are in bytes.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunVolume {
    /// Its name in the VM's spec.
    pub name: String,
    /// Size of the disk.
    pub virtual_bytes: i64,
    /// Full or Incremental.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub run_type: Option<RunType>,
    /// Why it is read as a whole: a stable word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_reason: Option<String>,
    /// What counts as changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_bytes: Option<i64>,
    /// What was read so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bytes: Option<i64>,
    /// What has to be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<i64>,
    /// Data that the target did not have, before compression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_bytes: Option<i64>,
    /// What was stored for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<i64>,
}

/// A device that is not backed up.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SkippedDevice {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}
