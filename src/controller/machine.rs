//! What a VM's state means for a backup: where it runs, or what is in the way. Pure.

use super::reasons::reason;
use crate::kubevirt::{VirtualMachine, VirtualMachineInstance, claimed_volumes};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Annotation that the watch puts on objects, in memory only, that could not be read.
pub(super) const UNREADABLE: &str = "virtfleece.io/unreadable";

/// What is known of a VM.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Machine<'a> {
    /// The VM.
    pub(super) vm: Option<&'a VirtualMachine>,
    /// Its instance.
    pub(super) instance: Option<&'a VirtualMachineInstance>,
    /// A migration of the instance that is not over.
    pub(super) migration: Option<&'a str>,
}

/// Where a backup can be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// In the running VM.
    Running {
        /// Its node.
        node: String,
        /// UID of the VM.
        vm_uid: String,
        /// UID of the instance.
        instance_uid: String,
        /// UID of the launcher pod.
        launcher_uid: String,
    },
    /// From the claims of the stopped VM.
    Stopped {
        /// UID of the VM.
        vm_uid: String,
    },
}

impl Place {
    /// UID of the VM.
    pub(super) fn vm_uid(&self) -> &str {
        match self {
            Self::Running { vm_uid, .. } | Self::Stopped { vm_uid } => vm_uid,
        }
    }

    /// The node, where it has to be a certain one.
    pub(super) fn node(&self) -> Option<&str> {
        match self {
            Self::Running { node, .. } => Some(node),
            Self::Stopped { .. } => None,
        }
    }
}

/// What is in the way of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Obstacle {
    /// Stable word.
    pub(super) reason: &'static str,
    /// For people: what, and the way out.
    pub(super) message: String,
    /// It does not go away by itself: the backup fails once it is not new any more.
    pub(super) lasting: bool,
}

impl Obstacle {
    pub(super) fn passing(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), lasting: false }
    }

    pub(super) fn lasting(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), lasting: true }
    }
}

fn uid(metadata: &ObjectMeta) -> String {
    metadata.uid.clone().unwrap_or_default()
}

fn unreadable(metadata: &ObjectMeta) -> Option<&str> {
    metadata.annotations.as_ref()?.get(UNREADABLE).map(String::as_str)
}

/// Where a VM of this name can be backed up now.
pub(super) fn place(name: &str, machine: &Machine<'_>) -> Result<Place, Obstacle> {
    let Some(vm) = machine.vm else {
        let message = format!("there is no VirtualMachine {name} in this namespace: create it, or delete this backup");
        return Err(Obstacle::lasting(reason::VM_NOT_FOUND, message));
    };
    if let Some(error) = unreadable(&vm.metadata).or(machine.instance.and_then(|vmi| unreadable(&vmi.metadata))) {
        let message = format!("the VirtualMachine {name} or its instance cannot be understood: {error}");
        return Err(Obstacle::passing(reason::VM_UNREADABLE, message));
    }
    if vm.metadata.deletion_timestamp.is_some() {
        let message = format!("the VirtualMachine {name} is being deleted");
        return Err(Obstacle::lasting(reason::VM_NOT_FOUND, message));
    }
    match machine.instance {
        None => stopped(name, vm),
        Some(instance) => running(name, vm, instance, machine.migration),
    }
}

fn stopped(name: &str, vm: &VirtualMachine) -> Result<Place, Obstacle> {
    let status = vm.status.as_ref();
    let printable = status.and_then(|status| status.printable_status.as_deref()).unwrap_or("");
    if matches!(printable, "CrashLoopBackOff") {
        let message = format!("the VirtualMachine {name} crashes: see `kubectl describe vm {name}`, or stop it");
        return Err(Obstacle::passing(reason::VM_CRASHING, message));
    }
    let created = status.is_some_and(|status| status.created == Some(true));
    if created || !matches!(printable, "Stopped" | "") || status.is_none() {
        let message = format!("the VirtualMachine {name} has no instance yet ({printable})");
        return Err(Obstacle::passing(reason::VM_STARTING, message));
    }
    Ok(Place::Stopped { vm_uid: uid(&vm.metadata) })
}

