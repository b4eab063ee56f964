//! Errors of the monitor and its transports.

use crate::reason::{Reason, Retry};
use std::time::Duration;

/// QEMU's error class (`QapiErrorClass`), the only part of an error that QEMU promises to keep stable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// The command does not exist in this QEMU.
    CommandNotFound,
    /// The device is not active.
    DeviceNotActive,
    /// The named device, node or job does not exist.
    DeviceNotFound,
    /// The machine lacks a capability.
    KvmMissingCap,
    /// A class that this version does not know.
    Other(String),
}

impl ErrorClass {
    /// Reads the word that QEMU sends.
    pub fn from_wire(word: &str) -> Self {
        match word {
            "GenericError" => Self::GenericError,
            "CommandNotFound" => Self::CommandNotFound,
            "DeviceNotActive" => Self::DeviceNotActive,
            "DeviceNotFound" => Self::DeviceNotFound,
            "KVMMissingCap" => Self::KvmMissingCap,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// Why a monitor command, or reaching the monitor, failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be connected.
    #[error("cannot connect to {path}")]
    Connect {
        /// Socket path as the user gave it.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No greeting came: QEMU serves one client a monitor, and another one holds it.
    #[error(
        "monitor {path} does not answer: another client holds it (QEMU serves one client per monitor socket); close that client, or give QEMU a second monitor"
    )]
    Occupied {
        /// Socket path as the user gave it.
        path: String,
    },
    /// The connection ended: QEMU or libvirtd closed it, exited or died.
    #[error("the connection to {peer} was closed")]
    Closed {
        /// Path or name of the peer.
        peer: String,
    },
    /// The connection failed.
    #[error("cannot talk to {peer}")]
    Io {
        /// Path or name of the peer.
        peer: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No answer within the time limit. Whether the command took effect is unknown.
    #[error("no answer to {command} within {limit:?}")]
    Timeout {
        /// The command without its arguments.
        command: String,
        /// The limit that passed.
        limit: Duration,
    },
    /// The peer broke the protocol.
    #[error("{peer} sent what the protocol does not allow: {detail}")]
    Protocol {
        /// Path or name of the peer.
        peer: String,
        /// What is wrong, with at most a short excerpt of the input.
        detail: String,
    },
    /// An answer does not have the shape that the command promises.
    #[error("unexpected answer to {command}")]
    Decode {
        /// The command without its arguments.
        command: String,
        /// What did not fit.
        #[source]
        source: serde_json::Error,
    },
    /// QEMU (or libvirt) refused the command.
    #[error("{command} was refused: {description}")]
    Refused {
        /// The command without its arguments.
        command: String,
        /// QEMU's error class.
        class: ErrorClass,
        /// The text for people; unstable, for display only.
        description: String,
    },
}

impl QmpError {
    /// Whether QEMU said that the named thing does not exist. QEMU answers most of these with `GenericError`
    /// ("Cannot find device=x nor node-name=x", "Failed to find node with node-name='x'"), so for anything but jobs
    /// look before you ask instead of relying on this.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { class: ErrorClass::DeviceNotFound | ErrorClass::DeviceNotActive, .. })
    }

    /// Whether the peer is gone, so that no further command can succeed on this connection.
    pub fn is_disconnected(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Io { .. } | Self::Connect { .. } | Self::Protocol { .. })
    }
}

impl Reason for QmpError {
    fn reason(&self) -> &str {
        match self {
            Self::Connect { .. } => "MonitorUnreachable",
            Self::Occupied { .. } => "MonitorOccupied",
            Self::Closed { .. } | Self::Io { .. } => "MonitorLost",
            Self::Timeout { .. } => "MonitorTimeout",
            Self::Protocol { .. } | Self::Decode { .. } => "MonitorProtocolError",
            Self::Refused { .. } => "CommandRefused",
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Occupied { .. } | Self::Timeout { .. } | Self::Connect { .. } => Retry::Backoff,
            _ => Retry::Terminal,
        }
    }
}
