//! Errors of a mover.

use super::{Cause, ChannelError, MoverFailure, PullError};
use crate::{
    image::ImageError,
    reason::{Reason, Retry},
    repository::RepositoryError,
};

/// Why a mover gave up.
#[derive(Debug, thiserror::Error)]
pub enum MoverError {
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
    /// A repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// A disk of a stopped VM cannot be read.
    #[error("volume `{volume}` of the stopped VM cannot be read")]
    Offline {
        /// The volume.
        volume: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The driver said something that makes no sense, or went away.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The configuration cannot be used.
    #[error("{0}")]
    Config(String),
}

impl MoverError {
    /// The exit code of a command that fails for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Repository(RepositoryError::Interrupted) => 130,
            Self::Repository(error) if error.is_integrity() => 5,
            Self::Config(_)
            | Self::Repository(
                RepositoryError::BadUrl { .. } | RepositoryError::Invalid(_) | RepositoryError::WrongPassphrase { .. },
            ) => 2,
            Self::Repository(_) => 6,
            _ => 4,
        }
    }

    /// In a form that crosses a socket.
    pub fn to_failure(&self) -> MoverFailure {
        MoverFailure {
            reason: self.reason().to_owned(),
            message: self.to_string(),
            cause: Cause::of(self),
            retryable: self.retry() != Retry::Terminal,
            exit_code: self.exit_code(),
        }
    }
}

impl Reason for MoverError {
    fn reason(&self) -> &str {
        match self {
            Self::Volume { source, .. } => source.reason(),
            Self::Target(error) => error.reason(),
            Self::Repository(error) => error.reason(),
            Self::Offline { .. } => "VolumeUnreadable",
            Self::Channel(ChannelError::Protocol(_)) => "ProtocolError",
            Self::Channel(_) => "AgentLost",
            Self::Config(_) => "InvalidConfiguration",
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Repository(error) => error.retry(),
            Self::Config(_) => Retry::Terminal,
            _ => Retry::Backoff,
        }
    }
}
