//! What ends a run besides the controller: a migration, the end of the VM, its start while it is read as stopped.
//!
//! A session that is in the way of a migration makes it fail at switchover (the VM survives). So the wish to migrate is
//! watched for, and the session is gone before KubeVirt gets that far.

use crate::{
    api::LauncherReference,
    fleecing::SkippedDevice,
    kubevirt::{VirtualMachineInstance, VirtualMachineInstanceMigration, claimed_volumes},
    run::{RunError, Stop},
};
use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};

/// Ends when the run has to.
pub(super) async fn watch(client: &Client, namespace: &str, vm: &str, launcher: Option<&LauncherReference>) -> Stop {
    let Some(launcher) = launcher else { return started(client, namespace, vm).await };
    tokio::select! {
        stop = migrations(client, namespace, vm) => stop,
        stop = instance(client, namespace, vm, launcher) => stop,
        stop = pod(client, namespace, launcher) => stop,
    }
}

fn stop(reason: &str, message: String) -> Stop {
    Stop { reason: reason.into(), message }
}

/// The first event that means an end. A watch that fails is begun again: while the API server is away the run goes on.
async fn first<K>(
    events: impl Stream<Item = Result<watcher::Event<K>, watcher::Error>>,
    decide: impl Fn(&watcher::Event<K>) -> Option<Stop>,
) -> Stop {
    let mut events = std::pin::pin!(events);
    loop {
        match events.next().await {
            Some(Ok(event)) => {
                if let Some(stop) = decide(&event) {
                    return stop;
                }
            }
            Some(Err(error)) => tracing::debug!(%error, "a watch failed; it is begun again"),
            None => return std::future::pending().await,
        }
    }
}

async fn migrations(client: &Client, namespace: &str, vm: &str) -> Stop {
    let api: Api<VirtualMachineInstanceMigration> = Api::namespaced(client.clone(), namespace);
    let events = watcher(api, watcher::Config::default()).default_backoff();
    first(events, |event| match event {
        watcher::Event::Apply(migration) | watcher::Event::InitApply(migration)
            if migration.spec.vmi_name == vm && migration.is_active() =>
        {
            let name = migration.metadata.name.as_deref().unwrap_or_default();
            Some(stop("Migrating", format!("VM {vm} is to be migrated (VirtualMachineInstanceMigration {name})")))
        }
        _ => None,
    })
    .await
}

