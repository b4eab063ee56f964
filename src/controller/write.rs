//! Writes that several reconcilers have in common, and what follows when they fail.

use super::{ControllerError, context::Context, index::key_of, metrics::KindLabels};
use crate::{
    api::{CONTROLLER_MANAGER, FINALIZER, LABEL_VM, VirtualMachineBackup, VirtualMachineBackupStatus, api_version},
    reason::{Reason, Retry},
};
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
    runtime::controller::Action,
};
use serde_json::json;
use std::time::Duration;

/// After an error that may pass.
const BACKOFF: Duration = Duration::from_secs(5);

/// What follows on an error: another look later.
pub(super) fn again(kind: &'static str, metadata: &ObjectMeta, error: &ControllerError, context: &Context) -> Action {
    let (namespace, name) = key_of(metadata);
    if error.is_conflict() {
        tracing::debug!(kind, namespace, name, "decided on an old state");
    } else {
        context.metrics.reconcile_errors.get_or_create(&KindLabels { kind }).inc();
        let source = std::error::Error::source(error).map(ToString::to_string);
        tracing::warn!(kind, namespace, name, reason = error.reason(), source, "{error}");
    }
    match error.retry() {
        Retry::After(pause) => Action::requeue(pause),
        Retry::Backoff | Retry::Terminal => Action::requeue(BACKOFF),
    }
}

/// Server-side apply in the controller's name. Nobody else owns what it writes.
pub(super) fn apply() -> PatchParams {
    PatchParams::apply(CONTROLLER_MANAGER).force()
}

/// Applies the controller's part of a backup's status, if the backup is still what was decided about.
pub(super) async fn status(
    context: &Context,
    backup: &VirtualMachineBackup,
    status: &VirtualMachineBackupStatus,
) -> Result<(), ControllerError> {
    let (namespace, name) = key_of(&backup.metadata);
    let patch = json!({
        "apiVersion": api_version(),
        "kind": "VirtualMachineBackup",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": backup.metadata.uid,
            "resourceVersion": backup.metadata.resource_version,
        },
        "status": status,
    });
    let api = Api::<VirtualMachineBackup>::namespaced(context.client.clone(), &namespace);
    let (how, patch) = (apply(), Patch::Apply(&patch));
    let request = api.patch_status(&name, &how, &patch);
    context.writer.write("write the status of a backup", request).await.map(drop)
}

/// Sets or removes our finalizer, and the label with the VM's name. The resource version that results.
pub(super) async fn finalizer(
    context: &Context,
    backup: &VirtualMachineBackup,
    wanted: bool,
) -> Result<Option<String>, ControllerError> {
    let (namespace, name) = key_of(&backup.metadata);
    let vm = &backup.spec.source.name;
    let mut metadata = json!({
        "name": name,
        "namespace": namespace,
        "uid": backup.metadata.uid,
        "resourceVersion": backup.metadata.resource_version,
    });
    if wanted {
        metadata["finalizers"] = json!([FINALIZER]);
    }
    if super::names::is_label_value(vm) {
        metadata["labels"] = json!({LABEL_VM: vm});
    }
    let patch = json!({"apiVersion": api_version(), "kind": "VirtualMachineBackup", "metadata": metadata});
    let api = Api::<VirtualMachineBackup>::namespaced(context.client.clone(), &namespace);
    let (how, patch) = (apply(), Patch::Apply(&patch));
    let request = api.patch_metadata(&name, &how, &patch);
    let written = context.writer.write("write the finalizer of a backup", request).await?;
    Ok(written.metadata.resource_version)
}

/// Deletes a pod, if it is still this one. That it is gone is no error.
pub(super) async fn delete_pod(
    context: &Context,
    namespace: &str,
    name: &str,
    uid: &str,
) -> Result<(), ControllerError> {
    let api = Api::<Pod>::namespaced(context.client.clone(), namespace);
    let only_this = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
    let how = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
    match context.writer.write("delete a mover pod", api.delete(name, &how)).await {
        // A pod of another UID is not ours to delete.
        Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
        other => other.map(drop),
    }
}

/// Deletes movers in the operator's namespace whose backup is gone: no garbage collector knows of the connection.
pub(super) async fn sweep(context: &Context) {
    for (name, uid) in context.orphans() {
        tracing::info!(pod = name, "deleting a mover whose backup is gone");
        if let Err(error) = delete_pod(context, &context.settings.namespace, &name, &uid).await {
            tracing::warn!(%error, pod = name, "a mover whose backup is gone cannot be deleted");
        }
    }
}
