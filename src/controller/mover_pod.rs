//! The pods that move data. Pure: what goes into the pod, and nothing else.
//!
//! They satisfy the restricted Pod Security Standard, have no token, and get secrets by reference only. The user is
//! QEMU's (107 in KubeVirt), so that what an agent hands over and what claims hold may be read.

use super::{
    names,
    target::{CA_DIRECTORY, PASSPHRASE_DIRECTORY, REPOSITORY_PATH, SECRET_FILE, TARGET_PATH, Target},
};
use crate::{
    api::{ANNOTATION_BACKUP, LABEL_BACKUP, LABEL_COMPONENT, LABEL_VM},
    kubevirt::QEMU_UID,
    mover::config::{MOVER_CONFIG, MoverConfig, MoverTask, OfflineVolume, SOCKET_NAME, SOCKET_VOLUME},
};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Map, Value, json};

/// Value of the component label.
pub(super) const COMPONENT: &str = "mover";
/// Label with the name of the program.
pub(super) const LABEL_NAME: &str = "app.kubernetes.io/name";
/// Label with who made it.
pub(super) const LABEL_MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Value of the name label.
pub(super) const NAME: &str = "virt-fleece";
/// Annotation of a probe's pod: `KIND/NAMESPACE/NAME` of the repository.
pub(super) const ANNOTATION_REPOSITORY: &str = "virtfleece.io/repository";
/// Annotation with the definition of the VM.
const ANNOTATION_DEFINITION: &str = "virtfleece.io/vm-definition";
/// Name of the mover's container.
pub(super) const CONTAINER: &str = "mover";

const SOCKET_DIRECTORY: &str = "/run/virt-fleece-mover";
const DEFINITION_DIRECTORY: &str = "/run/virt-fleece/definition";
const DEFINITION_FILE: &str = "vm.json";
const DISKS_DIRECTORY: &str = "/disks";
/// A mover ends when no agent comes for so long: longer than the controller waits for one.
const WAIT_SECONDS: u64 = 300;

/// What all movers of an operator have in common.
#[derive(Debug, Clone, Default)]
pub(super) struct MoverImage {
    /// The image.
    pub(super) image: String,
    /// `Always`, `IfNotPresent`, `Never`.
    pub(super) pull_policy: Option<String>,
    /// Names of pull secrets, in the pod's namespace.
    pub(super) pull_secrets: Vec<String>,
}

/// A claim of a stopped VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OfflineClaim {
    /// Name of the volume.
    pub(super) volume: String,
    /// Name of the claim.
    pub(super) claim: String,
    /// It is a block device.
    pub(super) block: bool,
}

/// Who a pod is for.
#[derive(Debug, Clone, Default)]
pub(super) struct PodOwner {
    /// Annotation that leads back to it, with its value.
    pub(super) annotation: (&'static str, String),
    /// The owner as Kubernetes' garbage collector knows it, where it can own the pod.
    pub(super) reference: Option<Value>,
    /// Name of the backup.
    pub(super) backup: Option<String>,
    /// Name of the VM.
    pub(super) vm: Option<String>,
}

/// What a pod does.
#[derive(Debug, Clone)]
pub(super) enum PodTask {
    /// Serves a backup.
    Backup {
        /// Name of the VM in the repository.
        vm: String,
        /// UID of the VM.
        vm_uid: String,
        /// UID of the backup.
        backup_uid: String,
        /// The node; none: the scheduler chooses.
        node: Option<String>,
        /// Definition of the VM, as JSON.
        definition: Option<String>,
        /// Claims of a stopped VM.
        offline: Vec<OfflineClaim>,
    },
    /// Opens the repository.
    Probe,
    /// Forgets backups.
    Forget {
        /// Name of the VM in the repository.
        vm: String,
        /// Ids.
        backups: Vec<String>,
    },
}

/// A pod to make.
#[derive(Debug, Clone)]
pub(super) struct MoverPod<'a> {
    /// Its namespace: that of the credentials.
    pub(super) namespace: String,
    /// Its name.
    pub(super) name: String,
    /// Who it is for.
    pub(super) owner: PodOwner,
    /// What it does.
    pub(super) task: PodTask,
    /// With which target.
    pub(super) target: &'a Target,
    /// The image.
    pub(super) image: &'a MoverImage,
    /// The kubelet ends it after so many seconds.
    pub(super) active_seconds: i64,
}

