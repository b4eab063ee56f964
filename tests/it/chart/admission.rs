//! What the admission policies keep agents, tenants and administrators from: with real tokens, bound to real pods.

use super::{BACKUPS, CLUSTER_REPOSITORIES, OPERATOR, REPOSITORIES, account, backup, installed, merge_status};
use crate::cluster::{BoundTo, Cluster, Kubectl};
use serde_json::{Value, json};

const AGENT: &str = "virt-fleece-agent";
const CONTROLLER: &str = "virt-fleece-controller";

/// A pod of the operator on a node, for a token to be bound to.
fn operator_pod(cluster: &Cluster, name: &str, account: &str, node: &str) {
    cluster.admin().apply(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {OPERATOR}}}, \
         spec: {{serviceAccountName: {account}, nodeName: {node}, containers: [{{name: c, image: i}}]}}}}"
    ));
}

/// Two nodes with an agent each, and a controller.
struct Scene {
    cluster: Cluster,
    controller: Kubectl,
    a: Kubectl,
    b: Kubectl,
}

impl Scene {
    fn new() -> Self {
        let cluster = installed();
        for node in ["a", "b"] {
            cluster.create_node(node);
            operator_pod(&cluster, &format!("agent-{node}"), AGENT, node);
        }
        operator_pod(&cluster, "controller", CONTROLLER, "a");
        cluster.create_namespace("team-a");
        let controller = account(&cluster, CONTROLLER, Some("controller"));
        let [a, b] = ["agent-a", "agent-b"].map(|pod| account(&cluster, AGENT, Some(pod)));
        Self { cluster, controller, a, b }
    }

    /// A backup whose attempt is assigned to a node.
    fn assigned(&self, name: &str, node: &str) {
        self.cluster.admin().apply(&backup("team-a", name, "web"));
        let status = json!({
            "phase": "Preparing",
            "attempts": 1,
            "conditions": [{"type": "Ready", "status": "False", "reason": "InProgress", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}],
            "assignment": {
                "attempt": 1, "nodeName": node, "virtualMachineUID": "u", "repositoryVm": "team-a/web",
                "mover": {"namespace": "team-a", "name": "m", "uid": "u"}
            }
        });
        patch(&self.controller, name, &status).expect("an assignment");
    }
}

/// A report of an agent.
fn run(node: &str, attempt: u64, state: &str) -> Value {
    json!({ "run": { "attempt": attempt, "agent": { "instance": "i", "nodeName": node }, "state": state } })
}

/// A merge into the status of a backup.
fn patch(who: &Kubectl, name: &str, status: &Value) -> Result<(), String> {
    merge_status(who, BACKUPS, Some("team-a"), name, status)
}

/// Says that it was refused, and with which words.
#[track_caller]
fn refused<T>(what: &str, result: Result<T, String>, words: &str) {
    match result {
        Ok(_) => panic!("{what}: it was let through"),
        Err(error) => assert!(error.contains(words), "{what}: {error}"),
    }
}

