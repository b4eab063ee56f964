//! What the other tests count on, shown on the cluster itself.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{BoundTo, Cluster, Helm, Kubectl, Server};

/// A virtual machine with a disk of each kind that is told apart.
const MACHINE: &str = "
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {name: a, namespace: shop}
spec:
  runStrategy: Always
  instancetype: {kind: VirtualMachineInstancetype, name: small}
  preference: {name: linux}
  dataVolumeTemplates:
  - metadata: {name: a-data}
    spec: {source: {blank: {}}, storage: {resources: {requests: {storage: 1Gi}}}}
  template:
    metadata: {labels: {app: a}}
    spec:
      domain:
        devices:
          disks: [{name: root, disk: {bus: virtio}}, {name: data, disk: {bus: scsi}}, {name: seed, cdrom: {bus: sata}}]
      volumes:
      - {name: root, persistentVolumeClaim: {claimName: a-root}}
      - {name: data, dataVolume: {name: a-data}}
      - {name: seed, cloudInitNoCloud: {userData: '#cloud-config'}}
";

/// Its instance.
const INSTANCE: &str = "
apiVersion: kubevirt.io/v1
kind: VirtualMachineInstance
metadata: {name: a, namespace: shop}
spec:
  domain:
    machine: {type: q35}
    devices: {disks: [{name: root, disk: {bus: virtio}}]}
  volumes: [{name: root, persistentVolumeClaim: {claimName: a-root}}]
";

/// A migration of it.
const MIGRATION: &str = "
apiVersion: kubevirt.io/v1
kind: VirtualMachineInstanceMigration
metadata: {name: m, namespace: shop}
spec: {vmiName: a}
";

/// A service account's pod on a node.
const POD: &str = "
apiVersion: v1
kind: ServiceAccount
metadata: {name: agent, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: agent-a, namespace: shop}
spec:
  serviceAccountName: agent
  nodeName: node-a
  containers: [{name: agent, image: none}]
";

/// The status that `KubeVirt` gives a running instance.
fn running() -> Value {
    json!({
        "phase": "Running",
        "nodeName": "node-a",
        "activePods": { "0b0e0c2e-0000-0000-0000-000000000001": "node-a" },
        "evacuationNodeName": "node-a",
        "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": "2026-08-22T10:34:54Z" }],
        "changedBlockTracking": { "state": "Disabled" },
        "migratedVolumes": [{ "volumeName": "root", "sourcePVCInfo": { "claimName": "a-root", "volumeMode": "Block" } }],
        "migrationState": { "migrationUid": "1", "completed": false, "startTimestamp": "2026-08-22T10:34:54Z" },
        "volumeStatus": [{
            "name": "root",
            "target": "vda",
            "persistentVolumeClaimInfo": { "claimName": "a-root", "capacity": { "storage": "1Gi" } },
        }],
    })
}

/// A cluster with `KubeVirt`'s resources and the namespace `shop`.
fn with_kubevirt() -> Cluster {
    let cluster = Cluster::start();
    cluster.install_kubevirt();
    cluster.create_namespace("shop");
    cluster
}

/// Asserts that the API server refuses to serve this, and for want of a right.
fn assert_forbidden(result: Result<String, String>) {
    let error = result.expect_err("it was allowed");
    assert!(error.contains(" is forbidden: "), "{error}");
}

/// The names of all objects of a kind in `shop`.
fn names(kubectl: &Kubectl, kind: &str) -> String {
    kubectl.run(["-n", "shop", "get", kind, "-o", "name"])
}

#[test]
fn starts_within_seconds_and_leaves_nothing() {
    let begin = Instant::now();
    let cluster = Cluster::start();
    let took = begin.elapsed();
    println!("started in {took:?}");
    // Some five seconds on two cores that have little else to do; four times that where ten processes want them.
    assert!(took < Duration::from_secs(120), "{took:?}");

    let version: Value = serde_json::from_str(&cluster.admin().run(["version", "-o", "json"])).expect("JSON");
    println!("server {}", version["serverVersion"]["gitVersion"]);
    assert_eq!(version["serverVersion"]["gitVersion"], version["clientVersion"]["gitVersion"]);
    let minor: u32 = version["serverVersion"]["minor"].as_str().and_then(|minor| minor.parse().ok()).expect("a number");
    assert!(minor >= 33, "{version}");

    let (etcd, api_server) = (cluster.etcd.pid(), cluster.api_server.pid());
    let directory = cluster.directory.path().to_owned();
    drop(cluster);
    assert!(!directory.exists());
    for pid in [etcd, api_server] {
        assert!(!Path::new("/proc").join(pid).exists());
    }
}

