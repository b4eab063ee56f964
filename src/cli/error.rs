//! Errors of commands, and what they mean for the exit code.

use crate::{
    fleecing::SessionError,
    image::ImageError,
    mover::PullError,
    nbd::ServeError,
    qmp::QmpError,
    reason::{Reason, Retry},
    repository::RepositoryError,
};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The VM's monitor cannot be reached.
    #[error("the VM cannot be reached")]
    Unreachable(#[source] QmpError),
    /// A session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A volume could not be copied.
    #[error("volume `{volume}` could not be backed up")]
    Volume {
        /// The volume.
        volume: String,
        /// Why.
        #[source]
        source: PullError,
    },
    /// The target of a backup failed.
    #[error("the backup could not be stored")]
    Target(#[source] ImageError),
    /// Reading backups, or restoring, failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// A volume cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The target takes nothing any more.
    #[error(
        "the target took no data for {seconds} seconds; see whether it is reachable and has space (--stall-timeout)"
    )]
    Stalled {
        /// Seconds.
        seconds: u64,
    },
    /// A guest agent was required and cannot be reached.
    #[error("the guest agent cannot be reached")]
    GuestAgent(#[from] crate::guest_agent::GuestAgentError),
    /// The cluster cannot be spoken to.
    #[error("the cluster cannot be spoken to")]
    Cluster(#[source] Box<kube::Error>),
    /// The controller failed.
    #[error(transparent)]
    Controller(#[from] crate::controller::ControllerError),
    /// Metrics and health cannot be served.
    #[error(transparent)]
    Operator(#[from] crate::operator::ServeError),
    /// A signal ended it.
    #[error("{signal}: the backup was given up, the VM was left as it was before")]
    Signal {
        /// `interrupted` or `terminated`.
        signal: &'static str,
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
            Self::Unreachable(_) => 3,
            Self::Image(ImageError::Interrupted) | Self::Repository(RepositoryError::Interrupted) => 130,
            Self::Image(error) if error.is_integrity() => 5,
            Self::Repository(error) if error.is_integrity() => 5,
            Self::Usage(_)
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
    fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable(error) => error.reason(),
            Self::Session(error) => error.reason(),
            Self::Volume { source, .. } => source.reason(),
            Self::Target(error) | Self::Image(error) => error.reason(),
            Self::Repository(error) => error.reason(),
            Self::Serve(error) => error.reason(),
            Self::Stalled { .. } => "TargetStalled",
            Self::GuestAgent(error) => error.reason(),
            Self::Cluster(_) => "ClusterUnreachable",
            Self::Controller(error) => error.reason(),
            Self::Operator(error) => error.reason(),
            Self::Signal { .. } => "Cancelled",
            Self::Usage(_) => "Usage",
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Unreachable(error) => error.retry(),
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
