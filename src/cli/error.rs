//! Errors of commands, and what they mean for the exit code.

use crate::{
    fleecing::SessionError,
    image::ImageError,
    nbd::ServeError,
    reason::{Reason, Retry},
    repository::RepositoryError,
    run::RunError,
};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A backup failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Reading backups, or restoring, failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// A volume cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The cluster cannot be spoken to.
    #[error("the cluster cannot be spoken to")]
    Cluster(#[source] Box<kube::Error>),
    /// The controller failed.
    #[error(transparent)]
    Controller(#[from] crate::controller::ControllerError),
    /// Metrics and health cannot be served.
    #[error(transparent)]
    Operator(#[from] crate::operator::ServeError),
    /// The agent of a node cannot work.
    #[error(transparent)]
    Agent(#[from] crate::agent::AgentError),
    /// A signal ended it.
    #[error("{message}")]
    Signal {
        /// What that means.
        message: String,
        /// 128 + number.
        code: u8,
    },
    /// Options contradict each other.
    #[error("{0}")]
    Usage(String),
}

impl CliError {
    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Run(RunError::Unreachable(_)) => 3,
            Self::Run(RunError::Mover(failure)) => failure.exit_code,
            Self::Image(ImageError::Interrupted) | Self::Repository(RepositoryError::Interrupted) => 130,
            Self::Image(error) if error.is_integrity() => 5,
            Self::Repository(error) if error.is_integrity() => 5,
            Self::Usage(_)
            | Self::Run(RunError::NoName)
            | Self::Repository(
                RepositoryError::BadUrl { .. } | RepositoryError::Invalid(_) | RepositoryError::WrongPassphrase { .. },
            ) => 2,
            Self::Image(_)
            | Self::Repository(_)
            | Self::Serve(_)
            | Self::Cluster(_)
            | Self::Controller(_)
            | Self::Operator(_) => 6,
            Self::Signal { code, .. } => *code,
            _ => 4,
        }
    }
}

impl Reason for CliError {
    fn reason(&self) -> &str {
        match self {
            Self::Run(error) => error.reason(),
            Self::Session(error) => error.reason(),
            Self::Image(error) => error.reason(),
            Self::Repository(error) => error.reason(),
            Self::Serve(error) => error.reason(),
            Self::Cluster(_) => "ClusterUnreachable",
            Self::Controller(error) => error.reason(),
            Self::Operator(error) => error.reason(),
            Self::Agent(_) => "NodeUnusable",
            Self::Signal { .. } => "Cancelled",
            Self::Usage(_) => "Usage",
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Run(error) => error.retry(),
            Self::Session(error) => error.retry(),
            Self::Repository(error) => error.retry(),
            Self::Serve(error) => error.retry(),
            Self::Controller(error) => error.retry(),
            Self::Operator(error) => error.retry(),
            Self::Usage(_) => Retry::Terminal,
            _ => Retry::Backoff,
        }
    }
}
