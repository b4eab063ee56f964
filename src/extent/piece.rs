//! The unit in which disk content travels from a source to a sink.

use super::ByteRange;
use bytes::Bytes;

/// A part of a disk's content. A stream of pieces is in ascending order and does not overlap; what no piece covers is
/// unchanged since the parent backup (or zero in a full backup).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// These bytes at this offset.
    Data {
        /// Byte offset on the disk.
        offset: u64,
        /// The content, never empty.
        bytes: Bytes,
    },
    /// This range reads as zeroes. Kept in incremental backups as well: a block that the guest zeroed since the parent
    /// backup must restore as zeroes.
    Zero(ByteRange),
}

impl Piece {
    /// The range that the piece covers, `None` for empty data.
    pub fn range(&self) -> Option<ByteRange> {
        match self {
            Self::Data { offset, bytes } => ByteRange::with_length(*offset, bytes.len() as u64),
            Self::Zero(range) => Some(*range),
        }
    }
}
