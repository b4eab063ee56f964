//! Begins an attempt: makes the mover pod, and gives the agent its order.

use super::{
    ControllerError,
    backup::Look,
    decision::{self, MoverFact},
    definition,
    machine::{Place, offline_claims},
    mover_pod::{self, MoverPod, OfflineClaim, PodOwner, PodTask},
    names,
    reasons::{event, reason},
    status, write,
};
use crate::{
    api::{Assignment, BackupPhase, LauncherReference, PodReference},
    kubevirt::{LABEL_CREATED_BY, VirtualMachine},
};
use k8s_openapi::{
    api::core::v1::{PersistentVolumeClaim, Pod},
    apimachinery::pkg::apis::meta::v1::Time,
};
use kube::{
    Api, Resource, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams, PostParams},
    runtime::controller::Action,
};
use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};

/// A place is given to others for so long when the API server does not take the mover.
const REJECTED: Duration = Duration::from_secs(30);
/// The kubelet ends a mover so long after the deadline of the backup.
const GRACE: i64 = 600;

/// What is to be known of a VM for its mover.
struct Material {
    vm_uid: Option<String>,
    definition: Option<String>,
    offline: Result<Vec<OfflineClaim>, super::machine::Obstacle>,
}

/// Name of the VM at the target. A directory of images has it as the name of a directory, where no slash can be; a
/// namespace has no dot.
fn repository_vm(look: &Look<'_>) -> String {
    let separator = if look.backup.spec.target.is_some() { '.' } else { '/' };
    format!("{}{separator}{}", look.namespace, look.backup.spec.source.name)
}

/// Makes the mover pod. One that is there already was made by us before a crash, or is not ours.
pub(super) async fn create_mover(look: &Look<'_>, place: &Place) -> Result<Action, ControllerError> {
    let (context, backup) = (look.context, look.backup);
    // A lead that began after the attempt knows of it from `Context::start`; one that gave the place back asks again.
    context.admission().enter(context.request(backup, place.node().map(ToOwned::to_owned)));
    let Some(target) = context.target(backup).0 else {
        return look.end_attempt((reason::REPOSITORY_NOT_READY, "the repository is gone"), false, REJECTED).await;
    };
    let material = gather(look, matches!(place, Place::Stopped { .. })).await?;
    if material.vm_uid.as_deref() != Some(place.vm_uid()) {
        return look.end_attempt((reason::VM_CHANGED, "the VM is another one now"), false, REJECTED).await;
    }
    let offline = match material.offline {
        Ok(offline) => offline,
        Err(obstacle) => {
            return look.end_attempt((obstacle.reason, &obstacle.message), true, REJECTED).await;
        }
    };
    if material.definition.is_none() {
        let note = "the VM's definition is too large for the backup, or cannot be read: only its disks are stored";
        look.warn(event::DEFINITION_OMITTED, "Backup", note).await;
    }
    let attempt = backup.status.as_ref().and_then(|status| status.attempts).unwrap_or(1);
    let name = names::mover(&look.namespace, &look.name, &look.uid, attempt);
    let namespace = context.mover_namespace(backup);
    let left = decision::deadline(backup).duration_since(look.now).as_secs();
    let pod = MoverPod {
        namespace: namespace.clone(),
        name: name.clone(),
        owner: owner(look, &namespace),
        task: PodTask::Backup {
            vm: repository_vm(look),
            vm_uid: place.vm_uid().to_owned(),
            backup_uid: look.uid.clone(),
            node: place.node().map(ToOwned::to_owned),
            definition: material.definition,
            offline,
        },
        target: &target,
        image: &context.image,
        active_seconds: left.saturating_add(GRACE),
    };
    create(look, &pod).await
}

/// Who a pod is for: a backup in its own namespace owns it, one of another namespace cannot.
pub(super) fn owner(look: &Look<'_>, namespace: &str) -> PodOwner {
    let here = namespace == look.namespace;
    PodOwner {
        annotation: mover_pod::backup_annotation(&look.namespace, &look.uid),
        reference: here.then(|| mover_pod::owner_reference("VirtualMachineBackup", &look.name, &look.uid)),
        backup: Some(look.name.clone()),
        vm: Some(look.backup.spec.source.name.clone()),
    }
}

/// What became of making a pod.
pub(super) enum Created {
    /// It is made, or was made by us before.
    Ours,
    /// Another one has its name.
    Foreign,
    /// The API server does not take it: a quota, say.
    Rejected(String),
}