#[test]
fn an_agent_reports_runs_of_its_own_node_and_nothing_else() {
    let scene = Scene::new();
    let Scene { a, b, .. } = &scene;
    assert_eq!(a.who_am_i()["extra"]["authentication.kubernetes.io/node-name"], json!(["a"]));
    scene.assigned("one", "a");

    // What an agent does: by server-side apply, as its own manager.
    let apply = |who: &Kubectl, status: &Value| {
        let object = json!({ "apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
            "metadata": { "name": "one", "namespace": "team-a" }, "status": status });
        let arguments =
            ["apply", "--server-side", "--subresource=status", "--field-manager=virt-fleece-agent", "-f", "-"];
        who.feed(arguments, &object.to_string())
    };
    apply(a, &run("a", 1, "Claimed")).expect("a claim");
    apply(a, &run("a", 1, "Reading")).expect("progress");

    let elsewhere = "this backup is not assigned to node b";
    refused("of another node", patch(b, "one", &run("b", 1, "Failed")), elsewhere);
    refused("of another node, by apply", apply(b, &run("b", 1, "Failed")), "not assigned to node b");
    refused("in another's name", patch(b, "one", &run("a", 1, "Failed")), elsewhere);
    let shape = "names the agent's own node, and the attempt that is assigned";
    refused("another node in the claim", patch(a, "one", &run("b", 1, "Reading")), shape);
    refused("an attempt to come", patch(a, "one", &run("a", 2, "Reading")), shape);
    refused("no run", patch(a, "one", &json!({ "run": null })), shape);

    let other = "an agent writes status.run, the controller all else";
    for status in [
        json!({ "phase": "Completed" }),
        json!({ "backupID": "x" }),
        json!({ "attempts": null }),
        json!({ "repositoryVm": "team-b/db" }),
        json!({ "assignment": { "repositoryVm": "team-b/db" } }),
        json!({ "assignment": { "mover": { "namespace": "team-b" } } }),
        json!({ "assignment": { "abort": { "reason": "x", "message": "x" } } }),
        json!({ "assignment": { "launcher": { "instanceUID": "u", "podName": "p", "podUID": "u" } } }),
        json!({ "conditions": [] }),
        json!({ "observedGeneration": 9 }),
    ] {
        refused(&status.to_string(), patch(a, "one", &status), other);
        let mut both = run("a", 1, "Reading");
        both.as_object_mut().expect("an object").extend(status.as_object().expect("an object").clone());
        refused(&both.to_string(), patch(a, "one", &both), other);
    }
    refused("takes a backup over", patch(b, "one", &json!({ "assignment": { "nodeName": "b" } })), elsewhere);
    refused("an assignment away", patch(a, "one", &json!({ "assignment": null })), "virt-fleece-agents");

    // Terminal is terminal, until the controller orders another attempt.
    patch(a, "one", &run("a", 1, "Failed")).expect("a result");
    let ended = "this attempt has ended";
    refused("a failure made good", patch(a, "one", &run("a", 1, "Succeeded")), ended);
    refused("begun again", patch(a, "one", &run("a", 1, "Claimed")), ended);
    patch(a, "one", &run("a", 1, "Failed")).expect("the same again");
    let next = json!({ "assignment": { "attempt": 2, "nodeName": "b" } });
    patch(&scene.controller, "one", &next).expect("another attempt");
    refused("moved away", patch(a, "one", &run("a", 1, "Failed")), "not assigned to node a");
    patch(b, "one", &run("b", 2, "Claimed")).expect("the next attempt");
    refused("late", patch(a, "one", &run("a", 2, "Aborted")), "not assigned to node a");

    // Nothing is assigned yet.
    scene.cluster.admin().apply(&backup("team-a", "two", "web"));
    refused("unasked", patch(a, "two", &run("a", 1, "Claimed")), "not assigned to node a");
}

#[test]
fn a_token_without_a_node_reports_nothing() {
    let scene = Scene::new();
    scene.assigned("one", "a");
    let admin = scene.cluster.admin();
    // Made by whoever may make tokens of the account, and by a pod that no node has taken.
    let unbound = account(&scene.cluster, AGENT, None);
    refused("unbound", patch(&unbound, "one", &run("a", 1, "Claimed")), "this token names no node");
    admin.apply(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: pending, namespace: {OPERATOR}}}, \
         spec: {{serviceAccountName: {AGENT}, containers: [{{name: c, image: i}}]}}}}"
    ));
    let pending = account(&scene.cluster, AGENT, Some("pending"));
    refused("unscheduled", patch(&pending, "one", &run("a", 1, "Claimed")), "this token names no node");
    // One for a node: the API server makes it for nobody but that node, and it is as good as that node's agent.
    let token = admin.token(OPERATOR, AGENT, Some(BoundTo::Node("b")));
    let node = scene.cluster.bearer(&token);
    refused("of a node", patch(&node, "one", &run("a", 1, "Claimed")), "node");
    // A token ends with its pod.
    admin.run(["-n", OPERATOR, "delete", "pod", "agent-a", "--force", "--grace-period=0"]);
    super::until("the token of the deleted pod is void", || {
        patch(&scene.a, "one", &run("a", 1, "Claimed")).is_err_and(|error| error.contains("Unauthorized"))
    });
}

#[test]
fn agents_change_no_specs_and_make_and_delete_nothing_even_where_a_role_lets_them() {
    let scene = Scene::new();
    let Scene { a, cluster, .. } = &scene;
    scene.assigned("one", "a");
    let attempts = |words: &str| {
        let spec = r#"{"spec":{"cancel":true}}"#;
        refused("spec", a.attempt(["-n", "team-a", "patch", "vfb", "one", "--type=merge", "-p", spec]), words);
        let finalizers = r#"{"metadata":{"finalizers":["virtfleece.io/backup"]}}"#;
        refused(
            "finalizer",
            a.attempt(["-n", "team-a", "patch", "vfb", "one", "--type=merge", "-p", finalizers]),
            words,
        );
        refused("delete", a.attempt(["-n", "team-a", "delete", "vfb", "one"]), words);
        refused("create", a.feed(["create", "-f", "-"], &backup("team-a", "three", "web")), words);
        let location = json!({ "location": "s3://elsewhere" });
        refused("repository", merge_status(a, REPOSITORIES, Some("team-a"), "main", &location), words);
    };
    cluster.admin().apply(
        "{apiVersion: virtfleece.io/v1alpha1, kind: BackupRepository, metadata: {name: main, namespace: team-a}, \
         spec: {persistentVolumeClaim: {claimName: c}, passphraseSecretRef: {name: p}}}",
    );
    attempts("forbidden");
    // Somebody is generous. (kubectl reads before it patches.)
    let all = ["create", "clusterrolebinding", "generous", "--clusterrole=cluster-admin"];
    cluster.admin().run([&all[..], &["--serviceaccount=virt-fleece:virt-fleece-agent"]].concat());
    super::until("the binding is known", || a.attempt(["get", "secrets", "-A"]).is_ok());
    attempts("an agent reports the status of backups");
}

