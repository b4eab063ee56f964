//! `virt-fleece controller`: the operator's brain, in a Deployment.

use super::{CliError, serving};
use crate::controller::{self, Settings};
use clap::Args;
use std::{net::SocketAddr, process::ExitCode, time::Duration};

/// Without a sign of life of the election for so long the kubelet starts the process anew.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct ControllerArgs {
    /// The operator's own namespace
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME")]
    namespace: String,
    /// Name of this process in the election of a leader
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    identity: String,
    /// Image of the pods that move data
    #[arg(long, env = "VIRT_FLEECE_IMAGE", value_name = "IMAGE")]
    image: String,
    /// When the image is pulled
    #[arg(long, value_name = "POLICY", value_parser = ["Always", "IfNotPresent", "Never"])]
    image_pull_policy: Option<String>,
    /// Secret for pulling the image, in the namespace of each pod that moves data (repeatable)
    #[arg(long = "image-pull-secret", value_name = "NAME")]
    image_pull_secrets: Vec<String>,
    /// Backups that may run on a node at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    max_backups_per_node: u16,
    /// Where metrics and health are served
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// Lease that the leader holds
    #[arg(long, value_name = "NAME", default_value = "virt-fleece-controller")]
    lease_name: String,
    #[command(flatten)]
    pub(super) log: serving::LogArgs,
}

pub(super) async fn run(args: ControllerArgs) -> Result<ExitCode, CliError> {
    let settings = Settings {
        namespace: args.namespace,
        identity: args.identity,
        image: args.image,
        image_pull_policy: args.image_pull_policy,
        image_pull_secrets: args.image_pull_secrets,
        max_backups_per_node: usize::from(args.max_backups_per_node),
        lease_name: args.lease_name,
    };
    let client = serving::client().await?;
    let served = serving::start("controller", args.listen, PATIENCE).await?;
    controller::run(client, settings, &served.metrics, served.health, serving::shutdown()?).await?;
    Ok(ExitCode::SUCCESS)
}
