//! Errors of the NBD client.

use crate::reason::{Reason, Retry};

/// Why reading over NBD failed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The connection failed.
    #[error("the NBD connection failed")]
    Io(#[source] std::io::Error),
    /// The server closed the connection: QEMU exited, or the export was removed.
    #[error("the NBD server closed the connection")]
    Closed,
    /// The server refused an option of the handshake.
    #[error("the NBD server refused {option}: {message}")]
    Refused {
        /// What was asked for.
        option: &'static str,
        /// The server's text, or the code.
        message: String,
    },
    /// The server broke the protocol.
    #[error("the NBD server sent what the protocol does not allow: {0}")]
    Protocol(String),
    /// The server could not read. A broken snapshot answers 22 (EINVAL): QEMU maps EACCES to it.
    #[error("the NBD server could not read at {offset}: error {errno}{}", if *.errno == 22 { " (the snapshot is broken: old data could not be kept)" } else { "" })]
    Read {
        /// Byte offset of the request.
        offset: u64,
        /// NBD error number (those of Linux).
        errno: u32,
    },
}

impl Reason for NbdError {
    fn reason(&self) -> &str {
        match self {
            Self::Io(_) | Self::Closed => "NbdConnectionLost",
            Self::Refused { .. } => "NbdRefused",
            Self::Protocol(_) => "NbdProtocolError",
            Self::Read { errno: 22, .. } => "SnapshotBroken",
            Self::Read { .. } => "NbdReadError",
        }
    }

    fn retry(&self) -> Retry {
        Retry::Backoff
    }
}

impl From<std::io::Error> for NbdError {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match error.kind() {
            // A server that goes with requests unread resets the connection.
            UnexpectedEof | ConnectionReset | BrokenPipe => Self::Closed,
            _ => Self::Io(error),
        }
    }
}
