//! Linting, rendering and the schema of the values.

use super::{chart, checkout, cluster, find, install_foreign_kinds, objects};
use crate::{bed::flavour::tool, cluster::Kubectl};
use serde_json::Value;
use std::{fs, path::PathBuf, process::Command};

/// Runs Helm without a cluster.
fn helm(arguments: &[&str]) -> Result<String, String> {
    with("HELM", arguments)
}

/// Runs one of the Helms: `HELM` is 4, `HELM3` is 3.
fn with(helm: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(tool(helm)).args(arguments).output().expect("running Helm");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stdout) + &text(&output.stderr)) }
}

/// Renders the chart for a release `virt-fleece` with a values file of `tests/charts`.
pub(super) fn rendered(values: &str) -> String {
    rendered_with("HELM", values)
}

/// As [`rendered`], with one of the Helms.
fn rendered_with(helm: &str, values: &str) -> String {
    let values = checkout("tests/charts").join(format!("values-{values}.yaml")).display().to_string();
    let arguments =
        ["template", "virt-fleece", &chart(), "-n", "virt-fleece", "--kube-version", "1.33.0", "-f", &values];
    with(helm, &arguments).unwrap_or_else(|error| panic!("{values}: {error}"))
}

/// The values files of `tests/charts`, by what is between `values-` and `.yaml`.
fn value_files() -> Vec<String> {
    let files = fs::read_dir(checkout("tests/charts")).expect("tests/charts");
    let names = files.map(|file| file.expect("a file").file_name().into_string().expect("a name"));
    let mut names: Vec<_> =
        names.filter_map(|name| Some(name.strip_prefix("values-")?.strip_suffix(".yaml")?.to_owned())).collect();
    names.sort();
    assert!(names.len() >= 4, "{names:?}");
    names
}

#[test]
fn lints() {
    for values in value_files() {
        let file = checkout("tests/charts").join(format!("values-{values}.yaml")).display().to_string();
        for version in ["HELM", "HELM3"] {
            let arguments = ["lint", "--strict", "--kube-version", "1.33.0", &chart(), "-f", &file];
            with(version, &arguments).unwrap_or_else(|error| panic!("{version}, {values}: {error}"));
        }
    }
}

#[test]
fn both_helms_render_the_same() {
    // But for empty lines between objects.
    let lines = |text: String| text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    for values in value_files() {
        let [ours, older] = ["HELM", "HELM3"].map(|helm| lines(rendered_with(helm, &values)));
        assert!(ours == older, "{values}");
    }
}

#[test]
fn an_old_cluster_is_refused() {
    let error = helm(&["template", "virt-fleece", &chart(), "--kube-version", "1.30.9"]).expect_err("an old cluster");
    assert!(error.contains(">=1.31.0"), "{error}");
}

#[test]
fn what_is_generated_is_current() {
    let directory = tempfile::tempdir().expect("a directory");
    let status = Command::new(checkout("charts/render")).arg(directory.path()).env("HELM", tool("HELM")).status();
    assert!(status.expect("charts/render").success());
    let crds = fs::read_dir(checkout("crds"))
        .expect("crds")
        .map(|file| PathBuf::from("charts/virt-fleece/files/crds").join(file.expect("a file").file_name()));
    let mut files: Vec<_> = crds.collect();
    let copies = fs::read_dir(checkout("charts/virt-fleece/files/crds")).expect("files/crds").count();
    assert_eq!(copies, files.len(), "the chart has definitions that crds/ has not");
    files.push("deploy/virt-fleece.yaml".into());
    for file in files {
        let read = |path: PathBuf| fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        let committed = read(checkout("").join(&file));
        assert!(read(directory.path().join(&file)) == committed, "{file:?} is not current: run `make generate`");
    }
}

