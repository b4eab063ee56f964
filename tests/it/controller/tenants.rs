//! Tenants are kept apart: names are looked up at home, or in what the cluster's administrator allows.

use serde_json::json;

use super::scene::{OPERATOR, Scene, repository, text};

#[test]
fn repositories_of_others_are_out_of_reach() {
    let scene = Scene::start();
    let _controller = scene.controller("one", &[]);
    scene.admin.apply(&repository("BackupRepository", "private", Some("other"), &json!({})));
    scene.running_vm("team", "web", "node-a");
    scene.backup("team", "theirs", "web", &json!({"repositoryRef": {"name": "private"}}));
    scene.until_reason("team", "theirs", "RepositoryNotFound");
    scene.admin.run(["-n", "team", "delete", "vfb", "theirs", "--timeout=60s"]);

    let shared =
        |allowed| repository("ClusterBackupRepository", "shared", None, &json!({"allowedNamespaces": allowed}));
    scene.admin.apply(&shared(json!({"names": ["other"]})));
    let reference = json!({"repositoryRef": {"kind": "ClusterBackupRepository", "name": "shared"}});
    scene.backup("team", "b", "web", &reference);
    let backup = scene.until_reason("team", "b", "RepositoryNotAllowed");
    assert!(text(&backup["status"]["message"]).contains("allowedNamespaces"));
    let pods = scene.admin.run(["-n", OPERATOR, "get", "pods", "-l", "virtfleece.io/backup=b", "-o", "name"]);
    assert_eq!(pods, "");
    // Allowed by a label.
    scene.admin.run(["label", "namespace", "team", "tier=gold"]);
    scene.admin.apply(&shared(json!({"names": [], "selector": {"matchLabels": {"tier": "gold"}}})));
    let backup = scene.until_assigned("team", "b", 1);
    assert_eq!(backup["status"]["assignment"]["mover"]["namespace"], OPERATOR);
    let pod = scene.mover("team", "b");
    assert_eq!(pod["metadata"].get("ownerReferences"), None, "an owner of another namespace is none");
    let uid = text(&backup["metadata"]["uid"]);
    assert_eq!(pod["metadata"]["annotations"]["virtfleece.io/backup"], format!("team/{uid}"));
    let config = text(&pod["spec"]["containers"][0]["env"][0]["value"]);
    assert!(config.contains(r#""url":"s3://backups/team""#), "{config}");
    // The mover goes with the backup, though no garbage collector knows of the two.
    scene.admin.run(["-n", "team", "delete", "vfb", "b", "--wait=false"]);
    scene.until("team", "b", "an abort", |status| status["assignment"]["abort"]["reason"] == "Deleted");
    scene.report("team", "b", 1, "Aborted", &json!({"reason": "Deleted"}));
    scene.until_gone("team", "b");
    let pods = scene.admin.run(["-n", OPERATOR, "get", "pods", "-l", "virtfleece.io/backup=b", "-o", "name"]);
    assert_eq!(pods, "");
}
