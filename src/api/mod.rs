//! Our custom resources, group `virtfleece.io`: types only.
//!
//! A [`VirtualMachineBackup`] is also the wire between controller and agent. Each writes one part of its status, by
//! server-side apply with a field manager of its own, and never the other's: [`Assignment`] says what the controller
//! wants of the agent on a node, [`Run`] what that agent did. An admission policy holds the agents to their part.

#![allow(unreachable_pub, reason = "`KubeSchema` makes a hidden copy of each type inside a function")]
#![allow(clippy::doc_markdown, reason = "`kubectl explain` prints these texts as they are")]

mod backup;
mod backup_status;
mod condition;
mod repository;

pub use backup::*;
pub use backup_status::*;
pub use condition::{Condition, ConditionStatus, find_condition, kinds, set_condition};
pub use repository::*;

use kube::{CustomResourceExt, Resource};

/// API group of all our kinds.
pub const GROUP: &str = "virtfleece.io";
/// Version of all our kinds.
pub const VERSION: &str = "v1alpha1";

/// Field manager of the controller.
pub const CONTROLLER_MANAGER: &str = "virt-fleece-controller";
/// Field manager of the agents.
pub const AGENT_MANAGER: &str = "virt-fleece-agent";

/// Held by a backup while there is something to undo: a session in a VM, a mover, or data that goes with the object.
pub const FINALIZER: &str = "virtfleece.io/backup";

/// Label of objects that we make: name of the backup that they are for.
pub const LABEL_BACKUP: &str = "virtfleece.io/backup";
/// Label of backups: name of the VM.
pub const LABEL_VM: &str = "virtfleece.io/virtual-machine";
/// Label of pods that we make: what they are (`mover`).
pub const LABEL_COMPONENT: &str = "app.kubernetes.io/component";
/// Annotation of mover pods: namespace and UID of the backup they are for, `NAMESPACE/UID`.
pub const ANNOTATION_BACKUP: &str = "virtfleece.io/backup";

/// The custom resource definitions, in the order in which they are installed.
pub fn definitions() -> Vec<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition>
{
    vec![VirtualMachineBackup::crd(), BackupRepository::crd(), ClusterBackupRepository::crd()]
}

/// `apiVersion` of our kinds.
pub fn api_version() -> String {
    VirtualMachineBackup::api_version(&()).into_owned()
}
