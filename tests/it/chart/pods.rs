//! How much the pods ask for, in the judgement of Pod Security admission.

use super::{OPERATOR, find, installed, objects, render::rendered};
use serde_json::{Value, json};

/// The pod that a workload makes.
fn pod(object: &Value, namespace: &str) -> String {
    let mut pod = object["spec"]["template"].clone();
    pod["apiVersion"] = json!("v1");
    pod["kind"] = json!("Pod");
    pod["metadata"]["name"] = json!("pod");
    pod["metadata"]["namespace"] = json!(namespace);
    // Its own namespace has the account.
    pod["spec"]["serviceAccountName"] = json!("default");
    pod.to_string()
}

#[test]
fn the_controller_is_restricted_and_the_agent_asks_for_what_is_written_down() {
    let cluster = installed();
    let admin = cluster.admin();
    let all = objects(&admin, &rendered("defaults"));
    for level in ["restricted", "baseline"] {
        cluster.create_namespace(level);
        admin.run(["label", "namespace", level, &format!("pod-security.kubernetes.io/enforce={level}")]);
    }
    let create = |pod: &str| admin.feed(["create", "--dry-run=server", "-f", "-"], pod);

    create(&pod(find(&all, "Deployment", "virt-fleece-controller"), "restricted")).expect("a restricted controller");

    let agent = find(&all, "DaemonSet", "virt-fleece-agent");
    let said = create(&pod(agent, "baseline")).expect_err("an agent that needs no privileges");
    // All that it asks for beyond the baseline; a further privilege makes the sentence another one.
    let reasons = said.split_once(": ").expect("reasons").1;
    for expected in ["host namespaces (hostPID=true)", "hostPath volumes (volumes \"pods\", \"fleece\")", "spc_t"] {
        assert!(reasons.contains(expected), "{expected}: {said}");
    }
    for unwanted in
        ["privileged (container", "capabilities", "hostNetwork", "hostIPC", "hostPort", "seccomp", "procMount"]
    {
        assert!(!reasons.contains(unwanted), "{unwanted}: {said}");
    }
    let security = &agent["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    assert_eq!(
        security,
        &json!({
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"], "add": ["DAC_OVERRIDE", "CHOWN"] },
        })
    );
    // The mounts whose need and sufficiency the tests of privileges show.
    let mounts = &agent["spec"]["template"]["spec"]["containers"][0]["volumeMounts"];
    assert_eq!(
        mounts[0],
        json!({ "name": "pods", "mountPath": "/k/pods", "readOnly": true, "mountPropagation": "HostToContainer" })
    );
    assert_eq!(mounts.as_array().map(Vec::len), Some(3));
    // libvirt's socket of a launcher, at that path: 107 bytes and a zero are what a socket address holds.
    let socket =
        "/k/pods/00000000-0000-0000-0000-000000000000/volumes/kubernetes.io~empty-dir/libvirt-runtime/virtqemud-sock";
    assert!(socket.len() <= 107, "{}", socket.len());
    create(&pod(agent, OPERATOR)).expect("the agent in its own namespace");
}
