//! The life of a backup, and what it looks like from outside.

use serde_json::json;

use super::scene::{Scene, committed, text};

fn conditions(backup: &serde_json::Value) -> Vec<String> {
    let conditions = backup["status"]["conditions"].as_array().expect("conditions");
    let mut shown: Vec<_> = conditions
        .iter()
        .map(|c| format!("{}={}:{}", text(&c["type"]), text(&c["status"]), text(&c["reason"])))
        .collect();
    shown.sort();
    shown
}

#[test]
fn a_backup_goes_through_its_life() {
    let scene = Scene::start();
    scene.running_vm("team", "web", "node-a");
    // Before any controller lives: what it sees first is what an old object looks like.
    scene.backup("team", "nightly", "web", &json!({}));
    let _controller = scene.controller("one", &[]);
    let backup = scene.until_assigned("team", "nightly", 1);
    let status = &backup["status"];
    assert_eq!(conditions(&backup), ["Ready=False:AwaitingAgent", "Reconciling=True:AwaitingAgent"]);
    assert_eq!((&status["phase"], &status["observedGeneration"]), (&json!("Preparing"), &json!(1)));
    assert_eq!(backup["metadata"]["finalizers"], json!(["virtfleece.io/backup"]));
    assert_eq!(backup["metadata"]["labels"]["virtfleece.io/virtual-machine"], "web");
    let order = &status["assignment"];
    assert_eq!((&order["nodeName"], &order["repositoryVm"]), (&json!("node-a"), &json!("team/web")));
    assert_eq!(status["activeNode"], "node-a");
    let uid = |kind: &str, name: &str| scene.admin.get(&["-n", "team", kind, name])["metadata"]["uid"].clone();
    assert_eq!(order["virtualMachineUID"], uid("vm", "web"));
    assert_eq!(order["launcher"]["instanceUID"], uid("vmi", "web"));
    assert_eq!(order["launcher"]["podUID"], uid("pod", "virt-launcher-web"));
    assert_eq!(order["launcher"]["podName"], "virt-launcher-web");
    let mover = scene.mover("team", "nightly");
    assert_eq!(order["mover"]["uid"], mover["metadata"]["uid"]);
    assert_eq!(mover["metadata"]["ownerReferences"][0]["uid"], backup["metadata"]["uid"]);
    let definition = text(&mover["metadata"]["annotations"]["virtfleece.io/vm-definition"]);
    let definition: serde_json::Value = serde_json::from_str(definition).expect("JSON");
    assert_eq!(definition["virtualMachine"]["metadata"]["name"], "web");
    assert_eq!(definition["virtualMachine"]["metadata"].get("managedFields"), None);

    scene.report("team", "nightly", 1, "Claimed", &json!({}));
    scene.until_phase("team", "nightly", "Running");
    let reading = json!({"progress": "42%", "pointInTime": "2026-11-25T01:02:03Z",
        "quiesce": {"frozen": true, "duration": "46ms"},
        "volumes": [{"name": "root", "virtualBytes": 10, "type": "Incremental", "storedBytes": 769_654_784}]});
    scene.report("team", "nightly", 1, "Reading", &reading);
    scene.until("team", "nightly", "progress", |status| status["progress"] == "42%" && status["type"] == "Incremental");
    let mut done = reading;
    done["backupID"] = json!("20261125T010203Z-00ff00ff");
    scene.end_mover(&mover, &committed());
    scene.report("team", "nightly", 1, "Succeeded", &done);
    scene.admin.run(["-n", "team", "wait", "--for=condition=Complete", "--timeout=60s", "vfb/nightly"]);
    let backup = scene.get("team", "nightly");
    let expected = ["Complete=True:Completed", "Quiesced=True:Frozen", "Ready=True:Completed"];
    assert_eq!(conditions(&backup), expected);
    let status = &backup["status"];
    assert_eq!((&status["stored"], &status["progress"]), (&json!("734Mi"), &json!("100%")));
    assert_eq!(status["backupID"], "20261125T010203Z-00ff00ff");
    assert_eq!(status["run"]["state"], "Succeeded", "the agent's part is untouched");
    assert!(status.get("reason").is_none() && status.get("activeNode").is_none(), "{status:#}");

    // Nothing is left: no mover, no finalizer.
    let backup = super::scene::eventually("the finalizer goes", || {
        let backup = scene.get("team", "nightly");
        backup["metadata"].get("finalizers").is_none().then_some(backup)
    });
    let pods = scene.admin.run(["get", "pods", "-A", "-l", "virtfleece.io/backup=nightly", "-o", "name"]);
    assert_eq!(pods, "");
    assert_eq!(backup["status"]["phase"], "Completed");
    let events = scene.events("team", "nightly");
    for reason in ["BackupStarted", "MoverCreated", "BackupRunning", "BackupCompleted"] {
        assert!(events.iter().any(|event| event == reason), "{reason}: {events:?}");
    }
    let table = scene.admin.run(["-n", "team", "get", "vfb"]);
    println!("{table}");
    let columns: Vec<_> = table.lines().next().expect("a header").split_whitespace().collect();
    assert_eq!(columns, ["NAME", "VM", "TYPE", "PHASE", "PROGRESS", "STORED", "AGE"]);
    let row: Vec<_> = table.lines().nth(1).expect("a row").split_whitespace().collect();
    assert_eq!(row[..6], ["nightly", "web", "Incremental", "Completed", "100%", "734Mi"]);
    // With its data kept, it goes at once.
    scene.admin.run(["-n", "team", "delete", "vfb", "nightly", "--timeout=30s"]);
}

#[test]
fn the_api_server_refuses_what_makes_no_sense() {
    let scene = Scene::start();
    let refused = |manifest: &str, why: &str| {
        let error = scene.admin.try_apply(manifest).expect_err("it was accepted");
        assert!(error.contains(why), "{error}");
    };
    let of = |changes| super::scene::backup("team", "b", "web", &changes);
    let target = json!({"persistentVolumeClaim": {"claimName": "c"}});
    refused(&of(json!({"target": target})), "either repositoryRef or target");
    refused(&of(json!({"repositoryRef": null})), "either repositoryRef or target");
    refused(&of(json!({"deadline": "0s"})), "a duration greater than zero");
    refused(&of(json!({"type": "Half"})), "Unsupported value");
    scene.admin.apply(&of(json!({})));
    refused(&super::scene::backup("team", "b", "other", &json!({})), "a backup is made once");
    refused(&of(json!({"repositoryRef": {"name": "elsewhere"}})), "a backup is made once");
    refused(&of(json!({"deadline": "1h"})), "a backup is made once");
    scene.admin.apply(&of(json!({"deletionPolicy": "Delete"})));
    scene.admin.apply(&of(json!({"cancel": true})));
    refused(&of(json!({"cancel": false})), "stays cancelled");
    let moved = json!({"s3": {"bucket": "elsewhere", "credentialsSecretRef": {"name": "s3"}}});
    let repository = |changes| super::scene::repository("BackupRepository", "repo", Some("team"), &changes);
    refused(&repository(moved), "the place of a repository is fixed");
    refused(&repository(json!({"probeInterval": "1s"})), "at least a minute");
    let up = json!({"s3": {"bucket": "backups", "prefix": "a/../b", "credentialsSecretRef": {"name": "s3"}}});
    refused(&super::scene::repository("BackupRepository", "new", Some("team"), &up), "no part of a prefix");
}
