//! The monitor edge and its typed face.

use super::QmpError;
use futures::future::BoxFuture;
use serde::{Serialize, de::DeserializeOwned};
use std::{os::fd::OwnedFd, sync::Arc};

/// A way to QEMU's monitor.
///
/// Contract: commands of one caller take effect in the order in which their futures are first polled; every call ends
/// within the transport's time limit; dropping the future does not take the command back. A refused command answers
/// [`QmpError::Refused`]; any other error leaves open whether the command took effect, so the caller must look before
/// it repeats anything.
pub trait Monitor: Send + Sync + std::fmt::Debug {
    /// Sends `command` (a JSON object with `execute` and perhaps `arguments`, no `id`) with these descriptors
    /// (`SCM_RIGHTS`; libvirt takes at most one a command), and returns the value of `return`.
    fn call(&self, command: serde_json::Value, fds: Vec<OwnedFd>)
    -> BoxFuture<'_, Result<serde_json::Value, QmpError>>;

    /// What the user would call the peer: socket path, or libvirt's domain name.
    fn peer(&self) -> String;
}

/// A command with its answer's type. Serialises to its arguments object.
pub trait Command: Serialize + Send + Sync {
    /// The command's name on the wire.
    const NAME: &'static str;
    /// What `return` holds.
    type Reply: DeserializeOwned;
}

/// Typed commands over any [`Monitor`]. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Qmp {
    monitor: Arc<dyn Monitor>,
}

impl Qmp {
    /// Typed commands over this monitor.
    pub fn new(monitor: Arc<dyn Monitor>) -> Self {
        Self { monitor }
    }

    /// What the user would call the peer.
    pub fn peer(&self) -> String {
        self.monitor.peer()
    }

    /// Runs a command.
    pub async fn execute<C: Command>(&self, command: &C) -> Result<C::Reply, QmpError> {
        self.execute_with_fds(command, Vec::new()).await
    }

    /// Runs a command that takes descriptors (`add-fd`, `getfd`).
    pub async fn execute_with_fds<C: Command>(&self, command: &C, fds: Vec<OwnedFd>) -> Result<C::Reply, QmpError> {
        let decode = |source| QmpError::Decode { command: C::NAME.to_owned(), source };
        let arguments = serde_json::to_value(command).map_err(decode)?;
        let mut request = serde_json::json!({ "execute": C::NAME });
        if arguments.as_object().is_some_and(|fields| !fields.is_empty()) {
            request["arguments"] = arguments;
        }
        let reply = self.monitor.call(request, fds).await?;
        serde_json::from_value(reply).map_err(decode)
    }
}