fn running(
    name: &str,
    vm: &VirtualMachine,
    instance: &VirtualMachineInstance,
    migration: Option<&str>,
) -> Result<Place, Obstacle> {
    let vm_uid = uid(&vm.metadata);
    let owners = instance.metadata.owner_references.iter().flatten();
    if !owners.clone().any(|owner| owner.uid == vm_uid) {
        let message = format!("the VirtualMachineInstance {name} does not belong to the VirtualMachine {name}");
        return Err(Obstacle::passing(reason::VM_STARTING, message));
    }
    let status = instance.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
    if instance.metadata.deletion_timestamp.is_some() || matches!(phase, "Succeeded" | "Failed") {
        let message = format!("the VirtualMachine {name} is being stopped");
        return Err(Obstacle::passing(reason::VM_STOPPING, message));
    }
    if phase != "Running" {
        let message = format!("the VirtualMachine {name} is starting ({phase})");
        return Err(Obstacle::passing(reason::VM_STARTING, message));
    }
    if let Some(migration) = migration {
        let message =
            format!("the VirtualMachine {name} is being migrated (VirtualMachineInstanceMigration {migration})");
        return Err(Obstacle::passing(reason::MIGRATING, message));
    }
    if instance.is_migrating() {
        return Err(Obstacle::passing(reason::MIGRATING, format!("the VirtualMachine {name} is being migrated")));
    }
    let node = status.and_then(|status| status.node_name.clone()).unwrap_or_default();
    let evacuated = status.and_then(|status| status.evacuation_node_name.as_deref()).unwrap_or("");
    if !evacuated.is_empty() {
        let message = format!("the VirtualMachine {name} is to leave node {evacuated}");
        return Err(Obstacle::passing(reason::EVACUATING, message));
    }
    let migrated = status.and_then(|status| status.migrated_volumes.as_ref());
    if migrated.is_some_and(|volumes| !volumes.is_empty()) || instance.has_condition("VolumesChange") {
        let message = format!("volumes of the VirtualMachine {name} are being moved to other storage");
        return Err(Obstacle::passing(reason::VOLUME_MIGRATION, message));
    }
    if let Some(backup) = instance.in_tree_backup() {
        let message = format!("KubeVirt's own backup {backup} of the VirtualMachine {name} is running");
        return Err(Obstacle::passing(reason::IN_TREE_BACKUP, message));
    }
    match instance.launcher_uid() {
        Some(launcher) if !node.is_empty() => Ok(Place::Running {
            node,
            vm_uid,
            instance_uid: uid(&instance.metadata),
            launcher_uid: launcher.to_owned(),
        }),
        _ => {
            let message = format!("the VirtualMachine {name} has no launcher pod on its node, or more than one");
            Err(Obstacle::passing(reason::VM_STARTING, message))
        }
    }
}

/// Whether a stopped VM has anything to back up, of the volumes that are asked for.
pub(super) fn offline_claims(
    vm: &VirtualMachine,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<crate::kubevirt::ClaimedVolume>, Obstacle> {
    let (mut claimed, _) = claimed_volumes(&vm.spec.template.spec);
    claimed.retain(|volume| wanted(&volume.name));
    if claimed.is_empty() {
        let message = "no volume that is asked for can be backed up: see spec.volumes, and the VM's disks on claims";
        return Err(Obstacle::lasting(reason::NO_VOLUMES, message));
    }
    Ok(claimed)
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "tables read better so")]
pub(super) mod samples {
    //! A VM that can be backed up.

    use super::*;
    use serde_json::{Value, json};

    pub(in crate::controller) fn vm(status: Value) -> VirtualMachine {
        serde_json::from_value(json!({"metadata": {"name": "web", "uid": "vm-uid"}, "status": status})).unwrap()
    }