#[test]
fn kubevirts_resources_have_their_shapes() {
    let cluster = with_kubevirt();
    let admin = cluster.admin();
    for manifest in [MACHINE, INSTANCE, MIGRATION] {
        admin.apply(manifest);
    }

    let machine = ["-n", "shop", "vm", "a"];
    let made = admin.get(&machine);
    assert_eq!(made["spec"]["template"]["spec"]["volumes"][2]["cloudInitNoCloud"]["userData"], "#cloud-config");
    assert_eq!(made["spec"]["dataVolumeTemplates"][0]["metadata"]["name"], "a-data");

    // The status is written through its subresource, and through nothing else.
    admin.run([&["patch", "--type=merge", "-p", r#"{"status":{"ready":true}}"#], &machine[..]].concat());
    assert_eq!(admin.get(&machine)["status"]["ready"], Value::Null);
    let status = json!({
        "printableStatus": "Running",
        "created": true,
        "ready": true,
        "volumeSnapshotStatuses": [{ "name": "root", "enabled": false, "reason": "no class" }],
    });
    admin.patch_status(&machine, &status);
    assert_eq!(admin.get(&machine)["status"], status);
    let columns = admin.run(["-n", "shop", "get", "vms"]);
    assert!(columns.contains("STATUS") && columns.contains("Running"), "{columns}");
}

#[test]
fn statuses_of_instances_and_migrations_are_kept() {
    let cluster = with_kubevirt();
    let admin = cluster.admin();
    admin.apply(INSTANCE);
    admin.apply(MIGRATION);

    let instance = ["-n", "shop", "vmi", "a"];
    admin.patch(&instance, &json!({ "status": running() }));
    assert_eq!(admin.get(&instance)["status"], running());
    assert!(admin.run(["-n", "shop", "get", "vmis"]).contains("node-a"));

    admin.patch_status(&["-n", "shop", "vmim", "m"], &json!({ "phase": "Running" }));
    assert_eq!(admin.get(&["-n", "shop", "vmims", "m"])["status"]["phase"], "Running");

    // A shape that is not KubeVirt's is refused.
    let error = admin.try_apply(&MIGRATION.replace("vmiName: a", "vmName: a")).expect_err("an unknown field");
    assert!(error.contains("vmName"), "{error}");
    let error = admin.try_apply(&INSTANCE.replace("name: root, disk", "disk")).expect_err("a disk without a name");
    assert!(error.contains("name: Required value"), "{error}");
}

#[test]
fn objects_outlive_servers_that_are_killed() {
    let mut cluster = with_kubevirt();
    let url = cluster.url();
    cluster.admin().apply(MACHINE);
    let uid = cluster.admin().get(&["-n", "shop", "vm", "a"])["metadata"]["uid"].clone();

    cluster.kill(Server::ApiServer);
    cluster.admin().attempt(["get", "namespaces"]).expect_err("a server that is dead");
    cluster.restart(Server::ApiServer);
    assert_eq!(cluster.url(), url);
    assert_eq!(cluster.admin().get(&["-n", "shop", "vm", "a"])["metadata"]["uid"], uid);

    cluster.kill(Server::Etcd);
    let attempt = cluster.admin().attempt(["-n", "shop", "create", "configmap", "early", "--request-timeout=3s"]);
    attempt.expect_err("the server has nowhere to keep it");
    cluster.restart(Server::Etcd);
    assert_eq!(cluster.admin().get(&["-n", "shop", "vm", "a"])["metadata"]["uid"], uid);
    cluster.admin().run(["-n", "shop", "create", "configmap", "late"]);
    assert!(names(&cluster.admin(), "configmaps").contains("late"));

    cluster.kill(Server::ApiServer);
    cluster.kill(Server::Etcd);
    cluster.restart_all();
    assert_eq!(cluster.admin().get(&["-n", "shop", "vm", "a"])["metadata"]["uid"], uid);
    assert!(names(&cluster.admin(), "configmaps").contains("late"));
}

#[test]
fn a_bound_token_tells_its_node() {
    let cluster = Cluster::start();
    let admin = cluster.admin();
    cluster.create_namespace("shop");
    cluster.create_node("node-a");
    admin.apply(POD);

    let agent = cluster.bearer(&admin.token("shop", "agent", Some(BoundTo::Pod("agent-a"))));
    let user = agent.who_am_i();
    assert_eq!(user["username"], "system:serviceaccount:shop:agent");
    assert_eq!(user["extra"]["authentication.kubernetes.io/node-name"], json!(["node-a"]));
    assert_eq!(user["extra"]["authentication.kubernetes.io/pod-name"], json!(["agent-a"]));
    let node = cluster.bearer(&admin.token("shop", "agent", Some(BoundTo::Node("node-a"))));
    assert_eq!(node.who_am_i()["extra"]["authentication.kubernetes.io/node-name"], json!(["node-a"]));
    let free = cluster.bearer(&admin.token("shop", "agent", None));
    assert_eq!(free.who_am_i()["extra"]["authentication.kubernetes.io/node-name"], Value::Null);

    // It is void with its pod. The API server remembers a token for ten seconds.
    admin.run(["-n", "shop", "delete", "pod", "agent-a", "--grace-period=0", "--force"]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while agent.attempt(["auth", "whoami"]).is_ok() {
        assert!(Instant::now() < deadline, "the token outlives its pod");
        std::thread::sleep(Duration::from_millis(500));
    }
}

#[test]
fn what_nobody_granted_is_forbidden() {
    let cluster = Cluster::start();
    let admin = cluster.admin();
    cluster.create_namespace("shop");
    cluster.create_node("node-a");
    cluster.create_node("node-b");
    admin.apply(POD);

    let agent = cluster.bearer(&admin.token("shop", "agent", None));
    assert_forbidden(agent.attempt(["-n", "shop", "get", "configmaps"]));
    assert_forbidden(agent.attempt(["-n", "shop", "create", "configmap", "a"]));
    admin.run(["-n", "shop", "create", "role", "reader", "--verb=get,list", "--resource=configmaps"]);
    admin.run(["-n", "shop", "create", "rolebinding", "reader", "--role=reader", "--serviceaccount=shop:agent"]);
    assert!(names(&agent, "configmaps").contains("kube-root-ca.crt"));
    assert_forbidden(agent.attempt(["-n", "shop", "create", "configmap", "a"]));
    assert_forbidden(agent.attempt(["-n", "default", "get", "configmaps"]));

    // A kubelet writes its own node only: the plugin NodeRestriction.
    let kubelet = cluster.user("system:node:node-a", &["system:nodes"]);
    kubelet.run(["annotate", "node", "node-a", "a=b"]);
    assert_forbidden(kubelet.attempt(["annotate", "node", "node-b", "a=b"]));
}

#[test]
fn helm_installs_upgrades_and_uninstalls() {
    let cluster = Cluster::start();
    cluster.create_namespace("shop");
    let chart = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(chart.path().join("templates")).expect("a directory");
    let write = |name: &str, text: &str| std::fs::write(chart.path().join(name), text).expect("a file of the chart");
    write("Chart.yaml", "apiVersion: v2\nname: greeting\nversion: 1.0.0\n");
    write("values.yaml", "word: hello\n");
    write(
        "templates/configmap.yaml",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: {{ .Release.Name }}}\ndata: {word: {{ .Values.word }}}\n",
    );

    let admin = cluster.admin();
    let chart = chart.path().to_str().expect("a path in UTF-8");
    for helm in [Helm::Four, Helm::Three] {
        let run = |arguments: &[&str]| admin.helm(helm, [&["-n", "shop"], arguments].concat()).expect("Helm");
        let word = || admin.get(&["-n", "shop", "configmap", "greeting"])["data"]["word"].clone();
        run(&["install", "greeting", chart]);
        assert_eq!(word(), "hello");
        run(&["upgrade", "greeting", chart, "--set", "word=goodbye"]);
        assert_eq!(word(), "goodbye");
        run(&["uninstall", "greeting"]);
        assert!(!names(&admin, "configmaps").contains("greeting"));
        assert!(!names(&admin, "secrets").contains("greeting"));
    }
}
