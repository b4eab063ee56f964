//! A node of the test cluster: a kubelet's directory, the stand-in for the kubelet, launcher pods with real libvirt and
//! QEMU, and the real agent.
//!
//! A launcher pod is laid out as KubeVirt's: libvirt's socket in the `emptyDir` `libvirt-runtime`, the domain named
//! `NAMESPACE_NAME`, disks with the alias `ua-VOLUME`. Left out: virt-launcher and virt-handler themselves, containers,
//! `SELinux`; whatever KubeVirt's controllers would write into a VMI the test writes.
#![allow(dead_code, reason = "a test bed offers more than the tests of the day take")]

mod kubelet;
mod launcher;
mod pod;

pub(crate) use kubelet::Kubelet;
pub(crate) use launcher::{Launcher, VmDisk, create_vm};

use crate::{bed::process, cluster::Cluster};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Stdio},
};
use tempfile::TempDir;

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    name: String,
    agent: Option<Child>,
    kubelet: Kubelet,
    kubeconfig: PathBuf,
    /// Last: the others use it.
    directory: TempDir,
}

impl Node {
    /// Registers a node and starts its kubelet, without an agent. `takes_all`: pods that may run anywhere run here.
    pub(crate) fn start(cluster: &Cluster, name: &str, takes_all: bool) -> Self {
        // Short, and open to the user of the launchers: sockets lie deep below, and their paths have 107 bytes.
        let directory = tempfile::Builder::new().prefix("vfn").tempdir_in("/tmp").expect("a directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("its rights");
        fs::create_dir(directory.path().join("pods")).expect("the pods' directory");
        cluster.create_node(name);
        let kubelet = Kubelet::start(name, directory.path(), &cluster.kubeconfig(), takes_all);
        Self { name: name.to_owned(), agent: None, kubelet, kubeconfig: cluster.kubeconfig(), directory }
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The kubelet's directory.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Where the agent keeps fleeces and journals.
    pub(crate) fn fleece_directory(&self) -> PathBuf {
        self.directory.path().join("fleece")
    }

    /// The kubelet.
    pub(crate) fn kubelet(&self) -> &Kubelet {
        &self.kubelet
    }

    /// Whom the agent is at the API server.
    pub(crate) fn set_agent_credentials(&mut self, kubeconfig: &Path) {
        kubeconfig.clone_into(&mut self.kubeconfig);
    }

    /// Starts the agent.
    pub(crate) fn start_agent(&mut self) {
        self.start_agent_with(&[]);
    }

    /// The same, with more options.
    pub(crate) fn start_agent_with(&mut self, options: &[&str]) {
        let log = fs::File::options().create(true).append(true).open(self.agent_log_path()).expect("a log");
        let (directory, fleece) = (self.directory().to_owned(), self.fleece_directory());
        let agent = process::spawn_tethered(|command| {
            command.arg(env!("CARGO_BIN_EXE_virt-fleece")).arg("agent").arg("-v");
            command.args(["--node-name", &self.name, "--kubelet-dir"]).arg(&directory);
            command.arg("--fleece-dir").arg(&fleece).args(["--listen", "127.0.0.1:0", "--qemu-uid", "65534"]);
            // There are no control groups of pods here: the stand-in makes none.
            command.arg("--no-cgroup-check").args(options);
            command.env("KUBECONFIG", &self.kubeconfig);
            command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        });
        self.agent = Some(agent.expect("an agent"));
    }

    /// SIGKILL.
    pub(crate) fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            process::kill9(&mut agent);
        }
    }

    /// The agent's process.
    pub(crate) fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Child::id)
    }

    /// What the agents of this node have printed.
    pub(crate) fn agent_log(&self) -> String {
        fs::read_to_string(self.agent_log_path()).unwrap_or_default()
    }

    fn agent_log_path(&self) -> PathBuf {
        self.directory.path().join("agent.log")
    }

    /// What a pod of the kubelet has printed.
    pub(crate) fn pod_log(&self, uid: &str) -> String {
        fs::read_to_string(self.directory.path().join("pods").join(uid).join("log")).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill_agent();
    }
}
