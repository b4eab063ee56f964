//! Why something that the controller attempted did not happen.

use crate::reason::{Reason, Retry};
use std::time::Duration;

/// An attempt of the controller that failed. None of these ends it: everything is attempted again.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// The lease ran out, or may have: nothing was written.
    #[error("not the leader any more")]
    NotLeader,
    /// No answer before the lease ran out. Whether it was done is not known.
    #[error("the API server did not answer in time to: {what}")]
    NoAnswer {
        /// What was attempted.
        what: &'static str,
    },
    /// Reading failed.
    #[error("cannot read {what}")]
    Read {
        /// What was attempted.
        what: &'static str,
        /// Why.
        #[source]
        source: kube::Error,
    },
    /// Writing failed.
    #[error("cannot {what}")]
    Write {
        /// What was attempted.
        what: &'static str,
        /// Why.
        #[source]
        source: kube::Error,
    },
    /// The server for metrics and health failed.
    #[error(transparent)]
    Serve(#[from] crate::operator::ServeError),
}

impl ControllerError {
    /// Somebody else changed the object meanwhile: what was decided was decided on an old state.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Write { source: kube::Error::Api(status), .. } if status.code == 409)
    }

    /// The object is gone.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Write { source: kube::Error::Api(status), .. } if status.is_not_found())
    }

    /// What an API server refused, in its own words.
    pub(super) fn refusal(&self) -> Option<&str> {
        match self {
            Self::Write { source: kube::Error::Api(status), .. } if matches!(status.code, 400 | 403 | 422) => {
                Some(&status.message)
            }
            _ => None,
        }
    }
}

impl Reason for ControllerError {
    fn reason(&self) -> &str {
        match self {
            Self::NotLeader => "NotLeader",
            Self::NoAnswer { .. } => "NoAnswer",
            Self::Read { .. } => "ReadFailed",
            Self::Write { .. } if self.is_conflict() => "Conflict",
            Self::Write { .. } => "WriteFailed",
            Self::Serve(error) => error.reason(),
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::NotLeader => Retry::After(Duration::from_secs(5)),
            Self::Serve(error) => error.retry(),
            _ if self.is_conflict() => Retry::After(Duration::from_millis(200)),
            _ => Retry::Backoff,
        }
    }
}
