//! A VM in a launcher pod: the objects as KubeVirt makes them, and a real libvirt with a real QEMU behind them.

use super::Node;
use crate::{
    bed::{flavour::Flavour, writer::Writer},
    cluster::{Cluster, Kubectl},
    libvirt_daemon::{Boot, Bus, Disk, LibvirtDaemon},
};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Channel of the guest's writer.
const WRITER: &str = "virtfleece.writer";

/// A disk of a VM, on a claim of the same name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VmDisk {
    /// Name of volume, claim, and serial number.
    pub(crate) name: &'static str,
    /// Bytes.
    pub(crate) size: u64,
    /// On virtio-scsi instead of virtio-blk.
    pub(crate) scsi: bool,
}

/// A running VM.
pub(crate) struct Launcher {
    namespace: String,
    name: String,
    daemon: LibvirtDaemon,
    pod: (String, String),
    instance_uid: String,
    disks: Vec<VmDisk>,
    admin: Kubectl,
}

impl Launcher {
    /// Creates the VM's objects and runs it on a node.
    pub(crate) fn start(
        cluster: &Cluster,
        node: &Node,
        flavour: Flavour,
        (namespace, name): (&str, &str),
        disks: &[VmDisk],
    ) -> Self {
        assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
        let admin = cluster.admin();
        create_vm(&admin, namespace, name, disks, "Always");
        Self::run(cluster, node, flavour, (namespace, name), disks)
    }

    /// Runs a VM whose object is there.
    pub(crate) fn run(
        cluster: &Cluster,
        node: &Node,
        flavour: Flavour,
        (namespace, name): (&str, &str),
        disks: &[VmDisk],
    ) -> Self {
        let admin = cluster.admin();
        let vm = admin.get(&["-n", namespace, "vm", name]);
        let owner = json!([{
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": name, "uid": vm["metadata"]["uid"],
            "controller": true, "blockOwnerDeletion": true,
        }]);
        admin.apply(
            &json!({
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
                "metadata": {"name": name, "namespace": namespace, "ownerReferences": owner},
                "spec": vm["spec"]["template"]["spec"],
            })
            .to_string(),
        );
        let instance = admin.get(&["-n", namespace, "vmi", name]);
        let instance_uid = instance["metadata"]["uid"].as_str().expect("a UID").to_owned();
        let pod_name = format!("virt-launcher-{name}-{}", &instance_uid[..5]);
        admin.apply(&pod(namespace, &pod_name, name, &instance_uid, node.name()).to_string());
        let pod_uid =
            admin.get(&["-n", namespace, "pod", &pod_name])["metadata"]["uid"].as_str().expect("a UID").to_owned();
        let runtime =
            node.directory().join("pods").join(&pod_uid).join("volumes/kubernetes.io~empty-dir/libvirt-runtime");
        let daemon = LibvirtDaemon::start_in(&runtime);
        let domain = format!("{namespace}_{name}");
        let drives: Vec<Disk> = disks.iter().map(|disk| drive(&daemon, disk)).collect();
        let xml = daemon.domain_xml(&domain, &flavour.binary(), &drives, Some(&Boot::guest()), &[WRITER]);
        daemon.define_and_start(&xml);
        let launcher = Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            daemon,
            pod: (pod_name.clone(), pod_uid.clone()),
            instance_uid,
            disks: disks.to_vec(),
            admin,
        };
        launcher.admin.patch_status(
            &["-n", namespace, "pod", &pod_name],
            &json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}),
        );
        launcher.patch_instance(&json!({
            "phase": "Running", "nodeName": node.name(), "activePods": {(pod_uid.as_str()): node.name()},
            "conditions": [{"type": "Ready", "status": "True"}],
        }));
        launcher.admin.patch_status(
            &["-n", namespace, "vm", name],
            &json!({"created": true, "ready": true, "printableStatus": "Running"}),
        );
        launcher
    }

    /// Changes the instance's status, as KubeVirt would.
    pub(crate) fn patch_instance(&self, status: &Value) {
        self.admin.patch(&["-n", &self.namespace, "vmi", &self.name], &json!({"status": status}));
    }

    /// The VM's libvirt.
    pub(crate) fn daemon(&self) -> &LibvirtDaemon {
        &self.daemon
    }

    /// Name of the domain.
    pub(crate) fn domain(&self) -> String {
        format!("{}_{}", self.namespace, self.name)
    }

    /// Name and UID of the launcher pod.
    pub(crate) fn pod(&self) -> (&str, &str) {
        (&self.pod.0, &self.pod.1)
    }

    /// UID of the instance.
    pub(crate) fn instance_uid(&self) -> &str {
        &self.instance_uid
    }

    /// The writer in the guest, once it has booted.
    pub(crate) fn writer(&self) -> Writer {
        Writer::connect(&self.daemon.channel(&self.domain(), WRITER))
    }

    /// Files of the disks.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.disks.iter().map(|disk| self.daemon.dir().join(disk.name)).collect()
    }

    /// What of ours is in QEMU: nodes, jobs, exports, as `virsh qemu-monitor-command` tells.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let ask = |command: &str| {
            let text =
                self.daemon.virsh(&["qemu-monitor-command", &self.domain(), &json!({"execute": command}).to_string()]);
            serde_json::from_str::<Value>(&text).expect("JSON")["return"].clone()
        };
        let strings = |value: Value, field: &str| -> Vec<String> {
            let list = value.as_array().cloned().unwrap_or_default();
            list.iter().filter_map(|it| it[field].as_str().map(str::to_owned)).collect()
        };
        let nodes = strings(ask("query-named-block-nodes"), "node-name").into_iter().filter(|it| it.starts_with("vf"));
        let mut left: Vec<String> = nodes.collect();
        left.extend(strings(ask("query-jobs"), "id"));
        left.extend(strings(ask("query-block-exports"), "id"));
        left
    }
}

