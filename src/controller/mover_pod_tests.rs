use super::*;
use crate::controller::target::samples::repository;

fn target(changes: Value, part: Option<&str>) -> Target {
    Target::Repository { key: "k".into(), spec: Box::new(repository(changes)), part: part.map(Into::into) }
}

fn backup(offline: Vec<OfflineClaim>, definition: Option<&str>) -> PodTask {
    PodTask::Backup {
        vm: "n/web".into(),
        vm_uid: "vm-uid".into(),
        backup_uid: "b-uid".into(),
        node: offline.is_empty().then(|| "node-a".into()),
        definition: definition.map(Into::into),
        offline,
    }
}

fn built(task: PodTask, target: &Target) -> Value {
    let image = MoverImage {
        image: "registry/virt-fleece@sha256:0".into(),
        pull_policy: Some("Never".into()),
        pull_secrets: vec!["pull".into()],
    };
    let owner = PodOwner {
        annotation: backup_annotation("n", "b-uid"),
        reference: Some(owner_reference("VirtualMachineBackup", "nightly", "b-uid")),
        backup: Some("nightly".into()),
        vm: Some("x".repeat(64)),
    };
    let pod = MoverPod {
        namespace: "n".into(),
        name: "vfb-nightly-1".into(),
        owner,
        task,
        target,
        image: &image,
        active_seconds: 4200,
    };
    serde_json::to_value(build(&pod).unwrap()).unwrap()
}

fn config(pod: &Value) -> MoverConfig {
    let env = &pod["spec"]["containers"][0]["env"][0];
    assert_eq!(env["name"], MOVER_CONFIG);
    serde_json::from_str(env["value"].as_str().unwrap()).unwrap()
}

/// The mount paths of a pod, with `ro` where nothing can be written.
fn mounts(pod: &Value) -> Vec<String> {
    let mounts = pod["spec"]["containers"][0]["volumeMounts"].as_array().unwrap();
    let show = |mount: &Value| {
        let way = if mount["readOnly"] == true { "ro" } else { "rw" };
        format!("{} {way}", mount["mountPath"].as_str().unwrap())
    };
    mounts.iter().map(show).collect()
}

#[test]
fn a_mover_satisfies_the_restricted_standard() {
    let pod = built(backup(vec![], Some("{}")), &target(json!({}), None));
    let spec = &pod["spec"];
    assert_eq!(spec["automountServiceAccountToken"], false);
    assert_eq!(spec["restartPolicy"], "Never");
    assert_eq!(spec["activeDeadlineSeconds"], 4200);
    let expected = json!({"runAsNonRoot": true, "runAsUser": 107, "runAsGroup": 107, "fsGroup": 107,
        "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"}});
    assert_eq!(spec["securityContext"], expected);
    let container = &spec["containers"][0];
    let expected = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "privileged": false,
        "readOnlyRootFilesystem": true});
    assert_eq!(container["securityContext"], expected);
    for forbidden in ["hostNetwork", "hostPID", "hostIPC", "serviceAccountName", "nodeName"] {
        assert_eq!(spec.get(forbidden), None, "{forbidden}");
    }
    assert!(container["resources"]["limits"]["memory"].is_string());
    let kinds = ["emptyDir", "secret", "downwardAPI", "persistentVolumeClaim"];
    for volume in spec["volumes"].as_array().unwrap() {
        assert!(kinds.iter().any(|kind| volume.get(kind).is_some()), "{volume}");
    }
    assert_eq!(spec["imagePullSecrets"], json!([{"name": "pull"}]));
    assert_eq!(container["imagePullPolicy"], "Never");
}

