//! KubeVirt's objects, as far as we read them (`kubevirt.io/v1`, KubeVirt 1.3 to 1.9, `staging/src/kubevirt.io/api/core/v1`).
//!
//! Read only, and untrusted: a field that is missing or strange makes a backup wait or fail, never panic. Unknown fields
//! are ignored; the objects that go into a backup as a whole are fetched as `DynamicObject` instead.

mod claims;

pub use claims::{ClaimedVolume, SkippedVolume, claimed_volumes};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// API group of KubeVirt.
pub const GROUP: &str = "kubevirt.io";
/// `apiVersion` of the objects here.
pub const API_VERSION: &str = "kubevirt.io/v1";
/// Label of launcher pods: UID of the VMI (`api/core/v1/types.go`, `CreatedByLabel`).
pub const LABEL_CREATED_BY: &str = "kubevirt.io/created-by";
/// Label of launcher pods: name of the VMI where that fits into a label (`VirtualMachineNameLabel`).
pub const LABEL_VM_NAME: &str = "vm.kubevirt.io/name";
/// Volume of launcher pods that holds libvirt's sockets (`pkg/virt-controller/services/template.go`).
pub const LIBVIRT_RUNTIME_VOLUME: &str = "libvirt-runtime";
/// Socket in it.
pub const LIBVIRT_SOCKET: &str = "virtqemud-sock";
/// User that runs QEMU where the VM is not root (`pkg/util/util.go`, `NonRootUID`).
pub const QEMU_UID: u32 = 107;

/// Makes `Resource` of a partial type.
macro_rules! resource {
    ($type:ident, $kind:literal, $plural:literal) => {
        impl kube::Resource for $type {
            type DynamicType = ();
            type Scope = kube::core::NamespaceResourceScope;

            fn kind((): &()) -> std::borrow::Cow<'_, str> {
                $kind.into()
            }

            fn group((): &()) -> std::borrow::Cow<'_, str> {
                GROUP.into()
            }

            fn version((): &()) -> std::borrow::Cow<'_, str> {
                "v1".into()
            }

            fn plural((): &()) -> std::borrow::Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

/// A virtual machine, running or not.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VirtualMachine {
    /// Metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What it should be.
    #[serde(default)]
    pub spec: VirtualMachineSpec,
    /// What it is.
    #[serde(default)]
    pub status: Option<VirtualMachineStatus>,
}

resource!(VirtualMachine, "VirtualMachine", "virtualmachines");

/// What a virtual machine should be.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineSpec {
    /// `Always`, `Halted`, `Manual`, `RerunOnFailure`, `Once`, `WaitAsReceiver`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_strategy: Option<String>,
    /// Older form of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<bool>,
    /// Of its instances.
    #[serde(default)]
    pub template: VirtualMachineInstanceTemplate,
    /// Size, from an instance type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instancetype: Option<MatcherReference>,
    /// Defaults, from a preference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<MatcherReference>,
}

/// An instance type or a preference.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MatcherReference {
    /// Kind, in one of several spellings; none: the cluster's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Name.
    #[serde(default)]
    pub name: String,
    /// `ControllerRevision` that fixes what it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision_name: Option<String>,
}

/// Template of instances.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VirtualMachineInstanceTemplate {
    /// What they should be.
    #[serde(default)]
    pub spec: VirtualMachineInstanceSpec,
}

/// What a virtual machine is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineStatus {
    /// A summary, such as `Running`, `Stopped`, `CrashLoopBackOff`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub printable_status: Option<String>,
    /// An instance exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<bool>,
}

/// A running virtual machine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VirtualMachineInstance {
    /// Metadata; the owner is the VM.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What it should be.
    #[serde(default)]
    pub spec: VirtualMachineInstanceSpec,
    /// What it is.
    #[serde(default)]
    pub status: Option<VirtualMachineInstanceStatus>,
}

resource!(VirtualMachineInstance, "VirtualMachineInstance", "virtualmachineinstances");

/// What a running virtual machine should be.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineInstanceSpec {
    /// Its hardware.
    #[serde(default)]
    pub domain: Domain,
    /// Where the disks' data is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
}

/// Hardware.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Domain {
    /// Devices.
    #[serde(default)]
    pub devices: Devices,
}

/// Devices.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Devices {
    /// Disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
}

/// A disk. It is a `disk` unless it says that it is something else.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Disk {
    /// Name of the volume.
    #[serde(default)]
    pub name: String,
    /// It is a CD-ROM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdrom: Option<serde_json::Value>,
    /// It is a device that the guest speaks SCSI with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lun: Option<serde_json::Value>,
    /// Several VMs use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shareable: Option<bool>,
}

