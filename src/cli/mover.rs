//! `virt-fleece mover`: what runs in a mover pod.

use super::CliError;
use crate::mover::{
    config::{DEFAULT_TERMINATION_LOG, MOVER_CONFIG, MoverConfig, MoverOutcome, TERMINATION_LOG},
    pod,
};
use clap::Args;
use std::process::ExitCode;

#[derive(Debug, Args)]
#[command(
    after_help = "The controller of the operator starts it in a pod; it is of no use by hand. What it does is in \
    $VIRT_FLEECE_MOVER (JSON), how it ended in the pod's termination message."
)]
pub(super) struct MoverArgs {}

pub(super) async fn run(_: MoverArgs) -> Result<ExitCode, CliError> {
    let outcome = match config() {
        Ok(config) => {
            tokio::select! {
                outcome = pod::run(config) => outcome,
                (signal, _) = super::backup_run::signal() => {
                    MoverOutcome::Abandoned { message: format!("the mover was {signal}") }
                }
            }
        }
        Err(message) => MoverOutcome::Failed { reason: "InvalidConfiguration".into(), message, retryable: false },
    };
    let message = outcome.to_message();
    let path = std::env::var(TERMINATION_LOG).unwrap_or_else(|_| DEFAULT_TERMINATION_LOG.into());
    if let Err(error) = std::fs::write(&path, &message) {
        tracing::error!(%error, path, "the outcome cannot be written");
    }
    println!("{message}");
    match outcome {
        MoverOutcome::Failed { .. } => Ok(ExitCode::FAILURE),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn config() -> Result<MoverConfig, String> {
    let text = std::env::var(MOVER_CONFIG).map_err(|_| format!("${MOVER_CONFIG} is not set"))?;
    serde_json::from_str(&text).map_err(|error| format!("${MOVER_CONFIG} cannot be read: {error}"))
}
