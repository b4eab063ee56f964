//! The guest agent through libvirt, which owns its socket as it owns the monitor.

use super::{
    connection::refused_argument,
    message::MAX_STRING,
    monitor::LibvirtMonitor,
    rpc::Procedure,
    xdr::{Encoder, XdrError},
};
use crate::qmp::{QmpError, codec};
use serde::de::Error as _;
use serde_json::{Value, json};
use std::time::Duration;

const AGENT_COMMAND: Procedure = Procedure::qemu(3, "virDomainQemuAgentCommand");
const FS_FREEZE: Procedure = Procedure::remote(335, "virDomainFSFreeze");
const FS_THAW: Procedure = Procedure::remote(336, "virDomainFSThaw");

/// What an agent command may take longer than its own time limit: libvirt first synchronises with the agent (5 s).
const SYNCHRONISATION: Duration = Duration::from_secs(10);

impl LibvirtMonitor {
    /// Freezes all file systems of the guest and returns their number.
    ///
    /// An agent that does not answer is noticed by libvirt after 5 s (libvirt error 86, `VIR_ERR_AGENT_UNRESPONSIVE`).
    /// A freeze that itself hangs has no time limit in libvirt; after `limit` this returns [`QmpError::Timeout`], the
    /// freeze may still come to pass, and until the agent answers a thaw is refused (libvirt allows one agent command
    /// at a time): so thaw after every error, and repeat the thaw. Freezing a frozen guest is an error of the agent.
    pub async fn fs_freeze(&self, limit: Duration) -> Result<u32, QmpError> {
        self.file_systems(FS_FREEZE, limit).await
    }

    /// Thaws the guest's file systems and returns their number; 0 when none was frozen.
    pub async fn fs_thaw(&self, limit: Duration) -> Result<u32, QmpError> {
        self.file_systems(FS_THAW, limit).await
    }

    /// Whether the agent answers within the limit (whole seconds, at least one).
    pub async fn guest_ping(&self, limit: Duration) -> Result<(), QmpError> {
        let seconds = u32::try_from(limit.as_secs()).unwrap_or(u32::MAX).max(1);
        self.agent_command(&json!({"execute": "guest-ping"}), seconds).await.map(drop)
    }

    /// Any command of the agent; returns the value of `return`. The agent's errors come as libvirt's (error 1, "unable
    /// to execute QEMU agent command"), their class is lost. Taints the domain `custom-ga-command`.
    pub async fn agent_command(&self, command: &Value, timeout_seconds: u32) -> Result<Value, QmpError> {
        let name = command["execute"].as_str().unwrap_or_default();
        // Zero and less have meanings of their own in libvirt: no wait, its default, no limit.
        let seconds = i32::try_from(timeout_seconds.max(1)).unwrap_or(i32::MAX);
        let mut arguments = Encoder::new();
        self.domain()
            .encode(&mut arguments)
            .and_then(|encoder| encoder.string(&command.to_string(), MAX_STRING))
            .map_err(|error| refused_argument(name, &error))?
            .i32(seconds)
            // Flags: none exist.
            .u32(0);
        let limit = Duration::from_secs(u64::from(timeout_seconds.max(1))) + SYNCHRONISATION;
        let answer = self.connection().call(AGENT_COMMAND, arguments, Vec::new(), limit).await;
        let answer = answer.map_err(|error| error.into_qmp(name))?;
        let reply = self
            .connection()
            .decode(AGENT_COMMAND, &answer, |decoder| decoder.optional(|d| d.string(MAX_STRING).map(str::to_owned)))?;
        let decode = |source| QmpError::Decode { command: name.to_owned(), source };
        // Commands that the agent does not answer (guest-shutdown) have no reply at all.
        let mut reply = codec::parse(reply.as_deref().unwrap_or("{}")).map_err(decode)?;
        reply.get_mut("return").map(Value::take).ok_or_else(|| decode(serde_json::Error::custom("no return")))
    }

    async fn file_systems(&self, procedure: Procedure, limit: Duration) -> Result<u32, QmpError> {
        let mut arguments = Encoder::new();
        self.domain()
            .encode(&mut arguments)
            .map_err(|error| refused_argument(procedure.name, &error))?
            // Mount points: none named means all. Flags: none exist.
            .u32(0)
            .u32(0);
        let answer = self.connection().call(procedure, arguments, Vec::new(), limit).await;
        let answer = answer.map_err(|error| error.into_qmp(procedure.name))?;
        self.connection().decode(procedure, &answer, |decoder| {
            let count = decoder.i32()?;
            u32::try_from(count).map_err(|_| XdrError::TooLong { length: 0, limit: 0 })
        })
    }
}