    /// A running instance on `node-a`, with changes to its status.
    pub(in crate::controller) fn instance(changes: &Value) -> VirtualMachineInstance {
        let mut status = json!({"phase": "Running", "nodeName": "node-a", "activePods": {"pod-uid": "node-a"}});
        for (key, value) in changes.as_object().unwrap() {
            status[key] = value.clone();
        }
        serde_json::from_value(json!({
            "metadata": {"name": "web", "uid": "vmi-uid", "ownerReferences":
                [{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": "web", "uid": "vm-uid"}]},
            "status": status,
        }))
        .unwrap()
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "tables read better so")]
mod tests {
    use super::{samples::*, *};
    use serde_json::json;

    fn of(vm: Option<VirtualMachine>, instance: Option<VirtualMachineInstance>, migration: Option<&str>) -> String {
        let machine = Machine { vm: vm.as_ref(), instance: instance.as_ref(), migration };
        match place("web", &machine) {
            Ok(Place::Running { node, .. }) => format!("runs on {node}"),
            Ok(Place::Stopped { .. }) => "stopped".into(),
            Err(obstacle) => format!("{}{}", obstacle.reason, if obstacle.lasting { "!" } else { "" }),
        }
    }

    #[test]
    fn vms_without_an_instance() {
        let cases = [
            (json!({"printableStatus": "Stopped"}), "stopped"),
            (json!({}), "stopped"),
            (json!({"printableStatus": "Starting"}), "VirtualMachineStarting"),
            (json!({"printableStatus": "Stopped", "created": true}), "VirtualMachineStarting"),
            (json!({"printableStatus": "CrashLoopBackOff"}), "VirtualMachineCrashing"),
            (json!({"printableStatus": "Provisioning"}), "VirtualMachineStarting"),
            (json!(null), "VirtualMachineStarting"),
        ];
        for (status, expected) in cases {
            assert_eq!(of(Some(vm(status.clone())), None, None), expected, "{status}");
        }
        assert_eq!(of(None, None, None), "VirtualMachineNotFound!");
        let mut deleted = vm(json!({}));
        deleted.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH));
        assert_eq!(of(Some(deleted), None, None), "VirtualMachineNotFound!");
    }

    #[test]
    fn states_of_instances() {
        let cases = [
            (json!({}), "runs on node-a"),
            (json!({"conditions": [{"type": "Paused", "status": "True"}]}), "runs on node-a"),
            (json!({"phase": "Scheduling"}), "VirtualMachineStarting"),
            (json!({"phase": null}), "VirtualMachineStarting"),
            (json!({"phase": "Succeeded"}), "VirtualMachineStopping"),
            (json!({"phase": "Failed"}), "VirtualMachineStopping"),
            (json!({"activePods": {}}), "VirtualMachineStarting"),
            (json!({"activePods": {"a": "node-a", "b": "node-a"}}), "VirtualMachineStarting"),
            (json!({"activePods": {"a": "node-a", "b": "node-b"}}), "runs on node-a"),
            (json!({"nodeName": null}), "VirtualMachineStarting"),
            (json!({"migrationState": {"startTimestamp": "2026-01-01T00:00:00Z"}}), "Migrating"),
            (json!({"migrationState": {"completed": true}}), "runs on node-a"),
            (json!({"evacuationNodeName": "node-a"}), "Evacuating"),
            (json!({"evacuationNodeName": ""}), "runs on node-a"),
            (json!({"migratedVolumes": [{"volumeName": "x"}]}), "VolumeMigration"),
            (json!({"migratedVolumes": []}), "runs on node-a"),
            (json!({"conditions": [{"type": "VolumesChange", "status": "True"}]}), "VolumeMigration"),
            (json!({"changedBlockTracking": {"backupStatus": {"backupName": "b"}}}), "InTreeBackupRunning"),
            (json!({"changedBlockTracking": {"backupStatus": {"completed": true}}}), "runs on node-a"),
        ];
        for (changes, expected) in cases {
            assert_eq!(of(Some(vm(json!({}))), Some(instance(&changes)), None), expected, "{changes}");
        }
        assert_eq!(of(Some(vm(json!({}))), Some(instance(&json!({}))), Some("m")), "Migrating");
        let mut foreign = instance(&json!({}));
        foreign.metadata.owner_references = None;
        assert_eq!(of(Some(vm(json!({}))), Some(foreign), None), "VirtualMachineStarting");
        let mut strange = instance(&json!({}));
        strange.metadata.annotations = Some([(UNREADABLE.into(), "x".into())].into());
        assert_eq!(of(Some(vm(json!({}))), Some(strange), None), "VirtualMachineUnreadable");
    }
}