/// The object of a VM whose disks are on claims of the same names.
pub(crate) fn create_vm(admin: &Kubectl, namespace: &str, name: &str, disks: &[VmDisk], strategy: &str) {
    let devices: Vec<Value> = disks
        .iter()
        .map(|disk| json!({"name": disk.name, "disk": {"bus": if disk.scsi { "scsi" } else { "virtio" }}}))
        .collect();
    let volumes: Vec<Value> = disks
        .iter()
        .map(|disk| json!({"name": disk.name, "persistentVolumeClaim": {"claimName": format!("{name}-{}", disk.name)}}))
        .collect();
    admin.apply(
        &json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
            "spec": {"runStrategy": strategy, "template": {"spec": {
                "domain": {"devices": {"disks": devices}, "resources": {"requests": {"memory": "256Mi"}}},
                "volumes": volumes,
            }}},
        })
        .to_string(),
    );
    if strategy == "Halted" {
        admin.patch_status(&["-n", namespace, "vm", name], &json!({"created": false, "printableStatus": "Stopped"}));
    }
}

fn drive(daemon: &LibvirtDaemon, disk: &VmDisk) -> Disk {
    Disk {
        volume: disk.name.to_owned(),
        file: daemon.raw_file(disk.name, disk.size),
        format: "raw",
        bus: if disk.scsi { Bus::Scsi } else { Bus::Virtio },
        serial: disk.name.to_owned(),
    }
}

fn pod(namespace: &str, name: &str, vm: &str, instance_uid: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {
            "kubevirt.io": "virt-launcher", "kubevirt.io/created-by": instance_uid, "vm.kubevirt.io/name": vm,
        }, "ownerReferences": [{
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": vm, "uid": instance_uid,
            "controller": true, "blockOwnerDeletion": true,
        }]},
        "spec": {
            "nodeName": node,
            "containers": [{"name": "compute", "image": "virt-launcher"}],
            "volumes": [{"name": "libvirt-runtime", "emptyDir": {}}],
        },
    })
}