/// Volumes of a pod, and where its container has them.
#[derive(Debug, Default)]
struct Volumes {
    sources: Vec<Value>,
    mounts: Vec<Value>,
    devices: Vec<Value>,
}

impl Volumes {
    fn mount(&mut self, name: &str, source: Value, path: &str, read_only: bool) {
        let mut volume = source;
        volume["name"] = json!(name);
        self.sources.push(volume);
        self.mounts.push(json!({"name": name, "mountPath": path, "readOnly": read_only}));
    }

    fn secret(&mut self, name: &str, secret: &str, key: &str, path: &str) {
        let items = json!([{"key": key, "path": SECRET_FILE}]);
        let source = json!({"secret": {"secretName": secret, "items": items, "defaultMode": 0o440}});
        self.mount(name, source, path, true);
    }
}

/// Builds the pod.
pub(super) fn build(pod: &MoverPod<'_>) -> Result<Pod, serde_json::Error> {
    let mut volumes = Volumes::default();
    // Nothing else can be written.
    volumes.mount("tmp", json!({"emptyDir": {"sizeLimit": "64Mi"}}), "/tmp", false);
    let task = task(&pod.task, &mut volumes);
    let mut env = vec![];
    target(pod.target, &mut volumes, &mut env);
    let create = !matches!(pod.task, PodTask::Forget { .. });
    let config = MoverConfig { task, target: pod.target.config(create) };
    env.insert(0, json!({"name": MOVER_CONFIG, "value": serde_json::to_string(&config)?}));
    let mut container = json!({
        "name": CONTAINER,
        "image": pod.image.image,
        "args": ["mover"],
        "env": env,
        "resources": resources(pod.target)?,
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"]},
            "privileged": false,
            "readOnlyRootFilesystem": true,
        },
        "terminationMessagePolicy": "File",
        "volumeMounts": volumes.mounts,
    });
    if let Some(policy) = &pod.image.pull_policy {
        container["imagePullPolicy"] = json!(policy);
    }
    if !volumes.devices.is_empty() {
        container["volumeDevices"] = json!(volumes.devices);
    }
    let mut spec = json!({
        "activeDeadlineSeconds": pod.active_seconds.max(1),
        "automountServiceAccountToken": false,
        "containers": [container],
        "enableServiceLinks": false,
        "restartPolicy": "Never",
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": QEMU_UID,
            "runAsGroup": QEMU_UID,
            "fsGroup": QEMU_UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": 30,
        "volumes": volumes.sources,
    });
    if !pod.image.pull_secrets.is_empty() {
        spec["imagePullSecrets"] = pod.image.pull_secrets.iter().map(|name| json!({"name": name})).collect();
    }
    if let PodTask::Backup { node: Some(node), .. } = &pod.task {
        // Whatever keeps others off the node: the VM is there.
        spec["tolerations"] = json!([{"operator": "Exists"}]);
        let field = json!({"key": "metadata.name", "operator": "In", "values": [node]});
        spec["affinity"] = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
            {"nodeSelectorTerms": [{"matchFields": [field]}]}}});
    }
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata(pod), "spec": spec,
    }))
}

fn metadata(pod: &MoverPod<'_>) -> Value {
    let mut labels = Map::new();
    labels.insert(LABEL_NAME.into(), json!(NAME));
    labels.insert(LABEL_MANAGED_BY.into(), json!(crate::api::CONTROLLER_MANAGER));
    labels.insert(LABEL_COMPONENT.into(), json!(COMPONENT));
    // Names that are no value of a label are left to the annotation.
    for (key, value) in [(LABEL_BACKUP, &pod.owner.backup), (LABEL_VM, &pod.owner.vm)] {
        if let Some(value) = value.as_ref().filter(|value| names::is_label_value(value)) {
            labels.insert(key.into(), json!(value));
        }
    }
    let mut annotations = Map::new();
    annotations.insert(pod.owner.annotation.0.into(), json!(pod.owner.annotation.1));
    if let PodTask::Backup { definition: Some(definition), .. } = &pod.task {
        annotations.insert(ANNOTATION_DEFINITION.into(), json!(definition));
    }
    let mut metadata = json!({
        "name": pod.name, "namespace": pod.namespace, "labels": labels, "annotations": annotations,
    });
    if let Some(reference) = &pod.owner.reference {
        metadata["ownerReferences"] = json!([reference]);
    }
    metadata
}

