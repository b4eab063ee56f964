//! The QEMU guest agent: freezing and thawing the guest's file systems.

mod qga;
mod through_libvirt;

pub use qga::QgaSocket;
pub use through_libvirt::LibvirtAgent;

use crate::{
    qmp::QmpError,
    reason::{Reason, Retry},
};
use futures::future::BoxFuture;
use std::time::Duration;

/// Why the guest agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestAgentError {
    /// The socket cannot be reached, or broke.
    #[error("cannot talk to the guest agent at {path}")]
    Io {
        /// The socket.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No answer: there is no agent in the guest, or it hangs.
    #[error("the guest agent did not answer {command} within {limit:?}; is qemu-guest-agent running in the guest?")]
    NoAnswer {
        /// The command.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// The agent refused.
    #[error("the guest agent refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// Its words.
        description: String,
    },
    /// The way through libvirt failed.
    #[error("the guest agent cannot be reached through libvirt")]
    Libvirt(#[source] QmpError),
}

impl Reason for GuestAgentError {
    fn reason(&self) -> &str {
        match self {
            Self::Io { .. } | Self::Libvirt(_) => "GuestAgentUnreachable",
            Self::NoAnswer { .. } => "GuestAgentSilent",
            Self::Refused { .. } => "GuestAgentRefused",
        }
    }

    fn retry(&self) -> Retry {
        Retry::Backoff
    }
}

/// A way to the guest agent.
///
/// Contract: every call ends within its limit. `thaw` is idempotent, and is worth calling after a `freeze` that ended
/// in any error: the guest may have frozen all the same.
pub trait GuestAgent: Send + Sync + std::fmt::Debug {
    /// Checks that somebody answers, so that a freeze is not sent into the void.
    fn ping(&mut self) -> BoxFuture<'_, Result<(), GuestAgentError>>;
    /// Freezes all file systems; the number of those frozen.
    fn freeze(&mut self, limit: Duration) -> BoxFuture<'_, Result<u64, GuestAgentError>>;
    /// Thaws all file systems.
    fn thaw(&mut self, limit: Duration) -> BoxFuture<'_, Result<(), GuestAgentError>>;
    /// A duplicate of the connection for a guardian process, where the agent serves one client only.
    fn duplicate_fd(&self) -> Option<std::os::fd::OwnedFd>;
}
