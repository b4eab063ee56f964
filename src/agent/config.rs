//! What an agent is told at its start.

use std::path::PathBuf;

/// Configuration of an agent.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The node that it runs on.
    pub node_name: String,
    /// The kubelet's directory, as it is mounted here.
    pub kubelet_directory: PathBuf,
    /// Directory of fleeces and journals, on a local disk of the node.
    pub fleece_directory: PathBuf,
    /// Bytes that all fleeces of the node may take; none: four fifths of what is free at the start of each session.
    pub fleece_budget: Option<u64>,
    /// Sessions at the same time; more wait.
    pub max_sessions: usize,
    /// User and group of QEMU: fleeces belong to it.
    pub qemu_uid: u32,
    /// `SELinux` label of fleeces, where `SELinux` is enabled.
    pub selinux_label: String,
    /// Whether sockets of pods have to be served by processes in the pod's control group. Only a stand-in for a kubelet,
    /// which makes none, may say no.
    pub check_cgroups: bool,
}
