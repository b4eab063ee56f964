//! What the long-running commands of the operator have in common.

use super::CliError;
use crate::operator::{self, Health, Metrics};
use clap::{Args, ValueEnum};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::signal::unix::{SignalKind, signal};

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// How the log is written
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
}

/// Metrics and health, served.
pub(super) struct Served {
    pub(super) metrics: Arc<Metrics>,
    pub(super) health: Arc<Health>,
}

/// Serves metrics and health until the process ends.
pub(super) async fn start(role: &'static str, listen: SocketAddr, patience: Duration) -> Result<Served, CliError> {
    let (metrics, health) = (Arc::new(Metrics::new(role)), Arc::new(Health::new(patience)));
    let (address, _) = operator::serve(listen, Arc::clone(&metrics), Arc::clone(&health)).await?;
    tracing::info!(%address, version = env!("CARGO_PKG_VERSION"), "{role} starts");
    Ok(Served { metrics, health })
}

/// A client of the cluster: of KUBECONFIG, or of the pod's service account.
pub(super) async fn client() -> Result<kube::Client, CliError> {
    let config = kube::Config::infer()
        .await
        .map_err(|error| CliError::Usage(format!("no cluster: {error}; set KUBECONFIG, or run it in a pod")))?;
    kube::Client::try_from(config).map_err(|source| CliError::Cluster(Box::new(source)))
}

/// Ready with the first SIGTERM or SIGINT.
pub(super) fn shutdown() -> Result<impl Future<Output = ()> + Send, CliError> {
    let failed = |error| CliError::Usage(format!("signals cannot be waited for: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to end");
    })
}
