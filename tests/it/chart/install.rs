//! Install, upgrade, uninstall.

use super::{OPERATOR, backup, chart, cluster, install};
use crate::cluster::{Helm, Kubectl};
use std::collections::BTreeSet;

/// All objects of the cluster whose kind a chart may have, and whatever the chart has, as `resource/namespace/name`.
fn everything(admin: &Kubectl) -> BTreeSet<String> {
    let resources = "all,sa,secrets,configmaps,leases,pdb,networkpolicies,roles,rolebindings,clusterroles,\
        clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings,crd,namespaces,\
        priorityclasses,mutatingwebhookconfigurations,validatingwebhookconfigurations";
    let list = admin.get(&["-A", resources]);
    let items = list["items"].as_array().expect("items");
    let name = |item: &serde_json::Value| {
        let text = |field: &str| item["metadata"][field].as_str().unwrap_or_default().to_owned();
        format!("{} {}/{}", item["kind"].as_str().expect("a kind"), text("namespace"), text("name"))
    };
    items.iter().map(name).collect()
}

/// What is there now and was not before.
fn left(admin: &Kubectl, before: &BTreeSet<String>) -> Vec<String> {
    everything(admin).difference(before).cloned().collect()
}

#[test]
fn an_uninstalled_release_leaves_the_definitions_and_nothing_else() {
    let cluster = cluster();
    let admin = cluster.admin();
    let before = everything(&admin);
    install(&cluster, &[]);
    assert!(left(&admin, &before).len() > 15, "{:?}", left(&admin, &before));
    cluster.create_namespace("team-a");
    let before = before
        .union(&everything(&admin).into_iter().filter(|name| name.contains("team-a")).collect())
        .cloned()
        .collect();
    admin.apply(&backup("team-a", "kept", "web"));

    let chart = chart();
    let upgrade = |arguments: &[&str]| {
        let command = [&["upgrade", OPERATOR, chart.as_str(), "-n", OPERATOR][..], arguments].concat();
        admin.helm(Helm::Four, command).unwrap_or_else(|error| panic!("helm upgrade: {error}"));
    };
    upgrade(&["--set", "controller.replicas=3", "--set", "image.tag=0.2.0", "--set", "networkPolicy.enabled=true"]);
    let deployment = admin.get(&["-n", OPERATOR, "deployment", "virt-fleece-controller"]);
    assert_eq!(deployment["spec"]["replicas"], 3);
    let image = &deployment["spec"]["template"]["spec"]["containers"][0]["image"];
    assert_eq!(image, "ghcr.io/virt-fleece/virt-fleece:0.2.0");
    assert!(everything(&admin).contains("NetworkPolicy virt-fleece/virt-fleece-agent"));
    // Back, with what the upgrade had added gone.
    upgrade(&["--reset-values"]);
    assert!(!everything(&admin).contains("NetworkPolicy virt-fleece/virt-fleece-agent"));

    admin
        .helm(Helm::Four, ["uninstall", OPERATOR, "-n", OPERATOR])
        .unwrap_or_else(|error| panic!("helm uninstall: {error}"));
    let definitions = ["backuprepositories", "clusterbackuprepositories", "virtualmachinebackups"]
        .map(|plural| format!("CustomResourceDefinition /{plural}.virtfleece.io"));
    assert_eq!(left(&admin, &before), definitions);
    admin.run(["-n", "team-a", "get", "vfb", "kept"]);

    // It takes its definitions up again, and lets go of them where it is told to.
    install(&cluster, &["--set", "crds.keep=false"]);
    admin.run(["-n", "team-a", "get", "vfb", "kept"]);
    admin
        .helm(Helm::Four, ["uninstall", OPERATOR, "-n", OPERATOR])
        .unwrap_or_else(|error| panic!("helm uninstall: {error}"));
    super::until("the definitions are gone", || left(&admin, &before).is_empty());
}

#[test]
fn plain_manifests_can_be_applied_again_and_deleted() {
    let cluster = crate::cluster::Cluster::start();
    let admin = cluster.admin();
    let file = super::checkout("deploy/virt-fleece.yaml").display().to_string();
    for _ in 0..2 {
        admin.run(["apply", "--server-side", "--validate=strict", "-f", &file]);
    }
    admin.run(["delete", "--wait=false", "-f", &file]);
    let kept = everything(&admin);
    // There is no controller that ends a namespace.
    let ours: Vec<_> = kept.iter().filter(|name| name.contains("fleece") && !name.starts_with("Namespace")).collect();
    assert!(ours.iter().all(|name| name.starts_with("CustomResourceDefinition")), "{ours:?}");
}

#[test]
fn helm_3_installs_upgrades_and_uninstalls() {
    let cluster = cluster();
    let admin = cluster.admin();
    let before = everything(&admin);
    let chart = chart();
    let helm = |arguments: &[&str]| {
        let said = admin.helm(Helm::Three, [arguments, &["-n", OPERATOR]].concat());
        said.unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
    };
    helm(&["install", OPERATOR, &chart, "--set", "crds.keep=false"]);
    helm(&["upgrade", OPERATOR, &chart, "--set", "crds.keep=false", "--set", "controller.replicas=3"]);
    let deployment = admin.get(&["-n", OPERATOR, "deployment", "virt-fleece-controller"]);
    assert_eq!(deployment["spec"]["replicas"], 3);
    helm(&["uninstall", OPERATOR]);
    super::until("nothing is left", || left(&admin, &before).is_empty());
}