/// Where the data of a disk is. One of many fields is set; those that we know are here.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// Name.
    #[serde(default)]
    pub name: String,
    /// A claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimSource>,
    /// A claim of the same name, made by CDI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_volume: Option<DataVolumeSource>,
    /// What else it is, by the name of the field.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// A claim.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClaimSource {
    /// Its name.
    #[serde(default)]
    pub claim_name: String,
}

/// A data volume.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DataVolumeSource {
    /// Its name, and that of its claim.
    #[serde(default)]
    pub name: String,
}

/// What a running virtual machine is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineInstanceStatus {
    /// `Pending`, `Scheduling`, `Scheduled`, `Running`, `Succeeded`, `Failed`, `Unknown`, `WaitingForSync`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Launcher pods by UID, with their nodes: two while it migrates.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub active_pods: BTreeMap<String, String>,
    /// A migration, running or past.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_state: Option<MigrationState>,
    /// The node that it is to leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evacuation_node_name: Option<String>,
    /// Volumes whose storage is being replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migrated_volumes: Option<Vec<serde_json::Value>>,
    /// KubeVirt's own backups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_block_tracking: Option<ChangedBlockTracking>,
    /// Conditions, such as `Paused`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<InstanceCondition>,
}

/// A migration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MigrationState {
    /// It has begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timestamp: Option<Time>,
    /// It is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_timestamp: Option<Time>,
    /// It is over, well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed: Option<bool>,
    /// It is over, badly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<bool>,
}

/// KubeVirt's own incremental backup.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChangedBlockTracking {
    /// A backup that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup_status: Option<InTreeBackup>,
}

/// A backup of KubeVirt's own.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InTreeBackup {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup_name: Option<String>,
    /// It is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed: Option<bool>,
}

/// A condition of an instance (older than `metav1.Condition`).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct InstanceCondition {
    /// Kind.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// `True`, `False`, `Unknown`.
    #[serde(default)]
    pub status: String,
}

/// A wish to migrate an instance.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VirtualMachineInstanceMigration {
    /// Metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What is wished.
    #[serde(default)]
    pub spec: MigrationSpec,
    /// How far it is.
    #[serde(default)]
    pub status: Option<MigrationStatus>,
}

resource!(VirtualMachineInstanceMigration, "VirtualMachineInstanceMigration", "virtualmachineinstancemigrations");

/// What is wished.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MigrationSpec {
    /// The instance.
    #[serde(default)]
    pub vmi_name: String,
}

/// How far a migration is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MigrationStatus {
    /// `Pending`, `Scheduling`, …, `Succeeded`, `Failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
}

impl VirtualMachineInstanceMigration {
    /// It is not over.
    pub fn is_active(&self) -> bool {
        let phase = self.status.as_ref().and_then(|status| status.phase.as_deref());
        !matches!(phase, Some("Succeeded" | "Failed"))
    }
}

impl VirtualMachineInstance {
    /// It is being migrated, by its own account.
    pub fn is_migrating(&self) -> bool {
        let state = self.status.as_ref().and_then(|status| status.migration_state.as_ref());
        state.is_some_and(|state| {
            state.end_timestamp.is_none() && state.completed != Some(true) && state.failed != Some(true)
        })
    }

    /// The name of KubeVirt's own backup that runs.
    pub fn in_tree_backup(&self) -> Option<&str> {
        let backup = self.status.as_ref()?.changed_block_tracking.as_ref()?.backup_status.as_ref()?;
        (backup.completed != Some(true)).then(|| backup.backup_name.as_deref().unwrap_or("of unknown name"))
    }

    /// Whether a condition is true.
    pub fn has_condition(&self, kind: &str) -> bool {
        let conditions = self.status.iter().flat_map(|status| &status.conditions);
        conditions.into_iter().any(|condition| condition.kind == kind && condition.status == "True")
    }

    /// UID of the launcher pod on the node that runs it: the one of `activePods` there, since the map has the target's
    /// as well while it migrates.
    pub fn launcher_uid(&self) -> Option<&str> {
        let status = self.status.as_ref()?;
        let node = status.node_name.as_ref()?;
        let mut here = status.active_pods.iter().filter(|(_, on)| *on == node);
        match (here.next(), here.next()) {
            (Some((uid, _)), None) => Some(uid),
            _ => None,
        }
    }
}
