//! What goes into a backup besides the disks: the VM's definition, and what it refers to. Pure.
//!
//! Secrets and config maps are named, never read. The restore of a VM needs: the VM as it was, the revisions that fix
//! its instance type and preference, the shapes of its claims, and the names of the rest.

use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Bytes that a definition may have: all annotations of a pod together may have 256 KiB.
pub(super) const MAX_BYTES: usize = 200 << 10;
/// Version of the document.
const FORMAT: u32 = 1;

/// What a VM refers to, by name, all in its own namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct References {
    /// Controller revisions of instance type and preference.
    pub(super) revisions: BTreeSet<String>,
    /// Claims, also those of data volumes.
    pub(super) claims: BTreeSet<String>,
    /// Secrets.
    pub(super) secrets: BTreeSet<String>,
    /// Config maps.
    pub(super) config_maps: BTreeSet<String>,
    /// Service accounts.
    pub(super) service_accounts: BTreeSet<String>,
}

/// An object as it can be created again: without what the API server and controllers write.
pub(super) fn portable(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(map) = object.as_object_mut() {
        map.remove("status");
        if let Some(metadata) = map.get_mut("metadata").and_then(Value::as_object_mut) {
            for field in ["managedFields", "resourceVersion", "generation", "selfLink"] {
                metadata.remove(field);
            }
            if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
                annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
            }
        }
    }
    object
}

/// Finds what a VM refers to.
pub(super) fn references(vm: &Value) -> References {
    let mut found = References::default();
    for matcher in ["instancetype", "preference"] {
        insert(&mut found.revisions, &vm["spec"][matcher]["revisionName"]);
        insert(&mut found.revisions, &vm["status"][format!("{matcher}Ref")]["controllerRevisionRef"]["name"]);
    }
    let spec = &vm["spec"]["template"]["spec"];
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        insert(&mut found.claims, &volume["persistentVolumeClaim"]["claimName"]);
        insert(&mut found.claims, &volume["dataVolume"]["name"]);
    }
    // Secrets and config maps are referred to in many places (cloud-init, sysprep, disks, access credentials), always
    // by fields of these names.
    walk(spec, &mut found);
    found
}

fn insert(names: &mut BTreeSet<String>, value: &Value) {
    if let Some(name) = value.as_str().filter(|name| !name.is_empty()) {
        names.insert(name.to_owned());
    }
}

fn walk(value: &Value, found: &mut References) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| walk(item, found)),
        Value::Object(map) => {
            for (key, value) in map {
                match key.as_str() {
                    "secretName" => insert(&mut found.secrets, value),
                    "secretRef" | "networkDataSecretRef" => insert(&mut found.secrets, &value["name"]),
                    "secret" => {
                        insert(&mut found.secrets, &value["secretName"]);
                        insert(&mut found.secrets, &value["name"]);
                    }
                    "configMap" => insert(&mut found.config_maps, &value["name"]),
                    "serviceAccountName" => insert(&mut found.service_accounts, value),
                    _ => {}
                }
                walk(value, found);
            }
        }
        _ => {}
    }
}

/// The shape of a claim.
pub(super) fn claim(object: &Value) -> Value {
    let mut spec = Map::new();
    for field in ["accessModes", "resources", "storageClassName", "volumeMode"] {
        if let Some(value) = object["spec"].get(field) {
            spec.insert(field.into(), value.clone());
        }
    }
    json!({"name": object["metadata"]["name"], "labels": object["metadata"]["labels"], "spec": spec})
}

/// The document. `None`: it is too large.
pub(super) fn document(
    vm: &Value,
    references: &References,
    revisions: &[Value],
    claims: &[Value],
    backend: &[String],
) -> Option<String> {
    let document = json!({
        "format": FORMAT,
        "virtualMachine": portable(vm),
        "controllerRevisions": revisions.iter().map(portable).collect::<Vec<_>>(),
        "persistentVolumeClaims": claims.iter().map(claim).collect::<Vec<_>>(),
        "backendStorageClaims": backend,
        "references": {
            "secrets": references.secrets,
            "configMaps": references.config_maps,
            "serviceAccounts": references.service_accounts,
        },
    });
    let text = document.to_string();
    (text.len() <= MAX_BYTES).then_some(text)
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "tables read better so")]
mod tests {
    use super::*;

    fn vm() -> Value {
        json!({
            "metadata": {"name": "web", "namespace": "n", "uid": "u", "managedFields": [{}], "resourceVersion": "7",
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "keep": "me"}},
            "spec": {
                "instancetype": {"name": "small", "revisionName": "small-v1"},
                "preference": {"name": "fedora"},
                "dataVolumeTemplates": [{"metadata": {"name": "root-dv"}}],
                "template": {"spec": {
                    "accessCredentials": [{"sshPublicKey": {"source": {"secret": {"secretName": "keys"}}}}],
                    "volumes": [
                        {"name": "root", "dataVolume": {"name": "root-dv"}},
                        {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
                        {"name": "init", "cloudInitNoCloud": {"secretRef": {"name": "init"},
                            "networkDataSecretRef": {"name": "net"}}},
                        {"name": "sys", "sysprep": {"configMap": {"name": "unattend"}}},
                        {"name": "sa", "serviceAccount": {"serviceAccountName": "robot"}},
                    ],
                }},
            },
            "status": {"preferenceRef": {"controllerRevisionRef": {"name": "fedora-v2"}}},
        })
    }

    #[test]
    fn what_a_vm_refers_to_is_found() {
        let found = references(&vm());
        let names = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!(names(&found.revisions), "fedora-v2 small-v1");
        assert_eq!(names(&found.claims), "data root-dv");
        assert_eq!(names(&found.secrets), "init keys net");
        assert_eq!(names(&found.config_maps), "unattend");
        assert_eq!(names(&found.service_accounts), "robot");
        assert_eq!(references(&json!("no object")), References::default());
    }

    #[test]
    fn the_document_can_be_applied_elsewhere() {
        let claims = [json!({"metadata": {"name": "data"}, "spec": {"volumeMode": "Block", "volumeName": "pv-1"}})];
        let text = document(&vm(), &references(&vm()), &[], &claims, &["persistent-state".into()]).unwrap();
        let document: Value = serde_json::from_str(&text).unwrap();
        let metadata = &document["virtualMachine"]["metadata"];
        assert!(metadata.get("managedFields").is_none() && metadata.get("resourceVersion").is_none());
        assert_eq!(metadata["annotations"], json!({"keep": "me"}));
        assert_eq!(document["virtualMachine"].get("status"), None);
        assert_eq!(document["persistentVolumeClaims"][0]["spec"], json!({"volumeMode": "Block"}));
        let mut large = vm();
        large["spec"]["x"] = json!("x".repeat(MAX_BYTES));
        assert_eq!(super::document(&large, &References::default(), &[], &[], &[]), None);
    }
}