async fn instance(client: &Client, namespace: &str, vm: &str, launcher: &LauncherReference) -> Stop {
    let api: Api<VirtualMachineInstance> = Api::namespaced(client.clone(), namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={vm}"));
    let events = watcher(api, config).default_backoff();
    first(events, |event| match event {
        watcher::Event::Apply(instance) | watcher::Event::InitApply(instance) => judge_instance(vm, instance, launcher),
        watcher::Event::Delete(_) => Some(stop("InstanceGone", format!("VM {vm} was stopped"))),
        _ => None,
    })
    .await
}

fn judge_instance(vm: &str, instance: &VirtualMachineInstance, launcher: &LauncherReference) -> Option<Stop> {
    if instance.metadata.uid.as_deref() != Some(launcher.instance_uid.as_str()) {
        return Some(stop("InstanceGone", format!("VM {vm} was started anew")));
    }
    if instance.metadata.deletion_timestamp.is_some() {
        return Some(stop("LauncherTerminating", format!("VM {vm} is being stopped")));
    }
    let status = instance.status.as_ref()?;
    if let Some(node) = status.evacuation_node_name.as_deref().filter(|node| !node.is_empty()) {
        return Some(stop("Evacuating", format!("VM {vm} is to leave node {node}")));
    }
    if instance.is_migrating() {
        return Some(stop("Migrating", format!("VM {vm} is being migrated")));
    }
    if status.migrated_volumes.as_ref().is_some_and(|volumes| !volumes.is_empty()) {
        return Some(stop("Migrating", format!("volumes of VM {vm} are being moved to other storage")));
    }
    match status.phase.as_deref() {
        Some(phase @ ("Succeeded" | "Failed")) => {
            Some(stop("InstanceGone", format!("VM {vm} has ended (phase {phase})")))
        }
        _ => None,
    }
}

async fn pod(client: &Client, namespace: &str, launcher: &LauncherReference) -> Stop {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", launcher.pod_name));
    let events = watcher(api, config).default_backoff();
    first(events, |event| match event {
        watcher::Event::Apply(pod) | watcher::Event::InitApply(pod) => {
            let same = pod.metadata.uid.as_deref() == Some(launcher.pod_uid.as_str());
            let gone = !same || pod.metadata.deletion_timestamp.is_some();
            gone.then(|| {
                stop("LauncherTerminating", format!("virt-launcher pod {} is being deleted", launcher.pod_name))
            })
        }
        watcher::Event::Delete(_) => {
            Some(stop("LauncherTerminating", format!("virt-launcher pod {} was deleted", launcher.pod_name)))
        }
        _ => None,
    })
    .await
}

/// A stopped VM that is started: what is read from then on is no instant.
async fn started(client: &Client, namespace: &str, vm: &str) -> Stop {
    let api: Api<VirtualMachineInstance> = Api::namespaced(client.clone(), namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={vm}"));
    let events = watcher(api, config).default_backoff().map_err(Into::into);
    first(events, |event| match event {
        watcher::Event::Apply(_) | watcher::Event::InitApply(_) | watcher::Event::Delete(_) => Some(was_started(vm)),
        _ => None,
    })
    .await
}

fn was_started(vm: &str) -> Stop {
    stop("VirtualMachineStarted", format!("VM {vm} was started while its disks were read; it is backed up running"))
}

/// Volumes that have a disk but no claim behind it (cloud-init, container disks), are shared, or are no disks of ours: QEMU
/// alone cannot tell.
pub(super) async fn unsuitable_volumes(
    client: &Client,
    namespace: &str,
    vm: &str,
) -> Result<Vec<SkippedDevice>, RunError> {
    let api: Api<VirtualMachineInstance> = Api::namespaced(client.clone(), namespace);
    let unreachable = |error: kube::Error| {
        let message = format!("the volumes of VM {vm} could not be read from the API server: {error}");
        RunError::Stopped(stop("ApiServerUnreachable", message))
    };
    let gone = || RunError::Stopped(stop("InstanceGone", format!("VM {vm} was stopped")));
    let instance = api.get_opt(vm).await.map_err(unreachable)?.ok_or_else(gone)?;
    let (_, skipped) = claimed_volumes(&instance.spec);
    Ok(skipped.into_iter().map(|volume| SkippedDevice { name: volume.name, reason: volume.reason }).collect())
}

/// Whether a VM has no instance right now; in doubt it has one.
pub(super) async fn is_stopped(client: &Client, namespace: &str, vm: &str) -> Result<(), Stop> {
    let api: Api<VirtualMachineInstance> = Api::namespaced(client.clone(), namespace);
    match api.get_opt(vm).await {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(was_started(vm)),
        Err(error) => {
            Err(stop("ApiServerUnreachable", format!("whether VM {vm} is still stopped could not be told: {error}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_instance_that_moves_or_ends_stops_the_run() {
        let launcher = LauncherReference { instance_uid: "i".into(), pod_name: "p".into(), pod_uid: "u".into() };
        let judged = |uid: &str, status: serde_json::Value| {
            let instance = json!({"metadata": {"name": "web", "uid": uid}, "status": status});
            judge_instance("web", &serde_json::from_value(instance).unwrap(), &launcher).map(|stop| stop.reason)
        };
        assert_eq!(judged("i", json!({"phase": "Running", "migrationState": {"completed": true}})), None);
        assert_eq!(judged("i", json!({"phase": "Running"})), None);
        assert_eq!(judged("other", json!({"phase": "Running"})).as_deref(), Some("InstanceGone"));
        assert_eq!(judged("i", json!({"evacuationNodeName": "a"})).as_deref(), Some("Evacuating"));
        assert_eq!(judged("i", json!({"migrationState": {}})).as_deref(), Some("Migrating"));
        assert_eq!(judged("i", json!({"migratedVolumes": [{}]})).as_deref(), Some("Migrating"));
        assert_eq!(judged("i", json!({"phase": "Failed"})).as_deref(), Some("InstanceGone"));
    }
}