fn task(task: &PodTask, volumes: &mut Volumes) -> MoverTask {
    let (vm, vm_uid, backup_uid, definition, offline) = match task {
        PodTask::Probe => return MoverTask::Probe,
        PodTask::Forget { vm, backups } => {
            return MoverTask::Forget { vm: vm.clone(), backups: backups.clone() };
        }
        PodTask::Backup { vm, vm_uid, backup_uid, definition, offline, .. } => {
            (vm, vm_uid, backup_uid, definition, offline)
        }
    };
    let memory = json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}});
    volumes.mount(SOCKET_VOLUME, memory, SOCKET_DIRECTORY, false);
    if definition.is_some() {
        let field = json!({"fieldPath": format!("metadata.annotations['{ANNOTATION_DEFINITION}']")});
        let items = json!([{"path": DEFINITION_FILE, "fieldRef": field}]);
        volumes.mount("definition", json!({"downwardAPI": {"items": items}}), DEFINITION_DIRECTORY, true);
    }
    let mut disks = Vec::new();
    for (number, disk) in offline.iter().enumerate() {
        let (name, path) = (format!("disk-{number}"), format!("{DISKS_DIRECTORY}/{number}"));
        let source = json!({"persistentVolumeClaim": {"claimName": disk.claim, "readOnly": true}});
        if disk.block {
            let mut volume = source;
            volume["name"] = json!(name);
            volumes.sources.push(volume);
            volumes.devices.push(json!({"name": name, "devicePath": path}));
        } else {
            volumes.mount(&name, source, &path, true);
        }
        disks.push(OfflineVolume { name: disk.volume.clone(), path });
    }
    MoverTask::Backup {
        socket: format!("{SOCKET_DIRECTORY}/{SOCKET_NAME}"),
        vm: vm.clone(),
        vm_uid: vm_uid.clone(),
        backup_uid: backup_uid.clone(),
        offline: disks,
        definition_file: definition.as_ref().map(|_| format!("{DEFINITION_DIRECTORY}/{DEFINITION_FILE}")),
        wait_seconds: WAIT_SECONDS,
    }
}

fn target(target: &Target, volumes: &mut Volumes, env: &mut Vec<Value>) {
    let spec = match target {
        Target::Qcow2(target) => {
            let claim = json!({"persistentVolumeClaim": {"claimName": target.persistent_volume_claim.claim_name}});
            volumes.mount("target", claim, TARGET_PATH, false);
            return;
        }
        Target::Repository { spec, .. } => spec,
    };
    let passphrase = &spec.passphrase_secret_ref;
    volumes.secret("passphrase", &passphrase.name, &passphrase.key, PASSPHRASE_DIRECTORY);
    if let Some(claim) = &spec.persistent_volume_claim {
        let claim = json!({"persistentVolumeClaim": {"claimName": claim.claim_name}});
        volumes.mount("repository", claim, REPOSITORY_PATH, false);
    }
    if let Some(s3) = &spec.s3 {
        let secret = &s3.credentials_secret_ref.name;
        let variables = [("AWS_ACCESS_KEY_ID", false), ("AWS_SECRET_ACCESS_KEY", false), ("AWS_SESSION_TOKEN", true)];
        for (name, optional) in variables {
            let reference = json!({"name": secret, "key": name, "optional": optional});
            env.push(json!({"name": name, "valueFrom": {"secretKeyRef": reference}}));
        }
        if let Some(ca) = &s3.ca_secret_ref {
            volumes.secret("ca", &ca.name, &ca.key, CA_DIRECTORY);
        }
    }
}

/// What the repository says, or what an ordinary backup needs: buffers are bounded, so is memory.
fn resources(target: &Target) -> Result<Value, serde_json::Error> {
    if let Target::Repository { spec, .. } = target
        && let Some(resources) = spec.mover.as_ref().and_then(|mover| mover.resources.as_ref())
    {
        return serde_json::to_value(resources);
    }
    Ok(json!({"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}))
}

/// The owner of pods in its own namespace.
pub(super) fn owner_reference(kind: &str, name: &str, uid: &str) -> Value {
    json!({
        "apiVersion": crate::api::api_version(), "kind": kind, "name": name, "uid": uid, "controller": true,
    })
}

/// The annotation that leads from a pod to its backup.
pub(super) fn backup_annotation(namespace: &str, uid: &str) -> (&'static str, String) {
    (ANNOTATION_BACKUP, format!("{namespace}/{uid}"))
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "tables read better so")]
#[path = "mover_pod_tests.rs"]
mod tests;
