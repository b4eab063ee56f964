//! The Helm chart, what is rendered from it and the examples, on a real API server.

mod admission;
mod examples;
mod health;
mod install;
mod pods;
mod privileges;
mod render;
mod roles;

use crate::cluster::{BoundTo, Cluster, Helm, Kubectl};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The operator's namespace, and the name of the release.
const OPERATOR: &str = "virt-fleece";

/// Kind and plural.
const BACKUPS: (&str, &str) = ("VirtualMachineBackup", "virtualmachinebackups");
const REPOSITORIES: (&str, &str) = ("BackupRepository", "backuprepositories");
const CLUSTER_REPOSITORIES: (&str, &str) = ("ClusterBackupRepository", "clusterbackuprepositories");

/// A path of the checkout.
fn checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A path of the checkout, for a command.
fn chart() -> String {
    checkout("charts/virt-fleece").display().to_string()
}

/// A cluster with KubeVirt's kinds and the operator's namespace.
fn cluster() -> Cluster {
    let cluster = Cluster::start();
    cluster.install_kubevirt();
    cluster.create_namespace(OPERATOR);
    cluster.admin().run(["label", "namespace", OPERATOR, "pod-security.kubernetes.io/enforce=privileged"]);
    cluster
}

/// Installs the chart. Nothing runs: there are no nodes.
fn install(cluster: &Cluster, arguments: &[&str]) {
    let chart = chart();
    let command = [&["install", OPERATOR, chart.as_str(), "--namespace", OPERATOR][..], arguments].concat();
    cluster.admin().helm(Helm::Four, command).unwrap_or_else(|error| panic!("helm install: {error}"));
    cluster.admin().run(["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"]);
}

/// A cluster in which the chart is installed, and its admission policies have begun to act.
fn installed() -> Cluster {
    let cluster = cluster();
    install(&cluster, &[]);
    cluster.create_namespace("probe");
    cluster.admin().apply(&backup("probe", "probe", "vm"));
    until("the admission policies act", || {
        let write = |who: &Kubectl| merge_status(who, BACKUPS, Some("probe"), "probe", &json!({ "message": "x" }));
        let pod = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"probe","labels":{"virtfleece.io/backup":"x"}},
            "spec":{"containers":[{"name":"c","image":"i"}]}}"#;
        let agent = account(&cluster, "virt-fleece-agent", None);
        write(&cluster.admin()).is_err_and(|error| error.contains("virt-fleece alone"))
            && cluster.admin().feed(["-n", "probe", "create", "--dry-run=server", "-f", "-"], pod).is_err()
            && write(&agent).is_err_and(|error| error.contains("names no node"))
    });
    cluster
}

/// kubectl as a service account of the operator, by a token that is bound to this pod.
fn account(cluster: &Cluster, name: &str, pod: Option<&str>) -> Kubectl {
    cluster.bearer(&cluster.admin().token(OPERATOR, name, pod.map(BoundTo::Pod)))
}

/// A merge into the status of an object of ours, in one request: kubectl reads the status first, and nobody needs the
/// right to do that.
fn merge_status(
    who: &Kubectl,
    (kind, plural): (&str, &str),
    namespace: Option<&str>,
    name: &str,
    status: &Value,
) -> Result<(), String> {
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("virtfleece.io", "v1alpha1", kind), plural);
    wait(async {
        let client = client(who).await;
        let api: Api<DynamicObject> = match namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &resource),
            None => Api::all_with(client, &resource),
        };
        let patch = Patch::Merge(json!({ "status": status }));
        api.patch_status(name, &PatchParams::default(), &patch).await.map_err(|error| error.to_string())?;
        Ok(())
    })
}

/// Runs requests to their end.
fn wait<T>(requests: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(requests)
}

/// A client as somebody.
async fn client(who: &Kubectl) -> Client {
    let file = Kubeconfig::read_from(who.kubeconfig()).expect("a kubeconfig");
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.expect("a configuration");
    Client::try_from(config).expect("a client")
}

/// A backup of a VM, as YAML.
fn backup(namespace: &str, name: &str, vm: &str) -> String {
    format!(
        "{{apiVersion: virtfleece.io/v1alpha1, kind: VirtualMachineBackup, \
         metadata: {{name: {name}, namespace: {namespace}}}, \
         spec: {{source: {{name: {vm}}}, repositoryRef: {{name: main}}}}}}"
    )
}

/// Waits for what takes the API server a moment.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "30 s later still not: {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The objects of manifests, read by kubectl.
fn objects(kubectl: &Kubectl, manifests: &str) -> Vec<Value> {
    let json = kubectl
        .feed(["create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-"], manifests)
        .unwrap_or_else(|error| panic!("{error}: {manifests}"));
    // One object, or several one after the other.
    serde_json::Deserializer::from_str(&json)
        .into_iter::<Value>()
        .flat_map(|object| {
            let object = object.expect("JSON of kubectl");
            match object["items"].as_array() {
                Some(items) => items.clone(),
                None => vec![object],
            }
        })
        .collect()
}

/// The one object of a kind and name.
fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// Kinds of other projects that the chart and the examples have objects of. Only that they exist: what is in them is
/// not checked.
fn install_foreign_kinds(kubectl: &Kubectl) {
    let kinds = [
        ("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors"),
        ("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors"),
        ("argoproj.io", "v1alpha1", "Application", "applications"),
        ("source.toolkit.fluxcd.io", "v1", "GitRepository", "gitrepositories"),
        ("helm.toolkit.fluxcd.io", "v2", "HelmRelease", "helmreleases"),
        ("kustomize.toolkit.fluxcd.io", "v1", "Kustomization", "kustomizations"),
    ];
    for (group, version, kind, plural) in kinds {
        let singular = kind.to_lowercase();
        kubectl.apply(&format!(
            "{{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, \
             metadata: {{name: {plural}.{group}, annotations: {{api-approved.kubernetes.io: unapproved}}}}, \
             spec: {{group: {group}, scope: Namespaced, \
             names: {{kind: {kind}, plural: {plural}, singular: {singular}, listKind: {kind}List}}, \
             versions: [{{name: {version}, served: true, storage: true, \
             schema: {{openAPIV3Schema: {{type: object, x-kubernetes-preserve-unknown-fields: true}}}}}}]}}}}"
        ));
    }
    kubectl.run(["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"]);
}
