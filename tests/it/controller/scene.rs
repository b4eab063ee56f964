//! A cluster with the controller as a process, and stand-ins for everybody else who writes: `KubeVirt`, a kubelet, an
//! agent.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bed::process;
use crate::cluster::{Cluster, Kubectl};

/// The operator's namespace.
pub(super) const OPERATOR: &str = "virt-fleece";
/// Nothing takes longer, on a machine that does much else.
const LIMIT: Duration = Duration::from_secs(90);
/// What the restricted Pod Security Standard wants of a container.
const RESTRICTED: &str = "securityContext: {runAsNonRoot: true, runAsUser: 107, allowPrivilegeEscalation: false, \
                          capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}";

/// Waits until there is an answer; panics with `what` when there is none.
pub(super) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(150));
    }
}

/// A controller process; dropping it kills it.
pub(super) struct Controller(pub(super) Child);

impl Drop for Controller {
    fn drop(&mut self) {
        process::kill9(&mut self.0);
    }
}

/// The stand-in for the kubelets of all nodes.
struct Kubelet {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// The cluster and who is at work in it.
pub(super) struct Scene {
    kubelet: Option<Kubelet>,
    pub(super) admin: Kubectl,
    pub(super) cluster: Cluster,
}

impl Scene {
    /// Namespaces `team` and `other`, which hold pods to the restricted standard, and a repository `repo` in both.
    pub(super) fn start() -> Self {
        let cluster = Cluster::start();
        cluster.install_kubevirt();
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("crds");
        let admin = cluster.admin();
        admin.run(["apply", "--server-side", "-f", crds.to_str().expect("UTF-8")]);
        admin.run(["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"]);
        for namespace in [OPERATOR, "team", "other"] {
            cluster.create_namespace(namespace);
            admin.run(["label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"]);
        }
        for namespace in ["team", "other"] {
            admin.apply(&repository("BackupRepository", "repo", Some(namespace), &json!({})));
        }
        let kubelet = Some(kubelet(admin.clone()));
        Self { kubelet, admin, cluster }
    }

    /// Pods are left to the test from here on.
    pub(super) fn stop_kubelet(&mut self) {
        self.kubelet = None;
    }

    /// A controller, with a log of its own.
    pub(super) fn controller(&self, identity: &str, arguments: &[&str]) -> Controller {
        let log = std::env::temp_dir().join(format!("virt-fleece-controller-{}-{identity}.log", std::process::id()));
        let log = File::options().create(true).append(true).open(log).expect("a log");
        let kubeconfig = self.cluster.kubeconfig();
        let child = process::spawn_tethered(|command| {
            command.arg(env!("CARGO_BIN_EXE_virt-fleece"));
            command.args(["controller", "--namespace", OPERATOR, "--identity", identity, "--image", "none"]);
            command.args(["--listen", "127.0.0.1:0", "--log-format", "json"]).args(arguments);
            command.env("KUBECONFIG", kubeconfig).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        });
        Controller(child.expect("a controller"))
    }

