//! The consumer's side of a stream of pieces.

use super::ImageError;
use crate::{
    extent::Piece,
    reason::{Reason, Retry},
};
use std::{error::Error, fmt};

/// Takes the content of one disk.
///
/// Contract: calls block, so they run on a thread of their own. Pieces come in ascending order without overlap. After
/// an error the sink is useless and is dropped; nothing that it wrote counts. Only [`ImageSink::finish`] makes the
/// content durable: when it returns, the bytes survive a power cut.
pub trait ImageSink: Send {
    /// Takes the next piece.
    fn write(&mut self, piece: Piece) -> Result<(), ImageError>;

    /// Completes the image and makes it durable.
    fn finish(self: Box<Self>) -> Result<SinkSummary, ImageError>;
}

/// What a sink did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SinkSummary {
    /// Bytes of disk content taken as data.
    pub data_bytes: u64,
    /// Bytes of disk content taken as zeroes (declared, or found to be zero).
    pub zero_bytes: u64,
    /// Bytes of data that the target did not have before.
    pub new_bytes: u64,
    /// Bytes that the target took for it: of a file its size (apparent), of a repository what was sent.
    pub stored_bytes: u64,
    /// What names the content, 64 lower-case hex digits: of a file its BLAKE3 (what `b3sum FILE` prints), in a
    /// repository the root of the index. `None` for devices.
    pub content: Option<String>,
}

/// The error of a source or sink that is no image.
#[derive(Debug)]
pub struct ForeignError(Box<dyn Reason + Send + Sync>);

impl ForeignError {
    /// Wraps its own error.
    pub fn new(error: impl Reason + Send + Sync + 'static) -> Self {
        Self(Box::new(error))
    }
}

impl fmt::Display for ForeignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for ForeignError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

impl Reason for ForeignError {
    fn reason(&self) -> &str {
        self.0.reason()
    }

    fn retry(&self) -> Retry {
        self.0.retry()
    }
}
