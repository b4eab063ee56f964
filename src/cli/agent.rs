//! `virt-fleece agent`: options.

use super::{CliError, serving, size::parse_size};
use crate::agent::{Agent, AgentConfig};
use clap::Args;
use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

/// Without a sign of life of the main loop for so long the kubelet starts the process anew.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
#[command(
    after_help = "Runs in a DaemonSet, one on each node with VMs; the chart starts it. It needs to be root on its node: \
    it opens sockets in other pods' volumes."
)]
pub(super) struct AgentArgs {
    /// Name of the node that it runs on
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// The kubelet's directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// Directory for fleeces and journals, on a local disk of the node
    #[arg(long, value_name = "DIR", default_value = "/var/lib/virt-fleece")]
    fleece_dir: PathBuf,
    /// The most that the fleeces of all sessions may take together, such as 100G [default: 90 % of what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    fleece_budget: Option<u64>,
    /// Sessions at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    max_sessions: u16,
    /// Address of metrics and health checks
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// User and group that run QEMU in virt-launcher pods
    #[arg(long, value_name = "UID", default_value_t = crate::kubevirt::QEMU_UID)]
    qemu_uid: u32,
    /// `SELinux` label of fleeces, where `SELinux` is enabled
    #[arg(long, value_name = "LABEL", default_value = "system_u:object_r:container_file_t:s0")]
    selinux_label: String,
    /// Believe whoever answers on a pod's socket, whatever control group it is in; only for tests without a kubelet
    #[arg(long, hide = true)]
    no_cgroup_check: bool,
    #[command(flatten)]
    pub(super) log: serving::LogArgs,
}

pub(super) async fn run(args: AgentArgs) -> Result<ExitCode, CliError> {
    let config = AgentConfig {
        node_name: args.node_name,
        kubelet_directory: args.kubelet_dir,
        fleece_directory: args.fleece_dir,
        fleece_budget: args.fleece_budget,
        max_sessions: args.max_sessions.into(),
        qemu_uid: args.qemu_uid,
        selinux_label: args.selinux_label,
        check_cgroups: !args.no_cgroup_check,
    };
    let client = serving::client().await?;
    let served = serving::start("agent", args.listen, PATIENCE).await?;
    let (agent, endings) = Agent::new(config, client, &served.metrics, served.health)?;
    Box::pin(agent.run(endings, serving::shutdown()?)).await;
    Ok(ExitCode::SUCCESS)
}