    /// A VM that runs on a node, as `KubeVirt` shows it.
    pub(super) fn running_vm(&self, namespace: &str, name: &str, node: &str) {
        let vm = self.vm(namespace, name, "Running");
        let uid = vm["metadata"]["uid"].as_str().expect("a UID");
        self.admin.apply(&format!(
            "{{apiVersion: kubevirt.io/v1, kind: VirtualMachineInstance, metadata: {{name: {name}, namespace: \
             {namespace}, ownerReferences: [{{apiVersion: kubevirt.io/v1, kind: VirtualMachine, name: {name}, uid: \
             {uid}}}]}}, spec: {{domain: {{devices: {{}}}}}}}}"
        ));
        let instance = self.admin.get(&["-n", namespace, "vmi", name]);
        let instance = instance["metadata"]["uid"].as_str().expect("a UID");
        self.admin.apply(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: virt-launcher-{name}, namespace: {namespace}, labels: \
             {{kubevirt.io/created-by: {instance}}}}}, spec: {{containers: [{{name: compute, image: none, \
             {RESTRICTED}}}]}}}}"
        ));
        let pod = self.admin.get(&["-n", namespace, "pod", &format!("virt-launcher-{name}")]);
        let pod = pod["metadata"]["uid"].as_str().expect("a UID");
        let status = json!({"status": {"phase": "Running", "nodeName": node, "activePods": {pod: node}}});
        self.admin.patch(&["-n", namespace, "vmi", name], &status);
    }

    /// A VM without an instance.
    pub(super) fn vm(&self, namespace: &str, name: &str, status: &str) -> Value {
        self.admin.apply(&format!(
            "{{apiVersion: kubevirt.io/v1, kind: VirtualMachine, metadata: {{name: {name}, namespace: {namespace}}}, \
             spec: {{runStrategy: Manual, template: {{spec: {{domain: {{devices: {{disks: [{{name: root, disk: {{}}}}]\
             }}}}, volumes: [{{name: root, persistentVolumeClaim: {{claimName: {name}-root}}}}]}}}}}}}}"
        ));
        self.admin.patch_status(&["-n", namespace, "vm", name], &json!({"printableStatus": status}));
        self.admin.get(&["-n", namespace, "vm", name])
    }

    /// Creates a backup; `changes` go into its spec.
    pub(super) fn backup(&self, namespace: &str, name: &str, vm: &str, changes: &Value) {
        self.admin.apply(&backup(namespace, name, vm, changes));
    }

    pub(super) fn get(&self, namespace: &str, name: &str) -> Value {
        self.admin.get(&["-n", namespace, "vfb", name])
    }

    /// Waits until the status of a backup satisfies this.
    pub(super) fn until(&self, namespace: &str, name: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            last = self.get(namespace, name);
            if holds(&last["status"]) {
                return last;
            }
            std::thread::sleep(Duration::from_millis(150));
        }
        panic!("{what}: {:#}", last["status"]);
    }

    pub(super) fn until_reason(&self, namespace: &str, name: &str, reason: &str) -> Value {
        self.until(namespace, name, reason, |status| status["reason"] == reason)
    }

    pub(super) fn until_phase(&self, namespace: &str, name: &str, phase: &str) -> Value {
        self.until(namespace, name, phase, |status| status["phase"] == phase)
    }

    /// Waits for the order of this attempt.
    pub(super) fn until_assigned(&self, namespace: &str, name: &str, attempt: i64) -> Value {
        self.until(namespace, name, "an assignment", |status| status["assignment"]["attempt"] == attempt)
    }

    /// Waits until a backup is gone.
    pub(super) fn until_gone(&self, namespace: &str, name: &str) {
        eventually("the backup is gone", || {
            let found = self.admin.run(["-n", namespace, "get", "vfb", name, "--ignore-not-found", "-o", "name"]);
            found.is_empty().then_some(())
        });
    }

    /// What an agent reports; `changes` go into the run.
    pub(super) fn report(&self, namespace: &str, name: &str, attempt: i64, state: &str, changes: &Value) {
        let now = jiff::Timestamp::now().to_string();
        let mut run = json!({"attempt": attempt, "agent": {"instance": "agent-1", "nodeName": "node-a"},
            "state": state, "updated": now});
        merge(&mut run, changes);
        let object = json!({"apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
            "metadata": {"name": name, "namespace": namespace}, "status": {"run": run}});
        let arguments = [
            "apply",
            "--server-side",
            "--subresource=status",
            "--field-manager=virt-fleece-agent",
            "--force-conflicts",
            "--validate=false",
            "-f",
            "-",
        ];
        self.admin.feed(arguments, &object.to_string()).unwrap_or_else(|error| panic!("{error}"));
    }

    /// The mover of an attempt.
    pub(super) fn mover(&self, namespace: &str, name: &str) -> Value {
        let status = &self.get(namespace, name)["status"];
        let mover = &status["assignment"]["mover"];
        let (namespace, name) =
            (mover["namespace"].as_str().expect("a mover"), mover["name"].as_str().expect("a name"));
        self.admin.get(&["-n", namespace, "pod", name])
    }

    /// The mover of an attempt ends with this termination message.
    pub(super) fn end_mover(&self, pod: &Value, message: &str) {
        let (namespace, name) = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
        let state = json!({"terminated": {"exitCode": 0, "message": message}});
        self.admin.patch_status(&["-n", namespace, "pod", name], &pod_status("Succeeded", &state));
    }

    /// The reasons of the Events about a backup.
    pub(super) fn events(&self, namespace: &str, name: &str) -> Vec<String> {
        let events = self.admin.get(&["-n", namespace, "events.events.k8s.io"]);
        let about = |event: &&Value| event["regarding"]["name"] == name;
        let events = events["items"].as_array().expect("items").clone();
        events.iter().filter(about).map(|event| text(&event["reason"]).to_owned()).collect()
    }
}

pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

fn merge(into: &mut Value, changes: &Value) {
    for (key, value) in changes.as_object().expect("an object") {
        into[key] = value.clone();
    }
}

/// The manifest of a backup.
pub(super) fn backup(namespace: &str, name: &str, vm: &str, changes: &Value) -> String {
    let mut spec = json!({"source": {"name": vm}, "repositoryRef": {"name": "repo"}});
    merge(&mut spec, changes);
    if spec["repositoryRef"].is_null() {
        spec.as_object_mut().expect("an object").remove("repositoryRef");
    }
    json!({"apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec})
    .to_string()
}

/// The manifest of a repository.
pub(super) fn repository(kind: &str, name: &str, namespace: Option<&str>, changes: &Value) -> String {
    let mut spec = json!({"s3": {"bucket": "backups", "credentialsSecretRef": {"name": "s3"}},
        "passphraseSecretRef": {"name": "passphrase"}});
    merge(&mut spec, changes);
    json!({"apiVersion": "virtfleece.io/v1alpha1", "kind": kind,
        "metadata": {"name": name, "namespace": namespace}, "spec": spec})
    .to_string()
}

/// The outcome of a mover that committed.
pub(super) fn committed() -> String {
    json!({"outcome": "committed", "backupId": "20261125T010203Z-00ff00ff", "pointInTime": "2026-11-25T01:02:03Z",
        "sequence": 7, "incremental": true, "storedBytes": 769_654_784})
    .to_string()
}

fn pod_status(phase: &str, state: &Value) -> Value {
    json!({"phase": phase, "containerStatuses": [{"name": "mover", "image": "none", "imageID": "", "ready": true,
        "restartCount": 0, "state": state}]})
}

/// Binds, runs and removes mover pods; probes find an empty repository, and what is to be forgotten is.
fn kubelet(admin: Kubectl) -> Kubelet {
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let thread = std::thread::spawn(move || {
        while !told.load(Ordering::Relaxed) {
            let arguments = ["get", "pods", "-A", "-l", "app.kubernetes.io/component=mover", "-o", "json"];
            let pods: Value =
                admin.attempt(arguments).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
            for pod in pods["items"].as_array().into_iter().flatten() {
                serve(&admin, pod);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    Kubelet { stop, thread: Some(thread) }
}

/// One round of the kubelet about one pod. Another one may have removed it.
fn serve(admin: &Kubectl, pod: &Value) {
    let (namespace, name) = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
    if pod["metadata"].get("deletionTimestamp").is_some() {
        let _ = admin.attempt(["-n", namespace, "delete", "pod", name, "--grace-period=0", "--force", "--wait=false"]);
        return;
    }
    if pod["spec"].get("nodeName").is_none() {
        let affinity = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        let node = affinity["nodeSelectorTerms"][0]["matchFields"][0]["values"][0].as_str().unwrap_or("node-a");
        let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node}});
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/binding");
        let _ = admin.feed(["create", "--raw", path.as_str(), "-f", "-"], &binding.to_string());
    }
    if pod["status"]["phase"] != "Pending" {
        return;
    }
    let config = text(&pod["spec"]["containers"][0]["env"][0]["value"]);
    let (phase, state) = if config.contains(r#""task":"probe""#) {
        let found = json!({"outcome": "probed", "repositoryId": "r", "backups": 3, "virtualMachines": 2,
            "logicalBytes": 124, "storedBytes": 10, "damaged": 0});
        ("Succeeded", json!({"terminated": {"exitCode": 0, "message": found.to_string()}}))
    } else if config.contains(r#""forget""#) {
        ("Succeeded", json!({"terminated": {"exitCode": 0, "message": r#"{"outcome":"forgotten"}"#}}))
    } else {
        ("Running", json!({"running": {}}))
    };
    let patch = json!({"status": pod_status(phase, &state)}).to_string();
    let _ =
        admin.attempt(["-n", namespace, "patch", "pod", name, "--subresource=status", "--type=merge", "-p", &patch]);
}
