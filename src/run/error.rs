//! Errors of a run.

use crate::{
    fleecing::SessionError,
    mover::{ChannelError, MoverFailure},
    qmp::QmpError,
    reason::{Reason, Retry},
};

/// Why a backup failed. The VM is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The VM's monitor cannot be reached.
    #[error("the VM cannot be reached")]
    Unreachable(#[source] QmpError),
    /// The session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The mover failed.
    #[error(transparent)]
    Mover(MoverFailure),
    /// The mover went away, or cannot be understood.
    #[error("the mover is lost")]
    MoverLost(#[from] ChannelError),
    /// The target takes nothing any more.
    #[error(
        "the target took no data for {seconds} seconds; see whether it is reachable and has space (--stall-timeout)"
    )]
    Stalled {
        /// Seconds.
        seconds: u64,
    },
    /// The VM has no name.
    #[error("this VM has no name: give it one with --vm NAME")]
    NoName,
    /// Somebody asked for the end.
    #[error("{}", .0.message)]
    Stopped(Stop),
}

/// Why a run is to end early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// Stable word.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Reason for RunError {
    fn reason(&self) -> &str {
        match self {
            Self::Unreachable(error) => error.reason(),
            Self::Session(error) => error.reason(),
            Self::Mover(failure) => &failure.reason,
            Self::MoverLost(_) => "MoverLost",
            Self::Stalled { .. } => "TargetStalled",
            Self::NoName => "Usage",
            Self::Stopped(stop) => &stop.reason,
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Unreachable(error) => error.retry(),
            Self::Session(error) => error.retry(),
            Self::Mover(failure) if !failure.retryable => Retry::Terminal,
            Self::NoName => Retry::Terminal,
            _ => Retry::Backoff,
        }
    }
}
