use super::*;
use serde_json::{Value, json};

fn fact(status: Value) -> MoverFact {
    let pod = json!({"metadata": {"name": "m", "uid": "u"}, "spec": {"containers": [], "nodeName": "node-a"},
        "status": status});
    mover_fact(&serde_json::from_value(pod).unwrap(), false)
}

#[test]
fn states_of_pods() {
    let container = |state: Value| {
        json!([{"name": "mover", "state": state, "image": "", "imageID": "", "ready": true,
        "restartCount": 0}])
    };
    let ended = |message: &str| json!({"terminated": {"exitCode": 0, "message": message}});
    let waiting = json!({"waiting": {"reason": "CreateContainerConfigError", "message": "secret \"s3\" not found"}});
    let unscheduled = json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}]);
    let cases = [
        (json!({}), MoverState::Pending(None)),
        (
            json!({"phase": "Pending", "conditions": unscheduled}),
            MoverState::Pending(Some("Unschedulable: 0/3".into())),
        ),
        (
            json!({"phase": "Pending", "containerStatuses": container(waiting)}),
            MoverState::Pending(Some("CreateContainerConfigError: secret \"s3\" not found".into())),
        ),
        (json!({"phase": "Running"}), MoverState::Pending(None)),
        (json!({"phase": "Running", "containerStatuses": container(json!({"running": {}}))}), MoverState::Running),
        (
            json!({"phase": "Running", "containerStatuses": container(ended(r#"{"outcome":"forgotten"}"#))}),
            MoverState::Ended(Some(MoverOutcome::Forgotten)),
        ),
        (json!({"phase": "Failed", "containerStatuses": container(ended("panicked"))}), MoverState::Ended(None)),
        (json!({"phase": "Failed", "reason": "Evicted"}), MoverState::Ended(None)),
    ];
    for (status, expected) in cases {
        assert_eq!(fact(status.clone()).state, expected, "{status}");
    }
    assert_eq!(fact(json!({})).node.as_deref(), Some("node-a"));
}

#[test]
fn pods_lead_back_to_whom_they_are_for() {
    let index = Index::default();
    let backup: VirtualMachineBackup = serde_json::from_value(json!({
        "apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
        "metadata": {"name": "b", "namespace": "n", "uid": "u"}, "spec": {"source": {"name": "web"}},
    }))
    .unwrap();
    index.enter(&backup);
    let wakes = |key: &str, value: &str| {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"annotations": {key: value}}})).unwrap();
        format!("{:?}", pod_wakes(&index, &pod))
    };
    assert_eq!(wakes(ANNOTATION_BACKUP, "n/u"), r#"[Backup(("n", "b"))]"#);
    assert_eq!(wakes(ANNOTATION_BACKUP, "n/other"), "[]");
    assert_eq!(wakes(ANNOTATION_BACKUP, "nonsense"), "[]");
    assert_eq!(wakes(ANNOTATION_REPOSITORY, "BackupRepository/n/r"), r#"[Repository(("n", "r"))]"#);
    assert_eq!(wakes(ANNOTATION_REPOSITORY, "ClusterBackupRepository//r"), r#"[ClusterRepository("r")]"#);
    assert_eq!(wakes(ANNOTATION_REPOSITORY, "a/b/c/d"), "[]");
}

#[test]
fn a_finished_backup_is_kept_small_but_can_still_be_forgotten() {
    let mut backup: VirtualMachineBackup = serde_json::from_value(json!({
        "apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
        "metadata": {"name": "b", "namespace": "n", "uid": "u", "finalizers": ["virtfleece.io/backup"],
            "managedFields": [{}]},
        "spec": {"source": {"name": "web"}, "repositoryRef": {"name": "r"}, "deletionPolicy": "Delete"},
        "status": {"phase": "Completed", "backupID": "id", "repositoryVm": "n/web", "attempts": 1,
            "completionTime": "2026-01-01T00:00:00Z", "run": {"attempt": 1,
            "agent": {"instance": "i", "nodeName": "n"}, "state": "Succeeded"}},
    }))
    .unwrap();
    slim_backup(&mut backup);
    let status = backup.status.as_ref().unwrap();
    assert!(status.run.is_none() && backup.metadata.managed_fields.is_none());
    assert_eq!((status.backup_id.as_deref(), status.repository_vm.as_deref()), (Some("id"), Some("n/web")));
    assert!(backup.metadata.finalizers.is_some() && status.completion_time.is_some() && status.attempts == Some(1));
}
