//! Stopped VMs, tenants, a cluster repository, images on a claim.

use super::{BACKUP_LIMIT, DISKS, Operator, condition, id};
use crate::{
    bed::{cli::Cli, flavour::Flavour},
    node::{Launcher, create_vm},
};
use serde_json::json;
use std::{fs, os::unix::fs::FileExt};

#[test]
fn a_stopped_vm_is_backed_up_from_its_claims() {
    let operator = Operator::start(&["node-a"]);
    operator.tenant("prod");
    create_vm(&operator.admin(), "prod", "web", &DISKS, "Halted");
    let directory = tempfile::tempdir().expect("a directory");
    for disk in &DISKS {
        let claim = format!("web-{}", disk.name);
        let path = directory.path().join(&claim);
        fs::create_dir(&path).expect("a claim");
        let image = fs::File::create(path.join("disk.img")).expect("a disk");
        image.set_len(disk.size).expect("its size");
        image.write_all_at(&vec![7; 300_000], 1_000_000).expect("some content");
        image.write_all_at(&[9; 512], disk.size - 512).expect("some content");
        operator.nodes[0].kubelet().claim("prod", &claim, &path);
        operator.admin().apply(
            &json!({
                "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim, "namespace": "prod"},
                "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "64Mi"}}},
            })
            .to_string(),
        );
    }
    operator.back_up("prod", "cold", "web", &json!({}));
    let backup = operator.complete("prod", "cold");
    assert_eq!(backup["status"]["run"]["engine"], "offline", "{backup:#}");
    let images = operator.restored("prod", "web", &id(&backup));
    for (disk, image) in DISKS.iter().zip(images) {
        let file = directory.path().join(format!("web-{}", disk.name)).join("disk.img");
        assert!(fs::read(file).expect("the disk") == image, "{} differs", disk.name);
    }
}

#[test]
fn two_tenants_back_up_side_by_side_and_reach_nothing_of_each_other() {
    let operator = Operator::start(&["node-a", "node-b"]);
    operator.tenant("blue");
    operator.tenant("green");
    let vms = [
        Launcher::start(&operator.cluster, &operator.nodes[0], Flavour::Allowlist, ("blue", "web"), &DISKS),
        Launcher::start(&operator.cluster, &operator.nodes[1], Flavour::Qemu10, ("green", "web"), &DISKS),
    ];
    operator.back_up("blue", "one", "web", &json!({}));
    operator.back_up("green", "one", "web", &json!({}));
    for (namespace, launcher) in ["blue", "green"].iter().zip(&vms) {
        let backup = operator.complete(namespace, "one");
        let images = operator.restored(namespace, "web", &id(&backup));
        let files: Vec<Vec<u8>> = launcher.files().iter().map(|path| fs::read(path).expect("a disk")).collect();
        assert!(images == files, "the disks of {namespace} differ");
    }
    // A repository is looked for in the backup's own namespace alone.
    operator.admin().run(["-n", "green", "delete", "vfrepo", "main"]);
    operator.back_up("green", "two", "web", &json!({}));
    let waiting = operator.until("green", "two", BACKUP_LIMIT, "told that the repository is missing", |backup| {
        backup["status"]["reason"].as_str().is_some_and(|reason| reason.contains("Repository"))
    });
    assert!(condition(&waiting, "Complete").is_none_or(|(status, _)| status != "True"), "{waiting:#}");
}

#[test]
fn a_cluster_repository_serves_the_namespaces_that_it_allows() {
    let operator = Operator::start(&["node-a"]);
    operator.secrets(super::OPERATOR);
    operator.cluster.create_namespace("blue");
    operator.cluster.create_namespace("red");
    let mut repository = operator.repository("shared", "main");
    repository["kind"] = json!("ClusterBackupRepository");
    repository["metadata"] = json!({"name": "shared"});
    repository["spec"]["allowedNamespaces"] = json!({"names": ["blue"]});
    operator.admin().apply(&repository.to_string());
    operator.wait(super::OPERATOR, "cvfrepo/shared", "Ready", BACKUP_LIMIT);
    let reference = json!({"repositoryRef": {"kind": "ClusterBackupRepository", "name": "shared"}});
    let launcher = Launcher::start(&operator.cluster, &operator.nodes[0], Flavour::Allowlist, ("blue", "web"), &DISKS);
    operator.back_up("blue", "one", "web", &reference);
    let backup = operator.complete("blue", "one");
    // The namespace has a repository of its own in it.
    let to = tempfile::tempdir().expect("a directory");
    let id = id(&backup);
    let restore = operator.cli("shared", "main/blue", &["restore", "--vm", "blue/web", "--backup", &id]);
    restore.arg("--output").arg(to.path()).run().success();
    for (disk, file) in DISKS.iter().zip(launcher.files()) {
        let restored = fs::read(to.path().join(format!("{}.raw", disk.name))).expect("restored");
        assert!(fs::read(file).expect("a disk") == restored, "{} differs", disk.name);
    }
    create_vm(&operator.admin(), "red", "web", &DISKS, "Halted");
    operator.back_up("red", "one", "web", &reference);
    operator.until("red", "one", BACKUP_LIMIT, "refused", |backup| {
        backup["status"]["message"].as_str().is_some_and(|message| message.contains("shared"))
            && backup["status"]["phase"] != "Completed"
            && backup["status"]["run"].is_null()
    });
}

#[test]
fn images_on_a_claim_are_read_by_qemu_img_alone() {
    let operator = Operator::start(&["node-a"]);
    operator.cluster.create_namespace("prod");
    let directory = tempfile::tempdir().expect("a directory");
    operator.nodes[0].kubelet().claim("prod", "images", directory.path());
    // The claim's file system belongs to the mover's group, as a kubelet sees to.
    std::os::unix::fs::chown(directory.path(), Some(107), Some(107)).expect("the owner of the claim");
    operator.admin().apply(
        &json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "images", "namespace": "prod"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        })
        .to_string(),
    );
    let launcher = Launcher::start(&operator.cluster, &operator.nodes[0], Flavour::Allowlist, ("prod", "web"), &DISKS);
    let target = json!({"persistentVolumeClaim": {"claimName": "images"}});
    operator.admin().apply(
        &json!({
            "apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
            "metadata": {"name": "images", "namespace": "prod"},
            "spec": {"source": {"name": "web"}, "target": target},
        })
        .to_string(),
    );
    operator.complete("prod", "images");
    let to = tempfile::tempdir().expect("a directory");
    Cli::new(["restore", "--vm", "prod.web", "--qcow2-dir"])
        .arg(directory.path())
        .arg("--output")
        .arg(to.path())
        .run()
        .success();
    for (disk, file) in DISKS.iter().zip(launcher.files()) {
        let restored = fs::read(to.path().join(format!("{}.raw", disk.name))).expect("restored");
        assert!(fs::read(file).expect("a disk") == restored, "{} differs", disk.name);
    }
}