/// Makes a pod, or finds it made.
pub(super) async fn create_pod(look: &Look<'_>, pod: &MoverPod<'_>) -> Result<Created, ControllerError> {
    let built = mover_pod::build(pod).map_err(|source| ControllerError::Write {
        what: "build a mover pod",
        source: kube::Error::SerdeError(source),
    })?;
    let api = Api::<Pod>::namespaced(look.context.client.clone(), &pod.namespace);
    match look.context.writer.write("make a mover pod", api.create(&PostParams::default(), &built)).await {
        Ok(_) => {
            tracing::info!(pod = pod.name, namespace = pod.namespace, backup = look.full_name(), "mover made");
            Ok(Created::Ours)
        }
        Err(error) if error.is_conflict() => {
            let read = |source| ControllerError::Read { what: "a pod with the name of a mover", source };
            let known = api.get_opt(&pod.name).await.map_err(read)?;
            let (key, value) = &pod.owner.annotation;
            match known {
                // It has gone meanwhile.
                None => Err(error),
                Some(known) if known.annotations().get(*key) == Some(value) => Ok(Created::Ours),
                Some(_) => Ok(Created::Foreign),
            }
        }
        Err(error) => match error.refusal() {
            Some(refusal) => Ok(Created::Rejected(refusal.to_owned())),
            None => Err(error),
        },
    }
}

async fn create(look: &Look<'_>, pod: &MoverPod<'_>) -> Result<Action, ControllerError> {
    match create_pod(look, pod).await? {
        Created::Ours => {
            look.tell(event::MOVER_CREATED, "Backup", &format!("pod {}/{}", pod.namespace, pod.name)).await;
            Ok(Action::requeue(Duration::from_secs(30)))
        }
        Created::Foreign => {
            let message =
                format!("pod {}/{} is not ours, but has the mover's name: delete it", pod.namespace, pod.name);
            look.warn(event::MOVER_REFUSED, "Backup", &message).await;
            // The next attempt has another name.
            look.end_attempt((reason::MOVER_REFUSED, &message), true, REJECTED).await
        }
        Created::Rejected(refusal) => {
            let message = format!("the API server does not take the mover pod: {refusal}");
            look.end_attempt((reason::MOVER_REJECTED, &message), false, REJECTED).await
        }
    }
}

/// A custom resource that is not typed here.
fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    ApiResource { group: group.into(), version: version.into(), api_version, kind: kind.into(), plural: plural.into() }
}

/// Reads the VM and what it refers to, as far as that is no secret.
async fn gather(look: &Look<'_>, stopped: bool) -> Result<Material, ControllerError> {
    let client = || look.context.client.clone();
    let read = |what| move |source| ControllerError::Read { what, source };
    let vms = resource("kubevirt.io", "v1", "VirtualMachine", "virtualmachines");
    let vms = Api::<DynamicObject>::namespaced_with(client(), &look.namespace, &vms);
    let Some(vm) = vms.get_opt(&look.backup.spec.source.name).await.map_err(read("the VirtualMachine"))? else {
        return Ok(Material { vm_uid: None, definition: None, offline: Ok(Vec::new()) });
    };
    let vm_uid = vm.metadata.uid.clone();
    let vm = serde_json::to_value(&vm).unwrap_or_default();
    let references = definition::references(&vm);
    let kind = resource("apps", "v1", "ControllerRevision", "controllerrevisions");
    let api = Api::<DynamicObject>::namespaced_with(client(), &look.namespace, &kind);
    let mut revisions = Vec::new();
    for name in &references.revisions {
        let found = api.get_opt(name).await.map_err(read("a ControllerRevision"))?;
        revisions.extend(found.and_then(|revision| serde_json::to_value(revision).ok()));
    }
    let api = Api::<PersistentVolumeClaim>::namespaced(client(), &look.namespace);
    let mut claims = BTreeMap::new();
    for name in &references.claims {
        if let Some(claim) = api.get_opt(name).await.map_err(read("a PersistentVolumeClaim"))? {
            claims.insert(name.clone(), claim);
        }
    }
    // KubeVirt labels the claim that holds firmware variables and the TPM with the VM's name.
    let mut backend = Vec::new();
    if names::is_label_value(&look.backup.spec.source.name) {
        let of_vm = ListParams::default().labels(&format!("persistent-state-for={}", look.backup.spec.source.name));
        let found = api.list_metadata(&of_vm).await.map_err(read("the claim of the VM's state"))?;
        backend.extend(found.items.iter().map(ResourceExt::name_any));
    }
    let shapes: Vec<Value> = claims.values().filter_map(|claim| serde_json::to_value(claim).ok()).collect();
    let definition = definition::document(&vm, &references, &revisions, &shapes, &backend);
    let offline = if stopped { offline(look, &vm, &claims) } else { Ok(Vec::new()) };
    Ok(Material { vm_uid, definition, offline })
}

