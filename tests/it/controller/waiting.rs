//! What a backup waits for, and in which order.

use serde_json::json;

use super::scene::{Scene, repository, text};

#[test]
fn a_backup_waits_for_its_vm_and_its_repository() {
    let scene = Scene::start();
    let _controller = scene.controller("one", &["--max-backups-per-node=9"]);
    scene.backup("team", "early", "web", &json!({"repositoryRef": {"name": "later"}}));
    let backup = scene.until_reason("team", "early", "RepositoryNotFound");
    assert!(text(&backup["status"]["message"]).contains("BackupRepository team/later"), "{:#}", backup["status"]);
    assert_eq!(backup["status"]["phase"], "Pending");
    scene.admin.apply(&repository("BackupRepository", "later", Some("team"), &json!({})));
    scene.until_reason("team", "early", "VirtualMachineNotFound");
    let found = scene.admin.get(&["-n", "team", "vfrepo", "later"]);
    let status = &found["status"];
    assert_eq!((&status["backups"], &status["deduplicationRatio"]), (&json!(3), &json!("12.4")));
    assert_eq!(status["location"], "s3://backups");
    // Starting, then running.
    scene.vm("team", "web", "Starting");
    scene.until_reason("team", "early", "VirtualMachineStarting");
    scene.running_vm("team", "web", "node-a");
    scene.until_assigned("team", "early", 1);
    // Another one of the same VM.
    scene.backup("team", "second", "web", &json!({}));
    scene.until_reason("team", "second", "AnotherBackupRunning");
    scene.report("team", "early", 1, "Succeeded", &json!({"backupID": "20261125T010203Z-00ff00ff"}));
    scene.until_assigned("team", "second", 1);
    // A stopped VM's claims are read by the mover.
    scene.vm("team", "idle", "Stopped");
    scene.backup("team", "offline", "idle", &json!({}));
    let backup = scene.until_assigned("team", "offline", 1);
    assert_eq!(backup["status"]["assignment"].get("launcher"), None);
    let pod = scene.mover("team", "offline");
    let volumes = pod["spec"]["volumes"].as_array().expect("volumes").iter();
    let claims: Vec<_> = volumes.filter_map(|volume| volume.get("persistentVolumeClaim")).collect();
    assert_eq!(claims, [&json!({"claimName": "idle-root", "readOnly": true})]);
    scene.vm("team", "idle", "Starting");
    scene.until("team", "offline", "an abort", |s| s["assignment"]["abort"]["reason"] == "VirtualMachineStarted");
}

#[test]
fn places_are_limited_and_given_out_fairly() {
    let scene = Scene::start();
    for (namespace, vm) in [("team", "a"), ("team", "b"), ("team", "c"), ("team", "d"), ("other", "e")] {
        scene.running_vm(namespace, vm, "node-a");
    }
    let controller = scene.controller("one", &["--max-backups-per-node=2"]);
    for vm in ["a", "b"] {
        scene.backup("team", vm, vm, &json!({}));
        scene.until_assigned("team", vm, 1);
    }
    for (namespace, vm) in [("team", "c"), ("team", "d"), ("other", "e")] {
        scene.backup(namespace, vm, vm, &json!({}));
        scene.until_reason(namespace, vm, "NodeBusy");
    }
    // A leader that begins anew knows who has a place.
    drop(controller);
    let _controller = scene.controller("two", &["--max-backups-per-node=2"]);
    scene.report("team", "a", 1, "Succeeded", &json!({"backupID": "20261125T010203Z-00ff00ff"}));
    // The youngest, but its namespace has none at work.
    scene.until_assigned("other", "e", 1);
    for vm in ["c", "d"] {
        assert_eq!(scene.get("team", vm)["status"].get("attempts"), None, "{vm}");
    }
    scene.report("team", "b", 1, "Succeeded", &json!({"backupID": "20261125T010203Z-00ff00ff"}));
    scene.until_assigned("team", "c", 1);
    scene.until_reason("team", "d", "NodeBusy");
    scene.admin.run(["-n", "team", "delete", "vfb", "c", "--wait=false"]);
    scene.until("team", "c", "an abort", |status| status["assignment"]["abort"]["reason"] == "Deleted");
    scene.report("team", "c", 1, "Aborted", &json!({"reason": "Deleted"}));
    scene.until_gone("team", "c");
    scene.until_assigned("team", "d", 1);
}
