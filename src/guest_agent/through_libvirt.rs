//! The guest agent of a domain that libvirt runs: libvirt holds the channel.

use super::{GuestAgent, GuestAgentError};
use crate::qmp::{QmpError, libvirt::LibvirtMonitor};
use futures::{FutureExt, future::BoxFuture};
use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

/// For an agent to say that it is there.
const QUICK: Duration = Duration::from_secs(5);

/// The agent of this domain.
#[derive(Debug)]
pub struct LibvirtAgent(pub Arc<LibvirtMonitor>);

impl GuestAgent for LibvirtAgent {
    fn ping(&mut self) -> BoxFuture<'_, Result<(), GuestAgentError>> {
        async { self.0.guest_ping(QUICK).await.map_err(GuestAgentError::Libvirt) }.boxed()
    }

    fn freeze(&mut self, limit: Duration) -> BoxFuture<'_, Result<u64, GuestAgentError>> {
        async move { self.0.fs_freeze(limit).await.map(u64::from).map_err(GuestAgentError::Libvirt) }.boxed()
    }

    fn thaw(&mut self, limit: Duration) -> BoxFuture<'_, Result<(), GuestAgentError>> {
        // libvirt refuses a thaw while a freeze that hangs is still its one agent command: repeat until the limit.
        async move {
            let deadline = tokio::time::Instant::now() + limit;
            loop {
                match self.0.fs_thaw(limit).await {
                    Ok(_) => return Ok(()),
                    Err(QmpError::Refused { .. }) if tokio::time::Instant::now() < deadline => {
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    }
                    Err(error) => return Err(GuestAgentError::Libvirt(error)),
                }
            }
        }
        .boxed()
    }

    fn duplicate_fd(&self) -> Option<OwnedFd> {
        // libvirt takes any number of clients: the guardian connects on its own.
        None
    }
}