/// The claims of a stopped VM.
fn offline(
    look: &Look<'_>,
    vm: &Value,
    claims: &BTreeMap<String, PersistentVolumeClaim>,
) -> Result<Vec<OfflineClaim>, super::machine::Obstacle> {
    let selection = look.backup.spec.volumes.clone().unwrap_or_default();
    let wanted = |name: &str| {
        (selection.include.is_empty() || selection.include.iter().any(|included| included == name))
            && !selection.exclude.iter().any(|excluded| excluded == name)
    };
    let vm: VirtualMachine = serde_json::from_value(vm.clone()).map_err(|error| {
        super::machine::Obstacle::passing(reason::VM_UNREADABLE, format!("the VM cannot be understood: {error}"))
    })?;
    let volumes = offline_claims(&vm, wanted)?;
    let is_block = |claim: &str| {
        let spec = claims.get(claim).and_then(|claim| claim.spec.as_ref());
        spec.and_then(|spec| spec.volume_mode.as_deref()) == Some("Block")
    };
    let claim = |volume: crate::kubevirt::ClaimedVolume| OfflineClaim {
        block: is_block(&volume.claim),
        volume: volume.name,
        claim: volume.claim,
    };
    Ok(volumes.into_iter().map(claim).collect())
}

/// Gives the agent of the node its order.
pub(super) async fn assign(
    look: &Look<'_>,
    node: String,
    place: &Place,
    mover: Option<&MoverFact>,
) -> Result<Action, ControllerError> {
    let Some(mover) = mover else { return Ok(Action::await_change()) };
    let (context, backup) = (look.context, look.backup);
    let launcher = match place {
        Place::Stopped { .. } => None,
        Place::Running { instance_uid, launcher_uid, .. } => {
            let Some(pod_name) = launcher_name(look, instance_uid, launcher_uid).await? else {
                let message = format!("the launcher pod {launcher_uid} is not there yet");
                let pause = Duration::from_secs(2);
                return look.wait(BackupPhase::Preparing, reason::VM_STARTING, &message, pause).await;
            };
            Some(LauncherReference { instance_uid: instance_uid.clone(), pod_name, pod_uid: launcher_uid.clone() })
        }
    };
    let attempt = backup.status.as_ref().and_then(|status| status.attempts).unwrap_or(1);
    let assignment = Assignment {
        attempt,
        node_name: node.clone(),
        virtual_machine_uid: place.vm_uid().to_owned(),
        repository_vm: repository_vm(look),
        launcher,
        mover: PodReference {
            namespace: context.mover_namespace(backup),
            name: names::mover(&look.namespace, &look.name, &look.uid, attempt),
            uid: mover.uid.clone(),
        },
        assigned: Some(Time(look.now)),
        deadline: Some(Time(decision::deadline(backup))),
        abort: None,
    };
    write::status(context, backup, &status::assigned(backup, assignment, look.now)).await?;
    // A stopped VM's mover has its node only now.
    context.admission().enter(context.request(backup, Some(node.clone())));
    tracing::info!(node, "assigned");
    Ok(Action::requeue(Duration::from_secs(60)))
}

/// The name of the launcher pod. All pods of an instance have its UID in a label; KubeVirt tells the pod's UID only.
async fn launcher_name(
    look: &Look<'_>,
    instance_uid: &str,
    launcher_uid: &str,
) -> Result<Option<String>, ControllerError> {
    let api = Api::<Pod>::namespaced(look.context.client.clone(), &look.namespace);
    let of_instance = ListParams::default().labels(&format!("{LABEL_CREATED_BY}={instance_uid}"));
    let read = |source| ControllerError::Read { what: "the launcher pods of a VM", source };
    let found = api.list_metadata(&of_instance).await.map_err(read)?;
    let pod = found.items.into_iter().find(|pod| pod.meta().uid.as_deref() == Some(launcher_uid));
    Ok(pod.map(|pod| pod.name_any()))
}