#[test]
fn a_mover_of_a_running_vm_is_on_its_node() {
    let pod = built(backup(vec![], Some(r#"{"a":1}"#)), &target(json!({}), Some("n")));
    let terms = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    let field = json!({"key": "metadata.name", "operator": "In", "values": ["node-a"]});
    assert_eq!(terms["nodeSelectorTerms"], json!([{"matchFields": [field]}]));
    assert_eq!(pod["spec"]["tolerations"], json!([{"operator": "Exists"}]));
    assert_eq!(
        mounts(&pod),
        ["/tmp rw", "/run/virt-fleece-mover rw", "/run/virt-fleece/definition ro", "/run/virt-fleece/passphrase ro"]
    );
    let MoverConfig { task: MoverTask::Backup { socket, vm, definition_file, offline, .. }, target } = config(&pod)
    else {
        panic!()
    };
    assert_eq!((socket.as_str(), vm.as_str()), ("/run/virt-fleece-mover/mover.sock", "n/web"));
    assert_eq!(definition_file.as_deref(), Some("/run/virt-fleece/definition/vm.json"));
    assert_eq!(pod["metadata"]["annotations"]["virtfleece.io/vm-definition"], r#"{"a":1}"#);
    assert!(offline.is_empty());
    let crate::mover::config::MoverTarget::Repository { url, passphrase_file, create, .. } = target else { panic!() };
    assert_eq!(url, "s3://backups/a/b/n");
    assert_eq!((passphrase_file.as_str(), create), ("/run/virt-fleece/passphrase/value", true));
    let metadata = &pod["metadata"];
    assert_eq!(metadata["annotations"]["virtfleece.io/backup"], "n/b-uid");
    assert_eq!(metadata["labels"]["virtfleece.io/backup"], "nightly");
    assert_eq!(metadata["labels"].get("virtfleece.io/virtual-machine"), None, "no value of a label");
    assert_eq!(metadata["ownerReferences"][0]["uid"], "b-uid");
}

#[test]
fn secrets_are_referred_to_and_never_read() {
    let changes = json!({"s3": {"bucket": "backups", "credentialsSecretRef": {"name": "s3"},
        "caSecretRef": {"name": "ca", "key": "bundle.pem"}}, "passphraseSecretRef": {"name": "p", "key": "word"}});
    let pod = built(PodTask::Probe, &target(changes, None));
    let env = pod["spec"]["containers"][0]["env"].as_array().unwrap();
    let names: Vec<_> = env.iter().skip(1).map(|env| env["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]);
    let optional: Vec<_> = env.iter().skip(1).map(|env| env["valueFrom"]["secretKeyRef"]["optional"] == true).collect();
    assert_eq!(optional, [false, false, true]);
    assert_eq!(mounts(&pod), ["/tmp rw", "/run/virt-fleece/passphrase ro", "/run/virt-fleece/ca ro"]);
    let secret = &pod["spec"]["volumes"][2]["secret"];
    assert_eq!((&secret["secretName"], &secret["items"][0]["key"]), (&json!("ca"), &json!("bundle.pem")));
    assert_eq!(config(&pod).task, MoverTask::Probe);
    assert_eq!(pod["spec"].get("affinity"), None);
}

#[test]
fn the_claims_of_a_stopped_vm_are_read_only() {
    let claim = |volume: &str, block| OfflineClaim { volume: volume.into(), claim: format!("{volume}-claim"), block };
    let changes = json!({"s3": null, "persistentVolumeClaim": {"claimName": "c"}});
    let pod = built(backup(vec![claim("root", false), claim("data", true)], None), &target(changes, None));
    let expected =
        ["/tmp rw", "/run/virt-fleece-mover rw", "/disks/0 ro", "/run/virt-fleece/passphrase ro", "/repository rw"];
    assert_eq!(mounts(&pod), expected);
    let container = &pod["spec"]["containers"][0];
    assert_eq!(container["volumeDevices"], json!([{"name": "disk-1", "devicePath": "/disks/1"}]));
    for volume in pod["spec"]["volumes"].as_array().unwrap() {
        if volume["name"].as_str().unwrap().starts_with("disk-") {
            assert_eq!(volume["persistentVolumeClaim"]["readOnly"], true, "{volume}");
        }
    }
    let MoverTask::Backup { offline, definition_file, .. } = config(&pod).task else { panic!() };
    let paths: Vec<_> = offline.iter().map(|disk| (disk.name.as_str(), disk.path.as_str())).collect();
    assert_eq!(paths, [("root", "/disks/0"), ("data", "/disks/1")]);
    assert_eq!(definition_file, None);
    assert_eq!(pod["spec"].get("affinity"), None, "the scheduler knows where the claims are");
}

#[test]
fn other_targets_and_tasks() {
    let qcow2 = serde_json::from_value(json!({"persistentVolumeClaim": {"claimName": "images"}, "compress": true}));
    let pod = built(backup(vec![], None), &Target::Qcow2(qcow2.unwrap()));
    assert_eq!(mounts(&pod), ["/tmp rw", "/run/virt-fleece-mover rw", "/target rw"]);
    assert!(matches!(config(&pod).target, crate::mover::config::MoverTarget::Qcow2Directory { compress: true, .. }));
    let task = PodTask::Forget { vm: "n/web".into(), backups: vec!["id".into()] };
    let resources = json!({"mover": {"resources": {"limits": {"memory": "2Gi"}}}});
    let pod = built(task, &target(resources, None));
    assert_eq!(pod["spec"]["containers"][0]["resources"], json!({"limits": {"memory": "2Gi"}}));
    let crate::mover::config::MoverTarget::Repository { create, .. } = config(&pod).target else { panic!() };
    assert!(!create, "nothing can be forgotten in a repository that is not there");
}