#[test]
fn every_rendering_is_what_the_api_server_takes() {
    let cluster = cluster();
    let admin = cluster.admin();
    install_foreign_kinds(&admin);
    let dry_run = |name: &str, manifests: &str| {
        let arguments = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"];
        admin.feed(arguments, manifests).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    for values in value_files() {
        let said = dry_run(&values, &rendered(&values));
        // Pod Security, deprecated fields, and expressions of policies that do not fit the types.
        assert!(!said.contains("arning"), "{values}: {said}");
    }
    dry_run("deploy", &fs::read_to_string(checkout("deploy/virt-fleece.yaml")).expect("deploy/virt-fleece.yaml"));
    definitions_are_those_of_crds(&admin);
    values_arrive(&admin);
}

/// The chart's definitions, but for labels and annotations, are those of `crds/`.
fn definitions_are_those_of_crds(admin: &Kubectl) {
    let rendered = objects(admin, &rendered("defaults"));
    let mut count = 0;
    for file in fs::read_dir(checkout("crds")).expect("crds") {
        let text = fs::read_to_string(file.expect("a file").path()).expect("a definition");
        let committed = objects(admin, &text).remove(0);
        let name = committed["metadata"]["name"].as_str().expect("a name").to_owned();
        let ours = find(&rendered, "CustomResourceDefinition", &name);
        assert_eq!(ours["spec"], committed["spec"], "{name}");
        assert_eq!(ours["metadata"]["annotations"]["helm.sh/resource-policy"], "keep", "{name}");
        count += 1;
    }
    let kinds = rendered.iter().filter(|object| object["kind"] == "CustomResourceDefinition").count();
    assert_eq!((count, kinds), (3, 3));
}

/// Values end up where they should.
fn values_arrive(admin: &Kubectl) {
    let all = objects(admin, &rendered("everything"));
    let container =
        |kind: &str, name: &str| find(&all, kind, name)["spec"]["template"]["spec"]["containers"][0].clone();
    let (controller, agent) =
        (container("Deployment", "backup-operator-controller"), container("DaemonSet", "backup-operator-agent"));
    let image = "registry.example.com:5000/mirror/virt-fleece@sha256:\
        0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    for container in [&controller, &agent] {
        assert_eq!(container["image"], image);
    }
    let arguments = |container: &Value| -> Vec<String> {
        let arguments = container["args"].as_array().expect("arguments");
        arguments.iter().map(|argument| argument.as_str().expect("text").to_owned()).collect()
    };
    for (container, wanted) in [
        (&controller, "--image-pull-secret=registry"),
        (&controller, "--image-pull-secret=another"),
        (&controller, "--image-pull-policy=Always"),
        (&controller, "--lease-name=backup-operator-controller"),
        (&controller, "--max-backups-per-node=6"),
        (&agent, "--fleece-dir=/mnt/nvme/fleece"),
        (&agent, "--fleece-budget=200GiB"),
        (&agent, "--qemu-uid=1000650000"),
        (&agent, "--selinux-label=system_u:object_r:container_file_t:s0:c1,c2"),
        (&agent, "--log-format=text"),
    ] {
        assert!(arguments(container).iter().any(|argument| argument == wanted), "{wanted} in {container}");
    }
    let environment = controller["env"].as_array().expect("an environment");
    assert!(environment.iter().any(|entry| entry["name"] == "VIRT_FLEECE_IMAGE" && entry["value"] == image));
    let volumes = &find(&all, "DaemonSet", "backup-operator-agent")["spec"]["template"]["spec"]["volumes"];
    assert_eq!(volumes[0]["hostPath"]["path"], "/var/lib/k0s/kubelet/pods");
    assert_eq!(volumes[1]["hostPath"]["path"], "/mnt/nvme/fleece");
    let crd = find(&all, "CustomResourceDefinition", "virtualmachinebackups.virtfleece.io");
    assert!(crd["metadata"]["annotations"].get("helm.sh/resource-policy").is_none(), "crds.keep=false");
    // The policies name the accounts that there are.
    let policy =
        find(&all, "ValidatingAdmissionPolicy", "backup-operator-agents")["spec"]["matchConditions"].to_string();
    assert!(policy.contains("system:serviceaccount:virt-fleece:fleece-agent"), "{policy}");

    let least = objects(admin, &rendered("least"));
    let kinds: Vec<_> = least.iter().map(|object| object["kind"].as_str().expect("a kind")).collect();
    assert_eq!(kinds.len(), 2, "{kinds:?}");
}

#[test]
fn wrong_values_are_refused_with_their_place() {
    for (value, wanted) in [
        ("agent.kubletDir=/var/lib/kubelet", "kubletDir"),
        ("agent.kubeletDir=var/lib/kubelet", "/agent/kubeletDir"),
        ("agent.kubeletDir=/var/../etc", "/agent/kubeletDir"),
        ("agent.fleece.dir=/etc", "/agent/fleece/dir"),
        ("agent.fleece.dir=/proc/x", "/agent/fleece/dir"),
        ("agent.fleece.budget=lots", "/agent/fleece/budget"),
        ("agent.maxSessions=0", "/agent/maxSessions"),
        ("agent.updateStrategy.type=Recreate", "/agent/updateStrategy/type"),
        ("agent.updateStrategy.rollingUpdate.maxSurge=1", "/agent/updateStrategy/rollingUpdate"),
        ("controller.replicas=two", "/controller/replicas"),
        ("controller.resources.limits.memory=much", "/controller/resources/limits/memory"),
        ("controller.podDisruptionBudget.maxUnavailable=101%", "/controller/podDisruptionBudget/maxUnavailable"),
        ("image.tag=latest", "/image/tag"),
        ("image.digest=sha256:abc", "/image/digest"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("logFormat=xml", "/logFormat"),
        ("imagePullSecrets[0]=registry", "/imagePullSecrets/0"),
        ("networkPolicy.apiServer.cidrs[0]=10.0.0.1", "/networkPolicy/apiServer/cidrs/0"),
        ("metrics.serviceMonitor.interval=often", "/metrics/serviceMonitor/interval"),
        ("crds.keep=yes", "/crds/keep"),
    ] {
        let error = helm(&["template", "virt-fleece", &chart(), "--set", value]).expect_err(value);
        assert!(error.contains(wanted), "{value}: {error}");
    }
    let same = ["controller", "agent"].map(|part| format!("{part}.serviceAccount.name=one"));
    let error =
        helm(&["template", "virt-fleece", &chart(), "--set", &same[0], "--set", &same[1]]).expect_err("one account");
    assert!(error.contains("are the same account"), "{error}");
}
