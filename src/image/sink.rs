//! The consumer's side of a stream of pieces.

use super::ImageError;
use crate::extent::Piece;

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
    /// Size of the file in bytes (apparent).
    pub file_bytes: u64,
    /// BLAKE3 of the whole file, 64 lower-case hex digits: what `b3sum FILE` prints. `None` for sinks that are not files.
    pub digest: Option<String>,
}