#[test]
fn nobody_but_the_operator_writes_the_status() {
    let scene = Scene::new();
    scene.assigned("one", "a");
    let admin = scene.cluster.admin();
    let words = "the status of this object is written by virt-fleece alone";
    refused("an administrator", patch(&admin, "one", &json!({ "phase": "Completed" })), words);
    refused("a run", patch(&admin, "one", &run("a", 1, "Succeeded")), words);
    admin.apply(
        "{apiVersion: virtfleece.io/v1alpha1, kind: ClusterBackupRepository, metadata: {name: shared}, \
         spec: {persistentVolumeClaim: {claimName: c}, passphraseSecretRef: {name: p}}}",
    );
    let location = json!({ "location": "s3://elsewhere" });
    refused("a repository", merge_status(&admin, CLUSTER_REPOSITORIES, None, "shared", &location), words);
    // A status in an object that is created is dropped by the API server.
    let mut object: Value = json!({ "apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
        "metadata": { "name": "born", "namespace": "team-a" },
        "spec": { "source": { "name": "web" }, "repositoryRef": { "name": "main" } } });
    object["status"] = json!({ "phase": "Completed", "backupID": "x" });
    admin.feed(["create", "-f", "-"], &object.to_string()).expect("a backup");
    assert!(admin.get(&["-n", "team-a", "vfb", "born"]).get("status").is_none());
    // The controller does all of this.
    let status = json!({ "conditions": [{"type": "Ready", "status": "True", "reason": "Probed", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}] });
    merge_status(&scene.controller, CLUSTER_REPOSITORIES, None, "shared", &status).expect("a status of the controller");
    patch(&scene.controller, "one", &json!({ "phase": "Running" })).expect("the controller's phase");
}

#[test]
fn nobody_but_the_controller_makes_pods_that_look_like_movers() {
    let scene = Scene::new();
    let admin = scene.cluster.admin();
    let pod = |name: &str, metadata: &Value| {
        let mut pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": "team-a" },
            "spec": { "automountServiceAccountToken": false, "containers": [{ "name": "c", "image": "i" }] } });
        pod["metadata"].as_object_mut().expect("an object").extend(metadata.as_object().expect("an object").clone());
        pod.to_string()
    };
    let label = json!({ "labels": { "virtfleece.io/backup": "one", "app": "x" },
        "annotations": { "virtfleece.io/backup": "team-a/uid", "other": "x" } });
    let words = "pods with the labels of virt-fleece are movers";
    let create = |who: &Kubectl, pod: &str| who.feed(["create", "-f", "-"], pod);
    refused("planted", create(&admin, &pod("planted", &label)), words);
    let managed = json!({ "labels": { "app.kubernetes.io/managed-by": "virt-fleece-controller" } });
    refused("planted, without the backup's name", create(&admin, &pod("planted", &managed)), words);
    create(&admin, &pod("plain", &json!({}))).expect("a pod of a tenant");
    let change =
        |name: &str, patch: &str| admin.attempt(["-n", "team-a", "patch", "pod", name, "--type=merge", "-p", patch]);
    refused("dressed up", change("plain", r#"{"metadata":{"labels":{"virtfleece.io/backup":"one"}}}"#), words);

    create(&scene.controller, &pod("mover", &label)).expect("a mover");
    for change_of in [
        r#"{"metadata":{"labels":{"virtfleece.io/backup":null}}}"#,
        r#"{"metadata":{"labels":{"virtfleece.io/backup":"two"}}}"#,
        r#"{"metadata":{"annotations":{"virtfleece.io/backup":"team-b/uid"}}}"#,
        r#"{"metadata":{"annotations":{"virtfleece.io/vm-definition":"{}"}}}"#,
    ] {
        refused(change_of, change("mover", change_of), words);
    }
    change("mover", r#"{"metadata":{"labels":{"app":"y"},"annotations":{"other":"y"}}}"#).expect("what is not ours");
    // The kubelet goes on with its work on it, and it can be deleted.
    let status = r#"{"status":{"phase":"Running"}}"#;
    let kubelet = ["-n", "team-a", "patch", "pod", "mover", "--subresource=status", "--type=merge", "-p", status];
    admin.run(kubelet);
    admin.run(["-n", "team-a", "delete", "pod", "mover", "--force", "--grace-period=0"]);
}
