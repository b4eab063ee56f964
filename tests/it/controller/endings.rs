//! Ends of attempts and of backups that are not as planned.

use serde_json::json;

use super::scene::{Scene, committed, eventually, text};

/// A backup whose agent has claimed its work.
fn running(scene: &Scene, name: &str, vm: &str, changes: &serde_json::Value) {
    scene.running_vm("team", vm, "node-a");
    scene.backup("team", name, vm, changes);
    scene.until_assigned("team", name, 1);
    scene.report("team", name, 1, "Reading", &json!({}));
    scene.until_phase("team", name, "Running");
}

#[test]
fn a_migration_is_followed_by_another_attempt() {
    let scene = Scene::start();
    let _controller = scene.controller("one", &[]);
    running(&scene, "b", "web", &json!({}));
    let first = scene.mover("team", "b");
    scene.admin.apply(
        "{apiVersion: kubevirt.io/v1, kind: VirtualMachineInstanceMigration, metadata: {name: m, namespace: team}, \
         spec: {vmiName: web}}",
    );
    let backup = scene.until("team", "b", "an abort", |status| status["assignment"]["abort"]["reason"] == "Migrating");
    assert_eq!(backup["status"]["reason"], "Aborting");
    scene.report("team", "b", 1, "Aborted", &json!({"reason": "Migrating", "message": "undone"}));
    let backup = scene.until("team", "b", "waits", |status| {
        status["phase"] == "Pending" && status["retryAfter"].is_string() && status["assignment"].is_null()
    });
    assert_eq!(backup["status"].get("failures"), None, "no fault of its own");
    assert_eq!(backup["status"].get("activeNode"), None);
    scene.until_reason("team", "b", "Migrating");
    // It goes on where the VM is now.
    scene.admin.patch(&["-n", "team", "vmi", "web"], &json!({"status": {"nodeName": "node-b",
        "activePods": {text(&scene.admin.get(&["-n", "team", "pod", "virt-launcher-web"])["metadata"]["uid"]): "node-b"}}}));
    scene.admin.patch(&["-n", "team", "vmim", "m"], &json!({"status": {"phase": "Succeeded"}}));
    if scene.admin.get(&["-n", "team", "vmim", "m"])["status"]["phase"] != "Succeeded" {
        scene.admin.patch_status(&["-n", "team", "vmim", "m"], &json!({"phase": "Succeeded"}));
    }
    let backup = scene.until_assigned("team", "b", 2);
    assert_eq!(backup["status"]["assignment"]["nodeName"], "node-b");
    let second = scene.mover("team", "b");
    assert_ne!(first["metadata"]["name"], second["metadata"]["name"]);
    assert!(scene.events("team", "b").iter().any(|event| event == "BackupRetried"));
    let left = scene.admin.run(["-n", "team", "get", "pod", text(&first["metadata"]["name"]), "--ignore-not-found"]);
    assert_eq!(left, "", "the old mover was gone before");
    scene.report("team", "b", 2, "Succeeded", &json!({"backupID": "20261125T010203Z-00ff00ff"}));
    scene.until_phase("team", "b", "Completed");
}

#[test]
fn cancelled_deleted_and_late_backups_end() {
    let scene = Scene::start();
    let _controller = scene.controller("one", &["--max-backups-per-node=9"]);
    running(&scene, "cancelled", "vm-1", &json!({}));
    running(&scene, "deleted", "vm-2", &json!({"deletionPolicy": "Delete"}));
    let deadline = std::time::Instant::now();
    running(&scene, "late", "vm-3", &json!({"deadline": "30s"}));
    println!("three backups run after {:?}", deadline.elapsed());

    scene.admin.patch(&["-n", "team", "vfb", "cancelled"], &json!({"spec": {"cancel": true}}));
    scene.until("team", "cancelled", "an abort", |status| status["assignment"]["abort"]["reason"] == "Cancelled");
    scene.report("team", "cancelled", 1, "Aborted", &json!({"reason": "Cancelled"}));
    let backup = scene.until_phase("team", "cancelled", "Failed");
    assert_eq!(backup["status"]["reason"], "Cancelled");
    let stalled = backup["status"]["conditions"].as_array().expect("conditions").iter();
    assert!(stalled.clone().any(|c| c["type"] == "Stalled" && c["status"] == "True"));
    assert!(!stalled.clone().any(|c| c["type"] == "Reconciling"));

    scene.admin.run(["-n", "team", "delete", "vfb", "deleted", "--wait=false"]);
    scene.until("team", "deleted", "an abort", |status| status["assignment"]["abort"]["reason"] == "Deleted");
    // The agent was faster: it is complete, and its data goes with it.
    scene.report("team", "deleted", 1, "Succeeded", &json!({"backupID": "20261125T010203Z-00ff00ff"}));
    scene.until_gone("team", "deleted");
    assert!(scene.events("team", "deleted").iter().any(|event| event == "BackupForgotten"));

    // An agent that does not answer any more.
    let backup = scene.until_phase("team", "late", "Failed");
    assert_eq!(backup["status"]["reason"], "DeadlineExceeded", "{:#}", backup["status"]);
    scene.admin.run(["-n", "team", "delete", "vfb", "late", "cancelled", "--timeout=60s"]);
    eventually("no movers are left", || {
        let pods = scene.admin.run(["get", "pods", "-A", "-l", "app.kubernetes.io/component=mover", "-o", "name"]);
        pods.is_empty().then_some(())
    });
}

#[test]
fn what_the_mover_committed_is_complete_whatever_the_agent_says() {
    let mut scene = Scene::start();
    let _controller = scene.controller("one", &["--max-backups-per-node=9"]);
    running(&scene, "silent", "vm-1", &json!({"deletionPolicy": "Delete"}));
    running(&scene, "restarted", "vm-2", &json!({}));
    running(&scene, "lost", "vm-3", &json!({}));
    let movers = ["silent", "restarted", "lost"].map(|name| scene.mover("team", name));
    scene.stop_kubelet();
    // The agent died after the commit.
    scene.end_mover(&movers[0], &committed());
    let backup = scene.until_phase("team", "silent", "Completed");
    assert_eq!(backup["status"]["stored"], "734Mi");
    assert_eq!(backup["status"]["type"], "Incremental");
    // Its successor says that it failed, while the mover still commits.
    let failed = json!({"reason": "AgentRestarted", "message": "m", "retryable": true});
    scene.report("team", "restarted", 1, "Failed", &failed);
    scene.until_reason("team", "restarted", "MoverSettling");
    scene.end_mover(&movers[1], &committed());
    scene.until_phase("team", "restarted", "Completed");
    // Killed without a word: the agent is told to give up, then there is another attempt.
    scene.end_mover(&movers[2], "panicked at src/main.rs");
    scene.until("team", "lost", "an abort", |status| status["assignment"]["abort"]["reason"] == "MoverLost");
    scene.report("team", "lost", 1, "Failed", &json!({"reason": "MoverGone", "message": "m", "retryable": true}));
    let backup = scene.until("team", "lost", "over", |status| status["phase"] == "Pending");
    assert_eq!((&backup["status"]["reason"], &backup["status"]["failures"]), (&json!("MoverLost"), &json!(1)));
}
